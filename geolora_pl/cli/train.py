"""The commands that train, test and predict: LightningCLI with the callback always there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich import get_console

import geolora_pl
from geolora_pl.cli.called import called
from geolora_pl.cli.checks import CheckTestSplit, check_command
from geolora_pl.cli.internals import CheckpointAwareCLI
from geolora_pl.cli.messages import OneSentenceParser, own_defaults
from geolora_pl.lazy import find_class
from geolora_pl.lightning.callback import GeoLoRACallback
from geolora_pl.lightning.hyperparameters import from_checkpoint
from geolora_pl.lightning.internals import callbacks_of, classes_by_name, leave_out_hp_metric
from geolora_pl.lightning.loading import build_module
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.lightning.names import path_of
from geolora_pl.lightning.predictions import writer_for
from geolora_pl.lightning.summary import end_summary, wants_tables
from geolora_pl.report.printed import print_lines, print_summary
from geolora_pl.storage.checkpoint import read_checkpoint

_SAVED = "saved by fit, and replaced by the next fit in this folder"  # the line that tells such a configuration
_LOOKED_UP = ("best", "last", "hpc", "registry")  # what Lightning finds a checkpoint for


class SaveFitConfig(SaveConfigCallback):
    """Save the configuration of a fit beside the run; a later test in the same folder leaves it alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save nothing yet: a fit that is refused leaves the configuration of the run before it alone."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save over no file but one that an earlier fit has saved."""
        folder = trainer.log_dir  # of which all processes must ask
        if folder is None:
            rank_zero_warn(f"{self.config_filename} is not saved: no logger has a folder; set its save_dir")
            return
        target = Path(folder) / self.config_filename
        sources = [Path(str(source)) for source in self.config.get("config") or []]
        if any(source.resolve() == target.resolve() for source in sources):
            return
        if trainer.strategy.broadcast(_is_foreign(target)):
            rank_zero_warn(
                f"{target} was not saved by a fit and is kept, so that the configuration of this run is not saved: "
                "give the run a folder of its own by save_dir of its logger, or by trainer.default_root_dir"
            )
            return
        self.parser.dump_header = [*(self.parser.dump_header or []), _SAVED]
        super().setup(trainer, pl_module, "fit")


def _is_foreign(config: Path) -> bool:
    """Whether there is a configuration that no fit has saved."""
    return config.exists() and f"# {_SAVED}" not in config.read_text(encoding="utf-8", errors="replace").splitlines()


