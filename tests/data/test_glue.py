import datasets
import pytest
from glue_files import LAYOUTS, REAL, write_glue, write_tsv
from text_files import attach

from geolora_pl.data import GLUE

CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "stsb": [],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}  # in the order of the indices on the hub
METRICS = {"cola": ["matthews"], "mrpc": ["f1", "accuracy"], "qqp": ["f1", "accuracy"], "stsb": ["pearson", "spearman"]}


@pytest.mark.parametrize("task", LAYOUTS)
def test_the_official_layout_with_its_quirks(tmp_path, task):
    data = GLUE(task, write_glue(tmp_path, task))
    _, _, _, texts, label = LAYOUTS[task]
    splits = data.load_splits()
    second = {"val_mismatched", "predict_mismatched"} if task == "mnli" else set()
    assert set(splits) == {"train", "val", "predict", *second}
    assert all(len(split) == (1 if name.startswith("predict") else 2) for name, split in splits.items())
    columns = ["text", "text_pair"][: len(texts)]
    for split, row in (("train", 0), ("val", 1)):
        assert [splits[split][row][column] for column in columns] == texts
        assert splits[split][row]["label"] == pytest.approx(label)
    assert splits["predict"].column_names == columns
    wanted = {"qqp": "question", "qnli": "question", "mrpc": "#1"}.get(task, "sentence")
    assert splits["predict"][0]["text"].startswith(f'"{wanted}')
    assert data.metrics == METRICS.get(task, ["accuracy"])
    assert data.class_names == CLASSES[task]
    assert data.num_classes == {"stsb": 1, "mnli": 3}.get(task, 2)


@pytest.mark.parametrize("task", LAYOUTS)
def test_the_hub_gives_the_same(tmp_path, monkeypatch, task):
    """With what stands in for the hub: its columns, its split names, its label indices."""
    local = GLUE(task, write_glue(tmp_path, task))
    pairs = {"qqp": ["question1", "question2"], "qnli": ["question", "sentence"], "mnli": ["premise", "hypothesis"]}
    names = pairs.get(task, ["sentence1", "sentence2"] if task not in {"cola", "sst2"} else ["sentence"])
    label = datasets.ClassLabel(names=CLASSES[task]) if CLASSES[task] else datasets.Value("float32")
    features = datasets.Features({**dict.fromkeys(names, datasets.Value("string")), "label": label})
    kinds = {"train": "train", "val": "validation", "predict": "test"}
    hub = {}
    for split, texts in local.load_splits().items():
        columns = {name: texts[column][:] for name, column in zip(names, ["text", "text_pair"], strict=False)}
        columns["label"] = texts["label"][:] if "label" in texts.column_names else [-1] * len(texts)
        kind, _, rest = split.partition("_")
        end = "" if task != "mnli" or kind == "train" else f"_{rest or 'matched'}"
        hub[kinds[kind] + end] = datasets.Dataset.from_dict(columns, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: (asked.append(args), datasets.DatasetDict(hub))[1])
    found = GLUE(task).load_splits()
    assert asked == [("nyu-mll/glue", task)]
    assert {name: split.to_dict() for name, split in found.items()} == {
        name: split.to_dict() for name, split in local.load_splits().items()
    }


