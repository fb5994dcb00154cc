"""Where the benchmarks read and write."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
GLUE_FOLDER = ROOT.parent / "shared" / "data" / "glue"
