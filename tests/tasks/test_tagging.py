"""Token classification: which pieces are learnt, what is scored, what is written and exported."""

import json
from pathlib import Path

import pytest
import torch
from command_line import from_fit_to_export
from diverged import validation_loss
from exported import move, save
from flags import QUIET
from foreign import trainer
from peft import AutoPeftModelForTokenClassification
from text_files import attach, write, write_rows
from tiny_text import make_tokenizer, save_tiny_model
from tokenizers import pre_tokenizers
from tolerance import NETWORK, close
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, pipeline

from geolora_pl import GeoLoRACallback, PredictionWriter, predict
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.data import TagFiles, TagHub
from geolora_pl.lightning.export import export
from geolora_pl.tasks import TokenClassification
from geolora_pl.tasks.spans import EntityScore, entities, name_entities

KINDS = {"good": "B-GOOD", "bad": "B-BAD", "film": "B-THING", "plot": "I-THING"}
WORDS = ["the", "good", "film", "was", "not", "bad", "and", "a", "plot", "is", "very"]


def rule(words):
    """Opinions and things, some of which begin with what continues them."""
    return [KINDS.get(word, "O") for word in words]


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator)
    return [[WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)] for n in lengths.tolist()]


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


def tagged(path, count=32, seed=0):
    rows = sentences(count, seed)
    return write(path, tokens=rows, tags=[rule(words) for words in rows])


def data(folder, **settings):
    folder = Path(folder)
    file = tagged(folder / "train.jsonl")
    defaults = {"val_file": file, "test_file": file, "batch_size": 8, "num_workers": 0, "cache_dir": folder / "cache"}
    return TagFiles(file, **{**defaults, **settings})


def test_only_the_first_piece_of_a_word_is_learnt(tmp_path):
    """A word of several pieces counts once; special tokens, further pieces and padding do not count."""
    rows = [["good", "film-plot"], ["bad"]]
    file = write(tmp_path / "t.jsonl", tokens=rows, tags=[["A", "B"], ["A"]])
    of_file = attach(TagFiles(file, val_file=file, num_workers=0, cache_dir=str(tmp_path)))
    (batch,) = of_file.val_dataloader()
    assert batch["input_ids"].shape == (2, 6)  # [CLS] good film - plot [SEP]
    assert batch["labels"].tolist() == [[-100, 0, 1, -100, -100, -100], [-100, 0, -100, -100, -100, -100]]
    assert batch["words"].tolist() == [[-1, 0, 1, -1, -1, -1], [-1, 0, -1, -1, -1, -1]]
    assert batch["word_count"].tolist() == [2, 1]


@pytest.mark.parametrize("split", [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace()])
def test_a_piece_that_begins_with_the_space_before_it_is_the_first_of_its_word(tmp_path, split):
    """Tokenizers of GPT-2 and of SentencePiece put the space into the token after it."""
    words = ["good", "Ġfilm", "▁good", "▁film", "Ġbad", "▁bad", "bad"]
    tokenizer = make_tokenizer("gpt2", words, model_max_length=16)
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.pad_token = tokenizer.eos_token
    file = write(tmp_path / "t.jsonl", tokens=[["good", "film", "bad"]] * 2, tags=[["A", "B", "A"]] * 2)
    of_file = attach(TagFiles(file, val_file=file, num_workers=0, cache_dir=str(tmp_path)), tokenizer)
    (batch,) = of_file.val_dataloader()
    assert batch["words"].tolist() == [[0, 1, 2]] * 2
    assert batch["labels"].tolist() == [[0, 1, 0]] * 2


def test_words_that_are_cut_off_or_are_nothing_to_the_tokenizer_are_counted_and_left_out(tmp_path):
    rows = [["good", " ", "film"], ["bad"] * 9]
    file = write(tmp_path / "t.jsonl", tokens=rows, tags=[["A", "B", "A"], ["A"] * 9])
    for _ in range(2):  # the second time from the cache
        of_file = attach(TagFiles(file, val_file=file, num_workers=0, max_length=6, cache_dir=str(tmp_path)))
        (batch,) = of_file.val_dataloader()
        assert batch["words"].tolist() == [[-1, 0, 2, -1, -1, -1], [-1, 0, 1, 2, 3, -1]]
        said = "; ".join(of_file.notes)
        assert "train: words that are cut off by max_length=6, so that they are neither learnt nor tagged: 5" in said
        assert "train: words that are nothing to the tokenizer, so that they are neither learnt nor tagged: 1" in said


