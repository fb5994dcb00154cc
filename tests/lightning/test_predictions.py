import csv
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from exported import SIZE, save
from flags import FLAGS, QUIET
from PIL import Image
from tiny_text import save_tiny_model
from tolerance import NETWORK, close
from torch.utils.data import DataLoader

from geolora_pl import PredictionWriter, predict
from geolora_pl.cli.dispatch import main
from geolora_pl.data import UnlabelledImages, UnlabelledTexts
from geolora_pl.tasks import ImageClassification, TextClassification

TEXTS = ["the film was good", "", 'not "good", but bad', "fine", "poor plot"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "inside").mkdir(parents=True)
    for index in range(5):
        pixels = torch.randint(0, 255, (28, 28), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{'cabed'[index]}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def image_task():
    task = ImageClassification(
        "vit_tiny_patch16_224", False, model_args=SIZE, num_classes=3, class_names=["x", "y", "z"]
    )
    task.configure_model()
    torch.nn.init.normal_(task.model.head.weight)
    return task.eval()


def text_task(tmp_path, **settings):
    task = TextClassification(save_tiny_model(tmp_path / "bert"), **settings)
    task.configure_model()
    return task.eval()


def expected_of(task, folder):
    data = UnlabelledImages(str(folder), num_workers=0)
    data.trainer = type("Trainer", (), {"lightning_module": task})()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    with torch.no_grad():
        return task(batch[0]).softmax(-1)


def test_a_folder_of_images_in_python_gives_rows_and_a_file_in_the_order_of_names(image_task, images, tmp_path):
    output = tmp_path / "p.jsonl"
    rows = predict(image_task, UnlabelledImages(str(images), batch_size=2, num_workers=0), output, **QUIET)
    assert [row["file"] for row in rows] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    probabilities = torch.tensor([[row["probabilities"][name] for name in "xyz"] for row in rows])
    expected = expected_of(image_task, images)
    close(probabilities, expected, NETWORK)
    assert [row["label"] for row in rows] == ["xyz"[index] for index in expected.argmax(1)]
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows


@pytest.mark.parametrize("looked_up", [False, True])
def test_images_from_the_command_line_with_a_checkpoint(image_task, images, tmp_path, looked_up):
    """With ``--ckpt_path=last``, too, the checkpoint gives the classes, which the images alone cannot."""
    ckpt = save(image_task, tmp_path / "last.ckpt", "geolora_pl.tasks.ImageClassification")
    output = tmp_path / "p.csv"
    data = ["--data=geolora_pl.data.UnlabelledImages", f"--data.folder={images}", "--data.num_workers=0"]
    model = ["--model=geolora_pl.tasks.ImageClassification", "--model.model_name=vit_tiny_patch16_224"]
    path = "last" if looked_up else ckpt
    saver = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    common = [*model, *data, *FLAGS, *saver, "--trainer.logger=false"]
    main(["predict", *common, f"--ckpt_path={path}", f"--output={output}"])
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert list(rows[0]) == ["index", "file", "label", "p_x", "p_y", "p_z"]
    assert [row["file"] for row in rows] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    expected = expected_of(image_task, images)
    found = torch.tensor([[float(row[f"p_{name}"]) for name in "xyz"] for row in rows])
    close(found, expected, NETWORK)


@pytest.mark.parametrize("kind", ["txt", "csv", "pairs"])
def test_texts_from_lines_and_tables_keep_their_order(tmp_path, kind):
    task = text_task(tmp_path, num_classes=2, class_names=["no", "yes"])
    file = tmp_path / ("texts.txt" if kind == "txt" else "texts.csv")
    settings = {"num_workers": 0, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    if kind == "txt":
        file.write_text("\ufeff" + "\n".join(TEXTS) + "\n", encoding="utf-8")
    else:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["second", "review"], *(("one", text) for text in TEXTS)])
        settings |= {"text_column": "review"} | ({"pair_column": "second"} if kind == "pairs" else {})
    output = tmp_path / "p.csv"
    rows = predict(task, UnlabelledTexts(str(file), **settings), output, **QUIET)
    assert [row["text"] for row in rows] == TEXTS
    pairs = ["one"] * len(TEXTS) if kind == "pairs" else None
    with torch.no_grad():
        batch = task.tokenizer(TEXTS, pairs, padding=True, return_tensors="pt")
        expected = task(dict(batch)).softmax(-1)
    found = torch.tensor([list(row["probabilities"].values()) for row in rows])
    close(found, expected, NETWORK)
    written = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["text"] for row in written] == TEXTS
    assert [row["label"] for row in written] == [row["label"] for row in rows]
    assert set(rows[0]) == {"index", "text", "label", "probabilities"} | ({"text_pair"} if pairs else set())


