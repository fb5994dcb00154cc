"""The loop at the top of docs/method.md is the package's method: the same weights and ranks, step by step."""

import pytest
import torch
from pages import ROOT, blocks
from torch import nn

from geolora_pl import AdapterConfig, RankAdaptiveIntegrator, inject_adapters

STEPS, LR = 20, 10.0


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.3])
def test_the_loop_of_the_page_takes_the_steps_of_the_package(tau):
    page = {}
    (snippet,) = blocks(ROOT / "docs" / "method.md", "python")
    exec(compile(snippet, "docs/method.md", "exec"), page)
    W0, loss = page["W0"], page["loss"]
    out_features, in_features = W0.shape
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False, dtype=W0.dtype))
    model[0].weight.data.copy_(W0)
    layer = inject_adapters(model, AdapterConfig(init_rank=2, max_rank=min(W0.shape), probes=0))["0"]
    optimizer = torch.optim.SGD([layer.K, layer.L], lr=LR)
    integrator = RankAdaptiveIntegrator(model, tau=tau, adapt_every=1)

    U, V, S = layer.U[:, :2].detach().clone(), layer.V[:, :2].detach().clone(), W0.new_zeros(2, 2)
    identity = torch.eye(in_features, dtype=W0.dtype)
    ranks = []
    for _ in range(STEPS):
        K, L = page["sgd_step"](loss, W0, U, S, V, lr=LR)
        U, S, V = page["retract"](U, S, V, K, L, tau)

        optimizer.zero_grad()
        loss(model(identity).T).backward()
        optimizer.step()
        integrator.step(optimizer)

        ranks.append(len(S))
        assert layer.rank == ranks[-1]
        assert (layer.delta_weight() - U @ S @ V.T).norm() <= 1e-10 * W0.norm()
    assert max(ranks) > 2
