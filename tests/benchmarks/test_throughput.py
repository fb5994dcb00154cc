"""What a step costs is measured as it is said to be: in turns, part by part, against the right bound."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.shared import figures, harness, results
from benchmarks.shared.methods import LoRA
from benchmarks.shared.task import to_device
from benchmarks.speed import (
    adaptation_event,
    growth,
    guard,
    many,
    memory,
    random_models,
    rows_by_width,
    throughput,
    timing,
)
from benchmarks.speed.random_models import BERTS, Setup
from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters
from geolora_pl.training import plan

REPOSITORY = results.RESULTS  # where what is committed lies
TINY = Setup("bert", rank=2, batch_size=8, length=8, sizes=(32, 2, 2))


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    """Nothing is written over what is committed; a small vocabulary, or the table of words is the whole cost."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    monkeypatch.setattr(random_models, "VOCABULARY", 64)


def tiny_training(name, setup=TINY):
    task = random_models.load(setup)
    return timing.start(setup, task, timing.compared_at(setup.rank)[name], name), next(task.batches(0))


def test_a_model_is_the_size_it_is_called_by(monkeypatch):
    monkeypatch.setattr(random_models, "VOCABULARY", 30522)
    model = random_models.load(Setup("minilm")).make_model(0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.7e6, rel=0.01)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert len(random_models.load(replace(TINY, sizes=(64, 3, 2))).targets) == 6 * 3


def test_a_vit_is_adapted_in_its_blocks():
    setup = Setup("vit_tiny", batch_size=1)
    task = random_models.load(setup)
    assert len(task.targets) == 4 * 12
    assert next(task.batches(0))["images"].shape == (1, 3, 224, 224)
    assert (setup.unit, setup.amount, TINY.unit, TINY.amount) == ("images", 1, "tokens", 64)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning:peft")  # which PEFT corrects
@pytest.mark.parametrize("name", ["geolora", "lora", "bound"])
def test_a_gpt2_takes_a_step_with_each_kind_of_method(name, monkeypatch):
    monkeypatch.setitem(random_models.GPT2S, "gpt2", (32, 2, 2))
    setup = Setup("gpt2", rank=2, batch_size=8, length=8)
    assert len(random_models.load(setup).targets) == 4 * 2
    training, batch = tiny_training(name, setup)
    assert timing.step(setup, training, batch, 0)["loss"] > 0


def test_the_classes_can_be_told_apart():
    batch = next(random_models.load(TINY).batches(0))
    assert torch.equal(batch["input_ids"][:, 0] % random_models.CLASSES, batch["labels"])


def test_equal_rank_is_equal_columns():
    probes = AdapterConfig().probes
    for name, columns in (("geolora", 2 + probes), ("defaults", 16 + probes), ("lora", 2), ("adalora", 3)):
        training, _ = tiny_training(name)
        sizes = {p.shape for key, p in training.model.named_parameters() if ".K" in key or "lora_A" in key}
        assert {min(size) for size in sizes} == {columns}, name


def test_in_a_room_for_64_columns_6_stay_live():
    training, batch = tiny_training("room")
    for number in range(3):
        training.model(**batch).loss.backward()
        training.optimizer.step()
        training.after_step(number)
    assert set(training.ranks()) == {6}


def test_the_bound_goes_down_to_the_first_layer_and_trains_the_head_alone():
    training, batch = tiny_training("bound")
    attention, seen = training.model.bert.encoder.layer[0].attention.self, {}

    def note(layer, args, output):
        seen[layer] = args[0], output

    for layer in (attention.query, attention.key, attention.value):
        layer.register_forward_hook(note)
    training.model(**batch).loss.backward()
    for x, y in seen.values():
        assert y.requires_grad
        assert not x.requires_grad
    trained = {name for name, p in training.model.named_parameters() if p.grad is not None}
    assert trained == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}


def test_every_part_of_a_step_is_in_its_time(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(harness, "now", lambda: next(ticks))
    training, batch = tiny_training("lora")
    before = [p.clone() for p in training.model.parameters()]
    found = timing.step(TINY, training, to_device(batch, "cpu"), 0)
    assert [found[part] for part in timing.PARTS] == [1.0, 2.0, 3.0, 4.0]
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))


def test_methods_take_turns_in_changing_order_on_the_same_batches(monkeypatch):
    taken = []
    monkeypatch.setattr(timing, "step", lambda setup, training, batch, number: taken.append((training, number)) or {})
    task = random_models.load(TINY)
    methods = ("a", "b", "c")
    assert len(list(timing.turns(TINY, dict(zip(methods, methods, strict=True)), task.batches(0), range(6)))) == 6
    rounds = [[name for name, number in taken if number == n] for n in range(6)]
    assert all(sorted(of_round) == ["a", "b", "c"] for of_round in rounds)
    assert len(set(map(tuple, rounds))) > 1


