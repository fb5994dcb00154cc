"""Language models: what is learnt of a text, how sequences are cut, what is logged, what is adapted."""

import math
import re

import datasets
import pytest
import torch
from diverged import validation_loss
from flags import QUIET
from foreign import trainer
from text_files import attach, write
from tiny_text import SIZE, make_tokenizer, save_tiny_decoder
from tokenizers import processors
from tolerance import NETWORK, close, rounding
from torch.nn import functional as F
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM

from geolora_pl import AdapterConfig, GeoLoRACallback, merge_adapters, predict
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.data import LanguageFiles, LanguageHub
from geolora_pl.tasks import CausalLM

TEXTS = ["the film was good", "bad", "one two three four five six seven", "a plot and a film"] * 3
PROMPTS = ["is the film good", "the plot", "one two three four five", "a"] * 3
COMPLETIONS = ["very good", "not bad and not good", "six", "film"] * 3
BOS, EOS, IGNORED = 2, 3, -100


def starting_tokenizer():
    """A tokenizer that starts a text, as Llama's; and ends it, as few do."""
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", BOS), ("[SEP]", EOS)]
    )
    return tokenizer


def plain_tokenizer():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ids(text):
    return make_tokenizer("gpt2")(text)["input_ids"]


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "texts.jsonl", text=TEXTS)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.tsv", question=PROMPTS, answer=COMPLETIONS)


def of_pairs(file, folder, **settings):
    return LanguageFiles(
        file, file, prompt_column="question", completion_column="answer", cache_dir=folder / "cache", **settings
    )


@pytest.mark.parametrize(("tokenizer", "start"), [(plain_tokenizer, []), (starting_tokenizer, [BOS])])
def test_texts_end_with_one_end_and_are_cut_into_blocks_of_which_nothing_is_lost(tmp_path, texts, tokenizer, start):
    data = LanguageFiles(texts, texts, texts, max_length=8, batch_size=2, cache_dir=tmp_path / "cache")
    attach(data, tokenizer())
    stream = [token for text in TEXTS for token in [*start, *ids(text), EOS]]
    blocks = data.splits["test"]["input_ids"][:]
    assert [token for block in blocks for token in block] == stream
    assert {len(block) for block in blocks[:-1]} == {8}
    assert data.splits["test"]["length"][:] == [len(block) for block in blocks]
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_padding_is_no_label_though_its_token_is_the_end_of_a_text(tmp_path, texts):
    data = LanguageFiles(texts, texts, packed=False, max_length=6, batch_size=4, cache_dir=tmp_path / "cache")
    batch = next(iter(attach(data, plain_tokenizer()).val_dataloader()))
    expected = [[*ids(text), EOS][:6] for text in TEXTS[:4]]
    for row, text in enumerate(expected):
        width = len(text)
        assert batch["input_ids"][row, :width].tolist() == batch["labels"][row, :width].tolist() == text
        assert set(batch["labels"][row, width:].tolist()) <= {IGNORED}
        assert batch["attention_mask"][row].tolist() == [1] * width + [0] * (6 - width)
    assert EOS in expected[0]
    assert EOS not in expected[2], "a text that goes on has no end"


@pytest.mark.parametrize(("tokenizer", "start"), [(plain_tokenizer, []), (starting_tokenizer, [BOS])])
@pytest.mark.parametrize("limit", [32, 7, 6, 4, 2])
def test_a_prompt_is_no_label_and_gives_way_to_its_completion(tmp_path, pairs, tokenizer, start, limit):
    data = attach(of_pairs(pairs, tmp_path, max_length=limit), tokenizer())
    for row, prompt, completion in zip(data.splits["val"], PROMPTS, COMPLETIONS, strict=True):
        learnt = [*ids(completion), EOS][: limit - len(start)]
        room = limit - len(start) - len(learnt)
        before = start + (ids(prompt)[-room:] if room else [])
        assert row["input_ids"] == before + learnt
        assert row["labels"] == [IGNORED] * len(before) + learnt
        assert row["length"] == len(row["input_ids"]) <= limit


def test_packed_pairs_are_whole(tmp_path, pairs):
    data = attach(of_pairs(pairs, tmp_path, max_length=12, packed=True, batch_size=12), plain_tokenizer())
    rows = data.splits["val"]
    alone = attach(of_pairs(pairs, tmp_path, max_length=12), plain_tokenizer()).splits["val"]
    found = []
    for row in rows:
        begin = 0
        for length in row["texts"]:
            found.append((row["input_ids"][begin : begin + length], row["labels"][begin : begin + length]))
            begin += length
        assert begin == row["length"] == len(row["input_ids"]) <= 12
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in alone)
    assert len(rows) < len(alone)


