"""Find, load and build the parts of a Stable Diffusion pipeline, and put them together for drawing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as of_transformers

from geolora_pl.errors import in_one_line
from geolora_pl.lightning.hyperparameters import check_sizes
from geolora_pl.tasks.text_models import broken_files, config_from_checkpoint, find_source, plain_config

_DIFFUSERS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_PREDICTED = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline.

    Attributes:
        pipeline: Its class.
        encoders: The classes of its text encoders, by the names that diffusers gives them.
        without: What its class is given in the place of parts that are not used here.
    """

    pipeline: type[Any]
    encoders: Mapping[str, type[Any]]
    without: Mapping[str, Any]

    @property
    def parts(self) -> set[str]:
        """The names of everything that has a configuration."""
        return {*_DIFFUSERS, *self.encoders, "scheduler"}


KINDS = MappingProxyType(
    {
        "StableDiffusionPipeline": Kind(
            StableDiffusionPipeline,
            {"text_encoder": CLIPTextModel},
            {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        ),
        "StableDiffusionXLPipeline": Kind(
            StableDiffusionXLPipeline,
            {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
            {"add_watermarker": False},
        ),
    }
)


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline.

    Attributes:
        kind: What they make together.
        unet: It predicts the noise.
        vae: It makes latents of images, and images of latents.
        encoders: The text encoders by name.
        scheduler: It knows how much noise there is at each timestep.
    """

    kind: Kind
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: Mapping[str, PreTrainedModel]
    scheduler: DDPMScheduler

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of every part, as plain values; of the scheduler what its model says.

        What a model leaves open of its scheduler is a default of each class of schedulers, not a choice for all.
        """
        of_diffusers = {"unet": self.unet, "vae": self.vae, "scheduler": self.scheduler}
        configs = {name: _plain(part.config) for name, part in of_diffusers.items()}
        for name in self.scheduler.config.get("_use_default_values", []):
            configs["scheduler"].pop(name, None)
        return configs | {name: plain_config(encoder.config) for name, encoder in self.encoders.items()}


def load_parts(model_name: str, model_args: Mapping[str, Mapping[str, Any]], pretrained: bool) -> Parts:
    """Load the parts of a pipeline, or build them with random weights.

    Args:
        model_name: A name of the hub, or a folder in the layout of diffusers.
        model_args: By part, the settings that replace those of its configuration; without ``pretrained`` the complete
            configurations.
        pretrained: Whether weights are loaded.

    Raises:
        ValueError: The pipeline is not there, is of another kind, or is incomplete.
    """
    if pretrained:
        parts = _load(model_name, model_args)
    else:
        kind = next((kind for kind in KINDS.values() if kind.parts == model_args.keys()), None)
        if kind is None:
            known = " or ".join(str(sorted(kind.parts)) for kind in KINDS.values())
            raise ValueError(
                f"pretrained=False: model_args has configurations of {sorted(model_args)} and needs those of {known}"
            )
        parts = _build(kind, model_args)
    _refuse_other_inputs(parts, model_name)
    return parts


def kind_of(model_name: str) -> Kind:
    """The kind of pipeline that lies in a folder or on the hub.

    Raises:
        ValueError: There is none, or it is of a kind that is not known here.
    """
    source, local = find_source(model_name)
    if local and not Path(source, "model_index.json").is_file():
        raise ValueError(
            f"model_name={model_name!r} is no pipeline: the folder has no model_index.json, which save_pretrained of "
            "diffusers writes"
        )
    with _from(model_name):
        name = DiffusionPipeline.load_config(source, local_files_only=local).get("_class_name")
    if name not in KINDS:
        raise ValueError(f"model_name={model_name!r} is a {name}, and only {' and '.join(KINDS)} can be adapted")
    return KINDS[name]


def _load(model_name: str, model_args: Mapping[str, Mapping[str, Any]]) -> Parts:
    kind = kind_of(model_name)
    if unknown := sorted(model_args.keys() - kind.parts):
        raise ValueError(f"model_args={unknown}: the parts of this pipeline are {', '.join(sorted(kind.parts))}")
    source, local = find_source(model_name)
    dtype = torch.get_default_dtype()  # not that of the file, because the trainer sets the precision of a run
    absent: list[str] = []

    def load(name: str, part: Any, **settings: Any) -> Any:
        model, report = part.from_pretrained(
            source,
            subfolder=name,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
            **{key: value for key, value in model_args.get(name, {}).items() if key != "model_type"},
        )
        absent.extend(f"{name}.{key}" for key in report["missing_keys"])
        return model

    with _from(model_name):
        noise = DDPMScheduler.load_config(source, subfolder="scheduler", local_files_only=local)
    if "beta_start" not in noise and not noise.get("trained_betas"):
        raise ValueError(
            f"model_name={model_name!r} has the schedule of a {noise.get('_class_name')}, without betas: only models "
            "that were trained on those of DDPM can be adapted"
        )
    with _from(model_name), torch.device("cpu"):
        settings = {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # True would need accelerate
        unet, vae = (load(name, part, **settings) for name, part in _DIFFUSERS.items())
        parts = Parts(
            kind,
            unet,
            vae,
            {name: load(name, encoder, dtype=dtype) for name, encoder in kind.encoders.items()},
            DDPMScheduler.from_pretrained(
                source, subfolder="scheduler", local_files_only=local, **model_args.get("scheduler", {})
            ),
        )
    if absent:
        raise ValueError(f"model_name={model_name!r} has no weights for {absent[0]} ({len(absent)} in all)")
    return parts


def _build(kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> Parts:
    def encoder(name: str) -> Any:
        config = {key: value for key, value in configs[name].items() if key != "model_type"}
        return kind.encoders[name](CLIPTextConfig(**config))

    with quiet():
        unet, vae = (part.from_config(dict(configs[name])) for name, part in _DIFFUSERS.items())
        scheduler = DDPMScheduler.from_config(dict(configs["scheduler"]))
    return Parts(kind, unet, vae, {name: encoder(name) for name in kind.encoders}, scheduler)


def _refuse_other_inputs(parts: Parts, model_name: str) -> None:
    """Refuse a UNet that is given more than noisy latents, a timestep and a text, or that predicts something else."""
    unet, latents = parts.unet.config, parts.vae.config.latent_channels
    if unet.in_channels != latents:
        raise ValueError(
            f"model_name={model_name!r}: the UNet takes {unet.in_channels} channels and the VAE makes {latents}: a "
            "model for inpainting, depth or upscaling cannot be adapted"
        )
    if parts.vae.config.latents_mean is not None or parts.vae.config.shift_factor is not None:
        raise ValueError(f"model_name={model_name!r}: the VAE shifts its latents, which this task does not")
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        raise ValueError(f"model_name={model_name!r}: the UNet needs class labels, which this task does not give it")
    if (predicted := parts.scheduler.config.prediction_type) not in _PREDICTED:
        raise ValueError(
            f"model_name={model_name!r}: it predicts {predicted!r}, and only {' and '.join(_PREDICTED)} are known"
        )


def make_pipeline(model_name: str, parts: Parts) -> Any:
    """Put the parts together with their tokenizers, which come from where the model lies, for drawing.

    The sampler is DPM-Solver++, which takes the noise schedule of the model.

    Raises:
        ValueError: A tokenizer is not there.
    """
    source, local = find_source(model_name)
    names = [encoder.replace("text_encoder", "tokenizer") for encoder in parts.kind.encoders]
    with _from(model_name):
        tokenizers = {
            name: CLIPTokenizer.from_pretrained(source, subfolder=name, local_files_only=local) for name in names
        }
    with quiet():
        pipeline = parts.kind.pipeline(
            unet=parts.unet,
            vae=parts.vae,
            scheduler=DPMSolverMultistepScheduler.from_config(parts.scheduler.config),
            **parts.encoders,
            **tokenizers,
            **parts.kind.without,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def configs_from_checkpoint(model_args: object) -> dict[str, dict[str, Any]]:
    """Of the configurations in a checkpoint the sizes that the parts themselves know; the rest is dropped.

    Raises:
        ValueError: They are not those of a pipeline that is known here, or a size names code or a place.
    """
    if not isinstance(model_args, Mapping) or not any(kind.parts == set(model_args) for kind in KINDS.values()):
        raise ValueError("is not the configuration of every part of a pipeline, so that it would be fetched")
    found = {}
    for name, config in model_args.items():
        if not isinstance(config, Mapping):
            raise ValueError(f"has {name}={config!r}, which is no configuration")
        if name.startswith("text_encoder"):
            found[name] = config_from_checkpoint(config)
            continue
        known = inspect.signature(_DIFFUSERS.get(name, DDPMScheduler).__init__).parameters.keys() - {"self"}
        found[name] = {key: value for key, value in config.items() if key in known}
        check_sizes(found[name])
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers without its private notes, as plain values."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public))  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars, and what diffusers says of settings that one part of it has and another does not."""
    levels = [(library, library.get_verbosity()) for library in (logging, of_transformers)]
    bars = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        if bars:
            of_transformers.enable_progress_bar()


@contextmanager
def _from(model_name: str) -> Iterator[None]:
    """Name the argument in the errors of the libraries."""
    source, local = find_source(model_name)
    try:
        with quiet():
            yield
    except Exception as error:  # every format of weights and tokenizers raises its own errors
        broken = "; ".join(broken_files(Path(source))) if local else ""
        said = broken or in_one_line(error)[:300]
        raise ValueError(f"model_name={model_name!r} cannot be loaded: {said}") from error
