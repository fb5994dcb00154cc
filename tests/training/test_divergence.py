import random

import pytest
import torch
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRAWarning, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.training.divergence import DivergenceGuard, Mean, followed, has_diverged, mean_of
from geolora_pl.training.snapshot import Snapshot


def judged(losses, window=10):
    """How often a run with these losses is said to have diverged."""
    level, count = None, 0
    for i in range(0, len(losses), window):
        mean = mean_of(losses[i : i + window])
        if has_diverged(mean, level):
            count += 1
        else:
            level = followed(level, mean)
    return count


DRAWS = random.Random(0)
NOISES = {
    "even": lambda: DRAWS.gauss(1, 0.05),
    "uneven": lambda: abs(DRAWS.gauss(1, 0.6)),
    "single samples": lambda: DRAWS.expovariate(1),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("falls", [0.0, 1e-3])
def test_noise_is_not_taken_for_divergence(noise, falls):
    assert judged([NOISES[noise]() * 2.718 ** (-falls * step) for step in range(10_000)]) == 0


@pytest.mark.parametrize("noise", NOISES)
def test_losses_that_go_back_to_where_they_began_are(noise):
    falling = [NOISES[noise]() * level for level in (10, 8, 6, 4, 2, *[1] * 20) for _ in range(10)]
    risen = [10 * NOISES[noise]() for _ in range(10)]
    assert judged(falling) == 0
    assert judged([*falling, *risen]) == 1


def test_a_single_broken_batch_says_nothing_about_the_weights():
    losses = [1 + 0.1 * (i % 3) for i in range(100)]
    for broken in (1e6, float("nan"), float("inf")):
        assert judged([*losses[:55], broken, *losses[56:]]) == 0
        assert judged([*losses[:55], broken, *losses[56:90], *[3.0] * 10]) == 1
    assert judged([*losses[:50], *[float("nan")] * 10]) == 1


def test_losses_without_noise():
    assert judged([1.0] * 50) == judged([0.0] * 50) == judged([1.0] * 20 + [1.01] * 20) == 0
    assert judged([1.0] * 20 + [2.0] * 10) == 1
    assert judged([-1.0] * 20 + [-1.1] * 20 + [3.0] * 10) == 1


def model_of(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["2"]))
    return model, RankAdaptiveIntegrator(model, **settings), RiemannianAdam(model, lr=0.1)


def step(model, integrator, optimizer, seed=0):
    optimizer.zero_grad()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    loss = (model(x) - x[:, :1]).square().mean()
    loss.backward()
    optimizer.step()
    integrator.step(optimizer)
    return loss.detach()


def state(model, optimizer):
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [*(value.clone() for value in model.state_dict().values()), *moments]


@pytest.mark.parametrize("taken", [0, 5, 12])
def test_a_snapshot_brings_back_everything_and_the_steps_that_follow_are_half_as_long(taken):
    run = model, integrator, optimizer = model_of(adapt_every=4)
    for seed in range(taken):
        step(*run, seed)
    before, ranks = state(model, optimizer), integrator.ranks()
    snapshot = Snapshot.take(model, optimizer, integrator)
    later = [step(*run, seed) for seed in range(20)]
    snapshot.put_back(model, optimizer, integrator)
    assert all(torch.equal(a, b) for a, b in zip(state(model, optimizer), before, strict=True))
    assert integrator.ranks() == ranks
    assert (integrator.total_steps, integrator.rollbacks) == (taken + 20, 1)
    assert torch.equal(step(*run, 0), later[0])
    moved = model[0].K.detach() - snapshot.tensors["0.K"]
    snapshot.put_back(model, optimizer, integrator)
    integrator.rollbacks = 0
    integrator.load_state_dict(integrator.state_dict())
    optimizer.param_groups[0]["lr"] /= 2
    step(*run, 0)
    if taken % 4 == 1 and taken > 4:  # no retraction in that step
        torch.testing.assert_close(moved, model[0].K.detach() - snapshot.tensors["0.K"])


def test_no_loss_is_read_in_a_step_without_a_retraction():
    model, integrator, optimizer = model_of(adapt_every=20)
    guard = DivergenceGuard(model, integrator, optimizer)
    guard.start()
    for _ in range(30):
        assert not guard.batch_ended(torch.empty((), device="meta"))  # reading it would raise


def test_what_another_optimizer_trains_is_left_alone():
    model, integrator, _ = model_of()
    optimizer = RiemannianAdam([{"params": [model[0].K, model[0].L], "adapters": True}], lr=0.1)
    snapshot = Snapshot.take(model, optimizer, integrator)
    assert not {"2.weight", "2.bias"} & snapshot.tensors.keys()
    assert {"0.U", "0.K", "1.running_mean", "1.num_batches_tracked"} <= snapshot.tensors.keys()


def test_learning_rates_are_scaled_in_the_step_alone():
    model, integrator, optimizer = model_of()
    seen = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    Snapshot.take(model, optimizer, integrator).put_back(model, optimizer, integrator)
    for lr in (0.4, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        step(model, integrator, optimizer)
        assert optimizer.param_groups[0]["lr"] == lr
    assert seen == [0.2, 0.1]

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    integrator.close()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_an_interrupt_while_a_run_goes_back_leaves_the_ranks_and_counters_of_the_good_state(monkeypatch):
    """A user presses Ctrl-C while factors are put back: the ranks were still those of before, so that products left
    columns out."""
    model, integrator, optimizer = run = model_of(adapt_every=2)
    for seed in range(4):
        step(*run, seed)
    snapshot, ranks = Snapshot.take(model, optimizer, integrator), integrator.ranks()
    expected = integrator.adapters["0"].delta_weight()
    with torch.no_grad():
        for layer in integrator.adapters.values():  # as after a retraction that has left them nothing
            for factor in (layer.U, layer.S, layer.V, layer.K, layer.L):
                factor.zero_()
            layer.read_rank()

    def interrupted(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(RiemannianAdam, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshot.put_back(model, optimizer, integrator)
    assert max(ranks.values()) > 0
    assert integrator.ranks() == ranks
    assert integrator.rollbacks == 1
    assert torch.equal(integrator.adapters["0"].delta_weight(), expected)


def test_decay_is_that_of_the_shorter_step():
    model, integrator, optimizer = model_of(adapt_every=9)
    integrator.total_steps = 100
    for group in optimizer.param_groups:
        group["weight_decay"] = 1.0
    Snapshot.take(model, optimizer, integrator).put_back(model, optimizer, integrator)
    step(model, integrator, optimizer)
    assert integrator.state_dict()["decay"] == {"0": 1 - 0.05}


def test_it_goes_back_to_the_last_state_whose_losses_were_good():
    run = model, integrator, optimizer = model_of(adapt_every=10)
    guard = DivergenceGuard(model, integrator, optimizer)
    guard.start()
    states = {}
    for seed in range(36):
        loss = step(*run, seed)
        assert not guard.batch_ended(loss)
        states[seed + 1] = state(model, optimizer)
    with torch.no_grad():
        model[2].weight *= 1e3
    with pytest.warns(GeoLoRAWarning, match=r"rose from .* by step 46: .* after step 26, .* is 0\.5 times as long"):
        assert [guard.batch_ended(step(*run, seed)) for seed in range(36, 46)] == [False] * 9 + [True]
    assert all(torch.equal(a, b) for a, b in zip(state(model, optimizer), states[26], strict=True))


def test_an_expected_mean():
    assert mean_of([3.0, 1.0, 2.0]) == Mean(5 / 3, 2.5 / 2 / 3)
