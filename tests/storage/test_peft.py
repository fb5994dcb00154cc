import copy
import json
import os

import pytest
import timm
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_text import FAMILIES
from tolerance import EXACT, NETWORK, close, is_orthonormal, rounding
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, ViTConfig
from transformers import ViTForImageClassification as HFViT
from transformers.pytorch_utils import Conv1D

from geolora_pl import (
    AdapterConfig,
    export_peft,
    import_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
TIED = AutoConfig.for_model("llama", **FAMILIES["llama"], tie_word_embeddings=True)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def text_model(family, auto=AutoModelForSequenceClassification):
    torch.manual_seed(5)
    return auto.from_config(AutoConfig.for_model(family, **FAMILIES[family])).double().eval()


def hf_vit():
    torch.manual_seed(5)
    return HFViT(ViTConfig(image_size=16, patch_size=8, num_labels=3, **VIT)).double().eval()


def timm_vit():
    torch.manual_seed(5)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **size).double().eval()


MODELS = {
    "bert": (lambda: text_model("bert"), ["classifier", "pooler"], IDS),
    "distilbert": (lambda: text_model("distilbert"), ["classifier", "pre_classifier"], IDS),
    "deberta": (lambda: text_model("deberta-v2"), ["classifier", "pooler"], IDS),
    "llama": (lambda: text_model("llama", AutoModelForCausalLM), [], IDS),
    "gpt2": (lambda: text_model("gpt2", AutoModelForCausalLM), [], IDS),
    "vit": (hf_vit, ["classifier"], IMAGES),
    "timm": (timm_vit, ["head"], IMAGES),
}


