"""Bases of 16, 8 and 4 bits, with the real layers of bitsandbytes and torchao on the CPU."""

import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from exported import settings_of
from flags import FLAGS
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file
from text_files import write
from tiny_text import make_tokenizer, save_tiny_decoder, save_tiny_model
from tolerance import NETWORK, close
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from geolora_pl import AdapterConfig, GeoLoRACallback, export_peft, load_adapter, merge_adapters, save_adapter
from geolora_pl.adapters.counts import Counts
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.quantised import keep_trainable, quantised_names
from geolora_pl.cli.dispatch import main
from geolora_pl.data import LanguageFiles, TextFiles
from geolora_pl.lightning.export import export
from geolora_pl.tasks import CausalLM, TextClassification, low_bit

TEXTS = ["the film was good", "bad", "one two three four five six seven", "a plot and a film"] * 3
X = {"input_ids": torch.arange(4, 12)[None]}
BITS = [4, 8]


@pytest.fixture(autouse=True)
def _libraries():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")


@pytest.fixture
def decoder(tmp_path):
    return save_tiny_decoder(tmp_path / "model", "llama", hidden_size=64, intermediate_size=96)


@pytest.fixture
def texts(tmp_path):
    return LanguageFiles(
        *[write(tmp_path / "texts.jsonl", text=TEXTS)] * 2, max_length=8, batch_size=4, cache_dir=tmp_path / "cache"
    )


@pytest.fixture
def labelled(tmp_path):
    file = write(tmp_path / "train.tsv", text=TEXTS, label=["pos", "neg"] * 6)
    return TextFiles(file, val_file=file, batch_size=4, cache_dir=tmp_path / "cache")


def fitted(module, data, *more, **settings):
    runs = trainer(GeoLoRACallback(), *more, **{"max_epochs": 2, **settings})
    runs.fit(module, data)
    return runs


