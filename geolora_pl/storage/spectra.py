"""Read the singular values of the adapters in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from geolora_pl.adapters.base import FACTORS
from geolora_pl.math.decomposition import decompose, without_probes
from geolora_pl.storage.checkpoint import plain_weights, read_checkpoint


def spectra(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, int, Tensor]]:
    """For each adapter in a state dict by name: out + in features, rank, and as many singular values of its update.

    The update includes pending increments, but not the factor ``alpha``.

    Raises:
        ValueError: The factors of an adapter have not the shapes of factors, or values that are not finite.
    """
    found: dict[str, tuple[int, int, Tensor]] = {}
    for key in state_dict:
        name = key.removesuffix(".U")
        if name == key or any(f"{name}.{factor}" not in state_dict for factor in FACTORS):
            continue
        _check(name, *(state_dict[f"{name}.{factor}"] for factor in FACTORS))
        U, S, V, K, L = without_probes(*(state_dict[f"{name}.{factor}"] for factor in FACTORS))
        rank = int((U != 0).any(0).sum())
        sigma = decompose(U, S, V, K, L).sigma
        found[name] = (len(U) + len(V), rank, sigma[:rank])
    return found


def _check(name: str, *factors: object) -> None:
    """Refuse what is no adapter, or one that claims to be larger than its file: its entries would be made here."""
    tensors = [factor for factor in factors if isinstance(factor, Tensor) and factor.is_floating_point()]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(shapes) == len(FACTORS) and all(len(shape) == 2 for shape in shapes):
        (m, columns), (R, _), (n, _) = shapes[:3]
        stored = all(factor.numel() * factor.element_size() <= factor.untyped_storage().nbytes() for factor in tensors)
        expected = [(m, columns), (R, R), (n, columns), (m, columns), (n, columns)]
        if shapes == expected and min(m, n, columns) >= R and stored:
            if not all(factor.isfinite().all() for factor in tensors):
                raise ValueError(f"{name} holds values that are not finite: go back to a checkpoint before it")
            return
    raise ValueError(f"{name} has {', '.join(map(str, shapes)) or 'no tensors'} and is no adapter: save it again")


def checkpoint_spectra(ckpt_path: str | Path) -> dict[str, list[float]]:
    """The singular values of each adapter in a checkpoint by name; none for a checkpoint without adapters.

    Raises:
        ValueError: The checkpoint cannot be read.
    """
    found = spectra(plain_weights(read_checkpoint(ckpt_path, mmap=True)))
    return {name: sigma.tolist() for name, (_, _, sigma) in found.items()}
