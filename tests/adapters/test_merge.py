import pytest
import torch
from tolerance import NETWORK, close, largest, rounding
from torch import nn
from transformers.pytorch_utils import Conv1D

from geolora_pl import AdapterConfig, MergedAdapters, inject_adapters, merge_adapters, remove_adapters
from geolora_pl.adapters.inject import find_adapters


def adapted(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)
    shared = nn.ModuleDict({"a": model, "again": model[0]})
    inject_adapters(shared, AdapterConfig(init_rank=3, max_rank=4))
    for layer in find_adapters(shared).values():
        layer.S.data[:3, :3].normal_()
        layer.K.data[:, : layer.probes + 3].normal_()
    return shared


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))


def test_merged_and_unmerged_logits_agree_and_the_adapters_come_back_to_the_bit():
    model = adapted()
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, model["a"](X)
    layers = find_adapters(model)
    merged = MergedAdapters(model)
    assert not find_adapters(model)
    close(model["a"](X), expected, NETWORK)
    merged.unmerge()
    assert find_adapters(model) == layers
    assert model["again"] is model["a"][0]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model["a"](X), expected)
    with pytest.raises(ValueError, match="back already"):
        merged.unmerge()


def test_a_base_of_low_precision_is_reported_in_float32_and_comes_back():
    model = adapted(torch.bfloat16)
    weight = model["a"][0].base.weight.clone()
    update = model["a"][0].delta_weight()
    with MergedAdapters(model) as merged:
        error = model["a"][0].weight.float() - (weight.float() + update)
        assert model["a"][0].weight.dtype == torch.bfloat16
        assert 0 < merged.differences["a.0"] < 10 * torch.linalg.matrix_norm(error)
        assert merged.changes.keys() == merged.differences.keys() == {"a.0", "a.2"}
    assert torch.equal(model["a"][0].base.weight, weight)
    of_float32 = MergedAdapters(wide := adapted())
    weights = largest(*(wide.get_submodule(name).weight for name in of_float32.differences))
    assert all(value < rounding(torch.float32) * weights for value in of_float32.differences.values())


def test_what_is_not_finite_is_not_merged():
    model = adapted()
    model["a"][0].S.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        MergedAdapters(model)
    assert len(find_adapters(model)) == 2


def test_an_error_inside_the_context_unmerges_too():
    model = adapted()
    with pytest.raises(RuntimeError), MergedAdapters(model):
        raise RuntimeError
    assert len(find_adapters(model)) == 2


def test_removed_adapters_leave_the_base():
    model = adapted()
    base = model["a"][0].base
    remove_adapters(model)
    assert model["a"][0] is model["again"] is base
    for act in (remove_adapters, merge_adapters, MergedAdapters):
        with pytest.raises(ValueError, match="holds no adapters"):
            act(model)


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (Conv1D(10, 12), torch.randn(7, 12)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8)),
        (nn.Embedding(20, 6, padding_idx=0), torch.arange(20)),
    ],
    ids=["Conv1D", "Conv2d", "Embedding"],
)
def test_every_kind_of_layer_is_merged_and_comes_back(base, x):
    model = nn.Sequential(base)
    weight = base.weight.clone()
    (layer,) = inject_adapters(model, AdapterConfig(init_rank=3, max_rank=4, target_modules=["0"])).values()
    layer.S.data[:3, :3].normal_()
    expected = model(x)
    with MergedAdapters(model) as merged:
        assert type(model[0]) is type(base)
        assert merged.differences["0"] < rounding(torch.float32) * largest(model[0].weight)
        close(model(x), expected, NETWORK)
    assert model[0] is layer
    assert torch.equal(layer.base.weight, weight)


def test_the_mode_that_was_set_while_the_adapters_were_merged_stays():
    """A user merged a model in training and evaluated it. Unmerged, its adapters dropped inputs in the evaluation."""
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    inject_adapters(model, AdapterConfig(dropout=0.5))
    for mode in (False, True):
        model.train(not mode)
        with MergedAdapters(model):
            model.train(mode)
        assert all(module.training == mode for module in model.modules())
