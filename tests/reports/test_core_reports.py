"""Reports on the adapter and the integrator in plain torch: what one did, and what must come of it."""

import contextlib
import copy
import inspect
import warnings

import pytest
import torch
from reference import one_layer, orthonormal, set_point
from tolerance import EXACT, close, is_orthonormal
from torch import nn

from geolora_pl import (
    AdapterConfig,
    AdapterLibrary,
    GeoLoRAWarning,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    import_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.storage.adapter_state import capture
from geolora_pl.training.divergence import DivergenceGuard


def trained_file(base, path, seed=0, **config):
    """A file of an adapter of this base with random factors."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    for layer in inject_adapters(model, AdapterConfig(**config)).values():
        with torch.no_grad():
            layer.S.fill_diagonal_(1.0)
    save_adapter(model, path)
    return path


def test_an_adapter_with_dropout_loaded_into_a_model_that_is_evaluated_draws_nothing(tmp_path):
    """A user loads a file into a model in eval mode: two calls must agree, without another eval()."""
    base = nn.Sequential(nn.Linear(8, 6)).eval()
    file = trained_file(base, tmp_path / "a.safetensors", dropout=0.5)
    x, model = torch.randn(4, 8), copy.deepcopy(base)
    load_adapter(model, file)
    assert torch.equal(model(x), model(x))
    library = AdapterLibrary(base)
    library.load("a", file)
    library.use("a")
    assert torch.equal(base(x), base(x))
    trained = nn.Sequential(nn.Linear(8, 6))
    assert inject_adapters(trained)["0"].training, "in training mode as ever"


def test_a_second_file_in_a_library_leaves_the_adapter_in_use_to_its_optimizer(tmp_path):
    """A user trains one adapter of a library and loads another: the same parameters go on, with what is pending."""
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    first, second = (trained_file(base, tmp_path / f"{i}.safetensors", i, init_rank=2, max_rank=2) for i in (1, 2))
    library = AdapterLibrary(base)
    library.load("first", first)
    library.use("first")
    layers = find_adapters(base)
    with torch.no_grad():
        for layer in layers.values():
            layer.K.normal_()
            layer.L.normal_()
    x, factors = torch.randn(4, 8), {name: layer.K for name, layer in layers.items()}
    before = base(x)
    library.load("second", second)
    assert torch.equal(base(x), before)
    assert all(find_adapters(base)[name].K is K for name, K in factors.items())
    other = trained_file(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another base"):
        library.load("other", other)
    assert torch.equal(base(x), before)


class Sam(torch.optim.Optimizer):
    """As its best known repository has it: an optimizer around another one, without a state dict of its own."""

    def __init__(self, params, base, **kwargs):
        super().__init__(params, kwargs)
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        return self.base_optimizer.step()


def test_a_run_that_goes_back_restores_the_moments_inside_of_a_wrapper():
    """A user wraps AdamW in SAM and the losses explode: the moments of AdamW must be those of the good state, and a
    scheduler of the wrapper must still reach what is inside of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    inject_adapters(model)
    integrator = RankAdaptiveIntegrator(model, adapt_every=5)
    optimizer = Sam([p for p in model.parameters() if p.requires_grad], torch.optim.AdamW, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    guard = DivergenceGuard(model, integrator, optimizer)
    guard.start()
    K = find_adapters(model)["0"].K
    moments = optimizer.base_optimizer.state
    went_back = False
    for step in range(60):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean() * (1e6 if step >= 24 else 1.0)
        loss.backward()
        optimizer.step()
        integrator.step(optimizer)
        scheduler.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GeoLoRAWarning)  # that it went back, with numbers
            went_back = guard.batch_ended(loss.detach())
        if went_back:
            break
    assert went_back
    assert moments[K]["exp_avg"].norm() < 10
    assert optimizer.base_optimizer.state is moments
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_a_layer_without_rank_is_given_what_its_probes_have_found(tmp_path):
    """A user starts from a LoRA whose B is zero in a layer: new directions come in, and bases stay orthonormal."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10))
    get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    import_peft(base, tmp_path)
    adapter = find_adapters(base)["0"]
    integrator = RankAdaptiveIntegrator(base, tau=0.1)
    optimizer = RiemannianAdam(base)
    target = torch.randn(10, 12)
    for _ in range(3):
        optimizer.zero_grad()
        (adapter.delta_weight() - target).square().sum().backward()
        optimizer.step()
        integrator.step(optimizer)
        assert is_orthonormal(adapter.U)
        assert is_orthonormal(adapter.V)
    assert adapter.rank > 1


def test_a_file_between_retractions_keeps_the_ranks_that_the_run_keeps(tmp_path):
    """A user saves after adapt_until, with steps pending: the file has the ranks that the run will end with."""
    torch.manual_seed(0)
    model, adapter, integrator = one_layer(9, 7, 3, 6, tau=0.5)
    set_point(adapter, orthonormal(9, 3), torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64), orthonormal(7, 3))
    integrator.rank_changes = False
    with torch.no_grad():
        adapter.K[:, 2:5] = 1e-3
    before = adapter.delta_weight().detach()
    factors = capture(model).factors["0"]
    assert factors.U.shape[1] == 3
    close(factors.U @ factors.S @ factors.V.T, before, within=1e-2)
    integrator.rank_changes = True
    assert capture(model).factors["0"].U.shape[1] == 1


def test_a_layer_without_a_gradient_in_the_steps_on_coefficients_is_truncated_with_the_others():
    """A user trains a mixture in which a layer is skipped for a while: its doubled rank must not stay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=12, probes=0, target_modules=["a", "b"]))
    integrator = RankAdaptiveIntegrator(model, tau=0.3, coefficient_steps=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ranks = []
    for step in range(9):
        optimizer.zero_grad()
        x = torch.randn(16, 12)
        y = model["a"](x) + (model["b"](x) if step % 3 == 0 else 0)
        (y - x).square().mean().backward()
        with pytest.warns(GeoLoRAWarning, match="no gradient") if step == 1 else contextlib.nullcontext():
            optimizer.step()
        integrator.step(optimizer)
        ranks.append(integrator.ranks()["b"])
    assert max(ranks[2::3]) < max(ranks[0::3]), "after every truncation the rank is below that of the augmentation"


def test_steps_on_coefficients_are_exact_inside_autocast():
    """A user steps inside autocast to bfloat16: K stays in the span of U to float32's rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    adapter = inject_adapters(model, AdapterConfig(init_rank=2, max_rank=8, probes=0))["0"]
    integrator = RankAdaptiveIntegrator(model, coefficient_steps=10)
    optimizer = RiemannianAdam(model)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            integrator.step(optimizer)
    assert adapter.K.any()
    U = adapter.U
    close(U @ (U.T @ adapter.K), adapter.K, beside=adapter.K)


def test_a_run_that_goes_back_does_not_let_ranks_change_again():
    """A user has fixed the ranks, and the run goes back to a state from before: they stay fixed."""
    _, adapter, integrator = one_layer(6, 5, 2, 4)
    state = integrator.state_dict()
    integrator.rank_changes = False
    integrator.go_back(state)
    assert not integrator.rank_changes
    assert integrator.rollbacks == 1
    assert adapter.rule.keeps_ranks


def test_a_step_that_raises_after_a_rollback_leaves_the_learning_rate_as_it_was():
    """A user catches the error of a gradient that is not finite, and saves: the lr in the file is the scheduled one."""
    _, adapter, integrator = one_layer(6, 5, 2, 4, on_nonfinite="raise")
    integrator.go_back(integrator.state_dict())
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.4)
    (adapter.delta_weight().sum() * float("nan")).backward()
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.4


def test_weight_decay_reaches_an_adapter_whose_gradient_is_zero():
    """A user's layer saturates and gets no gradient for a while: its update decays with every step all the same."""
    _, adapter, integrator = one_layer(6, 5, 2, 4)
    set_point(adapter, orthonormal(6, 2), torch.tensor([2.0, 1.0], dtype=torch.float64), orthonormal(5, 2))
    before = adapter.delta_weight().detach()
    optimizer = torch.optim.AdamW([adapter.K, adapter.L], lr=0.1, weight_decay=1.0)
    (0.0 * adapter.delta_weight().sum()).backward()
    optimizer.step()
    assert integrator.step(optimizer)
    close(adapter.delta_weight(), 0.9 * before, within=EXACT)


def test_a_skipped_step_is_none_even_with_increments_from_a_file():
    """A user resumes in plain torch in mid-cadence and the first gradient is broken: nothing is counted or moved."""
    _, adapter, integrator = one_layer(6, 5, 2, 4)
    with torch.no_grad():
        adapter.K[:, 2:4] = 1.0
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.1)
    (adapter.delta_weight().sum() * float("nan")).backward()
    with pytest.warns(match="skipped"):
        optimizer.step()
    assert not integrator.step(optimizer)
    assert integrator.total_steps == 0


