"""The only door of this folder to private names of jsonargparse, and of Lightning's command line.

docs/architecture.md says why each is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import ArgumentParser, _typehints
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.states import TrainerFn

from geolora_pl.lightning.internals import replaced_in_parser


@contextmanager
def before_a_class_is_replaced(call: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call a function whenever, while settings are parsed, one class takes the place of another.

    Args:
        call: It gets the settings of the old class, which it may change, and those of the new one.
    """
    original: Callable[..., Any] = _typehints.discard_init_args_on_class_path_change

    def called_first(parser: ArgumentParser, before: Any, value: Any) -> Any:
        call(before, value)
        return original(parser, before, value)

    with replaced_in_parser("discard_init_args_on_class_path_change", called_first):
        yield


def settings_of(parser: ArgumentParser) -> list[str]:
    """The names of the settings that a parser takes."""
    return [action.dest for action in parser._actions if action.dest.rpartition(".")[2] != "help"]


class CheckpointAwareCLI(LightningCLI):
    """Lightning's command line, which asks a checkpoint before it makes the classes."""

    def _dump_config(self) -> None:
        """Keep the settings for checkpoints without a second check of what was parsed just now, which takes longest."""
        if not hasattr(self, "config_dump"):
            said = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, skip_validation=True)
            self.config_dump = yaml.safe_load(said)[self.config["subcommand"]]

    def _parse_ckpt_path(self) -> None:
        self.read_ckpt_path()

    def read_ckpt_path(self) -> None:
        """Complete ``self.config`` by what the checkpoint in it knows; a subclass says how."""

    def find_last(self) -> Any:
        """The path that Lightning finds for ``last``, and ``None`` where it would go on without a checkpoint."""
        connector = self.trainer._checkpoint_connector
        return connector._parse_ckpt_path(TrainerFn.TESTING, "last", model_provided=True, model_connected=False)
