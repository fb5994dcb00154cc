"""Write the tables of the documents from the committed results: ``python benchmarks/readme_tables.py``.

In ``DOCUMENTS`` a table stands between ``<!-- NAME -->`` and ``<!-- end -->``, where NAME is of ``TABLES``; the page of
the ablations is written whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import ablations
import matrix_approximation
import rank_adaptation
import report
import step_cost
from sweep import RESULTS, read
from tasks import ROOT

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "experiments.md")
NAMES = {
    "geolora": "geolora_pl",
    "lora": "LoRA r 8 (PEFT)",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "rslora": "rsLoRA",
    "full": "full fine-tuning",
    "head": "head only",
    "bound": "frozen, no adapters",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; methods get their names."""
    named = [[NAMES.get(row[0], row[0]), *row[1:]] for row in rows]
    lines = [" | ".join(cells) for cells in (header, *named)]
    return "\n".join([f"| {lines[0].strip()} |", "|" + "---|" * len(header), *(f"| {line} |" for line in lines[1:])])


def compare() -> str:
    """The methods side by side."""
    records = report.latest(read(RESULTS / "compare.jsonl"))
    return markdown(report.header(records), report.rows(records))


def rank_adaptation_table() -> str:
    """Parameters and scores by start rank."""
    records = read(RESULTS / "rank_adaptation.jsonl")
    return markdown(rank_adaptation.header(records), rank_adaptation.rows(records))


def matrix_table() -> str:
    """Where the descents on one matrix end."""
    results = json.loads((RESULTS / "matrix_approximation.json").read_text())["results"]
    return markdown(matrix_approximation.HEADER, matrix_approximation.rows(results))


def step_cost_table(size: str) -> str:
    """What a step costs on a ViT."""
    results = json.loads((RESULTS / f"step_cost_vit_{size}.json").read_text())["results"]
    return markdown(step_cost.HEADER, step_cost.rows(results))


TABLES: dict[str, Callable[[], str]] = {
    "compare": compare,
    "rank_adaptation": rank_adaptation_table,
    "matrix_approximation": matrix_table,
    **{f"step_cost_{size}": lambda size=size: step_cost_table(size) for size in ("tiny", "small", "base")},
}


def with_tables(text: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main() -> None:
    texts = {document: with_tables(document.read_text()) for document in DOCUMENTS}  # all of them before any is written
    for document, text in texts.items():
        document.write_text(text)
    ablations.DOCUMENT.write_text(ablations.document(read(RESULTS / "ablations.jsonl")))


if __name__ == "__main__":
    main()
