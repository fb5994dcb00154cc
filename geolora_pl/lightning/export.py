"""Write the model of a checkpoint in a form that other libraries load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from geolora_pl.adapters.merge import MergedAdapters
from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.storage.adapter_file import save_adapter
from geolora_pl.storage.atomic import atomic, refuse_existing
from geolora_pl.storage.peft import export_peft, server_rank

Format = Literal["adapter", "peft", "diffusers", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)


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
        format: ``adapter`` for a file of :func:`save_adapter`, ``peft`` for a folder of PEFT, ``diffusers`` for a
            folder that ``load_lora_weights`` of a pipeline loads, ``merged`` for a folder with the plain model: for
            ``from_pretrained`` (texts, with the tokenizer, and pipelines) or ``timm.create_model`` (images).
        output: The file or folder to write.
        config: The run's configuration, where the checkpoint alone does not name its module.
        compact: For ``peft`` and ``diffusers``: each adapter at its own rank.
        overwrite: Whether an output that is there is replaced.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: An argument is wrong, the output exists, or the checkpoint cannot be loaded.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if compact and format not in ("peft", "diffusers"):
        raise ValueError(f"compact is for the formats peft and diffusers and not for {format!r}: leave it out")
    if not overwrite:
        refuse_existing(output)
    # Lightning takes seconds to import, and the command ranks, which shares the file of this one, does without it.
    from geolora_pl.lightning.loading import load_module, model_of

    module = load_module(ckpt_path, config)
    model = model_of(module)
    if format == "adapter":
        save_adapter(model, output)
        return f"{output}: load it with load_adapter(model, {str(output)!r})"
    if format == "peft":
        rank = export_peft(model, output, compact=compact, overwrite=overwrite)
        return f"{output}: {server_rank(rank)}"
    if format == "diffusers":
        with atomic(output, overwrite=overwrite) as unfinished:
            unfinished.mkdir()
            rank = _saver_of_loras(module)(unfinished, compact)
        return f"{output}: of rank {rank}; load it with pipeline.load_lora_weights({str(output)!r})"
    merged = MergedAdapters(model)
    with unwrapped(module), atomic(output, overwrite=overwrite) as unfinished:
        unfinished.mkdir()
        module.save_model(unfinished)
    return f"{output}: merged; outputs of single layers differ by at most {max(merged.differences.values()):.1e}"


def _saver_of_loras(module: object) -> Callable[[Path, bool], int]:
    """The method of a task that writes a LoRA for diffusers."""
    save: Callable[[Path, bool], int] | None = getattr(module, "save_lora", None)
    if save is None:
        raise ValueError(f"format='diffusers' is for pipelines and not for a {type(module).__name__}: take peft")
    return save
