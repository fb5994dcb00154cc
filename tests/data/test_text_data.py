import multiprocessing
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from text_files import attach, write
from tiny_text import WORDS, make_tokenizer
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from geolora_pl.data import TextDataModule, TextFiles, TextHub, UnlabelledTexts
from geolora_pl.data.texts.sampler import ShuffledSampler
from geolora_pl.data.texts.token_cache import tokenizer_hash

TEXTS = ['a "good" film', "NA", "null , not very", 'a bad plot"', "good", "the film is fine"]
LABELS = ["pos", "neg", "neg", "neg", "pos", "pos"]


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.tsv", text=TEXTS * 4, label=LABELS * 4)


@pytest.fixture
def calls(monkeypatch):
    """How often texts are tokenized."""
    seen = []
    original = PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "__call__",
        lambda self, *args, **kw: (seen.append(args), original(self, *args, **kw))[1],
    )
    return seen


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_texts_as_they_stand(tmp_path, suffix):
    file = write(tmp_path / f"train{suffix}", id=range(6), label=LABELS, text=TEXTS, second=TEXTS[::-1])
    data = TextFiles(file, pair_column="second")
    train = data.load_splits()["train"]
    assert train.column_names == ["text", "text_pair", "label"]
    assert train["text"][:] == TEXTS
    assert train["text_pair"][:] == TEXTS[::-1]
    assert train["label"][:] == [1, 0, 0, 0, 1, 1]
    assert (data.class_names, data.num_classes, data.is_regression, data.metrics) == (
        ["neg", "pos"],
        2,
        False,
        ["accuracy"],
    )


