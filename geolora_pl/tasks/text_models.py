"""Find and load models and tokenizers of transformers, and say what is new in them and how long a text may be."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from geolora_pl.adapters.registry import adapter_class_of
from geolora_pl.errors import in_one_line
from geolora_pl.lfs import refuse_pointer
from geolora_pl.lightning.hyperparameters import check_sizes
from geolora_pl.packaged import in_package

_SAID = "checkpoint-says://"  # the prefix of a name that only a checkpoint gives
# What a configuration says of its origin or to people; the task itself knows the classes.
_NOT_TAKEN = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "task_specific_params"}
_NOT_TAKEN |= {"torch_dtype", "transformers_version"}
# Settings of a configuration, or of one inside it, that make transformers fetch weights or kernels, or rename settings.
_FETCHES = {"attn_implementation", "experts_implementation", "quantization_config", "use_kernels"}
_FETCHES |= {"attribute_map", "sub_configs", "auto_map", "backbone", "backbone_config", "use_pretrained_backbone"}
# Tokens that the configuration of any model may name, though that of few kinds has them from the start.
_TOKENS = {f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")}
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")  # BERT and most; GPT-2; OPT
_IN_BLOCK = re.compile(r".*\.\d+\..+")  # a part of a numbered block, as in encoder.layer.0.output.dense


def find_source(model_name: str) -> tuple[str, bool]:
    """Find out where a model lies: in a folder, or on the hub.

    Args:
        model_name: Name of the hub, path of a folder, or ``pkg://package/folder`` for a folder of an installed package.

    Returns:
        The argument for ``from_pretrained``, and whether it is a folder on this machine.

    Raises:
        ValueError: The folder or package does not exist, or only a checkpoint names the model.
    """
    if model_name.startswith(_SAID):
        raise ValueError(
            f"the checkpoint says that its model is {model_name.removeprefix(_SAID)!r}, and a file does not decide "
            "what is fetched: give the run's configuration (--config), or model_name=... to load_from_checkpoint"
        )
    packaged = in_package(model_name, "model_name")
    folder = packaged or Path(model_name)
    if not folder.is_dir():
        if packaged is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name) and model_name[0] != ".":
            return model_name, False
        raise ValueError(f"model_name={model_name!r}: {folder} is not a folder (from {Path.cwd()})")
    return str(folder), True


def said_by_checkpoint(model_name: str) -> str:
    """Mark a name of the hub that comes from a checkpoint, so that it is shown but nothing is fetched by it."""
    if not isinstance(model_name, str):
        raise ValueError("is not a name")
    if model_name.startswith(_SAID):
        return model_name
    try:
        is_local = find_source(model_name)[1]
    except ValueError:  # a folder of another machine, which is refused when it is used
        is_local = True
    return model_name if is_local else f"{_SAID}{model_name}"


def shown(model_name: str) -> str:
    """The name of a model as people know it, whoever says it."""
    return model_name.removeprefix(_SAID)


def config_from_checkpoint(model_args: object) -> dict[str, Any]:
    """Of a configuration in a checkpoint the sizes of a model that transformers itself has; the rest is dropped.

    Args:
        model_args: The whole configuration, as :func:`plain_config` writes it.

    Raises:
        ValueError: It is not whole, so that something would be fetched, or a size names code or a place.
    """
    kind = model_args.get("model_type") if isinstance(model_args, Mapping) else None
    if not isinstance(model_args, Mapping) or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            "is not a complete configuration of a model that transformers has, so that it would be fetched"
        )
    known = (AutoConfig.for_model(kind).to_dict().keys() | _TOKENS) - _NOT_TAKEN
    sizes = {name: value for name, value in model_args.items() if name in known}
    check_sizes(sizes, never=_FETCHES)
    return {**sizes, "model_type": kind}


def load_config(model_name: str, model_args: Mapping[str, Any]) -> PreTrainedConfig:
    """Load the configuration of a model and replace some settings, or all if ``model_type`` is among them."""
    if "model_type" in model_args:
        return AutoConfig.for_model(**model_args)
    with _from(model_name) as source:
        config, unknown = AutoConfig.from_pretrained(**source, **model_args, return_unused_kwargs=True)
    if unknown := set(unknown) & set(model_args):
        raise ValueError(f"model_args={sorted(unknown)}: the configuration of {model_name} has no such settings")
    assert isinstance(config, PreTrainedConfig)
    return config


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a complete configuration as plain values, for :func:`load_config`."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("quantization_config", None)  # how weights are held, which the task says itself
    return values


def load_tokenizer(
    model_name: str, config: PreTrainedConfig, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a padding token and the configuration's limit on the length of a text.

    Raises:
        ValueError: The tokenizer does not exist, or has no token to pad with.
    """
    with _from(model_name) as source:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"model_name={model_name!r} has a {type(tokenizer).__name__} instead of a tokenizer")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"model_name={model_name!r} has no tokenizer files, so that all words would be the same to the model: put "
            "tokenizer.json, or what its tokenizer is saved as, beside the weights"
        )
    if tokenizer.pad_token is None:  # most decoders have none
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {model_name} has no token to pad with: give it one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    if (limit := _configured_positions(config)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def token_limits(
    config: PreTrainedConfig, auto_class: Any = AutoModelForSequenceClassification, trust_remote_code: bool = False
) -> tuple[int | None, int | None]:
    """Return how long a text may be, and how many tokens a model knows.

    RoBERTa and similar models count positions from the one after the padding token's, so they have two fewer than
    their configuration says; the tables of Nystromformer, YOSO and MRA have two more. So only the model itself tells.
    A model without such a table may still compute its positions in advance, as GPT-J, CTRL and MPT do, so the number
    in its configuration counts, unless positions are relative.

    Returns:
        The number of positions, ``None`` if positions are relative, and the number of rows of the embedding of tokens,
        ``None`` if there is no such table.
    """
    model = skeleton(config, auto_class, trust_remote_code)
    tokens = model.get_input_embeddings()
    rows = tokens.num_embeddings if isinstance(tokens, nn.Embedding) else None
    for name, table in model.named_modules():
        if name.endswith(_POSITION_TABLES) and isinstance(table, nn.Embedding):
            count = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            return min(count, _configured_positions(config) or count), rows
    relative = getattr(config, "rope_parameters", None) or getattr(config, "relative_attention", False)
    return None if relative else _configured_positions(config), rows


def skeleton(config: PreTrainedConfig, auto_class: Any, trust_remote_code: bool = False, **held: Any) -> Any:
    """Build a model without weights, which shows its modules and takes no memory; the arguments are as below."""
    with torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **held)


