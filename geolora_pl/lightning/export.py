"""The commands ``export`` and ``ranks``: what a checkpoint holds, taken away or shown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from geolora_pl.adapters.base import FACTORS
from geolora_pl.adapters.merge import MergedAdapters
from geolora_pl.math.decomposition import decompose, ranks_by_tau
from geolora_pl.storage.adapter_file import save_adapter
from geolora_pl.storage.atomic import atomic, refuse_existing
from geolora_pl.storage.checkpoint import read_checkpoint
from geolora_pl.storage.peft import export_peft

Format = Literal["adapter", "peft", "merged"]
FORMATS: tuple[Format, ...] = ("adapter", "peft", "merged")
_BARS = "▁▂▃▄▅▆▇█"


def export(
    ckpt_path: str | Path,
    format: Format,
    output: str | Path,
    config: str | Path | None = None,
    compact: bool = False,
    overwrite: bool = False,
) -> str:
    """Write the model of a checkpoint in a form that others load.

    Args:
        ckpt_path: The checkpoint of a run of a :class:`GeoLoRAModule`.
        format: ``adapter`` for a file of :func:`save_adapter`, ``peft`` for a folder of PEFT, ``merged`` for a folder
            with the plain model: for ``from_pretrained`` (texts, with the tokenizer) or ``timm.create_model`` (images).
        output: The file or folder to write.
        config: The run's configuration, where the checkpoint alone does not name its module.
        compact: For ``peft``: each adapter at its own rank.
        overwrite: Whether an output that is there is replaced.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: An argument is wrong, the output exists, or the checkpoint cannot be loaded.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if compact and format != "peft":
        raise ValueError(f"compact is for format='peft' and not for {format!r}: leave it out")
    if not overwrite:
        refuse_existing(output)
    from geolora_pl.lightning.loading import (
        load_module,  # needs Lightning, which takes seconds and the ranks do without
    )

    module = load_module(ckpt_path, config)
    if format == "adapter":
        save_adapter(module.model, output)
        return f"{output}: load it with load_adapter(model, {str(output)!r})"
    if format == "peft":
        rank = export_peft(module.model, output, compact=compact, overwrite=overwrite)
        return f"{output}: a server must allow rank {rank} (vLLM: --max-lora-rank, the next it offers)"
    merged = MergedAdapters(module.model)
    with atomic(output, overwrite=overwrite) as unfinished:
        unfinished.mkdir()
        module.save_model(unfinished)
    return f"{output}: merged; outputs of single layers differ by at most {max(merged.differences.values()):.1e}"


def spectra(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, int, Tensor]]:
    """The adapters in a state dict: out + in features, rank, and the singular values of the update by name.

    Pending increments count; ``alpha`` does not.
    """
    found: dict[str, tuple[int, int, Tensor]] = {}
    for key in state_dict:
        name = key.removesuffix(".U")
        if name == key or any(f"{name}.{factor}" not in state_dict for factor in FACTORS):
            continue
        U, S, V, K, L = (state_dict[f"{name}.{factor}"] for factor in FACTORS)
        rank = int((U != 0).any(0).sum())
        sigma = decompose(U, S, V, K, L).sigma
        found[name] = (len(U) + len(V), rank, sigma[: max(rank, int((sigma > 1e-6 * sigma[:1]).sum()))])
    return found


def checkpoint_spectra(ckpt_path: str | Path) -> dict[str, list[float]]:
    """The singular values of each adapter in a checkpoint by name; of another kind of checkpoint there are none.

    Raises:
        ValueError: It cannot be read.
    """
    found = spectra(read_checkpoint(ckpt_path, mmap=True).get("state_dict", {}))
    return {name: sigma.tolist() for name, (_, _, sigma) in found.items()}


def ranks_table(ckpt_path: str | Path) -> Table:
    """Ranks, parameters and spectra of the adapters in a checkpoint.

    Raises:
        ValueError: It cannot be read, or has no adapters.
    """
    adapters = spectra(read_checkpoint(ckpt_path)["state_dict"])
    if not adapters:
        raise ValueError(f"ckpt_path={str(ckpt_path)!r} holds no adapters: it is of another run, or merged")
    table = Table(title=str(ckpt_path), title_justify="left", show_footer=True)
    total = sum(size * rank for size, rank, _ in adapters.values())
    table.add_column("adapter", "all", overflow="fold")
    table.add_column("rank", str(sum(rank for _, rank, _ in adapters.values())), justify="right")
    table.add_column("parameters", f"{total:,}", justify="right")
    table.add_column("99% energy", justify="right")  # the rank that would keep so much
    table.add_column("largest", justify="right")
    table.add_column("singular values")
    for name, (size, rank, sigma) in adapters.items():
        enough = int(ranks_by_tau(sigma, 0.1, 0.0, 0, len(sigma))) if len(sigma) else 0
        largest = float(sigma[0]) if len(sigma) else 0.0
        table.add_row(Text(name), str(rank), f"{size * rank:,}", str(enough), f"{largest:.3g}", _sparkline(sigma))
    return table


def _sparkline(sigma: Tensor) -> str:
    heights = sigma / sigma[:1].clamp_min(torch.finfo(sigma.dtype).tiny)
    return "".join(_BARS[round(float(height) * (len(_BARS) - 1))] for height in heights)


def main(args: Sequence[str]) -> None:
    """Run ``export`` or ``ranks``.

    Args:
        args: The command and its arguments.
    """
    parser = argparse.ArgumentParser("python -m geolora_pl", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("export", allow_abbrev=False, help="Write the model of a checkpoint for others.")
    show = commands.add_parser("ranks", allow_abbrev=False, help="Show the adapters of a checkpoint.")
    for command in (take, show):
        command.add_argument("--ckpt_path", required=True, help="The checkpoint of a run.")
    take.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="adapter: one file for load_adapter. peft: a folder for the PEFT library and servers. merged: the plain "
        "model, for from_pretrained or timm.create_model.",
    )
    take.add_argument("--output", required=True, help="The file (adapter) or folder to write.")
    take.add_argument("--config", help="The run's configuration; for modules of your own.")
    take.add_argument("--compact", action="store_true", help="peft: each adapter at its own rank, none of rank 0.")
    take.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")
    given = vars(parser.parse_args(args))
    command = given.pop("command")
    console = Console()
    try:
        if command == "export":
            console.print(export(**given), soft_wrap=True, markup=False, highlight=False)
        else:
            console.print(ranks_table(**given))
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
