"""The images that a run has drawn of its prompts: where they lie, and how a report shows them."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

from PIL import Image

from geolora_pl.report.rank_map import spread

FOLDER = "drawn"  # in the folder of a run, with a folder per step
_COLUMNS = 6  # steps that are shown
_ROWS = 8  # prompts that are shown
_SIDE = 192  # pixels of a picture in the page


def folder_of_step(run: Path, step: int) -> Path:
    """Where the images of a step lie.

    Example:
        >>> folder_of_step(Path("run"), 120).as_posix()
        'run/drawn/step_00000120'
    """
    return run / FOLDER / f"step_{step:08d}"


def drawn_pictures(run: Path) -> str:
    """A table of what a run has drawn, a row per prompt and a column per step; empty if it has drawn nothing.

    Args:
        run: The folder of the run.
    """
    folders = [path for path in run.glob(f"{FOLDER}/step_*") if path.name[5:].isdecimal() and path.is_dir()]
    steps = spread(sorted(folders), _COLUMNS)
    prompts = _prompts(steps[-1]) if steps else {}
    if not prompts:
        return ""
    head = "".join(f'<th scope="col">step {int(step.name[5:]):,}</th>' for step in steps)
    rows = [
        f'<tr><th scope="row">{escape(text)}</th>'
        + "".join(f"<td>{_image(step / name, f'{text}, {step.name}')}</td>" for step in steps)
        + "</tr>"
        for name, text in list(prompts.items())[:_ROWS]
    ]
    more = f"<p>{len(prompts) - _ROWS} further prompts are in the folder {FOLDER}</p>" if len(prompts) > _ROWS else ""
    return f'<div class="scroll"><table><tr><th>prompt</th>{head}</tr>{"".join(rows)}</table></div>{more}'


def _prompts(folder: Path) -> dict[str, str]:
    """The prompts of a step by the names of their files; none if their file is broken."""
    listed = folder / "metadata.jsonl"
    if not listed.is_file():  # a pipe would be waited for
        return {}
    try:
        # Not splitlines, which splits at characters that a prompt may hold, too.
        lines = listed.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return {Path(row["file_name"]).name: str(row["text"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _image(path: Path, said: str) -> str:
    if not path.is_file():
        return ""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((_SIDE, _SIDE))
            held = io.BytesIO()
            image.convert("RGB").save(held, format="PNG")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    content = base64.b64encode(held.getvalue()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{escape(said, quote=True)}">'
