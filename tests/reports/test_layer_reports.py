"""Reports of users on layers, optimizers and the ways out: what one did, and what must come of it."""

import contextlib
import copy
import warnings

import pytest
import torch
from timm.optim import Lookahead
from tolerance import EXACT, NETWORK, close
from torch import nn
from torch.nn.utils import parametrizations, prune

from geolora_pl import (
    AdapterConfig,
    GeoLoRAWarning,
    MergedAdapters,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    export_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.storage.adapter_state import capture
from geolora_pl.storage.checkpoint import rule_of
from geolora_pl.storage.spectra import spectra
from geolora_pl.testing import check_optimizer
from geolora_pl.training import integrator as integrator_module


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
    with pytest.raises(ValueError, match=r"set target_modules to \['conv1', 'conv2'\]"):
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


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its repositories have it: an optimizer around another one."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["old_p"] = p.clone()
            p += self.param_groups[0]["rho"] * p.grad / (p.grad.norm() + 1e-12)
        with torch.enable_grad():
            loss = closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        return loss

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state):
        self.base_optimizer.load_state_dict(state)
        self.param_groups = self.base_optimizer.param_groups


class Recording(torch.optim.AdamW):
    """A subclass whose step is that of its base class and a little more."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.called = getattr(self, "called", 0) + 1
        return loss


WRAPPED = {
    "SAM": lambda p: SAM(p, torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "Lookahead": lambda p: Lookahead(torch.optim.AdamW(p, lr=0.02, weight_decay=0.1)),
    "super().step()": lambda p: Recording(p, lr=0.02, weight_decay=0.1),
}


@pytest.mark.filterwarnings("ignore:the optimizer's state lookahead_slow_buff has no known rule")
@pytest.mark.parametrize("factory", WRAPPED.values(), ids=WRAPPED)
def test_a_step_of_a_wrapped_optimizer_counts_once_and_its_moments_are_carried(factory):
    """A user wraps an optimizer: steps counted twice, S decayed twice, and the moments stayed in the old bases."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # torch then puts hooks on its own step as well
    check_optimizer(factory)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model, adapt_every=100)
    optimizer = factory([p for p in model.parameters() if p.requires_grad])

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    integrator.step(optimizer)
    for _ in range(3):
        closure()
        optimizer.step(closure)
    assert integrator.state_dict()["decay"] == dict.fromkeys(integrator.adapters, pytest.approx((1 - 0.02 * 0.1) ** 3))


def test_a_step_that_an_exception_ends_does_not_hide_the_next():
    """A user catches an error of the optimizer's step and goes on."""

    class Fails(Recording):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError
            return super().step(closure)

    model = nn.Sequential(nn.Linear(8, 6))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model, adapt_every=100)
    optimizer = Fails(p for p in model.parameters() if p.requires_grad)
    for fails in (True, False, False):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.fails = fails
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            optimizer.step()
    integrator.step(optimizer)
    assert integrator.total_steps == 3  # the first one saw its gradients, and nobody knows how far it came


