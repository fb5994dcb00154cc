"""Several labels per sample and numbers, of images and texts: tiny models learn a simple rule, and export it."""

import csv
import json
import random

import lightning as L
import numpy as np
import pytest
import timm
import torch
from exported import settings_of
from foreign import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_text import save_tiny_model
from tiny_vit import SIZE
from tolerance import close
from torch import nn
from transformers import AutoModelForSequenceClassification

from geolora_pl import AdapterConfig, GeoLoRACallback, predict
from geolora_pl.data import Digits, ImageTable, TextFiles, UnlabelledImages, UnlabelledTexts
from geolora_pl.lightning.export import export
from geolora_pl.tasks import ImageClassification, TextClassification

OVERLAY = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
LOOKS = ("bright", "striped")


def images(**settings):
    return ImageClassification(**OF_IMAGES, head_lr=0.01, **settings)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures that are bright, striped, both or neither, and a table of what they are."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "of").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(120):
        bright, striped = number % 2, number // 2 % 2
        values = rng.integers(0, 60, (16, 16)) + 100 * bright
        values[::2] += 90 * striped
        name = f"of/{number:03}.png"
        Image.fromarray(values.astype(np.uint8)).save(folder / name)
        labels = "|".join(look for look, is_so in zip(LOOKS, (bright, striped), strict=True) if is_so)
        rows.append([name, labels, bright, striped, f"{values.mean() / 50:.3f}"])
    random.Random(0).shuffle(rows)
    write(folder / "train.csv", ["file", "label", *LOOKS, "light"], rows[:96])
    write(folder / "test.csv", ["file", "label", *LOOKS, "light"], rows[96:])
    return folder


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


OF_IMAGES = {
    "model_name": "vit_tiny_patch16_224",
    "pretrained": False,
    "model_args": {**SIZE, "pretrained_cfg_overlay": OVERLAY},
}


def table(folder, **settings):
    return ImageTable(str(folder / "train.csv"), test_file=str(folder / "test.csv"), batch_size=16, **settings)


def fit(module, data, folder, epochs=15):
    L.seed_everything(0, verbose=False)
    saved = ModelCheckpoint(folder, "run", monitor="val_loss")
    runs = trainer(GeoLoRACallback(tau=0.05, adapt_every=5), saved, max_epochs=epochs)
    runs.fit(module, data)
    return runs, folder / "run.ckpt"


