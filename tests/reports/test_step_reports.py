"""Reports on the steps of optimizers and who watches them: what one did, and what must come of it."""

import copy
import pickle

import pytest
import torch
from reference import one_layer
from tolerance import rounding
from torch import nn
from transformers.optimization import Adafactor

from geolora_pl import (
    AdapterConfig,
    RankAdaptiveIntegrator,
    inject_adapters,
)
from geolora_pl.math.transport import transport_second_moment


def small(probes=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    inject_adapters(model, AdapterConfig(target_modules=["0", "2"], probes=probes))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, scale=1.0):
    model.zero_grad()
    loss = model(torch.full((2, 8), scale)).square().sum()
    loss.backward()
    return loss


def train(model, integrator, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()
        integrator.step(optimizer)


def test_a_step_that_an_error_has_ended_does_not_hide_those_of_a_function_that_is_called_later():
    """A user catches an error of a step in a notebook and goes on with a function that trains: its steps were taken for
    parts of the broken one, so that none was counted and no retraction came any more."""
    model = small()
    integrator = RankAdaptiveIntegrator(model, adapt_every=4, on_nonfinite="raise")
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    backward(model, float("nan"))
    with pytest.raises(FloatingPointError):
        optimizer.step()
    train(model, integrator, optimizer, 20)
    assert integrator.total_steps == 20
    assert integrator.steps == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_an_integrator_is_copied_after_a_step_that_an_error_has_ended(copied):
    model = small()
    integrator = RankAdaptiveIntegrator(model, on_nonfinite="raise")
    backward(model, float("nan"))
    with pytest.raises(FloatingPointError):
        torch.optim.AdamW(trained(model)).step()
    model, integrator = copied((model, integrator))
    train(model, integrator, torch.optim.AdamW(trained(model)), 2)
    assert integrator.total_steps == 2


class SharpnessAware(torch.optim.SGD):
    """Sharpness-aware minimisation in one class, which needs its closure twice per step."""

    @torch.no_grad()
    def step(self, closure):
        factors = self.param_groups[0]["params"]
        with torch.enable_grad():
            closure()
        before = [p.clone() for p in factors]
        for p in factors:
            p += 0.01 * p.grad
        with torch.enable_grad():
            loss = closure()
        for p, old in zip(factors, before, strict=True):
            p.copy_(old)
        super().step()
        return loss


def test_a_step_whose_closure_is_called_twice_counts_once_and_decays_once():
    model = small()
    integrator = RankAdaptiveIntegrator(model, adapt_every=100)
    optimizer = SharpnessAware(trained(model), lr=0.02, weight_decay=0.1)
    for step in range(4):
        optimizer.step(lambda: backward(model))
        if step == 0:
            integrator.step(optimizer)  # the first retraction
    decay = pytest.approx((1 - 0.02 * 0.1) ** 3, rel=rounding(torch.float64, 10))
    assert integrator.state_dict()["decay"] == dict.fromkeys(integrator.adapters, decay)
    integrator.step(optimizer)
    assert integrator.total_steps == 4


class Twice(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


@pytest.mark.filterwarnings("ignore:the gradient of:geolora_pl.GeoLoRAWarning")
@pytest.mark.parametrize("broken", [(False, True), (True, True)])
def test_a_step_is_skipped_for_the_gradients_that_its_closure_has_left_at_last(broken):
    model = small()
    integrator, optimizer = RankAdaptiveIntegrator(model, adapt_every=100), Twice(trained(model), lr=0.02)
    calls = iter(broken)
    optimizer.step(lambda: backward(model, float("nan") if next(calls) else 1.0))
    assert not integrator.step(optimizer)
    assert (integrator.total_steps, integrator.skipped_steps) == (0, 1)


class Plain:
    """An optimizer that is none of torch's, and calls none of its hooks."""

    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params), "lr": 0.01}], {}

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad


