"""The methods that are compared: this package, PEFT's LoRA family, full fine-tuning, and the head alone.

All of them train the same new head in full, at the task's own learning rate, and adapt the layers that this package
adapts by default. A new method is a class with ``settings`` and ``start``, and one line each in ``METHODS`` and in
``LRS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.shared.task import Task
from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    inject_adapters,
    parameter_groups,
)
from geolora_pl.math.ranks import usual_cadence

Settings = Mapping[str, Any]
_CHANGES_NO_RESULT = ("on_nonfinite", "on_divergence", "small_checkpoints", "adapter")  # arguments of the callback


@dataclass
class Training:
    """A model made ready by a method.

    Attributes:
        model: Called with a batch, it returns the loss to minimise.
        optimizer: The optimizer of everything that is trained.
        parameters: Counts the active adapter parameters, without the head.
        after_step: Called after each step of the optimizer with the number of the step, from 0.
        ranks: Returns the rank of each adapter, where ranks may differ.
    """

    model: nn.Module
    optimizer: Optimizer
    parameters: Callable[[], int]
    after_step: Callable[[int], object] = lambda step: None
    ranks: Callable[[], Sequence[int]] = tuple


class Method(Protocol):
    """A way to train a model."""

    def settings(self) -> dict[str, Any]:
        """Everything that a result of the method depends on, as plain values; runs are told apart by it."""

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        """Make a fresh model ready for training; ``lr`` is the learning rate of everything but the head."""


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The default arguments of a function or class."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def default_lr() -> float:
    """The default learning rate of this package's optimizer."""
    lr: float = defaults(RiemannianAdam)["lr"]
    return lr


@dataclass(frozen=True)
class GeoLoRA:
    """This package with its defaults, except for what is given.

    Args:
        adapter: Arguments of ``AdapterConfig``.
        callback: Arguments of ``GeoLoRACallback``.
        optimizer: Arguments of ``RiemannianAdam``.
        carry_moments: Whether the moments move with the bases.
    """

    adapter: Settings = field(default_factory=dict)
    callback: Settings = field(default_factory=dict)
    optimizer: Settings = field(default_factory=dict)
    carry_moments: bool = True

    def settings(self) -> dict[str, Any]:
        callback = defaults(GeoLoRACallback) | dict(self.callback)
        return {
            "adapter": asdict(AdapterConfig(**self.adapter)),
            "callback": {name: value for name, value in callback.items() if name not in _CHANGES_NO_RESULT},
            "optimizer": {k: v for k, v in (defaults(RiemannianAdam) | dict(self.optimizer)).items() if k != "lr"},
            "carry_moments": self.carry_moments,
        }

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        config = AdapterConfig(**{**self.adapter, "target_modules": task.targets, "modules_to_save": task.heads})
        inject_adapters(model, config)
        schedule = defaults(GeoLoRACallback) | dict(self.callback)
        schedule["adapt_every"] = schedule["adapt_every"] or usual_cadence(task.steps)
        names = defaults(RankAdaptiveIntegrator)
        integrator = RankAdaptiveIntegrator(model, **{name: schedule[name] for name in names})
        groups = parameter_groups(model, head_lr=task.head_lr)
        optimizer = RiemannianAdam(groups, lr=lr, **self.optimizer)
        adapting = schedule["adapt_until"] * task.steps

        def after_step(step: int) -> None:
            integrator.rank_changes = step + 1 < adapting or schedule["adapt_until"] == 1
            states = () if self.carry_moments else tuple(optimizer.state.values())
            moments = [(value, value.clone()) for state in states for value in state.values()]
            integrator.step(optimizer)
            for value, before in moments:
                value.copy_(before)
            if step + 1 == task.steps:
                integrator.retract(optimizer)  # as the callback does with what is still pending

        return Training(
            model, optimizer, integrator.adapter_parameters, after_step, lambda: list(integrator.ranks().values())
        )


@dataclass(frozen=True)
class LoRA:
    """PEFT's LoRA with its defaults, rank 8 and ``alpha`` 8, or one of its variants.

    Args:
        options: More arguments of ``LoraConfig``.
    """

    options: Settings = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        return {"r": 8, "lora_alpha": 8, **self.options}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        return _start_peft(task, model, lr, LoraConfig(target_modules=list(task.targets), **self.settings()))