def holds(weight, bits):
    """Whether a weight is one of the library's own, of so many bits."""
    return type(weight).__name__ == {4: "Params4bit", 8: "Int8Tensor"}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_decoder_learns_in_float32_adapters_also_after_a_validation(decoder, texts, bits):
    """A user sets ``quantization: {bits: 4}``: every adapter of the quantised layers is trained, in every step.

    Where the CPU has instructions for bfloat16, bitsandbytes packs its weights anew at the first validation, and the
    layers below get no gradient from then on, or fail.
    """

    class Seen(Callback):
        gradients = ()

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.gradients += (min(layer.L.grad.abs().sum() for layer in find_adapters(module).values()),)

    module, seen = CausalLM(decoder, dtype="bfloat16", quantization={"bits": bits}), Seen()
    runs = fitted(module, texts, seen)
    layers = find_adapters(module.model)
    assert len(layers) == 14
    assert all(holds(layer.base.weight, bits) for layer in layers.values())
    assert all(factor.dtype == torch.float32 for layer in layers.values() for factor in (layer.U, layer.K, layer.L))
    assert module.model.lm_head.weight.dtype == module.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert len(seen.gradients) == runs.global_step == 4
    assert min(seen.gradients) > 0
    assert runs.callback_metrics["val_loss"] < 3.2


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_counts_as_many_parameters_as_the_plain_one(decoder, bits):
    """A user reads how large the adapters are beside the base; of 4-bit codes two are stored as one number."""
    plain, quantised = CausalLM(decoder), CausalLM(decoder, quantization={"bits": bits})
    counts = []
    for module in (plain, quantised):
        module.configure_model()
        counts.append(Counts.of(module, find_adapters(module)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_leaves_a_quantised_base_out_and_a_resumed_run_equals_one_run(decoder, texts, tmp_path, bits):
    """A user resumes a run on a quantised base, and predicts with its checkpoint: the base comes from its files."""

    def make():
        return CausalLM(decoder, quantization={"bits": bits})

    whole = make()
    fitted(whole, texts, ModelCheckpoint(tmp_path, "run", every_n_train_steps=3, save_on_train_epoch_end=False))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in saved} == set("USVKL")

    again = make()
    trainer(GeoLoRACallback(), max_epochs=2).fit(again, texts, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(again.eval()(X), whole.eval()(X))

    other = save_tiny_decoder(tmp_path / "other", "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    plain = AutoModelForCausalLM.from_pretrained(other)
    plain.model.layers[0].mlp.up_proj.weight.data.neg_()
    plain.save_pretrained(other)
    with pytest.raises(ValueError, match="this base is not the one"):
        CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", pretrained=True, model_name=other)
    with pytest.raises(ValueError, match="pretrained of the checkpoint is not taken from a file"):
        CausalLM.load_from_checkpoint(tmp_path / "run.ckpt")


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_is_loaded_onto_its_base_from_python(decoder, texts, tmp_path, bits):
    module = CausalLM(decoder, quantization={"bits": bits})
    fitted(module, texts).save_checkpoint(tmp_path / "run.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", pretrained=True)
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    plain = CausalLM(decoder, quantization={"bits": bits})
    plain.model = plain.build_model()
    load_adapter(plain, tmp_path / "run.ckpt")
    assert torch.equal(plain.eval()(X), module(X))


@pytest.mark.parametrize("bits", BITS)
def test_a_head_is_float32_and_not_quantised_and_exports_give_its_logits(tmp_path, labelled, bits):
    """A user classifies with a quantised encoder: its head and pooler are trained in float32."""
    name = save_tiny_model(tmp_path / "model", "bert", hidden_size=64, intermediate_size=96)
    module = TextClassification(name, dtype="bfloat16", quantization={"bits": bits})
    fitted(module, labelled)
    model = module.model
    assert holds(model.bert.encoder.layer[0].output.dense.base.weight, bits)
    for part in (model.bert.pooler.dense, model.classifier):
        assert type(part) is nn.Linear
        assert part.weight.dtype == torch.float32
        assert part.weight.requires_grad
    batch = make_tokenizer()(["good film", "the plot was"], padding=True, return_tensors="pt")
    logits = module.eval()(batch)
    assert logits.dtype == torch.float32

    def base():
        return TextClassification(name, num_classes=2, dtype="bfloat16", quantization={"bits": bits}).build_model()

    save_adapter(model, tmp_path / "adapter.safetensors")
    plain = base()
    load_adapter(plain, tmp_path / "adapter.safetensors")
    assert torch.equal(plain.eval()(**batch).logits, logits)


@pytest.mark.parametrize("bits", BITS)
def test_exports_of_a_quantised_base_compute_what_was_trained(decoder, texts, tmp_path, bits, monkeypatch):
    """A user exports a run on a quantised base: for PEFT on that base, and as plain weights for from_pretrained."""
    monkeypatch.chdir(tmp_path)
    settings = {"model_name": decoder, "quantization": {"bits": bits}}
    module = CausalLM(**settings, adapter=AdapterConfig(target_modules="auto", exclude_modules=["v_proj"]))
    fitted(module, texts).save_checkpoint(tmp_path / "run.ckpt")
    logits = module.eval()(X)

    export_peft(module.model, tmp_path / "peft")
    base = CausalLM(**settings).build_model()
    keep_trainable(base)  # the other form takes no layer of 96 inputs
    served = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    close(served(**X).logits, logits, NETWORK)

    adapter = {"target_modules": "auto", "exclude_modules": ["v_proj"]}
    export("run.ckpt", "merged", "merged", config=settings_of(tmp_path, "CausalLM", **settings, adapter=adapter))
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    assert {weight.dtype for weight in load_file("merged/model.safetensors").values()} == {torch.float32}
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert type(merged.model.layers[0].self_attn.v_proj) is nn.Linear
    close(merged(**X).logits, logits, NETWORK)

    save_adapter(module.model, "adapter.safetensors")
    with pytest.raises(ValueError, match="and quantised as it was then"):
        load_adapter(CausalLM(decoder).build_model(), "adapter.safetensors")
    load_adapter(CausalLM(**settings).build_model(), "adapter.safetensors")


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_stored_quantised_are_adapted_as_they_are(decoder, texts, tmp_path, bits):
    """A user names a model whose files are quantised already."""
    CausalLM(decoder, quantization={"bits": bits}).build_model().save_pretrained(tmp_path / "stored")
    make_tokenizer("llama").save_pretrained(tmp_path / "stored")
    module = CausalLM(str(tmp_path / "stored"))
    fitted(module, texts).save_checkpoint(tmp_path / "run.ckpt")
    assert all(holds(layer.base.weight, bits) for layer in find_adapters(module.model).values())
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", pretrained=True).eval()
    assert torch.equal(loaded(X), module.eval()(X))
    with pytest.raises(ValueError, match="are quantised already: leave it out"):
        CausalLM(str(tmp_path / "stored"), quantization={"bits": bits}).build_model()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_head_on_a_base_of_16_bits_is_trained_in_float32_and_a_checkpoint_is_whole(tmp_path, labelled, precision):
    """A user sets ``dtype: bfloat16``: what is trained is float32, and the checkpoint needs no folder."""
    name = save_tiny_model(tmp_path / "model", "roberta")
    norms = AdapterConfig(target_modules="auto", modules_to_save=("LayerNorm",))
    module = TextClassification(name, num_classes=2, dtype="bfloat16", adapter=norms)
    module.configure_model()
    head = module.model.classifier.dense.weight.clone()
    fitted(module, labelled, precision=precision).save_checkpoint(tmp_path / "run.ckpt")
    wide = {p.requires_grad for p in module.model.parameters() if p.dtype == torch.float32}
    narrow = {p.requires_grad for p in module.model.parameters() if p.dtype == torch.bfloat16}
    assert (wide, narrow) == ({True, False}, {False})  # U, S and V are moved otherwise
    assert not torch.equal(module.model.classifier.dense.weight, head)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    loaded = TextClassification.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    batch = make_tokenizer("roberta")(["good film", "bad"], padding=True, return_tensors="pt")
    assert torch.equal(loaded(batch), module.eval()(batch))
    assert loaded.model.roberta.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float16), (None, torch.float32)])
