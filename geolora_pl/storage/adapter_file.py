"""Write and read adapter files, which hold what was trained, at the live ranks, and how to put it on its base."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.names import alternation, names_in
from geolora_pl.storage.adapter_state import (
    AdapterState,
    Factors,
    apply,
    capture,
    check,
    config_of,
)
from geolora_pl.storage.atomic import atomic
from geolora_pl.storage.checkpoint import load_checkpoint, read_checkpoint
from geolora_pl.storage.hub import located
from geolora_pl.storage.peft_import import import_peft

_FORMAT, _VERSION = "geolora_pl.adapter", 1
_KINDS = ("adapters", "trained", "buffers")  # a tensor's name in the file starts with one of these


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapters and whatever else was trained to one safetensors file.

    An adapter of rank r is stored as ``U (m, r), S (r, r), V (n, r)``, whatever ``max_rank`` is, and without its
    probes. Pending increments are folded into the copy that is written, and where an integrator trains the adapters its
    ``tau`` and budget choose the ranks as in a retraction; the model does not change. The file also holds
    the configuration, the name of the base, a hash of its frozen weights and a checksum. An existing file is replaced
    in one step.

    Args:
        model: A model with adapters.
        path: The file, usually with the ending ``.safetensors``.

    Raises:
        ValueError: The model has no adapters, or a value in them is not finite.

    Example:
        >>> import tempfile
        >>> from geolora_pl import inject_adapters
        >>> model, file = nn.Sequential(nn.Linear(8, 6)), Path(tempfile.mkdtemp(), "adapter.safetensors")
        >>> _ = inject_adapters(model)
        >>> save_adapter(model, file)
        >>> load_adapter(model, file)
    """
    write_adapter(capture(model), path)


