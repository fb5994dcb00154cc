"""Retractions find the directions that the gradient asks for outside of the bases, and let go of what is not needed."""

import pytest
import timm
import torch
from reference import one_layer, orthonormal, set_point
from tolerance import EXACT, close, is_orthonormal
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters


def cosine(basis, vector):
    """How much of a unit vector lies in the span of a basis."""
    return float((basis.T @ vector).norm())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("probes", [0, 2])
def test_a_direction_outside_of_both_bases_is_found_within_two_retractions(seed, probes):
    torch.manual_seed(seed)
    U, V = orthonormal(60, 3), orthonormal(40, 3)
    sigma = torch.tensor([2.0, 1.0, 1.0]).double()
    _, adapter, integrator = one_layer(60, 40, 2, 8, tau=0.1, probes=probes)
    set_point(adapter, U[:, :2], sigma[:2], V[:, :2])
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * (adapter.delta_weight() - (U * sigma) @ V.T).square().sum()).backward()
        optimizer.step()
        integrator.step(optimizer)
    found = [cosine(basis.detach()[:, probes:], planted[:, 2]) for basis, planted in ((adapter.U, U), (adapter.V, V))]
    if probes:
        assert adapter.rank == 3
        assert min(found) > 0.95
    else:
        assert adapter.rank == 2
        assert max(found) < EXACT


def test_what_a_transformer_asks_for_most_outside_of_both_bases_is_found_within_two_retractions():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, embed_dim=24, depth=1, num_heads=2, num_classes=3
    ).double()
    x, labels = torch.randn(64, 1, 16, 16).double(), torch.arange(64) % 3
    config = AdapterConfig(target_modules=["blocks.0.mlp.fc1"])
    weight = model.blocks[0].mlp.fc1.weight
    (G,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), weight)
    (adapter,) = inject_adapters(model, config).values()
    p = adapter.probes
    U, V = (basis.detach()[:, p:].clone() for basis in (adapter.U, adapter.V))
    P, _, Qh = torch.linalg.svd((G - U @ U.T @ G) - (G - U @ U.T @ G) @ V @ V.T)
    integrator, optimizer = RankAdaptiveIntegrator(model), torch.optim.SGD([adapter.K, adapter.L], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        integrator.step(optimizer)
    assert cosine(adapter.U.detach()[:, p:], P[:, 0]) > 0.9
    assert cosine(adapter.V.detach()[:, p:], Qh[0]) > 0.9


@pytest.mark.parametrize("start", [1, 32])
def test_ranks_follow_a_target_whose_rank_changes_up_and_down(start):
    """With minibatches, wherever the rank starts."""
    n = 96
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, n, bias=False))
    base = model[0].weight.detach().clone()
    adapter = inject_adapters(model, AdapterConfig(init_rank=start, max_rank=32, target_modules=["0"]))["0"]
    integrator = RankAdaptiveIntegrator(model, tau=0.3, adapt_every=10)
    optimizer = RiemannianAdam(model, lr=0.3)
    for rank, error in ((3, 0.01), (8, 0.4), (2, 0.02)):
        target = 3 * orthonormal(n, rank, torch.float32) @ orthonormal(n, rank, torch.float32).T
        for _ in range(150):
            x = torch.randn(64, n)
            optimizer.zero_grad()
            (model(x) - x @ (base + target).T).square().mean().backward()
            optimizer.step()
            integrator.step(optimizer)
        assert adapter.rank in ((7, 8) if rank == 8 else (rank,))  # the last direction may not have been found yet
        assert (adapter.delta_weight() - target).norm() < error * target.norm()


@pytest.mark.parametrize("adapt_every", [1, 3])
def test_a_retraction_that_takes_in_directions_does_not_change_the_function(adapt_every):
    model = nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 40)).double()
    adapters = inject_adapters(model, AdapterConfig(max_rank=40, target_modules=["0", "2"]))
    integrator = RankAdaptiveIntegrator(model, tau=0.0, adapt_every=adapt_every)
    optimizer = torch.optim.SGD([p for layer in adapters.values() for p in (layer.K, layer.L)], lr=1.0)
    x, target = torch.randn(32, 50).double(), torch.randn(32, 40).double()
    taken_in = 0
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        before = model(x)
        if not integrator.step(optimizer):
            continue
        close(model(x), before, within=EXACT)
        new = [(layer.S.diagonal()[: layer.rank] == 0).sum() for layer in adapters.values()]
        if max(integrator.ranks().values()) == 40:
            break
        taken_in += sum(new)
        assert all(is_orthonormal(basis) for layer in adapters.values() for basis in (layer.U, layer.V))
    assert taken_in > 4
    assert integrator.truncation_error < EXACT


@pytest.mark.parametrize(("max_rank", "budget"), [(6, None), (12, 6 * 48)])
def test_at_the_limit_no_new_direction_takes_the_place_of_one_that_was_trained(max_rank, budget):
    torch.manual_seed(0)
    target = torch.randn(24, 24).double()  # of full rank
    _, adapter, integrator = one_layer(24, 24, 1, max_rank, tau=0.1, adapt_every=10, budget=budget, probes=2)
    optimizer = RiemannianAdam([{"params": [adapter.K, adapter.L], "adapters": True}], lr=0.3)
    errors = []
    for step in range(120):
        optimizer.zero_grad()
        (0.5 * (adapter.delta_weight() - target).square().sum()).backward()
        optimizer.step()
        if integrator.step(optimizer) and step > 60:
            errors.append(integrator.truncation_error)
    assert adapter.rank == 6
    assert max(errors) < 0.1  # what tau allows; a direction in use would be more


def test_an_adapter_without_a_step_keeps_what_its_probes_remember():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)).double()
    still, moving = inject_adapters(model, AdapterConfig(target_modules=["0", "1"])).values()
    integrator = RankAdaptiveIntegrator(model, tau=0.9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(16, 12).double()
    model(x).square().sum().backward()
    optimizer.step()
    integrator.step(optimizer)
    before = [factor.clone() for factor in (still.U, still.V, still.K)]
    assert still.K[:, : still.probes].any()
    optimizer.zero_grad(set_to_none=True)
    model[1](torch.randn(16, 10).double()).square().sum().backward()
    with pytest.warns(UserWarning, match="no gradient reaches the adapters 0"):
        optimizer.step()
    integrator.step(optimizer)
    assert moving.K[:, : moving.probes].any()
    for factor, same in zip((still.U, still.V, still.K), before, strict=True):
        assert torch.equal(factor, same)


def test_an_adapter_that_was_loaded_without_rank_and_probes_comes_back():
    """Nothing of it would ever have a gradient, did the next retraction not give it probes."""
    target = orthonormal(12, 2) @ orthonormal(9, 2).T
    _, adapter, integrator = one_layer(12, 9, 1, 4, tau=0.1, min_rank=0, adapt_every=2)
    adapter.load_state_dict(adapter.state_dict() | {name: torch.zeros_like(getattr(adapter, name)) for name in "USVKL"})
    assert adapter.rank == 0
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.5)

    def step():
        optimizer.zero_grad()
        loss = (adapter.delta_weight() - target).square().sum()
        loss.backward()
        optimizer.step()
        return integrator.step(optimizer), loss.item()

    assert step()[0]
    assert adapter.rank == 0
    for basis in (adapter.U, adapter.V):
        assert basis.any(0).tolist() == [True] * 2 + [False] * 4
        assert is_orthonormal(basis)
    for _ in range(40):
        _, loss = step()
    assert adapter.rank == 2
    assert loss < 0.05
