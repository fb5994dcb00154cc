"""Sequence to sequence: what is learnt of a target, what is written, scored and exported."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from command_line import from_fit_to_export
from diverged import validation_loss
from exported import move, save
from flags import QUIET
from foreign import trainer
from peft import AutoPeftModelForSeq2SeqLM
from processes import in_two_processes, of_two, sharded
from text_files import attach, write
from tiny_text import SEQ2SEQ, WORDS, make_tokenizer, save_tiny_seq2seq
from tolerance import NETWORK, close
from torchmetrics.text import ROUGEScore
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig

from geolora_pl import GeoLoRACallback, PredictionWriter, predict
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.data import Seq2SeqFiles, Seq2SeqHub, UnlabelledTexts
from geolora_pl.lightning.export import export
from geolora_pl.tasks import Seq2SeqLM

NUMBERS, OTHERS = WORDS[-7:], WORDS[:14]


def pairs(count, seed=0):
    """Three words, and the one of them that is a number."""
    generator = torch.Generator().manual_seed(seed)
    texts, targets = [], []
    for _ in range(count):
        words = [OTHERS[i] for i in torch.randint(len(OTHERS), (3,), generator=generator)]
        number = NUMBERS[int(torch.randint(len(NUMBERS), (1,), generator=generator))]
        words[int(torch.randint(3, (1,), generator=generator))] = number
        texts.append(" ".join(words))
        targets.append(number)
    return texts, targets


def written(path, count=24, seed=0):
    texts, targets = pairs(count, seed)
    return write(path, text=texts, target=targets)


def data(folder, **settings):
    folder = Path(folder)
    file = written(folder / "train.csv")
    defaults = {"val_file": file, "test_file": file, "batch_size": 8, "num_workers": 0, "max_length": 16,
                "max_target_length": 8, "cache_dir": folder / "cache"}  # fmt: skip
    return Seq2SeqFiles(file, **{**defaults, **settings})


@pytest.fixture
def model(tmp_path):
    return save_tiny_seq2seq(tmp_path / "model")


def test_texts_and_targets_are_tokenized_padded_and_cut_each_to_its_own_length(tmp_path):
    texts, targets = ["good film", "the plot was bad and the film was good"], ["one", "one two three four"]
    file = write(tmp_path / "t.jsonl", text=texts, target=targets)
    of_file = Seq2SeqFiles(file, val_file=file, prefix="very ", max_length=8, max_target_length=4, num_workers=0,
                           cache_dir=str(tmp_path))  # fmt: skip
    attach(of_file, make_tokenizer("t5", model_max_length=16))
    (batch,) = of_file.val_dataloader()
    ids = make_tokenizer().convert_tokens_to_ids
    assert batch["input_ids"].tolist() == [
        [*ids(["[CLS]", "very", "good", "film", "[SEP]"]), 0, 0, 0],
        ids(["[CLS]", "very", "the", "plot", "was", "bad", "and", "[SEP]"]),
    ]
    assert batch["labels"].tolist() == [[*ids(["[CLS]", "one", "[SEP]"]), -100], ids(["[CLS]", "one", "two", "[SEP]"])]
    assert batch["target"] == targets
    assert "train: 1 of 2 texts are cut to max_length=8 tokens" in of_file.notes
    assert "train: 1 of 2 targets are cut to max_target_length=4 tokens" in of_file.notes
    assert "target" not in of_file.splits["train"].column_names


def test_a_slow_tokenizer_counts_only_what_it_cuts(tmp_path):
    """ByT5 has one; a target that just fits was counted as cut."""
    file = write(tmp_path / "t.jsonl", text=["four", "three"], target=["abc", "abcd"])
    settings = {"max_length": 5, "max_target_length": 4, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
    of_file = attach(Seq2SeqFiles(file, file, **settings), ByT5Tokenizer())
    assert "val: 1 of 2 texts are cut to max_length=5 tokens" in of_file.notes
    assert "val: 1 of 2 targets are cut to max_target_length=4 tokens" in of_file.notes


def test_rows_without_a_text_or_target_are_left_out_but_kept_to_predict(tmp_path):
    file = write(tmp_path / "t.csv", article=["good", "", "bad"], summary=["one", "two", " "])
    of_file = Seq2SeqFiles(file, predict_file=file, text_column="article", target_column="summary")
    splits = of_file.load_splits()
    assert splits["train"][:] == {"text": ["good"], "target": ["one"]}
    assert splits["predict"]["text"][:] == ["good", "", "bad"]


def test_a_data_set_of_the_hub_has_its_own_columns(tmp_path):
    rows = {"article": ["good film"] * 3, "highlights": ["good"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    of_hub = Seq2SeqHub(str(tmp_path / "hub"), text_column="article", target_column="highlights")
    assert of_hub.load_splits()["train"][0] == {"text": "good film", "target": "good"}


def test_the_loss_of_a_model_that_has_diverged_is_nan(tmp_path, model):
    """It was the mean of the other losses, or of none, with a warning of torchmetrics."""
    assert validation_loss(Seq2SeqLM(model), data(tmp_path)).isnan()


def test_mistakes_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"t.csv has no column 'target'; it has 'text'"):
        Seq2SeqFiles(write(tmp_path / "t.csv", text=["a"])).load_splits()
    (tmp_path / "t.jsonl").write_text('{"text": "a", "target": "b"}\n{"text": "a", "target": ["b"]}\n')
    with pytest.raises(ValueError, match=r"t.jsonl: target must hold values of one kind, and row 2 is of another"):
        Seq2SeqFiles(str(tmp_path / "t.jsonl")).load_splits()
    (tmp_path / "t.jsonl").write_text('{"text": "a", "target": 3}\n')
    with pytest.raises(ValueError, match=r"t.jsonl: row 1 has target=3, which is not a text: fix the row"):
        Seq2SeqFiles(str(tmp_path / "t.jsonl")).load_splits()
    with pytest.raises(ValueError, match=r"text or target is empty in every row"):
        Seq2SeqFiles(write(tmp_path / "t.csv", text=["a"], target=[""])).load_splits()
    with pytest.raises(ValueError, match="are both 'text'"):
        Seq2SeqFiles("x.csv", target_column="text")
    with pytest.raises(ValueError, match="max_target_length=0 must be at least 1"):
        Seq2SeqFiles("x.csv", max_target_length=0)
    with pytest.raises(ValueError, match="max_target_length=2 leaves no room beside the tokenizer's 2 special tokens"):
        attach(data(tmp_path, max_target_length=2), make_tokenizer("t5", model_max_length=16))
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        Seq2SeqLM(model, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"generation=\{'beams': 3\}: GenerationConfig of transformers has no such"):
        Seq2SeqLM(model, generation={"beams": 3}).configure_model()
    for name in ("max_length", "max_new_tokens"):
        with pytest.raises(
            ValueError, match=rf"generation\.{name}=5 would not count beside max_new_tokens=128: set that"
        ):
            Seq2SeqLM(model, generation={name: 5}).configure_model()
    with pytest.raises(ValueError, match=r"generation=\{'early_stopping': 'x'\} does not work: "):
        Seq2SeqLM(model, generation={"early_stopping": "x"}).configure_model()
    with pytest.raises(ValueError, match=r"num_return_sequences must be 1, a text for each text"):
        Seq2SeqLM(model, generation={"num_beams": 2, "num_return_sequences": 2}).configure_model()
    bart = save_tiny_seq2seq(tmp_path / "bart", "bart")
    with pytest.raises(ValueError, match="max_new_tokens=128 is more than the 32 positions of the model"):
        Seq2SeqLM(bart).configure_model()
    with pytest.raises(ValueError, match="max_target_length=33 is more than the 32 positions of the model"):
        trainer(GeoLoRACallback()).fit(Seq2SeqLM(bart), data(tmp_path, max_target_length=33))


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_every_family_is_trained_in_its_blocks_alone(tmp_path, family):
    module = Seq2SeqLM(save_tiny_seq2seq(tmp_path / "m", family), max_new_tokens=4)
    runs = trainer(GeoLoRACallback())
    runs.fit(module, data(tmp_path))
    assert {"train_loss", "val_loss", "val_rouge1", "val_rouge2", "val_rougeL"} <= set(runs.callback_metrics)
    assert all(name[-2:] in (".K", ".L") for name, p in module.model.named_parameters() if p.requires_grad)
    adapters = set(find_adapters(module.model))
    assert len(adapters) >= 24
    assert {name.split(".")[-4 if family == "t5" else -3] for name in adapters}
    assert any("decoder" in name for name in adapters)
    assert any("encoder" in name for name in adapters)


@pytest.mark.slow
def test_which_word_is_a_number_is_learnt_and_written(tmp_path):
    torch.manual_seed(0)
    module = Seq2SeqLM(save_tiny_seq2seq(tmp_path / "m"), max_new_tokens=6, model_args={"dropout_rate": 0.0})
    runs = trainer(GeoLoRACallback(), max_epochs=6, check_val_every_n_epoch=6)
    before = runs.validate(module, data(tmp_path), verbose=False)[0]["val_loss"]
    of_file = data(tmp_path)
    of_file.files["train"] = written(tmp_path / "more.csv", 192, seed=1)
    runs.fit(module, of_file)
    assert runs.callback_metrics["val_loss"] < before / 3
    assert runs.callback_metrics["val_rougeL"] > 0.9


def test_loss_and_rouge_are_those_over_all_texts_whatever_the_batches(tmp_path, model):
    """ROUGE is that of torchmetrics, which splits ASCII words in the same way."""
    found = []
    for size in (24, 5):
        torch.manual_seed(0)
        runs, module = trainer(GeoLoRACallback()), Seq2SeqLM(model, max_new_tokens=5)
        runs.validate(module, data(tmp_path, batch_size=size), verbose=False)
        found.append(runs.callback_metrics)
    texts, targets = pairs(24)
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    losses, outputs = [], []
    for text, target in zip(texts, targets, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            losses.append(plain(**batch, labels=tokenizer(target, return_tensors="pt").input_ids).loss)
            tokens = plain.generate(**batch, generation_config=GenerationConfig(
                max_new_tokens=5, decoder_start_token_id=0, eos_token_id=3, pad_token_id=0))  # fmt: skip
        outputs.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    score = ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
    score.update(outputs, targets)
    for metrics in found:
        close(metrics["val_loss"], torch.stack(losses).mean(), NETWORK)  # all targets have as many tokens
        for name in ("rouge1", "rouge2", "rougeL"):
            close(metrics[f"val_{name}"], score.compute()[f"{name}_fmeasure"])


def test_rouge_is_hand_worked_and_knows_other_scripts(tmp_path, model):
    """Of three written words two are among the four of the target: F1 = 2 * (2/3) * (2/4) / (2/3 + 2/4)."""
    runs, module = trainer(GeoLoRACallback()), Seq2SeqLM(model)
    module.write = lambda batch: ["Дождь, не снег"] * len(batch["target"])
    file = write(tmp_path / "t.csv", text=["good"], target=["дождь и сильный снег"])
    runs.validate(module, data(tmp_path, val_file=file), verbose=False)
    close(runs.callback_metrics["val_rouge1"], torch.tensor(4 / 7))
    close(runs.callback_metrics["val_rouge2"], torch.tensor(0.0), beside=torch.ones(1))


def test_a_checkpoint_writes_as_the_run_did_with_what_came_with_the_model(tmp_path, model):
    """The settings beside the pretrained weights and those of the user are in the checkpoint."""
    GenerationConfig(num_beams=2, no_repeat_ngram_size=2, decoder_start_token_id=0, eos_token_id=3, pad_token_id=0,
                     max_length=50).save_pretrained(model)  # fmt: skip
    module = Seq2SeqLM(model, max_new_tokens=7, generation={"length_penalty": 2.0})
    module.configure_model()
    path = save(move(module), tmp_path / "t.ckpt", "geolora_pl.tasks.Seq2SeqLM")
    loaded = Seq2SeqLM.load_from_checkpoint(path).eval()
    for task in (module, loaded):
        config = task.model.generation_config
        assert (config.num_beams, config.no_repeat_ngram_size, config.length_penalty) == (2, 2, 2.0)
        assert (config.max_new_tokens, config.max_length) == (7, None)
    given = Seq2SeqLM.load_from_checkpoint(path, generation={"num_beams": 3}, max_new_tokens=2)
    assert (given.model.generation_config.num_beams, given.model.generation_config.max_new_tokens) == (3, 2)
    batch = module.tokenizer(["the good film", "one"], padding=True, return_tensors="pt")
    assert loaded.write(batch) == module.write(batch)


def test_a_checkpoint_says_only_numbers_of_how_to_write():
    for given in ({"cache_implementation": "x/y"}, {"a": {"class_path": "os.system"}}, "x"):
        with pytest.raises(ValueError, match="is not a mapping of names to numbers"):
            Seq2SeqLM.argument_from_checkpoint("generation", given)
    assert Seq2SeqLM.argument_from_checkpoint("generation", {"num_beams": 4}) == {"num_beams": 4}
    assert Seq2SeqLM.argument_from_checkpoint("generation", None) is None


def test_predictions_are_the_texts_that_are_written_in_the_order_of_the_inputs(tmp_path, model):
    texts = ["good film", "", "one two"]
    file = write(tmp_path / "new.jsonl", text=texts)
    module = Seq2SeqLM(model, max_new_tokens=4)
    module.configure_model()
    module.eval()
    of_file = data(tmp_path, batch_size=2)
    of_file.files = {"predict": file}
    rows = predict(module, of_file, tmp_path / "p.csv", **QUIET)
    assert [list(row) for row in rows] == [["index", "text", "generated"]] * 3
    assert [row["text"] for row in rows] == texts
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "index,text,generated"


def test_lines_of_texts_are_enough_to_predict(tmp_path, model):
    (tmp_path / "t.txt").write_text("good film\none two\n")
    module = Seq2SeqLM(model, max_new_tokens=4)
    module.configure_model()
    lines = UnlabelledTexts(str(tmp_path / "t.txt"), max_length=16, num_workers=0, cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in predict(module, lines, **QUIET)] == ["good film", "one two"]


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_exports_are_what_transformers_and_peft_load(tmp_path, family):
    module = Seq2SeqLM(save_tiny_seq2seq(tmp_path / "model", family), max_new_tokens=5)
    module.configure_model()
    ckpt = save(move(module), tmp_path / "t.ckpt", "geolora_pl.tasks.Seq2SeqLM")
    batch = dict(module.tokenizer(["the good film", "bad"], padding=True, return_tensors="pt"))
    labels = torch.tensor([[2, 5, 3], [2, 6, 3]])
    with torch.no_grad():
        expected = module({**batch, "labels": labels})
    export(ckpt, "merged", tmp_path / "merged")
    export(ckpt, "peft", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "peft").eval()
    for loaded in (merged, theirs):
        with torch.no_grad():
            close(loaded(**batch, labels=labels).logits, expected, NETWORK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.batch_decode(merged.generate(**batch), skip_special_tokens=True) == module.write(batch)


def test_the_command_line_fits_resumes_tests_predicts_and_exports(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "train.csv")
    more = ["--model.max_new_tokens=4", "--model.generation={num_beams: 2}", "--data.max_length=16"]
    _, first = from_fit_to_export("Seq2SeqLM", model, "Seq2SeqFiles", "train.csv", *more)
    assert set(first) == {"index", "text", "generated"}
    assert AutoModelForSeq2SeqLM.from_pretrained("merged").generation_config.num_beams == 2


def in_process(rank, folder):
    of_file = data(folder)
    for step in ("fit", "predict"):
        module = Seq2SeqLM(str(folder / "model"), max_new_tokens=2 + 3 * rank)  # what they write differs in length
        runs = trainer(GeoLoRACallback(), PredictionWriter(folder / "p.jsonl"), strategy=sharded(), **of_two())
        getattr(runs, step)(module, datamodule=of_file)


@pytest.mark.usefixtures("one_thread")
def test_a_sharded_model_writes_and_no_process_waits_for_the_other(tmp_path, model):
    """T5 has blocks inside of blocks and an encoder that is called by itself, and FSDP2 refused both."""
    in_two_processes(in_process, tmp_path)
    assert [json.loads(line)["text"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == pairs(24)[0]