def load_adapter(model: nn.Module, path: str | Path, *, revision: str | None = None, token: str | None = None) -> None:
    """Load a file of :func:`save_adapter` into its base, plain or with fresh adapters; training can go on from it.

    The whole file is checked before the model is touched. A plain model gets the adapters of the file, and what was
    trained with them becomes trainable again; existing adapters keep their own dropout, ``max_rank`` and number of
    probes. Load the file before optimizer and integrator are made, because their state does not follow the new values.

    A checkpoint of a run is taken as well, which is how a LightningModule that got its adapters from the callback comes
    back from one: its ``load_from_checkpoint`` knows nothing of adapters. All weights are those of the checkpoint then.

    A name of the hub stands for the adapter file in that repository, or for its LoRA of PEFT where it has no such file,
    as :func:`~geolora_pl.import_peft` loads it. A folder is taken like a repository. Only safetensors and JSON are
    fetched, and nothing of them is run.

    Args:
        model: The base that the adapter was trained on, in any precision.
        path: The adapter file, the checkpoint, a folder, or the name of a repository on the hub, ``user/name``; a path
            that exists goes first.
        revision: A branch, tag or commit of the repository.
        token: For a private repository; by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: The file is missing, broken, of a newer version or not an adapter, the repository cannot be read, or
            the model is not its base; nothing is loaded then.

    Example:
        See :func:`save_adapter`.
    """
    file = located(path, revision, token)
    if file.is_dir():
        import_peft(model, file)
        return
    # A checkpoint is one where the user names that file; what the hub gives is never unpickled.
    is_checkpoint = file == Path(path) and zipfile.is_zipfile(file)
    state = None if is_checkpoint else read_adapter(file)
    try:
        if state is None:
            load_checkpoint(model, read_checkpoint(file))
            return
        check(model, state)
        apply(model, state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error


def write_adapter(state: AdapterState, path: str | Path) -> None:
    """Write a state to a file.

    Raises:
        ValueError: A value is not finite, or a tensor is sparse.
    """
    tensors = {f"trained/{name}": tensor for name, tensor in state.trained.items()}
    tensors |= {f"buffers/{name}": tensor for name, tensor in state.buffers.items()}
    for name, factors in state.factors.items():
        tensors |= {f"adapters/{name}/{letter}": factor for letter, factor in factors._asdict().items()}
    if sparse := [name for name, tensor in tensors.items() if tensor.layout is not torch.strided]:
        raise ValueError(f"{sparse[0]} is sparse, and a file cannot hold that: register it with persistent=False")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if problem := _not_finite(tensors):
        raise ValueError(f"{problem} is not finite, so the adapter is not saved: go back to a checkpoint before it")
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "config": json.dumps(asdict(state.config)),
        "base_name": json.dumps(state.base_name),
        "base_hash": state.base_hash,
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    with atomic(path) as unfinished:
        save_file(tensors, unfinished, metadata)


def read_adapter(path: str | Path) -> AdapterState:
    """Read a file of :func:`save_adapter` and check everything that can be checked without its base.

    Raises:
        ValueError: The file is missing, broken, of a newer version or not an adapter.
    """
    if not Path(path).is_file():
        kind = "a folder, which import_peft loads if it is of PEFT" if Path(path).is_dir() else "not a file"
        raise ValueError(f"{path} is {kind} (from {Path.cwd()})")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is not an adapter of geolora_pl: import_peft loads a folder of PEFT")
            if not metadata.get("version", "").isdecimal():
                raise ValueError(f"{path} is corrupt: it has no version; fetch or save it again")
            if (version := int(metadata["version"])) > _VERSION:
                raise ValueError(
                    f"{path} is of version {version}, and this geolora_pl reads up to {_VERSION}: update geolora_pl"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open gives no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file ({error}): fetch or save it again") from error
    if metadata.pop("checksum", None) != _checksum(metadata, tensors):
        raise ValueError(f"{path} is corrupt: its checksum does not fit its contents; fetch or save it again")
    try:
        return _state(metadata, tensors)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a well-formed adapter ({error}): save it again") from error


def _state(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> AdapterState:
    if problem := _not_finite(tensors):
        raise ValueError(f"{problem} is not finite")
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        found[kind][rest] = tensor
    names = sorted({name.rpartition("/")[0] for name in found["adapters"]})
    if not names or len(found["adapters"]) != 3 * len(names):
        raise ValueError("there must be at least one adapter, each with U, S and V")
    factors = {name: Factors(*(found["adapters"][f"{name}/{letter}"] for letter in "USV")) for name in names}
    written = AdapterConfig(**json.loads(metadata["config"]))
    # Only names and numbers are taken from the file: an expression of a stranger's is not run.
    config = config_of(
        {name: rank for names, rank in written.rank_pattern.items() for name in names_in(names)},
        written.alpha,
        written.dropout,
        # No layer has more directions than these, and each of them would be memory in every layer.
        min(written.probes, max(max(factor.shape) for three in factors.values() for factor in three)),
    )
    state = AdapterState(
        config=replace(config, target_modules=alternation(names_in(written.target_modules))),
        factors=factors,
        trained=found["trained"],
        buffers=found["buffers"],
        base_name=json.loads(metadata["base_name"]),
        base_hash=metadata["base_hash"],
    )
    for name, max_rank in state.max_ranks.items():
        U, S, V = factors[name]
        r = U.shape[-1] if U.dim() == V.dim() == 2 else -1
        if not (S.shape == (r, r) and V.shape[1] == r <= max_rank):
            raise ValueError(f"{name} has U {tuple(U.shape)}, S {tuple(S.shape)}, V {tuple(V.shape)}")
        if not all(factor.dtype in (torch.float32, torch.float64) for factor in (U, S, V)):
            raise ValueError(f"{name} has factors that are neither float32 nor float64")
        if r and not ((U != 0).any(0).all() and (V != 0).any(0).all()):
            raise ValueError(f"{name} has a column of zeros")
    return state


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite; a buffer, such as a mask, may be infinite."""
    return next(
        (n for n, t in tensors.items() if (t.isnan() if n.startswith("buffers/") else ~t.isfinite()).any()), None
    )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
