"""The command line: a command imports what it needs, and those about a checkpoint alone do without Lightning."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import geolora_pl
from geolora_pl.cli.mistakes import one_line

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


_HELP = """usage: python -m geolora_pl COMMAND [options]

Low-rank fine-tuning that finds its own ranks.

commands:
  fit       train a model: --config names a file of settings, and every setting is an option as well
  validate  compute the metrics of a checkpoint on the validation data
  test      compute the metrics of a checkpoint on the test data
  predict   write what a checkpoint predicts to a file
  export    write the model of a checkpoint for other libraries
  ranks     show the adapters of a checkpoint
  report    write a page about one run or several
  shrink    make an adapter or a LoRA smaller, without training

'python -m geolora_pl COMMAND --help' lists the options of a command, and --version shows the version."""


def command_line() -> None:
    """Run the command line of this process; a mistake is one line, and a second says how to see its traceback."""
    with one_line("see: the environment variable GEOLORA_TRACEBACK=1 for a traceback"):
        main()


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: What to parse instead of ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else args
    if given in (["--help"], ["-h"]):
        print(_HELP)
        return
    if given == ["--version"]:
        print(f"geolora_pl {geolora_pl.__version__}")
        return
    if isinstance(given, list) and given[:1] in (["export"], ["ranks"], ["report"], ["shrink"]):
        from geolora_pl.cli import commands

        commands.main(given)
        return
    from geolora_pl.cli import train

    # Lightning 2.6 asks torch 2.13 something in a way that is deprecated there: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"lightning\.pytorch")
    train.run(args)
