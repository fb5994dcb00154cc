"""What a run shows of its adapters while it goes on: numbers at the trainer's cadence, pictures now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.optim import Optimizer

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.math.decomposition import orthonormality_defect
from geolora_pl.report import metrics, pictures
from geolora_pl.report.rank_map import RankMap, short_names
from geolora_pl.training.clock import DeviceClock
from geolora_pl.training.integrator import RankAdaptiveIntegrator

BAR_RANK, BAR_PARAMS = "rank", "params"  # the names in the progress bar, whose line is short
_POINTS = 128  # of the ranks over time that are kept: enough for a picture, little in a checkpoint
_DISTANCE = 200  # from one adaptation that is logged to the next, as a part of the steps so far
_SHARE = 0.005  # of the run that pictures may take
_SPACING = 1.2  # from one picture to the next, as a factor of the step: many at first, few in a long run


class RankMonitor:
    """The numbers and pictures of one run.

    Numbers that only a tensor knows are read when they are logged and not in every step, for reading waits for the
    device. Pictures go to loggers that show them; drawing stops while it has taken more than 0.5% of the run.

    Attributes:
        before: The ranks at the start of the run; the first step may change them, and the log counts both as step 0.
        shown: The step whose numbers were asked for last.
        learning_rates: Those of the last step, by the names of the optimizer's groups.
        steps: The steps at which ranks were kept.
        ranks: The ranks at those steps, in the order of the adapters.
        clock: It measures the retractions.

    Args:
        integrator: The integrator of the run.
    """

    def __init__(self, integrator: RankAdaptiveIntegrator) -> None:
        self.integrator = integrator
        self.map = RankMap.of(integrator.adapters)
        self._drawn = self.map.thinned(pictures.ROWS)  # where adapters are rows
        self._highest = max(layer.max_rank for layer in integrator.adapters.values())
        self.clock = DeviceClock(next(iter(integrator.adapters.values())).U.device)
        self.before = integrator.ranks()
        self._metric = {name: metrics.rank_of(short) for name, short in short_names(integrator.adapters).items()}
        self.shown = -1
        self.learning_rates: dict[str, Any] = {}
        self.steps: list[int] = []
        self.ranks: list[list[int]] = []
        self._spacing = 1
        self._began = time.monotonic()
        self._drawing = 0.0
        self._next_picture = 0.0
        self._adaptations = 0  # when numbers were asked for last
        self._defect = (-1, 0.0)  # after how many adaptations it was computed, and the defect

    @property
    def seconds(self) -> float:
        """Seconds since the run began in this process."""
        return time.monotonic() - self._began

    def saw_step(self, optimizer: Optimizer) -> None:
        """Remember the learning rates of a step that has just been taken."""
        groups = enumerate(optimizer.param_groups, 1)
        self.learning_rates = {str(group.get("name", f"pg{number}")): _copy(group["lr"]) for number, group in groups}

    def is_due(self, step: int) -> bool:
        """Whether there was an adaptation that is to be logged: every one at first, fewer in a long run."""
        return self.integrator.adaptations > self._adaptations and step - self.shown >= step // _DISTANCE

    def numbers(self, step: int) -> dict[str, float]:
        """The numbers that are logged at a step, those of a retraction once there was one; waits for the device."""
        integrator = self.integrator
        integrator.settle()
        self.shown, self._adaptations = step, integrator.adaptations
        self._record(step)
        ranks = integrator.ranks()
        numbers = {
            **{self._metric[name]: float(rank) for name, rank in ranks.items()},
            metrics.MEAN_RANK: sum(ranks.values()) / len(ranks),
            metrics.ADAPTER_PARAMS: float(integrator.adapter_parameters()),
            metrics.ORTHONORMALITY_DEFECT: self._largest_defect(),
            metrics.SKIPPED_STEPS: float(integrator.skipped_steps),
            metrics.ROLLBACKS: float(integrator.rollbacks),
            **{f"{metrics.LEARNING_RATE}{name}": float(lr) for name, lr in self.learning_rates.items()},
        }
        if (norm := integrator.gradient_norm()) is not None:
            numbers[metrics.GRADIENT_NORM] = norm
        if integrator.adaptations:
            numbers[metrics.TRUNCATION_ERROR] = integrator.truncation_error
            numbers[metrics.ENERGY_KEPT] = 1.0 - integrator.truncation_error**2
        if (seconds := self.clock.last()) is not None:
            numbers[metrics.ADAPTATION_TIME] = seconds
        return numbers

    def _largest_defect(self) -> float:
        """The defect now; it is computed once per retraction, for bases move only then."""
        if self._defect[0] != self.integrator.adaptations:
            self._defect = self.integrator.adaptations, largest_defect(self.integrator.adapters.values())
        return self._defect[1]

    def _record(self, step: int) -> None:
        ranks = list(self.integrator.ranks().values())
        if self.steps and step == self.steps[-1]:
            self.ranks[-1] = ranks
        if self.steps and step < self.steps[-1] + self._spacing:
            return
        self.steps.append(step)
        self.ranks.append(ranks)
        if len(self.steps) > _POINTS:
            del self.steps[1::2], self.ranks[1::2]
            self._spacing = max(1, (self.steps[-1] - self.steps[0]) // len(self.steps))

    def log(self, trainer: L.Trainer, step: int) -> None:
        """Give the numbers, and pictures when they are due, to a trainer and its loggers.

        Not by ``LightningModule.log``, which takes ten times as long and brings every number to the device.

        Args:
            trainer: The trainer of a fit.
            step: The step as the loggers count.
        """
        numbers = self.numbers(step)
        for known in (trainer.callback_metrics, trainer.logged_metrics):
            known.update({name: torch.tensor(value) for name, value in numbers.items()})
        trainer.progress_bar_metrics.update(
            {BAR_RANK: numbers[metrics.MEAN_RANK], BAR_PARAMS: numbers[metrics.ADAPTER_PARAMS]}
        )
        epoch = max(0, trainer.fit_loop.epoch_progress.current.ready - 1)  # current_epoch is one more at the end
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": epoch}, step=step)
            logger.save()
        if trainer.is_global_zero:
            self.show(trainer.loggers, step)

    def show(self, loggers: Iterable[Logger], step: int, at_last: bool = False) -> None:
        """Give the loggers their pictures, if some are due.

        Args:
            loggers: The loggers of the trainer; those that cannot show a picture get none.
            step: The step as the loggers count.
            at_last: Whether they are due whatever was drawn before.
        """
        able = [logger for logger in loggers if shows_pictures(logger)]
        due = step >= self._next_picture and self._drawing <= _SHARE * self.seconds
        if not able or not (due or at_last):
            return
        began = time.monotonic()
        for name, picture in self.pictures().items():
            for logger in able:
                show_picture(logger, name, picture, step)
        self._drawing += time.monotonic() - began
        self._next_picture = step * _SPACING

    def pictures(self) -> dict[str, Image.Image]:
        """The ranks now by kind and depth, the ranks over time, and the singular values of S."""
        adapters, number = self.integrator.adapters, len(self.map.places)
        over_time = dict(zip(adapters, zip(*self.ranks, strict=True), strict=True)) if self.ranks else {}
        sigmas = {
            name: torch.linalg.svdvals(adapters[name].S.detach().cpu())[: adapters[name].rank].tolist()
            for name in self._drawn.places
        }
        return {
            "geolora/rank_map": pictures.rank_map(self.map, self.integrator.ranks()),
            "geolora/ranks_over_time": pictures.ranks_over_time(self._drawn, number, self.steps, over_time),
            "geolora/spectra": pictures.spectra(self._drawn, number, sigmas, self._highest),
        }

    def state_dict(self) -> dict[str, Any]:
        """The ranks over time, for a run that is resumed."""
        return {
            "before": dict(self.before),
            "steps": list(self.steps),
            "ranks": [list(r) for r in self.ranks],
            "spacing": self._spacing,
            "shown": self.shown,
            "adaptations": self._adaptations,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.before = dict(state["before"])
        self.steps, self.ranks = list(state["steps"]), [list(r) for r in state["ranks"]]
        self._spacing = state["spacing"]
        # Older checkpoints do not have these two.
        self.shown = state.get("shown", self.shown)
        self._adaptations = state.get("adaptations", self.integrator.adaptations)


def _copy(lr: float | torch.Tensor) -> float | torch.Tensor:
    return lr.clone() if isinstance(lr, torch.Tensor) else lr  # a scheduler writes into a tensor


@torch.no_grad()
def largest_defect(layers: Iterable[GeoLoRALayer]) -> float:
    """The largest orthonormality defect of the bases of adapters."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for layer in layers:
        for basis in (layer.U, layer.V):
            alike.setdefault((basis.shape, basis.dtype, basis.device), []).append(basis)
    return max(float(orthonormality_defect(torch.stack(bases)).max()) for bases in alike.values())


def shows_pictures(logger: Logger) -> bool:
    """Whether a logger is one of those that :func:`show_picture` knows."""
    return isinstance(logger, (TensorBoardLogger, WandbLogger))


def show_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to TensorBoard or Weights & Biases.

    Args:
        logger: A logger that :func:`shows_pictures`.
        name: The name under which it is shown.
        picture: The picture, in RGB.
        step: The step as the logger counts.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step)