@pytest.mark.parametrize("settings", [{"label_separator": "|"}, {"label_columns": list(LOOKS)}], ids=["one", "several"])
def test_images_with_several_labels_are_learnt_predicted_and_exported(tmp_path, pictures, settings):
    data, module = table(pictures, **settings), images()
    runs, path = fit(module, data, tmp_path)
    assert (data.class_names, data.multi_label, module.multi_label) == (list(LOOKS), True, True)
    result = runs.test(module, data, verbose=False)[0]
    assert set(result) == {"test_loss", "test_f1_macro", "test_f1_micro", "test_average_precision"}
    assert min(result["test_f1_macro"], result["test_average_precision"]) > 0.9
    loaded = ImageClassification.load_from_checkpoint(path)
    rows = predict(loaded, UnlabelledImages(str(pictures / "of")), tmp_path / "found.csv", enable_progress_bar=False)
    known = [[look for look, bit in zip(LOOKS, (n % 2, n // 2 % 2), strict=True) if bit] for n in range(120)]
    assert np.mean([row["labels"] == labels for row, labels in zip(rows, known, strict=True)]) > 0.9
    with (tmp_path / "found.csv").open() as file:
        first = next(row for row in csv.DictReader(file) if row["labels"] == "bright|striped")
    assert min(float(first["p_bright"]), float(first["p_striped"])) >= 0.5
    export(path, "merged", tmp_path / "merged", settings_of(tmp_path, "ImageClassification", **OF_IMAGES))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["label_names"] == list(LOOKS)
    plain = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        close(plain(x).sigmoid(), loaded.eval().predict_step((x, None)), terms=4096)


def test_a_number_of_images_is_learnt_predicted_and_exported(tmp_path, pictures):
    data, module = table(pictures, label_column="light"), images()
    runs, path = fit(module, data, tmp_path)
    assert (data.class_names, data.num_classes, module.num_classes) == ([], 1, 1)
    tested = predict(module, data, enable_progress_bar=False)
    with (pictures / "test.csv").open() as file:
        assert [row["file"] for row in tested] == [row["file"] for row in csv.DictReader(file)]
    result = runs.test(module, data, verbose=False)[0]
    assert set(result) == {"test_loss", "test_pearson", "test_spearman", "test_mae"}
    assert result["test_pearson"] > 0.9
    loaded = ImageClassification.load_from_checkpoint(path)
    rows = predict(loaded, UnlabelledImages(str(pictures / "of")), enable_progress_bar=False)
    assert set(rows[0]) == {"index", "file", "prediction"}
    export(path, "merged", tmp_path / "merged", settings_of(tmp_path, "ImageClassification", **OF_IMAGES))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["problem_type"] == "regression"


def test_classes_of_images_in_a_table(tmp_path, pictures):
    data, module = table(pictures, label_column="striped"), images(metrics=["accuracy", "f1"])
    runs, _ = fit(module, data, tmp_path)
    assert (data.class_names, data.multi_label) == (["0", "1"], False)
    assert runs.test(module, data, verbose=False)[0]["test_f1"] > 0.9


@pytest.fixture
def reviews(tmp_path):
    """Texts that are good or not, about a film or not."""
    draw = random.Random(0)
    rows = []
    for number in range(160):
        good, film = number % 2, number // 2 % 2
        words = ["good" if good else "bad", "film" if film else "plot"]
        draw.shuffle(words)
        labels = ",".join(label for label, is_so in (("praise", good), ("cinema", film)) if is_so)
        rows.append([" ".join(words), labels, good, film])
    draw.shuffle(rows)
    return write(tmp_path / "train.csv", ["text", "topics", "praise", "cinema"], rows)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"label_column": "topics", "label_separator": ","}, ["cinema", "praise"]),
        ({"label_columns": ["praise", "cinema"]}, ["praise", "cinema"]),
    ],
    ids=["one", "several"],
)
def test_texts_with_several_labels_are_learnt_predicted_and_exported(tmp_path, reviews, settings, names):
    data = TextFiles(reviews, batch_size=16, cache_dir=str(tmp_path / "cache"), val_fraction=0.2, **settings)
    model = save_tiny_model(tmp_path / "model", "distilbert")
    adapter = AdapterConfig(target_modules="auto", modules_to_save=["distilbert.embeddings.word_embeddings"])
    module = TextClassification(model, head_lr=0.02, adapter=adapter)
    runs, path = fit(module, data, tmp_path, epochs=20)
    assert (data.class_names, data.multi_label, module.multi_label) == (names, True, True)
    result = runs.validate(module, data, verbose=False)[0]
    assert set(result) == {"val_loss", "val_f1_macro", "val_f1_micro", "val_average_precision"}
    assert result["val_average_precision"] > 0.9
    loaded = TextClassification.load_from_checkpoint(path, model_name=str(tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("good film\nplot bad\n")
    texts = UnlabelledTexts(str(tmp_path / "texts.txt"), cache_dir=str(tmp_path / "cache"))
    rows = predict(loaded, texts, enable_progress_bar=False)
    assert all(set(row["probabilities"]) == set(names) for row in rows)
    both, neither = (row["probabilities"] for row in rows)
    assert all(both[name] > neither[name] for name in names)
    assert [row["labels"] for row in rows] == [[n for n in names if p[n] >= 0.5] for p in (both, neither)]
    config = settings_of(tmp_path, "TextClassification", model_name=model)
    export(path, "merged", tmp_path / "merged", config=config)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.problem_type == "multi_label_classification"
    assert plain.config.id2label == dict(enumerate(names))
    tokens = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    labels = torch.tensor([[1.0, 0.0]])
    with torch.no_grad():
        expected = nn.functional.binary_cross_entropy_with_logits(loaded.eval()(tokens), labels)
        close(plain(**tokens, labels=labels).loss, expected, terms=4096)


@pytest.mark.parametrize(
    ("column", "values", "settings", "message"),
    [
        ("label", ["x|y", "", "z"], {"label_separator": "|", "labels": ["x", "y"]}, r"csv: row 3 has the label 'z'"),
        ("label", ["", "", ""], {"label_separator": "|"}, "csv: label holds no label: there must be two labels"),
        ("label", ["1.5", "nan", "2"], {"regression": True}, r"train.csv: row 2 has label='nan', which is not"),
        ("label", ["1.5", "2.5", "1e300"], {}, r"row 3 has label='1e300', which is not a finite number of 32"),
        ("label", ["x", "", "x"], {"label_separator": "|"}, "csv: label holds the label 'x' alone"),
        ("label", ["1.5", "-inf", "2"], {}, r"train.csv: row 2 has label='-inf', which is not a finite number"),
        ("label", ["a", "b", "d"], {"labels": ["a", "b"]}, r"train.csv: row 3 has label='d', which is none"),
        ("x", ["0", "1", "2"], {"label_columns": ["x", "y"]}, r"train.csv: row 3 has x='2', which is neither 0 nor 1"),
        ("x", ["0", "1", ""], {"label_columns": ["x", "y"]}, r"train.csv: row 3 has x='', which is neither 0 nor 1"),
        ("file", ["a.png", "no.png", "c.png"], {}, r"train.csv: row 2 has file='no.png', which is not a file in"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_file_and_row(tmp_path, column, values, settings, message):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    columns = {"file": ["a.png", "b.png", "c.png"], "label": ["p", "q", "p"], "x": [0, 1, 0], "y": [1, 0, 0]}
    columns[column] = values
    path = write(tmp_path / "train.csv", list(columns), zip(*columns.values(), strict=True))
    with pytest.raises(ValueError, match=message) as raised:
        _ = ImageTable(path, **settings).load_splits()
    assert "\n" not in str(raised.value)
    if column != "file":
        with pytest.raises(ValueError, match=message):
            TextFiles(path, text_column="file", **settings).load_splits()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_separator": ""}, "label_separator='' separates nothing"),
        ({"label_columns": ["a"]}, r"label_columns=\['a'\] must name two or more columns"),
        ({"label_columns": ["a", "b"], "label_separator": ","}, "leave labels and label_separator out"),
        ({"label_columns": ["a", "b"], "regression": True}, "regression=True predicts one number"),
        ({"folder": "nowhere"}, "folder='nowhere' is not a folder"),
        ({"file_column": "label"}, "file_column='label' must be another column"),
    ],
)
def test_settings_of_labels_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTable("train.csv", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multi_label": False}, "multi_label=False does not fit the data, whose samples have several labels"),
        ({"label_smoothing": 0.1}, "label_smoothing are for samples of one class each, but its samples have several"),
        ({"mixup": 0.2}, "mixup and cutmix are for images of one class each"),
        ({"metrics": ["accuracy"]}, "metrics='accuracy' does not suit 2 labels: choose among f1_macro"),
        ({"metrics": ["auc"]}, r"metrics=\['auc'\] are not known"),
        ({"num_classes": 1}, "num_classes=1 does not fit the data, which has 2 classes"),
    ],
)
def test_settings_of_the_task_that_do_not_fit_are_refused(pictures, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(GeoLoRACallback(), max_steps=1).fit(images(**settings), table(pictures, label_separator="|"))
    with pytest.raises(ValueError, match="multi_label=True does not fit the data, whose samples have one label"):
        trainer(GeoLoRACallback(), max_steps=1).fit(images(multi_label=True), Digits())
    with pytest.raises(ValueError, match="multi_label=True needs two or more labels"):
        images(multi_label=True, num_classes=1).configure_model()


def test_a_label_of_which_all_images_are_held_out_is_refused(pictures, tmp_path):
    """A rare label that only the validation has would never be learnt."""
    rows = [[f"of/{number:03}.png", "bright"] for number in range(10)]
    rows[3][1] = "bright|striped"
    path = write(tmp_path / "train.csv", ["file", "label"], rows)
    messages = []
    for seed in range(10):
        data = ImageTable(path, folder=str(pictures), label_separator="|", seed=seed, val_fraction=0.3)
        try:
            data.setup("fit")
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all("label 'striped' is that of 1 of the images, and all of them are held out" in text for text in messages)
