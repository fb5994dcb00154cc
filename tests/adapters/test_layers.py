"""Every kind of layer: the adapter's update is one of its weight, whatever the layout, and it merges back into it."""

import copy
import io

import pytest
import torch
from reference import tangent_projection
from tolerance import close, is_orthonormal, rounding
from torch import nn
from torch.nn import functional as F
from trained import trained
from transformers.pytorch_utils import Conv1D

from geolora_pl import (
    AdapterConfig,
    GeoLoRALayer,
    GeoLoRALinear,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    inject_adapters,
    merge_adapters,
    register_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.kinds import GeoLoRAConv1D, GeoLoRAConv2d, GeoLoRAEmbedding
from geolora_pl.storage.fingerprint import base_hash

CONFIG = AdapterConfig(init_rank=3, max_rank=5, target_modules=["0"])


class FewBits(nn.Linear):
    """A quantised layer as libraries make them: whole numbers and a scale a row, known to its forward alone."""

    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Packed(nn.Module):
    """One that has no weight of that name, and no class in common with a linear layer."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.register_buffer("qweight", torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) - 8) / 10


def images(dtype):
    return torch.randn(3, 4, 9, 8, dtype=dtype)


def ids(dtype):
    return torch.tensor([[1, 2, 2, 0], [7, 10, 3, 1]])


def vectors(dtype):
    return torch.randn(4, 3, 7, dtype=dtype)


def conv(kernel=(3, 2), **settings):
    return lambda dtype: nn.Conv2d(4, 6, kernel, dtype=dtype, **settings), images, GeoLoRAConv2d


KINDS = {
    "linear": (lambda dtype: nn.Linear(7, 6, dtype=dtype), vectors, GeoLoRALinear),
    "Conv1D": (lambda dtype: Conv1D(6, 7).to(dtype), vectors, GeoLoRAConv1D),
    "conv": conv(),
    "conv with a stride and a border": conv(stride=2, padding=1, dilation=(1, 2), padding_mode="reflect"),
    "conv of the same size": conv((3, 5), padding="same", bias=False),
    "grouped conv": conv(groups=2),
    "embedding": (lambda dtype: nn.Embedding(11, 6, dtype=dtype), ids, GeoLoRAEmbedding),
    "padded embedding": (lambda dtype: nn.Embedding(11, 6, padding_idx=2, dtype=dtype), ids, GeoLoRAEmbedding),
    "quantised": (lambda dtype: FewBits(7, 6, dtype=dtype), vectors, GeoLoRALinear),
}
every_kind = pytest.mark.parametrize(("make", "inputs", "kind"), KINDS.values(), ids=KINDS)


def adapted(base, config=CONFIG):
    model = nn.Sequential(base)
    return model, inject_adapters(model, config)["0"]


def as_matrix(layer, weight):
    """The inverse of from_matrix, by what it does to the numbers of the entries."""
    shape = layer.out_features, layer.in_features
    where = layer.from_matrix(torch.arange(weight.numel()).reshape(shape)).flatten()
    return torch.empty_like(weight).flatten().index_copy(0, where, weight.flatten()).reshape(shape)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_output_at_the_start_is_the_base_to_the_bit(make, inputs, kind, dtype):
    base, x = make(dtype), inputs(dtype)
    expected = base(x)
    model, layer = adapted(base)
    assert type(layer) is kind
    assert torch.equal(model(x), expected)
    assert model(x).dtype == expected.dtype
    assert is_orthonormal(layer.U)
    assert is_orthonormal(layer.V)


@every_kind
@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_gradients_are_the_projected_gradient_of_the_dense_weight(make, inputs, kind, alpha, probes):
    base, x = make(torch.float64), inputs(torch.float64)
    _, layer = adapted(copy.deepcopy(base), AdapterConfig(3, 5, target_modules=["0"], alpha=alpha, probes=probes))
    layer.double()  # the factors of a base without decimals are float32
    if base.weight.is_floating_point():
        dense = base.requires_grad_()
    else:
        dense = nn.Linear(7, 6, dtype=torch.float64)
        dense.weight = nn.Parameter(base.weight.double() * base.scale.double())
        dense.bias = nn.Parameter(base.bias.detach().double())
    with torch.no_grad():  # a point other than zero
        layer.S[:3, :3] = torch.randn(3, 3)
        dense.weight += layer.from_matrix(layer.delta_weight())
    dense(x).square().sum().backward()
    layer(x).square().sum().backward()
    close(layer(x), dense(x))
    G = as_matrix(layer, dense.weight.grad)
    U, V = (basis.detach()[:, probes:] for basis in (layer.U, layer.V))
    close(layer.K.grad, alpha * G @ layer.V.detach())
    close(layer.L.grad, alpha * (torch.eye(len(V)) - V @ V.T) @ G.T @ layer.U.detach())
    xi = layer.K.grad[:, probes:] @ V.T + U @ layer.L.grad[:, probes:].T
    close(xi, alpha * tangent_projection(G, U, V))
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"K", "L"}


@every_kind
def test_neither_output_nor_gradients_depend_on_what_probes_hold(make, inputs, kind):
    base, x = make(torch.float64), inputs(torch.float64)
    model, layer = adapted(base, AdapterConfig(3, 5, target_modules=["0"], dropout=0.5))
    p = layer.probes
    found = []
    for mode in (model.train, model.eval):
        mode()
        for size in (0.0, 1e6):
            torch.manual_seed(0)
            trained(layer)
            with torch.no_grad():
                layer.K[:, :p] *= size
                layer.L[:, :p] *= size
            model.zero_grad()
            torch.manual_seed(1)  # for the dropout
            y = model(x)
            y.square().sum().backward()
            assert layer.K.grad[:, :p].any()
            assert layer.L.grad[:, :p].any()
            found.append((y.detach(), layer.K.grad.clone(), layer.L.grad.clone(), layer.delta_weight().detach()))
    for without, holding in ((found[0], found[1]), (found[2], found[3])):
        assert all(torch.equal(a, b) for a, b in zip(without, holding, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("p", [1, 3])
def test_probes_see_the_gradient_outside_of_both_bases(dropout, p):
    """``K.grad`` is ``G V_p`` and ``L.grad`` is ``(I - V V^T) G^T U_p``, in the fused and in the generic path."""
    layer = trained(adapted(nn.Linear(20, 30).double(), AdapterConfig(3, 5, dropout=dropout, probes=p))[1])
    x, dy = torch.randn(50, 20).double(), torch.randn(50, 30).double()
    torch.manual_seed(1)
    seen = layer.dropout(x)
    torch.manual_seed(1)
    y = layer(x)
    assert layer._is_fusible() == (not dropout)
    y.backward(dy)
    G, U, V = dy.T @ seen, layer.U.detach(), layer.V.detach()
    close(layer.K.grad[:, :p], G @ V[:, :p])
    close(layer.L.grad[:, :p], (torch.eye(20) - V[:, p:] @ V[:, p:].T) @ G.T @ U[:, :p])


@every_kind
def test_merged_equals_unmerged_in_a_plain_layer(make, inputs, kind):
    base, x = make(torch.float32), inputs(torch.float32)
    model, layer = adapted(base)
    trained(layer)
    expected, weight = model(x), layer.weight
    before = base.weight.clone()
    change = merge_adapters(model)["0"]
    close(model(x), expected)
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight.is_contiguous()
    assert type(model[0]) is (nn.Linear if isinstance(base, FewBits) else type(base))
    assert not any(p.requires_grad for p in model.parameters())
    if before.is_floating_point():
        close(torch.tensor(change), (weight - before).norm() / before.norm())
        assert change > 0


@every_kind
def test_a_run_moves_ranks_and_pruning_gives_the_base_back(make, inputs, kind):
    base, x = make(torch.float32), inputs(torch.float32)
    expected = base(x)
    model, layer = adapted(base)
    integrator = RankAdaptiveIntegrator(model, tau=0.01, min_rank=0)
    optimizer = torch.optim.SGD([layer.K, layer.L], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        integrator.step(optimizer)
        losses.append(loss.item())
        assert is_orthonormal(layer.V)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        for factor in (layer.U, layer.S, layer.V):
            factor.zero_()
    layer.read_rank()
    assert layer.rank == 0
    assert torch.equal(model(x), expected)
    model(x).sum().backward()


@every_kind
def test_the_state_dict_carries_the_function(make, inputs, kind):
    base, x = make(torch.float32), inputs(torch.float32)
    models = [adapted(copy.deepcopy(base), AdapterConfig(r, 5, target_modules=["0"]))[0] for r in (4, 1)]
    trained(models[0][0])
    buffer = io.BytesIO()
    torch.save(models[0].state_dict(), buffer)
    buffer.seek(0)
    models[1].load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(models[1](x), models[0](x))
    assert models[1][0].rank == 4


@every_kind
def test_low_precision_and_autocast(make, inputs, kind):
    base, x = make(torch.float32), inputs(torch.float32)
    model, layer = adapted(base)
    trained(layer)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.sum().backward()
    assert layer.L.grad.dtype == torch.float32
    close(y.float(), exact, within=rounding(torch.bfloat16, 1))
    model.bfloat16()
    assert layer.U.dtype == torch.float32
    y = model(x if x.dtype == torch.long else x.bfloat16())
    assert y.dtype == torch.bfloat16
    close(y.float(), exact, within=rounding(torch.bfloat16, 1))


@every_kind
def test_dropout_acts_on_the_update_alone_and_keeps_its_mean(make, inputs, kind):
    base, x = make(torch.float32), inputs(torch.float32)
    model, layer = adapted(base, AdapterConfig(3, 5, target_modules=["0"], dropout=0.5))
    trained(layer)
    assert not torch.equal(model(x), model(x))
    copies = x.repeat(4000, *[1] * (x.dim() - 1))
    mean = model(copies).unflatten(0, (4000, -1)).mean(0)
    exact = model.eval()(x)
    assert torch.equal(model(x), exact)
    assert (mean - exact).norm() < 0.1 * (exact - base(x)).norm()


@every_kind
def test_a_base_has_one_fingerprint_with_and_without_adapters(make, inputs, kind):
    model = nn.Sequential(make(torch.float32))
    plain = base_hash(model, [])
    inject_adapters(model, CONFIG)
    assert base_hash(model, []) == plain


class OwnKind(torch.Tensor):
    """A weight whose numbers are not what it holds, as those of torchao."""

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


def conv1d_of_its_own_kind():
    layer = Conv1D(5, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OwnKind))
    return layer


def test_a_weight_that_is_a_tensor_of_its_own_kind_is_dequantised_for_fingerprint_and_merging():
    numbers, layer = torch.randn(6, 7), nn.Linear(7, 6)
    layer.weight = nn.Parameter(numbers.as_subclass(OwnKind), requires_grad=False)
    layer.forward = lambda x: F.linear(x, layer.weight.dequantize(), layer.bias)
    twin = nn.Linear(7, 6)
    twin.weight, twin.bias = nn.Parameter(2 * numbers), layer.bias
    model = nn.Sequential(layer)
    assert base_hash(model, []) == base_hash(nn.Sequential(twin), [])
    inject_adapters(model)
    merge_adapters(model)
    close(model[0].weight, twin.weight)


def test_a_row_for_padding_gets_no_update():
    base = nn.Embedding(11, 6, padding_idx=2)
    model, layer = adapted(base)
    assert torch.count_nonzero(layer.V[2]) == 0
    trained(layer)
    with torch.no_grad():
        layer.V[2, layer.probes] = 1.0  # as a retraction may leave rounding there
    assert torch.equal(model(torch.tensor([2])), base(torch.tensor([2])))
    assert torch.count_nonzero(layer.delta_weight()[:, 2]) == 0


def test_bases_and_probes_leave_out_a_row_for_padding():
    model, layer = adapted(nn.Embedding(30, 16, padding_idx=2, dtype=torch.float64))
    integrator = RankAdaptiveIntegrator(model, tau=0.01)
    optimizer = torch.optim.SGD([layer.K, layer.L], lr=0.1)
    for _ in range(5):
        assert is_orthonormal(layer.V)
        assert layer.V[:, : layer.probes].any(0).all()
        assert layer.V[2].abs().max() <= rounding(torch.float64)
        optimizer.zero_grad()
        (model(torch.arange(30)) - 1).square().mean().backward()
        optimizer.step()
        assert integrator.step(optimizer)


def test_an_optimizer_with_steps_of_one_size_leaves_the_row_for_padding_alone():
    """A user adapts an embedding with padding: rounding in that row of V was stepped along as if it were a gradient."""
    model, layer = adapted(nn.Embedding(30, 16, padding_idx=2))
    integrator, optimizer = RankAdaptiveIntegrator(model, tau=0.1), RiemannianAdam(model, lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.arange(30)) - 1).square().mean().backward()
        optimizer.step()
        assert torch.count_nonzero(layer.L[2]) == 0
        assert integrator.step(optimizer)
        assert torch.count_nonzero(layer.V[2]) == 0


def test_all_linear_takes_linear_layers_and_conv1d_and_others_are_named():
    def model():
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), Conv1D(4, 4), nn.Conv2d(4, 4, 1))

    assert list(inject_adapters(model())) == ["1", "2"]
    assert list(inject_adapters(model(), AdapterConfig(target_modules=["0", "3"]))) == ["0", "3"]
    assert list(inject_adapters(model(), AdapterConfig(target_modules="[0-2]"))) == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"matches no layer that can be adapted.*the model has 0, 1, 2, 3"):
        inject_adapters(model(), AdapterConfig(target_modules=["4"]))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "0 has max_norm=1.0.* set it to None, or leave"),
        (nn.Embedding(5, 4, sparse=True), "0 has sparse=True"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "0 has scale_grad_by_freq=True"),
        (type("Scaled", (nn.Embedding,), {"forward": lambda self, x: 2 * self.weight[x]})(5, 4), "0 is a Scaled with"),
        (conv1d_of_its_own_kind(), "0 is a Conv1D with a quantised weight: add it to exclude_modules"),
        (
            type("Standardised", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 1),
            r"0 is a Standardised with a forward of its own.*register_adapter\(Standardised",
        ),
    ],
)
def test_what_an_adapter_cannot_serve_is_refused_before_anything_changes(layer, message):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, AdapterConfig(target_modules=["1", "0"]))
    assert not find_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [["embedding"], ["embedding", "output"]])
def test_an_embedding_tied_to_an_output_is_refused_with_the_reason(targets):
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "output": nn.Linear(8, 10, bias=False)})
    model["output"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match=r"embedding shares its table with output, .*or untie it"):
        inject_adapters(model, AdapterConfig(target_modules=targets))
    model["output"].weight = nn.Parameter(model["output"].weight.clone())
    assert list(inject_adapters(model, AdapterConfig(target_modules=targets))) == targets


def test_embeddings_that_share_a_table_share_the_adapter():
    model = nn.ModuleDict({"encoder": nn.Embedding(10, 8), "decoder": nn.Embedding(10, 8)})
    model["decoder"].weight = model["encoder"].weight
    assert list(inject_adapters(model, AdapterConfig(target_modules=["encoder", "decoder"]))) == ["encoder"]
    assert model["encoder"] is model["decoder"]


def test_a_layer_without_a_weight_is_adapted_once_it_is_registered(monkeypatch):
    monkeypatch.setattr("geolora_pl.adapters.registry._ADAPTERS", {})
    model, x = nn.Sequential(Packed(7, 6)), torch.randn(5, 7)
    expected = model(x)
    with pytest.raises(ValueError, match="the model has none at all"):
        inject_adapters(model)
    register_adapter(Packed, GeoLoRALinear)
    layer = inject_adapters(model)["0"]
    assert torch.equal(model(x), expected)
    trained(layer)
    expected = model(x)
    merge_adapters(model)
    assert type(model[0]) is nn.Linear
    close(model(x), expected)


def test_a_subclass_has_the_adapter_of_its_nearest_class(monkeypatch):
    monkeypatch.setattr("geolora_pl.adapters.registry._ADAPTERS", {nn.Linear: GeoLoRALinear})
    scaled = type("Scaled", (nn.Linear,), {})
    adapter = type("OfScaled", (GeoLoRALinear,), {})
    register_adapter(scaled, adapter)
    model = nn.Sequential(scaled(4, 4), type("Further", (scaled,), {})(4, 4), nn.Linear(4, 4))
    assert [type(layer) for layer in inject_adapters(model).values()] == [adapter, adapter, GeoLoRALinear]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((GeoLoRALinear, nn.Linear), "adapter_class=.*Linear.* must be a subclass of GeoLoRALayer"),
        (("Linear", GeoLoRALinear), "layer_class='Linear' must be a subclass of Module"),
    ],
)
def test_only_layers_and_adapters_can_be_registered(classes, message):
    with pytest.raises(ValueError, match=message):
        register_adapter(*classes)


def test_biases_are_trained_where_there_are_any():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Embedding(4, 4))
    inject_adapters(model, AdapterConfig(target_modules=["0", "1"], train_bias=True))
    assert all(isinstance(layer, GeoLoRALayer) for layer in model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.K", "0.L", "0.base.bias", "1.K", "1.L"
    }  # fmt: skip