def test_a_resumed_run_may_leave_the_schedule_of_coefficients():
    """A user resumes such a run without coefficient_steps: it truncates at its cadence, and K and L move again."""
    _, adapter, integrator = one_layer(8, 7, 2, 6, probes=0, coefficient_steps=3)
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.1)
    (adapter.delta_weight() - 1).square().sum().backward()
    optimizer.step()
    integrator.step(optimizer)
    state = integrator.state_dict()
    integrator.close()
    again = RankAdaptiveIntegrator(nn.Sequential(adapter), adapt_every=10)
    again.load_state_dict(state)
    again.total_steps = 100
    optimizer.zero_grad()
    (adapter.delta_weight() - 1).square().sum().backward()
    optimizer.step()
    assert not again.step(optimizer)
    assert adapter.L.any()


def test_a_table_smaller_than_its_rank_has_no_basis_of_rounding():
    """A user adapts an embedding of three rows, one of them padding: two directions are all that there are."""
    model = nn.Sequential(nn.Embedding(3, 8, padding_idx=0))
    adapter = inject_adapters(model, AdapterConfig(init_rank=3, target_modules=["0"]))["0"]
    assert adapter.max_rank == 2
    assert is_orthonormal(adapter.V)


def test_an_inner_optimizer_may_know_its_wrapper():
    """A user's wrapper and what is inside of it refer to each other: the step counts once."""
    _, adapter, integrator = one_layer(6, 5, 2, 4)
    outer = Sam([adapter.K, adapter.L], torch.optim.SGD, lr=0.1)
    outer.base_optimizer.outer = outer
    adapter.delta_weight().sum().backward()
    outer.step()
    assert integrator.step(outer)
    assert integrator.total_steps == 1


