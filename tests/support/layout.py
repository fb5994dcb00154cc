"""The folders of the package, and which may import which."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "geolora_pl"
# A folder may import itself and those in front of it; two in one group do not see each other.
ORDER = (("math",), ("adapters",), ("training", "storage"), ("report",), ("lightning", "huggingface"), ("tasks", "cli"))
LEVEL = {folder: level for level, group in enumerate(ORDER) for folder in group}
LEVEL["testing"] = LEVEL["report"]  # a file beside the folders, above training and storage, which none of them imports
BELOW = {
    "errors",
    "lazy",
    "lfs",
    "loggers",
    "notes",
    "packaged",
}  # files beside the folders that every folder may import
FILES = sorted(PACKAGE.rglob("*.py"))
