"""Look at the gradients just before every optimizer step: skip what is broken, count what is taken."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.math.precision import working_dtype
from geolora_pl.training.batch_statistics import BatchStatistics
from geolora_pl.training.binding import Binding
from geolora_pl.training.coefficients import restrict_gradients
from geolora_pl.training.distributed import anywhere, is_sharded
from geolora_pl.training.hooks import observe, observers
from geolora_pl.training.internals import foreach_mul, foreach_norm
from geolora_pl.training.nesting import Nesting
from geolora_pl.training.optim import RiemannianAdam

OnNonfinite = Literal["skip", "raise"]


def check_on_nonfinite(value: str) -> None:
    """Raise a ValueError unless the value says what to do with a gradient that is not finite."""
    if value not in get_args(OnNonfinite):
        raise ValueError(f"on_nonfinite={value!r} must be one of {', '.join(get_args(OnNonfinite))}")


class StepWatch:
    """Sees the steps of every torch optimizer that holds an adapter, from the first one on, without being told.

    An adapter has one watch, the one that was made last. A step with a gradient that is not finite, or whose square is
    not, is skipped whole: the gradients of all the optimizer's parameters are set to ``None`` just before it. A step
    that never happens, as when a gradient scaler skips it, is not counted.

    The host has to wait for the device to know that. On a GPU an optimizer that can leave out a step by itself
    (:class:`~geolora_pl.RiemannianAdam`) gets a tensor instead that tells it to, and :meth:`settle` finds out later how
    many steps were skipped.

    Attributes:
        new_steps: Steps since :meth:`take` was called last.
        decay: For each adapter, the product of ``1 - lr * weight_decay`` since :meth:`forget_decay`, with the lr of
            each step.
        skipped_steps: Steps skipped because a gradient was not finite.
        lr_factor: Multiplies the learning rates of all groups during each step; outside of the step they are as given,
            so that no scheduler sees it.
        nesting: Knows whether a step goes on inside of another.
        coefficients_alone: Whether steps are to move S alone, and not the bases.
        every_adapter_needs_a_gradient: Whether an adapter without a gradient is an error, and not only a warning.
        replaced: Whether it was closed because a later one watches its adapters.
        squares: The squared norm of each gradient of the last step, on its device; ``None`` before the first step, and
            where a process holds parts of gradients only.

    Args:
        model: The model, for the names of its parameters.
        adapters: Its adapters by name.
        binding: Knows which optimizers train them.
        on_nonfinite: What to do with a step whose gradient is not finite: ``skip`` it, or ``raise`` a
            ``FloatingPointError`` before anything has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, GeoLoRALayer],
        binding: Binding,
        on_nonfinite: OnNonfinite = "skip",
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        self.replaced = False
        self.adapters: Mapping[str, GeoLoRALayer] = adapters
        for watch in observers():
            if isinstance(watch, StepWatch) and not set(adapters.values()).isdisjoint(watch.adapters.values()):
                watch.close()  # of a run that was broken off: it would have a say in the steps of this one
                watch.replaced = True
        self._binding = binding
        self.on_nonfinite = on_nonfinite
        self.coefficients_alone = False
        self.every_adapter_needs_a_gradient = False
        self.new_steps = 0
        self._new_skips = 0
        self.skipped_steps = 0
        self.lr_factor = 1.0
        self.squares: Tensor | None = None
        self.nesting = Nesting()
        self.decay: dict[str, float] = dict.fromkeys(adapters, 1.0)
        self._model = model
        self._statistics = BatchStatistics(model)
        self._without_gradient: set[str] = set()  # adapters that a warning has named
        self._unsettled: list[tuple[Tensor, dict[str, float]]] = []  # per step whether it was skipped, and its decay
        self._scaled: list[tuple[dict[str, Any], Any]] = []  # groups in a step, with the learning rate given to each
        self._end = observe(self)

    def close(self) -> None:
        """Stop watching."""
        self._end()
        self.restore_lr()
        self.nesting = Nesting()  # the frames of a step that an exception has ended hold much in memory

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_end"}
        return {**kept, "_watches": self._end.alive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name != "_watches"})
        self._end = observe(self)
        if not state["_watches"]:  # a copy of one that was closed
            self.close()

    def take(self) -> tuple[int, int]:
        """Return how many steps were taken, and how many were skipped at once, and start again from zero.

        Raises:
            ValueError: A later one watches the adapters.
        """
        if self.replaced:
            raise ValueError(
                "another RankAdaptiveIntegrator was made for these adapters since, and it sees the steps in the place "
                "of this one: make one per run, and call its step"
            )
        taken = self.new_steps, self._new_skips
        self.new_steps = self._new_skips = 0
        return taken

    def settle(self) -> int:
        """Ask the device which steps were skipped there, and count them as skipped; waits for the device.

        Returns:
            How many of the steps that :meth:`take` has already returned were none.
        """
        if not self._unsettled:
            return 0
        flags: list[float] = torch.stack([flag for flag, _ in self._unsettled]).tolist()
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
        not_yet_taken = min(count, self.new_steps)
        self.new_steps -= not_yet_taken
        return count - not_yet_taken

    def state_dict(self) -> dict[str, Any]:
        """Skipped steps and pending decay, of steps that are settled, and what the next ones are to move."""
        return {
            "skipped_steps": self.skipped_steps,
            "decay": dict(self.decay),
            "coefficients_alone": self.coefficients_alone,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and forget the steps that were seen since."""
        self.new_steps = 0
        self._unsettled = []
        self._statistics.keep()
        self.skipped_steps = state["skipped_steps"]
        self.decay = dict(state["decay"])
        self.coefficients_alone = state.get("coefficients_alone", False)

    def forget_decay(self, names: Iterable[str]) -> None:
        """Set the decay of these adapters back to one."""
        self.decay.update(dict.fromkeys(names, 1.0))

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the gradients when they are there: now, or after the closure that computes them.

        Args:
            optimizer: The optimizer that is about to step.
            args: The optimizer itself and the positional arguments of its ``step``.
            kwargs: The keyword arguments of its ``step``.

        Returns:
            ``None``, or new ``args`` and ``kwargs`` with the closure wrapped.
        """
        if not self._binding.trains_any(optimizer) or self._binding.innermost(optimizer) is not optimizer:
            return None  # of a wrapper only the steps of the optimizer inside of it count
        self.nesting.enter(optimizer)
        if self.nesting.inner:
            return None  # the call around it has looked already, or will when its closure has run
        self._scale_lr(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._look(optimizer)
            return None

        before: tuple[Any, ...] | None = None

        def seen_closure() -> Any:
            nonlocal before
            loss = closure()
            if before is not None:  # called again in the same step, of which only the last gradients count
                self.new_steps, self._new_skips, self.skipped_steps, self.decay, self._unsettled = before
            before = self.new_steps, self._new_skips, self.skipped_steps, dict(self.decay), list(self._unsettled)
            self._look(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": seen_closure}

    def after_step(self, optimizer: Optimizer) -> None:
        """Give the groups back their learning rates when the outermost call of ``step`` ends."""
        if self.nesting.leave(optimizer):
            self.restore_lr()

    def _look(self, optimizer: Optimizer) -> None:
        """See the gradients; if that is an error, there is no step, after which learning rates would be restored."""
        try:
            self._see_gradients(optimizer)
        except BaseException:
            self.restore_lr()
            raise

    def _scale_lr(self, optimizer: Optimizer) -> None:
        self.restore_lr()  # after a step that raised
        if self.lr_factor != 1:
            self._scaled = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, lr in self._scaled:
                group["lr"] = lr * self.lr_factor

    def restore_lr(self) -> None:
        """Give the groups back the learning rates that they had before the step."""
        for group, lr in self._scaled:
            group["lr"] = lr
        self._scaled = []

    def _see_gradients(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A process may hold no row of a sharded parameter.
        held = {p: values for p in parameters if (values := _values(p)).numel()}
        squares = _squares(list(held.values())) if held else torch.zeros(0)
        self.squares = None if any(is_sharded(p) for p in parameters) else squares
        if self.squares is not None and (scale := getattr(optimizer, "grad_scale", None)) is not None:
            # A gradient scaler leaves the division to a fused optimizer; its scale lies where the loss does.
            self.squares = squares / scale.to(squares.device) ** 2
        broken_on_device = None
        if isinstance(optimizer, RiemannianAdam) and self._may_be_left_out_on_device(parameters):
            broken_on_device = (~squares.isfinite().all()).to(torch.float32)
            optimizer.leave_out_next_step_if(broken_on_device)
            self._statistics.take_back_if(broken_on_device)
        elif (broken := _first_non_finite(parameters, held, squares)) is not None:
            self._statistics.take_back_if(True)
            self._skip(optimizer, parameters, broken)
            return
        else:
            self._statistics.keep()
        trained = {name: K for name, layer in self.adapters.items() if (K := layer.K).requires_grad}
        missing = {name for name, K in trained.items() if K.grad is None}
        if parameters:
            self._name_missing(missing, trained.keys())
        if missing == trained.keys():
            return
        if self.coefficients_alone:
            restrict_gradients(self.adapters.values())
        self.new_steps += 1
        decay = self._decay_of(optimizer)
        if broken_on_device is None:
            self._decay_by(decay)
        else:
            self._unsettled.append((broken_on_device, decay))

    def _skip(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], broken: nn.Parameter) -> None:
        """Leave out a step, or raise, for the gradient of the parameter ``broken``."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        how = "so large that its square is not finite" if _values(broken).isfinite().all() else "not finite"
        what = f"the gradient of {names.get(id(broken), 'a parameter')} is {how}"
        for parameter in parameters:
            parameter.grad = None
        # A gradient scaler that leaves the check to the optimizer, by this attribute, overflows as a matter of course.
        scaled = getattr(optimizer, "found_inf", None) is not None
        if self.on_nonfinite == "raise" and not scaled:
            raise FloatingPointError(
                f"{what}: no step was taken and nothing has changed; look at the last batch, lower lr, clip the "
                "gradients, or set on_nonfinite='skip'"
            )
        self.skipped_steps += 1
        self._new_skips += 1
        _warn(f"{what}: this optimizer step is skipped whole and nothing has changed; skipped_steps counts such steps")

    def _decay_of(self, optimizer: Optimizer) -> dict[str, float]:
        """The factor by which this step decays each update, for the adapters whose decay is not one."""
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

    def _may_be_left_out_on_device(self, parameters: list[nn.Parameter]) -> bool:
        """Whether an optimizer that can leave out a step by itself should do so, which saves a wait for the device."""
        return (
            self.on_nonfinite == "skip"
            and bool(parameters)
            and all(p.device == parameters[0].device and _waits(p.device) for p in parameters)
            and not any(is_sharded(p) or p.grad.is_sparse for p in parameters if p.grad is not None)
        )

    def _name_missing(self, missing: Set[str], trained: Set[str]) -> None:
        if missing and self.every_adapter_needs_a_gradient:
            raise ValueError(
                f"no gradient reaches the adapters {', '.join(sorted(missing))} in this process, and the others would "
                "wait for it forever: add the layers to exclude_modules, or let every process use the same "
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


def _first_non_finite(
    parameters: list[nn.Parameter], held: Iterable[nn.Parameter], squares: Tensor
) -> nn.Parameter | None:
    """The first parameter with a gradient that is not finite or squares to infinity; one wait for the device.

    A process holds only a part of a sharded parameter, so what one process finds counts for all.

    Args:
        parameters: Those with a gradient.
        held: Those of which this process holds anything.
        squares: The squared norms of their gradients.
    """
    finite = squares.isfinite().tolist()
    broken = next((parameter for parameter, fine in zip(held, finite, strict=True) if not fine), None)
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


def _squares(values: Sequence[Tensor]) -> Tensor:
    """The squared norm of each gradient; if that is not finite, second moments would never recover."""
    norms = foreach_norm([v.to(working_dtype(v.dtype)) for v in values])
    squares = foreach_mul(norms, norms)  # each in its own precision, before they are stacked into one vector
    return torch.stack([square.to(values[0].device) for square in squares])


def _waits(device: torch.device) -> bool:
    """Whether reading a number from the device waits for the work that is queued there."""
    return device.type != "cpu"