def test_texts_from_the_command_line_in_a_configuration_made_for_training(tmp_path):
    task = text_task(tmp_path, num_classes=2, class_names=["no", "yes"])
    ckpt = save(task, tmp_path / "t.ckpt", "geolora_pl.tasks.TextClassification")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    config = ["--config", str(Path(__file__).parents[2] / "configs" / "text" / "quickstart.yaml")]
    data = ["--data=geolora_pl.data.UnlabelledTexts", f"--data.file={tmp_path / 't.txt'}", "--data.num_workers=0"]
    more = [f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.logger=false", f"--output={tmp_path / 'p.jsonl'}"]
    main(["predict", *config, f"--model.model_name={tmp_path / 'bert'}", *data, *more, *FLAGS, f"--ckpt_path={ckpt}",
          "--data.max_length=20"])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    with torch.no_grad():
        expected = task(dict(task.tokenizer(TEXTS, padding=True, return_tensors="pt"))).softmax(-1)
    found = torch.tensor([[row["probabilities"]["no"], row["probabilities"]["yes"]] for row in rows])
    close(found, expected, NETWORK)


def test_the_texts_beside_the_predictions_are_those_that_were_predicted(tmp_path):
    class Other(UnlabelledTexts):
        def load_splits(self):
            texts = super().load_splits()["predict"]
            return {"test": texts.select([0, 1]), "predict_other": texts.select([2, 3, 4])}

    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    data = Other(str(tmp_path / "t.txt"), num_workers=0, cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in predict(text_task(tmp_path, num_classes=2), data, **QUIET)] == TEXTS[2:]


def test_a_regression_gives_numbers(tmp_path):
    (tmp_path / "t.txt").write_text("good\nbad")
    data = UnlabelledTexts(str(tmp_path / "t.txt"), num_workers=0, cache_dir=str(tmp_path / "cache"))
    rows = predict(text_task(tmp_path, num_classes=1), data, **QUIET)
    assert [set(row) for row in rows] == [{"index", "text", "prediction"}] * 2
    assert rows[0]["prediction"] != rows[1]["prediction"]


class Sets(L.LightningDataModule):
    def predict_dataloader(self):
        return [DataLoader(torch.arange(count), batch_size=2) for count in (3, 2)]


class Echo(L.LightningModule):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return torch.stack([batch == 0, batch == 1, batch == 2], 1).float() + dataloader_idx


def test_several_sets_and_a_module_without_names(tmp_path):
    rows = predict(Echo(), Sets(), **QUIET)
    assert [(row["set"], row["index"], row["label"]) for row in rows] == [
        (0, 0, "0"), (0, 1, "1"), (0, 2, "2"), (1, 0, "0"), (1, 1, "1"),
    ]  # fmt: skip


class Finder(L.LightningModule):
    """Finds something in some inputs, and says of it what a module has at hand: tensors, lists of them, mappings."""

    def predict_step(self, batch):
        found = {"score": torch.tensor(0.5), "box": torch.tensor([1, 2]), "labels": [3, 4], "by": {"k": torch.ones(1)}}
        return [found if number % 2 else {} for number in batch.tolist()]


def test_rows_of_a_module_of_ones_own_have_what_it_found(tmp_path):
    """A module found a box in the second image: predict ended in an error of csv or JSON after all the work."""
    data = Numbers()
    data.predict_inputs, data.predict_dataloader = {}, lambda: DataLoader(torch.arange(3), batch_size=2)
    found = {"score": 0.5, "box": [1, 2], "labels": [3, 4], "by": {"k": [1.0]}}
    rows = [{"index": 0}, {"index": 1, **found}, {"index": 2}]
    assert predict(Finder(), data, tmp_path / "p.jsonl", **QUIET) == rows
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    predict(Finder(), data, tmp_path / "p.csv", **QUIET)
    with (tmp_path / "p.csv").open(newline="") as file:
        nothing, second, _ = csv.DictReader(file)
    assert second == {"index": "1", "score": "0.5", "box": "[1, 2]", "labels": "3|4", "by": '{"k": [1.0]}'}
    assert nothing == {"index": "0", **dict.fromkeys(found, "")}


@pytest.mark.parametrize(
    "found", [{}, torch.ones(2, 2, 2), torch.ones(3, 2), [{}]], ids=["mapping", "cube", "longer", "shorter"]
)
def test_what_cannot_be_written_is_refused_at_the_first_batch(found):
    """A module returned what its model gives, and heard after the last batch that this is not written."""
    module, calls = L.LightningModule(), []
    module.predict_step = lambda batch: calls.append(1) or found
    with pytest.raises(ValueError, match="predict_step must return probabilities"):
        predict(module, Numbers(), **QUIET)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(2, 3), r"class_names=\['even', 'odd'\] must name the 3 classes"),
        ([{"seen": {1, 2}}] * 2, r"must return what JSON holds, .* for output='.*p\.jsonl': .*set"),
    ],
    ids=["classes", "set"],
)
def test_names_and_values_that_cannot_be_written_are_refused_at_the_first_batch(tmp_path, found, message):
    """A user's data named two classes of a model of three: all predictions were made, and then they were lost."""
    module, calls = L.LightningModule(), []
    module.predict_step = lambda batch: calls.append(1) or found
    with pytest.raises(ValueError, match=message):
        predict(module, Numbers(), tmp_path / "p.jsonl", **QUIET)
    assert len(calls) == 1