@dataclass(frozen=True)
class Riemannian:
    """PEFT's LoRA, whose gradients PEFT's optimizer multiplies by the inverse Gram matrices of the factors."""

    def settings(self) -> dict[str, Any]:
        return {"r": 8, "lora_alpha": 8, "reg": defaults(create_riemannian_optimizer)["reg"]}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        training = LoRA().start(task, model, lr)
        groups = training.optimizer.param_groups
        optimizer = create_riemannian_optimizer(training.model, AdamW, lr=lr, weight_decay=0.0)
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group({name: group[name] for name in ("params", "lr", "adapters") if name in group})
        return replace(training, optimizer=optimizer)


@dataclass(frozen=True)
class AdaLoRA:
    """PEFT's AdaLoRA, with its allocator called at every step.

    The rank at the start, the scale, the penalty, and the parts of the run before and after the ranks shrink are those
    of its authors' scripts for GLUE.

    Args:
        rank: Mean rank at the end; the rank at the start is one and a half times as large.
    """

    rank: int = 8

    def settings(self) -> dict[str, Any]:
        return {
            "init_r": self.rank * 3 // 2,
            "target_r": self.rank,
            "lora_alpha": 32,
            "orth_reg_weight": 0.1,
            "tinit": 0.15,  # parts of the run
            "tfinal": 0.45,
        }

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        settings = self.settings()
        lengths = {name: max(1, round(settings.pop(name) * task.steps)) for name in ("tinit", "tfinal")}
        config = AdaLoraConfig(target_modules=list(task.targets), total_step=task.steps, **lengths, **settings)
        training = _start_peft(task, model, lr, config)

        def ranks() -> list[int]:
            return [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]

        def live_parameters() -> int:
            layers = [module for module in model.modules() if hasattr(module, "lora_E")]
            costs = [layer.in_features + layer.out_features + 1 for layer in layers]
            return sum(rank * cost for rank, cost in zip(ranks(), costs, strict=True))

        return replace(training, parameters=live_parameters, after_step=training.model.update_and_allocate, ranks=ranks)


@dataclass(frozen=True)
class Full:
    """Full fine-tuning, which trains every weight of the model."""

    def settings(self) -> dict[str, Any]:
        return {}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        return _start_adamw(task, model, model, lr)


@dataclass(frozen=True)
class HeadOnly:
    """Training of the new head alone on the frozen model; the learning rate that is swept is the head's."""

    def settings(self) -> dict[str, Any]:
        return {}

    def start(self, task: Task, model: nn.Module, lr: float) -> Training:
        model.requires_grad_(False)
        return _start_adamw(replace(task, head_lr=lr), model, model, lr)


def _start_peft(task: Task, model: nn.Module, lr: float, config: LoraConfig) -> Training:
    # This is the model inside the PeftModel, whose own forward would leave out AdaLoRA's, which adds the penalty.
    tuner = get_peft_model(model, config).base_model
    return _start_adamw(task, model, tuner, lr)


def _start_adamw(task: Task, model: nn.Module, called: nn.Module, lr: float) -> Training:
    """Train the head and all that is not frozen, without weight decay, as this package does by default."""
    head = [p for name in task.heads for p in model.get_submodule(name).requires_grad_(True).parameters()]
    of_head = {id(p) for p in head}
    adapted = [p for p in model.parameters() if p.requires_grad and id(p) not in of_head]
    groups: Iterable[dict[str, Any]] = [
        {"params": head, "lr": task.head_lr},
        *([{"params": adapted, "lr": lr, "adapters": True}] if adapted else []),
    ]
    return Training(called, AdamW(groups, weight_decay=0.0), lambda: sum(p.numel() for p in adapted))


METHODS: dict[str, Method] = {
    "geolora": GeoLoRA(),
    "lora": LoRA(),
    "lora r 4": LoRA({"r": 4, "lora_alpha": 4}),  # about as many parameters as this package finds
    "adalora": AdaLoRA(),
    "dora": LoRA({"use_dora": True}),
    "pissa": LoRA({"init_lora_weights": "pissa"}),
    "rslora": LoRA({"use_rslora": True}),
    "riemannian": Riemannian(),
    "full": Full(),
    "head": HeadOnly(),
}
_OF_OURS = tuple(float(f"{default_lr() * x:.1g}") for x in (0.1, 1 / 3, 1.0, 3.0))
_OF_LORA = (1e-3, 3e-3, 1e-2)
LRS: dict[str, tuple[float, ...]] = {
    "geolora": _OF_OURS,
    "lora": (3e-4, *_OF_LORA),
    "lora r 4": _OF_LORA,
    "adalora": (3e-3, 1e-2, 3e-2),
    "dora": _OF_LORA,
    "pissa": (3e-4, 1e-3, 3e-3),
    "rslora": _OF_LORA,
    "riemannian": _OF_LORA,
    "full": (3e-5, 1e-4, 3e-4),
    "head": (1e-3, 1e-2),
}
