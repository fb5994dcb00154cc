import contextlib
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from processes import in_two_processes
from recorded import Recorded
from small import Small
from tolerance import RUN, close
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    GeoLoRAEMAWeightAveraging,
    RankAdaptiveIntegrator,
    inject_adapters,
)
from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.math import decomposition

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


class Agreement(Callback):
    """After every adaptation, factors and ranks are the same to the bit in both processes."""

    def on_train_batch_end(self, trainer, module, *args):
        for layer in find_adapters(module).values():
            state = torch.cat([p.detach().flatten() for name, p in layer.named_parameters() if name in FACTORS])
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


def fit(devices, batch_size, adapt_every=1, module=None, precision="64-true", more=(), **settings):
    torch.manual_seed(0)
    module = module or InOrder(batch_size)
    inject_adapters(module, ADAPTER)
    if precision == "64-true":
        module.double()
    callback = GeoLoRACallback(tau=0.05, adapt_every=adapt_every)
    agreement = [Agreement()] if devices > 1 else []
    runs = trainer(
        callback,
        *agreement,
        *more,
        **{
            "devices": devices,
            "max_epochs": 2,
            "precision": precision,
            "use_distributed_sampler": False,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            **settings,
        },
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


def assert_same(one, two, tolerance=RUN):
    for a, b in zip(find_adapters(one).values(), find_adapters(two).values(), strict=True):
        assert a.rank == b.rank > 2
        close(a.delta_weight(), b.delta_weight(), within=tolerance)
    close(one.head.weight, two.head.weight, within=tolerance)


@pytest.mark.parametrize("adapt_every", [1, 3])
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", RUN), ("32-true", 1e-2)])
def test_two_processes_equal_one_on_the_same_global_batch(adapt_every, precision, tolerance):
    """In float32 Adam takes whole steps of gradients of which cancellation has left two or three digits."""
    one, two = (fit(n, 16 // n, adapt_every, precision=precision) for n in (1, 2))
    assert_same(one, two, tolerance)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_fork_find_unused_parameters_true"])
def test_accumulation_without_reduction_and_uneven_last_batches(strategy):
    """Of 64 samples: batches of 24, 24 and 16, the last accumulation of one batch only, and that one smaller."""
    one, two = fit(1, 24, accumulate_grad_batches=2), fit(2, 12, accumulate_grad_batches=2, strategy=strategy)
    assert_same(one, two)


class Recomputed(InOrder):
    """Activations are recomputed in the backward pass."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(checkpoint(self.body, x, use_reentrant=False)), y)


def test_gradient_checkpointing():
    one, two = fit(1, 16, module=InOrder(16)), fit(2, 8, module=Recomputed(8))
    assert_same(one, two)


def test_synchronised_batch_norm_leaves_the_adapters_alone():
    """Torch has it on a GPU only: what is tested is the conversion."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    adapters = inject_adapters(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert find_adapters(converted) == adapters
    assert isinstance(converted[1], nn.SyncBatchNorm)


def test_a_resumed_run_of_two_processes_equals_one_run(tmp_path):
    def run(ckpt_path=None):
        module = Recorded(validated=False)
        inject_adapters(module, ADAPTER)
        callback = GeoLoRACallback(tau=0.05, adapt_every=2)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        settings = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 3}
        trainer(callback, saved, **settings).fit(module, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole, resumed = run(), run(tmp_path / "step=4.ckpt")  # of three batches an epoch
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


class Perturbed(Callback):
    """The linear algebra of one process differs in the last bit, and in its signs."""

    def on_fit_start(self, trainer, module):
        if trainer.global_rank == 1:
            exact = decomposition.decompose

            def decompose(*factors):
                step = exact(*factors)
                return decomposition.Decomposition(-step.U * (1 + 1e-7), step.sigma * (1 + 1e-7), -step.V)

            decomposition.decompose = decompose
            with torch.no_grad():
                for layer in find_adapters(module).values():
                    layer.U.mul_(1 + 1e-6)  # as after a retraction that differs


def test_processes_whose_linear_algebra_differs_stay_the_same_to_the_bit():
    fit(2, 8, precision="32-true", more=[Perturbed()])


class Collectives(Callback):
    """Counts the messages of the adaptation, and all those of the process."""

    def __init__(self, broadcasts=6):
        self.counts, self.broadcasts = Counter(), broadcasts

    def on_train_start(self, trainer, module):
        for name in ("broadcast", "all_reduce", "all_gather_into_tensor", "all_gather", "all_gather_object", "barrier"):
            setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name, call):
        def counting(*args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("geolora_pl"):
                self.counts[name] += 1
            return call(*args, **kwargs)

        return counting

    def on_train_end(self, trainer, module):
        adaptations = trainer.callbacks[0].integrator.adaptations
        # Adaptations come after 1, 2, 4, 6 and 8 steps and at the end; the losses are judged once there are 8 of them.
        if adaptations != 6 or self.counts != {"broadcast": self.broadcasts, "all_reduce": 1}:
            raise AssertionError(f"{self.counts} in {adaptations} adaptations")


def test_an_adaptation_is_one_message_and_so_is_a_judgement_of_the_losses_and_a_step_is_none():
    fit(2, 8, adapt_every=2, more=[Collectives()])


def test_averaged_weights_send_one_message_when_bases_change_and_two_when_they_are_put_in():
    """Of six adaptations, the average begins after the first, and is put in after the last."""
    averaging = GeoLoRAEMAWeightAveraging(0.9)
    fit(2, 8, adapt_every=2, more=[averaging, Collectives(broadcasts=6 + 4 + 2)])


class Divided(InOrder):
    """The second process leaves an adapter out."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        second = self.body[2].base if self.trainer.global_rank else self.body[2]
        return nn.functional.cross_entropy(self.head(second(self.body[0](x))), y)


def test_an_adapter_without_a_gradient_in_one_process_is_refused_by_name():
    with pytest.raises(ProcessRaisedException, match=r"no gradient reaches the adapters body\.2 in this process"):
        fit(2, 8, module=Divided(8))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]])
def test_the_command_line_with_two_processes(tmp_path, launcher):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, "-m", *launcher, "geolora_pl", "fit", "--config", "configs/quickstart.yaml"]
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
    assert done.stdout.count("ranks found") == 1
    assert "sync_dist" not in done.stderr


def zero_redundancy(rank, wide):
    """Ten steps of one process, with and without ZeroRedundancyOptimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, when torch itself imports it
        from torch.distributed.optim import ZeroRedundancyOptimizer
    dist.init_process_group("gloo")
    weights = []
    for zero in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, wide)).double()
        inject_adapters(model, AdapterConfig(target_modules=["0"], modules_to_save=["1"]))
        integrator, wrapped = RankAdaptiveIntegrator(model, adapt_every=3), nn.parallel.DistributedDataParallel(model)
        params = [p for p in model.parameters() if p.requires_grad]
        kind = torch.optim.AdamW
        optimizer = ZeroRedundancyOptimizer(params, kind, lr=0.01) if zero else kind(params, lr=0.01)
        torch.manual_seed(rank)
        for _ in range(10):
            optimizer.zero_grad()
            wrapped(torch.randn(4, 8).double()).square().sum().backward()
            optimizer.step()
            integrator.step(optimizer)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if not torch.equal(*weights):
        raise AssertionError("the weights differ")
    dist.destroy_process_group()


@pytest.mark.parametrize("divided", [False, True])
def test_the_optimizer_that_torch_divides_among_processes(divided):
    """With all adapters in one process the result is the same to the bit; divided, they are refused."""
    refused = pytest.raises(ProcessRaisedException, match="ZeroRedundancyOptimizer gives only some of the adapters")
    with refused if divided else contextlib.nullcontext():
        # Parameters go to the process that has the fewest so far: a wide head has one for itself.
        in_two_processes(zero_redundancy, 2 if divided else 100)