def test_mistakes_are_refused(tmp_path, image_task, images):
    with pytest.raises(ValueError, match=r"output='p.txt' must end in \.csv or \.jsonl"):
        PredictionWriter("p.txt")
    with pytest.raises(ValueError, match="is not a folder"):
        UnlabelledImages(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="holds no image"):
        UnlabelledImages(str(images / "inside"))
    with pytest.raises(ValueError, match="pair_column='b' is for a table"):
        UnlabelledTexts("a.txt", pair_column="b")
    for content, message in ((None, "is not a file"), (b"", "is empty"), (b"\xff\xff", "is not text in UTF-8")):
        if content is not None:
            (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            UnlabelledTexts(str(tmp_path / "t.txt")).load_splits()
    (images / "f.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"f\.png cannot be read as an image"):
        predict(image_task, UnlabelledImages(str(images), num_workers=0), tmp_path / "p.csv", **QUIET)
    assert not (tmp_path / "p.csv").exists()
    (images / "f.png").unlink()
    image_task.class_names = ["x"]
    with pytest.raises(ValueError, match=r"class_names=\['x'\] must name the 3 classes"):
        predict(image_task, UnlabelledImages(str(images), num_workers=0), **QUIET)
    image_task.predict_step = lambda batch: {}
    with pytest.raises(ValueError, match="predict_step must return probabilities"):
        predict(image_task, UnlabelledImages(str(images), num_workers=0), **QUIET)


class Numbers(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.predict_inputs = {"name": [f"n{i}" for i in range(7)]}
        self.class_names = ["even", "odd"]

    def predict_dataloader(self):
        return DataLoader(torch.arange(7), batch_size=2)


class Parity(L.LightningModule):
    def predict_step(self, batch):
        return torch.stack([1 - batch % 2, batch % 2], 1).float()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_every_input_once_and_in_order(tmp_path):
    writer = PredictionWriter(tmp_path / "p.csv")
    trainer = L.Trainer(devices=2, strategy="ddp_fork", logger=False, callbacks=writer, **QUIET)
    trainer.predict(Parity(), datamodule=Numbers(), return_predictions=False)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [f"n{index}" for index in range(7)]
    assert [row["label"] for row in rows] == ["even", "odd"] * 3 + ["even"]
    assert Path(tmp_path / "p.csv").read_text().splitlines()[0] == "index,name,label,p_even,p_odd"