def test_a_wrapper_that_divides_the_adapters_is_refused():
    """A user trains with ZeroRedundancyOptimizer, each process of which steps a part of the parameters."""

    class Divided(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            self.optim = torch.optim.AdamW(self.param_groups[0]["params"][:2])

        def step(self, closure=None):
            return self.optim.step(closure)

    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model)
    with pytest.raises(ValueError, match=r"Divided gives only some of the adapters to the AdamW .* and not 1"):
        integrator.check_optimizer(Divided(p for p in model.parameters() if p.requires_grad))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.zeros_like(p, dtype=torch.uint8), "keeps state1 for K and L as a Tensor of other values"),
        (lambda p: [torch.eye(len(p)), torch.eye(p.shape[1])], "keeps state1 for K and L as a list"),
        (lambda p: torch.eye(p.shape[1]), r"keeps state1 for K and L as \(\d+, \d+\) numbers"),
    ],
)
def test_state_that_cannot_move_is_refused_at_the_first_retraction(make, message):
    """A user trains with moments of 8 bits, or with a preconditioner for each side: they would mean something else."""

    class Keeps(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["state1"] = make(p)
            return super().step(closure)

    model = nn.Sequential(nn.Linear(8, 6))
    layer = inject_adapters(model)["0"]
    integrator = RankAdaptiveIntegrator(model)
    optimizer = Keeps((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    U = layer.U.clone()
    with pytest.raises(ValueError, match=f"^Keeps {message}.*AdamW"):
        integrator.step(optimizer)
    assert torch.equal(layer.U, U)


def test_groups_of_adapters_are_checked_as_pairs_and_when_they_are_added():
    """A user lists [K1, K2, L1, L2], or adds a group with a negative lr: both were taken."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapters(model)
    a, b = model
    for wrong in ([a.K, b.K, a.L, b.L], [a.L, a.K], [a.K, b.L], [a.K]):
        with pytest.raises(ValueError, match="side by side, K first"):
            RiemannianAdam([{"params": wrong, "adapters": True}])
    optimizer = RiemannianAdam([{"params": [a.K, a.L], "adapters": True}])
    for wrong in ({"params": [b.K, b.L], "adapters": True, "lr": -1}, {"params": [b.L, b.K], "adapters": True}):
        with pytest.raises(ValueError, match=r"lr=-1|K first"):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b.K, b.L], "adapters": True})
    assert len(optimizer.param_groups) == 2


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "forward mode": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "batched gradients": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 1)], ids=["Linear", "Conv2d"])
def test_transforms_of_torch_func_see_the_layer_as_a_plain_one(layer, transform):
    """A user takes gradients per sample, a Jacobian or a Hessian of an adapted model: torch asked for setup_context."""
    x = torch.randn(2, 5, *([1, 1] if isinstance(layer, nn.Conv2d) else []), dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(layer)).double()
    adapter = inject_adapters(model, AdapterConfig(target_modules=["0"]))["0"]
    adapter.S.data.fill_diagonal_(1.0)
    adapter.L.data.normal_()
    adapted = transform(model, x)
    merge_adapters(model)
    close(adapted, transform(model, x), within=EXACT)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_batch_of_nan_leaves_the_running_statistics_as_they_were(norm, on_device, batches, monkeypatch):
    """A batch of NaN is skipped, but the running statistics were NaN from then on, and so was every evaluation.

    With accumulated gradients a batch that was fine is taken back as well, since its gradients are not used either.
    """
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model)
    if on_device:
        monkeypatch.setattr("geolora_pl.training.steps._waits", lambda device: True)
    optimizer = RiemannianAdam(model)

    def train(*inputs):
        optimizer.zero_grad()
        for x in inputs:
            model(x).sum().backward()
        optimizer.step()
        integrator.step(optimizer)
        integrator.settle()

    train(torch.randn(3, 4))
    before = {name: buffer.clone() for name, buffer in model[1].named_buffers()}
    with pytest.warns(GeoLoRAWarning, match="skipped whole"):
        train(*[torch.randn(3, 4)] * (batches - 1), torch.full((3, 4), torch.nan))
    assert integrator.skipped_steps == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model[1].named_buffers())
    train(torch.randn(3, 4))
    assert not torch.equal(model[1].running_mean, before["running_mean"])
    assert model.eval()(torch.zeros(1, 4)).isfinite().all()


PRECISIONS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("trained_in", PRECISIONS)
@pytest.mark.parametrize("loaded_in", PRECISIONS)
def test_an_adapter_is_loaded_onto_its_base_in_another_precision(trained_in, loaded_in, tmp_path):
    """A user loads an adapter onto its base in float16, or trains in float16 and loads it onto float32."""
    base = nn.Sequential(nn.Linear(256, 256)).double()
    trained, plain = copy.deepcopy(base).float().to(trained_in), copy.deepcopy(base).float().to(loaded_in)
    inject_adapters(trained)
    save_adapter(trained, tmp_path / "adapter.safetensors")
    if {trained_in, loaded_in} == {torch.float16, torch.bfloat16}:  # neither can be computed from the other
        with pytest.raises(ValueError, match="in float32 or in the precision of its training"):
            load_adapter(plain, tmp_path / "adapter.safetensors")
    else:
        load_adapter(plain, tmp_path / "adapter.safetensors")
    other = nn.Sequential(nn.Linear(256, 256)).to(loaded_in)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(other, tmp_path / "adapter.safetensors")


class Based(nn.Linear):
    """A linear layer with a part that is called as the frozen layer inside of an adapter is."""

    def __init__(self):
        super().__init__(4, 4)
        self.base = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(x) + self.base(x)


def test_a_layer_with_a_child_called_base_gets_its_own_file_back(tmp_path):
    """A user adapts a layer that has a child named base: its own file was refused as that of another base."""
    model = nn.Sequential(Based(), nn.Sequential(nn.Identity()))
    model[1].base = nn.Linear(4, 4)
    plain = copy.deepcopy(model)
    inject_adapters(model, AdapterConfig(target_modules="0"))
    model[0].S.data.fill_diagonal_(1.0)
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(plain, tmp_path / "adapter.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(plain(x), model(x))


def test_a_layer_inside_of_another_is_refused():
    """A user adapts all linear layers, of which one is a part of another: the second took the place of a base."""
    model = nn.Sequential(Based())
    with pytest.raises(ValueError, match=r"^0.base lies inside of 0"):
        inject_adapters(model)
    assert not find_adapters(model)


RULES = [{"tau": 0.3}, {"tau": 0.1, "budget": 256}, {"tau": 0.0}, {"tau": 0.5, "min_rank": 3}]


def between_retractions(**settings):
    """A model in the middle of an interval, its integrator and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    inject_adapters(model)
    integrator, optimizer = RankAdaptiveIntegrator(model, adapt_every=8, **settings), RiemannianAdam(model)
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    for _ in range(28):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        integrator.step(optimizer)
    assert integrator.steps == 4
    return model, integrator, optimizer


@pytest.mark.parametrize("settings", RULES)
def test_an_export_between_two_retractions_has_the_ranks_of_a_retraction(settings, tmp_path):
    """A user exports in the middle of an interval: the ranks were twice those found, and above the budget.

    The exported factors are those that a retraction at this place leaves behind.
    """
    model, integrator, optimizer = between_retractions(**settings)
    exported = capture(model).factors
    rank = export_peft(model, tmp_path / "peft")
    integrator.retract(optimizer)
    assert {name: factors.U.shape[1] for name, factors in exported.items()} == integrator.ranks()
    assert rank == max(integrator.ranks().values())
    if "budget" in settings:
        assert integrator.adapter_parameters() <= settings["budget"]
    for name, layer in find_adapters(model).items():
        U, S, V = exported[name]
        close(U @ S @ V.T, layer.delta_weight(), 4096)


def test_an_export_right_after_a_retraction_leaves_out_what_never_took_a_step():
    """A user exports at a checkpoint that falls on a retraction: the file had directions that were just admitted."""
    model, integrator, optimizer = between_retractions(tau=0.3)
    while integrator.steps or integrator.total_steps < 40:
        model(torch.randn(64, 16)).square().sum().backward()
        optimizer.step()
        integrator.step(optimizer)
    layer = find_adapters(model)["0"]
    r = layer.rank
    with torch.no_grad():  # as a retraction does that admits one
        layer.S[r - 1, r - 1] = 0
    assert capture(model).factors["0"].U.shape[1] == r - 1
    integrator.retract()
    assert layer.rank == r - 1


def test_ranks_and_exports_of_a_checkpoint_follow_the_rule_of_its_run():
    """A user asks for the ranks of a checkpoint between retractions: there were ten bars for rank 5."""
    model, integrator, _ = between_retractions(tau=0.3)
    checkpoint = {"callbacks": {"Other": 3, "GeoLoRACallback": {"integrator": integrator.state_dict()}}}
    assert rule_of(checkpoint) == integrator.rule
    for nonsense in ({}, {"callbacks": []}, {"callbacks": {"a": {"integrator": {"rule": {"tau": 7}}}}}):
        assert rule_of(nonsense) is None
    for name, (_, rank, sigma) in spectra(model.state_dict()).items():
        assert rank == len(sigma) == integrator.ranks()[name]


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Embedding(8, 8)], ids=repr)
def test_jit_script_is_refused_with_what_works(layer, tmp_path):
    """A user scripts an adapted model: torch ended in a long text on the annotation Any.

    What works is named, and does; of convolutions and embeddings torch.jit.trace failed as well.
    """
    model = nn.Sequential(layer)
    (adapter,) = inject_adapters(model, AdapterConfig(target_modules=["0"])).values()
    adapter.S.data.fill_diagonal_(1.0)
    for module in (model, adapter):
        with pytest.raises(
            ValueError, match=r"merge_adapters\(model\) first, or use torch\.export\.export or torch\.jit\."
        ):
            script(module)
    x = adapter.sample_inputs(torch.float32)
    expected = model(x)
    close(torch.export.export(model, (x,)).module()(x), expected, NETWORK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its jit
        traced = torch.jit.trace(model, (x,))
        torch.jit.save(traced, tmp_path / "model.pt")
        close(torch.jit.load(tmp_path / "model.pt")(x), expected, NETWORK)
    merge_adapters(model)
    close(script(model)(x), expected, NETWORK)


def script(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its jit
        return torch.jit.script(module)


# Interrupts


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.RMSprop(p, centered=True)])
@pytest.mark.parametrize("at", range(12))
def test_an_interrupt_in_the_middle_of_a_retraction_leaves_whole_adapters(at, make, monkeypatch):
    """A user presses Ctrl-C (twice) while factors are swapped: U was new, S was old, and moments were of neither.

    A retraction of adapters of one shape is finished first, so that each adapter is before or after its own.
    """

    def stepped():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
        inject_adapters(model, AdapterConfig(target_modules=["0", "1", "2"]))
        integrator = RankAdaptiveIntegrator(model, adapt_every=100)
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8).double()).square().sum().backward()
            optimizer.step()
            integrator.step(optimizer)
        integrator.adapt_every = 1
        return model, integrator, optimizer

    def state(layer, optimizer):
        tensors = [layer.U, layer.S, layer.V, layer.K, layer.L, torch.tensor(layer.rank)]
        return tensors + [optimizer.state[p][key] for p in (layer.K, layer.L) for key in sorted(optimizer.state[p])]

    _, integrator, optimizer = stepped()
    layers = list(integrator.adapters.values())
    before = [[tensor.detach().clone() for tensor in state(layer, optimizer)] for layer in layers]
    left, interrupts = [at], [2]
    copy_ = integrator_module.foreach_copy_

    def interrupted(targets, values):
        left[0] -= 1
        copy_(targets[:1], values[:1])
        if left[0] < 0 and interrupts[0]:
            interrupts[0] -= 1
            raise KeyboardInterrupt
        copy_(targets, values)

    with monkeypatch.context() as patch:
        patch.setattr(integrator_module, "foreach_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            integrator.step(optimizer)
    _, unbroken, of_twin = stepped()
    unbroken.step(of_twin)
    done = 0
    for layer, earlier, other in zip(layers, before, unbroken.adapters.values(), strict=True):
        now, after = state(layer, optimizer), state(other, of_twin)
        same = [all(map(torch.equal, now, there)) for there in (earlier, after)]
        assert any(same)
        done += same[1]
    assert done  # the group in which the interrupt came was finished
