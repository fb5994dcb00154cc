"""What a training step costs: this package beside LoRA, AdaLoRA, full fine-tuning and frozen layers.

    python benchmarks/speed/throughput.py                                  # a BERT of 22M parameters
    python benchmarks/speed/throughput.py --model vit_tiny --batch_size 4
    python benchmarks/speed/throughput.py step memory --rank 4 16 64 --batch_size 8 32

What can be measured:

*   ``step``: the time of the parts of a step, with the methods taking turns at every step in one process.
*   ``memory``: the peak memory of each method, in a process of its own.
*   ``loss``: the time until a given loss is reached.
*   ``event``: one adaptation of the 72 adapters of a BERT-base, batched, one by one, and without QR.
*   ``growth``: how the cost of a step grows with width, depth, rank and batch.
*   ``map``: rows by width on one thread and on two; where a step is cheaper than LoRA's.
*   ``loaders``: tokens and images per second that the loaders deliver, beside what a step takes.
*   ``many``: how starts, steps without the model, adaptations, files and pages grow with up to 5,000 adapters and with
    their width.
*   ``guard``: whether a small step has become slower than the committed one, which ``--update`` replaces; the exit
    status is 1 if it has.

Results go to ``benchmarks/results/throughput_*.json`` and ``docs/figures`` (or where ``GEOLORA_RESULTS`` and
``GEOLORA_FIGURES`` say), and to the terminal, which also shows whether they meet their targets.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import torch
from rich.console import Console

from benchmarks.shared import figures, results
from benchmarks.shared.paths import GLUE_FOLDER
from benchmarks.shared.results import Record
from benchmarks.shared.tables import table
from benchmarks.speed import (
    adaptation_event,
    growth,
    guard,
    loaders,
    many,
    memory,
    random_models,
    rows_by_width,
    timing,
)
from benchmarks.speed.random_models import BERTS, GPT2S, VITS, Setup
from geolora_pl.math.ranks import usual_cadence

WHAT = ("step", "memory", "loss", "event", "growth", "map", "loaders", "many", "guard")
OVER = {"bound": "frozen", "lora": "LoRA", "adalora": "AdaLoRA"}
HEADER = ["method", "ms per step", *timing.PARTS, *(f"over {name}" for name in OVER.values()), "throughput", "peak MB"]
# The largest values allowed, on a CPU in float32 and on a GPU in bf16-mixed.
TARGETS = {
    "step over frozen": (1.12, 1.10),
    "step over LoRA": (0.92, 0.95),
    "step over AdaLoRA": (0.85, 0.75),
    "memory over LoRA": (1.02, 1.02),
    "part of the adaptation": (0.03, 0.03),
}
EVENT_TARGET = 0.2  # batched over one by one
JUDGED = ["", "found", "target", "met"]
CADENCE = usual_cadence(random_models.STEPS)


def cost(setup: Setup, what: Sequence[str], args: argparse.Namespace) -> Record:
    """Measure what was asked for in one setup."""
    methods = {name: timing.compared_at(setup.rank)[name] for name in args.methods}
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
    """The cells of the table, one row per method."""
    lines = []
    for name, values in record["step"].items():
        ms = [f"{values[part]:.1f}" for part in ("ms", *timing.PARTS)]
        over = [spread(values["over"].get(base)) for base in OVER]
        speed = f"{values['a_second']:,.{1 if values['a_second'] < 100 else 0}f} {record['unit']}/s"
        peak = f"{record['memory'][name]:.0f}" if "memory" in record else "-"
        lines.append([name, *ms, *over, speed, peak])
    return lines


def judged(record: Record, name: str) -> list[list[str]]:
    """What was found beside its target, and whether it meets it, for every target.

    Args:
        record: What was found in one setup.
        name: The method to judge.
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
    """The median, and the quartiles if they differ, as a cell of a table."""
    if quartiles is None:
        return "-"
    low, middle, high = quartiles
    return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def draw(record: Record, name: str) -> None:
    """Draw the parts of a step as stacked bars into the figure of that name."""
    figure, (ax,) = figures.panels(1)
    found = record["step"]
    methods = list(found)[::-1]
    left = [0.0] * len(methods)
    for part in timing.PARTS:
        width = [found[method][part] for method in methods]
        ax.barh(methods, width, left=left, label=part)
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.set(xlabel="milliseconds per step", title=record["setup"]["name"])
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figures.save(figure, f"throughput_{name}")


