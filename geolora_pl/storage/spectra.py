"""Read the singular values of the adapters in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from geolora_pl.adapters.base import FACTORS
from geolora_pl.math.decomposition import decompose, without_probes
from geolora_pl.storage.checkpoint import read_checkpoint


def spectra(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, int, Tensor]]:
    """For each adapter in a state dict by name: out + in features, rank, and as many singular values of its update.

    The update includes pending increments, but not the factor ``alpha``.
    """
    found: dict[str, tuple[int, int, Tensor]] = {}
    for key in state_dict:
        name = key.removesuffix(".U")
        if name == key or any(f"{name}.{factor}" not in state_dict for factor in FACTORS):
            continue
        U, S, V, K, L = without_probes(*(state_dict[f"{name}.{factor}"] for factor in FACTORS))
        rank = int((U != 0).any(0).sum())
        sigma = decompose(U, S, V, K, L).sigma
        found[name] = (len(U) + len(V), rank, sigma[:rank])
    return found


def checkpoint_spectra(ckpt_path: str | Path) -> dict[str, list[float]]:
    """The singular values of each adapter in a checkpoint by name; none for a checkpoint without adapters.

    Raises:
        ValueError: The checkpoint cannot be read.
    """
    found = spectra(read_checkpoint(ckpt_path, mmap=True).get("state_dict", {}))
    return {name: sigma.tolist() for name, (_, _, sigma) in found.items()}