def test_columns_of_conll_are_read_as_json_lines_are(tmp_path):
    lines = "-DOCSTART- -X- O\n\ngood JJ B-X\nfilm NN O\n\n\nbad JJ O"
    (tmp_path / "t.conll").write_text(lines)
    (tmp_path / "words.txt").write_text("good\nfilm\n\nbad\n")
    file = write(tmp_path / "t.jsonl", tokens=[["good", "film"], ["bad"]], tags=[["B-X", "O"], ["O"]])
    of_conll = TagFiles(str(tmp_path / "t.conll"), predict_file=str(tmp_path / "words.txt")).load_splits()
    assert of_conll["train"][:] == TagFiles(file).load_splits()["train"][:]
    assert of_conll["predict"][:] == {"tokens": [["good", "film"], ["bad"]]}


def test_a_word_of_conll_may_hold_what_is_white_space_elsewhere(tmp_path):
    """French texts have a no-break space in numbers, whose end was lost; tabs leave a space to the words as well."""
    (tmp_path / "t.conll").write_text("10\u00a0000 X A\r\n\u3000 X B\r\n\r\nNew York\tX\t A\r\n", newline="")
    rows = TagFiles(str(tmp_path / "t.conll")).load_splits()["train"]
    assert rows["tokens"][:] == [["10\u00a0000", "\u3000"], ["New York"]]
    assert rows["tags"][:] == [[0, 1], [0]]


@pytest.mark.parametrize("split", ["train", "predict"])
def test_lines_of_text_are_not_taken_for_columns(tmp_path, split):
    """Who gave a file with a sentence per line got a tag for the first word of each, as if it were all."""
    (tmp_path / "t.txt").write_text("the film was good\na poor plot\n")
    file = tagged(tmp_path / "train.jsonl")
    files = {"train_file": file, "predict_file": file, f"{split}_file": str(tmp_path / "t.txt")}
    with pytest.raises(ValueError, match=r"t\.txt: line 2 is 'a poor plot', which has not as many fields"):
        TagFiles(**files).load_splits()


