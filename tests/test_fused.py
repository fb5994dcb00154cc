"""The fused layer against the plain sum of its parts, which autograd differentiates."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from geolora_pl import AdapterConfig, GeoLoRALinear
from geolora_pl.adapters import GeoLoRALayer
from geolora_pl.fused import pays_to_merge

FEW, MANY = (3,), (4, 50)  # rows of x for a layer of 24 x 16: update beside the base, merged weight


def layer_in_training(dtype=torch.float32, bias=True, **settings):
    config = AdapterConfig(**{"init_rank": 5, "max_rank": 12, "alpha": 0.5, **settings})
    layer = GeoLoRALinear(nn.Linear(16, 24, bias=bias, dtype=dtype), config)
    r = layer.rank
    with torch.no_grad():
        layer.S[:r, :r] = torch.diag(torch.rand(r)) / 4
        layer.K[:, :r].normal_().div_(8)
        layer.L[:, :r].normal_().div_(8)
    return layer


def results(forward, layer, x, dy):
    """Output and gradients, and those of a function of the gradient of x."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(layer, x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rows", [(), FEW, MANY, (0,), (2, 3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"train_bias": True}, {"max_rank": 40}, {"init_rank": 11}])
def test_fused_and_plain_agree(rows, dtype, settings):
    layer = layer_in_training(dtype, **settings)
    x, dy = torch.randn(*rows, 16, dtype=dtype), torch.randn(*rows, 24, dtype=dtype)
    fused, plain = (results(forward, layer, x, dy) for forward in (GeoLoRALinear.forward, GeoLoRALayer.forward))
    assert fused.keys() == plain.keys()
    assert {"x", "K", "L"} <= fused.keys()
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_low_precision_keeps_a_small_update(rows):
    """Rounded once to bfloat16, the merged weight would lose it."""
    layer = layer_in_training()
    with torch.no_grad():
        for factor in (layer.S, layer.K, layer.L):
            factor.mul_(1e-3)
    layer.bfloat16()
    x = torch.randn(*rows, 16).bfloat16()
    update = x.float() @ layer.delta_weight().T
    layer.base.weight.data.zero_()
    layer.base.bias.data.zero_()
    torch.testing.assert_close(layer(x).float(), update, rtol=0.05, atol=2e-5)
    assert not pays_to_merge(x, layer.base.weight, layer.U)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_autocast_agrees_with_the_plain_sum(rows):
    layer = layer_in_training()
    x, dy = torch.randn(*rows, 16), torch.randn(*rows, 24).bfloat16()

    def inside(forward):
        def run(layer, x):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(layer, x)

        return run

    exact = results(GeoLoRALayer.forward, layer, x, dy.float())
    fused = results(inside(GeoLoRALinear.forward), layer, x, dy)
    plain = results(inside(GeoLoRALayer.forward), layer, x, dy)
    assert fused["y"].dtype == torch.bfloat16
    assert fused["K"].dtype == fused["L"].dtype == fused["x"].dtype == torch.float32
    for name, value in exact.items():
        ours, theirs = ((found[name].float() - value).norm() / value.norm() for found in (fused, plain))
        assert ours < max(1.5 * theirs, 0.01), name


def test_second_derivatives():
    layer = layer_in_training(torch.float64)
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).tanh(), (x,))


@pytest.mark.parametrize(
    ("m", "n", "rows", "merged"), [(24, 16, 9, False), (24, 16, 10, True), (64, 64, 32, False), (64, 64, 33, True)]
)
def test_the_cheaper_form_is_taken(m, n, rows, merged):
    """By the operations that torch counts in the products of a forward."""
    layer = GeoLoRALinear(nn.Linear(n, m), AdapterConfig(init_rank=8, max_rank=8))
    x, (A, B) = torch.randn(rows, n), torch.randn(2, max(m, n), 16)
    with FlopCounterMode(display=False) as on_the_weight:
        A[:m] @ B[:n].T
    with FlopCounterMode(display=False) as beside:
        x @ B[:n] @ A[:m].T
    assert merged == (on_the_weight.get_total_flops() < beside.get_total_flops())
    assert merged == pays_to_merge(x, layer.base.weight, layer.U)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_the_input_is_all_that_is_kept_for_the_backward(rows):
    layer = layer_in_training()
    own = {p.data_ptr() for p in layer.parameters()}
    x = torch.randn(*rows, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept} - own == {x.data_ptr()}


def test_a_layer_that_is_more_than_its_weight_is_called():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    calls = []
    hooked = layer_in_training()
    hooked.base.register_forward_hook(lambda *args: calls.append("hook"))
    patched = layer_in_training()
    patched.base.forward = lambda x: calls.append("patch") or x.new_zeros(len(x), 24)
    subclass = GeoLoRALinear(Scaled(16, 24), AdapterConfig())
    x = torch.randn(60, 16)
    hooked(x)
    patched(x)
    assert calls == ["hook", "patch"]
    torch.testing.assert_close(subclass(x), subclass.base(x))


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_columns_beyond_the_live_rank_cost_nothing(rows):
    narrow, wide = (layer_in_training(init_rank=6, max_rank=columns) for columns in (8, 16))
    flops = []
    for layer in (narrow, wide):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(*rows, 16, requires_grad=True)).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert wide.K.grad.shape == wide.K.shape