def test_steps_are_counted_in_float32_whatever_the_default_type():
    """A user trains with bfloat16 as the default type: a counter of that type would stop at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        adapter = inject_adapters(model)["0"]
        optimizer = RiemannianAdam(model)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.state[adapter.K]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_probes_nothing_is_left_to_do_after_a_retraction():
    """A user reads `unfinished` at the end of a run without probes: there is nothing on trial."""
    _, adapter, integrator = one_layer(6, 5, 2, 4, probes=0)
    optimizer = torch.optim.SGD([adapter.K, adapter.L], lr=0.1)
    (adapter.delta_weight() - 1).square().sum().backward()
    optimizer.step()
    assert integrator.step(optimizer)
    assert not integrator.unfinished


def test_a_merged_model_is_saved_by_its_own_method_with_all_of_its_arguments(tmp_path):
    """A user saves a pipeline that looks at the signature of save_pretrained, which a warning must not hide."""

    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def save_pretrained(self, folder, safe_serialization=True, variant=None):
            return folder, safe_serialization, variant

    model = Saves()
    before = inspect.signature(model.save_pretrained)
    inject_adapters(model)
    assert inspect.signature(model.save_pretrained) == before
    with pytest.warns(GeoLoRAWarning, match="from_pretrained does not know"):
        assert model.save_pretrained("a", variant="fp16") == ("a", True, "fp16")
    merge_adapters(model)
    assert "save_pretrained" not in vars(model)
