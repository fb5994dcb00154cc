import pytest
import torch
from foreign import trainer
from lightning.pytorch.loggers import CSVLogger
from text_files import write
from tiny_text import save_tiny_model
from tiny_vit import OVERLAY, SIZE

from geolora_pl import GeoLoRACallback
from geolora_pl.data import Digits, TextFiles
from geolora_pl.report.confusion import read_confusion
from geolora_pl.tasks import ImageClassification, TextClassification

IMAGES = {"pretrained": False, "model_args": {**SIZE, "pretrained_cfg_overlay": OVERLAY}}


@pytest.fixture
def texts(tmp_path):
    """Twelve texts with a label and a score; every third label is neg."""
    words = [f"{'good' if i % 3 else 'bad'} film {'and ' * i}plot" for i in range(12)]
    labels = ["pos" if i % 3 else "neg" for i in range(12)]
    return write(tmp_path / "train.tsv", text=words, label=labels, score=[i / 4 for i in range(12)])


def fit(folder, module, data, **settings):
    logger = CSVLogger(folder, name="", version="")
    runs = trainer(GeoLoRACallback(), **{"logger": logger, "max_epochs": 1, "log_every_n_steps": 1, **settings})
    runs.fit(module, data)
    return runs


def test_the_last_validation_of_images_is_kept_without_those_before_it(tmp_path):
    module = ImageClassification("vit_tiny_patch16_224", **IMAGES)
    runs = fit(tmp_path, module, Digits(), max_steps=4, val_check_interval=2, num_sanity_val_steps=2)
    found = read_confusion(tmp_path)
    assert (found.step, list(found.names)) == (3, list(map(str, range(10))))
    assert sum(map(sum, found.counts)) == 130
    right = sum(found.counts[i][i] for i in range(10))
    assert right / 130 == pytest.approx(float(runs.callback_metrics["val_accuracy"]), abs=1e-6)
    runs.validate(module, Digits(batch_size=32), verbose=False)  # says nothing of the fit
    assert read_confusion(tmp_path) == found


def test_classes_of_texts_have_their_names(tmp_path, texts):
    module = TextClassification(save_tiny_model(tmp_path / "model"))
    fit(tmp_path / "run", module, TextFiles(texts, val_file=texts, batch_size=4, cache_dir=tmp_path / "cache"))
    found = read_confusion(tmp_path / "run")
    assert list(found.names) == ["neg", "pos"]
    assert list(map(sum, found.counts)) == [4, 8]


def test_a_regression_has_no_classes(tmp_path, texts):
    module = TextClassification(save_tiny_model(tmp_path / "model"))
    data = TextFiles(texts, val_file=texts, batch_size=12, label_column="score", cache_dir=tmp_path / "cache")
    fit(tmp_path / "run", module, data)
    assert module.num_classes == 1
    assert read_confusion(tmp_path / "run") is None


def test_a_checkpoint_holds_nothing_of_it():
    module = ImageClassification("vit_tiny_patch16_224", num_classes=3, **IMAGES)
    module.configure_model()
    assert isinstance(module.confusion, torch.nn.Module)
    assert not any("confusion" in name for name in module.state_dict())
