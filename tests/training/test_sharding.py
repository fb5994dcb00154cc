"""FSDP2 on two processes of a CPU."""

import pytest
import torch
from foreign import loader, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from processes import in_two_processes, of_two, sharded
from small import Small
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from geolora_pl import AdapterConfig, GeoLoRACallback
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.training.distributed import is_sharded

pytestmark = pytest.mark.usefixtures("one_thread")


class Sharded(Small):
    """Every process takes its share of each global batch, unshuffled; keeps its losses."""

    def __init__(self):
        super().__init__(adapter=AdapterConfig(init_rank=2, max_rank=6))
        self.losses = []

    def train_dataloader(self):
        data = loader(batch_size=64, batches=1).dataset
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        return DataLoader(data, 16 // world, sampler=DistributedSampler(data, world, rank, shuffle=False))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.losses.append(mean.item())
        return loss


def fit(ckpt_path=None, **settings):
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # processes need not be seeded alike
    module, callback = Sharded(), GeoLoRACallback(tau=0.05, adapt_every=2)
    more = settings.pop("more", ())
    runs = trainer(callback, *more, max_epochs=settings.pop("max_epochs", 3), use_distributed_sampler=False, **settings)
    runs.fit(module, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, callback.integrator.ranks()


class Placement(Callback):
    """The base and the head are sharded, the factors whole and the same in both processes."""

    def on_train_batch_end(self, trainer, module, *args):
        for layer in find_adapters(module).values():
            if not isinstance(layer.base.weight, DTensor):
                raise AssertionError("the base is not sharded")
            state = torch.cat([p.detach().flatten() for p in (layer.U, layer.S, layer.V)])
            other = [torch.empty_like(state) for _ in range(2)]
            dist.all_gather(other, state)
            if is_sharded(layer.U) or not torch.equal(*other):
                raise AssertionError("the factors are not the same")


def in_process(rank, folder, clip, ckpt_path):
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)
    settings = {"strategy": sharded(), "gradient_clip_val": clip}
    module, ranks = fit(ckpt_path, more=[Placement(), saved], **of_two(), **settings)
    if rank == 0:
        torch.save((module.losses, ranks), folder / "result.pt")


def two_processes(folder, clip=None, ckpt_path=None):
    in_two_processes(in_process, folder, clip, ckpt_path)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_same_losses_and_ranks_as_one_process(tmp_path, clip):
    losses, ranks = two_processes(tmp_path, clip)
    one, one_ranks = fit(gradient_clip_val=clip)
    assert losses == pytest.approx(one.losses, rel=1e-3)  # of Adam in float32, as in test_ddp.py
    assert ranks == one_ranks


def test_a_sharded_run_resumes_in_mid_epoch(tmp_path):
    whole, ranks = two_processes(tmp_path)
    (tmp_path / "again").mkdir()
    resumed, resumed_ranks = two_processes(tmp_path / "again", ckpt_path=tmp_path / "step=6.ckpt")
    assert resumed == whole[6:]
    assert resumed_ranks == ranks
