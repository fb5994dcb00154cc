"""What is wrong with a file of settings as a whole, before any setting in it is looked at."""

from __future__ import annotations

from pathlib import Path

import yaml

from geolora_pl.errors import in_one_line

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"  # of <<, which takes in another mapping, and counts as often as it is there


def check_configuration(path: Path) -> None:
    """Refuse a file that is not YAML in UTF-8, or that has a setting twice, of which only the last one would count.

    Args:
        path: The file.

    Raises:
        ValueError: It is such a file; the message names it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "run.yaml")
        >>> _ = file.write_text("trainer: {max_epochs: 3}")
        >>> check_configuration(file)
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {in_one_line(error)}") from error
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # what is named by an alias is one node, and may hold itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
            _refuse_doubles(path, node)


def _refuse_doubles(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise ValueError(
                f"{path} has {key.value!r} in line {lines[name]} and again in line {line}: only the last one would "
                "count, so join them"
            )
        lines[name] = line
