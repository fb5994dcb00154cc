"""The snippets of a page, and what its commands call."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = ("python", "make", "source", "tensorboard", "torchrun")


def blocks(page: Path, language: str) -> list[str]:
    """The code of a language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path, folder: Path) -> list[list[str]]:
    """What the page's shell calls, as bash understands it: loops are run and variables filled in."""
    stubs = [f'{name}() {{ printf "%s\\n" $(($# + 1)) {name} "$@" >>calls; }}' for name in PROGRAMS]
    script = "\n".join([*stubs, *blocks(page, "bash")])
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, timeout=60)
    words = (folder / "calls").read_text().splitlines()
    calls = []
    while words:
        count = int(words.pop(0))
        calls.append(words[:count])
        words = words[count:]
    return calls