def steps(seconds, adaptation=()):
    times = [{"forward": s, "backward": 0.0, "optimizer": 0.0, "adaptation": 0.0} for s in seconds]
    for number, more in adaptation:
        times[number]["adaptation"] = more
    return times


def test_ratios_are_pair_by_pair_and_an_adaptation_is_spread_over_its_steps():
    slow = [1.0, 2.0] * 10  # what else the machine does meets both alike
    found = timing.summary(
        {"geolora": steps([1.5 * s for s in slow], [(9, 5.0), (19, 5.0)]), "lora": steps(slow)}, amount=100
    )
    assert found["geolora"]["adaptation"] == pytest.approx(500)
    assert found["geolora"]["over"]["lora"] == pytest.approx([1.75, 1.875, 2.0])
    assert found["geolora"]["share"] == pytest.approx(0.5 / 2.75, abs=1e-4)
    assert found["lora"]["a_second"] == pytest.approx(100 / 1.5, abs=0.1)


def test_a_command_gives_tables_targets_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BERTS, "bert_tiny", TINY.sizes)
    threads = torch.get_num_threads()
    arguments = "step memory loss --model bert_tiny --methods geolora lora bound --batch_size 8 --length 8 --rounds 10"
    monkeypatch.setattr(memory, "peaks", lambda setup, methods: dict.fromkeys(methods, 1.0))
    throughput.main([*arguments.split(), "--steps", "20", "--loss", "100", "--threads", str(threads)])
    written = json.loads((tmp_path / "throughput_bert_tiny.json").read_text())
    (record,) = written["results"]
    assert (
        written["command"]
        == f"python benchmarks/speed/throughput.py {arguments} --steps 20 --loss 100 --threads {threads}"
    )
    assert list(record["step"]) == ["geolora", "lora", "bound"]
    assert record["loss"]["lora"]["steps"] == random_models.BATCHES  # the mean of a pass
    assert "bound" not in record["loss"]
    assert all(len(row) == len(throughput.HEADER) for row in throughput.rows(record))
    assert [row[0] for row in throughput.judged(record, "geolora")] == [
        "geolora: step over frozen",
        "geolora: step over LoRA",
        "geolora: memory over LoRA",
        "geolora: part of the adaptation",
    ]
    assert "memory over LoRA" in capsys.readouterr().out
    assert (tmp_path / "throughput_bert_tiny.svg").exists()


@pytest.mark.parametrize("arguments", ["--rounds 15", "--rounds 0", "speed"])
def test_a_wrong_argument_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        throughput.main(arguments.split())
    assert "must be a multiple of 10" in (said := capsys.readouterr().err) or "choose from step" in said


def test_the_loss_that_is_never_reached():
    task = random_models.load(TINY, steps=10)
    found = timing.time_to_loss(TINY, task, {"lora": LoRA()}, 1e-9)
    assert found["lora"]["steps"] is None
    assert found["lora"]["loss"] > 1


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(memory, "REPEATS", 1)
    ours = torch.ones(75_000_000)  # 300 MB
    setup = replace(TINY, length=256, batch_size=32)
    assert 20 < memory.peaks(setup, {"lora": LoRA()})["lora"] < 4e-6 * ours.numel()


def test_both_ways_of_an_adaptation_do_the_same():
    found = adaptation_event.measure("cpu", rounds=2, depth=1, max_rank=4)
    assert found["adapters"] == 6
    assert found["rank"] > 1
    assert found["ratio"][1] > 0


@pytest.mark.slow
def test_what_grows_is_drawn(tmp_path, monkeypatch):
    for name, sizes in (("SIZES", (64, 1, 1)), ("WIDTHS", (64, 128)), ("DEPTHS", (1, 2)), ("RANKS", (2, 8))):
        monkeypatch.setattr(growth, name, sizes)
    monkeypatch.setattr(growth, "BATCHES", (8, 16))
    records = growth.measure(TINY, rounds=10)
    assert [(r["grows"], r["size"]) for r in records] == [
        *(("width", 64), ("width", 128), ("depth", 1), ("depth", 2)),
        *(("rank", 2), ("rank", 8), ("batch", 8), ("batch", 16)),
    ]
    growth.draw(records)
    assert (tmp_path / "throughput.svg").stat().st_size > 10_000


def test_a_vit_of_other_sizes_has_the_tokens_it_is_measured_for():
    task = random_models.load(Setup("vit_384x6", batch_size=1))
    assert len(task.targets) == 4 * 6
    model = task.make_model(0).model
    assert model.pos_embed.shape == (1, 37, 384)
    assert next(task.batches(0))["images"].shape == (1, 3, 96, 96)


@pytest.mark.slow
def test_the_map_has_a_value_for_every_width_and_number_of_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(rows_by_width, "WIDTHS", (64, 128))
    monkeypatch.setattr(rows_by_width, "ROWS", (64, 128))
    monkeypatch.setattr(rows_by_width, "DEPTH", 1)
    monkeypatch.setattr(rows_by_width, "THREADS", (1,))
    throughput.main(["map"])
    assert len(results.read("throughput_map")) == 4
    assert (tmp_path / "rows_by_width.svg").exists()


