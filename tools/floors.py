"""Print the floors of pyproject.toml as constraints for pip, so that the tests can run at the lowest versions allowed.

Run it with a Python that has the project installed, as ``make test-floors`` does; every floor must be a released
version. torch and torchvision keep their versions of constraints.txt, because builds of their floors need gigabytes of
CUDA libraries.
"""

import importlib.metadata
import pathlib

from packaging.requirements import Requirement

PINNED = ("torch==", "torchvision==")

constraints = pathlib.Path(__file__).parents[1] / "constraints.txt"
lines = {line for line in constraints.read_text().splitlines() if line.startswith(PINNED)}
for requirement in map(Requirement, importlib.metadata.requires("geolora_pl") or []):
    floors = [f"{requirement.name}=={part.version}" for part in requirement.specifier if part.operator == ">="]
    lines.update(floor for floor in floors if not floor.startswith(PINNED))
print(*sorted(lines), sep="\n")
