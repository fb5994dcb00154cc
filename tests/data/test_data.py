from importlib import import_module
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from image_files import write_cifar, write_idx, write_tiny_imagenet
from PIL import Image
from sklearn.datasets import load_digits

from geolora_pl.data import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageDataModule, ImageFolder, TinyImageNet
from geolora_pl.data.images.base import ArrayImages, _Transformed
from geolora_pl.data.images.fashion_mnist import read_idx

GREY = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
COLOUR = {**GREY, "input_size": (3, 20, 20), "mean": (0.5,) * 3, "std": (0.25,) * 3}


def attach(data: ImageDataModule, config=GREY) -> ImageDataModule:
    """Give a data module a trainer whose module wants images as in ``config``."""

    class Wants(L.LightningModule):
        data_config = config

    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(Wants())
    data.trainer = trainer
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["geolora_pl.data", "geolora_pl.tasks"])
def test_what_is_imported_at_its_first_use_is_listed_before(name):
    package = import_module(name)
    assert dir(package) == sorted(package.__all__)


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 40), ("t10k", 12)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), n == 40)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8), n == 40)
    return tmp_path


@pytest.fixture
def tree(tmp_path):
    for split, n in (("train", 6), ("test", 2)):
        for label, mode in (("cat", "RGB"), ("dog", "L")):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new(mode, (30, 24), i * 20).save(folder / f"{i}.png")
    return tmp_path


def test_digits_are_those_that_scikit_learn_loads():
    """The table is read from the folder of scikit-learn, which is not imported for that: it may change its place."""
    samples, digits = Digits().load_splits()["train"].dataset, load_digits()
    assert np.array_equal(samples.images, (digits.images * (255 / 16)).astype(np.uint8))
    assert list(samples.labels) == list(digits.target)


def test_digits_are_the_same_for_the_same_seed_and_never_overlap():
    first, again, other = (attach(Digits(seed=seed)) for seed in (0, 0, 1))
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 1167, "val": 130, "test": 500}
    indices = [list(split.indices) for split in first.splits.values()]
    assert indices == [list(split.indices) for split in again.splits.values()]
    assert indices != [list(split.indices) for split in other.splits.values()]
    train, val = (first.splits[s] for s in ("train", "val"))
    whole_train = {train.dataset.indices[i] for i in train.indices}
    whole_val = {val.dataset.indices[i] for i in val.indices}
    assert len(whole_train | whole_val | set(first.splits["test"].indices)) == 1797


def test_images_get_the_size_the_channels_and_the_normalisation_of_the_model():
    images, labels = next(iter(attach(Digits(batch_size=5)).val_dataloader()))
    assert images.shape == (5, 1, 28, 28)
    assert labels.dtype == torch.int64
    assert -1.01 <= images.min() < -0.9
    images, _ = next(iter(attach(Digits(batch_size=5), COLOUR).val_dataloader()))
    assert images.shape == (5, 3, 20, 20)
    assert torch.equal(images[:, 0], images[:, 2])
    assert -2.01 <= images.min() < -1.9


def test_augmentation_touches_the_training_images_alone():
    data = attach(Digits(augment={"hflip": 1.0, "scale": [0.9, 1.0]}))
    assert "Flip" in repr(data.train_dataloader().dataset.transform)
    assert "Flip" not in repr(data.val_dataloader().dataset.transform)
    assert "Flip" not in repr(attach(Digits()).train_dataloader().dataset.transform)


def test_crops_of_padded_training_images_are_shifts_that_reflect_at_the_border():
    """What the authors' code does with CIFAR: padding 4, reflected, and a random crop of the old size."""
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    padded = np.pad(image, 2, mode="reflect")
    shifts = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}

    def as_bytes(image):
        return np.asarray(image).tobytes()

    crops = _Transformed(ArrayImages(image[None], [0]), "L", as_bytes, crop_padding=2)
    seen = {crops[0][0] for _ in range(200)}
    assert len(seen) > 10
    assert seen <= shifts


def test_only_training_images_are_cropped_and_workers_start_anew_for_each_epoch():
    data = attach(Digits(crop_padding=2, num_workers=1))
    assert data.train_dataloader().dataset.crop_padding == 2
    assert data.val_dataloader().dataset.crop_padding == 0
    assert not data.train_dataloader().persistent_workers
    with pytest.raises(ValueError, match="crop_padding=-1"):
        Digits(crop_padding=-1)


def test_training_images_are_shuffled_and_the_others_are_not():
    data = attach(Digits())
    assert isinstance(data.train_dataloader().sampler, torch.utils.data.RandomSampler)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, torch.utils.data.SequentialSampler)


