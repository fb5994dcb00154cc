"""Look at the gradients just before every optimizer step: skip what is broken, count what is taken."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.math.precision import working_dtype
from geolora_pl.math.ranks import OnNonfinite
from geolora_pl.training.distributed import anywhere, is_sharded
from geolora_pl.training.internals import foreach_mul, foreach_norm
from geolora_pl.training.optim import RiemannianAdam


class StepWatch:
    """Sees the steps of every torch optimizer that holds an adapter, from the first one on, without being told.

    A step with a gradient that is not finite, or whose square is not, is skipped whole: the gradients of all the
    optimizer's parameters are set to ``None`` just before it. A step that never happens, as when a gradient scaler
    skips it, is not counted.

    To know that takes a wait for the device. On a GPU an optimizer that can leave a step out by itself
    (:class:`~geolora_pl.RiemannianAdam`) is told by a tensor instead, and how many steps were skipped is known at
    :meth:`settle`.

    Attributes:
        new_steps: Steps taken since :meth:`take`.
        decay: For each adapter, the product of ``1 - lr * weight_decay`` since :meth:`forget_decay`, with the lr of
            each step.
        skipped_steps: Steps skipped because a gradient was not finite.
        every_adapter_needs_a_gradient: Raise where one has none, instead of a warning.

    Args:
        model: The model, for the names of its parameters.
        adapters: Its adapters by name.
        on_nonfinite: What to do with a step whose gradient is not finite: ``skip`` it, or ``raise`` a
            ``FloatingPointError`` before anything has changed.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, GeoLoRALayer], on_nonfinite: OnNonfinite = "skip"
    ) -> None:
        self.adapters = adapters
        self.on_nonfinite = on_nonfinite
        self.every_adapter_needs_a_gradient = False
        self.new_steps = 0
        self.skipped_steps = 0
        self.decay: dict[str, float] = dict.fromkeys(adapters, 1.0)
        self._model = model
        self._without_gradient: set[str] = set()  # adapters already named
        self._unsettled: list[tuple[Tensor, dict[str, float]]] = []  # whether a step was skipped, and its decay
        self._register()

    def _register(self) -> None:
        """Hook into all optimizers: a hook on a single one would come too late for its first step."""
        reference = weakref.ref(self)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            watch = reference()
            return None if watch is None else watch.before_step(optimizer, args, kwargs)

        self._finalizer = weakref.finalize(self, register_optimizer_step_pre_hook(hook).remove)

    def close(self) -> None:
        """Stop watching."""
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_finalizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def take(self) -> int:
        """Return the number of new steps and start again from zero."""
        taken, self.new_steps = self.new_steps, 0
        return taken

    def settle(self) -> int:
        """Ask the device which of the steps taken were skipped there, count them as skipped, and return how many."""
        if not self._unsettled:
            return 0
        flags: list[float] = torch.stack([found_inf for found_inf, _ in self._unsettled]).tolist()
        for skipped, (_, decay) in zip(flags, self._unsettled, strict=True):
            if not skipped:
                self._decay_by(decay)
        self._unsettled = []
        count = round(sum(flags))
        self.skipped_steps += count
        if count:
            _warn(
                f"{count} optimizer steps were skipped whole, for gradients that are not finite or so large that "
                "their squares are not; nothing has changed in them, and skipped_steps counts them"
            )
        return count

    def forget(self) -> None:
        """Forget the steps that nobody has taken up, as where another state is loaded."""
        self.new_steps = 0
        self._unsettled = []

    def forget_decay(self, names: Iterable[str]) -> None:
        """Start again from a decay of one, for these adapters."""
        self.decay.update(dict.fromkeys(names, 1.0))

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the gradients when they are there: now, or after the closure that computes them.

        Args:
            optimizer: About to step.
            args: The optimizer itself and what its ``step`` was called with.
            kwargs: Likewise.

        Returns:
            ``None``, or new ``args`` and ``kwargs`` with the closure wrapped.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(factor) in held for layer in self.adapters.values() for factor in (layer.K, layer.L)):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._see_gradients(optimizer)
            return None

        def seen_closure() -> Any:
            loss = closure()
            self._see_gradients(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": seen_closure}

    def _see_gradients(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found_inf = None
        if self._can_skip_on_device(optimizer, parameters):
            found_inf = (~_squares_are_finite(parameters).all()).to(torch.float32)
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        elif (broken := _first_non_finite(parameters)) is not None:
            names = {id(parameter): name for name, parameter in self._model.named_parameters()}
            finite = bool(_values(broken).isfinite().all())
            for parameter in parameters:
                parameter.grad = None
            how = "so large that its square is not finite" if finite else "not finite"
            what = f"the gradient of {names.get(id(broken), 'a parameter')} is {how}"
            # A gradient scaler that leaves the check to the optimizer overflows as a matter of course.
            if self.on_nonfinite == "raise" and getattr(optimizer, "found_inf", None) is None:
                raise FloatingPointError(
                    f"{what}: no step was taken and nothing has changed; look at the last batch, lower lr, clip the "
                    "gradients, or set on_nonfinite='skip'"
                )
            self.skipped_steps += 1
            _warn(
                f"{what}: this optimizer step is skipped whole and nothing has changed; skipped_steps counts such steps"
            )
            return
        trained = {name: K for name, layer in self.adapters.items() if (K := layer.K).requires_grad}
        missing = {name for name, K in trained.items() if K.grad is None}
        if parameters:
            self._name_missing(missing, trained.keys())
        if missing == trained.keys():
            return
        self.new_steps += 1
        decay = self._decay_of(optimizer)
        if found_inf is None:
            self._decay_by(decay)
        else:
            self._unsettled.append((found_inf, decay))

    def _decay_of(self, optimizer: Optimizer) -> dict[str, float]:
        """By what the step shrinks the updates, of those adapters that it does shrink."""
        decaying: dict[int, float] = {}
        for group in optimizer.param_groups:
            decay = 1.0 - float(group["lr"]) * group.get("weight_decay", 0.0)
            if decay != 1.0:
                decaying |= {id(p): decay for p in group["params"] if p.grad is not None}
        if not decaying:
            return {}
        return {name: decaying[id(K)] for name, layer in self.adapters.items() if id(K := layer.K) in decaying}

    def _decay_by(self, decay: Mapping[str, float]) -> None:
        for name, factor in decay.items():
            self.decay[name] *= factor

    def _can_skip_on_device(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
        """Whether a step can be left out without knowing here that it is."""
        return (
            isinstance(optimizer, RiemannianAdam)
            and self.on_nonfinite == "skip"
            and bool(parameters)
            and all(p.device == parameters[0].device and _waits(p.device) for p in parameters)
            and not any(is_sharded(p) or p.grad.is_sparse for p in parameters if p.grad is not None)
        )

    def _name_missing(self, missing: Set[str], trained: Set[str]) -> None:
        if missing and self.every_adapter_needs_a_gradient:
            raise ValueError(
                f"no gradient reaches the adapters {', '.join(sorted(missing))} in this process, and the others would "
                "wait for it without an end: add the layers to exclude_modules, or let every process use the same "
                "layers, or set find_unused_parameters of the strategy"
            )
        new = missing - self._without_gradient
        if not new:
            return
        self._without_gradient |= new
        if missing == trained:
            _warn(
                "no gradient reaches any adapter in this step, though other parameters have theirs: with activation "
                "checkpointing, use use_reentrant=False"
            )
        else:
            _warn(
                f"no gradient reaches the adapters {', '.join(sorted(new))}: they stay as they are; exclude them with "
                "exclude_modules if the model never uses these layers"
            )


def _warn(message: str) -> None:
    warnings.warn(message, GeoLoRAWarning, stacklevel=3)


def _first_non_finite(parameters: list[nn.Parameter]) -> nn.Parameter | None:
    """The first parameter with a gradient that is not finite or squares to infinity; one wait for the device.

    A process holds a part only of a sharded parameter: what one finds there counts for all.
    """
    checked = [parameter for parameter in parameters if _values(parameter).numel()]
    below = _squares_are_finite(checked).tolist() if checked else []
    broken = next((parameter for parameter, fine in zip(checked, below, strict=True) if not fine), None)
    if any(is_sharded(parameter) for parameter in parameters):
        device = _values(parameters[0]).device
        if anywhere(torch.tensor(broken is not None, device=device)) and broken is None:
            broken = parameters[0]
    return broken


def _values(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "only parameters with a gradient are looked at"
    if is_sharded(gradient):
        local: Tensor = gradient.to_local()  # type: ignore[attr-defined]
        return local
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _squares_are_finite(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Whether the squares of each gradient have a finite sum; beyond it second moments break for good."""
    values = [_values(parameter) for parameter in parameters]
    norms = foreach_norm([v.to(working_dtype(v.dtype)) for v in values])
    squares = foreach_mul(norms, norms)  # each in its own precision, before they are one vector
    return torch.stack([square.to(values[0].device) for square in squares]).isfinite()


def _waits(device: torch.device) -> bool:
    """Whether reading a number from the device waits for what it has been told to do."""
    return device.type != "cpu"
