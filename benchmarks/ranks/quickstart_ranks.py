"""Draw the rank of every adapter over the steps of the quickstart as ``docs/figures/ranks_quickstart.svg``.

    python -m geolora_pl fit --config configs/quickstart.yaml
    python benchmarks/ranks/quickstart_ranks.py --run lightning_logs/quickstart

``python -m geolora_pl report`` draws the same picture for any run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse

from rich.console import Console

from benchmarks.shared import figures
from geolora_pl.report.figures import ranks_by_adapter
from geolora_pl.report.runs import read_runs


def draw(folder: str) -> None:
    """Draw the picture of the run in a folder."""
    (run,) = read_runs([folder])
    figure = ranks_by_adapter(run.ranks, "rank of every adapter in the quickstart")
    figure.set_facecolor("white")  # the pages that show it have different backgrounds
    figures.save(figure, "ranks_quickstart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="lightning_logs/quickstart")
    draw(parser.parse_args().run)
    Console().print(f"{figures.FIGURES / 'ranks_quickstart.svg'}", soft_wrap=True)
