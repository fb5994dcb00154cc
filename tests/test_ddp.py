import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_callback import ADAPTER, Foreign, loader, trainer
from test_module import Small
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler

from geolora_pl import GeoLoRACallback, inject_adapters
from geolora_pl.inject import find_adapters

ROOT = Path(__file__).parents[1]


class Agreement(Callback):
    """After every step, factors and ranks are the same to the bit in both processes."""

    def on_train_batch_end(self, trainer, module, *args):
        for layer in find_adapters(module).values():
            state = torch.cat([p.detach().flatten() for p in layer.parameters()])
            everywhere = trainer.strategy.all_gather(torch.cat([state, state.new_tensor([layer.rank])]))
            if not torch.equal(everywhere[0], everywhere[1]):
                raise AssertionError("the processes disagree")


class InOrder(Foreign):
    """Every process takes its share of each global batch, unshuffled."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        data = loader(batch_size=64, batches=1).dataset
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, self.batch_size, sampler=sampler)


def fit(devices, batch_size, adapt_every):
    torch.manual_seed(0)
    module = InOrder(batch_size)
    inject_adapters(module, ADAPTER)
    module.double()
    callback = GeoLoRACallback(tau=0.05, adapt_every=adapt_every)
    more = [Agreement()] if devices > 1 else []
    runs = trainer(
        callback,
        *more,
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=2,
        precision="64-true",
        use_distributed_sampler=False,
    )
    runs.fit(module)
    return module


def test_what_forked_processes_trained_comes_back():
    module = Small()
    module.configure_model()
    trainer(GeoLoRACallback(tau=0.01), devices=2, strategy="ddp_fork", max_epochs=2).fit(module, loader())
    ranks = [layer.rank for layer in find_adapters(module).values()]
    assert len(ranks) == 2
    assert max(ranks) > 4
    assert all(torch.count_nonzero(layer.S) for layer in find_adapters(module).values())


@pytest.mark.parametrize("module_class", [Foreign, Small])
def test_adapters_that_would_be_lost_with_a_forked_process_are_refused(module_class):
    runs = trainer(GeoLoRACallback(), devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessRaisedException, match=r"use strategy='ddp', or before trainer\.fit call"):
        runs.fit(module_class(), loader())


@pytest.mark.parametrize("adapt_every", [1, 3])
def test_two_processes_equal_one_on_the_same_global_batch(adapt_every):
    one, two = fit(1, 16, adapt_every), fit(2, 8, adapt_every)
    for a, b in zip(find_adapters(one).values(), find_adapters(two).values(), strict=True):
        assert a.rank == b.rank > 2
        torch.testing.assert_close(a.delta_weight(), b.delta_weight(), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_command_line_with_two_processes(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, "-m", "geolora_pl", "fit", "--config", "configs/quickstart.yaml"]
    settings = ["strategy=ddp", "devices=2", "accelerator=cpu", "max_epochs=2", "enable_progress_bar=false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + [f"--trainer.{setting}" for setting in settings],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter parameters:") == 1
    assert "sync_dist" not in done.stderr
