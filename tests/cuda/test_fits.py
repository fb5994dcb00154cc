"""Runs of Lightning on a GPU: precisions, one process with NCCL, a resumed run with random numbers of the device."""

import lightning as L
import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import distributed as dist
from torch import nn

from geolora_pl import GeoLoRACallback
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.math.decomposition import orthonormality_defect
from geolora_pl.training import distributed

pytestmark = pytest.mark.cuda

GPU = {"accelerator": "gpu", "devices": 1}
EPOCHS = 12


@pytest.fixture(autouse=True)
def _no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Kept(Foreign):
    """Keeps its losses."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


def fit(module=None, precision="32-true", epochs=EPOCHS, more=(), ckpt_path=None, **settings):
    module, callback = module or Kept(), GeoLoRACallback(adapter=ADAPTER, tau=0.05, adapt_every=2)
    runs = trainer(callback, *more, **{**GPU, "max_epochs": epochs, "precision": precision, **settings})
    runs.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, callback, runs


def assert_learnt(module, callback):
    losses = torch.stack(module.losses).float().cpu()
    assert losses.isfinite().all()
    assert losses[-6:].mean() < losses[:6].mean()
    for layer in find_adapters(module).values():
        assert layer.U.dtype == torch.float32
        assert max(float(orthonormality_defect(basis)) for basis in (layer.U, layer.V)) < 1e-4
    assert callback.integrator.adaptations > 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_a_run_learns_in_every_precision(precision):
    module, callback, runs = fit(precision=precision)
    assert_learnt(module, callback)
    assert callback.integrator.total_steps == runs.global_step - callback.integrator.skipped_steps


def test_a_step_that_the_scaler_skips_is_not_counted():
    """A user trains in 16-mixed, and the scale is so large at first that the first gradients overflow."""
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    plugin = MixedPrecision("16-mixed", "cuda", scaler)
    module, callback, _ = fit(precision=None, plugins=[plugin])
    skipped = round(torch.log2(torch.tensor(2.0**40 / scaler.get_scale())).item())
    assert skipped > 0
    assert callback.integrator.total_steps == 6 * EPOCHS - skipped
    assert_learnt(module, callback)


class Normed(Kept):
    """With running statistics; keeps the kinds of the layer that has them, which Lightning changes and changes back."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(8))
        self.kinds = set()

    def training_step(self, batch, batch_idx):
        self.kinds.add(type(self.body[-1]))
        return super().training_step(batch, batch_idx)


def test_a_process_of_its_own_with_nccl_and_synchronised_statistics_trains_as_without():
    alone, _, _ = fit(Normed())
    module, callback, _ = fit(Normed(), strategy="ddp", sync_batchnorm=True, use_distributed_sampler=False)
    assert dist.get_backend() == "nccl"
    assert module.kinds == {nn.SyncBatchNorm}
    assert_learnt(module, callback)
    torch.testing.assert_close(torch.stack(module.losses), torch.stack(alone.losses), rtol=0.02, atol=1e-3)
    assert module.body[-1].num_batches_tracked == 6 * EPOCHS


def test_nccl_takes_what_processes_tell_each_other(monkeypatch, tmp_path):
    """One process is told that there are two, so that every message is sent, to itself."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    device = torch.device("cuda")
    tensors = [torch.arange(5, device=device), torch.randn(3, 2, device=device), torch.ones(2, device=device) > 0]
    before = [tensor.clone() for tensor in tensors]
    distributed.broadcast_packed(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert distributed.anywhere(torch.tensor(True, device=device))
    assert not distributed.anywhere(torch.tensor(False, device=device))
    assert distributed.average([2.0, 4.0], device) == [1.0, 2.0]  # the half, of one process
    weight = nn.Parameter(torch.zeros(3, device=device))
    weight.grad = torch.full((3,), 2.0, device=device)
    distributed.average_unsharded([weight])
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]


class Dropped(Kept):
    """With dropout, whose masks are random numbers of the device."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.Dropout(0.3))


def test_a_resumed_run_goes_on_with_the_random_numbers_of_the_device(tmp_path):
    """A user resumes a run with dropout, and gets the run that was never interrupted, to the bit."""
    saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    L.seed_everything(0, verbose=False)
    whole, _, _ = fit(Dropped(), epochs=2, more=[saved])
    L.seed_everything(1, verbose=False)
    resumed, callback, _ = fit(Dropped(), epochs=2, ckpt_path=tmp_path / "step=8.ckpt")
    assert callback.integrator.total_steps == 12
    assert torch.equal(torch.stack(resumed.losses), torch.stack(whole.losses[8:]))
    theirs = whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.state_dict().items())
