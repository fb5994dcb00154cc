"""Torch's hooks of all optimizers, and who is told by them of every step."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Observer(Protocol):
    """Somebody who wants to know of every step of every optimizer."""

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called before a step; may return other arguments for it."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after a step that no exception has ended."""


# By identity, and in the order in which they came. Torch is given hooks of all optimizers, since a hook on a single
# one would come too late for its first step. They stay for good: to add or remove one while torch goes through them, as
# when the garbage collector takes an integrator, would end the step of any model in a RuntimeError.
_observers: dict[int, weakref.ref[Observer]] = {}


def observe(observer: Observer) -> weakref.finalize[Any, Any]:
    """Tell somebody of all steps from now on, as long as there is somebody.

    Returns:
        A function that ends this.
    """
    _observers[id(observer)] = weakref.ref(observer)
    return weakref.finalize(observer, _observers.pop, id(observer), None)


def observers() -> list[Observer]:
    """All who are told."""
    return [observer for reference in list(_observers.values()) if (observer := reference()) is not None]


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for observer in observers():
        args, kwargs = observer.before_step(optimizer, args, kwargs) or (args, kwargs)
    return args, kwargs


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for observer in observers():
        observer.after_step(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
