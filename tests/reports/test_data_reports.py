"""What users did with their own images, texts and tokenizers, and what must come of it."""

import os
import unicodedata
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from PIL import Image, ImageDraw
from small import Small

from geolora_pl.data import ImageDataModule, ImageFolder, TinyImageNet, UnlabelledImages
from geolora_pl.data.images.base import ArrayImages
from geolora_pl.tasks import ImageClassification

CONFIG = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest", "crop_pct": 1.0}


def connect(data, **offers):
    """Give a data module a trainer whose module offers what a task offers, and set it up."""
    module = Small()
    for name, value in offers.items():
        setattr(module, name, value)
    data.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.strategy.connect(module)
    data.setup("fit")
    return data


def photos(folder: Path, count: int = 4, splits=("train", "val"), classes=("cat", "dog")) -> Path:
    for split in splits:
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * i, 100, 200)).save(folder / split / label / f"{i}.png")
    return folder


def seen(image: Image.Image, folder: Path, ending: str, **saved) -> np.ndarray:
    """What the model gets of an image, (8, 8) in 0..255: the same in training and in prediction."""
    tree = photos(folder / "tree", splits=("train",))
    for i in range(4):
        (tree / "train" / "cat" / f"{i}.png").unlink()
        image.save(tree / "train" / "cat" / f"{i}{ending}", **saved)
    (folder / "new").mkdir()
    image.save(folder / "new" / f"x{ending}", **saved)
    trained = connect(ImageFolder(str(tree), val_fraction=0.25), data_config=CONFIG)
    predicted = connect(UnlabelledImages(str(folder / "new")), data_config=CONFIG)
    of_train = [image for image, label in trained.train_dataloader().dataset if label == 0]
    pixels, _ = next(iter(predicted.predict_dataloader()))
    assert all((pixels[0] == image).all() for image in of_train)
    return (pixels[0, 0] * 255).round().int().numpy()


@pytest.mark.parametrize(
    ("ending", "dtype", "highest"), [(".png", np.uint16, 65535), (".tif", np.uint16, 65535), (".tif", np.float32, 1.0)]
)
def test_an_image_of_16_bits_or_floats_keeps_its_shades(tmp_path, ending, dtype, highest):
    """A 16-bit PNG or TIFF was black and white, a TIFF of floats black: every shade must stay, to 8 bits."""
    shades = np.linspace(0, 1, 64).reshape(8, 8)
    image = Image.fromarray((shades * highest).astype(dtype))
    assert abs(seen(image, tmp_path, ending) - shades * 255).max() <= 0.51  # rounded once


