"""The parser of the command line: what is wrong with a setting, in one sentence, and the nearest name there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from geolora_pl.cli.internals import before_a_class_is_replaced, settings_of
from geolora_pl.lazy import import_class

_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value type:|Given value: (NestedArg|Namespace|{)|"
    r"Expected a <class 'NoneType'>|Expected a path but|Problem with given class_path|Parser key .*:$"
)
_AROUND = re.compile(r"^(?:Type .* expects a function or a callable class: )?(.+?)\.*(?: Got value: Namespace\(.*)?$")
_KEY = re.compile(r"Parser key \"([\w.]+)\":")
_CLASS = re.compile(r"(?:given class_path |class_path=)'([\w.]+)'")
_EXPECTED = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.Literal\[(.+?)\])(?:\. Got value: (.+))?$")
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --([\w.-]+)"),
    re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'"),
    re.compile(r"(?:Subcommand '\w+' does not accept option|Option) '([\w.]+)'(?: is not accepted)?"),
)
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_KINDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a finite number",
    "int": "a whole number",
    "Mapping": "a mapping",
    "Sequence": "a list",
    "str": "a string",
}


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
    defaults: Any = _parser_of(old).get_defaults()
    settings = dict(before.init_args.items(branches=True, nested=False))
    by_hand = {name: given for name, given in settings.items() if given != defaults.get(name)}
    if not issubclass(new, (Optimizer, LRScheduler)):
        return list(settings.keys() - by_hand.keys())
    for name, given in by_hand.items():
        dropped[f"{name}={given} was set for {old.__name__} and is dropped: {new.__name__} takes its own"] = None
    return list(settings)


class OneSentenceParser(LightningArgumentParser):
    """A parser whose errors are one sentence, without the list of all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong on stderr and leave with status 2; as the base does where errors are to be raised."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        self.exit(2, f"error: {as_sentence(message, settings_of(parser))}\nsee: {prog} --help\n")


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
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    if message.startswith("Unexpected config:"):
        return f"a configuration must hold settings by name, and not {message.partition(':')[2].strip()!r}"
    key = ".init_args.".join(_KEY.findall(message))
    classes: list[str] = _CLASS.findall(message)
    for pattern in _UNKNOWN:
        if unknown := pattern.search(message):
            name = ".".join(unknown.groups())
            where = f" in {key}.init_args of {classes[-1]}" if classes else ""
            known = _options_of_class(classes[-1]) if classes else options
            return f"there is no setting {name!r}{where}: {_nearest(name, known)}"
    if missing := _NO_ATTRIBUTE.search(message):
        module, name = missing.groups()
        return f"{key}: there is no {name} in {module}: {_nearest(name, dir(import_module(module)))}"
    kept = [_AROUND.sub(r"\1", line) for line in lines if line and not _NOISE.search(line)]
    expected = [found for line in kept if (found := _EXPECTED.search(line))]
    if not key or not expected:
        said = dict.fromkeys(line for line in kept if not line.startswith("Given value: "))
        return f"{key}: {'; '.join(said)}" if key else " ".join(lines)
    given = [line.removeprefix("Given value: ") for line in kept if line.startswith("Given value: ")]
    values = [found[3] for found in expected if found[3] is not None] or given
    return f"{key}={values[0] if values else None} must be {' or '.join(map(_kind, expected))}"


def _kind(expected: re.Match[str]) -> str:
    if expected[1] is None:
        return f"one of {expected[2]}" if "," in expected[2] else expected[2]
    name = expected[1].rpartition(".")[2]
    return _KINDS.get(name, f"a {name}")


def _nearest(name: str, known: list[str]) -> str:
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"drop it, or mend it; there are {', '.join(known)}" if len(known) <= 20 else "drop it, or mend it"


def _options_of_class(path: str) -> list[str]:
    return settings_of(_parser_of(import_class(path)))


def _parser_of(module_class: type) -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(module_class, fail_untyped=False)
    return parser
