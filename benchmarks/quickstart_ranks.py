"""The rank of every adapter over the steps of the quickstart, as ``docs/figures/ranks_quickstart.svg``.

    python -m geolora_pl fit --config configs/quickstart.yaml
    python benchmarks/quickstart_ranks.py --run lightning_logs/quickstart

The picture is one of those of ``python -m geolora_pl report``.
"""

from __future__ import annotations

import argparse

import figures
from rich.console import Console

from geolora_pl.report.figures import ranks_by_adapter
from geolora_pl.report.runs import read_runs


def draw(folder: str) -> None:
    """Draw the picture of the run in a folder."""
    (run,) = read_runs([folder])
    figure = ranks_by_adapter(run.ranks, "rank of every adapter in the quickstart")
    figure.set_facecolor("white")  # it is shown on pages of any colour
    figures.save(figure, "ranks_quickstart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="lightning_logs/quickstart")
    draw(parser.parse_args().run)
    Console().print(f"{figures.FOLDER / 'ranks_quickstart.svg'}", soft_wrap=True)
