"""What the method promises, against dense float64 references."""

import itertools
import math

import pytest
import torch
from reference import (
    best_of_rank,
    best_within_tau,
    one_layer,
    orthonormal,
    padded,
    set_point,
    tangent_projection,
)
from tolerance import EXACT, RUN, close, is_orthonormal, rounding
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.adapters.base import FACTORS
from geolora_pl.math.decomposition import without_probes


def quadratic(adapter, target):
    return 0.5 * (adapter.delta_weight() - target).square().sum()


def sgd_step(adapters, losses, integrator, optimizer):
    optimizer.zero_grad()
    sum(loss(adapter) for adapter, loss in zip(adapters, losses, strict=True)).backward()
    optimizer.step()
    integrator.step(optimizer)


@pytest.mark.parametrize(
    ("m", "n", "r", "R"), [(12, 9, 3, 6), (9, 12, 3, 6), (40, 5, 2, 5), (5, 40, 5, 5), (1, 6, 1, 1)]
)
@pytest.mark.parametrize("zero_S", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("count", [1, 3])
def test_one_sgd_step_is_the_truncated_projected_gradient_step(m, n, r, R, zero_S, tau, count):
    """Algorithm 1 with SGD is truncate(W - lr P(W) G), for one adapter and for several of one shape."""
    model = nn.Sequential(*(nn.Linear(n, m, bias=False, dtype=torch.float64) for _ in range(count)))
    for layer in model:
        nn.init.zeros_(layer.weight)
    adapters = list(inject_adapters(model, AdapterConfig(init_rank=r, max_rank=R, probes=0)).values())
    integrator = RankAdaptiveIntegrator(model, tau=tau)
    targets = [torch.randn(m, n).double() for _ in adapters]
    expected = []
    for adapter, target in zip(adapters, targets, strict=True):
        U, V = orthonormal(m, r), orthonormal(n, r)
        sigma = torch.zeros(r).double() if zero_S else torch.rand(r).double().sort(descending=True).values
        set_point(adapter, U, sigma, V)
        W = (U * sigma) @ V.T
        stepped = W - 0.3 * tangent_projection(W - target, U, V)
        expected.append(best_within_tau(stepped, tau, R))
    optimizer = torch.optim.SGD([p for a in adapters for p in (a.K, a.L)], lr=0.3)
    sgd_step(adapters, [lambda a, t=t: quadratic(a, t) for t in targets], integrator, optimizer)
    for adapter, W in zip(adapters, expected, strict=True):
        close(adapter.delta_weight().detach(), W, within=EXACT)
        assert adapter.rank == max(1, int(torch.linalg.matrix_rank(W, atol=1e-10)))


SPECTRUM = torch.tensor([10, 5, 2, 1, 0.5, 0.1]).double()


def recover(count, init_rank, probes, steps):
    """Loss and rank of as many adapters, each with a random start and target: a model of many is retracted at once."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False, dtype=torch.float64) for _ in range(count)))
    config = AdapterConfig(init_rank=init_rank, max_rank=16, probes=probes)
    adapters = list(inject_adapters(model, config).values())
    integrator = RankAdaptiveIntegrator(model, tau=1e-3)
    targets = [(orthonormal(128, 6) * SPECTRUM) @ orthonormal(128, 6).T for _ in adapters]
    optimizer = torch.optim.SGD([p for a in adapters for p in (a.K, a.L)], lr=0.5)
    for _ in range(steps):
        sgd_step(adapters, [lambda a, t=t: quadratic(a, t) for t in targets], integrator, optimizer)
    integrator.retract(optimizer)
    return [(float(quadratic(a, t).detach()), a.rank) for a, t in zip(adapters, targets, strict=True)]


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("init_rank", [4, 8, 16])
def test_matrix_recovery(init_rank, probes):
    for loss, rank in recover(20, init_rank, probes, steps=40):
        assert loss < 1e-9
        assert rank == 6


def test_matrix_recovery_from_rank_1_needs_probes():
    """Without them the rank doubles at most, and directions outside of both bases are not seen at all."""
    ends = {probes: recover(20, 1, probes, steps=60) for probes in (0, 2)}
    assert all(loss < 1e-9 and rank == 6 for loss, rank in ends[2])
    assert sum(loss < 1e-9 for loss, _ in ends[0]) < 15


def test_the_rank_doubles_while_every_step_brings_new_directions():
    _, adapter, integrator = one_layer(160, 150, 1, 64, tau=0.0, probes=0)
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.5)
    ranks = []
    for _ in range(6):
        target = torch.randn(160, 150).double()
        sgd_step([adapter], [lambda a, t=target: quadratic(a, t)], integrator, optimizer)
        ranks.append(adapter.rank)
    assert ranks == [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("tau", [0.0, 0.05, 0.2])
def test_every_sgd_step_descends_by_the_bound(fraction, tau, probes):
    """f(W+) <= f(W) - lr (1 - lr L / 2) |P G|^2 + |grad f(W*)| e + L / 2 e^2, e the truncation error at W*."""
    inputs, labels = torch.randn(60, 10).double(), torch.randint(0, 8, (60,))
    smoothness = float(torch.linalg.matrix_norm(inputs, 2) ** 2 / 60 / 2)  # of the mean cross-entropy in W
    _, adapter, integrator = one_layer(8, 10, 2, 6, tau=tau, probes=probes)
    lr = fraction / smoothness
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=lr)

    def f(W):
        return nn.functional.cross_entropy(inputs @ W.T, labels)

    def with_gradient(W):
        W = W.detach().requires_grad_()
        loss = f(W)
        return loss.item(), torch.autograd.grad(loss, W)[0]

    losses = []
    for _ in range(40):
        W = adapter.delta_weight().detach()
        U, V = (b.detach()[:, probes : probes + adapter.rank] for b in (adapter.U, adapter.V))
        loss, G = with_gradient(W)
        PG = tangent_projection(G, U, V)
        intermediate = W - lr * PG
        sgd_step([adapter], [lambda a: f(a.delta_weight())], integrator, optimizer)
        stepped = adapter.delta_weight().detach()
        error = (stepped - intermediate).norm()
        slope = with_gradient(intermediate)[1].norm()
        bound = -lr * (1 - lr * smoothness / 2) * PG.norm() ** 2 + slope * error + smoothness / 2 * error**2
        assert f(stepped) <= loss + bound + rounding(torch.float64, inputs.numel()) * loss
        losses.append(loss)
    assert losses[-1] < 0.9 * losses[0]


def test_first_order_accuracy_against_the_dense_gradient_flow():
    U, V = orthonormal(20, 2), orthonormal(15, 2)
    target = (orthonormal(20, 3) * torch.tensor([3.0, 2.0, 1.0]).double()) @ orthonormal(15, 3).T
    start = (U * torch.tensor([2.0, 1.0]).double()) @ V.T
    exact = target + math.exp(-1.0) * (start - target)
    errors = []
    for steps in (20, 40, 80, 160):
        _, adapter, integrator = one_layer(20, 15, 2, 10, tau=0.0)
        set_point(adapter, U, torch.tensor([2.0, 1.0]).double(), V)
        optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=1 / steps)
        for _ in range(steps):
            sgd_step([adapter], [lambda a: quadratic(a, target)], integrator, optimizer)
        errors.append((adapter.delta_weight().detach() - exact).norm().item())
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.3


def test_the_step_does_not_depend_on_small_singular_values():
    target = torch.randn(12, 9).double()
    U, V = orthonormal(12, 3), orthonormal(9, 3)
    after = []
    for small in (1e-10, 0.0):
        _, adapter, integrator = one_layer(12, 9, 3, 6, tau=0.0)
        set_point(adapter, U, torch.tensor([1.0, small, small]).double(), V)
        optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.1)
        sgd_step([adapter], [lambda a: quadratic(a, target)], integrator, optimizer)
        after.append(adapter.delta_weight().detach())
    assert (after[0] - after[1]).norm() < 1e-9  # the starts are some 1e-10 apart


@pytest.mark.slow
@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize(
    ("settings", "optimizer_class"),
    [
        ({"tau": 0.1}, torch.optim.AdamW),
        ({"tau": 0.3, "adapt_every": 7}, torch.optim.AdamW),
        ({"tau": 0.02, "budget": 200}, torch.optim.AdamW),
        ({"tau": 0.1}, RiemannianAdam),
    ],
)
def test_a_thousand_steps_with_weight_decay(settings, optimizer_class, probes):
    """Bases stay orthonormal, unused columns zero, and no retraction moves the update more than it may."""
    model = nn.Sequential(
        nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 10), nn.Tanh(), nn.Linear(10, 14), nn.Linear(14, 3)
    )
    config = AdapterConfig(
        init_rank=2, max_rank=4, target_modules=["0", "2", "4"], modules_to_save=["5"], probes=probes
    )
    adapters = inject_adapters(model, config)
    integrator = RankAdaptiveIntegrator(model, **settings)
    if optimizer_class is RiemannianAdam:
        optimizer = RiemannianAdam(model, lr=0.05, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    teacher, generator = torch.randn(10, 3), torch.Generator().manual_seed(0)
    binding = 0
    for _ in range(1000):
        x = torch.randn(16, 10, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        optimizer.step()
        decay = dict(integrator._watch.decay)
        pending = {}
        for name, layer in adapters.items():
            factors = without_probes(*(getattr(layer, name).detach() for name in FACTORS))
            U, S, V, K, L = (factor.double() for factor in factors)
            pending[name] = U @ (decay[name] * S) @ V.T + K @ V.T + U @ L.T
        if not integrator.step(optimizer):
            continue
        for name, layer in adapters.items():
            after, before = layer.delta_weight().detach().double(), pending[name]
            assert is_orthonormal(layer.U)
            assert is_orthonormal(layer.V)
            for f in (layer.U, layer.V, layer.K, layer.L):
                assert torch.count_nonzero(f[:, layer.probes + layer.rank :]) == 0
            error = (after - before).norm()
            kept = int((layer.S.diagonal() != 0).sum())  # beside the directions that are new
            best = (best_of_rank(before, kept) - before).norm()
            slack = rounding(torch.float32, before.numel()) * before.norm()
            assert error <= best + slack
            free = layer.rank < layer.max_rank and settings.get("budget") is None
            binding += not free
            assert not free or error <= settings["tau"] * before.norm() + slack
    every = settings.get("adapt_every", 1)  # 7 is reached after 1, 2, 4 and 8 steps
    assert integrator.adaptations == (1000 if every == 1 else 4 + (1000 - 8) // 7)
    assert binding or settings.get("budget") is None


@pytest.mark.parametrize("probes", [0, 2])
def test_padding_does_not_change_the_run(probes):
    """max_rank allocates; while it does not bind, it changes nothing."""
    m, n, finals = 40, 30, []
    U, V = orthonormal(m, 2), orthonormal(n, 2)
    target = (orthonormal(m, 2) * torch.tensor([2.0, 1.0]).double()) @ orthonormal(n, 2).T
    for R in (6, 9):
        _, adapter, integrator = one_layer(m, n, 2, R, tau=0.2, probes=probes)
        torch.manual_seed(0)  # for the probes
        set_point(adapter, U, torch.tensor([1.0, 0.5]).double(), V)
        assert torch.equal(adapter.U[:, probes:], padded(U, R))
        optimizer = RiemannianAdam([{"params": [adapter.K, adapter.L], "adapters": True}], lr=0.05)
        for _ in range(30):
            sgd_step([adapter], [lambda a: quadratic(a, target)], integrator, optimizer)
            assert adapter.rank < 6
        finals.append(adapter.delta_weight().detach())
    close(finals[0], finals[1], within=RUN, beside=target)