def test_a_quoted_line_break_belongs_to_the_text_and_a_byte_order_mark_to_none(tmp_path):
    (tmp_path / "train.csv").write_text('\ufefftext,label\n"one\ntwo",a\nthree,b\n', encoding="utf-8")
    assert TextFiles(str(tmp_path / "train.csv")).load_splits()["train"]["text"][:] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("labels", "settings", "names", "mapped"),
    [
        ([10, 2, 2, 10], {}, ["2", "10"], [1, 0, 0, 1]),
        ([True, False, False, True], {}, ["false", "true"], [1, 0, 0, 1]),
        (["b", "a", "a", "b"], {"labels": ["b", "a"]}, ["b", "a"], [0, 1, 1, 0]),
        ([" 1", "0", "1 ", "10"], {}, ["0", "1", "10"], [1, 0, 1, 2]),
        (["a ", " a", "b", "b"], {"labels": ["b ", "a"]}, ["b ", "a"], [1, 1, 0, 0]),
        (["2024-01-02", "2024-01-01"] * 2, {}, ["2024-01-01", "2024-01-02"], [1, 0, 1, 0]),
        ([1, 2, 3, 4], {"regression": True}, [], [1.0, 2.0, 3.0, 4.0]),
        ([1.0, 2.0, 3.0, 4.0], {}, [], [1.0, 2.0, 3.0, 4.0]),
        ([0.5, 2, 3.25, 4], {}, [], [0.5, 2.0, 3.25, 4.0]),
        ([0.5, 2, 0.5, 10], {"regression": False}, ["0.5", "2", "10"], [0, 1, 0, 2]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_are_classes_or_numbers(tmp_path, suffix, labels, settings, names, mapped):
    words = [str(label).lower() if isinstance(label, bool) else label for label in labels]
    file = write(tmp_path / f"train{suffix}", text=TEXTS[:4], label=words if suffix == ".csv" else labels)
    data = TextFiles(file, **settings)
    assert data.class_names == names
    assert data.is_regression == (not names)
    assert data.num_classes == (len(names) or 1)
    assert data.metrics == (["accuracy"] if names else ["pearson", "spearman"])
    assert data.load_splits()["train"]["label"][:] == mapped


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, "is empty"),
        ("text,label\n", {}, "holds no rows"),
        ("text,label\na,b,c\n", {}, "cannot be read: .*Expected 2 columns, got 3"),
        ("text,label\na,x\nb,y\n", {"text_column": "review"}, "has no column 'review'; it has 'text', 'label'"),
        ("text,label\na,x\nb,y\n", {"label_column": "stars"}, "has no column 'stars'"),
        ("text,label\na,x\nb,\nc,y\n", {}, "row 2 has label='', which is none of the labels x, y"),
        ("text,label\na,x\nb,x\n", {}, "every label is 'x': there must be two classes"),
        ("text,label\na,0.5\nb,nan\n", {"regression": True}, "row 2 has label='nan', which is not a finite number"),
        ("text,label\na,0.5\nb,much\n", {"regression": True}, "row 2 has label='much', which is not a finite number"),
        (b"text,label\n\xff,x\nb,y\n", {}, r"is not text in UTF-8 \(line 2: .*save it as UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, content, settings, message):
    path = tmp_path / "train.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        TextFiles(str(path), **settings).load_splits()


def test_categories_of_pandas_are_what_they_stand_for(tmp_path):
    columns = {
        "text": pa.array(["a", "b", "a"]).dictionary_encode(),
        "label": pa.array(["y", "x", "x"]).dictionary_encode(),
    }
    file = write(tmp_path / "{train}.parquet", **columns)
    data = TextFiles(file)
    assert data.load_splits()["train"].to_dict() == {"text": ["a", "b", "a"], "label": [1, 0, 0]}
    with pytest.raises(ValueError, match=r"\{train\}\.parquet: row 1 has label='y', which is none of the labels x, z"):
        TextFiles(file, labels=["x", "z"]).load_splits()


@pytest.mark.parametrize(("suffix", "missing"), [(".csv", ""), (".tsv", ""), (".jsonl", None), (".parquet", None)])
def test_a_missing_text_is_an_empty_one_and_said(tmp_path, messages, suffix, missing):
    file = write(tmp_path / f"train{suffix}", text=["a", missing, missing], label=["x", "y", "x"])
    assert TextFiles(file).load_splits()["train"]["text"][:] == ["a", "", ""]
    assert f"train{suffix}: text is empty in 2 rows, row 2 first" in messages()


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_predictions_keep_to_the_lines_of_a_file_of_texts_alone(tmp_path, train, suffix):
    (tmp_path / f"new{suffix}").write_text("text\na\n\nb\n")
    predict = TextFiles(train, predict_file=str(tmp_path / f"new{suffix}")).load_splits()["predict"]
    assert predict["text"][:] == ["a", "", "b"]


def test_a_text_that_looks_like_a_date_stays_as_it_is(tmp_path):
    file = write(tmp_path / "train.jsonl", text=["2024-01-01", "2024-01-02T10:00:00Z"], label=["x", "y"])
    assert TextFiles(file).load_splits()["train"]["text"][:] == ["2024-01-01", "2024-01-02T10:00:00Z"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_column_of_lists_is_refused(tmp_path, suffix, column):
    columns = {"text": ["a", "b"], "label": ["x", "y"], column: [["a"], ["b"]]}
    file = write(tmp_path / f"train{suffix}", **columns)
    with pytest.raises(ValueError, match=rf"train{suffix}: {column} holds list<.*>, but must hold strings or numbers"):
        TextFiles(file).load_splits()


@pytest.mark.parametrize("content", ['[{"text": "a", "label": 0}]', '[\n{"text": "a", "label": 0}\n]'])
def test_a_json_file_that_is_one_list_is_told_its_form(tmp_path, content):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"train\.json cannot be read: .*; it must hold one object per line"):
        TextFiles(str(tmp_path / "train.json")).load_splits()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_regression_that_nobody_asked_for_is_said_with_what_to_do(tmp_path, messages, suffix):
    file = write(tmp_path / f"train{suffix}", text=["a", "b", "c"], label=[0.0, 1.0, 1.0])
    for regression, said in ((None, True), (True, False), (False, False)):
        TextFiles(file, regression=regression).load_splits()
        message = "label holds numbers with decimals, so this is a regression; set regression: false"
        assert (message in messages()) == said


def test_an_unknown_label_of_another_split_is_refused_with_its_row(tmp_path, train):
    val = write(tmp_path / "val.tsv", text=TEXTS[:3], label=["pos", "neg", "neutral"])
    with pytest.raises(ValueError, match=r"val\.tsv: row 3 has label='neutral', which is none of the labels neg, pos"):
        TextFiles(train, val).load_splits()


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.tsv is not a file"):
        TextFiles("gone.tsv").load_splits()
    for suffix in (".jsonl", ".parquet"):
        file = write(tmp_path / f"train{suffix}", text=["a", "b"], label=["x", "y"])
        with pytest.raises(ValueError, match="has no column 'stars'; it has 'text', 'label'"):
            TextFiles(file, label_column="stars").load_splits()
        Path(file).write_text("{")
        with pytest.raises(ValueError, match=rf"train\{suffix} cannot be read"):
            TextFiles(file).load_splits()
    with pytest.raises(ValueError, match=r"texts\.xlsx must end in one of \.csv"):
        TextFiles("texts.xlsx").load_splits()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"labels": ["a", "a"]}, "labels=.*each once"),
        ({"labels": ["a", "b"], "regression": True}, "labels=.*none in a regression"),
        ({"labels": [0, 1]}, r"labels=\[0, 1\] must name two or more classes as strings"),
        ({"label_column": "text"}, "text_column='text', .*label_column='text' must be different columns"),
        ({"pair_column": "label"}, "pair_column='label' and label_column='label' must be different columns"),
        ({"pair_column": "text"}, "pair_column='text' .* must be different columns"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TextFiles("train.tsv", **settings)


def test_the_part_held_out_keeps_the_shares_of_the_classes_and_depends_on_the_seed_alone(tmp_path):
    rare = ["neg"] * 30 + ["pos"] * 10
    file = write(tmp_path / "train.tsv", text=[f"{i}" for i in range(40)], label=rare)
    words = [f"{i}" for i in range(40)]

    def texts_of(seed):
        data = attach(
            TextFiles(file, val_fraction=0.2, seed=seed, cache_dir=tmp_path),
            make_tokenizer(words=words, model_max_length=9),
        )
        assert np.bincount(data.splits["val"]["label"][:]).tolist() == [6, 2]
        assert data.class_counts == [24, 8]
        return [sorted(split["input_ids"][:]) for split in data.splits.values()]

    train, val = texts_of(0)
    assert len(train) == 32
    assert not [ids for ids in val if ids in train]
    assert texts_of(0) == [train, val]
    assert texts_of(1) != [train, val]


def test_a_source_of_ones_own_may_give_plain_indices_as_labels(tmp_path):
    class Own(TextDataModule):
        class_names = tuple("abcdefghijk")

        def load_splits(self):
            rows = [{"text": "good", "label": index} for index in range(11) for _ in range(10 + 10 * (index == 2))]
            return {"train": datasets.Dataset.from_list(rows)}

    data = attach(Own(val_fraction=0.2, cache_dir=str(tmp_path)))
    shares = [2 + 2 * (index == 2) for index in range(11)]
    assert np.bincount(data.splits["val"]["label"][:]).tolist() == shares
    assert data.class_counts == [4 * share for share in shares]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("xxyy", r"val_fraction=0\.3 of 4 texts is 1, .*give texts for validation"),
        ("xxyx", r"class 'y' has one text, .*drop the class, or give texts for validation"),
    ],
)
def test_a_part_that_cannot_be_held_out_is_refused(tmp_path, labels, message):
    file = write(tmp_path / "train.tsv", text=["a", "b", "c", "d"], label=labels)
    with pytest.raises(ValueError, match=message):
        attach(TextFiles(file, val_fraction=0.3, cache_dir=tmp_path))