def test_joined_pairs_keep_their_masks(tmp_path, pairs):
    data = attach(of_pairs(pairs, tmp_path, max_length=8, packed=True, isolated=False), plain_tokenizer())
    rows = data.splits["val"]
    tokens, labels = ([token for row in rows[name][:] for token in row] for name in ("input_ids", "labels"))
    expected = [(ids(p), [*ids(c), EOS]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert tokens == [token for prompt, completion in expected for token in prompt + completion]
    assert labels == [token for prompt, completion in expected for token in [IGNORED] * len(prompt) + completion]


def test_token_ids_are_made_once_whatever_the_blocks(tmp_path, texts, monkeypatch):
    for size in (8, 16):
        attach(LanguageFiles(texts, texts, max_length=size, cache_dir=tmp_path / "cache"), plain_tokenizer())
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    unpacked = LanguageFiles(texts, texts, max_length=8, packed=False, cache_dir=tmp_path / "cache")
    attach(unpacked, plain_tokenizer())
    other_end = plain_tokenizer()
    other_end.eos_token = "[MASK]"
    attach(LanguageFiles(texts, texts, max_length=8, cache_dir=tmp_path / "cache"), other_end)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 3


def test_the_hub_gives_the_same_and_empty_rows_are_left_out_and_counted(tmp_path, texts, messages):
    datasets.Dataset.from_dict({"text": ["", *TEXTS, " \n"]}).to_parquet(tmp_path / "hub" / "train.parquet")
    hub, files = LanguageHub(str(tmp_path / "hub")), LanguageFiles(texts)
    assert hub.load_splits()["train"][:] == files.load_splits()["train"][:]
    assert "train: rows left out because text is empty: 2" in messages()
    datasets.Dataset.from_dict({"text": [""]}).to_parquet(tmp_path / "hub" / "train.parquet")
    with pytest.raises(ValueError, match="text is empty in every row"):
        LanguageHub(str(tmp_path / "hub")).load_splits()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_column": "question"}, "prompt_column='question' and completion_column=None must be two columns"),
        ({"prompt_column": "a", "completion_column": "a"}, "prompt_column='a' and completion_column='a' must be two"),
        ({"max_length": 1}, "max_length=1 leaves no token to predict"),
        ({"max_length": 64}, "max_length=64 is more than the 32 positions of the model"),
        ({"text_column": "words"}, "has no column 'words'; it has 'text'"),
    ],
)
def test_mistakes_are_refused_with_the_remedy(tmp_path, texts, settings, message):
    module = CausalLM(save_tiny_decoder(tmp_path / "model", "gpt2"))
    with pytest.raises(ValueError, match=message):
        trainer(GeoLoRACallback(), max_steps=1).fit(
            module, LanguageFiles(texts, cache_dir=tmp_path / "cache", **settings)
        )


