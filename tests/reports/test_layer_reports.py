"""Reports of users on layers, optimizers and the ways out: what one did, and what must come of it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from geolora_pl import AdapterConfig, GeoLoRAWarning, MergedAdapters, inject_adapters, merge_adapters
from geolora_pl.adapters.inject import find_adapters


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has deprecated it, and models still have it
        return nn.utils.weight_norm(layer)


def pruned_bias(layer):
    return prune.l1_unstructured(layer, "bias", 0.5)


COMPUTED = {
    "weight norm": (parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
    "an orthogonal weight": (parametrizations.orthogonal, r"remove_parametrizations\(layer, 'weight'\)"),
    "weight norm of old": (old_weight_norm, "remove_weight_norm"),
    "spectral norm of old": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune.remove\(layer, 'weight'\)"),
    "a pruned bias": (pruned_bias, r"prune.remove\(layer, 'bias'\)"),
}


@pytest.mark.parametrize(("compute", "remedy"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1)], ids=["Linear", "Conv2d"])
def test_a_computed_weight_is_refused_with_the_call_that_makes_it_a_parameter(layer, compute, remedy):
    """A user adapts a model with weight norm: two layers became one, and a merge failed in the middle.

    Such layers are refused before anything changes.
    """
    model = nn.Sequential(compute(copy.deepcopy(layer)), nn.GELU(), compute(copy.deepcopy(layer)))
    with pytest.raises(ValueError, match=f"^0 computes its (weight|bias) .*{remedy}"):
        inject_adapters(model, AdapterConfig(target_modules=["0", "2"]))
    assert not find_adapters(model)
    assert model[0] is not model[2]


def test_once_made_a_parameter_the_weight_is_adapted():
    """The user follows the remedy."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.GELU())
    x = torch.randn(4, 8)
    before = model(x)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    inject_adapters(model)
    assert torch.equal(model(x), before)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: y.relu())
    return layer


def prehooked(layer):
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


MORE_THAN_ITS_WEIGHT = {
    "a subclass": lambda: Tripled(8, 6),
    "a patched layer": lambda: patched(nn.Linear(8, 6)),
    "a patched convolution": lambda: patched(nn.Conv2d(8, 6, 3, padding=2, padding_mode="reflect")),
    "a patched embedding": lambda: patched(nn.Embedding(8, 6)),
    "a hook": lambda: hooked(nn.Linear(8, 6)),
    "a pre-hook": lambda: prehooked(nn.Linear(8, 6)),
}


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MORE_THAN_ITS_WEIGHT.values(), ids=MORE_THAN_ITS_WEIGHT)
def test_a_layer_that_is_more_than_its_weight_is_not_merged(make, dtype, size):
    """A user merges a layer with a forward of its own or a hook: the outputs changed, and a difference of 0 was told.

    It is refused, also where the update is so small that rounding hides it, and the model stays adapted.
    """
    model = nn.Sequential(nn.Linear(4, 8), make()).to(dtype)
    inject_adapters(model, AdapterConfig(target_modules=["0", "1"]))
    for adapter in find_adapters(model).values():
        adapter.S.data.fill_diagonal_(size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for act in (merge_adapters, MergedAdapters):
        with pytest.raises(ValueError, match=r"^1 computes more than W x \+ b .*save_adapter"):
            act(model)
    assert list(find_adapters(model)) == ["0", "1"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_hook_on_the_adapter_and_a_late_parametrization_are_not_merged():
    """A user hooks the adapted layer, or parametrizes its base: a merge dropped the one and broke at the other."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for adapter in inject_adapters(model).values():
        adapter.S.data.fill_diagonal_(1.0)
    handle = hooked(model[1])._forward_hooks
    with pytest.raises(ValueError, match=r"^1 computes more than W x \+ b"):
        merge_adapters(model)
    handle.clear()
    parametrizations.weight_norm(model[1].base)
    with pytest.raises(ValueError, match=r"^1 computes its weight"):
        merge_adapters(model)
    assert list(find_adapters(model)) == ["0", "1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_changes_nothing_is_merged_and_the_difference_is_that_of_the_outputs(dtype):
    """A user records activations by a hook, or subclasses a layer without changing what it computes, and merges."""

    class Cast(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    model = nn.Sequential(Cast(8, 6), nn.BatchNorm1d(6)).to(dtype)
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    layer = inject_adapters(model)["0"]
    layer.S.data.fill_diagonal_(1.0)
    x = layer.sample_inputs(dtype)
    expected = model[0].eval()(x).detach()
    model[0].train()
    merged = MergedAdapters(model)
    assert merged.differences["0"] == float((model[0](x) - expected).abs().max().detach())
    assert model[0].training
    assert model[0].weight.requires_grad is False


@pytest.mark.parametrize("broken", ["1.weight", "2.running_mean"])
def test_a_trained_value_that_is_not_finite_is_not_merged(broken):
    """A user exports a run whose head became NaN as a merged model, and got it with status 0."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
    model.state_dict()[broken][0] = torch.nan
    with pytest.raises(ValueError, match=f"^{broken} is not finite, so nothing is merged"):
        merge_adapters(model)
    assert list(find_adapters(model)) == ["0"]


def test_a_lazy_layer_is_refused_with_the_remedy():
    """A user adapts a model with a LazyLinear, anywhere, and reads torch's own text."""
    for model in (nn.Sequential(nn.LazyLinear(8)), nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())):
        with pytest.raises(ValueError, match="has no shape yet: call the model once"):
            inject_adapters(model)


UNKNOWN = [nn.Conv1d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.EmbeddingBag(5, 4), nn.Bilinear(3, 4, 5), nn.LSTM(3, 4)]


@pytest.mark.parametrize("layer", UNKNOWN, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("targets", [["0"], "0"])
def test_a_kind_without_an_adapter_is_named(layer, targets):
    """A user names a Conv1d, and reads that the name matches nothing; with another layer beside it, nothing at all."""
    kind = type(layer).__name__
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"target_modules='?\[?'0'\]?.*0 is a {kind}.*register_adapter\({kind}"):
        inject_adapters(model, AdapterConfig(target_modules=targets))
    beside = nn.ModuleDict({"a": nn.ModuleDict({"0": layer}), "b": nn.ModuleDict({"0": nn.Linear(4, 4)})})
    both = targets if isinstance(targets, list) else "[ab].0"
    with pytest.warns(GeoLoRAWarning, match=f"also matches 1 layers that stay frozen: a.0 is a {kind}"):
        assert list(inject_adapters(beside, AdapterConfig(target_modules=both))) == ["b.0"]


def test_a_convolutional_model_is_told_what_to_name():
    """A user adapts a ResNet with the default, which means linear layers alone: the error has the names to give."""
    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), "conv2": nn.Conv2d(4, 4, 3), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"such as target_modules=\['conv1', 'conv2'\]"):
        inject_adapters(model)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("r", "init_rank.*max_rank"),
        ("rank", "init_rank.*max_rank"),
        ("lora_alpha", "alpha, which is lora_alpha / r"),
        ("use_rslora", "alpha, .*sqrt"),
        ("lora_dropout", "dropout"),
        ("bias", "train_bias"),
        ("lr", "lr of the optimizer"),
        ("tau", "tau of RankAdaptiveIntegrator"),
    ],
)
def test_a_setting_of_peft_is_answered_with_ours(name, remedy):
    """A user comes from PEFT and writes AdapterConfig(r=8)."""
    with pytest.raises(ValueError, match=f"^{name}=8 is not a setting of AdapterConfig: set {remedy}"):
        AdapterConfig(**{name: 8})
