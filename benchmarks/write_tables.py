"""Write the tables of the README and of the pages in ``docs`` from the committed results.

    python benchmarks/write_tables.py

In ``DOCUMENTS`` a table stands between ``<!-- NAME -->`` and ``<!-- end -->``, where NAME is a key of ``TABLES``; the
page of the ablations is written as a whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is found from where this script lies

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.peers import comparison, epochs, held_out_gap, learning_rates, matrix_approximation, pareto
from benchmarks.ranks import ablations, rank_adaptation
from benchmarks.shared import results
from benchmarks.shared.methods import METHODS, Method
from benchmarks.shared.paths import RESULTS, ROOT
from benchmarks.shared.summary import Records, current, latest
from benchmarks.shared.sweep import read
from benchmarks.speed import loaders, products, throughput
from benchmarks.speed.random_models import BERTS, GPT2S, VITS

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "experiments.md", ROOT / "docs" / "speed.md")
IN_SHORT = {"minilm": "BERT of 22M, 32 x 64 tokens", "vit_tiny": "ViT-tiny, 4 images"}
LEARNT = ("stsb", "digits", "sst2", "mrpc", "held_out")  # on CoLA all methods are near chance after 200 steps
NAMES = {
    **{point: point.replace("geolora ", "geolora_pl, ") for point in pareto.POINTS},
    **{point: f"LoRA r {rank} (PEFT)" for point, rank in pareto.RANKS.items()},
    "geolora": "geolora_pl",
    "defaults": "geolora_pl, max_rank 16",
    "room": "geolora_pl, rank 6, max_rank 64",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "rslora": "rsLoRA",
    "riemannian": "LoRA, Riemannian preconditioner (PEFT)",
    "full": "full fine-tuning",
    "head": "head only",
    "bound": "frozen, no adapters",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, in which methods are called by their names in ``NAMES``."""
    named = [[NAMES.get(row[0], row[0]), *row[1:]] for row in rows]
    lines = [" | ".join(cells) for cells in (header, *named)]
    return "\n".join([f"| {lines[0].strip()} |", "|" + "---|" * len(header), *(f"| {line} |" for line in lines[1:])])


def reported(name: str, methods: Mapping[str, Method]) -> Records:
    """The runs in a file of results with the settings of today, and the schedule and the steps of the last run.

    Args:
        name: Name of the file, without its end.
        methods: The methods by their names in the file.
    """
    return latest(current(read(RESULTS / f"{name}.jsonl"), methods))


def compare() -> str:
    """The methods side by side on all tasks."""
    records = reported("compare", METHODS)
    return markdown(comparison.header(records), comparison.rows(records))


def overview() -> str:
    """Scores and parameters of the methods on the tasks that can be learnt in so few steps."""
    records = reported("compare", METHODS)
    return markdown(["method", *LEARNT, "mean", "parameters relative to LoRA's"], comparison.overview(records, LEARNT))


def paired() -> str:
    """Differences to LoRA, seed by seed."""
    records = reported("compare", METHODS)
    return markdown(["method", *LEARNT, "all"], comparison.paired(records, LEARNT))


def whole_epochs() -> list[results.Record]:
    """The runs of whole epochs that are reported."""
    return epochs.finals(reported("epochs", {name: METHODS[name] for name in epochs.LRS}))


def epochs_table() -> str:
    """Scores after whole epochs, with fresh seeds."""
    records = whole_epochs()
    return markdown(epochs.header(records), epochs.rows(records))


def epochs_paired() -> str:
    """Differences to LoRA after whole epochs, seed by seed."""
    records = whole_epochs()
    names = list(dict.fromkeys(record["task"] for record in records))
    return markdown(["method", *names, "all"], comparison.paired(records, names))


def epochs_costs() -> str:
    """When the methods reach LoRA's score in whole epochs, and what their steps cost."""
    return markdown(comparison.COSTS, comparison.costs(whole_epochs()))


def pareto_table() -> str:
    """Scores and parameters of several ranks, tolerances and budgets."""
    records = pareto.finals(read(RESULTS / "epochs.jsonl"))
    return markdown(pareto.header(records), pareto.rows(records))


def gap_table() -> str:
    """What full fine-tuning and adapters score on ``held_out`` with parts left out or added."""
    methods = {name: method for name, (method, _) in held_out_gap.VARIANTS.items()}
    return markdown(held_out_gap.HEADER, held_out_gap.rows(reported("held_out_gap", methods)))


