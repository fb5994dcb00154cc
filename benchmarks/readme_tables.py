"""Write the tables of the README from the committed results: ``python benchmarks/readme_tables.py``.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``, where NAME is a file in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = {"geolora": "geolora_pl", "lora": "LoRA r 8 (PEFT)", "head": "head only"}


def lr_sweep(results: list[dict[str, Any]]) -> str:
    """Mean and spread of the score: a row a method, a column a learning rate."""
    rates = sorted({r["lr"] for r in results if r["method"] != "head"})
    lines = ["| | parameters | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---|---|" + "---|" * len(rates)]
    for method in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == method]
        best = max({r["lr"] for r in runs}, key=lambda lr: mean(r["score"] for r in runs if r["lr"] == lr))
        sizes = [r["parameters"] for r in runs if r["lr"] == best and "parameters" in r]
        cells = []
        for lr in rates:
            scores = [r["score"] for r in runs if r["lr"] == lr]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.3f}{spread}" if scores else "")
        lines.append(f"| {NAMES[method]} | {f'{mean(sizes):,.0f}' if sizes else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((ROOT / "benchmarks" / "results" / f"{match[1]}.json").read_text())
        return f"<!-- {match[1]} -->\n{lr_sweep(content['results'])}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