def test_the_type_is_that_of_the_file_if_asked_for(tmp_path, dtype, expected):
    name = save_tiny_decoder(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(name, dtype=torch.float16).save_pretrained(name)
    module = CausalLM(name, dtype=dtype)
    module.configure_model()
    assert module.model.dtype == expected
    assert module.hparams["dtype"] == (dtype and "float16")


def test_attention_is_computed_as_asked_for_and_a_checkpoint_does_not_say_how(decoder, texts, tmp_path):
    outputs = []
    for kind in ("eager", "sdpa"):
        torch.manual_seed(0)
        module = CausalLM(decoder, attn_implementation=kind)
        module.configure_model()
        assert module.model.config._attn_implementation == kind
        outputs.append(module.eval()(X))
    close(*outputs, NETWORK)
    runs = fitted(CausalLM(decoder, attn_implementation="eager"), texts)
    runs.save_checkpoint(tmp_path / "run.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.model.config._attn_implementation == "sdpa"


def test_checkpointing_of_the_blocks_changes_no_gradient_of_a_quantised_base(decoder):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = CausalLM(decoder, quantization={"bits": 4}, gradient_checkpointing=checkpointing)
        module.configure_model()
        assert module.model.is_gradient_checkpointing == checkpointing
        module(X).square().sum().backward()
        gradients.append([layer.L.grad for layer in find_adapters(module).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(("bits", "setting"), [(4, "llm_int8_skip_modules"), (8, "modules_to_not_convert")])
def test_modules_that_are_named_stay_as_they_are(decoder, bits, setting):
    module = CausalLM(decoder, quantization={"bits": bits, setting: ["o_proj"]})
    module.configure_model()
    attention = module.model.model.layers[0].self_attn
    assert holds(attention.q_proj.base.weight, bits)
    assert type(attention.o_proj.base) is nn.Linear
    assert type(attention.o_proj.base.weight) is nn.Parameter
    assert type(module.model.lm_head.weight) is nn.Parameter
    with pytest.raises(ValueError, match=rf"quantization\.{setting}=\['oproj'\] matches no module"):
        CausalLM(decoder, quantization={"bits": bits, setting: ["oproj"]}).configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of auto, bfloat16, float16, float32"),
        ({"attn_implementation": "magic"}, "attn_implementation='magic' must be one of eager, sdpa, flash_attention_2"),
        ({"quantization": {"bits": 3}}, "must say {bits: 4} or {bits: 8}"),
        ({"quantization": {"bits": [4]}}, "must say {bits: 4} or {bits: 8}"),
        ({"quantization": {"bits": 4, "kind": "nf4"}}, "quantization.kind='nf4' is not a setting with 4 bits: choose"),
        ({"quantization": {"bits": 4, "bnb_4bit_quant_type": "nf3"}}, "must be one of nf4, fp4"),
        ({"quantization": {"bits": 4, "bnb_4bit_quant_type": None}}, "must be one of nf4, fp4"),
        ({"quantization": {}}, "must say {bits: 4} or {bits: 8}"),
        ({"quantization": {"bits": 4, "bnb_4bit_use_double_quant": 1}}, "must be true or false"),
        ({"quantization": {"bits": 8, "modules_to_not_convert": ["(a+)+"]}}, "must be a list of names of modules"),
        ({"quantization": {"bits": 8}, "pretrained": False}, "quantization is for pretrained weights"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CausalLM("somewhere", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": {"bits": 4}, "adapter": AdapterConfig(target_modules="auto", train_bias=True)},
            "train_bias=True",
        ),
        ({"dtype": "float16", "adapter": AdapterConfig(target_modules="auto", train_bias="all")}, "train_bias='all'"),
        ({"attn_implementation": "flash_attention_2"}, "needs a GPU and the package flash-attn"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_training(decoder, settings, message, monkeypatch):
    monkeypatch.setattr(low_bit, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(low_bit, "is_kernels_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        CausalLM(decoder, **settings).configure_model()


def test_a_model_without_such_attention_is_refused_with_the_setting(tmp_path):
    name = save_tiny_model(tmp_path / "model", "deberta-v2")
    with pytest.raises(ValueError, match="attn_implementation='sdpa' does not suit"):
        TextClassification(name, num_classes=2, attn_implementation="sdpa").configure_model()


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"quantization": {"bits": 8}}])
def test_a_precision_that_makes_everything_16_bits_is_refused_beside_them(decoder, texts, settings):
    with pytest.raises(ValueError, match="precision='bf16-true' makes all weights 16 bits"):
        fitted(CausalLM(decoder, **settings), texts, precision="bf16-true")


@pytest.mark.parametrize(("bits", "library"), [(4, "bitsandbytes"), (8, "torchao")])
def test_a_missing_library_is_named_with_what_to_install(decoder, monkeypatch, bits, library):
    monkeypatch.setattr(low_bit, f"is_{library}_available", lambda: False)
    with pytest.raises(ValueError, match=rf"needs {library}: pip install 'geolora_pl\[lowbit\]'"):
        CausalLM(decoder, quantization={"bits": bits}).configure_model()


def test_a_checkpoint_says_no_more_of_quantisation_than_a_user_may(decoder, texts, tmp_path):
    fitted(CausalLM(decoder, quantization={"bits": 8}), texts).save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["quantization"] = {"bits": 8, "quant_type": "evil.Evil"}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"quant_type='evil\.Evil' is not a setting with 8 bits"):
        CausalLM.load_from_checkpoint(tmp_path / "evil.ckpt", pretrained=True)


def test_the_command_line_takes_the_settings_and_a_checkpoint_predicts(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts.jsonl", text=TEXTS)
    common = [
        "--model=geolora_pl.tasks.CausalLM",
        f"--model.model_name={decoder}",
        "--model.quantization={bits: 4, bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}",
        "--model.dtype=bfloat16",
        "--model.attn_implementation=eager",
        "--model.gradient_checkpointing=true",
        "--data=geolora_pl.data.LanguageFiles",
        "--data.train_file=texts.jsonl",
        "--data.cache_dir=cache",
        "--data.max_length=8",
        "--data.batch_size=4",
        "--trainer.logger=false",
        *FLAGS,
    ]
    main(["fit", *common, "--trainer.max_epochs=1", "--trainer.default_root_dir=run"])
    (checkpoint,) = Path("run").rglob("*.ckpt")
    main(["validate", *common, f"--ckpt_path={checkpoint}"])


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_merged_classifier_is_plain_and_of_one_type(tmp_path, labelled, dtype, expected):
    """A user merges a classifier on a base of 4 bits: from_pretrained loads it as any other, with its classes."""
    name = save_tiny_model(tmp_path / "model", "bert", hidden_size=64, intermediate_size=96)
    module = TextClassification(name, quantization={"bits": 4}, dtype=dtype)
    fitted(module, labelled)
    batch = make_tokenizer()(["good film"], return_tensors="pt")
    logits = module.eval()(batch)
    merge_adapters(module.model)
    (tmp_path / "out").mkdir()
    module.save_model(tmp_path / "out")
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {expected}
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert set(merged.config.id2label.values()) == {"pos", "neg"}
    if dtype is None:
        close(merged(**batch).logits, logits, NETWORK)


def test_a_base_that_is_sharded_is_not_quantised(decoder):
    module = CausalLM(decoder, quantization={"bits": 4})
    module._device_mesh = object()  # as ModelParallelStrategy sets it
    with pytest.raises(ValueError, match="cannot shard quantised weights: take strategy ddp"):
        module.configure_model()


@pytest.mark.parametrize("bits", BITS)
def test_ddp_trains_on_a_quantised_base(decoder, texts, bits):
    """A user trains with DDP, which packs what it sends; the weights of torchao cannot be packed."""
    module = CausalLM(decoder, quantization={"bits": bits})
    with mock.patch.dict(os.environ):  # where Lightning tells the processes of one another
        fitted(module, texts, devices=1, strategy="ddp", max_epochs=1)
    dist.destroy_process_group()
    assert all(layer.S.any() for layer in find_adapters(module.model).values())


@pytest.mark.usefixtures("one_thread")
def test_a_forked_process_cannot_send_a_quantised_base_back(decoder, texts):
    module = CausalLM(decoder, quantization={"bits": 8})
    module.configure_model()
    with pytest.raises(ProcessRaisedException, match="use strategy='ddp'"):
        fitted(module, texts, devices=2, strategy="ddp_fork", max_epochs=1)


class OfYourOwn(Foreign):
    """A module with layers of bitsandbytes, which knows nothing of us."""

    def __init__(self):
        super().__init__()
        from bitsandbytes.nn import LinearNF4

        for name in ("0", "2"):
            plain = self.body[int(name)]
            layer = LinearNF4(plain.in_features, plain.out_features, compute_dtype=torch.float32)
            layer.load_state_dict(plain.state_dict())
            setattr(self.body, name, layer.to("cpu"))  # which quantises it


def test_a_module_of_your_own_with_4_bit_layers_resumes(tmp_path):
    """A user puts 4-bit layers into a LightningModule: a run goes on from its checkpoint, which leaves them out."""

    def runs(epochs):
        return trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=epochs)

    first = runs(1)
    first.fit(OfYourOwn(), loader(), loader())
    first.save_checkpoint(tmp_path / "run.ckpt")
    assert not any("weight." in name for name in torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    again, second = OfYourOwn(), runs(2)
    second.fit(again, loader(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert second.global_step == 2 * first.global_step
    assert all(layer.S.any() for layer in find_adapters(again).values())


def test_complex_and_whole_parameters_of_your_own_are_no_codes():
    """A user's module has complex weights, or an index as a parameter: its checkpoints stay whole."""
    module = nn.Module()
    module.register_parameter("complex", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    module.register_parameter("index", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    assert quantised_names(module) == []