def learning_rates_table() -> str:
    """How wide the range of learning rates is that work."""
    methods = {name: METHODS[name] for name in learning_rates.LABELS}
    found = learning_rates.scores(reported("epochs", methods))
    return markdown(learning_rates.HEADER, learning_rates.rows(found))


def rank_adaptation_table() -> str:
    """Parameters and scores by start rank."""
    records = reported("rank_adaptation", rank_adaptation.METHODS)
    return markdown(rank_adaptation.header(records), rank_adaptation.rows(records))


def matrix_table() -> str:
    """Where the descents on one matrix end."""
    return markdown(matrix_approximation.HEADER, matrix_approximation.rows(results.read("matrix_approximation")))


SMALL = {
    "vit_384x6_one_thread": ("ViT 384 x 6, 8 images of 37 tokens", "1"),
    "vit_384x6": ("the same", "2"),
    "bert_768x6_one_thread": ("BERT 768 x 6, 8 x 64 tokens", "1"),
    "bert_768x6": ("the same", "2"),
}  # the names of files of results, with the model and the number of threads


def small_batches() -> str:
    """What a step of few rows costs beside the other methods, on one thread and on two."""
    header = ["model, batch", "threads", "over frozen", "over LoRA", "over AdaLoRA", "LoRA over frozen"]
    lines = []
    for name, (model, threads) in SMALL.items():
        step = results.read(f"throughput_{name}")[0]["step"]
        over = step["geolora"]["over"]
        cells = [over["bound"], over["lora"], over["adalora"], step["lora"]["over"]["bound"]]
        lines.append([model, threads, *map(throughput.spread, cells)])
    return markdown(header, lines)


def throughput_table(name: str) -> str:
    """What a step costs in the first of the setups that were measured."""
    return markdown(throughput.HEADER, throughput.rows(results.read(f"throughput_{name}")[0]))


def speed() -> str:
    """Medians of the ratios of a few models, side by side."""
    found = {model: results.read(f"throughput_{model}")[0] for model in IN_SHORT}
    header, rows = ["method"], [[name] for name in next(iter(found.values()))["step"]]
    for model, record in found.items():
        header += [f"{IN_SHORT[model]}: time over frozen", "over LoRA", "memory over LoRA"]
        for row in rows:
            over = record["step"][row[0]]["over"]
            row += [f"{over[base][1]:.2f}" if base in over else "1" for base in ("bound", "lora")]
            row.append(f"{record['memory'][row[0]] / record['memory']['lora']:.2f}")
    return markdown(header, rows)


def event_table() -> str:
    """One adaptation of many adapters."""
    event = results.read("throughput_event")
    cells = [throughput.spread(event[name]) for name in ("batched", "one_by_one", "ratio")]
    return markdown(["ms, batched", "ms, one by one", "ratio"], [cells])


def products_table(name: str, columns: Sequence[str]) -> str:
    """Times of the matrix products of the fused layer."""
    return markdown(columns, products.rows(results.read("products")[name], columns))


def loaders_table() -> str:
    """What the loaders deliver beside what a step takes."""
    return markdown(loaders.HEADER, loaders.rows(results.read("throughput_loaders"), throughput.step_rates()))


TABLES: dict[str, Callable[[], str]] = {
    "compare": compare,
    "overview": overview,
    "paired": paired,
    "epochs": epochs_table,
    "epochs_paired": epochs_paired,
    "epochs_costs": epochs_costs,
    "pareto": pareto_table,
    "held_out_gap": gap_table,
    "learning_rates": learning_rates_table,
    "rank_adaptation": rank_adaptation_table,
    "matrix_approximation": matrix_table,
    "speed": speed,
    "event": event_table,
    "loaders": loaders_table,
    "layouts": lambda: products_table("layouts", products.LAYOUTS),
    "forms": lambda: products_table("forms", products.FORMS),
    "small_batches": small_batches,
    **{f"throughput_{name}": partial(throughput_table, name) for name in (*BERTS, *GPT2S, *VITS, "minilm_one_thread")},
}


def with_tables(text: str) -> str:
    """The text with every table written again."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    texts = {
        document: with_tables(document.read_text()) for document in DOCUMENTS
    }  # an error in one must leave all of them as they are
    for document, text in texts.items():
        document.write_text(text)
    ablations.DOCUMENT.write_text(ablations.document(ablations.of_today(read(RESULTS / "ablations.jsonl"))))


if __name__ == "__main__":
    main()
