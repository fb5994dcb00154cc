import pytest
import torch
from tolerance import rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.training.groups import parameter_groups


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
    return model


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, RiemannianAdam])
def test_it_is_the_norm_of_all_gradients_of_the_last_step(model, kind, waits, monkeypatch):
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: waits)  # as on a GPU
    integrator, optimizer = RankAdaptiveIntegrator(model), kind(parameter_groups(model), lr=0.1)
    assert integrator.gradient_norm() is None
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
        integrator.step(optimizer)
        assert integrator.gradient_norm() == pytest.approx(float(expected), rel=rounding(torch.float32, 10))


def test_it_is_that_of_the_unscaled_gradients_where_a_fused_optimizer_unscales_them(model):
    """A user trains in 16 bits with AdamW(fused=True): what was logged was 65,536 times as large."""
    integrator = RankAdaptiveIntegrator(model)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward(retain_graph=True)
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert integrator.step(optimizer)
    assert integrator.gradient_norm() == pytest.approx(float(expected), rel=rounding(torch.float32, 10))


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, each of which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_that_does_not_adapt_reads_nothing_for_it(model, monkeypatch):
    monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: True)
    integrator, optimizer = RankAdaptiveIntegrator(model, adapt_every=100), RiemannianAdam(model, lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        with Reads() as reads:
            integrator._watch.before_step(optimizer, (optimizer,), {})
        assert reads.count == 0, step
        integrator._watch.nesting.leave(optimizer)
    with Reads() as reads:
        assert integrator.gradient_norm() > 0
    assert reads.count == 1


def test_groups_have_the_names_under_which_learning_rates_are_logged(model):
    """Lightning's LearningRateMonitor called them pg1, pg2 and pg3."""
    assert [group["name"] for group in parameter_groups(model)] == ["adapters", "in_full", "no_decay"]
