"""The commands about checkpoints and runs that train nothing: export, push, ranks, report, shrink."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from geolora_pl.cli.called import called
from geolora_pl.cli.mistakes import one_line
from geolora_pl.lightning.export import FORMATS, export
from geolora_pl.lightning.push import push_to_hub
from geolora_pl.math.ranks import ranks_by_tau
from geolora_pl.report.printable import printable
from geolora_pl.report.printed import depth_table, print_summary
from geolora_pl.report.rank_map import RankMap
from geolora_pl.report.write import write_report
from geolora_pl.storage.checkpoint import counts_in, plain_weights, read_checkpoint
from geolora_pl.storage.peft import server_rank
from geolora_pl.storage.shrink import shrink
from geolora_pl.storage.spectra import spectra

_BARS = "▁▂▃▄▅▆▇█"


def ranks_tables(ckpt_path: str | Path) -> tuple[Table, Table, list[str]]:
    """Ranks by depth, ranks and spectra of the single adapters in a checkpoint, and how many parameters it has.

    Raises:
        ValueError: It cannot be read, or has no adapters.
    """
    checkpoint = read_checkpoint(ckpt_path, mmap=True)
    try:
        adapters = spectra(plain_weights(checkpoint))
    except ValueError as error:
        raise ValueError(f"ckpt_path={str(ckpt_path)!r}: {error}") from error
    if not adapters:
        raise ValueError(f"ckpt_path={str(ckpt_path)!r} holds no adapters: it is of another run, or merged")
    places = RankMap.of(adapters)
    by_depth = depth_table(
        places,
        {name: rank for name, (_, rank, _) in adapters.items()},
        {name: size for name, (size, _, _) in adapters.items()},
    )
    by_depth.title = Text(printable(str(ckpt_path)))
    table = Table(title_justify="left")
    table.add_column("adapter")
    table.add_column("rank", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("99% energy", justify="right")  # the rank that would keep so much
    table.add_column("largest", justify="right")
    table.add_column("singular values")
    for name, label in places.short_names().items():
        size, rank, sigma = adapters[name]
        enough = int(ranks_by_tau(sigma, 0.1, 0.0, 0, len(sigma))) if len(sigma) else 0
        largest = float(sigma[0]) if len(sigma) else 0.0
        table.add_row(
            Text(printable(label)), str(rank), f"{size * rank:,}", str(enough), f"{largest:.3g}", _sparkline(sigma)
        )
    counts = counts_in(checkpoint)
    return by_depth, table, [f"trained: {counts}"] if counts else []


def _sparkline(sigma: Tensor) -> str:
    heights = sigma / sigma[:1].clamp_min(torch.finfo(sigma.dtype).tiny)
    return "".join(_BARS[round(float(height) * (len(_BARS) - 1))] for height in heights)


def main(args: Sequence[str]) -> None:
    """Run ``export``, ``push``, ``ranks``, ``report`` or ``shrink``.

    Args:
        args: The command and its arguments.
    """
    parser = _parser()
    given = vars(parser.parse_args(args))
    command = given.pop("command")
    with one_line():
        if command == "ranks":
            by_depth, table, lines = ranks_tables(**given)
            print_summary(by_depth, lines, Console())
            print_summary(table, [], Console())
            return
        commands: dict[str, Callable[..., str]] = {
            "export": export,
            "push": _push,
            "report": _report,
            "shrink": _shrink,
        }
        said = commands[command](**given)
        Console().print(printable(said), soft_wrap=True, markup=False, highlight=False)


def _push(source: str, repo_id: str, **how: Any) -> str:
    return f"{push_to_hub(source, repo_id, **how)}: load it with load_adapter(model, {repo_id!r})"


def _report(run: Sequence[str], output: str | None) -> str:
    return f"{write_report(run, output)}: open it in a browser"


def _shrink(adapter: str, output: str, **how: Any) -> str:
    shrunk = shrink(adapter, output, **how)
    served = (
        f"; {server_rank(max(1, shrunk.rank))}" if Path(output).is_dir() else f"; the largest rank is {shrunk.rank}"
    )
    return (
        f"{output}: {shrunk.after:,} of {shrunk.before:,} adapter parameters; {shrunk.cut:.2g} of the update was cut "
        f"(relative Frobenius norm){served}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(called(), allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, said: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, allow_abbrev=False, help=said, description=said)

    export = add("export", "Write the model of a checkpoint for others.")
    ranks = add("ranks", "Show the adapters of a checkpoint.")
    for command in (export, ranks):
        command.add_argument("--ckpt_path", required=True, help="The checkpoint of a run.")
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="adapter: one file for load_adapter. peft: a folder for the PEFT library and servers. diffusers: a "
        "folder for load_lora_weights. merged: the plain model, for from_pretrained or timm.create_model.",
    )
    export.add_argument("--output", required=True, help="The file (adapter) or folder to write.")
    export.add_argument(
        "--config",
        help="The run's configuration: for modules of your own, small checkpoints, and tokenizers from the hub.",
    )
    export.add_argument(
        "--compact", action="store_true", help="peft, diffusers: each adapter at its own rank, none of rank 0."
    )
    export.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")

    push = add(
        "push",
        "Push an adapter to the Hugging Face hub, with a card: from there it is loaded here, by PEFT and by "
        "transformers. Log in with 'hf auth login' or set HF_TOKEN first.",
    )
    push.add_argument(
        "--source",
        required=True,
        help="The folder of a run, which stands for its last checkpoint, a checkpoint, or an adapter file.",
    )
    push.add_argument("--repo_id", required=True, metavar="USER/NAME", help="The repository, which is made if needed.")
    push.add_argument("--run", metavar="FOLDER", help="The run with scores and settings; by default that of --source.")
    push.add_argument("--config", help="The run's configuration: for modules of your own, and small checkpoints.")
    push.add_argument("--base_model", metavar="NAME", help="The name of the base on the hub, where it is not known.")
    push.add_argument(
        "--private", action="store_true", default=None, help="Nobody else may see it; by default as the owner has it."
    )
    push.add_argument("--revision", metavar="BRANCH", help="By default the main one.")
    push.add_argument("--commit_message", metavar="TEXT", help="What the commit says.")

    report = add("report", "Write a page about one run or several.")
    report.add_argument(
        "--run",
        required=True,
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="The folder of a run, with metrics.csv or TensorBoard's events; several are compared.",
    )
    report.add_argument("--output", metavar="FILE", help="By default report.html in the first folder.")

    shrink = add("shrink", "Make an adapter or a LoRA smaller, without training and without its base.")
    shrink.add_argument("--adapter", required=True, help="An adapter file, or the folder of a LoRA of PEFT.")
    shrink.add_argument("--tau", type=float, help="The relative part of each update that may be cut, in [0, 1).")
    shrink.add_argument("--budget", type=int, help="Adapter parameters in all that may stay.")
    shrink.add_argument("--output", required=True, help="The file or folder to write, of the same kind.")
    shrink.add_argument("--compact", action="store_true", help="A LoRA: each adapter at its own rank, none of rank 0.")
    shrink.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")
    return parser
