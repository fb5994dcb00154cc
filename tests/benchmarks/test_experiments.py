"""What the experiments say of their runs: tables, pages, figures, and the descent on one matrix."""

import copy
import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks import write_tables
from benchmarks.peers import comparison, matrix_approximation
from benchmarks.ranks import ablations, rank_adaptation
from benchmarks.shared import figures, harness, summary, sweep
from benchmarks.shared.methods import GeoLoRA
from benchmarks.shared.paths import RESULTS


def record(method="geolora", lr=0.1, seed=0, score=0.9, task="digits", parameters=100, **more):
    scores = [[10, 1.0, score / 2], [20, 2.0, score]]
    values = {"task": task, "method": method, "lr": lr, "seed": seed, "score": score, "scores": scores}
    sizes = [[1, parameters], [20, parameters]]
    return {**values, "parameters": parameters, "sizes": sizes, "command": "python compare.py", **more}


def test_the_table_of_the_comparison():
    records = [
        record("lora", lr=0.001, score=0.5),
        record("lora", lr=0.01, score=0.8),
        record("lora", lr=0.1, score=0.79),
        record("lora", lr=0.01, score=0.82, seed=1),
        record("geolora", lr=1.0, score=1.0, parameters=80),
        record("geolora", lr=1.0, score=0.98, parameters=90, seed=1),
    ]
    lora, geolora = comparison.rows(records)
    assert lora == ["lora", "0.810 ± 0.014", "0.810 ± 0.014", "100", "≥ 10", "1.00", "1.00"]
    assert geolora[:5] == ["geolora", "0.990 ± 0.014", "0.990 ± 0.014", "85", "≥ 1"]
    assert float(geolora[5]) == pytest.approx((10 + 10 * (0.81 - 0.495) / 0.495) / 20, abs=0.01)
    assert "| geolora_pl | 0.990" in write_tables.markdown(comparison.header(records), [lora, geolora])


def test_a_method_without_a_task_leaves_its_place_empty_and_seeds_are_matched():
    records = [
        record("lora", score=0.8),
        record("lora", score=0.6, seed=1),
        record("lora", task="sst2", score=0.5, seed=1),
        record("lora", task="sst2", score=0.9),
        record("dora", task="sst2", score=0.7),
    ]
    lora, dora = comparison.rows(records)
    assert lora[3] == "0.700 ± 0.212"  # of .85 and .55, whatever the order of the runs
    assert dora[1:5] == ["-", "0.700", "-", "- / 100"]


def test_what_lora_s_score_takes_is_read_off_the_curves_and_costs_are_those_of_equal_steps():
    """LoRA ends at .8; the other method has .5 at step 10 and 1.0 at step 20, so that it is there at step 16."""
    sizes = [[1, 90], [4, 70], [16, 40], [17, 30], [20, 20]]
    records = [
        record("lora", score=0.8),
        record("geolora", score=1.0, sizes=sizes),
        record("geolora", score=1.0, sizes=[[step, size + 20] for step, size in sizes], seed=1),
        record("full", score=0.7, scores=[[10, 3.0, 0.6], [20, 6.0, 0.7]]),
        record("lora", score=0.8, task="sst2"),
        record("diverged", score=0.1, scores=[], sizes=[]),
    ]
    assert comparison.costs(records) == [
        ["lora", "1.00 / 1.00", "100 / 100", "1.00 / 1.00"],
        ["geolora", "0.80 / -", "50 / -", "1.00 / -"],
        ["full", "never / -", "never / -", "3.00 / -"],
        ["diverged", "- / -", "- / -", "- / -"],
    ]


def test_differences_are_paired_by_seed_and_have_the_interval_of_student():
    """Differences .01 and .03: the mean is .02, and t(.975, 1) = 12.706 times .01 is .127."""
    scores = {"lora": {0: 0.5, 1: 0.7, 2: 0.6}, "geolora": {1: 0.71, 0: 0.53}, "full": {0: 0.6}}
    records = [
        record(method, seed=seed, score=score, task="a")
        for method, of_seed in scores.items()
        for seed, score in of_seed.items()
    ]
    assert comparison.paired(records, ["a"]) == [
        ["geolora", "+0.020 (-0.107 to +0.147)", "+0.020"],
        ["full", "+0.100", "+0.100"],
    ]
    assert comparison.paired(records, ["a", "b"]) == [
        ["geolora", "+0.020 (-0.107 to +0.147)", "-", "-"],
        ["full", "+0.100", "-", "-"],
    ]
    assert comparison.paired(records, ["b"]) == []


