"""How what is done once per adapter grows with their number and width: the start of a fit, steps, events, files, pages.

The products of the model are left out; ``growth`` has them. Numbers are measured on narrow layers, and widths
on few of them.
"""

from __future__ import annotations

import gc
import io
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.shared import figures
from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    RankAdaptiveIntegrator,
    RiemannianAdam,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from geolora_pl.cli.commands import ranks_tables
from geolora_pl.lightning.monitor import RankMonitor
from geolora_pl.lightning.summary import start_summary
from geolora_pl.loggers import CSVLogger
from geolora_pl.report.write import write_report

NUMBERS = (72, 560, 5000)  # a BERT-base, Llama-3-70B, and more than any model of today has
WIDTH = 64  # of the layers where their number grows
WIDTHS = (384, 768, 1536, 3072, 6144, 8192)
FEW = 4  # layers where their width grows
# Rows and columns of the layers of a block of Llama-3-70B.
SHAPES = {
    "q_proj": (8192, 8192),
    "k_proj": (1024, 8192),
    "v_proj": (1024, 8192),
    "o_proj": (8192, 8192),
    "gate_proj": (28672, 8192),
    "up_proj": (28672, 8192),
    "down_proj": (8192, 28672),
}
LAYERS = tuple(SHAPES)
BLOCKS, TRIED = 80, 8  # blocks of that decoder, and how many of them are tried here
GPUS = 8
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
ADAPT_EVERY = 4
STEPS = 7 * ADAPT_EVERY
REPEATS = 2  # of which the least counts
OF_MODEL = ("inject", "start", "step", "event", "save", "load")
OF_FIT = ("fit", "log", "pictures", "checkpoint", "ranks", "report")
Seconds = dict[str, list[float]]


class Layers(L.LightningModule):
    """Linear layers side by side, with the names that they have in a decoder; always with the same weights.

    Args:
        number: Of layers, seven per block; the last block may have fewer.
        width: Inputs and outputs of every layer.
    """

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in LAYERS[: number - first]})
            for first in range(0, number, len(LAYERS))
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs = [layer(batch) for block in self.blocks for layer in block.values()]  # type: ignore[operator, union-attr]
        return torch.stack(outputs).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(8, self.width), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> RiemannianAdam:
        return RiemannianAdam(self)


def measure(rounds: int = REPEATS) -> list[dict[str, Any]]:
    """Milliseconds of every part at every number and width, the least of several."""
    setups = [("number", number, WIDTH) for number in NUMBERS] + [("width", FEW, width) for width in WIDTHS]
    records = []
    for grows, number, width in setups:
        seconds: Seconds = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                _of_model(seconds, number, width, Path(folder))
            if grows == "number":
                for i in range(rounds):
                    _of_fit(seconds, number, width, Path(folder, str(i)))
        ms = {part: round(1e3 * min(found), 3) for part, found in seconds.items()}
        records.append({"grows": grows, "size": number if grows == "number" else width, "adapters": number, "ms": ms})
    return records


def _of_model(seconds: Seconds, number: int, width: int, folder: Path) -> None:
    """Measure what needs no trainer."""
    model, file = Layers(number, width), folder / "adapter.safetensors"
    _of_training(seconds, model)
    with _timed(seconds, "save"):
        save_adapter(model, file)
    del model
    fresh = Layers(number, width)
    with _timed(seconds, "load"):
        load_adapter(fresh, file)


def _of_training(seconds: Seconds, model: nn.Module) -> None:
    """Put adapters into a model, and measure steps with gradients that are random."""
    with _timed(seconds, "inject"):
        adapters = inject_adapters(model)
    with _timed(seconds, "start"):
        integrator = RankAdaptiveIntegrator(model, tau=0.3, adapt_every=ADAPT_EVERY)
        optimizer = RiemannianAdam(model)
        integrator.check_optimizer(optimizer)
        start_summary(model, RankMonitor(integrator))
    found: Seconds = {}
    for _ in range(STEPS):
        for layer in adapters.values():
            for factor in (layer.K, layer.L):
                factor.grad = torch.randn_like(factor)
        with _timed(found, "optimizer"):
            optimizer.step()
        with _timed(found, "integrator"):
            adapted = integrator.step(optimizer)
        spent = [found[part][-1] for part in ("optimizer", "integrator")]
        part, value = ("event", spent[1]) if adapted else ("step", sum(spent))
        found.setdefault(part, []).append(value)
    for part in ("step", "event"):
        seconds.setdefault(part, []).extend(found[part][-3:])  # once the ranks have settled
    integrator.close()


def _of_fit(seconds: Seconds, number: int, width: int, folder: Path) -> None:
    """Measure a fit of two steps with its logs, and what is made of its files."""
    folder.mkdir()
    callback = GeoLoRACallback(adapt_every=1)
    loggers = [CSVLogger(folder, "", ""), TensorBoardLogger(folder, "", "")]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=loggers, log_every_n_steps=1)
        with _timed(seconds, "fit"):
            trainer.fit(Layers(number, width))
    monitor, file = callback.monitor, folder / "last.ckpt"
    assert monitor is not None, "there was a fit"
    with _timed(seconds, "log"):
        monitor.log(trainer, 2)
    with _timed(seconds, "pictures"):
        monitor.show(trainer.loggers, 2, at_last=True)
    with _timed(seconds, "checkpoint"):
        trainer.save_checkpoint(file)
    with _timed(seconds, "ranks"):
        ranks_tables(file)
    with _timed(seconds, "report"):
        write_report(folder)


