"""Low precision and broken batches leave the adapters whole."""

import copy
from contextlib import suppress
from functools import partial

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
from tolerance import is_orthonormal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geolora_pl import (
    AdapterLibrary,
    GeoLoRACallback,
    GeoLoRAWarning,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    export_peft,
    inject_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.merge import MergedAdapters
from geolora_pl.math.precision import exact_products, summing_dtype
from geolora_pl.storage import adapter_state as state


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_thousand_steps_leave_the_factors_in_float32_and_the_bases_orthonormal(precision):
    module = Foreign(RiemannianAdam)
    callback = GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=1)
    trainer(callback, precision=precision, max_epochs=-1, max_steps=1000).fit(module, loader())
    assert (callback.integrator.total_steps, callback.integrator.adaptations) == (1000, 1001)  # and the last fold
    for layer in find_adapters(module).values():
        assert {getattr(layer, name).dtype for name in "USVKL"} == {torch.float32}
        assert is_orthonormal(layer.U)
        assert is_orthonormal(layer.V)
    if precision == "bf16-true":
        assert module.head.weight.dtype == torch.bfloat16


SETTINGS = {
    "high": (torch, "set_float32_matmul_precision", "high"),
    "medium": (torch, "set_float32_matmul_precision", "medium"),
    "allow_tf32": (torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.fixture(params=SETTINGS)
def tf32(request):
    place, name, value = SETTINGS[request.param]
    if not hasattr(place, name):
        pytest.skip(f"{name} came with torch 2.9")
    if place is torch:
        getattr(place, name)(value)
    else:
        setattr(place, name, value)
    yield place, name
    torch.set_float32_matmul_precision("highest")


def told(place, name):
    return torch.get_float32_matmul_precision() if place is torch else getattr(place, name)


def test_products_are_exact_inside_and_the_users_setting_is_back_afterwards(tf32):
    before = told(*tf32)
    with suppress(ZeroDivisionError), exact_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        raise ZeroDivisionError
    assert told(*tf32) == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="came with torch 2.9")
def test_what_the_user_has_not_set_still_follows_the_setting_above_it():
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"  # which may have been told by another test
    try:
        with exact_products(torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


class Products(TorchDispatchMode):
    """The precision that every product is formed in."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            self.seen.add(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


def test_bases_are_made_by_exact_products_and_the_passes_as_fast_as_the_user_wants(tmp_path):
    torch.set_float32_matmul_precision("high")
    try:
        model = nn.Sequential(nn.Linear(12, 10))
        library = AdapterLibrary(copy.deepcopy(model))
        layer = inject_adapters(model)["0"]
        integrator = RankAdaptiveIntegrator(model)
        optimizer = RiemannianAdam(model)
        with Products() as passes:
            model(torch.ones(3, 12)).square().mean().backward()
        optimizer.step()
        with Products() as exact:
            state.retracted({"0": layer})
            integrator.retract(optimizer)
            save_adapter(model, tmp_path / "adapter.safetensors")
            export_peft(model, tmp_path / "lora")
            MergedAdapters(model)
            library.load("a", tmp_path / "adapter.safetensors")
            library.combine("twice", {"a": 2.0})
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (passes.seen, exact.seen) == ({"high"}, {"highest"})


class Broken(Foreign):
    """One batch of the first epoch is not finite."""

    def __init__(self, value, at=3):
        super().__init__()
        self.value, self.at = value, at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.trainer.global_step == self.at else loss


class States(L.Callback):
    """Everything that a step may change, after every batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *args):
        moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        self.states.append([t.detach().clone() for t in (*module.parameters(), *moments)])


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_raise_stops_before_anything_has_changed(value):
    module, callback, states = Broken(value), GeoLoRACallback(adapter=ADAPTER, on_nonfinite="raise"), States()
    with pytest.raises(FloatingPointError, match=r"the gradient of .* is not finite: no step was taken"):
        trainer(callback, states).fit(module, loader())
    assert len(states.states) == 3
    assert same(module.parameters(), states.states[-1][: len(list(module.parameters()))])
    assert callback.integrator.total_steps == 3


def test_skip_goes_on():
    callback, states = GeoLoRACallback(adapter=ADAPTER, on_nonfinite="skip"), States()
    with pytest.warns(GeoLoRAWarning, match="this optimizer step is skipped whole"):
        trainer(callback, states).fit(Broken(float("nan")), loader())
    assert same(states.states[2], states.states[3])
    assert (callback.integrator.total_steps, callback.integrator.skipped_steps) == (5, 1)


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite='stop' must be one of skip, raise"):
        GeoLoRACallback(on_nonfinite="stop")
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model)
    with pytest.raises(ValueError, match="on_nonfinite='stop' must be one of skip, raise"):
        RankAdaptiveIntegrator(model, on_nonfinite="stop")


# A scaler calls fused optimizers even after an overflow, and leaves the check to them.
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_an_overflow_of_the_gradient_scaler_is_no_broken_batch(fused, on_nonfinite):
    """Lightning's 16-mixed with its scaler, on a CPU, with a planted overflow."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    callback, states = GeoLoRACallback(adapter=ADAPTER, on_nonfinite=on_nonfinite), States()
    module = Broken(float("inf"))
    module.make = partial(torch.optim.AdamW, fused=fused)
    if fused:
        with pytest.warns(GeoLoRAWarning, match="skipped whole"):
            trainer(callback, states, plugins=[plugin]).fit(module, loader())
    else:
        trainer(callback, states, plugins=[plugin]).fit(module, loader())
    assert same(states.states[2], states.states[3])
    assert (callback.integrator.total_steps, callback.integrator.adaptations) == (5, 6)  # and the last fold


def test_squares_are_added_up_in_float64_but_where_there_is_none():
    dtypes = [summing_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert dtypes == [torch.float64, torch.float64, torch.float32]
