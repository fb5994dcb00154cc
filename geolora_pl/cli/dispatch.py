"""The command line: a command imports what it needs, and those about a checkpoint alone do without Lightning."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

import geolora_pl
from geolora_pl.cli.called import called
from geolora_pl.cli.mistakes import one_line

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


COMMANDS = {
    "quickstart": "adapt a small pretrained ViT to handwritten digits, in a minute and without a network",
    "init": "write a commented configuration to start from",
    "fit": "train a model: --config names a file of settings, and every setting is an option as well",
    "validate": "compute the metrics of a checkpoint on the validation data",
    "test": "compute the metrics of a checkpoint on the test data",
    "predict": "write what a checkpoint predicts to a file",
    "export": "write the model of a checkpoint for other libraries",
    "push": "push an adapter to the Hugging Face hub, with a card",
    "ranks": "show the adapters of a checkpoint",
    "report": "write a page about one run or several",
    "shrink": "make an adapter or a LoRA smaller, without training",
    "completion": "print a script by which the shell completes commands and options",
}


def command_line() -> None:
    """Run the command line of this process; a mistake is one line, and a second says how to see its traceback."""
    if "" not in sys.path and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # where the user's own classes lie, as python -m has it
    with one_line("see: the environment variable GEOLORA_TRACEBACK=1 for a traceback"):
        main()


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: What to parse instead of ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else args
    words = given if isinstance(given, list) else []  # else settings, which Lightning takes, too
    command = words[0] if words else None
    if words in (["--help"], ["-h"]):
        print(_help())
    elif words == ["--version"]:
        print(f"geolora_pl {geolora_pl.__version__}")
    elif command == "init":
        from geolora_pl.cli import start

        start.main(words)
    elif command == "completion":
        from geolora_pl.cli import completion

        completion.main(words, COMMANDS, main)
    elif command in ("export", "push", "ranks", "report", "shrink"):
        from geolora_pl.cli import commands

        commands.main(words)
    elif command == "quickstart":
        from geolora_pl.cli.start import QUICKSTART

        fit = ["fit", "--config", str(QUICKSTART), *words[1:]]
        if args is None:  # Lightning wants the arguments of a process where they are, also for further processes
            sys.argv[1:] = fit
        _train(None if args is None else fit)
    elif isinstance(given, list) and not (command in COMMANDS or str(command).startswith("-")):
        _refuse(command)
    else:
        _train(args)


def _train(args: ArgsType) -> None:
    from geolora_pl.cli import train

    # Lightning 2.6 asks torch 2.13 something in a way that is deprecated there: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"lightning\.pytorch")
    train.run(args)


def _refuse(command: str | None) -> NoReturn:
    """Leave as for a wrong option; Lightning's own parser knows no other commands than those that train and test."""
    if command is None:
        said = f"there is no command: name one of {', '.join(COMMANDS)}"
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(COMMANDS)}"
        said = f"{command!r} is not a command: {meant}"
    print(f"error: {said}\nsee: {called()} --help", file=sys.stderr)
    raise SystemExit(2)


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {called()} COMMAND [options]",
            "",
            "Low-rank fine-tuning that finds its own ranks.",
            "",
            "commands:",
            *(f"  {name:{width}}  {said}" for name, said in COMMANDS.items()),
            "",
            f"'{called()} COMMAND --help' lists the options of a command, and --version shows the version.",
        ]
    )