def _configured_positions(config: PreTrainedConfig) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT
    return positions if positions is not None and positions > 0 else None  # XLNet answers -1


def load_model(
    model_name: str,
    config: PreTrainedConfig,
    pretrained: bool,
    auto_class: Any = AutoModelForSequenceClassification,
    trust_remote_code: bool = False,
    **held: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Build a model of transformers.

    Args:
        model_name: Where its weights lie.
        config: Its configuration.
        pretrained: Whether to load weights; otherwise they are random.
        auto_class: The class that builds the model; by default that for sequence classification.
        trust_remote_code: Whether code that lies beside the weights is run.
        **held: How the weights are held, as transformers calls it: ``dtype``, by default torch's own, and not that of
            the file, because the trainer sets the precision of a run; ``attn_implementation``, ``quantization_config``.

    Returns:
        The model, in training mode, and the names of the modules that have no pretrained weights.

    Raises:
        ValueError: The weights cannot be loaded.
    """
    held = {"dtype": torch.get_default_dtype(), **held}
    if "quantization_config" in held:
        # Codes that are made on a GPU differ here and there, so that a base would not be recognised elsewhere.
        held["device_map"] = {"": "cpu"}
    new: list[str] = []
    with torch.device("cpu"):  # on another device transformers would need accelerate
        if pretrained:
            with _from(model_name) as source:
                model, report = auto_class.from_pretrained(
                    **source,
                    config=config,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=trust_remote_code,
                    **held,
                )
            weights = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
            new = sorted({name.rpartition(".")[0] for name in weights})
        else:
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code, **held)
    model.train()  # from_pretrained returns it in evaluation mode, which Lightning would not change
    return model, new


def head_names(model: nn.Module, pooler: bool = True) -> list[str]:
    """Return the names of what follows the transformer's blocks: the classifier, and the pooler before it.

    A pooler inside the body has pretrained weights, but they are often useless: that of a sentence encoder was never
    trained, and if it were frozen, it would keep what the body learns from the head.

    Args:
        model: A model with a head.
        pooler: Whether the pooler inside the body is meant, which is not called where every token has an output.
    """
    prefix = str(model.base_model_prefix)
    after = {name: child for name, child in model.named_children() if name != prefix}
    if not hasattr(model, prefix):  # the body has no name of its own, as in T5ForQuestionAnswering
        after = {name: child for name, child in after.items() if isinstance(child, nn.Linear)}
    if pooler and isinstance(inside := getattr(getattr(model, prefix, None), "pooler", None), nn.Module):
        after[f"{prefix}.pooler"] = inside
    return [name for name, child in after.items() if any(True for _ in child.parameters())]


def block_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in the numbered blocks of a transformer, without pooler and head."""
    kinds = {name: adapter_class_of(module) for name, module in model.named_modules() if _IN_BLOCK.fullmatch(name)}
    return [name for name, kind in kinds.items() if kind is not None and kind.is_linear]


@contextmanager
def _from(model_name: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments for ``from_pretrained``, silence its reports, and name the argument in its errors."""
    source, local = find_source(model_name)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield {"pretrained_model_name_or_path": source, "local_files_only": local}
    except Exception as error:  # every format of weights and tokenizers raises its own errors
        broken = "; ".join(broken_files(Path(source))) if local else ""
        raise ValueError(f"model_name={model_name!r} cannot be loaded: {broken or in_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def broken_files(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a model, because the libraries' own errors do not name the file."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            refuse_pointer(path)
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except SafetensorError as error:
            yield f"{path} is cut short or broken ({error}): copy it again"
        except ValueError as error:  # of a pointer
            yield str(error)
