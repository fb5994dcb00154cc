"""What a run shows of its adapters while it goes on: numbers at the trainer's cadence, pictures now and then."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image

from geolora_pl.adapters.base import GeoLoRALayer
from geolora_pl.loggers import show_picture, shows_pictures
from geolora_pl.math.decomposition import orthonormality_defect
from geolora_pl.report.heat_map import heat_map
from geolora_pl.report.rank_map import RankMap, depth_label, spread
from geolora_pl.training.clock import DeviceClock
from geolora_pl.training.integrator import RankAdaptiveIntegrator

_IN_BAR = ("rank/mean", "adapter_params")
_POINTS = 128  # of the ranks over time that are kept: enough for a picture, little in a checkpoint
_SHARE = 0.005  # of the run that pictures may take
_SPACING = 1.2  # from one picture to the next, as a factor of the step: many at first, few in a long run
_COLUMNS = 96  # of the ranks over time
_DEPTHS, _ROWS = 128, 300  # at most, so that a picture of thousands of layers can be looked at
_DECADES = 2  # of singular values: tau drops most of what is smaller


class RankMonitor:
    """The numbers and pictures of one run.

    Numbers that only a tensor knows are read when they are logged and not in every step, for reading waits for the
    device. Pictures go to loggers that show them; drawing stops while it has taken more than 0.5% of the run.

    Attributes:
        before: The ranks at the start of the run; the first step may change them, and the log counts both as step 0.
        shown: The step whose numbers were asked for last.
        steps: Steps of the ranks that are kept.
        ranks: The ranks then, in the order of the adapters.
        clock: Of the retractions.

    Args:
        integrator: Of the run.
    """

    def __init__(self, integrator: RankAdaptiveIntegrator) -> None:
        self.integrator = integrator
        self.map = RankMap.of(integrator.adapters)
        self._drawn = self.map.thinned(_ROWS)  # where adapters are rows
        self._highest = max(layer.max_rank for layer in integrator.adapters.values())
        self.clock = DeviceClock(next(iter(integrator.adapters.values())).U.device)
        self.before = integrator.ranks()
        self.shown = -1
        self.steps: list[int] = []
        self.ranks: list[list[int]] = []
        self._spacing = 1
        self._began = time.monotonic()
        self._drawing = 0.0
        self._next_picture = 0.0
        self._defect = (-1, 0.0)  # the number of adaptations it is of, and the defect

    @property
    def seconds(self) -> float:
        """Seconds since the run began in this process."""
        return time.monotonic() - self._began

    def numbers(self, step: int) -> dict[str, float]:
        """What is logged at a step, of a retraction once there was one; waits for the device."""
        integrator = self.integrator
        integrator.settle()
        self.shown = step
        self._record(step)
        ranks = integrator.ranks()
        numbers = {
            **{f"rank/{name}": float(rank) for name, rank in ranks.items()},
            "rank/mean": sum(ranks.values()) / len(ranks),  # after the ranks: an adapter may be named mean
            "adapter_params": float(integrator.adapter_parameters()),
            "orthonormality_defect": self._largest_defect(),
            "skipped_steps": float(integrator.skipped_steps),
        }
        if integrator.adaptations:
            numbers["truncation_error"] = integrator.truncation_error
            numbers["energy_kept"] = 1.0 - integrator.truncation_error**2
        if (seconds := self.clock.last()) is not None:
            numbers["adaptation_time"] = seconds
        return numbers

    def _largest_defect(self) -> float:
        """Bases move only when factors are retracted, so between two retractions it stays."""
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
            trainer: In a fit.
            step: As the loggers count.
        """
        numbers = self.numbers(step)
        for known in (trainer.callback_metrics, trainer.logged_metrics):
            known.update({name: torch.tensor(value) for name, value in numbers.items()})
        trainer.progress_bar_metrics.update({name: numbers[name] for name in _IN_BAR})
        epoch = max(0, trainer.fit_loop.epoch_progress.current.ready - 1)  # current_epoch is one more at the end
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": epoch}, step=step)
            logger.save()
        if trainer.is_global_zero:
            self.show(trainer.loggers, step)

    def show(self, loggers: Iterable[Logger], step: int, at_last: bool = False) -> None:
        """Give the loggers their pictures, if some are due.

        Args:
            loggers: Of the trainer; those that cannot show a picture get none.
            step: As the loggers count.
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
        return {"rank_map": self._rank_map(), "ranks_over_time": self._over_time(), "spectra": self._spectra()}

    def _rank_map(self) -> Image.Image:
        ranks = self.integrator.ranks()
        return heat_map(
            [spread(row, _DEPTHS) for row in spread(self.map.rows(ranks), _ROWS)],
            spread(list(self.map.short_kinds().values()), _ROWS),
            [depth_label(depth) for depth in spread(self.map.depths, _DEPTHS)],
            f"rank by kind of layer and depth, {sum(ranks.values()) / len(ranks):.2f} on average",
            low=0,
            high=self._highest,
            cell=(34, 24),
            numbers=True,
        )

    def _over_time(self) -> Image.Image:
        order = {name: i for i, name in enumerate(self.integrator.adapters)}
        last = self.steps[-1] if self.steps else 0
        columns = min(_COLUMNS, last + 1)
        at = [bisect_right(self.steps, last * (j + 1) // columns) - 1 for j in range(columns)]
        labels = [""] * columns
        labels[0], labels[-1] = str(self.steps[0]) if self.steps else "", str(last)
        return heat_map(
            [[self.ranks[i][order[name]] if i >= 0 else None for i in at] for name in self._drawn.places],
            self._row_labels(),
            labels,
            f"rank by adapter over steps, of at most {self._highest}{self._how_many}",
            low=0,
            high=self._highest,
            cell=(5, self._row_height),
        )

    def _spectra(self) -> Image.Image:
        layers = {name: self.integrator.adapters[name] for name in self._drawn.places}
        sigmas = {
            name: torch.linalg.svdvals(layer.S.detach().cpu())[: layer.rank].double() for name, layer in layers.items()
        }
        largest = max((float(sigma[0]) for sigma in sigmas.values() if len(sigma)), default=0.0)
        values: list[list[float | None]] = []
        for sigma in sigmas.values():
            relative = (sigma / largest).clamp_min(10.0**-_DECADES).log10() if largest else sigma
            values.append([*relative.tolist(), *[None] * (self._highest - len(relative))])
        return heat_map(
            values,
            self._row_labels(),
            [str(j + 1) for j in range(self._highest)] if self._highest <= 32 else [""] * self._highest,
            f"singular values of S, largest {largest:.3g}, by their logarithm over {_DECADES} decades{self._how_many}",
            low=-_DECADES,
            high=0,
            cell=(22, self._row_height) if self._highest <= 32 else (5, self._row_height),
        )

    @property
    def _how_many(self) -> str:
        drawn, there = len(self._drawn.places), len(self.map.places)
        return "" if drawn == there else f" ({drawn} of {there} adapters)"

    @property
    def _row_height(self) -> int:
        return min(16, 1200 // len(self._drawn.places))

    def _row_labels(self) -> list[str]:
        """A label for each adapter, or for the first of each kind where they are many."""
        labels, firsts = self._drawn.short_names(), self._drawn.firsts()
        return [label if self._row_height >= 12 or name in firsts else "" for name, label in labels.items()]

    def state_dict(self) -> dict[str, Any]:
        """The ranks over time, for a run that is resumed."""
        return {
            "before": dict(self.before),
            "steps": list(self.steps),
            "ranks": [list(r) for r in self.ranks],
            "spacing": self._spacing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.before = dict(state["before"])
        self.steps, self.ranks = list(state["steps"]), [list(r) for r in state["ranks"]]
        self._spacing = state["spacing"]


@torch.no_grad()
def largest_defect(layers: Iterable[GeoLoRALayer]) -> float:
    """The largest orthonormality defect of the bases of adapters."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for layer in layers:
        for basis in (layer.U, layer.V):
            alike.setdefault((basis.shape, basis.dtype, basis.device), []).append(basis)
    return max(float(orthonormality_defect(torch.stack(bases)).max()) for bases in alike.values())
