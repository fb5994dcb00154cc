"""Two processes of this machine, as torchrun starts them."""

import os

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import ModelParallelStrategy


def in_two_processes(work, *arguments):
    """Call a function in two forked processes, which know of each other, with the rank before its arguments."""
    start = find_free_network_port(), work, arguments
    torch.multiprocessing.start_processes(_in_process, start, 2, start_method="fork")


def _in_process(rank, port, work, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, *arguments)


def of_two():
    """Settings of a trainer in such a process."""
    return {"devices": 2, "plugins": [TorchElasticEnvironment()]}


def sharded():
    """The strategy that shards a model among the two, and writes checkpoints as one file."""
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
