"""A copy of everything that training changes, kept on the device and put back when a run has diverged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.statistics import running_statistics
from geolora_pl.training.distributed import is_sharded
from geolora_pl.training.integrator import RankAdaptiveIntegrator
from geolora_pl.training.uninterrupted import finish


class Snapshot(NamedTuple):
    """The state of a run at one time.

    Attributes:
        tensors: The factors of the adapters, what else the optimizer trains, and the running statistics of
            normalisation layers, by name.
        moments: The optimizer's state, as its ``state_dict`` numbers the parameters.
        integrator: The integrator's state.
    """

    tensors: Mapping[str, Tensor]
    moments: Mapping[int, Mapping[str, Any]]
    integrator: Mapping[str, Any]

    @classmethod
    def take(cls, model: nn.Module, optimizer: Optimizer, integrator: RankAdaptiveIntegrator) -> Snapshot:
        """Copy the present state."""
        tensors = {name: tensor.detach().clone() for name, tensor in _changing(model, optimizer)}
        return cls(tensors, _copies(optimizer.state_dict()["state"]), integrator.state_dict())

    def completed(self, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        """The same state, and what the optimizer has come to train since then as it is now."""
        new = {n: tensor.detach().clone() for n, tensor in _changing(model, optimizer) if n not in self.tensors}
        return self._replace(tensors={**self.tensors, **new})

    @torch.no_grad()
    def put_back(self, model: nn.Module, optimizer: Optimizer, integrator: RankAdaptiveIntegrator) -> None:
        """Write this state over the present one, and halve all further steps; learning rates stay as scheduled."""
        values = [(tensor, _like(tensor, self.tensors[name])) for name, tensor in _changing(model, optimizer)]
        moments = _copies(self.moments)
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for number, parameter in enumerate(parameters):
            now = optimizer.state.get(parameter, {})
            moments |= {number: {k: _like(now.get(k, parameter), v) for k, v in moments.get(number, {}).items()}}

        state, groups = optimizer.state, optimizer.param_groups

        def write() -> None:  # which waits for no other process
            for tensor, value in values:
                tensor.copy_(value)
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
            state.update(optimizer.state)
            optimizer.state, optimizer.param_groups = state, groups  # which a wrapper may share, and its scheduler
            optimizer.zero_grad()  # gradients that still accumulate belong to other weights

        try:
            finish(write)
        finally:  # ranks and counters belong to the factors, also where an interrupt is let through
            integrator.go_back(self.integrator)

    def state_dict(self) -> dict[str, Any]:
        """Everything for a checkpoint, with sharded tensors whole; every process must call this."""
        return {
            "tensors": {name: _whole(tensor) for name, tensor in self.tensors.items()},
            "moments": {n: {key: _whole(value) for key, value in state.items()} for n, state in self.moments.items()},
            "integrator": dict(self.integrator),
        }


def _changing(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What changes in a model while this optimizer trains it; another optimizer's parameters are left alone."""
    changing = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changing |= {id(getattr(layer, name)) for layer in find_adapters(model).values() for name in FACTORS}
    for name, parameter in model.named_parameters():
        if id(parameter) in changing:
            yield name, parameter
    yield from running_statistics(model).items()


def _copies(states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    return {
        number: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for number, state in states.items()
    }


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # of a DTensor


def _like(now: Any, value: Any) -> Any:
    """A tensor, maybe from a checkpoint, as its present value lies: on its device, and sharded if it is."""
    if not isinstance(value, Tensor) or not isinstance(now, Tensor):
        return value
    value = value.to(now.device)
    if is_sharded(now) and not is_sharded(value) and now.shape == value.shape:
        from torch.distributed.tensor import distribute_tensor  # takes a second, and only sharding needs it

        return distribute_tensor(value, now.device_mesh, now.placements)  # type: ignore[attr-defined]
    return value