def test_a_tokenizer_without_an_end_is_refused(tmp_path, texts):
    tokenizer = plain_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "[PAD]", None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        attach(LanguageFiles(texts, max_length=8, cache_dir=tmp_path / "cache"), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_decoder_is_adapted_in_its_blocks_alone_and_learns(tmp_path, texts, family, tied):
    name = save_tiny_decoder(tmp_path / "model", family, tie_word_embeddings=tied)
    module = CausalLM(name)
    runs = trainer(GeoLoRACallback(adapt_every=2), max_epochs=6)
    data = LanguageFiles(texts, texts, texts, max_length=8, batch_size=4, cache_dir=tmp_path / "cache")
    before = AutoModelForCausalLM.from_pretrained(name)
    module.configure_model()
    x = {"input_ids": torch.arange(4, 12)[None]}
    module.eval()
    close(module(x), before(**x).logits, NETWORK)
    module.train()
    (first,) = runs.validate(module, data, verbose=False)
    runs.fit(module, data)
    blocks = {"gpt2": r".*\.h\.\d\.(attn|mlp)\.c_\w+"}.get(family, r".*\.layers\.\d\.(self_attn|mlp)\.\w+_proj")
    adapters = find_adapters(module.model)
    assert all(re.fullmatch(blocks, adapter) for adapter in adapters)
    assert len(adapters) == (8 if family == "gpt2" else 14)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained == {f"{adapter}.{factor}" for adapter in adapters for factor in "KL"}
    metrics = runs.callback_metrics
    assert {"train_loss", "val_loss", "val_perplexity"} <= set(metrics)
    assert metrics["val_loss"] < first["val_loss"] - 0.05
    (tested,) = runs.test(module, data, verbose=False)
    allowed = rounding(torch.float32, NETWORK)
    assert tested["test_loss"] == pytest.approx(float(metrics["val_loss"]), rel=allowed)
    assert tested["test_perplexity"] == pytest.approx(math.exp(tested["test_loss"]), rel=allowed)
    assert torch.equal(before.lm_head.weight, module.model.lm_head.weight)
    module.eval()
    expected = module(x)
    merge_adapters(module.model)
    close(module(x), expected, NETWORK)
    module.model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(again(**x).logits, expected, NETWORK)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_every_token_counts_once_whatever_the_batches(tmp_path, pairs, batch_size):
    module = CausalLM(save_tiny_decoder(tmp_path / "model", "llama"))
    data = of_pairs(pairs, tmp_path, batch_size=batch_size)
    runs = trainer(GeoLoRACallback(), max_steps=1)
    (found,) = runs.validate(module, data, verbose=False)
    total, count, oracle = 0.0, 0, Perplexity(ignore_index=IGNORED)
    model = AutoModelForCausalLM.from_pretrained(module.model_name).eval()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens = torch.tensor([[*ids(prompt), *ids(completion), EOS]])
        with torch.no_grad():
            logits = model(tokens).logits[:, len(ids(prompt)) - 1 : -1]
        targets = tokens[:, len(ids(prompt)) :]
        total += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
        count += targets.numel()
        oracle.update(logits, targets)
    assert found["val_loss"] == pytest.approx(total / count, rel=rounding(torch.float32, NETWORK))
    assert found["val_perplexity"] == pytest.approx(oracle.compute().item(), rel=rounding(torch.float32, NETWORK))
    scores = torch.cat(runs.predict(module, data.val_dataloader()))
    assert scores.shape == (12,)
    learnt = torch.tensor([len(ids(completion)) + 1 for completion in COMPLETIONS])
    assert (scores * learnt).sum() / count == pytest.approx(total / count, rel=rounding(torch.float32, NETWORK))


def test_the_loss_of_a_model_that_has_diverged_is_nan(tmp_path, pairs):
    """It was the mean of the other losses, or of none, with a warning of torchmetrics."""
    assert validation_loss(CausalLM(save_tiny_decoder(tmp_path / "model", "llama")), of_pairs(pairs, tmp_path)).isnan()


def test_a_batch_without_a_learnt_token_changes_nothing(tmp_path):
    module = CausalLM(save_tiny_decoder(tmp_path / "model", "gpt2"))
    module.configure_model()
    module.log = lambda *args, **settings: None
    loss = module.training_step({"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), IGNORED)})
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in module.parameters() if p.grad is not None)


def test_a_checkpoint_needs_neither_data_nor_folder(tmp_path, texts):
    name = save_tiny_decoder(tmp_path / "model", "gpt2")
    module, runs = CausalLM(name), trainer(GeoLoRACallback(), max_steps=2)
    runs.fit(module, LanguageFiles(texts, texts, max_length=8, batch_size=4, cache_dir=tmp_path / "cache"))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    x = {"input_ids": torch.arange(4, 12)[None]}
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_checkpoint_without_an_output_layer_is_no_language_model(tmp_path):
    name = save_tiny_decoder(tmp_path / "model", "llama", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(name).model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no fitting weights for lm_head"):
        CausalLM(name).configure_model()


def test_a_tied_embedding_that_is_named_is_refused_with_the_reason(tmp_path):
    name = save_tiny_decoder(tmp_path / "model", "gpt2", tie_word_embeddings=True)
    module = CausalLM(name, adapter=AdapterConfig(target_modules=["wte"]))
    with pytest.raises(ValueError, match=r"transformer\.wte shares its table with lm_head"):
        module.configure_model()
    untied = save_tiny_decoder(tmp_path / "untied", "gpt2", tie_word_embeddings=False)
    module = CausalLM(untied, adapter=AdapterConfig(target_modules=["wte", "c_attn"]))
    module.configure_model()
    assert len(find_adapters(module.model)) == 3


def test_fit_on_the_command_line(tmp_path, monkeypatch, pairs):
    monkeypatch.chdir(tmp_path)
    model = save_tiny_decoder(tmp_path / "model", "llama")
    data = [f"--data.train_file={pairs}", "--data.prompt_column=question", "--data.completion_column=answer"]
    main(
        [
            "fit",
            "--model=geolora_pl.tasks.CausalLM",
            f"--model.model_name={model}",
            "--model.adapter.max_rank=6",
            "--data=geolora_pl.data.LanguageFiles",
            *data,
            "--data.cache_dir=cache",
            "--data.val_fraction=0.25",
            "--data.batch_size=4",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )


def test_the_tiny_vocabulary_is_the_models():
    assert max(max(ids(text)) for text in (*TEXTS, *PROMPTS, *COMPLETIONS)) < SIZE


def test_rows_of_a_file_of_its_own_are_predicted(tmp_path):
    """As with every other source, predict_file is what predict reads, and not the test file."""
    texts = write(tmp_path / "t.jsonl", text=["good film", "bad film"] * 4)
    asked = write(tmp_path / "p.jsonl", text=["the plot", "one two"])
    settings = {"packed": False, "max_length": 8, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
    data = LanguageFiles(texts, texts, texts, asked, **settings)
    module = CausalLM(save_tiny_decoder(tmp_path / "model"))
    module.configure_model()
    assert [row["text"] for row in predict(module.eval(), data, **QUIET)] == ["the plot", "one two"]
