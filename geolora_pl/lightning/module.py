"""The base of a LightningModule with adapters: build the model, and the rest is here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.inject import has_adapters, inject_adapters
from geolora_pl.adapters.quantised import loadable_state
from geolora_pl.lightning.callback import GeoLoRACallback
from geolora_pl.lightning.hyperparameters import check_plain, from_checkpoint, refuse_missing
from geolora_pl.lightning.internals import (
    callbacks_of,
    callbacks_of_fit,
    is_part_in_fit,
    restricted_classmethod,
    run_length,
)
from geolora_pl.storage.checkpoint import complete, follow_rule, loads, read_checkpoint
from geolora_pl.storage.plain_file import write_weights
from geolora_pl.training.groups import parameter_groups
from geolora_pl.training.optim import RiemannianAdam
from geolora_pl.training.schedule import warmup_cosine

if TYPE_CHECKING:
    from typing_extensions import Self

_MAY_DIFFER = ("init_rank", "dropout", "probes")  # of adapters that are loaded

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]


class GeoLoRAModule(L.LightningModule):
    """A LightningModule with adapters: subclass it, write :meth:`build_model` and the usual steps.

    The model is built in ``configure_model``, so that a checkpoint finds the adapters it belongs to, and lies in
    ``self.model``. A trainer without a :class:`GeoLoRACallback` gets one with its defaults.

    Args:
        adapter: What to adapt; by default every linear layer but the head, at ranks up to 16.
        optimizer: Makes the optimizer from parameter groups; any torch optimizer.
        lr_scheduler: Makes a scheduler from the optimizer, stepped after every optimizer step (``ReduceLROnPlateau``
            once per epoch); by default a warm-up and half a cosine to zero at the end of the run.
        warmup: Length of that warm-up for the adapters: a part of the run below 1, a number of steps from 1 on; at
            least 0.
        head_warmup: Length of the warm-up for what is trained in full; it is shorter, so that the head leads.
        head_lr: Learning rate of what is trained in full (head, biases), above 0; ``None`` for that of the adapters.

    Raises:
        ValueError: ``warmup``, ``head_warmup`` or ``head_lr`` is out of range.

    Example:
        >>> class Regression(GeoLoRAModule):
        ...     def build_model(self):
        ...         return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        ...     def training_step(self, batch):
        ...         x, y = batch
        ...         return nn.functional.mse_loss(self.model(x), y)
        >>> module = Regression(AdapterConfig(target_modules=["0"], modules_to_save=["2"]))
        >>> module.configure_model()
    """

    model: nn.Module
    # The arguments that say where the base's weights come from; their values where a checkpoint brings the weights.
    base_arguments: ClassVar[Mapping[str, Any]] = {}
    locating_arguments: ClassVar[Sequence[str]] = ()  # say where a model lies, which a configuration says better

    def __init__(
        self,
        adapter: AdapterConfig = AdapterConfig(),
        optimizer: OptimizerCallable = RiemannianAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.2,
        head_warmup: float = 0.02,
        head_lr: float | None = 1e-3,
    ) -> None:
        super().__init__()
        for name, length in (("warmup", warmup), ("head_warmup", head_warmup)):
            if not length >= 0:
                raise ValueError(
                    f"{name}={length!r} must be at least 0: a part of the run below 1, else a number of steps"
                )
        if head_lr is not None and not head_lr > 0:
            raise ValueError(f"head_lr={head_lr!r} must be above 0")
        # A checkpoint must load with weights_only=True, so it holds the configuration as plain values, and from there
        # it comes back so; the factories of optimizer and scheduler cannot be saved at all.
        self.adapter = AdapterConfig(**adapter) if isinstance(adapter, dict) else adapter
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.hparams["adapter"] = asdict(self.adapter)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.head_warmup = head_warmup
        self.head_lr = head_lr

    def build_model(self) -> nn.Module:
        """Return the pretrained model, without adapters."""
        raise NotImplementedError(f"{type(self).__name__} must define build_model() and return the pretrained model")

    def new_modules(self) -> Sequence[str]:
        """Names of modules in ``self.model`` that are not pretrained, such as a new head: they are trained in full."""
        return ()

    def default_targets(self) -> str | Sequence[str]:
        """What ``target_modules: auto`` stands for: every linear layer but the head, unless a subclass knows better."""
        return "all-linear"

    def configure_model(self) -> None:
        """Build the model and put the adapters in, once.

        Raises:
            ValueError: The trainer of a fit has no :class:`GeoLoRACallback`, or looks for a learning rate.
        """
        self._check_callbacks()
        if not hasattr(self, "model"):
            self.model = self.build_model()
        if not has_adapters(self):
            targets = self.adapter.target_modules
            config = replace(
                self.adapter,
                target_modules=self.default_targets() if targets == "auto" else targets,
                modules_to_save=(*self.adapter.modules_to_save, *self.new_modules()),
            )
            inject_adapters(self.model, config)
            if self.device_mesh is not None:  # ModelParallelStrategy
                from geolora_pl.training.fsdp import shard_model  # imports a second's worth of torch

                shard_model(self.model, self.device_mesh)

    def _check_callbacks(self) -> None:
        callbacks = callbacks_of_fit(self)
        if callbacks is None:
            return
        if not _has_callback(callbacks):
            raise ValueError(
                f"the trainer has no GeoLoRACallback, without which {type(self).__name__} would train without moving "
                "its ranks: add one to its callbacks, or let configure_callbacks return that of "
                "super().configure_callbacks() as well"
            )
        if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            raise ValueError(
                "LearningRateFinder sets one learning rate for adapters and head, which need different ones, and "
                f"writes it to a name that {type(self).__name__} does not read: remove it, and try lr of the optimizer "
                "at 0.1, 0.3 and 1"
            )

    def save_model(self, folder: Path) -> None:
        """Write ``self.model``, whose adapters have been merged, as ``model.safetensors`` into an empty folder.

        A task overrides it to write what the library of its model loads.
        """
        write_weights(self.model, folder / "model.safetensors")

    @property
    def trainer(self) -> L.Trainer:
        """The trainer, which brings a :class:`GeoLoRACallback` also where this is a part of another LightningModule."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        L.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]  # a property
        if trainer is not None and is_part_in_fit(self, trainer) and not _has_callback(callbacks_of(trainer)):
            callbacks_of(trainer).insert(0, GeoLoRACallback())

    def configure_callbacks(self) -> list[L.Callback]:
        """A callback with its defaults, unless the trainer has one."""
        return [] if _has_callback(callbacks_of(self.trainer)) else [GeoLoRACallback()]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, also where the base is sharded and the adapters are not."""
        sharded = self.device_mesh is not None
        if sharded and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            from geolora_pl.training.fsdp import clip_by_norm

            clip_by_norm((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """What the value of an argument in a checkpoint is taken for; a task refuses what a file must not decide.

        Args:
            name: The argument.
            value: Its value in the file.

        Raises:
            ValueError: The value names code, a place to load from, or something else that only the user may say.
        """
        check_plain(value)
        if name != "adapter":
            return value
        known = {field.name for field in fields(AdapterConfig)}
        if not isinstance(value, Mapping) or value.keys() - known:
            raise ValueError("is not a configuration of adapters")
        return AdapterConfig(**value)

    @restricted_classmethod
    def load_from_checkpoint(  # a task may have an argument checkpoint_path of its own
        cls,
        path: Any = None,
        /,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module of a checkpoint and load it; the file brings numbers and names, and never says what is run.

        Args:
            path: The file, its address, or an open file; also by the name of ``checkpoint_path``.
            map_location: The device of the module; by default the CPU.
            hparams_file: Not taken: give the arguments themselves.
            strict: Whether missing and unknown weights are refused; by default as the module says.
            weights_only: ``False`` is not taken: it would run code of the file.
            **kwargs: Arguments of the class, which count more than those of the checkpoint.

        Raises:
            ValueError: The file is broken, belongs to another class, or says what only the caller may say, such as
                where the base of a small checkpoint lies.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError(
                "load_from_checkpoint takes neither hparams_file nor weights_only=False: give the arguments "
                f"of {cls.__name__} themselves, and load a file that holds more than plain values by torch.load"
            )
        path = kwargs.pop("checkpoint_path", None) if path is None else path
        if path is None:
            raise ValueError("load_from_checkpoint needs the path of a checkpoint")
        checkpoint = read_checkpoint(path)
        with loads(path, cls.__name__):
            module = cls.from_content(checkpoint, strict, **kwargs)
        return module if map_location is None else module.to(map_location)

    @classmethod
    def from_content(cls, checkpoint: dict[str, Any], strict: bool | None = None, **kwargs: Any) -> Self:
        """Build the module of a checkpoint that has been read, and load it.

        Args:
            checkpoint: The content of the file.
            strict: Whether missing and unknown weights are refused; by default as the module says.
            **kwargs: Arguments of the class, which count more than those of the checkpoint.

        Raises:
            ValueError: The checkpoint belongs to another class, or says what only the caller may say.
        """
        taken, refused = from_checkpoint(cls, checkpoint)
        refuse_missing(refused, kwargs)
        module = cls(**{**taken, **kwargs})
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **kwargs}  # these count from now on
        module.restore(checkpoint, strict)
        return module

    def restore(self, checkpoint: dict[str, Any], strict: bool | None = None) -> None:
        """Build the model, and load the weights of a checkpoint into it.

        Args:
            checkpoint: The content of the file.
            strict: Whether missing and unknown weights are refused; by default as the module says.

        Raises:
            ValueError: The weights do not fit.
        """
        self.configure_model()
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=self.strict_loading if strict is None else strict)
        follow_rule(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose adapters are not those of this module, and complete a small one.

        Raises:
            ValueError: The checkpoint was made with other adapters or on another base.
        """
        complete(checkpoint, self)
        theirs = checkpoint.get("hyper_parameters", {}).get("adapter")
        if not isinstance(theirs, dict):  # load_from_checkpoint was given another one on purpose
            return
        for name, ours in asdict(self.adapter).items():
            if name in _MAY_DIFFER or name not in theirs or _as_saved(ours) == _as_saved(theirs[name]):
                continue
            raise ValueError(
                f"adapter.{name}={ours!r} does not fit the checkpoint, which was made with {theirs[name]!r}: set it to "
                "that, or start a new run"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights that belong to this module, or none at all: torch itself loads what fits before it complains.

        Raises:
            ValueError: A name is missing or unknown (if ``strict``), or a shape differs.
        """
        own = loadable_state(self)
        beside = self.state_dict().keys() - own.keys()  # the scales of quantised weights
        state_dict = {name: value for name, value in state_dict.items() if name not in beside}
        for name, layer in self.named_modules(remove_duplicate=False):
            if isinstance(layer, GeoLoRALayer):
                layer.fit_probes(state_dict, f"{name}.")
        wrong = [
            f"{name} is {tuple(state_dict[name].shape)} there and {tuple(value.shape)} here"
            for name, value in own.items()
            if name in state_dict and state_dict[name].shape != value.shape
        ]
        if strict:
            wrong += [f"{name} is missing" for name in own if name not in state_dict]
            wrong += [f"{name} is unknown" for name in state_dict if name not in own]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise ValueError(
                f"the weights do not fit this {type(self).__name__}: {'; '.join(wrong[:3])}{more}; choose the "
                "checkpoint of such a model, or the settings that it was made with"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def configure_optimizers(self) -> Any:
        """Give the optimizer what is trained: adapters, then matrices with and vectors without weight decay."""
        try:
            optimizer = self.optimizer(parameter_groups(self, head_lr=self.head_lr))
        except ValueError as error:
            raise ValueError(f"optimizer: {error}; correct its settings, or use another of the Adam family") from error
        if self.lr_scheduler is None:
            # A second fit of one trainer goes on where the first has ended; a checkpoint brings its own place later.
            steps, taken = run_length(self.trainer), self.trainer.global_step
            scheduler: Any = warmup_cosine(optimizer, self.warmup, steps, self.head_warmup, taken)
        else:
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _has_callback(callbacks: Iterable[object]) -> bool:
    return any(isinstance(callback, GeoLoRACallback) for callback in callbacks)


def _as_saved(value: object) -> object:
    """A setting as it is after a checkpoint: tuples may have become lists."""
    return list(value) if isinstance(value, tuple) else value
