"""What a training step costs: this package beside LoRA, AdaLoRA, full fine-tuning and frozen layers.

    python benchmarks/throughput.py                                    # a BERT of 22M parameters
    python benchmarks/throughput.py --model vit_tiny --batch_size 4
    python benchmarks/throughput.py step memory --rank 4 16 64 --batch_size 8 32

``step``: time of the parts of a step, the methods taking turns, step by step in one process. ``memory``: its peak, each
method in a process of its own. ``loss``: time until a given loss. ``event``: one adaptation of the 72 adapters of a
BERT-base, batched and one by one. ``growth``: how the cost of a step grows with width, depth, rank and batch. Results
go to ``benchmarks/results/throughput_*.json`` and ``docs/figures``, the targets beside them into the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import adaptation_event
import figures
import growth
import harness
import memory
import random_models
import timing
import torch
from random_models import BERTS, GPT2S, VITS, Setup
from rich.console import Console
from rich.table import Table
from sweep import RESULTS

from geolora_pl.math.ranks import usual_cadence

WHAT = ("step", "memory", "loss", "event", "growth")
OVER = {"bound": "frozen", "lora": "LoRA", "adalora": "AdaLoRA"}
HEADER = ["method", "ms per step", *timing.PARTS, *(f"over {name}" for name in OVER.values()), "throughput", "peak MB"]
# At most, on a CPU in float32 and on a GPU in bf16-mixed.
TARGETS = {
    "step over frozen": (1.12, 1.10),
    "step over LoRA": (0.92, 0.95),
    "step over AdaLoRA": (0.85, 0.75),
    "memory over LoRA": (1.02, 1.02),
    "part of the adaptation": (0.03, 0.03),
}
EVENT_TARGET = 0.2  # batched over one by one

Record = dict[str, Any]


def cost(setup: Setup, what: Sequence[str], args: argparse.Namespace) -> Record:
    """What was asked for of one setup."""
    methods = {name: timing.compared(setup.rank)[name] for name in args.methods}
    record: Record = {"setup": asdict(setup), "unit": setup.unit, "rounds": args.rounds}
    if "memory" in what:
        record["memory"] = memory.peaks(setup, methods)
    if "step" in what:
        times = timing.measure(setup, random_models.load(setup), methods, args.rounds)
        record["step"] = timing.summary(times, setup.amount)
    if "loss" in what:
        learners = {name: method for name, method in methods.items() if name != "bound"}
        record["loss"] = timing.time_to_loss(setup, random_models.load(setup, args.steps), learners, args.loss)
    return record


def rows(record: Record) -> list[list[str]]:
    """Cells of the table, a row a method."""
    lines = []
    for name, values in record["step"].items():
        ms = [f"{values[part]:.1f}" for part in ("ms", *timing.PARTS)]
        over = [spread(values["over"].get(base)) for base in OVER]
        speed = f"{values['a_second']:,.{1 if values['a_second'] < 100 else 0}f} {record['unit']}/s"
        peak = f"{record['memory'][name]:.0f}" if "memory" in record else "-"
        lines.append([name, *ms, *over, speed, peak])
    return lines


def judged(record: Record, name: str) -> list[list[str]]:
    """What there is a target for: found, target, whether it is met.

    Args:
        record: Of one setup.
        name: The method.
    """
    found: dict[str, list[float]] = {}
    if name in record.get("step", {}):
        values = record["step"][name]
        found |= {f"step over {OVER[base]}": values["over"][base] for base in OVER if base in values["over"]}
        found["part of the adaptation"] = [values["share"]] * 3
    if {name, "lora"} <= set(record.get("memory", {})):
        found["memory over LoRA"] = [record["memory"][name] / record["memory"]["lora"]] * 3
    targets = {what: of_what[record["setup"]["device"] == "cuda"] for what, of_what in TARGETS.items()}
    return [_judged(f"{name}: {what}", found[what], target) for what, target in targets.items() if what in found]


def _judged(what: str, found: Sequence[float], target: float) -> list[str]:
    return [what, spread(found), f"{target:g}", "yes" if found[1] <= target else "no"]


def spread(quartiles: Sequence[float] | None) -> str:
    """The median, and the quartiles if they differ."""
    if quartiles is None:
        return "-"
    low, middle, high = quartiles
    return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def draw(record: Record, name: str) -> None:
    """Parts of a step as stacked bars, into the figure of that name."""
    figure, (ax,) = figures.panels(1)
    found = record["step"]
    methods = list(found)[::-1]
    left = [0.0] * len(methods)
    for part in timing.PARTS:
        width = [found[method][part] for method in methods]
        ax.barh(methods, width, left=left, label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.set(xlabel="milliseconds a step", title=record["setup"]["name"])
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figures.save(figure, f"throughput_{name}")


def show(header: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> None:
    table = Table(*header, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, 180)  # also where the output goes into a file
    console.print(table)


def save(name: str, results: object, args: Sequence[str]) -> None:
    """Write results with the command and the machine."""
    command = " ".join(["python benchmarks/throughput.py", *args])
    content = {"command": command, "machine": harness.machine(), "results": results}
    (RESULTS / f"throughput_{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["step"], help=f"some of {', '.join(WHAT)}; by default step")
    parser.add_argument("--model", choices=(*BERTS, *GPT2S, *VITS), default="minilm")
    parser.add_argument("--name", help="of the file of results; by default the model's")
    parser.add_argument("--methods", nargs="+", choices=list(timing.compared(8)), default=list(timing.compared(8)))
    parser.add_argument("--rank", type=int, nargs="+", default=[8], help="columns allocated for each adapter")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32])
    parser.add_argument("--length", type=int, nargs="+", default=[64], help="tokens a text")
    parser.add_argument("--rounds", type=int, default=20, help="a multiple of the cadence of adaptations, 10")
    parser.add_argument("--loss", type=float, default=0.5, help="the loss to reach")
    parser.add_argument("--steps", type=int, default=200, help="in which to reach it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), help="by default 32 on a CPU, bf16-mixed on a GPU")
    args = parser.parse_args(given)
    cadence = usual_cadence(random_models.STEPS)
    if args.rounds % cadence or args.rounds < cadence:
        parser.error(f"--rounds {args.rounds} must be a multiple of {cadence}: each has its part of an adaptation")
    if unknown := set(args.what) - set(WHAT):
        parser.error(f"there is no {', '.join(sorted(unknown))}: choose of {', '.join(WHAT)}")
    torch.set_num_threads(args.threads)
    args.precision = args.precision or ("bf16-mixed" if args.device == "cuda" else "32")
    kept = {"device": args.device, "precision": args.precision, "threads": args.threads}

    if {"step", "memory", "loss"} & set(args.what):
        records = []
        lengths = [0] if args.model in VITS else args.length
        for rank, batch_size, length in product(args.rank, args.batch_size, lengths):
            setup = Setup(args.model, rank, batch_size, length, **kept)
            records.append(record := cost(setup, args.what, args))
            save(args.name or args.model, records, given)
            title = f"{args.model}, rank {rank}, {batch_size} x {length or 'images'}, {args.device} {args.precision}"
            if "step" in record:
                show(HEADER, rows(record), title)
            if "loss" in record:
                lines = [[name, *map(str, values.values())] for name, values in record["loss"].items()]
                show(["method", "steps", "seconds", "last loss"], lines, f"to a loss of {args.loss:g}: {title}")
            lines = [line for name in ("geolora", "defaults") for line in judged(record, name)]
            if lines:
                show(["", "found", "target", "met"], lines, title)
        if "step" in records[0]:
            draw(records[0], args.name or args.model)
    if "event" in args.what:
        event = adaptation_event.measure(args.device, args.rounds)
        save("event", event, given)
        lines = [["milliseconds, batched", spread(event["batched"]), "5" if args.device == "cuda" else "-", "-"]]
        lines += [["milliseconds, one by one", spread(event["one_by_one"]), "-", "-"]]
        lines += [_judged("batched over one by one", event["ratio"], EVENT_TARGET)]
        show(["", "found", "target", "met"], lines, f"one adaptation of {event['adapters']} adapters")
    if "growth" in args.what:
        found = growth.measure(Setup("bert", **kept), cadence)
        save("growth", found, given)
        growth.draw(found)


if __name__ == "__main__":
    main()
