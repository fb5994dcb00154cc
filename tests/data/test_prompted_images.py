"""Images with prompts: DreamBooth, captions, prompts to draw."""

import json

import pytest
import torch
from foreign import Foreign, trainer
from PIL import Image
from torchvision.transforms import functional as F

from benchmarks.diffusion.tiny_pipeline import draw_subject
from geolora_pl.data import CaptionedImages, DreamBooth, PromptFile

PROMPT = "a photo of sks dog"


class Sized(Foreign):
    """A module that says how large its images are."""

    image_size = 16

    def draw(self, prompts, seeds):
        """As a module that draws class images has it."""


def ready(data, module=None):
    module = module or Sized()
    data.trainer = module.trainer = trainer(None, callbacks=[])
    data.trainer.strategy.connect(module)
    data.setup("fit")
    return data


@pytest.fixture
def dog(tmp_path):
    return draw_subject(tmp_path / "dog", 5)


def test_a_batch_holds_the_middle_of_each_image_with_its_size_and_place(dog):
    data = ready(DreamBooth(dog, PROMPT, batch_size=4, num_workers=0))
    (batch,) = data.train_dataloader()
    assert batch["images"].shape == (4, 3, 16, 16)
    assert batch["images"].amax() == 1
    assert batch["images"].amin() >= -1
    assert batch["geometry"].tolist() == [[20, 24, 0, 1, 16, 16]] * 4  # 24 x 20 is scaled to 19 x 16
    assert sorted(batch["indices"]) == [0, 1, 2, 3]
    assert not batch["is_prior"].any()
    (held_out,) = data.val_dataloader()
    assert len(held_out["images"]) == 1


def test_class_images_come_beside_those_of_the_subject_and_an_epoch_shows_each_once(dog, tmp_path):
    draw_subject(tmp_path / "class", 7, "green")
    data = ready(DreamBooth(dog, PROMPT, str(tmp_path / "class"), "a photo of a dog", 6, val_folder=dog, num_workers=0))
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    assert all(batch["is_prior"].tolist() == [False, True] for batch in batches)
    assert all(batch["prompts"] == [PROMPT, "a photo of a dog"] for batch in batches)
    assert sorted(batch["indices"][1] for batch in batches) == [5, 6, 7, 8, 9, 10]
    assert {batch["indices"][0] for batch in batches} == {0, 1, 2, 3, 4}
    assert any("6 of 7 class images are used" in note for note in data.notes)


def test_class_images_that_are_missing_are_named_before_they_are_there(dog, tmp_path):
    draw_subject(tmp_path / "class", 1, "green")
    data = DreamBooth(dog, PROMPT, str(tmp_path / "class"), "a photo of a dog", 3, num_workers=0)
    missing = {number: path.name for number, path in data.missing_class_images().items()}
    assert missing == {0: "drawn_0000.png", 1: "drawn_0001.png"}
    assert len(ready(data).prior_of_training()) == 3
    without = Foreign()
    without.image_size = 16
    with pytest.raises(ValueError, match="lacks 2 of 3 class images, and Foreign draws none"):
        ready(DreamBooth(dog, PROMPT, str(tmp_path / "class"), "a dog", 3), without).prior_of_training()


def test_a_random_crop_or_flip_has_no_index_and_follows_the_seed(dog):
    for settings in ({"crop": "random"}, {"flip": 0.5}):
        data = ready(DreamBooth(dog, PROMPT, batch_size=4, num_workers=0, **settings))
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            (batch,) = data.train_dataloader()
            assert batch["indices"] == [-1] * 4
            found.append(batch["images"])
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_the_left_edge_that_is_told_of_a_mirrored_crop_is_that_in_the_mirrored_image(tmp_path):
    """A user flips and crops at random: the crop is where its geometry says in the image that the model sees."""
    image = Image.linear_gradient("L").rotate(90).resize((40, 16))
    (tmp_path / "wide").mkdir()
    for name in "ab":
        image.save(tmp_path / "wide" / f"{name}.png")
    data = ready(DreamBooth(str(tmp_path / "wide"), PROMPT, crop="random", flip=1.0, num_workers=0))
    mirrored = F.hflip(F.to_tensor(image.convert("RGB"))) * 2 - 1
    for seed in range(4):
        torch.manual_seed(seed)
        (batch,) = data.train_dataloader()
        left = int(batch["geometry"][0, 3])
        assert torch.equal(batch["images"][0], mirrored[:, :, left : left + 16])


