"""Write the page about one run, or about several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from geolora_pl.lazy import import_extra
from geolora_pl.report.runs import read_runs
from geolora_pl.storage.atomic import atomic


def write_report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one page of HTML about runs: learning curves, ranks over depth and time, parameters, and how they compare.

    It needs no network and no other file, and is light or dark as its reader likes. An earlier report is replaced;
    any other file is not.

    Args:
        runs: Folders of runs, one or several, as a CSV or TensorBoard logger of Lightning left them.
        output: The file to write; by default ``report.html`` in the first folder.

    Returns:
        The file.

    Raises:
        ValueError: A folder holds no run, something else is at ``output`` or nothing can be, or matplotlib is missing.
    """
    page = import_extra("geolora_pl.report.page", "a report")
    found = read_runs(runs)
    target = Path(output or found[0].folder / "report.html")
    with _refused_by_the_system(target):
        foreign = target.exists() and not (target.is_file() and page.GENERATOR.encode() in _start(target))
    if foreign:
        raise ValueError(f"output='{target}' is there already and is not a report: name another file")
    text = page.page(found)
    with _refused_by_the_system(target), atomic(target) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return target


def _start(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(2000)


@contextmanager
def _refused_by_the_system(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"output='{target}' cannot be written ({error.strerror}): name another file") from error
