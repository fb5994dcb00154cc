import copy
import io
import pickle
import weakref

import pytest
import torch
from reference import orthonormal, padded, tangent_projection
from tolerance import close, is_orthonormal, largest, rounding
from torch import nn
from torch.utils.checkpoint import checkpoint
from trained import trained

from geolora_pl import AdapterConfig, GeoLoRALinear, inject_adapters
from geolora_pl.adapters.base import FACTORS, adapter_of
from geolora_pl.math.decomposition import without_probes

CONFIG = AdapterConfig(init_rank=3, max_rank=5)


def of_the_point(layer):
    """The factors without the columns of the probes."""
    return without_probes(*(getattr(layer, name).detach() for name in FACTORS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_at_the_start_is_the_base_to_the_bit(dtype, bias):
    base = nn.Linear(7, 6, bias=bias, dtype=dtype)
    x = torch.randn(4, 3, 7, dtype=dtype)
    expected = base(x)
    assert torch.equal(GeoLoRALinear(base, CONFIG)(x), expected)


@pytest.mark.parametrize("probes", [0, 2])
def test_shapes_ranks_and_zero_columns(probes):
    layer = GeoLoRALinear(nn.Linear(7, 6), AdapterConfig(init_rank=3, max_rank=5, probes=probes))
    whole, filled = probes + 5, probes + 3
    assert [tuple(getattr(layer, f).shape) for f in "USVKL"] == [(6, whole), (5, 5), (7, whole), (6, whole), (7, whole)]
    assert {f for f in "USVKL" if getattr(layer, f).requires_grad} == {"K", "L"}
    assert (layer.rank, layer.max_rank, layer.probes) == (3, 5, probes)
    for basis in (layer.U, layer.V):
        assert is_orthonormal(basis)
        assert basis[:, :filled].any(0).all()
        assert torch.count_nonzero(basis[:, filled:]) == 0
    assert not list(layer.buffers())


@pytest.mark.parametrize("probes", [0, 2])
def test_ranks_are_cut_to_the_layer(probes):
    layer = GeoLoRALinear(nn.Linear(40, 2), AdapterConfig(init_rank=4, max_rank=16, probes=probes))
    assert (layer.rank, layer.max_rank) == (2, 2)
    assert is_orthonormal(layer.U)
    assert torch.count_nonzero(layer.U[:, :probes]) == 0, "there is no room for a probe"


def test_probes_that_find_no_room_stay_zero():
    layer = GeoLoRALinear(nn.Linear(40, 4), AdapterConfig(init_rank=3, max_rank=4))
    for basis in (layer.U, layer.V):
        assert is_orthonormal(basis)
        assert (basis != 0).any(0).tolist() == [False, True, True, True, True, False]


def test_forward_and_delta_weight_agree_with_the_dense_sum():
    layer = trained(GeoLoRALinear(nn.Linear(7, 6).double(), AdapterConfig(init_rank=3, max_rank=5, alpha=0.5)))
    U, S, V, K, L = of_the_point(layer)
    delta = 0.5 * (U @ S @ V.T + K @ V.T + U @ L.T)
    close(layer.delta_weight(), delta)
    close(layer.weight, layer.base.weight + delta)
    x = torch.randn(4, 7).double()
    close(layer(x), nn.functional.linear(x, layer.base.weight + delta, layer.base.bias))


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_gradients_are_the_riemannian_gradient_in_tangent_coordinates(alpha, probes):
    config = AdapterConfig(init_rank=3, max_rank=5, alpha=alpha, probes=probes)
    layer = GeoLoRALinear(nn.Linear(7, 6).double(), config)
    x, target = torch.randn(9, 7).double(), torch.randn(9, 6).double()
    y = layer(x)
    (y - target).square().sum().backward()
    G = 2 * (y - target).detach().T @ x
    U, _, V, *_ = of_the_point(layer)
    close(layer.K.grad, alpha * G @ layer.V.detach())
    close(layer.L.grad, alpha * (torch.eye(7) - V @ V.T) @ G.T @ layer.U.detach())
    xi = layer.K.grad[:, probes:] @ V.T + U @ layer.L.grad[:, probes:].T
    close(xi, alpha * tangent_projection(G, U, V))
    for gradient in (layer.K.grad, layer.L.grad):
        assert torch.count_nonzero(gradient[:, probes + 3 :]) == 0


def test_casting_never_rounds_the_factors():
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    before = {f: getattr(layer, f).clone() for f in "USVKL"}
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        cast(layer)
        for f, value in before.items():
            assert getattr(layer, f).dtype == torch.float32
            assert torch.equal(getattr(layer, f), value)
    assert layer.base.weight.dtype == torch.float32
    layer.half()
    assert layer.base.weight.dtype == torch.float16
    layer.double()
    assert layer.U.dtype == torch.float64


def test_a_float64_base_gets_float64_factors_and_a_half_base_float32():
    assert GeoLoRALinear(nn.Linear(4, 4, dtype=torch.float64), CONFIG).U.dtype == torch.float64
    assert GeoLoRALinear(nn.Linear(4, 4, dtype=torch.float16), CONFIG).U.dtype == torch.float32


def test_gradients_survive_a_cast():
    layer = GeoLoRALinear(nn.Linear(7, 6), CONFIG)
    layer(torch.randn(2, 7)).sum().backward()
    gradient = layer.K.grad.clone()
    layer.bfloat16()
    assert torch.equal(layer.K.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_runs_in_its_precision(dtype):
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG)).to(dtype)
    y = layer(torch.randn(2, 7, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.K.grad.dtype == torch.float32


def test_autocast():
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    x = torch.randn(2, 7)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.L.grad.dtype == torch.float32
    close(y.float(), exact, within=rounding(torch.bfloat16, 1))  # the sums themselves are in float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = nn.Sequential(*(trained(GeoLoRALinear(nn.Linear(6, 6), CONFIG)) for _ in range(2)))
    x = torch.randn(3, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(actual) == len(expected) == 4
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


def test_the_rank_travels_with_the_state_dict():
    source, target = (trained(GeoLoRALinear(nn.Linear(7, 6), AdapterConfig(init_rank=r, max_rank=5))) for r in (4, 1))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert target.rank == 4
    x = torch.randn(3, 7)
    assert torch.equal(target(x), source(x))


def test_loading_with_assign_keeps_the_factors_wide():
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    rounded = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(rounded, assign=True)
    assert {getattr(layer, f).dtype for f in "USVKL"} == {torch.float32}
    assert [f for f in "USVKL" if getattr(layer, f).requires_grad] == ["K", "L"]


def test_projection_and_delta_weight_are_exact_inside_autocast():
    layer = trained(GeoLoRALinear(nn.Linear(40, 30), AdapterConfig(init_rank=8)))
    exact = layer.delta_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta_weight(), exact)
        layer(torch.randn(20, 40)).square().sum().backward()
    assert largest(of_the_point(layer)[2].T @ layer.L.grad) < rounding(torch.float32) * largest(layer.L.grad)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_deepcopy_and_pickle(copy_of):
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    twin = copy_of(layer)
    x = torch.randn(3, 7)
    assert torch.equal(twin(x), layer(x))
    assert twin.rank == layer.rank
    with torch.no_grad():
        twin.K.zero_()
    assert torch.count_nonzero(layer.K) > 0


def test_dropout_acts_on_the_adapter_alone():
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), AdapterConfig(init_rank=3, max_rank=5, dropout=0.5)))
    x = torch.randn(200, 7)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    with torch.no_grad():
        for f in (layer.S, layer.K, layer.L):
            f.zero_()
    layer.train()
    assert torch.equal(layer(x), layer.base(x))