def test_a_data_set_of_the_hub_names_its_tags(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-Y", "B-X"])),
        }
    )
    rows = {"tokens": [["good", "film"], ["bad"]], "ner_tags": [[2, 0], [0]]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "hub" / "train.parquet")
    of_hub = TagHub(str(tmp_path / "hub"), tags_column="ner_tags")
    assert of_hub.class_names == ["O", "B-Y", "B-X"]
    assert of_hub.load_splits()["train"]["tags"][:] == [[2, 0], [0]]
    datasets.Dataset.from_dict({**rows, "ner_tags": [[2, 0], [-1]]}, features).to_parquet(
        tmp_path / "hub" / "test.parquet"
    )
    with pytest.raises(
        ValueError, match=r"hub test: row 2 has the tag '-1', which is none of O, B-Y, B-X: fix the row"
    ):
        TagHub(str(tmp_path / "hub"), tags_column="ner_tags").load_splits()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"words": ["a"], "tags": ["A"]}], r"t.jsonl has no column 'tokens'; it has 'words', 'tags'"),
        ([{"tokens": ["a"], "tags": ["A"]}, {"tokens": ["a"], "tags": ["A", "B"]}], r"row 2 has 1 tokens and 2 tags"),
        ([{"tokens": ["a"], "tags": ["A"]}, {"tokens": "a b", "tags": ["A"]}], r"t.jsonl: tokens .* row 2"),
        ([{"tokens": "a", "tags": ["A"]}], r"row 1 has tokens='a', which is not a list of strings: fix the row"),
        ([{"tokens": ["a", None], "tags": ["A", "B"]}], r"row 1 has tokens=\['a', None\], which is not a list"),
        ([{"tokens": ["a"]}, {"tokens": ["b"], "tags": ["B"]}], r"row 1 has tags=None, which is not a list of strings"),
        ([{"tokens": ["a"], "tags": [0.5]}], r"row 1 has tags=\[0.5\], which is not a list of strings or of whole"),
        ([{"tokens": ["a", "b"], "tags": ["A", "A"]}], r"every tags is 'A': there must be two tags"),
        ([{"tokens": [], "tags": []}], r"tokens is empty in every row: name another column"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_row(tmp_path, rows, message):
    file = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        TagFiles(file).load_splits()
    assert "t.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_loss_of_a_model_that_has_diverged_is_nan(tmp_path, model):
    """It was the mean of the other losses, or of none, with a warning of torchmetrics."""
    assert validation_loss(TokenClassification(model, num_classes=5), data(tmp_path)).isnan()


def test_mistakes_are_refused(tmp_path, model):
    file = tagged(tmp_path / "train.jsonl")
    other = write(tmp_path / "val.jsonl", tokens=[["good"], ["bad"]], tags=[["O"], ["B-OTHER"]])
    with pytest.raises(ValueError, match=r"val.jsonl: row 2 has the tag 'B-OTHER', which is none of B-BAD, "):
        TagFiles(file, other).load_splits()
    for given in (["A"], ["A", "A"], ["A", True]):
        with pytest.raises(ValueError, match="must name two or more tags as strings, each once"):
            TagFiles(file, tags=given)
    with pytest.raises(ValueError, match="are both 'tags'"):
        TagFiles(file, tokens_column="tags")
    with pytest.raises(ValueError, match=r"x.csv cannot hold lists of words: write it as .jsonl"):
        TagFiles("x.csv").load_splits()
    (tmp_path / "t.conll").write_text("good A\nfilm\n")
    with pytest.raises(ValueError, match=r"t.conll: line 2 is 'film', a word without a tag"):
        TagFiles(str(tmp_path / "t.conll")).load_splits()
    (tmp_path / "t.conll").write_text("\n\n")
    with pytest.raises(ValueError, match=r"t.conll holds no words"):
        TagFiles(str(tmp_path / "t.conll")).load_splits()
    with pytest.raises(ValueError, match="max_length=2 leaves no room for a word"):
        attach(TagFiles(file, max_length=2, cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        TokenClassification(model, num_classes=1)
    with pytest.raises(ValueError, match="num_classes=7 does not fit the data, which has 5 classes"):
        trainer(GeoLoRACallback()).fit(TokenClassification(model, num_classes=7), data(tmp_path))


def test_the_f1_of_entities_is_that_worked_out_by_hand():
    """Two of three predicted entities are right, and two of four that are there are found: F1 = 4/7."""
    targets = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC", "O"]]
    predictions = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC", "O"]]
    score = EntityScore()
    for predicted, target in zip(predictions, targets, strict=True):
        score.update([predicted], [target])
    close(score.compute(), torch.tensor(4 / 7))
    score.reset()
    score.update([["O"]], [["O"]])
    assert score.compute() == 0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("I-X I-X I-Y", {("X", 0, 2), ("Y", 2, 3)}),
        ("B-X I-Y O", {("X", 0, 1), ("Y", 1, 2)}),
        ("B-X I-X E-X S-X I-X", {("X", 0, 3), ("X", 3, 4), ("X", 4, 5)}),
        ("B-X-1 I-X-1", {("X-1", 0, 2)}),
    ],
)
def test_entities_are_those_of_the_scorer_of_conll(tags, expected):
    assert entities(tags.split()) == expected


def test_parts_of_speech_have_no_entities():
    assert not name_entities(["NOUN", "VERB", "O"])
    assert not name_entities(["B-X", "I-X"])
    assert name_entities(["O", "S-X", "L-X"])


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v2", "modernbert", "gpt2", "qwen3"])
def test_every_family_is_trained_in_its_blocks_and_its_head(tmp_path, family):
    module, runs = TokenClassification(save_tiny_model(tmp_path / "m", family)), trainer(GeoLoRACallback())
    runs.fit(module, data(tmp_path))
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1"} <= set(runs.callback_metrics)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad and name[-2:] not in (".K", ".L")}
    assert trained
    assert all(name.startswith(("classifier.", "score.", "head.")) for name in trained)
    assert len(find_adapters(module.model)) >= 6


def test_a_rule_of_words_is_learnt(tmp_path, messages):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = save_tiny_model(tmp_path / "m", initializer_range=0.2)
    module = TokenClassification(folder, head_lr=1e-2, model_args=still)
    runs = trainer(GeoLoRACallback(), max_epochs=4, check_val_every_n_epoch=4)
    of_file = data(tmp_path)
    of_file.files["train"] = tagged(tmp_path / "more.jsonl", 256, seed=1)
    runs.fit(module, of_file)
    assert runs.callback_metrics["val_f1"] > 0.95
    assert runs.callback_metrics["val_accuracy"] > 0.95
    assert "trained in full beside the adapters: classifier (85)" in messages()


def test_loss_accuracy_and_f1_are_those_over_all_words(tmp_path, model):
    """They do not depend on how many words a batch has."""
    module = TokenClassification(model)
    of_file = data(tmp_path, batch_size=3)
    runs = trainer(GeoLoRACallback())
    runs.validate(module, of_file, verbose=False)
    whole, targets, rows = [], [], sentences(32)
    with torch.no_grad():
        for words in rows:
            encoded = module.tokenizer([words], is_split_into_words=True, return_tensors="pt")
            first = [i for i, w in enumerate(encoded.word_ids()) if w is not None]  # every word is one piece here
            whole.append(module.eval()(encoded)[0, first])
            targets += [module.class_names.index(tag) for tag in rule(words)]
    logits, targets = torch.cat(whole), torch.tensor(targets)
    close(runs.callback_metrics["val_loss"], F.cross_entropy(logits, targets), NETWORK)
    close(runs.callback_metrics["val_accuracy"], (logits.argmax(1) == targets).float().mean())
    score = EntityScore()
    score.update([[module.class_names[i] for i in row.argmax(1)] for row in whole], [rule(words) for words in rows])
    close(runs.callback_metrics["val_f1"], score.compute())


def test_a_batch_without_words_counts_nothing_in_the_scores(tmp_path, model):
    """Words that are nothing to the tokenizer filled a batch, and the validation ended in an error of torch."""
    rows = [*sentences(2), [""], [""]]
    file = write(tmp_path / "v.jsonl", tokens=rows, tags=[rule(words) for words in rows])
    found = []
    for val_file in (file, tagged(tmp_path / "w.jsonl", 2)):
        torch.manual_seed(0)
        module = TokenClassification(model)
        runs = trainer(GeoLoRACallback())
        found.append(runs.validate(module, data(tmp_path, val_file=val_file, batch_size=2), verbose=False)[0])
    for name in ("val_loss", "val_accuracy", "val_f1"):
        close(*(torch.tensor(metrics[name]) for metrics in found), NETWORK)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")  # the samples are even
def test_two_processes_score_and_write_as_one_does(tmp_path, model, one_thread, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    found, written = [], []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        torch.manual_seed(0)
        module = TokenClassification(model, num_classes=5)
        module.configure_model()
        runs = trainer(GeoLoRACallback(), devices=devices, strategy=strategy)
        found.append(runs.validate(module, data(tmp_path), verbose=False)[0])
        writer = PredictionWriter(tmp_path / "p.jsonl")
        runs = trainer(GeoLoRACallback(), writer, devices=devices, strategy=strategy)
        runs.predict(module, data(tmp_path), return_predictions=False)
        written.append([json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()])
    for name in ("val_loss", "val_accuracy", "val_f1"):
        close(*(torch.tensor(metrics[name]) for metrics in found), NETWORK)
    assert [row["tokens"] for row in written[1]] == sentences(32)
    assert [row["tags"] for row in written[0]] == [row["tags"] for row in written[1]]


def test_every_word_has_a_tag_in_the_file_of_predictions_or_null_where_it_was_cut_off(tmp_path, model):
    rows = [["good", "film"], ["bad"] * 9, ["the", " ", "plot"]]
    words = write(tmp_path / "words.jsonl", tokens=rows)
    module = TokenClassification(model, class_names=["O", "B-X", "I-X"], num_classes=3)
    module.configure_model()
    module.eval()
    of_file = data(tmp_path, predict_file=words, max_length=6, tags=["O", "B-X", "I-X"])
    of_file.files = {"predict": words}
    written = predict(module, of_file, tmp_path / "p.jsonl", **QUIET)
    assert written == [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in written] == rows
    assert [[tag is None for tag in row["tags"]] for row in written] == [
        [False] * 2, [False] * 4 + [True] * 5, [False, True, False],
    ]  # fmt: skip
    with torch.no_grad():
        expected = module(module.tokenizer(["good film"], return_tensors="pt"))[0, 1:3].softmax(-1).max(-1)
    assert written[0]["tags"] == [module.class_names[index] for index in expected.indices]
    close(torch.tensor(written[0]["scores"]), expected.values, NETWORK)
    predict(module, of_file, tmp_path / "p.csv", **QUIET)
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "index,tokens,tags,scores"


def test_exports_are_what_transformers_and_peft_load(tmp_path, model):
    module = TokenClassification(model, class_names=["O", "B-X", "I-X"], num_classes=3)
    module.configure_model()
    ckpt = save(move(module), tmp_path / "t.ckpt", "geolora_pl.tasks.TokenClassification")
    batch = module.tokenizer(["the good film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = module(batch)
    export(ckpt, "merged", tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(merged(**batch).logits, expected, NETWORK)
    tags = pipeline("token-classification", model=str(tmp_path / "merged"), ignore_labels=[])("the good film")
    assert [tag["entity"] for tag in tags] == [module.class_names[i] for i in expected[0, 1:4].argmax(-1)]
    export(ckpt, "peft", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    theirs = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "peft", num_labels=3).eval()
    with torch.no_grad():
        close(theirs(**batch).logits, expected, NETWORK)


def test_the_command_line_fits_resumes_tests_predicts_and_exports(tmp_path, model, monkeypatch):
    """A checkpoint alone knows the tags, and a resumed run goes on."""
    monkeypatch.chdir(tmp_path)
    tagged(tmp_path / "train.jsonl")
    last, first = from_fit_to_export("TokenClassification", model, "TagFiles", "train.jsonl")
    assert set(first) == {"index", "tokens", "tags", "scores"}
    assert set(first["tags"]) <= {*KINDS.values(), "O"}
    loaded = TokenClassification.load_from_checkpoint(last).eval()
    merged = AutoModelForTokenClassification.from_pretrained("merged").eval()
    assert merged.config.id2label == dict(enumerate(loaded.class_names))
