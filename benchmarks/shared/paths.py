"""Where the benchmarks read and write."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("GEOLORA_RESULTS", ROOT / "benchmarks" / "results"))
FIGURES = Path(os.environ.get("GEOLORA_FIGURES", ROOT / "docs" / "figures"))
GLUE_FOLDER = ROOT.parent / "shared" / "data" / "glue"
