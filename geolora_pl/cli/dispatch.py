"""The command line: a command imports what it needs, and those about a checkpoint alone do without Lightning."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import geolora_pl

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: What to parse instead of ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else args
    if given == ["--version"]:
        print(f"geolora_pl {geolora_pl.__version__}")
        return
    if isinstance(given, list) and given[:1] in (["export"], ["ranks"], ["report"]):
        from geolora_pl.cli import commands

        commands.main(given)
        return
    from geolora_pl.cli import train

    # Lightning 2.6 asks torch 2.13 something in a way that is deprecated there: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"lightning\.pytorch")
    train.run(args)