class GeoLoRACLI(CheckpointAwareCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for modules and data modules given by class path."""

    _taken: Mapping[str, Any] = MappingProxyType({})  # what the checkpoint says about the module

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--geolora.*``, ``--test_after_fit`` and ``--output``."""
        parser.add_lightning_class_args(GeoLoRACallback, "geolora")
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Whether a fit ends with a test.")
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="What predict writes: a file, .csv or .jsonl, or a folder of images.",
        )

    def before_predict(self) -> None:
        """Write the predictions to ``--output``.

        Raises:
            ValueError: Nothing would write them.
        """
        callbacks = callbacks_of(self.trainer)
        if (output := self.config["predict"]["output"]) is not None:
            callbacks.append(writer_for(self.model, output))
        elif not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            raise ValueError("output=None: nothing would keep the predictions: name a file or folder by --output")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Find classes by name, keep their own defaults, and give a run without a logger a folder of its own.

        Raises:
            ValueError: The seed is out of range, or a setting or its absence would make the command useless.
        """
        with classes_by_name(path_of), own_defaults():
            super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        if config.trainer.logger in (False, []) and config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = "lightning_logs"  # and not the folder in which the user works
        if (seed := config["seed_everything"]) is not True and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything={seed} must be at least 0 and below 2**32")
        check_command(self.config["subcommand"], config)

    def read_ckpt_path(self) -> None:
        """Refuse a broken checkpoint, and complete the settings of a task by what its own checkpoint knows.

        That is for one the classes of its data. The class of the module, and whatever a file must not decide, stay as
        the configuration says. For a fit all settings do, and what does not fit is refused when the file is loaded.
        """
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        path = config.get("ckpt_path")
        if not path or _is_left_to_lightning(path, config):
            return
        if subcommand == "fit" and "://" in path:
            return  # Lightning fetches it, and nothing is taken from it here
        checkpoint = read_checkpoint(path, mmap=True)
        module_class = None if subcommand == "fit" else find_class(config.model.class_path)
        if module_class is not None and issubclass(module_class, GeoLoRAModule):
            self._taken, _ = from_checkpoint(module_class, checkpoint, configured=True)

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; what one of them says of its arguments is passed on as it is."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:  # of the trainer
            raise ValueError(str(error)) from error
        except ValueError as error:
            raise _without_types(error) from error.__cause__
        subcommand = self.config["subcommand"]
        if self.config[subcommand].trainer.logger in (None, True):
            leave_out_hp_metric(self.trainer)
        if subcommand != "fit" and self.config[subcommand]["ckpt_path"] == "last":
            self._look_up_last(subcommand)
        if self._taken:
            self.model = build_module(self.config[subcommand].model.as_dict(), self._taken)

    def _look_up_last(self, subcommand: str) -> None:
        """Read the last checkpoint as one that is given by its path; Lightning would evaluate without one, too.

        A fit that asks for it starts from scratch, as Lightning means it: the first job and the one that is put back
        into the queue have the same command.

        Raises:
            ValueError: There is no last checkpoint, and untrained adapters would be evaluated.
        """
        path = self.find_last()
        if path is None:
            usual = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "checkpoints"
            folders = {str(getattr(saver, "dirpath", None) or usual) for saver in self.trainer.checkpoint_callbacks}
            where = f"in {' or '.join(sorted(folders))}" if folders else "and no ModelCheckpoint to look for it"
            raise ValueError(f"ckpt_path='last': there is no last.ckpt {where}: give the path of a checkpoint")
        for config in (self.config, self.config_init):
            config[subcommand]["ckpt_path"] = str(path)
        self.read_ckpt_path()

    def before_fit(self) -> None:
        """Refuse a test after the fit that there is nothing for, before the fit."""
        if self.config["fit"]["test_after_fit"]:
            callbacks_of(self.trainer).insert(0, CheckTestSplit())

    def after_fit(self) -> None:
        """Test if asked to, and say what came of it and how to look closer."""
        self._print_ranks()
        results: dict[str, float] = {}
        if self.config["fit"]["test_after_fit"]:
            tested = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            results = {name: value for of_loader in tested for name, value in of_loader.items()}
        self._print_results(results)

    @rank_zero_only
    def _print_ranks(self) -> None:
        """They are what the command was run for, also where the callback was told to be quiet."""
        monitor = next(c.monitor for c in callbacks_of(self.trainer) if isinstance(c, GeoLoRACallback))
        if monitor is not None and not wants_tables(self.trainer):
            print_summary(*end_summary(self.trainer, self.model, monitor))

    @rank_zero_only
    def _print_results(self, results: dict[str, float]) -> None:
        lines = [f"{name}: {value:.4f}" for name, value in results.items()]
        for loggers, hint in (
            ((TensorBoardLogger,), "look closer: tensorboard --logdir"),
            ((TensorBoardLogger, CSVLogger), f"a page of it: {called()} report --run"),
        ):
            folders = [logger.log_dir for logger in self.trainer.loggers if isinstance(logger, loggers)]
            lines += [f"{hint} {shlex.quote(folder)}" for folder in folders[:1]]
        print_lines(lines, get_console())


def _is_left_to_lightning(path: str, config: Namespace) -> bool:
    """Whether a checkpoint is looked for by its name, of several files, or trusted as it is."""
    by_name = path.partition(":")[0] in _LOOKED_UP
    return by_name or (Path(path) / ".metadata").is_file() or config.get("weights_only") is False


def _without_types(error: ValueError) -> ValueError:
    """The error of a class that jsonargparse could not make, which it wraps in all the types that it tried."""
    while str(error).startswith("Does not validate") and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return error


def run(args: ArgsType = None) -> None:
    """Run a command.

    Args:
        args: What to parse instead of ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else args
    cli = _cli_of(given[0] if isinstance(given, list) and given else "")
    cli(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=OneSentenceParser,
        parser_kwargs={
            "prog": called(),
            "version": geolora_pl.__version__,
            "description": f"Train, validate, test and predict. '{called()} --help' lists all commands.",
        },
        args=args,
    )


def _cli_of(command: str) -> type[GeoLoRACLI]:
    """The command line with the parser of one command, because making those of all takes most of the start-up time."""
    commands = LightningCLI.subcommands()
    if command not in commands:
        return GeoLoRACLI

    class OneCommand(GeoLoRACLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: commands[command]}

    return OneCommand