def test_fashion_mnist_from_idx_files_gzipped_or_not(fashion):
    data = attach(FashionMNIST(str(fashion), batch_size=4))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "val": 4, "test": 12}
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    assert data.num_classes == 10


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_found_by_itself():
    assert len(attach(FashionMNIST()).splits["test"]) == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"hello world", "is not an IDX file of bytes"), (b"\0\0\x08\1\0\0\0\5abc", "is cut short")],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t10k-labels-idx1-ubyte"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_a_missing_folder_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"folder='nowhere'.*install Debian's package dataset-fashion-mnist"):
        FashionMNIST("nowhere")
    with pytest.raises(ValueError, match=r"folder='nowhere'.*set download to true"):
        CIFAR10("nowhere")
    with pytest.raises(ValueError, match=r"folder='nowhere' must hold a folder 'train'"):
        ImageFolder("nowhere")


@pytest.mark.parametrize(("source", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_through_torchvision(tmp_path, monkeypatch, source, classes):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    names = write_cifar(tmp_path, source)
    data = attach(source(str(tmp_path)), COLOUR)
    assert data.class_names == names
    assert data.num_classes == classes
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (20, 3, 20, 20)


def test_tiny_imagenet_is_tested_on_the_official_validation_images(tmp_path):
    write_tiny_imagenet(tmp_path)
    data = attach(TinyImageNet(str(tmp_path), batch_size=4, val_fraction=0.25), COLOUR)
    assert data.class_names == ["goldfish, Carassius auratus", "tench"]
    assert data.num_classes == 2
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "val": 3, "test": 4}
    images, labels = next(iter(data.test_dataloader()))
    assert labels.tolist() == [1, 0, 0, 1]
    assert images[:, 2].mean((1, 2)).diff().min() > 0.1  # in the order of the file
    listed = data.splits["train"].dataset
    assert listed is data.splits["val"].dataset
    assert [path.name[:3] for path in listed.paths] == [("n02", "n01")[label] for label in listed.labels]
    assert sum(len(images) for images, _ in data.train_dataloader()) == 9  # the grey ones too


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("words.txt", r"folder='.*' has no words.txt: unpack tiny-imagenet-200.zip"),
        ("val/val_annotations.txt", r"has no val/val_annotations.txt: unpack"),
        ("train/n01/images", r"n01/images has no image: unpack the archive again"),
        ("val/images/val_2.JPEG", r"val_2.JPEG is missing and .*val_annotations.txt names it: unpack"),
    ],
)
def test_tiny_imagenet_with_missing_files_is_refused(tmp_path, missing, message):
    write_tiny_imagenet(tmp_path)
    (tmp_path / missing).rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=message):
        TinyImageNet(str(tmp_path)).setup("fit")


def test_tiny_imagenet_with_a_class_that_is_not_listed_is_refused(tmp_path):
    write_tiny_imagenet(tmp_path)
    with (tmp_path / "val" / "val_annotations.txt").open("a") as annotations:
        annotations.write("val_4.JPEG\tn09\t0\t0\t63\t63\n")
    with pytest.raises(ValueError, match=r"gives val_4.JPEG no class of wnids.txt"):
        TinyImageNet(str(tmp_path)).setup("fit")


def test_image_folder(tree):
    data = attach(ImageFolder(str(tree), batch_size=4, val_fraction=0.25), COLOUR)
    assert data.class_names == ["cat", "dog"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "val": 3, "test": 4}
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 20, 20)
    assert labels.tolist() == [0, 0, 1, 1]


def test_image_folder_with_other_classes_in_a_split_is_refused(tree):
    (tree / "test" / "dog").rename(tree / "test" / "wolf")
    with pytest.raises(ValueError, match="different classes: dog, wolf"):
        ImageFolder(str(tree))


def test_image_folder_with_an_empty_class_is_refused(tree):
    (tree / "train" / "eel").mkdir()
    (tree / "test" / "eel").mkdir()
    data = ImageFolder(str(tree))
    with pytest.raises(ValueError, match="eel"):
        data.setup("fit")


def test_a_split_that_is_not_there_is_named(tree):
    import shutil

    shutil.rmtree(tree / "test")
    data = attach(ImageFolder(str(tree)), COLOUR)
    with pytest.raises(ValueError, match="ImageFolder has no test images: it has train, val"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Digits(**settings)


def test_a_validation_part_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"val_fraction=0.0001 of 1297 images is 0: choose it"):
        Digits(val_fraction=0.0001).setup("fit")


def test_images_and_labels_of_different_number_are_refused():
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        ArrayImages(np.zeros((3, 4, 4), np.uint8), [0, 1])


def test_workers_leave_two_cores_to_the_training(monkeypatch):
    for cores, workers in ((1, 0), (2, 0), (4, 2), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert Digits().num_workers == workers


def test_a_module_without_data_config_is_told_what_to_do():
    data = Digits()
    with pytest.raises(ValueError, match=r"data_config = timm.data.resolve_model_data_config"):
        data.data_config()