def logits(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def adapt(model, heads, **settings):
    """Adapters of mixed ranks, among them 0, with S not diagonal, increments pending, and a moved head."""
    adapters = inject_adapters(
        model, AdapterConfig(init_rank=5, max_rank=8, modules_to_save=heads, alpha=1.5, **settings)
    )
    with torch.no_grad():
        for index, layer in enumerate(adapters.values()):
            rank = (5, 0, 1, 3)[index % 4]
            used = layer.probes + rank
            layer.U[:, used:], layer.V[:, used:] = 0, 0
            layer.read_rank()
            layer.S[:rank, :rank].normal_()
            if rank == 1:
                layer.K[:, :used].normal_()
                layer.L[:, :used].normal_()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.rpartition(".")[2] not in {"K", "L"}:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("compact", "dtype", "within"),
    [
        (False, torch.float64, EXACT),
        (True, torch.float64, EXACT),
        (False, torch.float32, rounding(torch.float32, NETWORK)),
    ],
    ids=["uniform", "compact", "float32"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_equal_in_peft_and_so_are_those_after_a_merge(tmp_path, kind, compact, dtype, within):
    of_kind, heads, x = MODELS[kind]
    x = x.to(dtype) if x.is_floating_point() else x

    def build():
        return of_kind().to(dtype)

    model = adapt(build(), heads)
    expected = logits(model, x)
    assert (expected - logits(build(), x)).abs().max() > 0.1
    rank = export_peft(model, tmp_path / "lora", compact=compact)
    assert rank == 5
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    close(logits(theirs, x), expected, within=within)
    merge_adapters(model)
    merged = theirs.merge_and_unload()
    close(logits(merged, x), logits(model, x), within=within)
    ours = dict(model.named_parameters())
    for name, parameter in merged.named_parameters():
        close(parameter, ours[name], within=rounding(dtype))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")  # which is the point
@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_that_shares_its_weight_with_the_embedding_arrives(tmp_path, tied):
    def build():
        torch.manual_seed(5)
        config = AutoConfig.for_model("llama", **FAMILIES["llama"], tie_word_embeddings=tied)
        return AutoModelForCausalLM.from_config(config).double().eval()

    model = adapt(build(), ["lm_head"])
    export_peft(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    close(logits(theirs, IDS), logits(model, IDS), within=EXACT)
    for act in (lambda fresh: import_peft(fresh, tmp_path / "lora"), lambda fresh: load_adapter(fresh, tmp_path / "a")):
        save_adapter(model, tmp_path / "a")
        fresh = build()
        act(fresh)
        close(logits(fresh, IDS), logits(model, IDS), within=EXACT)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")  # which is the point
def test_a_head_that_peft_has_trained_apart_from_the_embedding_is_not_written_into_it(tmp_path):
    """A user trained lm_head of a tied model with PEFT, which trains a copy. Here the embedding changed with it."""

    def build():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(TIED).double().eval()

    theirs = peft_model(build, tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    refuses(tmp_path, r"lm_head\.weight was trained apart from model\.embed_tokens\.weight, .*untie them", build())
    model = build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    import_peft(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS), within=EXACT)

    theirs = peft_model(
        build, tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True
    )
    import_peft(model := build(), tmp_path)
    close(logits(model, IDS), logits(theirs, IDS), within=EXACT)


def test_a_head_with_a_parametrized_weight_arrives(tmp_path):
    """A user trained a head with weight norm. The export named a part of it that PEFT could not wrap."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), parametrizations.weight_norm(nn.Linear(8, 3))).double()

    model, x = adapt(build(), ["1"], target_modules=["0"]), torch.randn(4, 6).double()
    export_peft(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == ["1"]
    close(PeftModel.from_pretrained(build(), tmp_path / "lora")(x), model(x), within=EXACT)
    import_peft(fresh := build(), tmp_path / "lora")
    close(fresh(x), model(x), within=EXACT)


class Codes(nn.Linear):
    """A linear layer whose weight is packed, as those of bitsandbytes are."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.plain = self.weight.detach()
        self.weight = nn.Parameter(torch.zeros(self.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.plain, self.bias)


def test_a_lora_becomes_a_start_on_packed_weights(tmp_path):
    """A user loaded a LoRA on a base of 4 bits. Its ranks were to be no larger than the packed weight is wide, 1."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    packed = nn.Sequential(Codes(8, 6))
    packed[0].plain, packed[0].bias = base[0].weight.detach(), base[0].bias
    theirs = peft_model(lambda: copy.deepcopy(base), tmp_path, r=4, target_modules=["0"])
    import_peft(packed, tmp_path, max_rank=32)
    assert packed[0].max_rank == 6
    close(packed(x), theirs(x), within=NETWORK)


def test_two_values_for_one_weight_are_refused(tmp_path):
    def build():
        config = AutoConfig.for_model("llama", **FAMILIES["llama"], tie_word_embeddings=True)
        return AutoModelForCausalLM.from_config(config).double().eval()

    export_peft(adapt(build(), ["lm_head"]), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, path)
    refuses(tmp_path / "lora", r"model\.embed_tokens\.weight has two values", build())


@pytest.mark.parametrize("kind", ["bert", "timm"])
@pytest.mark.parametrize("train_bias", [True, "all"])
def test_trained_biases_arrive(tmp_path, kind, train_bias):
    build, heads, x = MODELS[kind]
    model = adapt(build(), heads, train_bias=train_bias)
    export_peft(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    close(logits(theirs, x), logits(model, x), within=EXACT)


def test_by_default_the_rank_is_uniform_and_the_scaling_is_one(tmp_path):
    model = adapt(timm_vit(), ["head"])
    export_peft(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {5}
    A, B = (tensors[f"base_model.model.blocks.0.attn.qkv.lora_{side}.weight"] for side in "AB")
    close(A.norm(dim=1), B.norm(dim=0))  # S evenly on both sides
    export_peft(model, tmp_path / "compact", compact=True)
    config = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert config["rank_pattern"][r"^blocks\.0\.mlp\.fc2"] == 3
    assert not any("proj" in name for name in config["target_modules"])  # of rank 0


def test_names_that_are_ends_of_others_stay_apart(tmp_path):
    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).double()

    for compact in (False, True):
        model = adapt(build(), [], target_modules="0|1\\.1")
        model[1][1].S.data[:] = 0  # rank 0 in all but name, so that every layer of the others counts
        x = torch.randn(3, 4).double()
        export_peft(model, tmp_path / "lora", compact=compact, overwrite=True)
        theirs = PeftModel.from_pretrained(build(), tmp_path / "lora")
        close(theirs(x), model(x), within=EXACT)


def test_rank_0_everywhere(tmp_path):
    for compact in (False, True):
        model = timm_vit()
        for layer in inject_adapters(model).values():
            for factor in (layer.U, layer.V):
                factor.data.zero_()
            layer.read_rank()
        assert export_peft(model, tmp_path / "lora", compact=compact, overwrite=True) == 1
        theirs = PeftModel.from_pretrained(timm_vit(), tmp_path / "lora").eval()
        assert torch.equal(logits(theirs, IMAGES), logits(timm_vit(), IMAGES))
        fresh = timm_vit()
        import_peft(fresh, tmp_path / "lora")
        assert {layer.rank for layer in find_adapters(fresh).values()} == {0}


def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    model = timm_vit()
    with pytest.raises(ValueError, match="holds no adapters"):
        export_peft(model, tmp_path / "lora")
    inject_adapters(model)
    model.cls_token.requires_grad_(True)
    with pytest.raises(ValueError, match="cls_token was trained and is in no module"):
        export_peft(model, tmp_path / "lora")
    model.cls_token.requires_grad_(False)
    model.blocks[0].attn.qkv.base.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"qkv\.base\.weight was trained beside an adapter"):
        export_peft(model, tmp_path / "lora")
    shared = nn.ModuleDict({"a": nn.Linear(3, 3)})
    shared["b"] = shared["a"]
    inject_adapters(shared)
    with pytest.raises(ValueError, match="b shares its adapter"):
        export_peft(shared, tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    (tmp_path / "lora").mkdir()
    model = timm_vit()
    inject_adapters(model)
    with pytest.raises(ValueError, match="exists already"):
        export_peft(model, tmp_path / "lora")


def peft_model(build, folder, moved=True, **settings):
    model = get_peft_model(build(), LoraConfig(**settings)).eval()
    if moved:
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 10, "target_modules": ["query", "value"]},
        {"r": 9, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "dense"],
            "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 20},
            "alpha_pattern": {"dense": 3},
            "modules_to_save": ["classifier"],
            "lora_dropout": 0.1,
        },
        {"r": 2, "target_modules": ["value"], "bias": "all"},
    ],
)
def test_a_lora_of_peft_becomes_a_start_exactly(tmp_path, settings):
    build, _, x = MODELS["bert"]
    theirs = peft_model(build, tmp_path, **settings)
    model = build()
    import_peft(model, tmp_path)
    close(logits(model.eval(), x), logits(theirs, x), within=EXACT)
    for layer in find_adapters(model).values():
        assert is_orthonormal(layer.U)
        assert is_orthonormal(layer.V)
    if "classifier" not in find_adapters(model):
        trained = any(p.requires_grad for p in model.classifier.parameters())
        assert trained == bool("modules_to_save" in settings or settings.get("bias"))
    save_adapter(model, tmp_path / "adapter")
    export_peft(model, tmp_path / "again")
    again = PeftModel.from_pretrained(build(), tmp_path / "again").eval()
    close(logits(again, x), logits(theirs, x), within=EXACT)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning:peft")  # which is the point
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
@pytest.mark.parametrize("config", [TIED, AutoConfig.for_model("llama", **FAMILIES["llama"])])
def test_a_lora_on_the_head_leaves_the_head_of_the_base_frozen(tmp_path, config):
    """A user imported a LoRA with lm_head among its targets, beside which PEFT writes the weight of the base.

    The weight, which nothing had trained, became trainable, and so did an embedding that shares it; and the adapters
    could not be exported to PEFT any more. Only the factors must be trained, and the export must compute the same.
    """

    def build():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).double().eval()

    theirs = peft_model(build, tmp_path, r=2, target_modules=["q_proj", "lm_head"])
    model = build()
    import_peft(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS), within=EXACT)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("weight"))
    export_peft(model, tmp_path / "again")
    again = PeftModel.from_pretrained(build(), tmp_path / "again").eval()
    close(logits(again, IDS), logits(theirs, IDS), within=EXACT)


def test_a_lora_of_gpt2_becomes_a_start_and_goes_back(tmp_path):
    build, _, x = MODELS["gpt2"]
    theirs = peft_model(build, tmp_path, r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = build()
    import_peft(model, tmp_path)
    close(logits(model.eval(), x), logits(theirs, x), within=EXACT)
    export_peft(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = PeftModel.from_pretrained(build(), tmp_path / "again").merge_and_unload().eval()
    close(logits(again, x), logits(theirs, x), within=EXACT)


def test_linear_layers_beside_conv1d_are_exported(tmp_path):
    """One setting is for all layers: PEFT mends it where it does not fit, and says so."""
    torch.manual_seed(0)
    base, x = nn.Sequential(Conv1D(6, 5), nn.Linear(6, 4)).double(), torch.randn(3, 5).double()
    model = adapt(copy.deepcopy(base), [], target_modules=["0", "1"])
    export_peft(model, tmp_path / "lora")
    with (
        pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"),
        pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"),
    ):
        theirs = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    close(logits(theirs.merge_and_unload(), x), logits(model, x), within=EXACT)


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # of the biases, in the PEFT that made the folder
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which is more than a plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"kasa_config": KasaConfig()}, "kasa_config=.* which is more than a plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which also changed the base weights"),
    ],
)
def test_other_kinds_are_refused(tmp_path, settings, message):
    peft_model(lambda: text_model("bert").float(), tmp_path, moved=False, target_modules=["query"], r=2, **settings)
    refuses(tmp_path, message)


def refuses(folder, message, model=None):
    model = model or MODELS["bert"][0]()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        import_peft(model, folder)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_broken_and_foreign_folders_are_refused(tmp_path):
    refuses(tmp_path, "holds no readable adapter_config.json")
    peft_model(MODELS["bert"][0], tmp_path, target_modules=["query"], r=2)
    refuses(tmp_path, "is not a linear layer of the model", timm_vit())
    path = tmp_path / "adapter_config.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "of the type 'IA3'"),
        ({"r": 3}, "not the two sides of a LoRA of rank 3"),
        ({"r": None}, "r=None"),
        ({"r": 2.0}, "r=2.0 .*must be a whole number"),
        ({"lora_alpha": 10**400}, "lora_alpha=10{400} .*must be a number"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        refuses(tmp_path, message)
    path.write_text("{")
    refuses(tmp_path, "holds no readable")
    os.truncate(path, 2 * 10**7)
    refuses(tmp_path, r"holds no readable .*adapter_config\.json is larger than 10,000,000 bytes")
    path.write_text(json.dumps(whole))
    wide = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", **{**FAMILIES["bert"], "hidden_size": 32})
    )
    refuses(tmp_path, "in the file and 32 x 32 in the model", wide)
    with pytest.raises(ValueError, match="max_rank=0"):
        import_peft(timm_vit(), tmp_path, max_rank=0)
    adapted = timm_vit()
    inject_adapters(adapted)
    with pytest.raises(ValueError, match="already has adapters"):
        import_peft(adapted, tmp_path)


class Pixels(nn.Module):
    """One layer of each kind that PEFT can adapt and that is not linear, and a linear one."""

    def __init__(self, **settings):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.strided = nn.Conv2d(6, 8, 3, stride=2, padding=1, **settings)
        self.same = nn.Conv2d(8, 8, (1, 3), padding="same")
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.same(self.strided(self.table(x).movedim(-1, 1))).mean((2, 3)))


def pixels(**settings):
    torch.manual_seed(5)
    return Pixels(**settings).double().eval()


def test_a_lora_on_a_convolution_is_refused_as_what_it_is(tmp_path):
    """A user was told to take another base, though the base was the right one: only its convolution is no import."""
    peft_model(pixels, tmp_path, r=2, target_modules=["strided", "head"])
    refuses(tmp_path, r"strided is a Conv2d, and only LoRAs on linear layers are imported: merge it", pixels())


@pytest.mark.parametrize("compact", [False, True])
def test_convolutions_and_embeddings_are_equal_in_peft(tmp_path, compact):
    x = torch.randint(0, 11, (2, 7, 7))
    model = adapt(pixels(), [], target_modules=["table", "strided", "same", "head"])
    export_peft(model, tmp_path / "lora", compact=compact)
    theirs = PeftModel.from_pretrained(pixels(), tmp_path / "lora").eval()
    expected = logits(model, x)
    close(logits(theirs, x), expected, within=EXACT)
    close(logits(theirs.merge_and_unload(), x), expected, within=EXACT)


@pytest.mark.parametrize("settings", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_a_convolution_that_peft_would_compute_otherwise_is_refused(tmp_path, settings):
    model = adapt(pixels(**settings), [], target_modules=["strided"])
    with pytest.raises(ValueError, match=rf"strided has {next(iter(settings))}=.* does not honour: merge the adapters"):
        export_peft(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
