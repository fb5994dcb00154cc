"""Whole epochs: a learning rate is chosen without the samples that are reported, and seeds are fresh."""

from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.peers import comparison, epochs
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
        found = {"parameters": 10, "zero_shot": 0.5, "scores": []}
        return [{**run.description(), **found, "score": self.score(run)} for run in planned]


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
    assert epochs.rows(found) == [["geolora", "0.920 ± 0.006", "10", "0.3", "0.500"]]
    assert epochs.header(found)[1] == "mrpc"
    assert summaries(found)["mrpc", "geolora"].lr == 0.3
    assert comparison.paired(found, ["mrpc"]) == []


def test_what_is_held_back_is_no_longer_trained_on():
    part = held_back(task_of(20))
    assert (part.train.size, part.dev.size) == (18, 2)
    assert part.train.batch([0, 17]) == [0, 17]
    assert part.dev.batch([0, 1]) == [18, 19]
    assert part.dev.lengths == [18, 19]


def test_tasks_that_chose_the_defaults_are_marked():
    assert epochs.header([{"task": "stsb"}, {"task": "cola"}])[1:3] == ["stsb*", "cola"]
