"""Completion for the shell: a script with the commands and their options, as their help lists them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence

from geolora_pl.cli.called import SCRIPT, called

SHELLS = ("bash", "zsh")
_OPTION = re.compile(r"^ +(?:-\w, )?(--[\w.]+\w)", re.M)
_CHOICES = re.compile(r"^ +\{([a-z\d,]+)\}", re.M)  # not the classes in the help of fit, in capitals
# Where no word fits, the shell completes names of files, as -o default says.
_SCRIPT = """_{name}() {{
  local words=
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _{name} {script}"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit"  # zsh then understands a script for bash


def main(args: Sequence[str], commands: Iterable[str], call: Callable[[], None]) -> None:
    """Run ``completion``.

    Args:
        args: The command and its arguments.
        commands: The names of all commands.
        call: Runs the command in ``sys.argv``, to ask for its help.
    """
    parser = argparse.ArgumentParser(f"{called()} completion", allow_abbrev=False)
    parser.description = "Print a script that completes commands and options: source it where your shell starts."
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(args[1:]).shell
    names = sorted(commands)
    cases = "\n".join(f'    {name}) words="{" ".join(_words(_help(call, name)))}" ;;' for name in names)
    made = _SCRIPT.format(name=SCRIPT.replace("-", "_"), cases=cases, commands=" ".join(names), script=SCRIPT)
    print(f"{_ZSH}\n{made}" if shell == "zsh" else made)


def _help(call: Callable[[], None], name: str) -> str:
    before, out = sys.argv, io.StringIO()
    sys.argv = [before[0], name, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            call()
    finally:
        sys.argv = before
    return out.getvalue()


def _words(said: str) -> list[str]:
    """The options and choices in the help of a command."""
    choices = (word for group in _CHOICES.findall(said) for word in group.split(","))
    return list(dict.fromkeys([*choices, *_OPTION.findall(said)]))