@contextmanager
def _timed(seconds: Seconds, part: str) -> Iterator[None]:
    """Add the CPU time of the block to those of a part; no collection of garbage falls into it."""
    gc.disable()
    began = time.process_time()
    try:
        yield
    finally:
        gc.enable()
    seconds.setdefault(part, []).append(time.process_time() - began)


def _of(records: Sequence[Mapping[str, Any]], grows: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["grows"] == grows]


def exponent(records: Sequence[Mapping[str, Any]], grows: str, part: str) -> float | None:
    """With which power of the size a part grows at the end: from one size to the next, at the two largest."""
    found = [(record["size"], record["ms"][part]) for record in _of(records, grows)]
    if len(found) < 2 or not all(ms > 0 for _, ms in found[-2:]):
        return None
    (less, before), (more, after) = found[-2:]
    return round(math.log(after / before) / math.log(more / less), 2)


def parts(records: Sequence[Mapping[str, Any]], grows: str) -> list[str]:
    """The parts that were measured while this grew."""
    return list(_of(records, grows)[0]["ms"])


def rows(records: Sequence[Mapping[str, Any]], grows: str) -> list[list[str]]:
    """The cells of a table: a row per part, milliseconds at every size, and the exponent."""
    of_size = [record["ms"] for record in _of(records, grows)]
    return [
        [part, *(f"{ms[part]:,.1f}" for ms in of_size), f"{exponent(records, grows, part)}"]
        for part in parts(records, grows)
    ]


def sizes(records: Sequence[Mapping[str, Any]], grows: str) -> list[int]:
    return [record["size"] for record in _of(records, grows)]


def draw(records: Sequence[Mapping[str, Any]]) -> None:
    """Draw milliseconds over the number of adapters and over the width, with the exponent of every part."""
    figure, axes = figures.panels(2)
    for ax, grows in zip(axes, ("number", "width"), strict=True):
        at = sizes(records, grows)
        for part in parts(records, grows):
            ms = [record["ms"][part] for record in _of(records, grows)]
            dashed = "--" if part in OF_FIT else "-"
            ax.plot(at, ms, dashed, label=f"{part} {exponent(records, grows, part)}")
        ax.set(xscale="log", yscale="log", ylabel="milliseconds")
        ax.set_xlabel("adapters" if grows == "number" else f"width of {FEW} layers")
        ax.set_xticks(at, [str(size) for size in at], fontsize="small")
        ax.minorticks_off()
        ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), title="exponent at the end")
    figures.save(figure, "many")


class Decoder(nn.Module):
    """Blocks of Llama-3-70B without values: its weights are one number each, seen as a matrix.

    Args:
        blocks: How many of them.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: _without_values(*shape) for name, shape in SHAPES.items()}) for _ in range(blocks)
        )


def _without_values(m: int, n: int) -> nn.Linear:
    layer = nn.Linear(n, m, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(m, n))
    return layer


def on_paper(config: AdapterConfig) -> dict[str, int]:
    """What a step and an event of the whole decoder take: bytes, operations and messages.

    Operations are those on the rows of the factors, beside which the small matrices of an adapter are nothing:
    4 c^2 per row for QR with c columns, and 2 c c' for a product with a matrix c x c'.

    Args:
        config: Allocates the columns; all of them are live.
    """
    R, p = config.max_rank, config.probes
    rows, adapters = BLOCKS * sum(m + n for m, n in SHAPES.values()), BLOCKS * len(SHAPES)
    whole, joint = R + p, 2 * R + 3 * p
    gradients = 4 * rows * whole
    return {
        "adapters": adapters,
        "rows": rows,
        "bytes of gradients": gradients,
        "messages of gradients": -(-gradients // BUCKET),
        "bytes that a GPU sends per step": 2 * (GPUS - 1) * gradients // GPUS,
        "bytes of a retraction's message": gradients + adapters * (4 * (R + p) + 9) + 8,
        "operations of a step": 9 * rows * whole,
        "operations of QR": 4 * rows * joint**2,
        "operations of products": 2 * rows * joint * whole,
    }


def measure_decoder(records: Sequence[Mapping[str, Any]], rounds: int = REPEATS) -> dict[str, Any]:
    """Step and event of some blocks of the decoder, beside what the measured widths say of them."""
    seconds: Seconds = {}
    for _ in range(rounds):
        _of_training(seconds, Decoder(TRIED))
    widest = _of(records, "width")[-1]
    rows = TRIED * sum(m + n for m, n in SHAPES.values())
    ms = {part: round(1e3 * min(seconds[part]), 1) for part in ("step", "event")}
    expected = {part: round(widest["ms"][part] * rows / (2 * FEW * widest["size"]), 1) for part in ms}
    return {"blocks": TRIED, "ms": ms, "expected": expected, "on_paper": on_paper(AdapterConfig())}