def show(header: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> None:
    """Print a table."""
    made = table(header, lines, title)
    made.title_justify = "left"
    console = Console()
    console.width = max(console.width, 180)  # a file that takes the output has no width of its own
    console.print(made)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the arguments."""
    methods = list(timing.compared_at(8))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["step"], help=f"some of {', '.join(WHAT)}; by default step")
    parser.add_argument("--model", choices=(*BERTS, *GPT2S, *VITS), default="minilm")
    parser.add_argument("--name", help="name of the file of results; by default the model's")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--rank", type=int, nargs="+", default=[8], help="columns allocated for each adapter")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32])
    parser.add_argument("--length", type=int, nargs="+", default=[64], help="tokens per text")
    parser.add_argument("--rounds", type=int, default=20, help="a multiple of the cadence of adaptations, 10")
    parser.add_argument("--loss", type=float, default=0.5, help="the loss to reach")
    parser.add_argument("--steps", type=int, default=200, help="the most steps to reach it in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--glue", type=Path, default=GLUE_FOLDER, help="where GLUE lies, for the loaders of texts")
    parser.add_argument("--update", action="store_true", help="commit to what guard measures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), help="by default 32 on a CPU, bf16-mixed on a GPU")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.rounds % CADENCE or args.rounds < CADENCE:
        parser.error(
            f"--rounds {args.rounds} must be a multiple of {CADENCE}, because each has its part of an adaptation"
        )
    if unknown := set(args.what) - set(WHAT):
        parser.error(f"what={', '.join(sorted(unknown))} cannot be measured: choose from {', '.join(WHAT)}")
    args.precision = args.precision or ("bf16-mixed" if args.device == "cuda" else "32")
    return args


def measure_costs(args: argparse.Namespace, command: str) -> None:
    """Measure, save and show what a step costs in every setup that was asked for."""
    name = args.name or args.model
    records = []
    for rank, batch_size, length in product(args.rank, args.batch_size, [0] if args.model in VITS else args.length):
        setup = Setup(args.model, rank, batch_size, length, args.device, args.precision, args.threads)
        records.append(cost(setup, args.what, args))
        results.write(f"throughput_{name}", command, records)
        show_costs(records[-1], args)
    if "step" in records[0]:
        draw(records[0], name)


def show_costs(record: Record, args: argparse.Namespace) -> None:
    """Print the tables of one setup, and the targets beside what was found."""
    setup = Setup(**record["setup"])
    size = f"{setup.batch_size} x {setup.length or 'images'}"
    title = f"{setup.name}, rank {setup.rank}, {size}, {setup.device} {setup.precision}"
    if "step" in record:
        show(HEADER, rows(record), title)
    if "loss" in record:
        lines = [[name, *map(str, values.values())] for name, values in record["loss"].items()]
        show(["method", "steps", "seconds", "last loss"], lines, f"to a loss of {args.loss:g}: {title}")
    lines = [line for name in ("geolora", "defaults") for line in judged(record, name)]
    if lines:
        show(JUDGED, lines, title)


def measure_event(args: argparse.Namespace, command: str) -> None:
    """Measure, save and show one adaptation of many adapters."""
    event = adaptation_event.measure(args.device, args.rounds)
    results.write("throughput_event" if args.device == "cpu" else "throughput_event_cuda", command, event)
    lines = [
        ["milliseconds, batched", spread(event["batched"]), "5" if args.device == "cuda" else "-", "-"],
        ["milliseconds, one by one", spread(event["one_by_one"]), "-", "-"],
        _judged("batched over one by one", event["ratio"], EVENT_TARGET),
        ["milliseconds, by Gram and Cholesky", spread(event["gram_cholesky"]), "-", "-"],
        ["Gram and Cholesky over QR", spread(event["gram_cholesky_ratio"]), "-", "-"],
    ]
    show(JUDGED, lines, f"one adaptation of {event['adapters']} adapters")


def measure_growth(args: argparse.Namespace, command: str) -> None:
    """Measure, save and draw how the cost of a step grows."""
    setup = Setup("bert", device=args.device, precision=args.precision, threads=args.threads)
    found = growth.measure(setup, CADENCE)
    results.write("throughput_growth", command, found)
    growth.draw(found)


def measure_map(args: argparse.Namespace, command: str) -> None:
    """Measure, save and draw rows by width, on one thread and on two."""
    found = []
    for threads in rows_by_width.THREADS:
        torch.set_num_threads(threads)
        setup = Setup("bert", device=args.device, precision=args.precision, threads=threads)
        found += rows_by_width.measure(setup, CADENCE)
        results.write("throughput_map", command, found)
    rows_by_width.draw(found)


def measure_loaders(args: argparse.Namespace, command: str) -> None:
    """Measure, save and show what the loaders deliver, beside the committed rates of a step."""
    torch.set_num_threads(1)  # as in the processes of a loader
    found = loaders.measure(args.glue)
    results.write("throughput_loaders", command, found)
    show(loaders.HEADER, loaders.rows(found, step_rates()), "what the loaders deliver")


def step_rates() -> dict[str, float]:
    """What the committed steps of this package take per second, by unit."""
    return {unit: results.read(name)[0]["step"]["geolora"]["a_second"] for unit, name in loaders.STEPS.items()}


def measure_many(args: argparse.Namespace, command: str) -> None:
    """Measure, save, show and draw what grows with the number and width of adapters, on one thread."""
    torch.set_num_threads(1)
    found = many.measure()
    decoder = many.measure_decoder(found)
    results.write("throughput_many", command, {"grown": found, "decoder": decoder})
    many.draw(found)
    for grows in ("number", "width"):
        header = ["milliseconds", *map(str, many.sizes(found, grows)), "exponent"]
        show(header, many.rows(found, grows), f"by {grows} of adapters")
    lines = [[f"milliseconds, {p}", f"{ms:,}", f"{decoder['expected'][p]:,}"] for p, ms in decoder["ms"].items()]
    show(["", "measured", "by the widths"], lines, f"{decoder['blocks']} blocks of Llama-3-70B")
    show(["on paper", ""], [[name, f"{value:,}"] for name, value in decoder["on_paper"].items()], "all its blocks")


def compare_with_committed(args: argparse.Namespace, command: str) -> bool:
    """Show the ratios of a small step beside the committed ones; whether none is slower."""
    torch.set_num_threads(1)
    now, before = guard.measure(args.rounds), guard.committed()
    if args.update or before is None:
        results.write(guard.NAME, command, now)
    lines = guard.rows(now, before or now)
    show(["step", "now", "committed", ""], lines, "a BERT of two blocks, 256 wide, 8 x 64 tokens, one thread")
    return not any(line[-1] == "slower" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(given)
    command = " ".join(["python benchmarks/speed/throughput.py", *given])
    torch.set_num_threads(args.threads)
    if {"step", "memory", "loss"} & set(args.what):
        measure_costs(args, command)
    if "event" in args.what:
        measure_event(args, command)
    if "growth" in args.what:
        measure_growth(args, command)
    if "map" in args.what:
        measure_map(args, command)
    if "loaders" in args.what:
        measure_loaders(args, command)
    if "many" in args.what:
        measure_many(args, command)
    if "guard" in args.what and not compare_with_committed(args, command):
        sys.exit(1)


if __name__ == "__main__":
    main()
