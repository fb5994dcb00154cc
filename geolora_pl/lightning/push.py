"""Push an adapter to the Hugging Face hub, in the forms of this package, PEFT and transformers, with its card."""

from __future__ import annotations

import json
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from geolora_pl.adapters.wrappers import unwrapped
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.report.card import Contents, Library, model_card, rank_picture
from geolora_pl.report.public import DataSource, data_of, may_be_on_hub
from geolora_pl.report.runs import Run, read_run
from geolora_pl.storage.adapter_file import read_adapter, write_adapter
from geolora_pl.storage.adapter_state import AdapterState, capture
from geolora_pl.storage.checkpoint import read_checkpoint
from geolora_pl.storage.hub import ADAPTER, CARD, PICTURE, is_hub_name, is_there, push, refuse_what_cannot_be_pushed
from geolora_pl.storage.peft import PREFIX, as_lora, write_folder

_HUB_TASKS = {  # by the endings of the classes of transformers
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


def push_to_hub(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    run: str | Path | None = None,
    config: str | Path | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Push adapters to the Hugging Face hub, from where this package, PEFT and transformers load them.

    The repository gets the file of :func:`~geolora_pl.save_adapter`, a LoRA of PEFT (of a pipeline the file of
    ``load_lora_weights``), a picture of the ranks, and a card with base, ranks, scores, settings and how to load it.
    All of it is written before anything is uploaded, and goes out in one commit, without any path of this machine or
    text of the user's settings. A further push replaces these files and leaves all others alone.

    Args:
        source: A model with adapters (the model into which PEFT will load them, not a module around it), the checkpoint
            of a run, the folder of a run, which stands for its last checkpoint, or an adapter file. There is no LoRA of
            PEFT of a file, which does not say what kinds of layers it is for, or of what PEFT cannot hold; a warning
            and the card say so.
        repo_id: The name of the repository, ``user/name``; it is made if it is not there.
        run: The folder of the run with scores and settings; of a checkpoint by default the one that holds it.
        config: The run's configuration, where a checkpoint alone does not name its module.
        base_model: The name of the base on the hub; by default as transformers or the run knows it.
        private: Whether nobody else may see the repository; by default as its owner has it on the hub.
        revision: The branch, which is made if it is not there; by default the main one.
        commit_message: What the commit says.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The address of the repository.

    Raises:
        ValueError: An argument is wrong, there is no token, the source cannot be read, or the hub does not take it.

    Example:
        >>> from geolora_pl import inject_adapters
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> _ = inject_adapters(model)
        >>> push_to_hub(model, "name without a user")
        Traceback (most recent call last):
        ValueError: repo_id='name without a user' cannot be the name of a repository: write user/name, ...
    """
    if not isinstance(source, nn.Module) and not Path(source).exists():
        raise ValueError(
            f"source='{source}' is neither a file nor a folder (from {Path.cwd()}): name a checkpoint, the folder of a "
            "run or an adapter file"
        )
    refuse_what_cannot_be_pushed(repo_id, token)
    if base_model is not None and not is_hub_name(base_model):
        raise ValueError(f"base_model={base_model!r} must be the name of a model on the hub, and no path: correct it")
    found = _read(source, run, config)
    base = base_model or _base_of(found, token)
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "adapter")
        library, problem = _write_for_others(folder, found, base)
        write_adapter(replace(found.state, base_name=base), folder / ADAPTER)
        rank_picture(found.state).save(folder / PICTURE)
        contents = Contents(
            repo_id,
            base,
            build=_building(found, base),
            task=_task_of(found),
            library=library,
            of_transformers=_is_of("transformers", found),
            problem=problem,
            data=_data_of(found, token),
        )
        (folder / CARD).write_text(model_card(found.state, contents, found.run, found.step), encoding="utf-8")
        if problem is not None:
            warnings.warn(f"{repo_id} gets no LoRA of PEFT: {problem}", GeoLoRAWarning, stacklevel=2)
        return push(folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)


@dataclass(frozen=True)
class _Found:
    """What there is to push: an adapter, and whatever is known of its model and its run."""

    state: AdapterState
    model: nn.Module | None = None
    module: nn.Module | None = None
    run: Run | None = None
    step: int | None = None


def _read(source: nn.Module | str | Path, run: str | Path | None, config: str | Path | None) -> _Found:
    of_run = None if run is None else read_run(Path(run))
    if isinstance(source, nn.Module):
        with unwrapped(source) as plain:
            return _Found(capture(plain), plain, run=of_run)
    file = Path(source)
    if file.is_dir():
        here = read_run(file)
        if not here.checkpoints:
            raise ValueError(
                f"source='{file}' holds no checkpoint: name a run with one, a .ckpt file or an adapter file"
            )
        file, of_run = here.checkpoints[-1], of_run or here
    if not zipfile.is_zipfile(file):
        return _Found(read_adapter(file), run=of_run)
    # Lightning takes seconds to import, and a model or an adapter file is pushed without it.
    from geolora_pl.lightning.loading import load_module, model_of

    module = load_module(file, config)
    model = model_of(module)
    step = read_checkpoint(file, mmap=True).get("global_step")  # of a strange file perhaps no number
    return _Found(
        capture(model),
        model,
        module,
        of_run or _run_around(file),
        step if isinstance(step, int) else None,
    )


def _run_around(checkpoint: Path) -> Run | None:
    """The run whose folder of checkpoints holds a file, if there is one."""
    try:
        return read_run(checkpoint.resolve().parent.parent)
    except ValueError:
        return None


def _write_for_others(folder: Path, found: _Found, base: str | None) -> tuple[Library, str | None]:
    """Make the folder, and write what another library loads; that library, or else why there is none."""
    save_lora = getattr(found.module, "save_lora", None)
    if save_lora is not None or found.model is None:
        folder.mkdir()
        if save_lora is None:
            return "geolora_pl", "it comes from an adapter file, without the model that says how PEFT would hold it"
        save_lora(folder)
        return "diffusers", None
    try:
        lora = as_lora(found.model, state=found.state)
    except ValueError as error:
        folder.mkdir()
        return "geolora_pl", str(error)
    # The names of the user's own modules and folders stay here.
    names = {} if _is_of("transformers", found) else {"auto_mapping": None}
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in lora.tensors.items()}
    write_folder(folder, {**lora.config, "base_model_name_or_path": base, **names}, tensors, overwrite=False)
    return "peft", None


def _is_of(library: str, found: _Found) -> bool:
    return type(found.model).__module__.startswith(f"{library}.models.")


def _base_of(found: _Found, token: str | None) -> str | None:
    """The name of the base on the hub, where it is sure to be that; a path may look like one, seen from elsewhere."""
    settings = found.run.settings if found.run else {}
    name: object = settings.get("model.init_args.model_name")
    if name is None:
        name = found.state.base_name if _is_of("transformers", found) else None
    elif settings.get("model.init_args.pretrained") is False or settings.get("model.init_args.checkpoint_path"):
        return None  # the architecture has that name, and its weights are others
    elif _is_of("timm", found):
        return f"timm/{found.state.base_name}"
    return name if isinstance(name, str) and may_be_on_hub(name) and is_there(name, "model", token) else None


def _data_of(found: _Found, token: str | None) -> DataSource | None:
    """The data source of the run, with its name on the hub, where it is sure to be that."""
    source = data_of(found.run.settings) if found.run else None
    if source is None or source.hub_name is None or is_there(source.hub_name, "dataset", token):
        return source
    return replace(source, hub_name=None)


def _building(found: _Found, base: str | None) -> list[str]:
    """Lines of Python that make the base."""
    kind = type(found.model).__name__
    if hasattr(found.module, "save_lora"):
        made = "...  # the base" if base is None else f'DiffusionPipeline.from_pretrained("{base}")'
        return ["from diffusers import DiffusionPipeline", f"pipeline = {made}"]
    if base is not None and (given := _model_args(found)) is not None:
        if _is_of("timm", found):
            given = {"num_classes": getattr(found.model, "num_classes", 0), **given}
            made = f'create_model("hf-hub:{base}", pretrained=True{_arguments(given)})'
            return ["from timm import create_model", f"model = {made}"]
        if _is_of("transformers", found):
            labels = getattr(getattr(found.model, "config", None), "num_labels", 0)
            head = {"num_labels": labels} if kind.endswith("Classification") else {}
            made = f'{kind}.from_pretrained("{base}"{_arguments({**head, **given, **_quantising(found.model)})})'
            return [f"from transformers import {kind}", f"model = {made}"]
    return ["model = ...  # the base, with the weights that it was trained on"]


def _arguments(given: Mapping[str, object]) -> str:
    return "".join(f", {name}={value!r}" for name, value in given.items())


def _model_args(found: _Found) -> dict[str, object] | None:
    """The arguments that made another model of the base; ``None`` where one is a text, which may be private."""
    settings, prefix = found.run.settings if found.run else {}, "model.init_args.model_args."
    given = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    if _is_of("timm", found):  # of others a checkpoint has the whole configuration in the place of these
        given = getattr(found.module, "model_args", given)
    # An overlay says what an image must look like, which the weights do not depend on.
    given = {name: value for name, value in given.items() if not name.startswith("pretrained_cfg_overlay")}
    single = [each for value in given.values() for each in (value if isinstance(value, (list, tuple)) else [value])]
    is_public = all(map(str.isidentifier, given)) and all(isinstance(each, (int, float, type(None))) for each in single)
    return given if is_public else None


def _quantising(model: Any) -> dict[str, object]:
    """The arguments by which a base becomes the codes that were trained on; none where it is plain or stored so."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return {}
    how = quantizer.quantization_config
    said = {name: value for name, value in json.loads(how.to_json_string()).items() if not name.startswith("_")}
    dtype = str(model.config.dtype).removeprefix("torch.")  # of what was quantised
    return {"dtype": dtype, "quantization_config": said | {"quant_method": how.quant_method.value}}


def _task_of(found: _Found) -> str | None:
    if hasattr(found.module, "save_lora"):
        return "text-to-image"
    if _is_of("timm", found):
        return "image-classification"
    kind = type(found.model).__name__ if _is_of("transformers", found) else ""
    return next((task for ending, task in _HUB_TASKS.items() if kind.endswith(ending)), None)
