"""A compiled model with adapters computes on a GPU what it computes uncompiled, with and without CUDA graphs."""

import pytest
import torch
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(120)]


def trained(mode, cast):
    """Losses of a few steps, retractions among them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=8, probes=0, modules_to_save=["4"]))
    optimizer, integrator = RiemannianAdam(model, lr=1e-2), RankAdaptiveIntegrator(model, tau=0.05, adapt_every=2)
    called = torch.compile(model, mode=mode) if mode else model
    x = torch.randn(16, 24, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    losses = []
    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast("cuda", cast, enabled=cast is not None):
            loss = nn.functional.cross_entropy(called(x), (x[:, 0] > 0).long())
        loss.backward()
        optimizer.step()
        integrator.step(optimizer)
        losses.append(loss.item())
    return losses, integrator.ranks()


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_or_not_a_run_is_the_same(mode, cast):
    losses, ranks = trained(mode, cast)
    expected, as_before = trained(None, cast)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=0.02 if cast else 1e-3)
    if cast is None:
        assert ranks == as_before