def test_labels_of_the_hub_in_another_order_are_refused(monkeypatch):
    features = datasets.Features({"label": datasets.ClassLabel(names=CLASSES["mnli"][::-1])})
    train = datasets.Dataset.from_dict({"label": [0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=train))
    with pytest.raises(ValueError, match=r"has the labels \['contradiction', .* for mnli, and not \['entailment', "):
        GLUE("mnli").load_splits()


def test_a_hub_that_cannot_be_reached_names_the_remedy(monkeypatch):
    def fail(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"folder=None: .*nyu-mll/glue.* cannot be loaded.*no network.*name the folder"
    ):
        GLUE("rte").load_splits()


def test_lines_that_lack_a_field_are_left_out_and_counted(tmp_path, messages):
    folder = write_glue(tmp_path, "qqp")
    with (tmp_path / "QQP" / "train.tsv").open("a") as file:
        file.write('"\tWas Muhammad a real figure?\t0\n7\t8\t9\te?\tf?\t1\n')
    with (tmp_path / "QQP" / "dev.tsv").open("a") as file:
        file.write("7\t8\t9\te?\tf?\ttwo\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: row 3 has is_duplicate='two', which is none of the labels 0, 1"):
        GLUE("qqp", folder).load_splits()
    write_tsv(tmp_path / "QQP" / "dev.tsv", [LAYOUTS["qqp"][1], *LAYOUTS["qqp"][2]])
    messages()
    assert GLUE("qqp", folder).load_splits()["train"]["text"][:] == ['what is "a?', "c?", "e?"]
    assert "train.tsv: lines left out because they do not have 6 fields: 1" in messages()


def test_an_unknown_task_and_a_folder_without_it_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"task='sst-2' must be one of cola, sst2"):
        GLUE("sst-2")
    with pytest.raises(ValueError, match=r"folder=.* must hold SST-2/train\.tsv or dev\.tsv"):
        GLUE("sst2", write_glue(tmp_path, "rte"))


@pytest.mark.parametrize(("task", "dev"), [("rte", "dev"), ("mnli", "dev_matched"), ("mnli", "dev_mismatched")])
def test_a_folder_to_train_from_without_a_set_to_validate_on_is_refused_at_once(tmp_path, task, dev):
    folder = write_glue(tmp_path, task)
    (tmp_path / task.upper() / f"{dev}.tsv").unlink()
    with pytest.raises(ValueError, match=rf"holds {task.upper()}/train\.tsv, so it must hold {dev}\.tsv as well"):
        GLUE(task, folder)
    (tmp_path / task.upper() / "train.tsv").unlink()
    assert [name for name in GLUE(task, folder).load_splits() if name.startswith("predict")]  # enough to predict


def test_a_file_of_another_layout_is_refused_and_its_columns_are_named(tmp_path):
    write_tsv(tmp_path / "RTE" / "dev.tsv", [["id", "premise", "hypothesis", "label"], ["0", "a", "b", "c"]])
    with pytest.raises(ValueError, match="has no column 'sentence1', 'sentence2'; it has 'id', 'premise'"):
        GLUE("rte", str(tmp_path)).load_splits()


def test_mnli_has_two_sets_to_validate_and_two_to_predict(tmp_path):
    data = attach(GLUE("mnli", write_glue(tmp_path, "mnli"), cache_dir=tmp_path / "cache"))
    assert data.splits_of("val") == ["val", "val_mismatched"]
    assert len(data.val_dataloader()) == len(data.predict_dataloader()) == 2


def test_a_test_without_labels_is_refused_with_what_to_do(tmp_path):
    data = attach(GLUE("rte", write_glue(tmp_path, "rte"), cache_dir=tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no labels: use validate for the score on the development set, and predict"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("task", "rows", "share"),
    [
        ("cola", {"train": 8551, "val": 1043}, [0.296, 0.704]),
        ("sst2", {"train": 67349, "val": 872}, [0.442, 0.558]),
        ("mrpc", {"train": 3667, "val": 408}, [0.326, 0.674]),
        ("stsb", {"train": 5749, "val": 1500}, None),
        ("qnli", {"val": 5463}, [0.495, 0.505]),
        ("rte", {"train": 2490, "val": 277}, [0.502, 0.498]),
    ],
)
@pytest.mark.skipif(not REAL.is_dir(), reason="the official files")
def test_the_official_files(task, rows, share):
    splits = GLUE(task, str(REAL)).load_splits()
    assert {name: len(split) for name, split in splits.items()} == rows
    first = next(iter(splits.values()))
    labels = first["label"][:]
    if share is None:
        assert (min(labels), max(labels)) == (0, 5)
    else:
        assert [labels.count(index) / len(labels) for index in (0, 1)] == pytest.approx(share, abs=1e-3)
    assert all(
        text.strip() for split in splits.values() for column in split.column_names[:-1] for text in split[column]
    )