def test_retractions_go_on_with_an_optimizer_that_is_none_of_torchs():
    """A user writes an optimizer of one's own: after its second step no retraction came any more."""
    model = small()
    integrator = RankAdaptiveIntegrator(model, adapt_every=4)
    train(model, integrator, Plain(trained(model)), 21)
    assert (integrator.total_steps, integrator.steps, integrator.adaptations) == (21, 1, 7)


def test_the_integrator_of_a_run_that_was_broken_off_has_no_say_in_the_next():
    """A user interrupts a run with `coefficient_steps` and starts another without: as long as anything kept the first
    integrator, a traceback for example, the new run trained coefficients alone, and diverged."""

    def of_second_run(first_is_kept):
        model = small(probes=0)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        first = RankAdaptiveIntegrator(model, coefficient_steps=50)
        train(model, first, optimizer, 5)
        if not first_is_kept:
            first.close()
        second = RankAdaptiveIntegrator(model, adapt_every=5)
        train(model, second, optimizer, 17)
        return model.state_dict()

    expected = of_second_run(first_is_kept=False)
    assert all(torch.equal(value, expected[name]) for name, value in of_second_run(first_is_kept=True).items())


def test_an_integrator_whose_place_another_has_taken_says_so():
    """A user makes a second integrator in the middle of a run, and goes on with the first."""
    model = small()
    first, optimizer = RankAdaptiveIntegrator(model), torch.optim.AdamW(trained(model))
    second = RankAdaptiveIntegrator(model)
    with pytest.raises(ValueError, match="another RankAdaptiveIntegrator was made"):
        train(model, first, optimizer, 1)
    assert second.step(optimizer)


def test_an_integrator_that_is_refused_leaves_the_rule_of_the_adapters():
    """A user asks for a budget that is too small, and saves the adapters: they are cut by the rule that they have."""
    _, adapter, integrator = one_layer(6, 5, 2, 4)
    with pytest.raises(ValueError, match="budget=1"):
        RankAdaptiveIntegrator(nn.Sequential(adapter), budget=1)
    assert adapter.rule == integrator.rule


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_optimizer_that_trains_the_bases_is_refused(when):
    """A user unfreezes a whole model, or a callback does: U, S and V were trained, and no longer orthonormal."""
    model = small()
    if when == "before":
        model.requires_grad_(True)
    integrator = RankAdaptiveIntegrator(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if when == "during":
        train(model, integrator, optimizer, 2)  # what needs no gradient may be in the optimizer
        model.requires_grad_(True)
    with pytest.raises(ValueError, match="the optimizer trains U, S or V of the adapter 0"):
        train(model, integrator, optimizer, 1)


@pytest.mark.parametrize(("m", "n", "max_rank"), [(10, 7, 5), (7, 9, 5), (9, 7, 5), (7, 7, 4)])
def test_the_column_statistics_of_adafactor_move_with_the_bases(m, n, max_rank):
    """A user trains with the Adafactor of transformers: it keeps one number per column, which stayed where it was, so
    that a new column took steps many times as long as the others."""
    _, adapter, integrator = one_layer(m, n, 2, max_rank, tau=0.1)
    optimizer = Adafactor([adapter.K, adapter.L], lr=0.02, scale_parameter=False, relative_step=False)
    target = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).double()

    def step():
        optimizer.zero_grad()
        (adapter.delta_weight() - target).square().sum().backward()
        optimizer.step()

    integrator.adapt_every = 4
    for _ in range(3):
        step()
        integrator.step(optimizer)
    step()
    old = {"U": adapter.U.clone(), "V": adapter.V.clone()}
    before = {
        p: {key: optimizer.state[p][f"exp_avg_sq_{key}"].clone() for key in ("row", "col")} for p in trained(adapter)
    }
    assert integrator.step(optimizer)
    assert not torch.equal(adapter.V, old["V"])
    for factor, basis in ((adapter.K, "V"), (adapter.L, "U")):
        state = optimizer.state[factor]
        moved = transport_second_moment(before[factor]["col"][None], old[basis], getattr(adapter, basis))[0]
        assert torch.allclose(state["exp_avg_sq_col"], moved)
        assert torch.equal(state["exp_avg_sq_row"], before[factor]["row"])
