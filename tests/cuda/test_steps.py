"""On a GPU the host does not wait for the device in a step that does not adapt, and reads all ranks at once."""

import traceback
import warnings
from pathlib import Path

import pytest
import torch
from foreign import ADAPTER, Foreign, trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

import geolora_pl
from geolora_pl import AdapterConfig, GeoLoRACallback, RankAdaptiveIntegrator, RiemannianAdam, inject_adapters
from geolora_pl.math.decomposition import svd
from geolora_pl.training.clock import DeviceClock

pytestmark = pytest.mark.cuda

PACKAGE = str(Path(geolora_pl.__file__).parent)
SETTLED = 8  # steps after which the next retraction comes after eight more: 1, 2, 4, 8, 16


def adapted(dtype=torch.float32, device="cuda"):
    """A model with adapters of several shapes on a device, its optimizer and its integrator."""
    torch.manual_seed(0)
    layers = nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Linear(32, 4)
    model = nn.Sequential(*layers).to(device, dtype)
    inject_adapters(model, AdapterConfig(init_rank=2, max_rank=12, modules_to_save=["5"]))
    return model, RiemannianAdam(model, lr=1e-2), RankAdaptiveIntegrator(model, tau=0.05, adapt_every=1000)


def take_a_step(model, optimizer, integrator, batch, cast=None):
    optimizer.zero_grad()
    with torch.autocast("cuda", cast, enabled=cast is not None):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return integrator.step(optimizer)


def a_batch(dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(16, 24, device="cuda", generator=generator, dtype=dtype)
    return x, (x[:, 0] > 0).long()


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
def test_the_host_does_not_wait_in_a_step_that_does_not_adapt(no_waiting, cast):
    *training, batch = *adapted(), a_batch()
    adaptations = [take_a_step(*training, batch, cast) for _ in range(SETTLED)]
    assert adaptations == [True, True, False, True, False, False, False, True]
    no_waiting()
    assert not any(take_a_step(*training, batch, cast) for _ in range(SETTLED - 1))


def test_a_broken_step_is_left_out_by_the_device_and_counted_later(no_waiting):
    model, optimizer, integrator = adapted()
    batch = a_batch()
    for _ in range(SETTLED):
        take_a_step(model, optimizer, integrator, batch)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    no_waiting()
    take_a_step(model, optimizer, integrator, (batch[0] * float("inf"), batch[1]))
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    integrator.settle()
    assert (integrator.skipped_steps, integrator.total_steps, integrator.steps) == (1, SETTLED, 0)


class Waits(Callback):
    """Notes where our own code waits for the device from one step to another."""

    def __init__(self, first, last):
        self.first, self.last, self.stacks = first, last, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.first:
            warnings.simplefilter("always")
            warnings.showwarning = self.note
            torch.cuda.set_sync_debug_mode("warn")
        if trainer.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")

    def note(self, message, *arguments):
        frames = traceback.extract_stack()
        if "synchronizing" in str(message) and any(frame.filename.startswith(PACKAGE) for frame in frames):
            self.stacks.append("".join(traceback.format_list(frames[-12:])))


def on_the_device(batches):
    """Batches that lie on the device already: to fetch them from the host is no matter of ours."""
    torch.manual_seed(0)
    x = torch.randn(batches, 8, 10, device="cuda")
    return DataLoader([(a, (a[:, 0] > 0).long()) for a in x], batch_size=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nor_does_it_in_a_run_of_lightning(precision):
    """A user trains with the callback: between two adaptations nothing of ours waits for the GPU."""
    waits = Waits(first=SETTLED + 1, last=2 * SETTLED - 2)
    with warnings.catch_warnings():
        callback = GeoLoRACallback(adapter=ADAPTER, adapt_every=2 * SETTLED)
        settings = {"accelerator": "gpu", "devices": 1, "precision": precision}
        trainer(callback, waits, **settings).fit(Foreign(riemannian_adam), on_the_device(2 * SETTLED))
    torch.cuda.set_sync_debug_mode("default")
    assert not waits.stacks, waits.stacks[0]


def riemannian_adam(parameters, lr):
    return RiemannianAdam([p for p in parameters if p.requires_grad], lr=lr)


def test_a_retraction_on_the_device_is_that_on_the_host():
    ranks, updates = [], []
    for device in ("cpu", "cuda"):
        _, optimizer, integrator = adapted(torch.float64, device)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for layer in integrator.adapters.values():
                for factor in (layer.K, layer.L):
                    factor.grad = torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(device)
            optimizer.step()
            integrator._retract(optimizer, admits=False)  # random directions are other ones on each device
        ranks.append(integrator.ranks())
        updates.append([layer.delta_weight().detach().cpu() for layer in integrator.adapters.values()])
    assert ranks[0] == ranks[1]
    for ours, theirs in zip(*updates, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("driver", [None, "gesvd"])
def test_the_svd_by_either_driver_is_one(monkeypatch, driver):
    matrix = torch.randn(3, 20, 20, device="cuda")
    if driver is not None:
        first = torch.linalg.svd

        def fails_first(*arguments, **settings):
            if settings.get("driver") != driver:
                raise torch.linalg.LinAlgError("did not converge")
            return first(*arguments, **settings)

        monkeypatch.setattr(torch.linalg, "svd", fails_first)
    P, sigma, Qh = svd(matrix)
    torch.testing.assert_close((P * sigma[:, None]) @ Qh, matrix, rtol=0, atol=1e-4)


def test_the_clock_measures_the_device_and_not_the_host():
    clock = DeviceClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    start = clock.now()
    for _ in range(20):
        x = x @ x / 4096
    clock.add(start)
    torch.cuda.synchronize()
    assert clock.total() > 20 * 2 * 4096**3 / 1e15  # no chip takes less