def test_exif_and_alpha_are_as_in_the_other_sources(tmp_path):
    upright = Image.new("RGBA", (8, 16), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "x").mkdir()
    for name in "ab":
        upright.save(tmp_path / "x" / f"{name}.png", exif=exif)
    data = ready(DreamBooth(str(tmp_path / "x"), PROMPT, num_workers=0))
    (batch,) = data.train_dataloader()
    assert batch["geometry"][0, :2].tolist() == [8, 16]
    assert (batch["images"] == 1).all()  # transparent: white


@pytest.mark.parametrize("metadata", [True, False])
def test_captions_are_read_from_a_table_or_from_texts_beside_the_images(dog, tmp_path, metadata):
    names = [f"{n}.png" for n in range(5)]
    if metadata:
        rows = [json.dumps({"file_name": name, "text": f" dog {name} "}) for name in names]
        (tmp_path / "dog" / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")
    else:
        for name in names:
            (tmp_path / "dog" / name).with_suffix(".txt").write_text(f"dog {name}\n")
    data = ready(CaptionedImages(dog, batch_size=4, num_workers=0))
    (batch,) = data.train_dataloader()
    assert set(batch["prompts"]) < {f"dog {name}" for name in names}
    assert len(data.prompts) == 5


def refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_captions_is_said_in_one_sentence(dog, tmp_path):
    def load():
        CaptionedImages(dog).setup("fit")

    refused(load, "0.png has no caption, no .txt beside it .5 of 5 images.: give it one, or take it away")
    table = tmp_path / "dog" / "metadata.jsonl"
    table.write_text("{")
    refused(load, "metadata.jsonl, line 1 must be")
    table.write_text('["x"]')
    refused(load, "metadata.jsonl, line 1 must be")
    table.write_text('{"file_name": "0.png", "text": 3}')
    refused(load, "line 1: '0.png' must be the name of a file, with one text: 3")
    rows = [json.dumps({"file_name": f"{n}.png", "text": "x"}) for n in range(6)]
    table.write_text("\n".join(rows))
    refused(load, "names 5.png, which is not an image of the folder")
    table.write_text("\n".join(rows[:4]))
    refused(load, "4.png has no caption, no line in metadata.jsonl .1 of 5 images.")
    table.write_bytes(b"\xff\xfe\x00")
    refused(load, "metadata.jsonl cannot be read as text")


def test_folders_without_what_is_needed_are_refused_in_one_sentence(dog, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note").write_text("x")
    draw_subject(tmp_path / "one", 1)
    for folder, message in (
        ("gone", "folder='.*gone' is not a folder"),
        ("empty", "folder='.*empty' holds no image: the endings of images are"),
        ("one", "has 1 image, which cannot be both trained on and held out: add images, or name a val_folder"),
    ):
        refused(lambda folder=folder: DreamBooth(str(tmp_path / folder), PROMPT).setup("fit"), message)
    refused(
        lambda: DreamBooth(dog, PROMPT, val_folder=str(tmp_path / "empty")).setup("fit"), "val_folder=.* holds no image"
    )
    for settings, message in (
        ({"prompt": " "}, "prompt=' ' is empty"),
        ({"class_folder": "x"}, "belong together: give both, or none"),
        ({"class_prompt": "x"}, "belong together: give both, or none"),
        ({"num_class_images": 0}, "num_class_images=0 must be at least 1"),
        ({"class_folder": str(tmp_path / "note"), "class_prompt": "x"}, "is a file: name a folder"),
        ({"crop": "left"}, "crop='left' must be one of center, random"),
        ({"flip": 2.0}, r"flip=2.0 must lie in \[0, 1\]"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ):
        refused(lambda settings=settings: DreamBooth(dog, **{"prompt": PROMPT, **settings}), message)
    refused(lambda: ready(DreamBooth(dog, PROMPT), Foreign()).train_dataloader(), "Foreign has no image_size")


def test_a_file_of_prompts_that_is_none_is_refused_in_one_sentence(tmp_path):
    refused(lambda: PromptFile(str(tmp_path / "gone")), "file='.*gone' is not a file")
    for content, message in (
        (b"", "holds no prompt: write one per line"),
        (b" \n\n", "holds no prompt"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as text"),
        (b"a dog\0", "is not a text: it holds zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        (tmp_path / "prompts.txt").write_bytes(content)
        refused(lambda: PromptFile(str(tmp_path / "prompts.txt")), message)
    (tmp_path / "prompts.txt").write_text("a\r\n\nb")
    refused(lambda: PromptFile(str(tmp_path / "prompts.txt"), 0), "batch_size=0 must be at least 1")
    data = PromptFile(str(tmp_path / "prompts.txt"), 2)
    assert list(data.predict_dataloader()) == [{"indices": [0, 1], "prompts": ["a", "b"]}]
