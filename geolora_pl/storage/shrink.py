"""Make adapters smaller without training and without their base: cut what counts least of a file or a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from geolora_pl.adapters.names import alternation
from geolora_pl.math.decomposition import svd
from geolora_pl.math.precision import exact_products
from geolora_pl.math.ranks import RankRule, ranks_by_tau, ranks_of_each_by_budget, resolution
from geolora_pl.storage.adapter_file import read_adapter, write_adapter
from geolora_pl.storage.adapter_state import Factors
from geolora_pl.storage.atomic import refuse_existing
from geolora_pl.storage.peft import PREFIX, SIDE_A, SIDE_B, fit_to_write, lora_of, write_folder
from geolora_pl.storage.peft_import import factors_of, read_lora, sides_of


class Shrunk(NamedTuple):
    """What became of adapters.

    Attributes:
        before: Adapter parameters, ``sum(rank * (in + out))``, as they were.
        after: The same as they are now.
        cut: The Frobenius norm of what was cut, relative to that of all updates together.
        rank: The largest rank.
    """

    before: int
    after: int
    cut: float
    rank: int


def shrink(
    adapter: str | Path,
    output: str | Path,
    *,
    tau: float | None = None,
    budget: int | None = None,
    compact: bool = False,
    overwrite: bool = False,
) -> Shrunk:
    """Cut adapters down to a tolerance or a budget, by the rule of training; what was trained beside them is kept.

    Of each adapter the smallest singular values go first, and no other cut to that rank loses less (Eckart
    and Young). An adapter may end at rank 0. The base is not needed.

    Args:
        adapter: A file of :func:`~geolora_pl.save_adapter` or the folder of a plain LoRA of PEFT.
        output: The file or folder to write, of the same kind.
        tau: The relative part of each update that may be cut (Frobenius norm), in [0, 1).
        budget: Adapter parameters in all, at least 1, shared by the energy kept per parameter.
        compact: Of a folder: whether each adapter is stored at its own rank and not padded to the largest.
        overwrite: Whether an output that is there is replaced.

    Raises:
        ValueError: Neither ``tau`` nor ``budget`` is given or one is out of range, the budget is below one direction,
            the output exists, or the adapter cannot be read.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from geolora_pl import AdapterConfig, inject_adapters, save_adapter
        >>> model, folder = nn.Sequential(nn.Linear(8, 6)), Path(tempfile.mkdtemp())
        >>> _ = inject_adapters(model, AdapterConfig(init_rank=4))
        >>> with torch.no_grad():
        ...     _ = model[0].S.fill_diagonal_(1)
        >>> save_adapter(model, folder / "whole.safetensors")
        >>> shrink(folder / "whole.safetensors", folder / "small.safetensors", budget=30).rank
        2
    """
    if tau is None and budget is None:
        raise ValueError("neither tau nor budget is given: say how much may be cut, or how many parameters may stay")
    rule = RankRule(tau or 0.0, budget, min_rank=0)
    if compact and not Path(adapter).is_dir():
        raise ValueError("compact is for the folder of a LoRA: an adapter file has each adapter at its own rank anyway")
    if not overwrite:
        refuse_existing(output)
    if not Path(adapter).is_dir():
        state = read_adapter(adapter)
        factors, said = _cut(state.factors, rule)
        write_adapter(replace(state, factors=factors), output)
        return said
    config, tensors = read_lora(Path(adapter))
    sides, _ = sides_of(tensors)
    if not sides:
        raise ValueError(f"{adapter} holds no LoRA of a linear layer")
    factors, said = _cut(factors_of(sides, config, Path(adapter)), rule)
    loras, settings, names = lora_of(factors, 1.0, compact)
    # Without an adapter a layer is no longer wrapped, and what was trained in it has its own name again.
    bare = {f"{PREFIX}{name}.base_layer": f"{PREFIX}{name}" for name in sides.keys() - names}
    kept = {}
    for key, tensor in tensors.items():
        if not key.endswith((SIDE_A, SIDE_B)):
            owner, _, last = key.rpartition(".")
            kept[f"{bare.get(owner, owner)}.{last}"] = tensor
    for key, tensor in loras.items():
        kept[f"{PREFIX}{key}"] = tensor.to(sides[key.rpartition(".lora_")[0]]["A"].dtype)
    if len(names) < len(sides):  # PEFT is not to look for those of rank 0; an expression means whole names
        settings |= {"target_modules": alternation(names), "layers_to_transform": None, "layers_pattern": None}
    write_folder(Path(output), {**config, **settings, "use_rslora": False}, fit_to_write(kept), overwrite)
    return said


def _cut(factors: Mapping[str, Factors], rule: RankRule) -> tuple[dict[str, Factors], Shrunk]:
    """The adapters at the ranks that a rule gives them; those that keep their rank stay as they are, to the bit."""
    spectra = {name: svd(S) for name, (_, S, _) in factors.items()}
    sizes = {name: len(U) + len(V) for name, (U, _, V) in factors.items()}
    ranks = {
        name: int(ranks_by_tau(sigma, rule.tau, resolution(*_shape(factors[name]), sigma.dtype), 0, len(sigma)))
        for name, (_, sigma, _) in spectra.items()
    }
    if rule.budget is not None:
        sigmas = {name: sigma for name, (_, sigma, _) in spectra.items()}
        within = ranks_of_each_by_budget(sigmas, ranks, sizes, rule.budget)
        if any(ranks.values()) and not any(within.values()):
            least = min(sizes[name] for name, rank in ranks.items() if rank)
            raise ValueError(f"budget={rule.budget} leaves nothing: one direction takes {least} parameters at least")
        ranks = within
    smaller: dict[str, Factors] = {}
    for name, (U, S, V) in factors.items():
        P, sigma, Qh = spectra[name]
        r = ranks[name]
        with exact_products(U.device):
            turned = Factors((U @ P[:, :r]).contiguous(), torch.diag(sigma[:r]), (V @ Qh[:r].mT).contiguous())
        smaller[name] = factors[name] if r == len(S) else turned
    energy = sum(float(sigma.double().square().sum()) for _, sigma, _ in spectra.values())
    lost = sum(float(sigma[ranks[name] :].double().square().sum()) for name, (_, sigma, _) in spectra.items())
    return smaller, Shrunk(
        before=sum(size * len(factors[name].S) for name, size in sizes.items()),
        after=sum(size * ranks[name] for name, size in sizes.items()),
        cut=(lost / energy) ** 0.5 if energy else 0.0,
        rank=max(ranks.values()),
    )


def _shape(factors: Factors) -> tuple[int, int]:
    return len(factors.U), len(factors.V)
