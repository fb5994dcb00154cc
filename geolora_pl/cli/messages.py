"""The parser of the command line: what is wrong with a setting, in one sentence, and the nearest name there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from geolora_pl.adapters.elsewhere import ELSEWHERE, Ours
from geolora_pl.cli.configuration import check_configuration
from geolora_pl.cli.internals import before_a_class_is_replaced, settings_of
from geolora_pl.lazy import import_class
from geolora_pl.lightning.names import homes
from geolora_pl.report.printable import printable

# What is looked for in the words of jsonargparse. Where it finds other words, its own sentence stands as it is.
_KEY = re.compile(r"Parser key \"([\w.]+)\":")
_CLASS = re.compile(r"(?:given class_path |class_path=)'([\w.]+)'")
_UNKNOWN = re.compile(r"(?:Group '([\w.]+)' .*)?(?:unrecognized arguments: --|[Oo]ption ')([\w.-]+)")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_EXPECTED = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.Literal\[(.+?)\])")
_NOT_EVEN_NONE = "Expected a <class 'NoneType'>"  # what was tried last, wherever a setting may be left out
_AMBIGUOUS = re.compile(r"Multiple subclasses with name (\w+)\. .*?: ([\w., ]+)\.$", re.M)
_REQUIRED = re.compile(r"the following arguments are required: [\w, ]+$", re.M)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)$", re.M)
_VALUE = re.compile(r"(?:Got|Given) value: (.+?)(?:\. Got value: .*)?$", re.M)
_KINDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a finite number",
    "int": "a whole number",
    "Iterable": "a list",
    "Mapping": "a mapping",
    "Sequence": "a list",
    "str": "a string",
}
_OF_THE_MODEL = ("optimizer", "lr_scheduler")  # which Lightning's own command line has at the top


@contextmanager
def own_defaults() -> Iterator[None]:
    """While settings are parsed, let a class that replaces another start from its own defaults.

    jsonargparse carries over every setting that the new class has, too, the defaults of the old class included: AdamW
    would train with the learning rate of RiemannianAdam. Here defaults stay with their class. What differs from them
    was set by hand: it is carried over between models or data, where a name means the same; between optimizers or
    schedulers it is dropped, and that is said.
    """
    dropped: dict[str, None] = {}

    def drop(before: Any, value: Any) -> None:
        for name in _not_carried_over(before, value, dropped):
            before.init_args.pop(name)

    try:
        with before_a_class_is_replaced(drop):
            yield
    finally:
        for said in dropped:
            rank_zero_info(said)


def _not_carried_over(before: Any, value: Any, dropped: dict[str, None]) -> list[str]:
    """The settings of a class that do not count for its successor; what was set by hand is noted in ``dropped``."""
    if not before or not before.get("init_args") or before["class_path"] == value["class_path"]:
        return []
    try:
        old, new = import_class(before["class_path"]), import_class(value["class_path"])
    except ValueError:  # a function that makes an object
        return []
    if old is new:
        return []
    defaults = _defaults_of(old)
    settings = dict(before.init_args.items(branches=True, nested=False))
    by_hand = {name: given for name, given in settings.items() if given != defaults.get(name)}
    if not issubclass(new, (Optimizer, LRScheduler)):
        return list(settings.keys() - by_hand.keys())
    for name, given in by_hand.items():
        dropped[f"{name}={given} was set for {old.__name__} and is dropped: {new.__name__} takes its own"] = None
    return list(settings)


@cache
def _defaults_of(module_class: type) -> Any:
    """The defaults of a class, kept because every further setting of a replaced class asks for them again."""
    return _parser_of(module_class).get_defaults()


class OneSentenceParser(LightningArgumentParser):
    """A parser whose errors are one sentence, without the list of all options before it, and that guesses no names."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file of settings, which is refused by its name if it is broken as a whole."""
        if Path(path).is_file():  # else it is an address, or is not there
            check_configuration(Path(path))
        return super().parse_path(path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong on stderr and leave with status 2; as the base does where errors are to be raised."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        said = printable(as_sentence(message, settings_of(parser)))
        self.exit(2, f"error: {said}\nsee: {prog} --help\n")


def as_sentence(message: str, options: list[str]) -> str:
    r"""What jsonargparse says of a setting, without the types that it tried in vain.

    Args:
        message: Its message, of several lines where a class is among the settings.
        options: Names of the settings at the top, among which a slip of the pen is looked up.

    Returns:
        One sentence with the setting, its value and the nearest known name or the type that it must have; the message
        itself where it is of another kind.

    Example:
        >>> as_sentence("unrecognized arguments: --geolora.tua=0.1", ["geolora.tau", "geolora.budget"])
        "there is no setting 'geolora.tua': did you mean 'geolora.tau'?"
        >>> as_sentence('Parser key "geolora.tau":\n  Expected a <class \'float\'>. Got value: high', [])
        'geolora.tau=high must be a finite number'
    """
    if message.startswith("Unexpected config:"):
        return f"a configuration must hold settings by name, and not {message.partition(':')[2].strip()!r}"
    key = ".init_args.".join(_KEY.findall(message))
    if unknown := _UNKNOWN.search(message):
        name = ".".join(filter(None, unknown.groups()))
        classes: list[str] = _CLASS.findall(message)
        where = f" in {key}.init_args of {classes[-1]}" if classes else ""
        known = _options_of_class(classes[-1]) if classes else options
        return f"there is no setting {name!r}{where}: {_nearest(name, known)}"
    if missing := _NO_ATTRIBUTE.search(message):
        module, name = missing.groups()
        return f"{key}: there is no {name} in {module}: {_nearest(name, dir(import_module(module)))}"
    if key and (required := _REQUIRED.search(message)):
        of_class = "".join(f"{path}: " for path in _CLASS.findall(message)[-1:])
        return f"{key}: {of_class}{required[0]}"
    if ambiguous := _AMBIGUOUS.search(message):
        name, paths = ambiguous.groups()
        return f"{key}={name} is the name of several classes: give the path of one, {paths.replace(', ', ' or ')}"
    if key and (no_class := _NO_CLASS.search(message)):
        near = difflib.get_close_matches(no_class[1], homes(), n=1)
        meant = f"did you mean {near[0]!r}?" if near else "give its path, package.module.Class"
        return f"{key}={no_class[1]} is not a class that is known by its name: {meant}"
    kinds = dict.fromkeys(_kind(*found) for found in _EXPECTED.findall(message) if found[0] != "NoneType")
    if key and kinds and (value := _VALUE.search(message)):  # the first value is the innermost
        is_word = value[1] in ("False", "True") and "a string" in kinds
        quotes = "; YAML reads no, yes, on and off as booleans: put them into quotes" if is_word else ""
        return f"{key}={value[1]} must be {' or '.join(kinds)}{quotes}"
    return f"{key}: {_innermost(message)}" if key else " ".join(message.split())


def _innermost(message: str) -> str:
    """The deepest of the nested lines of a message, of several the last; those around it only say how it was found."""
    lines = [line for line in message.splitlines() if line.strip() and not line.endswith(_NOT_EVEN_NONE)]
    deepest = max(reversed(lines), key=lambda line: len(line) - len(line.lstrip(" -")))
    return deepest.lstrip(" -").rstrip(".")


def _kind(type_name: str, choices: str) -> str:
    if choices:
        return f"one of {choices}" if "," in choices else choices
    name = type_name.rpartition(".")[2]
    return _KINDS.get(name, f"a {name}")


def _nearest(name: str, known: list[str]) -> str:
    if (first := name.partition(".")[0]) in _OF_THE_MODEL and first not in known:
        return f"did you mean 'model.init_args.{first}'?"
    group, dot, last = name.rpartition(".")
    if ours := ELSEWHERE.get(last):
        meant = _option(ours, f"{group}{dot}", known)
        if meant is not None:
            return f"did you mean {meant!r}?"
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"drop it, or correct it; there are {', '.join(known)}" if len(known) <= 20 else "drop it, or correct it"


def _option(ours: Ours, before: str, known: list[str]) -> str | None:
    """The option of a setting that another library calls otherwise, where a command line has it."""
    if ours.group == "geolora":
        return f"geolora.{ours.name}"
    owner, _, _ = ours.group.partition(".")  # its options depend on its class
    is_known = f"{before}{owner or ours.name}" in known
    return f"{before}{ours.group}{'.' if ours.group else ''}{ours.name}" if is_known else None


def _options_of_class(path: str) -> list[str]:
    return settings_of(_parser_of(import_class(path)))


def _parser_of(module_class: type) -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(module_class, fail_untyped=False)
    return parser
