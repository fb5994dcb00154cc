"""The fused layer against the plain sum of its parts, which autograd differentiates."""

import functools

import pytest
import torch
from tolerance import NETWORK, close, largest, rounding
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from geolora_pl import AdapterConfig, GeoLoRALinear
from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.fused import pays_to_merge
from geolora_pl.adapters.registry import adapter_class_of

FEW, MANY = (3,), (4, 50)  # rows of x for a layer of 24 x 16: update beside the base, merged weight


def layer_in_training(dtype=torch.float32, bias=True, base=None, **settings):
    config = AdapterConfig(**{"init_rank": 5, "max_rank": 12, "alpha": 0.5, **settings})
    base = nn.Linear(16, 24, bias=bias, dtype=dtype) if base is None else base
    layer = adapter_class_of(base)(base, config)
    r, w = layer.rank, layer.probes + layer.rank
    with torch.no_grad():
        layer.S[:r, :r] = torch.diag(torch.rand(r)) / 4
        layer.K[:, :w].normal_().div_(8)
        layer.L[:, :w].normal_().div_(8)
    return layer


def results(forward, layer, x, dy):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(layer, x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}


@pytest.fixture(params=[1, 2])
def cores(request, monkeypatch):
    """As many in the eyes of what is tested: several take the rows in parts."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


SETTINGS = [{}, {"probes": 0}, {"bias": False}, {"train_bias": True}, {"max_rank": 40}, {"init_rank": 11}]


@pytest.mark.parametrize("rows", [(), FEW, MANY, (0,), (2, 3, 40), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_fused_and_plain_agree(rows, dtype, settings, cores):
    layer = layer_in_training(dtype, **settings)
    x, dy = torch.randn(*rows, 16, dtype=dtype), torch.randn(*rows, 24, dtype=dtype)
    fused, plain = (results(forward, layer, x, dy) for forward in (GeoLoRALinear.forward, GeoLoRALayer.forward))
    assert fused.keys() == plain.keys()
    assert {"x", "K", "L"} <= fused.keys()
    for name, value in fused.items():
        close(value, plain[name], NETWORK)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv1d_is_fused_and_agrees_with_the_plain_sum(rows, dtype):
    layer = layer_in_training(base=Conv1D(24, 16).to(dtype))
    x, dy = torch.randn(*rows, 16, dtype=dtype), torch.randn(*rows, 24, dtype=dtype)
    fused, plain = (results(forward, layer, x, dy) for forward in (type(layer).forward, GeoLoRALayer.forward))
    assert type(layer(x).grad_fn.next_functions[0][0]).__name__ == "FusedLinearBackward"
    for name, value in fused.items():
        close(value, plain[name], NETWORK)


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_low_precision_keeps_a_small_update(rows):
    """Rounded once to bfloat16, the merged weight would lose it. Rows of the base and of x cancel each other."""
    layer = layer_in_training(bias=False)
    with torch.no_grad():
        for factor in (layer.S, layer.K, layer.L):
            factor.mul_(1e-3)
        layer.base.weight[:, 1::2] = -layer.base.weight[:, ::2]
    layer.bfloat16()
    x = torch.randn(*rows, 16).bfloat16()
    x[..., 1::2] = x[..., ::2]
    update = x.float() @ layer.delta_weight().T
    for y, lost in ((layer(x), False), (x @ layer.weight.T, True)):
        assert ((y.float() - update).norm() > 0.2 * update.norm()) == lost


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
        assert ours < max(2 * theirs, 2 * torch.finfo(torch.bfloat16).eps), name


@pytest.mark.parametrize("rows", [FEW, (8,), MANY])
def test_a_penalty_on_the_gradient_of_the_input(rows, cores):
    layer = layer_in_training(torch.float64)
    found = []
    for forward in (GeoLoRALinear.forward, GeoLoRALayer.forward):
        x = torch.linspace(-1, 1, 16 * torch.Size(rows).numel()).double().view(*rows, 16).requires_grad_()
        layer.zero_grad()
        (gradient,) = torch.autograd.grad(forward(layer, x).tanh().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append([x.grad, layer.K.grad, layer.L.grad])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)
    assert largest(layer.V[:, layer.probes :].T @ found[0][2]) < rounding(torch.float64, NETWORK) * largest(found[0][2])


@pytest.mark.parametrize("rows", [(), FEW, MANY])
@pytest.mark.parametrize("bias", [True, False])
def test_what_comes_next_may_change_the_output_in_place(rows, bias):
    layer = layer_in_training(torch.float64, bias=bias)
    x, dy = torch.randn(*rows, 16).double(), torch.randn(*rows, 24).double()
    in_place, out = (
        results(lambda layer, x, relu=relu: relu(layer(x)), layer, x, dy) for relu in (torch.relu_, torch.relu)
    )
    for name, value in out.items():
        close(in_place[name], value)


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
def test_the_input_is_all_of_its_size_that_is_kept_for_the_backward(rows):
    """Beside the factors and what they are put together to."""
    layer = layer_in_training()
    own = {p.data_ptr() for p in layer.parameters()}
    x = torch.randn(*rows, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    shapes = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in own | {x.data_ptr()})
    assert shapes == [(16, 16), (24, 16)]  # [V | L] and [U S + K | U], of 8 columns each, probes included
    assert x.data_ptr() in {t.data_ptr() for t in kept}


def test_a_layer_that_is_more_than_its_weight_is_called():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class ScaledConv1D(Conv1D):
        @functools.wraps(Conv1D.forward)
        def forward(self, x):
            return 2 * super().forward(x)

    calls = []
    hooked = layer_in_training()
    hooked.base.register_forward_hook(lambda *args: calls.append("hook"))
    patched = layer_in_training()
    patched.base.forward = lambda x: calls.append("patch") or x.new_zeros(len(x), 24)
    others = [layer_in_training(base=base) for base in (Scaled(16, 24), ScaledConv1D(24, 16))]
    x = torch.randn(60, 16)
    hooked(x)
    patched(x)
    assert calls == ["hook", "patch"]
    for layer in others:
        close(layer(x), layer.base(x) + x @ layer.delta_weight().T)


def test_a_patch_of_the_class_conv1d_is_called(monkeypatch):
    layer, x, forward = layer_in_training(base=Conv1D(24, 16)), torch.randn(60, 16), Conv1D.forward
    monkeypatch.setattr(Conv1D, "forward", functools.wraps(forward)(lambda self, x: 2 * forward(self, x)))
    close(layer(x), layer.base(x) + x @ layer.delta_weight().T)


def test_conv1d_is_fused_in_a_compiled_graph_as_well(graphs):
    layer, x = layer_in_training(base=Conv1D(24, 16)), torch.randn(60, 16, requires_grad=True)
    close(torch.compile(layer, backend=graphs, fullgraph=True)(x), layer(x))
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert "autograd_function_apply" in called
    assert not any("addmm" in name or "linear" in name for name in called)  # of the plain sum


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


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("needs_x", [False, True])
def test_what_needs_no_gradient_costs_no_product_in_the_backward(rows, needs_x):
    """Of K, L and the input; what is left are the products of the others."""
    flops = {}
    for trained in ("KL", "K", "L", ""):
        layer = layer_in_training()
        for name in "KL":
            getattr(layer, name).requires_grad_(name in trained)
        y = layer(torch.randn(*rows, 16, requires_grad=needs_x))
        if y.requires_grad:
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            flops[trained] = counter.get_total_flops()
    T, w, p = torch.Size(rows).numel(), 8, 2
    of_K, of_L = 2 * T * w * (24 + 16), 2 * T * w * (24 + 16) + 4 * w * (w - p) * 16  # L: its part in the span of V out
    shared = 2 * T * w * 24 if needs_x and rows == FEW else 0  # dy U, which the gradient of the input takes as well
    assert flops["KL"] - flops["L"] == of_K
    assert flops["KL"] - flops["K"] == of_L - shared
    if needs_x:
        assert flops["K"] - flops[""] == of_K