def test_train_bias():
    layer = GeoLoRALinear(nn.Linear(7, 6), AdapterConfig(train_bias=True))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"K", "L", "base.bias"}


def test_meta_device():
    with torch.device("meta"):
        layer = GeoLoRALinear(nn.Linear(7, 6), CONFIG)
    layer.to_empty(device="cpu")
    layer.load_state_dict(trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG)).state_dict())
    assert layer.rank == 3


def test_no_recompile_and_no_graph_break_when_the_rank_changes(graphs):
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x = torch.randn(3, 7)
    close(compiled(x), layer(x))
    with torch.no_grad():
        layer.U[:, layer.probes :] = padded(orthonormal(6, 4, torch.float32), 5)
    layer.rank = 4
    close(compiled(x), layer(x))
    assert len(graphs) == 1


def test_no_graph_break_and_one_more_compilation_for_all_other_sizes_of_a_batch(graphs):
    """On one side of the rule for merging. From the second size on the compiler takes T for a symbol."""
    layer = trained(GeoLoRALinear(nn.Linear(7, 6), CONFIG))
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for rows in (64, 40, 33, 56):
        x = torch.randn(rows, 7, requires_grad=True)
        y, expected = compiled(x), layer(x)
        close(y, expected)
        for of_y, of_expected in zip(
            *(torch.autograd.grad(z.square().sum(), (x, layer.K, layer.L)) for z in (y, expected)), strict=True
        ):
            close(of_y, of_expected)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_rank": 0}, "init_rank=0 must be a whole number of at least 1"),
        ({"init_rank": 2.5}, "init_rank=2.5 must be"),
        ({"max_rank": -1}, "max_rank=-1 must be"),
        ({"max_rank": True}, "max_rank=True must be"),
        ({"init_rank": 8, "max_rank": 4}, "init_rank=8 is above max_rank=4"),
        ({"train_bias": "some"}, "train_bias='some' must be"),
        ({"alpha": 0.0}, "alpha=0.0 must be"),
        ({"alpha": float("nan")}, "alpha=nan must be"),
        ({"dropout": 1.0}, "dropout=1.0 must lie"),
        ({"dropout": -0.1}, "dropout=-0.1 must lie"),
        ({"target_modules": []}, "target_modules=.* is empty"),
        ({"modules_to_save": "head"}, "modules_to_save='head' must be a list"),
        ({"modules_to_save": None}, "modules_to_save=None must be a list"),
        ({"target_modules": "*qkv"}, r"target_modules='\*qkv' is not a regular expression: nothing to repeat"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern='\(' is not a regular expression"),
        ({"rank_pattern": ["query"]}, r"rank_pattern=\['query'\] must map"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0 must be"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)


def test_factors_know_their_adapter_and_only_the_one_that_has_them():
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = inject_adapters(model)["0"]
    old = adapter.K
    assert adapter_of(adapter.K) is adapter_of(adapter.L) is adapter
    assert adapter_of(adapter.U) is adapter_of(adapter.base.weight) is adapter_of(torch.zeros(2)) is None
    assert adapter_of(copy.deepcopy(adapter.K)) is None, "a copy of a parameter alone"
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert adapter_of(adapter.K) is adapter
    assert adapter_of(old) is None, "it has been replaced"
    assert adapter_of(model.to_empty(device="meta")[0].K) is adapter


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_factors_of_a_copy_know_the_copy(copied):
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapters(model)
    other = copied(model)
    assert adapter_of(other[0].K) is adapter_of(other[0].L) is other[0]
    assert adapter_of(model[0].K) is model[0]


def test_an_adapter_is_freed_with_its_last_name_and_its_factors_are_saved_as_plain_parameters(tmp_path):
    adapter = GeoLoRALinear(nn.Linear(6, 5), AdapterConfig())
    K, gone = adapter.K, weakref.ref(adapter)
    torch.save({"K": K}, tmp_path / "factors.pt")
    loaded = torch.load(tmp_path / "factors.pt", weights_only=True)["K"]
    assert torch.equal(loaded, K)
    assert adapter_of(loaded) is None
    del adapter
    assert gone() is None
    assert adapter_of(K) is None