@pytest.mark.parametrize(
    ("now", "before", "slower"),
    [
        ([1.1, 1.2, 1.3], [1.0, 1.1, 1.2], False),  # quartiles overlap
        ([1.25, 1.3, 1.32], [1.0, 1.1, 1.2], False),  # apart by less than they spread
        ([1.45, 1.5, 1.55], [1.0, 1.1, 1.2], True),
        ([0.5, 0.6, 0.7], [1.0, 1.1, 1.2], False),  # quicker
    ],
)
def test_slower_is_what_is_apart_by_more_than_both_spread(now, before, slower):
    assert guard.is_slower(now, before) is slower


def test_the_guard_compares_with_what_is_committed_and_replaces_it_only_if_asked_to(monkeypatch):
    monkeypatch.setattr(guard, "SETUP", TINY)
    monkeypatch.setattr(guard, "RESULTS", results.RESULTS)
    found = {"bound": [2.0, 2.0, 2.0], "lora": [1.5, 1.5, 1.5]}
    monkeypatch.setattr(guard, "measure", lambda rounds: found)
    throughput.main(["guard"])
    assert guard.committed() == found, "the first one is committed"
    slower = {"bound": [3.0, 3.0, 3.0], "lora": [1.5, 1.5, 1.5]}
    monkeypatch.setattr(guard, "measure", lambda rounds: slower)
    with pytest.raises(SystemExit, match="1"):
        throughput.main(["guard"])
    assert guard.committed() == found
    with pytest.raises(SystemExit):
        throughput.main(["guard", "--update"])
    assert guard.committed() == slower
    throughput.main(["guard"])


@pytest.mark.slow
def test_the_guard_measures(monkeypatch):
    """CI shows its verdict; on a machine that others use it may be wrong, and so it fails nothing."""
    monkeypatch.setattr(random_models, "VOCABULARY", 30522)
    now = guard.measure(10)
    for line in guard.rows(now, json.loads((REPOSITORY / f"{guard.NAME}.json").read_text())["results"]):
        print(*line)
    assert set(now) == {"bound", "lora"}
    assert all(0 < low <= middle <= high for low, middle, high in now.values())


@pytest.fixture
def tiny_decoder(monkeypatch):
    """Two blocks of two layers in the place of a decoder."""
    monkeypatch.setattr(many, "SHAPES", {"up": (40, 24), "down": (24, 40)})
    monkeypatch.setattr(many, "BLOCKS", 2)
    monkeypatch.setattr(many, "TRIED", 1)


@pytest.mark.slow
def test_what_is_done_per_adapter_is_measured_at_every_number_and_width(monkeypatch, tmp_path, tiny_decoder, capsys):
    for name, value in (("NUMBERS", (2, 9)), ("WIDTH", 8), ("FEW", 2), ("WIDTHS", (8, 16)), ("REPEATS", 1)):
        monkeypatch.setattr(many, name, value)
    threads = torch.get_num_threads()
    try:
        throughput.main(["many"])
    finally:
        torch.set_num_threads(threads)
    found = results.read("throughput_many")
    assert [(r["grows"], r["size"]) for r in found["grown"]] == [
        *(("number", 2), ("number", 9)),
        *(("width", 8), ("width", 16)),
    ]
    assert set(found["grown"][1]["ms"]) == {*many.OF_MODEL, *many.OF_FIT}
    assert set(found["grown"][-1]["ms"]) == set(many.OF_MODEL)
    assert set(found["decoder"]["ms"]) == set(found["decoder"]["expected"]) == {"step", "event"}
    assert "by number of adapters" in capsys.readouterr().out
    assert (tmp_path / "many.svg").exists()


def test_an_exponent_is_that_of_the_two_largest_sizes():
    records = [{"grows": "number", "size": n, "ms": {"step": ms}} for n, ms in ((1, 9.0), (10, 10.0), (100, 1000.0))]
    assert many.exponent(records, "number", "step") == 2


def test_the_bytes_on_paper_are_those_that_are_sent(monkeypatch, tiny_decoder):
    config = AdapterConfig(init_rank=16)
    model = many.Decoder(many.BLOCKS)
    factors = [factor for layer in inject_adapters(model, config).values() for factor in (layer.K, layer.L)]
    paper, sent = many.on_paper(config), []
    assert paper["bytes of gradients"] == sum(factor.numel() * factor.element_size() for factor in factors)
    monkeypatch.setattr(plan, "processes", lambda: 2)
    monkeypatch.setattr(plan, "broadcast_packed", lambda tensors: sent.extend(tensors))
    integrator = RankAdaptiveIntegrator(model)
    torch.nn.init.normal_(factors[0])
    integrator.retract()
    assert paper["bytes of a retraction's message"] == sum(tensor.nbytes for tensor in sent)
    assert paper["adapters"] == 4
