"""Whole epochs: a learning rate is chosen without the samples that are reported, and seeds are fresh."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.peers import comparison, epochs, learning_rates, pareto
from benchmarks.shared import figures
from benchmarks.shared.methods import METHODS
from benchmarks.shared.summary import summaries
from benchmarks.shared.task import Samples, Task, held_back


def task_of(size):
    """A task with so many samples, which are their own numbers, in batches of 16."""
    samples = Samples(size, list, range(size))
    return Task("mrpc", None, samples, samples, 2, ["accuracy"], [], [], 16, 100, 1e-2)


class Runs:
    """Stands for a sweep: the score of a run is what the test says, and no run is made."""

    glue = Path("glue")

    def __init__(self, score):
        self.score, self.planned = score, []

    def make(self, planned):
        self.planned += planned
        found = {"parameters": 8, "zero_shot": 0.5, "scores": [], "sizes": []}
        made = [{**run.description(), **found, "score": self.score(run)} for run in planned]
        return json.loads(json.dumps(made))  # as they are read from a file


def test_the_learning_rate_is_chosen_on_a_part_of_the_training_set_and_fresh_seeds_follow(monkeypatch):
    monkeypatch.setattr(epochs.tasks, "load", lambda name, glue: task_of(96))
    runs = Runs(lambda run: {0.3: 0.9}.get(run.lr, 0.5) if run.seed == 0 else 0.8 + run.seed / 100)
    found = epochs.run(runs, ["mrpc"], ["geolora"])
    chosen, reported = runs.planned[:3], runs.planned[3:]
    assert [(run.lr, run.seed, run.steps) for run in chosen] == [(lr, 0, 6) for lr in (0.1, 0.3, 1.0)]
    assert all(run.task != "mrpc" for run in chosen)
    assert [(run.task, run.lr, run.seed, run.steps) for run in reported] == [
        ("mrpc", 0.3, seed, 18) for seed in epochs.SEEDS
    ]
    assert found == epochs.finals(found)
    assert epochs.rows(found) == [["geolora", "0.920 ± 0.006", "0.920 ± 0.006", "8", "0.3", "0.500 ± 0.000"]]
    assert epochs.header(found)[1::4] == ["mrpc", "STS-B after mrpc"]
    assert summaries(found)["mrpc", "geolora"].lr == 0.3
    assert comparison.paired(found, ["mrpc"]) == []


def test_what_is_held_back_is_no_longer_trained_on():
    part = held_back(task_of(20))
    assert (part.train.size, part.dev.size) == (18, 2)
    assert part.train.batch([0, 17]) == [0, 17]
    assert part.dev.batch([0, 1]) == [18, 19]
    assert part.dev.lengths == [18, 19]


def of_task(task, method, score, seed):
    return {
        "task": task,
        "method": method,
        "score": score,
        "seed": seed,
        "parameters": 10,
        "lr": 0.3,
        "scores": [[10, 2.0, score]],
        "sizes": [[1, 10]],
    }


def test_tasks_that_chose_the_defaults_are_marked_and_left_out_of_the_mean():
    records = [of_task(task, "geolora", score, 11) for task, score in (("stsb", 0.9), ("cola", 0.4), ("held_out", 0.6))]
    records.append(of_task("cola", "lora", 0.5, 11) | {"zero_shot": 0.7})
    assert epochs.header(records)[1:5] == ["stsb*", "cola", "held_out", "mean without *"]
    assert [row[1:5] for row in epochs.rows(records)] == [
        ["0.900", "0.400", "0.600", "0.500"],
        ["-", "0.500", "-", "-"],
    ]
    assert [row[-1] for row in epochs.rows(records)] == ["-", "0.700"]


def test_there_is_no_mean_over_tasks_with_different_seeds():
    """The mean of the seeds that all tasks have would stand beside scores of other seeds."""
    seeds = {"mrpc": (11, 12), "cola": (11,)}
    records = [of_task(task, "full", 0.5, seed) for task, of_name in seeds.items() for seed in of_name]
    assert epochs.rows(records)[0][1:4] == ["0.500 ± 0.000", "0.500", "-"]


def test_the_runs_that_are_reported_have_the_rate_that_was_chosen_last():
    first, last = (of_task("mrpc", "lora", 0.8, 11) | {"lr": lr} for lr in (0.001, 0.003))
    choice = of_task("mrpc", "lora", 0.9, 0)
    assert epochs.finals([choice, first, last]) == [last]


def test_equal_scores_have_an_error_of_zero_and_a_single_one_has_none():
    assert (epochs.with_error([0.5, 0.5]), epochs.with_error([0.5])) == ("0.500 ± 0.000", "0.500")


def test_images_have_learning_rates_of_their_own_and_no_skill_of_language(monkeypatch):
    monkeypatch.setattr(epochs.tasks, "load", lambda name, glue: task_of(96))
    runs = Runs(lambda run: run.lr)
    epochs.run(runs, ["rotated"], ["full"])
    assert {run.lr for run in runs.planned} == set(epochs.LRS_OF_IMAGES["full"]) != set(epochs.LRS["full"])
    task = task_of(96)
    assert epochs.whole("rotated", Path("glue")).probe is task.probe
    assert epochs.whole("mrpc", Path("glue")).probe is not task.probe


def test_every_method_has_three_learning_rates_in_factors_of_three():
    for rates in (*epochs.LRS.values(), *epochs.LRS_OF_IMAGES.values()):
        assert len(rates) == 3
        assert all(2.9 < second / first < 3.4 for first, second in pairwise(rates))


@pytest.fixture
def tiny_layers(monkeypatch, tmp_path):
    """Tasks of a model with one layer of 3 x 5, and a folder for the figures."""
    layers = nn.Sequential(nn.Linear(5, 3))
    task = replace(task_of(96), make_model=lambda seed: layers, targets=["0"])
    monkeypatch.setattr(epochs.tasks, "load", lambda name, glue: task)
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    return tmp_path


def test_the_picture_of_scores_against_parameters_has_thirteen_points_and_the_usual_runs_once(tiny_layers):
    runs = Runs(lambda run: 0.5 + run.seed / 100)
    made = pareto.run(runs, ["mrpc"])
    records = pareto.finals([*made, *({**r, "task": "cola"} for r in made if r["method"] != "lora r 1")])
    assert pareto.header(records) == ["method", "mrpc"], "a point of CoLA is missing"
    assert len(pareto.rows(records)) == 13
    stale = [r | {"settings": {}, "score": 0.9} if r["method"] == "geolora tau 0.2" else r for r in made]
    assert pareto.finals(stale) == [], "one point was made with settings that it no longer has"
    assert all(row[1].startswith("0.620 ± 0.006 with ") for row in pareto.rows(records))
    of_budget = {run.name: run.method.settings()["callback"]["budget"] for run in runs.planned if "budget" in run.name}
    assert of_budget == {"geolora budget 1": 8, "geolora budget 2": 16, "geolora budget 4": 32, "geolora budget 8": 64}
    assert {run.lr for run in runs.planned if run.name.startswith("lora r")} == {epochs.LRS["lora"][0]}
    names = {run.name for run in runs.planned}
    assert {"lora", "geolora"} < names
    for name in ("lora", "geolora"):
        assert pareto.methods(8)[name].settings() == METHODS[name].settings(), "a run of epochs.py is not made again"
    pareto.draw(records)
    assert (tiny_layers / "pareto.svg").stat().st_size > 1000


def test_learning_rates_span_a_factor_of_a_thousand(tiny_layers):
    found = learning_rates.run(Runs(lambda run: 0.9 if run.lr < 0.03 else 0.1), ["mrpc", "rotated"])
    for (task, method), scores in found.items():
        assert max(scores) / min(scores) == pytest.approx(1000)
        assert set(epochs.usual_lrs(task)[method]) <= set(scores)
    half = [run.description() | {"score": 0.5} for run in epochs.choices("mrpc", 6, "lora", epochs.LRS["lora"])]
    assert learning_rates.scores(half) == {}, "not all rates were tried"
    assert learning_rates.rows(found)[1] == ["mrpc", "LoRA r 8", "0.0001", "0.900", "≥ 100"]
    learning_rates.draw(found)
    assert (tiny_layers / "learning_rates.svg").stat().st_size > 1000
