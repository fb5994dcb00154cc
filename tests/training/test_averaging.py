"""The mean of low-rank updates against the mean of dense matrices in float64."""

import pytest
import torch
from tolerance import EXACT, close, is_orthonormal
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.training import averaging
from geolora_pl.training.averaging import RunningMean

DECAY = 0.8


def build(max_rank, probes=2, embedding=False):
    torch.manual_seed(0)
    first = nn.Embedding(9, 9, padding_idx=0) if embedding else nn.Linear(9, 9)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(9, 7), nn.Linear(7, 2)).double()
    inject_adapters(
        model,
        AdapterConfig(
            init_rank=2, max_rank=max_rank, probes=probes, target_modules=["0", "2"], modules_to_save=["3"], alpha=0.5
        ),
    )
    return model


def steps(model, integrator, optimizer, count):
    """Optimizer steps, one after the other, each with its retraction where it is time."""
    generator = torch.Generator().manual_seed(1)
    embeds = isinstance(model[0].base, nn.Embedding)
    for _ in range(count):
        x = torch.randn(8, 9, generator=generator).double()
        y = torch.randn(8, 2, generator=generator).double()
        if embeds:
            x = torch.randint(9, (8,), generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        integrator.step(optimizer)
        yield


def dense_of(mean, model):
    """What the averaged factors multiply out to, and the head, by name."""
    values = {id(tensor): value for tensor, value in mean.values()}
    dense = {}
    for name, layer in find_adapters(model).items():
        U, S, V, K, L = (values[id(getattr(layer, factor))] for factor in ("U", "S", "V", "K", "L"))
        assert not K.any()
        assert not L.any()
        assert is_orthonormal(U)
        assert is_orthonormal(V)
        assert int((U != 0).any(0).sum()) == layer.rank
        p = layer.probes
        dense[name] = layer.scaling * U[:, p:] @ S @ V[:, p:].mT
    return dense, values[id(model[3].weight)]


def cut(matrix, rank):
    """The best approximation of a rank, and the norm of what it leaves out."""
    P, sigma, Qh = torch.linalg.svd(matrix)
    return P[:, :rank] @ sigma[:rank].diag() @ Qh[:rank], float(sigma[rank:].square().sum().sqrt())


@pytest.mark.parametrize("probes", [0, 2])
def test_without_truncation_the_mean_is_that_of_the_dense_matrices(probes):
    """At full rank nothing is left out, whatever the bases do between the steps."""
    model = build(max_rank=9, probes=probes)
    integrator = RankAdaptiveIntegrator(model, tau=0.0, min_rank=9, adapt_every=3)
    optimizer = RiemannianAdam(model, lr=0.05, weight_decay=0.1)
    mean = RunningMean(integrator, {"head": (model[3], "weight")})
    dense, head = {}, None
    for _ in steps(model, integrator, optimizer, 20):
        mean.update(DECAY)
        for name, layer in find_adapters(model).items():
            now = layer.delta_weight().detach()
            dense[name] = DECAY * dense[name] + (1 - DECAY) * now if name in dense else now
        head = model[3].weight.detach().clone() if head is None else head.lerp_(model[3].weight.detach(), 1 - DECAY)
    assert integrator.adaptations > 5
    found, found_head = dense_of(mean, model)
    assert min(integrator.ranks().values()) == 7
    for name, matrix in found.items():
        close(matrix, dense[name], within=EXACT)
    close(found_head, head, within=EXACT)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("embedding", [False, True])
def test_truncation_is_that_of_dense_matrices_and_bounded_by_what_it_drops(every, embedding):
    """The mean follows a dense one that is cut to max_rank where bases have changed, and to the rank at the end."""
    model = build(max_rank=3, embedding=embedding)
    integrator = RankAdaptiveIntegrator(model, tau=0.2, adapt_every=4)
    optimizer = RiemannianAdam(model, lr=0.05)
    mean = RunningMean(integrator, {"head": (model[3], "weight")})
    dense, exact, dropped, moves = {}, {}, {}, 0
    for step, _ in enumerate(steps(model, integrator, optimizer, 30)):
        if step % every:
            continue
        mean.update(DECAY)
        for name, layer in find_adapters(model).items():
            now = layer.delta_weight().detach()
            if name not in dense:
                dense[name], exact[name], dropped[name], moves = now, now, 0.0, integrator.adaptations
                continue
            if integrator.adaptations != moves:
                dense[name], tail = cut(dense[name], 3)
                dropped[name] += tail
            dense[name] = DECAY * dense[name] + (1 - DECAY) * now
            exact[name] = DECAY * exact[name] + (1 - DECAY) * now
            dropped[name] *= DECAY
        moves = integrator.adaptations
    found, _ = dense_of(mean, model)
    for name, layer in find_adapters(model).items():
        expected, tail = cut(dense[name], layer.rank)
        close(found[name], expected, within=EXACT, beside=dense[name])
        bound = dropped[name] + tail
        assert float((found[name] - exact[name]).norm()) <= bound + EXACT * float(exact[name].norm())
    if embedding:
        values = {id(tensor): value for tensor, value in mean.values()}
        assert not values[id(model[0].V)][0].any()


def test_a_mean_in_half_precision_moves_by_less_than_its_rounding():
    """With decay 0.999 a step of the mean is below the rounding of bfloat16, which would stop it."""
    model = build(max_rank=3)
    head = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    mean = RunningMean(RankAdaptiveIntegrator(model), {"head": (nn.ParameterList([head]), "0")})
    mean.update(0.999)
    head.data += 1
    for _ in range(500):
        mean.update(0.999)
    ((_, value),) = [pair for pair in mean.values() if pair[0] is head]
    assert value.dtype == torch.bfloat16
    close(value.float(), torch.full((2,), 2 - 0.999**500), within=2**-8)


def test_a_buffer_with_infinities_keeps_them_until_it_changes():
    """A user's model has a mask of zeros and -inf as a buffer, and the least value so far in another."""
    mask, least = torch.full((3, 3), -torch.inf).triu(1), torch.tensor([torch.inf, 1.0])
    expected, buffers = mask.clone(), nn.Module()
    buffers.register_buffer("mask", mask)
    buffers.register_buffer("least", least)
    mean = RunningMean(
        RankAdaptiveIntegrator(build(max_rank=3)), {"mask": (buffers, "mask"), "least": (buffers, "least")}
    )
    mean.update(DECAY)
    mean.update(DECAY)
    least.copy_(torch.tensor([3.0, 0.0]))
    mean.update(DECAY)
    values = {id(tensor): value for tensor, value in mean.values()}
    assert torch.equal(values[id(mask)], expected)
    close(values[id(least)], torch.tensor([3.0, DECAY]))


def test_a_mean_that_is_interrupted_while_bases_change_is_whole(monkeypatch):
    """A user presses Ctrl-C, and the checkpoint that is written then has the mean up to that step."""
    model = build(max_rank=9)
    integrator = RankAdaptiveIntegrator(model, tau=0.0, min_rank=9, adapt_every=3)
    mean = RunningMean(integrator, {"head": (model[3], "weight")})
    walk = steps(model, integrator, RiemannianAdam(model, lr=0.05), 9)
    while integrator.adaptations < 4:
        expected = dense_of(mean, model)[0] if mean.started else None
        next(walk)
        if integrator.adaptations < 4:
            mean.update(DECAY)
    copy = averaging.foreach_copy_

    def interrupted(to, of):
        monkeypatch.setattr(averaging, "foreach_copy_", copy)
        raise KeyboardInterrupt

    monkeypatch.setattr(averaging, "foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.update(DECAY)
    for name, matrix in dense_of(mean, model)[0].items():
        close(matrix, expected[name], within=EXACT)


def test_a_state_continues_to_the_bit_and_refuses_another_model():
    model = build(max_rank=3)
    integrator = RankAdaptiveIntegrator(model, tau=0.2, adapt_every=4)
    mean, again = (RunningMean(integrator, {"head": (model[3], "weight")}) for _ in range(2))
    assert mean.state_dict() == {}
    again.load_state_dict({})
    for _ in steps(model, integrator, RiemannianAdam(model, lr=0.05), 7):
        mean.update(DECAY)
    again.load_state_dict(mean.state_dict())
    for _ in steps(model, integrator, RiemannianAdam(model, lr=0.05), 7):
        mean.update(DECAY)
        again.update(DECAY)
    for (_, one), (_, two) in zip(mean.values(), again.values(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"head is averaged in this run and not in that of the checkpoint"):
        RunningMean(integrator, {}).load_state_dict(mean.state_dict())