def test_the_interval_over_all_tasks_takes_each_of_them_once():
    """Pairs of one task say little of other tasks, and a task with more seeds is no more important than another.

    The differences of ``a`` are .01 and .03, that of ``b`` is .04: their means are .02 and .04, whose mean is .03.
    """
    scores = {"a": {0: 0.01, 1: 0.03}, "b": {0: 0.04}}
    records = [
        record(method, task=task, seed=seed, score=0.5 + (more if method == "geolora" else 0))
        for task, of_task in scores.items()
        for seed, more in of_task.items()
        for method in ("lora", "geolora")
    ]
    assert comparison.paired(records, ["a", "b"]) == [
        ["geolora", "+0.020 (-0.107 to +0.147)", "+0.040", "+0.030 (-0.097 to +0.157)"]
    ]


def test_a_rate_is_alive_only_without_a_gap():
    assert summary.alive({0.001: 0.9, 0.003: 0.2, 0.01: 0.88, 0.1: 0.91, 1.0: 0.3}) == "10"
    assert summary.alive({0.001: 0.9, 0.003: 0.2, 0.01: 0.88, 0.1: 0.91}) == "≥ 10"
    assert summary.alive({0.1: 0.9}) == "≥ 1"
    assert summary.reach([[10, 1.0, 0.1]], 0.2) is None


def test_start_ranks_are_compared_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    records = [
        record("2", parameters=100, score=0.9),
        record("4", parameters=120, score=0.88),
    ]
    assert rank_adaptation.rows(records)[-1] == ["apart", "20%", "0.020"]
    assert rank_adaptation.rows(records[:1])[-1] == ["apart", "0%", "0.000"]
    rank_adaptation.draw(records)
    assert (tmp_path / "rank_adaptation.svg").stat().st_size > 1000


def test_runs_of_settings_that_no_longer_exist_are_in_no_table():
    """A default that has changed since, and a setting that is gone."""
    today = json.loads(json.dumps(GeoLoRA().settings()))
    another, gone = copy.deepcopy(today), copy.deepcopy(today)
    another["callback"]["tau"] = 0.017
    gone["callback"]["grow"] = False
    runs = [record("the defaults", settings=settings, steps=9, warmup=0.1) for settings in (another, today, gone)]
    assert summary.current(runs, ablations.DEFAULT) == [runs[1]]
    assert summary.current(runs, {"another method": GeoLoRA()}) == []
    runs = [{**run, "warmup": harness.warmup()} for run in runs]
    budgets = [
        record(
            ablations.BUDGET,
            settings=GeoLoRA(callback={"tau": 0.01, "budget": budget}).settings(),
            steps=9,
            warmup=harness.warmup(),
        )
        for budget in (100, 99)  # parameters of the defaults today, and of others
    ]
    assert ablations.of_today([*runs, *budgets]) == [runs[1], budgets[0]]
    assert "No run has been made" in ablations.document(ablations.of_today([runs[0], *budgets]))


def test_the_page_of_the_ablations():
    records = [record("the defaults", parameters=100), record("tau 0.03", parameters=200, score=0.91)]
    page = ablations.document(records)
    assert "## How much may a truncation drop?" in page
    assert "| tau 0.03 | 0.910<br>200 |" in page
    assert "start from" not in page  # nothing was tried


def test_every_ablation_differs_from_the_default():
    default = GeoLoRA().settings()
    variants = [method for group in ablations.VARIANTS.values() for method in group.values()]
    assert len(variants) > 15
    assert all(method.settings() != default for method in variants)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ablations.jsonl")))
def test_the_page_in_the_documentation_is_that_of_the_committed_results(path):
    assert ablations.DOCUMENT.read_text() == ablations.document(ablations.of_today(sweep.read(path)))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(matrix_approximation, "SIZE", 24)


@pytest.mark.parametrize("method", ["geolora", "adaptive"])
def test_geolora_finds_the_matrix_from_random_starts(small, method):
    losses, projected = matrix_approximation.descend(method, *matrix_approximation.random_problem(0), 1.0, 30)
    assert losses[-1] < 1e-12
    assert projected[-1] < 1e-6


@pytest.mark.parametrize("method", ["simultaneous", "orthonormal"])
def test_simultaneous_descent_rests_where_the_projected_gradient_is_not_zero(small, method):
    T, start = matrix_approximation.saddle_problem(0)
    losses, projected = matrix_approximation.descend(method, T, start, 0.1, 50)
    assert losses[-1] == losses[0] > 0.1
    assert projected[-1] > 0.1
    losses, projected = matrix_approximation.descend("geolora", T, start, 0.5, 300)
    assert losses[-1] < 1e-9
    assert projected[-1] < 1e-4