def test_a_data_set_of_the_hub_by_its_folder(tmp_path):
    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["low", "high"])}
    )
    for split, stars in (("train", [1, 0, 1, 0]), ("validation", [1, 0]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"review": TEXTS[: len(stars)], "stars": stars}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    data = TextHub(str(tmp_path), text_column="review", label_column="stars")
    splits = data.load_splits()
    assert {name: split.column_names for name, split in splits.items()} == {
        "train": ["text", "label"],
        "val": ["text", "label"],
        "predict": ["text"],  # all its labels are hidden
    }
    assert data.class_names == ["low", "high"]
    assert splits["train"]["label"][:] == [1, 0, 1, 0]
    numbers = TextHub(
        str(tmp_path), text_column="review", label_column="stars", regression=True, splits={"train": "train"}
    )
    assert numbers.load_splits()["train"]["label"][:] == [1.0, 0.0, 1.0, 0.0]
    named = TextHub(str(tmp_path), splits={"train": "validation"}, text_column="review", label_column="stars")
    assert len(named.load_splits()["train"]) == 2
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, validation, test"):
        TextHub(
            str(tmp_path), splits={"train": "train", "val": "dev"}, text_column="review", label_column="stars"
        ).load_splits()
    with pytest.raises(ValueError, match="has no column 'text'; it has review, stars"):
        TextHub(str(tmp_path)).load_splits()
    with pytest.raises(ValueError, match=r"dataset='.*gone', subset=None cannot be loaded"):
        TextHub(str(tmp_path / "gone")).load_splits()


@pytest.mark.parametrize("labels", [datasets.Value("float32"), datasets.ClassLabel(names=["low", "high"])])
@pytest.mark.parametrize("splits", [None, {"train": "train", "test": "test"}])
def test_a_test_set_of_the_hub_with_hidden_labels_is_there_to_predict(tmp_path, labels, splits):
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    for split, of_split in (("train", [1, 0]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"text": TEXTS[:2], "label": of_split}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    found = TextHub(str(tmp_path), splits=splits).load_splits()
    assert {name: split.column_names for name, split in found.items()} == {
        "train": ["text", "label"],
        "predict": ["text"],
    }


@pytest.mark.parametrize(("pair", "special"), [(None, 2), ("second", 3)])
def test_a_length_that_the_special_tokens_fill_is_refused(tmp_path, pair, special):
    file = write(tmp_path / "train.tsv", text=TEXTS, second=TEXTS, label=LABELS)
    settings = {"pair_column": pair, "val_fraction": 0.5, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=f"max_length={special} leaves no room .* the tokenizer's {special} special"):
        attach(TextFiles(file, max_length=special, **settings))
    assert attach(TextFiles(file, max_length=special + 1, **settings)).splits


def test_pairs_are_cut_to_the_limit_and_padded_to_the_longest_of_the_batch(tmp_path):
    file = write(
        tmp_path / "train.tsv",
        text=["one two three four five", "one"] * 4,
        second=["six seven", "two"] * 4,
        label=[0, 1] * 4,
    )
    data = attach(TextFiles(file, file, pair_column="second", max_length=8, batch_size=2, cache_dir=tmp_path))
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (2, 8)
    decoded = data.tokenizer().batch_decode(batch["input_ids"])
    assert decoded == ["[CLS] one two three [SEP] six seven [SEP]", "[CLS] one [SEP] two [SEP] [PAD] [PAD] [PAD]"]
    assert batch["token_type_ids"].tolist()[0] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [8, 5]
    assert batch["labels"].tolist() == [0, 1]


def test_texts_to_predict_need_no_labels_and_keep_their_order(tmp_path, train):
    file = write(tmp_path / "new.csv", text=["good", "bad film", "one"])
    data = attach(TextFiles(train, predict_file=file, batch_size=2, cache_dir=tmp_path))
    loader = data.predict_dataloader()
    assert isinstance(loader.sampler, SequentialSampler)
    batches = list(loader)
    assert all("labels" not in batch for batch in batches)
    decoded = [
        text
        for batch in batches
        for text in data.tokenizer().batch_decode(batch["input_ids"], skip_special_tokens=True)
    ]
    assert decoded == ["good", "bad film", "one"]
    with pytest.raises(ValueError, match="TextFiles has no test texts, but train, predict, val: name some"):
        data.test_dataloader()


def test_a_second_run_finds_the_token_ids_also_after_the_tokenizer_was_used(tmp_path, train, calls):
    settings = {"cache_dir": str(tmp_path / "cache")}
    tokenizer = make_tokenizer(model_max_length=16)
    first = attach(TextFiles(train, **settings), tokenizer)
    assert len(calls) == 2
    tokenizer(["one two three"], padding="max_length", max_length=5, truncation=True)  # leaves its state behind
    calls.clear()
    for again in (tokenizer, make_tokenizer(model_max_length=16)):
        second = attach(TextFiles(train, **settings), again)
        assert not calls
        assert second.splits["train"]["input_ids"][:] == first.splits["train"]["input_ids"][:]


@pytest.mark.parametrize("change", ["tokenizer", "text", "label", "length"])
def test_what_has_changed_is_noticed(tmp_path, train, calls, change):
    settings = {"cache_dir": str(tmp_path / "cache"), "val_file": train}
    attach(TextFiles(train, **settings))
    calls.clear()
    tokenizer, path, status = None, Path(train), os.stat(train)
    if change == "tokenizer":
        tokenizer = make_tokenizer(words=WORDS[::-1], model_max_length=16)
    elif change == "length":
        settings["max_length"] = 4
    elif change == "text":
        path.write_text(path.read_text().replace("very", "much"))
    else:
        path.write_text(path.read_text().replace("pos", "sop"))
    os.utime(train, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps the time does
    data = attach(TextFiles(train, **settings), tokenizer)
    assert len(calls) == 1  # both splits are the same file
    if change == "label":
        assert data.splits["train"].features["label"].names == ["neg", "sop"]


def test_one_object_serves_another_model_with_another_tokenizer(tmp_path, train):
    data = attach(TextFiles(train, cache_dir=tmp_path))
    before = data.splits["train"]["input_ids"][:]
    attach(data, make_tokenizer(words=WORDS[::-1], model_max_length=16))
    assert data.splits["train"]["input_ids"][:] != before


def test_a_slow_tokenizer_has_a_hash_too():
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = [Slow(tokenizer_object=make_tokenizer(words=words).backend_tokenizer) for words in (WORDS, WORDS, WORDS[:5])]
    hashes = [tokenizer_hash(tokenizer) for tokenizer in slow]
    assert hashes[0] == hashes[1] != hashes[2]


def _tokenize(file, cache, barrier, results):
    original = PreTrainedTokenizerBase.__call__

    def together(self, *args, **kwargs):
        barrier.wait(280)  # both are in the middle of it
        return original(self, *args, **kwargs)

    PreTrainedTokenizerBase.__call__ = together
    data = attach(TextFiles(file, file, cache_dir=cache))
    results.put(data.splits["train"]["input_ids"][:])


@pytest.mark.usefixtures("one_thread")
def test_two_processes_that_meet_at_an_empty_cache_both_have_the_whole_data(tmp_path, train, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [
        fork.Process(target=_tokenize, args=(train, str(tmp_path / "cache"), barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=280) for _ in processes]
    for process in processes:
        process.join()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    expected = attach(TextFiles(train, train, cache_dir=tmp_path / "other")).splits["train"]["input_ids"][:]
    assert found == [expected, expected]
    assert len(expected) == 24


def test_a_tokenizer_without_a_limit_and_a_module_without_a_tokenizer_are_told_what_to_do(tmp_path, train):
    with pytest.raises(ValueError, match="max_length=None: the tokenizer does not know"):
        attach(TextFiles(train, cache_dir=tmp_path), make_tokenizer())
    with pytest.raises(ValueError, match="NoneType has no tokenizer"):
        TextFiles(train).setup("fit")


LENGTHS = np.random.default_rng(3).integers(5, 100, 1003)


def sampler(rank=0, processes=1, seed=0, lengths=LENGTHS, epoch=0):
    made = ShuffledSampler(range(len(LENGTHS)), 8, lengths, seed, num_replicas=processes, rank=rank)
    made.set_epoch(epoch)
    return made


def padding(order, batch=8):
    batches = [LENGTHS[order[i : i + batch]] for i in range(0, len(order), batch)]
    return sum(len(b) * b.max() for b in batches) / LENGTHS.sum() - 1


def test_the_order_is_new_each_epoch_and_a_function_of_seed_and_epoch_alone():
    orders = [list(sampler(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1003)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert list(sampler(epoch=1)) == orders[1]


def test_batches_are_of_similar_length_and_come_shuffled():
    grouped, shuffled = list(sampler()), list(sampler(lengths=None))
    assert sorted(shuffled) == list(range(1003))
    assert padding(grouped) < 0.1 < 0.5 < padding(shuffled)
    means = np.array([LENGTHS[grouped[i : i + 8]].mean() for i in range(0, 1000, 8)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # not from short to long


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_global_batch(processes):
    shares = [list(sampler(rank, processes, epoch=4)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together[:1003] == sampler(0, processes, epoch=4).order()
    assert sorted(together[:1003]) == list(range(1003))
    assert set(together[1003:]) <= set(range(1003))  # some again, so that all have as many
    assert padding(together, 8 * processes) < 0.1
    assert all(padding(share) < 0.1 for share in shares)


def test_the_ending_of_a_file_of_lines_may_be_in_capitals(tmp_path):
    """As that of every other file; LINES.TXT was taken for a table and refused."""
    (tmp_path / "LINES.TXT").write_text("good\nbad\n")
    assert UnlabelledTexts(str(tmp_path / "LINES.TXT")).load_splits()["predict"]["text"][:] == ["good", "bad"]
