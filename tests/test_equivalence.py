"""The same result however a step is cut, clipped, recomputed or compiled."""

import pytest
import torch
from test_callback import ADAPTER, Foreign, loader, trainer
from tolerance import RUN, close
from torch import nn
from torch.utils.checkpoint import checkpoint

from geolora_pl import AdapterConfig, GeoLoRACallback, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.inject import find_adapters


def fit(module=None, batch_size=16, **settings):
    module = (module or Foreign()).double()
    callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=1)
    data = loader(batch_size=96, batches=1).dataset
    batches = torch.utils.data.DataLoader(data, batch_size)
    trainer(callback, max_epochs=3, precision="64-true", **settings).fit(module, batches)
    return module, callback.integrator


def assert_same(one, two):
    assert one[1].ranks() == two[1].ranks()
    for a, b in zip(find_adapters(one[0]).values(), find_adapters(two[0]).values(), strict=True):
        close(a.delta_weight(), b.delta_weight(), within=RUN)
    close(one[0].head.weight, two[0].head.weight, within=RUN)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_n_batches_equals_one_batch_n_times_as_large(parts):
    one, two = fit(), fit(batch_size=16 // parts, accumulate_grad_batches=parts)
    assert one[1].total_steps == two[1].total_steps == 18
    assert_same(one, two)


class Recomputed(Foreign):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(checkpoint(self.body, x, use_reentrant=False)), y)


def test_recomputed_activations_change_nothing():
    assert_same(fit(), fit(Recomputed()))


class ByHand(Foreign):
    """Clips by hand what Lightning is told to clip."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # K, L and head: the gradient of L is the one in the tangent space already, so this is the Riemannian norm.
        if self.clip == "norm":
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            for gradient in gradients:
                gradient.mul_(min(1.0, 0.05 / (norm.item() + 1e-6)))
        else:
            for gradient in gradients:
                gradient.clamp_(-0.01, 0.01)
        self.optimizers().step()


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.05), ("value", 0.01)])
def test_clipping_acts_on_the_riemannian_gradient(algorithm, limit):
    clipped = fit(gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert_same(clipped, fit(ByHand(algorithm)))
    with pytest.raises(AssertionError):
        assert_same(clipped, fit())


def test_code_that_reads_the_weight_is_compiled_in_one_piece():
    layer = inject_adapters(nn.Sequential(nn.Linear(6, 5)))["0"]
    read = torch.compile(lambda x: nn.functional.linear(x, layer.weight, layer.bias), backend="eager", fullgraph=True)
    x = torch.randn(3, 6)
    close(read(x), layer(x))


def test_a_compiled_model_has_the_same_losses_and_is_not_compiled_again_when_ranks_change(graphs):
    def losses(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        inject_adapters(model, AdapterConfig(target_modules=["0", "2"], init_rank=2, max_rank=6, modules_to_save=["4"]))
        integrator = RankAdaptiveIntegrator(model, tau=0.05)
        optimizer = RiemannianAdam(model)
        called = torch.compile(model, backend=graphs, fullgraph=True) if compiled else model
        values, ranks = [], {tuple(integrator.ranks().values())}
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 10, generator=generator, dtype=torch.float64)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(called(x), x[:, :3].argmax(1))
            loss.backward()
            optimizer.step()
            integrator.step(optimizer)
            values.append(loss.item())
            ranks.add(tuple(integrator.ranks().values()))
        return values, ranks

    plain, ranks = losses(compiled=False)
    values, compiled_ranks = losses(compiled=True)
    assert len(ranks) > 1
    assert compiled_ranks == ranks
    assert len(graphs) == 1
    assert values == pytest.approx(plain, rel=RUN)
