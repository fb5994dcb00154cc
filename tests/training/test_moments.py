import pytest
import torch
from reference import one_layer
from tolerance import close
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRAWarning, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.math.transport import transport_first_moment, transport_second_moment


def step(adapter, optimizer, integrator, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(10, 7, generator=generator).double()
    optimizer.zero_grad()
    (0.5 * (adapter.delta_weight() - target).square().sum()).backward()
    optimizer.step()
    return integrator.step(optimizer)


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.1), "exp_avg", ["exp_avg_sq"]),
        (
            lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
            "exp_avg",
            ["exp_avg_sq", "max_exp_avg_sq"],
        ),
        (lambda p: torch.optim.NAdam(p, lr=0.1), "exp_avg", ["exp_avg_sq"]),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer", []),
    ],
)
def test_the_state_of_torchs_optimizers_is_transported(make, first, second, probes):
    _, adapter, integrator = one_layer(10, 7, 2, 5, tau=0.1, probes=probes)
    optimizer = make([adapter.K, adapter.L])
    integrator.adapt_every = 2
    step(adapter, optimizer, integrator, 0)
    backward_only(adapter, 1)
    optimizer.step()
    U, V = adapter.U.clone(), adapter.V.clone()
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in (adapter.K, adapter.L)}
    assert integrator.step(optimizer)
    assert adapter.rank > 2
    bases = U, V, adapter.U, adapter.V
    expected_K, expected_L = transport_first_moment(before[adapter.K][first], before[adapter.L][first], *bases, probes)
    close(optimizer.state[adapter.K][first], expected_K)
    close(optimizer.state[adapter.L][first], expected_L)
    for key in second:
        expected = transport_second_moment(before[adapter.K][key], V, adapter.V)
        close(optimizer.state[adapter.K][key], expected)
        assert (optimizer.state[adapter.K][key][:, probes : probes + adapter.rank] > 0).all()
    if second:
        assert torch.equal(optimizer.state[adapter.K]["step"], before[adapter.K]["step"])


@pytest.mark.filterwarnings("ignore::geolora_pl.GeoLoRAWarning")  # of state without a rule
@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, amsgrad=True),
            ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), ["square_avg"]),
    ],
)
def test_the_state_of_an_adapter_that_does_not_move_stays_to_the_bit(make, keys):
    """Beside one of its shape that does, and with factors that a truncation would turn."""
    model = nn.Sequential(*(nn.Linear(7, 10, dtype=torch.float64) for _ in range(2)))
    moving, resting = inject_adapters(model, AdapterConfig(init_rank=2, max_rank=5)).values()
    integrator = RankAdaptiveIntegrator(model, tau=0.1)
    optimizer = make([factor for layer in (moving, resting) for factor in (layer.K, layer.L)])
    for layer in (moving, resting):
        backward_only(layer, 0)
    optimizer.step()
    for factor in (resting.K, resting.L):
        factor.data.zero_()
    nn.init.normal_(resting.S.data[:2, :2])
    tensors = [resting.U, resting.S, resting.V]
    tensors += [optimizer.state[factor][key] for factor in (resting.K, resting.L) for key in keys]
    others = [optimizer.state[moving.K][key] for key in keys]
    before, others_before = [t.detach().clone() for t in tensors], [t.clone() for t in others]
    integrator.retract(optimizer)
    assert moving.rank > resting.rank == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(others, others_before, strict=True))


def backward_only(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(10, 7, generator=generator).double()
    adapter.zero_grad()
    (0.5 * (adapter.delta_weight() - target).square().sum()).backward()


class Unusual(torch.optim.SGD):
    """SGD that keeps state under names that nobody knows: one that is nowhere negative, and one that is."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["size"] = self.state[p].get("size", 0) + p.grad.square()
                self.state[p]["memory"] = p.grad.clone()
        return super().step()


def test_state_with_an_unknown_name_is_averaged_where_it_is_nowhere_negative_and_named_once():
    _, adapter, integrator = one_layer(10, 7, 2, 5, tau=0.1, probes=0)
    optimizer = Unusual([adapter.K, adapter.L], lr=0.1)
    with pytest.warns(GeoLoRAWarning, match="the optimizer's state memory, size has no known rule"):
        step(adapter, optimizer, integrator, 0)
    U, V = adapter.U.clone(), adapter.V.clone()
    backward_only(adapter, 1)
    optimizer.step()
    seen = {p: optimizer.state[p]["size"].clone() for p in (adapter.K, adapter.L)}
    assert integrator.step(optimizer)  # a second warning would be an error here
    for factor, old, new in ((adapter.K, V, adapter.V), (adapter.L, U, adapter.U)):
        assert torch.count_nonzero(optimizer.state[factor]["memory"]) == 0
        close(optimizer.state[factor]["size"], transport_second_moment(seen[factor], old, new))


def test_plain_sgd_has_nothing_to_transport():
    _, adapter, integrator = one_layer(10, 7, 2, 5)
    step(adapter, torch.optim.SGD([adapter.K, adapter.L], lr=0.1), integrator, 0)
    assert adapter.rank > 2


def test_a_layer_of_one_by_one_keeps_the_sign_of_its_momentum():
    _, adapter, integrator = one_layer(1, 1, 1, 1)
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        (0.5 * (adapter.delta_weight() - 3.0).square().sum()).backward()
        optimizer.step()
        integrator.step(optimizer)
    assert adapter.delta_weight().item() == pytest.approx(3.0, abs=0.05)


def test_one_second_moment_a_row_stays_as_it_is():
    _, adapter, integrator = one_layer(10, 7, 2, 5)
    optimizer = RiemannianAdam([{"params": [adapter.K, adapter.L], "adapters": True}], lr=0.1)
    step(adapter, optimizer, integrator, 0)
    optimizer.zero_grad()
    (0.5 * (adapter.delta_weight() - torch.randn(10, 7).double()).square().sum()).backward()
    optimizer.step()
    before = [optimizer.state[factor]["exp_avg_sq"].clone() for factor in (adapter.K, adapter.L)]
    integrator.step(optimizer)
    for factor, second in zip((adapter.K, adapter.L), before, strict=True):
        assert torch.equal(optimizer.state[factor]["exp_avg_sq"], second)
        assert second.shape == (len(factor),)
        assert second.min() > 0
