"""The script for a GPU: what it carries, what it runs, and that a part that fails or hangs does not stop the next."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from glue_files import write_glue
from safetensors.torch import load_file
from tiny_text import save_tiny_model
from tolerance import close, is_orthonormal
from transformers import AutoTokenizer

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.gpu import carried, cuda_tests, sst2
from benchmarks.shared import results
from benchmarks.speed import throughput
from benchmarks.speed.factorisations import gram_cholesky

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = ["cuda_tests", "sst2", "bert_base", "vit_base", "event"]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is carried, of a tiny model and four texts."""
    folder = tmp_path_factory.mktemp("carried")
    model, glue = save_tiny_model(folder / "model"), write_glue(folder / "glue", "sst2", times=2)
    carried.main(["--folder", str(folder), "--model", model, "--glue", glue])
    return folder


def test_what_is_carried_is_the_model_in_half_the_bytes_and_the_texts_in_tokens(folder):
    whole, half = (load_file(folder / name / "model.safetensors") for name in ("model", "minilm"))
    assert whole.keys() == half.keys()
    for name, weight in half.items():
        assert weight.dtype == torch.float16
        close(weight.float(), whole[name], within=1e-3)
    tokens = load_file(folder / "sst2.safetensors")
    assert {name.partition(".")[0] for name in tokens} == {"train", "val"}
    ids = tokens["train.ids"].split(tokens["train.lengths"].tolist())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert ids[0].tolist() == tokenizer('"a , b ')["input_ids"]
    assert tokens["train.labels"].tolist() == [0, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
def test_a_training_from_what_is_carried_writes_what_it_found(folder, tmp_path):
    sizes = {"device": "cpu", "precision": "32-true", "batch_size": 2, "epochs": 2}
    sst2.main([f"--{name}={value}" for name, value in {"folder": folder, **sizes}.items()])
    written = json.loads((tmp_path / "sst2_cpu.json").read_text())
    assert written["command"].startswith("python benchmarks/gpu/sst2.py --folder=")
    found = written["results"]
    assert [epoch["steps"] for epoch in found["epochs"]] == [2, 4]
    assert all(0 <= epoch["val_accuracy"] <= 1 for epoch in found["epochs"])
    assert len(found["ranks"]) == 12
    assert found["parameters"] > 0


def test_the_tests_leave_a_file_after_every_test(tmp_path):
    outcomes = cuda_tests.Outcomes("python benchmarks/gpu/cuda_tests.py")

    def report(name, when, outcome, why=""):
        passed = outcome == "passed"
        values = {"when": when, "outcome": outcome, "passed": passed, "longreprtext": why, "duration": 1.0}
        outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid=f"tests/a.py::{name}", **values))

    for name, outcome, why in (("one", "passed", ""), ("two", "failed", "E assert 1 == 2")):
        report(name, "setup", "passed")
        report(name, "call", outcome, why)
        report(name, "teardown", "passed")
        assert results.read("cuda_tests")["tests"][-1]["test"] == name
    report("three", "setup", "skipped", "no GPU")
    found = results.read("cuda_tests")
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["tests"][1]["why"] == "E assert 1 == 2"


@pytest.mark.parametrize("shape", [(2, 40, 6), (2, 6, 6), (2, 4, 6)])
def test_gram_and_cholesky_give_what_qr_gives(shape):
    matrix = torch.randn(shape)
    matrix[..., 1] *= 1e-4
    Q, R = gram_cholesky(matrix)
    close(Q @ R, matrix)
    close(R.tril(-1), torch.zeros_like(R), beside=R)
    assert all(map(is_orthonormal, Q))
    expected = torch.linalg.qr(matrix)[1]
    close(R.diagonal(dim1=-2, dim2=-1).abs(), expected.diagonal(dim1=-2, dim2=-1).abs())


def run(tmp_path, program, *more, percent=100):
    """Run the script with a program in the place of Python, and return what it says of the parts."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/usr/bin/env bash\n{program}\n")
    fake.chmod(0o755)
    out = tmp_path / "out"
    settings = {
        "PYTHON": str(fake),
        "CARRIED": str(tmp_path),
        "PERCENT": str(percent),
        "ARGUMENTS": str(tmp_path / "arguments"),
    }
    command = ["bash", str(SCRIPT), "run", str(out), *more]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert done.stdout == (out / "log.txt").read_text()
    return done.returncode, [part["part"] for part in parts], [part["exit"] for part in parts]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    """The second part hangs, for the four seconds that it may, and the third fails."""
    program = 'case "$*" in *sst2.py*) sleep 600 ;; *bert_base*) exit 3 ;; esac'
    assert run(tmp_path, program, percent=4) == (1, PARTS, [0, 124, 3, 0, 0])


def test_no_part_starts_when_the_time_is_over(tmp_path):
    assert run(tmp_path, "exit 0", percent=0) == (1, PARTS, [124] * 5)


@pytest.mark.parametrize("where", [[], ["cpu"]])
def test_the_parts_have_arguments_that_the_scripts_take(tmp_path, where):
    assert run(tmp_path, 'echo "$*" >> "$ARGUMENTS"', *where) == (0, PARTS, [0] * 5)
    tests, training, *costs = [line.split() for line in (tmp_path / "arguments").read_text().splitlines()]
    assert tests == ["benchmarks/gpu/cuda_tests.py"]
    assert training[0] == "benchmarks/gpu/sst2.py"
    device = where[0] if where else "cuda"
    assert sst2.make_parser().parse_args(training[1:]).device == device
    for script, *arguments in costs:
        assert script == "benchmarks/speed/throughput.py"
        assert throughput.parse(arguments).device == device
    names = [throughput.parse(arguments).name for _, *arguments in costs]
    assert names == [f"bert_base_{device}", f"vit_base_{device}", None]