@pytest.mark.parametrize(("bits", "said"), [(12, True), (14, True), (16, False)])
def test_few_bits_in_images_of_16_are_said(tmp_path, messages, bits, said):
    """A microscope stored 12 bits in files of 16: every image was almost black, and nothing said why."""
    for index in range(3):
        values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(values // (index + 1)).save(tmp_path / f"{index}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    messages()
    UnlabelledImages(str(tmp_path)).setup("predict")
    text = messages()
    assert (f"is above {2**bits - 1}" in text) == said
    assert (f"multiply them by {65535 // (2**bits - 1)} first" in text) == said


def test_a_black_shape_on_a_transparent_ground_is_seen_on_white(tmp_path):
    """An icon, black on a transparent ground whose hidden colour is black, too, was black all over."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((2, 2, 5, 5), fill=(0, 0, 0, 255))
    pixels = seen(image, tmp_path, ".png")
    assert pixels[0, 0] == 255
    assert pixels[3, 3] == 0


def test_a_photo_that_its_exif_data_turn_is_upright(tmp_path):
    """A phone stores a photo on its side with the orientation 6 beside it, and the model saw it on its side."""
    image = Image.new("RGB", (8, 8))
    ImageDraw.Draw(image).rectangle((0, 0, 7, 3), fill="white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    pixels = seen(image, tmp_path, ".png", exif=exif)
    assert pixels[:, 7].tolist() == [255] * 8
    assert pixels[:, 0].tolist() == [0] * 8


def test_what_is_converted_is_said_once_with_the_number_of_images(tmp_path, messages):
    """Of a folder of mixed images nobody heard that shades, alpha, orientation and frames were lost."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "._plain.png").write_bytes(b"a Mac's notes")
    (tmp_path / "scan.heic").write_bytes(b"another format")
    (tmp_path / "more").mkdir()
    messages()
    data = UnlabelledImages(str(tmp_path))
    data.setup("predict")
    data.setup("predict")
    said = messages()
    assert said.count(str(tmp_path)) in (2, 4)  # printed, and logged
    for what in (
        "of 6 images",
        "1 are turned upright",
        "1 have more than 8 bits per channel (0 to 65535 becomes 0 to 255)",
        "1 have transparency (laid over white)",
        "1 have the colours CMYK",
        "1 have several frames (the first is used)",
        "left out: 1 .heic (scan.heic), 1 folder (more), 1 hidden (._plain.png)",
    ):
        assert what in said, said
    assert [path.name for path in data.files] == sorted(
        ["turned.jpg", "deep.png", "clear.png", "print.jpg", "moving.gif", "plain.png"]
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.png", b"no image at all", "cannot identify"),
        ("x.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\0\0\0\0\0\0\0\0", "cannot|pixels"),
        ("x.tif", Image.fromarray(np.full((4, 4), -3.0, np.float32)), "its values lie between -3 and -3"),
        ("x.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)), "its values lie between nan"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "predict"])
def test_an_image_that_cannot_be_used_is_named_before_the_first_step(tmp_path, kind, name, content, reason):
    """A bomb, a broken file or values out of range gave an error without the name of the file, or a black image."""
    folder = photos(tmp_path, splits=("train",)) / "train" / "cat"
    content.save(folder / name) if isinstance(content, Image.Image) else (folder / name).write_bytes(content)
    data = ImageFolder(str(tmp_path)) if kind == "train" else UnlabelledImages(str(folder))
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image: .*({reason}).*fix, replace or remove"):
        data.setup("fit")


def test_a_png_with_a_broken_chunk_is_named_when_its_pixels_are_read(tmp_path):
    """Behind a sound header the pixels were broken, and the prediction ended in a bare SyntaxError."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512), np.uint8)).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    at = content.rindex(b"IDAT")  # the last of several
    content[at : at + 4] = b"\0\0\0\0"
    (tmp_path / "x.png").write_bytes(content)
    data = UnlabelledImages(str(tmp_path))
    with pytest.raises(ValueError, match=r"x.png cannot be read as an image"):
        data.load_splits()["predict"][0]


def test_checkpoints_of_a_notebook_are_no_class_and_no_images(tmp_path, messages):
    """Jupyter left .ipynb_checkpoints with copies in train and in a class, which became a class and were trained on."""
    photos(tmp_path)
    for where in (tmp_path / "train", tmp_path / "train" / "cat", tmp_path):
        (where / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (8, 8)).save(where / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "train" / "dog" / ".DS_Store").write_bytes(b"")
    (tmp_path / "train" / "dog" / "._0.png").write_bytes(b"a Mac's notes")
    (tmp_path / "train" / "stray.png").write_bytes((tmp_path / "train" / "dog" / "0.png").read_bytes())
    (tmp_path / "extra").mkdir()
    messages()
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "val": 8}
    assert "left out: 1 .png (stray.png), 1 folder (extra), 5 hidden (" in messages()


def test_a_gif_is_an_image_among_the_others(tmp_path):
    """The gif and avif images among png were left out without a word: what Pillow reads is used."""
    photos(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "more.gif")
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    assert len(data.splits["train"]) == 9


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "dev"])
def test_a_folder_of_validation_images_is_used_under_its_usual_names(tmp_path, name, messages):
    """A folder valid/ beside train/ was ignored, and a part of train was held out instead."""
    photos(tmp_path, splits=("train", name))
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 8, "val": 8}
    assert "held out" not in messages()


def test_what_was_said_of_the_data_is_kept_in_the_folder_of_the_run(tmp_path):
    """The lines about the data scroll away: they are kept beside the metrics, in notes.txt."""

    class Flat(Small):
        data_config = CONFIG

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].flatten(1)[:, :10], batch[1]), batch_idx)

    data = ImageFolder(str(photos(tmp_path / "photos", splits=("train",))), val_fraction=0.25)
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="run", version="")
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=1, log_every_n_steps=1, logger=logger, enable_checkpointing=False, limit_val_batches=0, **settings
    )
    trainer.fit(Flat(), datamodule=data)
    assert (tmp_path / "run" / "notes.txt").read_text().splitlines() == data.notes
    assert "2 of 8 training images are held out" in data.notes[0]


def test_two_folders_for_one_split_are_refused(tmp_path):
    """With val/ and valid/ nobody can know which one is meant."""
    photos(tmp_path, splits=("train", "val", "valid"))
    with pytest.raises(ValueError, match=r"has 'val' and 'valid', which both mean val: keep one"):
        ImageFolder(str(tmp_path))


def test_what_is_held_out_is_said(tmp_path, messages):
    """Without a folder val a part of train is held out, and the number of images is said."""
    photos(tmp_path, splits=("train",))
    ImageFolder(str(tmp_path), val_fraction=0.25).setup("fit")
    assert "2 of 8 training images are held out for validation (val_fraction=0.25)" in messages()


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.25), (2, 0.75)])
def test_a_class_without_a_training_image_is_refused(tmp_path, count, fraction):
    """The only image of a class, or all of them, landed in validation, and the class was never trained."""
    photos(tmp_path, splits=("train",))
    for i in range(count, 4):
        (tmp_path / "train" / "dog" / f"{i}.png").unlink()
    data = ImageFolder(str(tmp_path), val_fraction=fraction, seed=2)  # which holds out both of two images
    with pytest.raises(ValueError, match=rf"class 'dog' has {count} of the images, which cannot be both in training"):
        data.setup("fit")


def test_a_folder_of_one_class_is_no_regression(tmp_path):
    """With one folder of images the labels were taken for numbers, and the fit ended in an error of torch."""
    photos(tmp_path, splits=("train",), classes=("cat",))
    task = ImageClassification("vit_tiny_patch16_224", pretrained=False, model_args={"img_size": 16, "patch_size": 8})
    with pytest.raises(ValueError, match="the data have one class, 'cat': there must be two"):
        L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1).fit(
            task, datamodule=ImageFolder(str(tmp_path), val_fraction=0.25)
        )


def test_names_of_classes_agree_however_their_accents_are_stored(tmp_path):
    """A Mac stores é as e and an accent, Linux as one character: the two folders are one class to people."""
    photos(tmp_path, splits=("train",), classes=("caf\u00e9", "tea"))
    photos(tmp_path, splits=("val",), classes=(unicodedata.normalize("NFD", "caf\u00e9"), "tea"))
    assert ImageFolder(str(tmp_path)).class_names == ["caf\u00e9", "tea"]
    (tmp_path / "train" / unicodedata.normalize("NFD", "caf\u00e9")).mkdir()
    with pytest.raises(ValueError, match="has two folders that read 'café': their names differ in bytes only"):
        ImageFolder(str(tmp_path))


def test_a_pipe_named_like_an_image_does_not_hang(tmp_path):
    """A FIFO called x.png made the reader wait for ever."""
    photos(tmp_path)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    assert len(data.splits["train"]) == 8


def test_a_link_that_leads_back_adds_no_image_twice(tmp_path):
    """A link inside a class folder to the folder itself made copies of all its images."""
    photos(tmp_path)
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    data = ImageFolder(str(tmp_path))
    data.setup("fit")
    assert len(data.splits["train"]) == 8


def test_an_array_that_is_not_of_8_bits_is_refused():
    """A source of one's own gave floats in 0..1, and every image was black."""
    with pytest.raises(ValueError, match=r"an array of float32 .*scale it to 0..255 as uint8"):
        ArrayImages(np.ones((2, 4, 4), np.float32), [0, 1])


class Own(ImageDataModule):
    """A source of one's own, which gives images as Pillow opens them."""

    class_names = ("black", "clear")

    def load_splits(self):
        samples = [(Image.new("RGBA", (8, 8), (0, 0, 0, 255 * (i % 2))), i % 2) for i in range(8)]
        return {"train": samples, "val": samples}


def test_images_of_ones_own_source_are_converted_as_those_of_files():
    """A data module of one's own gave images with alpha, which was dropped."""
    images, labels = next(iter(connect(Own(), data_config=CONFIG).val_dataloader()))
    assert images.amin((1, 2, 3)).tolist() == [1.0 - label for label in labels]


def test_a_number_of_channels_that_no_image_has_is_refused():
    """A model of four channels ended in an error about shapes after the images were read."""
    data = connect(Own(), data_config={**CONFIG, "input_size": (4, 8, 8)})
    with pytest.raises(ValueError, match="takes images of 4 channels, but these data have 1 or 3: set in_chans"):
        data.train_dataloader()


def test_colours_that_are_lost_are_said(messages):
    """A model of one channel took colour images as grey without a word."""
    grey = {**CONFIG, "input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}
    connect(Own(), data_config=grey).train_dataloader()
    assert "colour images become grey, because the model takes one channel" in messages()


def test_tiny_imagenet_leaves_the_files_of_a_mac_out(tmp_path):
    """A Mac's ._x.JPEG beside an image of the archive was listed as an image."""
    from image_files import write_tiny_imagenet

    write_tiny_imagenet(tmp_path)
    (tmp_path / "train" / "n01" / "images" / "._n01_0.JPEG").write_bytes(b"a Mac's notes")
    assert len(TinyImageNet(str(tmp_path)).load_splits()["train"]) == 12
