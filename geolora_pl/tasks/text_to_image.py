"""Define the task of adapting Stable Diffusion to images with prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.lightning.internals import datamodule_of
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.tasks.denoising import (
    mean_with_prior,
    noise_like,
    snr_weights,
    spread_timesteps,
    step_generator,
    target,
)
from geolora_pl.tasks.drawing import PictureWriter, as_tensor, base_alone, check_lengths, draw, draw_files, show_drawn
from geolora_pl.tasks.latents import Latents
from geolora_pl.tasks.lora_file import save_lora
from geolora_pl.tasks.pipelines import Parts, configs_from_checkpoint, load_parts, make_pipeline, quiet
from geolora_pl.tasks.similarity import Similarity
from geolora_pl.tasks.text_models import said_by_checkpoint

Batch = Mapping[str, Any]
_OF_UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_OF_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_VAL_TIMESTEPS = 4  # of each held-out image


class TextToImage(GeoLoRAModule):
    r"""Adapt a Stable Diffusion model (1.x, 2.x or XL) to the images of a data module with prompts.

    The loss is the squared error of the predicted noise, or velocity, at a random timestep, in the latent space of the
    VAE. ``val_loss`` is that of held-out images with fixed noise at fixed timesteps and without weights, so that it can
    be compared between runs. After each validation ``prompts`` are drawn with fixed seeds.

    Adapters are in the attention and feed-forward layers of the UNet and, if it is trained, of the text encoder; name
    convolutions in ``target_modules`` (``conv1``, ``proj_in``). The VAE stays as it is. A checkpoint loads without data
    and hub; the tokenizer comes from ``model_name`` when prompts are read.

    Args:
        model_name: A name of the hub, or a folder that ``save_pretrained`` of diffusers wrote.
        pretrained: Whether to load the pretrained weights; otherwise they are random.
        model_args: By part (``unet``, ``vae``, ``text_encoder``, ``scheduler``), settings that replace those of its
            configuration; complete ones without ``pretrained``, as in a checkpoint.
        size: The side of the images in pixels, which the VAE must be able to halve; by default that of the model.
        train_text_encoder: Whether the text encoders are adapted, too.
        min_snr_gamma: Gamma of the min-SNR weights, above 0; ``None`` for no weights.
        prior_weight: The weight of the class images in the loss, at least 0.
        caption_dropout: The probability that an image is trained without its prompt, in [0, 1], for guidance.
        gradient_checkpointing: Whether the UNet computes its activations again in the backward pass, to save memory.
        cache_latents: Whether the latents of images that never change are kept in main memory.
        prompts: What is drawn after each validation.
        seed: The seed of the first drawn image, at least 0; the next has the next.
        inference_steps: Steps of the sampler, at least 1.
        guidance_scale: How much more a prompt counts than no prompt, at least 1, which means no guidance.
        similarity_model: A model of timm, by which drawn images are compared with those of the subject
            (``vit_small_patch14_dinov2.lvd142m``, or ``local-dir:folder``); ``None`` for no comparison.
        adapter: What to adapt.
        **kwargs: Arguments of :class:`GeoLoRAModule`.

    Raises:
        ValueError: An argument is out of range, the pipeline is not there or of another kind, or a prompt is longer
            than the text encoder takes.

    Example:
        >>> blocks = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
        >>> unet = {**blocks, "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
        >>> tiny = {"unet": {**unet, "cross_attention_dim": 8, "attention_head_dim": 2, "sample_size": 8}}
        >>> tiny |= {"vae": blocks, "scheduler": {}}
        >>> tiny |= {"text_encoder": {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}}
        >>> task = TextToImage("tiny", pretrained=False, model_args=tiny)
        >>> task.configure_model()
        >>> task(torch.zeros(2, 4, 8, 8), torch.tensor([1, 9]), {"encoder_hidden_states": torch.zeros(2, 5, 8)}).shape
        torch.Size([2, 4, 8, 8])
    """

    parts: Parts  # these two from build_model on
    image_size: int
    base_arguments = MappingProxyType({"pretrained": False})
    locating_arguments = ("model_name", "similarity_model")
    prediction_writer = PictureWriter

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        model_args: dict[str, dict[str, Any]] | None = None,
        size: int | None = None,
        train_text_encoder: bool = False,
        min_snr_gamma: float | None = None,
        prior_weight: float = 1.0,
        caption_dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        cache_latents: bool = True,
        prompts: list[str] | None = None,
        seed: int = 0,
        inference_steps: int = 25,
        guidance_scale: float = 7.5,
        similarity_model: str | None = None,
        adapter: AdapterConfig = AdapterConfig(target_modules="auto"),
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter=adapter, **kwargs)
        for name, value, least in (
            ("size", size, 1),
            ("prior_weight", prior_weight, 0),
            ("seed", seed, 0),
            ("inference_steps", inference_steps, 1),
            ("guidance_scale", guidance_scale, 1),
        ):
            if value is not None and not value >= least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma={min_snr_gamma} must be above 0, or null for no weights")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout={caption_dropout} must lie in [0, 1]: it is a probability")
        self.model_name = model_name
        self.pretrained = pretrained
        self.model_args = model_args or {}
        self.size = size
        self.train_text_encoder = train_text_encoder
        self.min_snr_gamma = min_snr_gamma
        self.prior_weight = prior_weight
        self.caption_dropout = caption_dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.prompts = prompts or []
        self.seed = seed
        self.inference_steps = inference_steps
        self.guidance_scale = guidance_scale
        self.similarity_model = similarity_model
        self._latents = Latents(cache_latents)

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """Accept complete configurations; a name of the hub is kept but never used, and no further model is loaded.

        Raises:
            ValueError: The checkpoint says more, or a configuration is incomplete.
        """
        if name == "model_args":
            return configs_from_checkpoint(value)
        if name == "model_name":
            return said_by_checkpoint(value)
        if name == "similarity_model":
            return None
        return super().argument_from_checkpoint(name, value)

    def build_model(self) -> nn.Module:
        """Load the parts; those that may be adapted are the model, and the others lie beside it.

        Raises:
            ValueError: The pipeline is not there or cannot be adapted, the size does not suit it, or the strategy
                shards the model.
        """
        if self.device_mesh is not None:
            raise ValueError(
                "strategy=ModelParallelStrategy shards a model that TextToImage calls part by part: take ddp"
            )
        self.parts = parts = load_parts(self.model_name, self.model_args, self.pretrained)
        # From now on the checkpoints hold the weights, and must load without the folder and without the hub.
        self.hparams["pretrained"], self.hparams["model_args"] = False, parts.configs
        halvings = len(parts.vae.config.block_out_channels) - 1
        if self.size is None and not isinstance(parts.unet.config.sample_size, int):
            raise ValueError("size=None: the model does not say how large its images are, so give the size")
        self.image_size = self.size or parts.unet.config.sample_size * 2**halvings
        if self.image_size % 2**halvings:
            raise ValueError(
                f"size={self.image_size} cannot be halved {halvings} times, as the VAE does: take a multiple of "
                f"{2**halvings}"
            )
        if self.gradient_checkpointing:
            parts.unet.enable_gradient_checkpointing()
        adapted = {"unet": parts.unet, **(parts.encoders if self.train_text_encoder else {})}
        frozen = {"vae": parts.vae, **({} if self.train_text_encoder else parts.encoders)}
        # Both in training mode, of which Lightning asks; what is frozen has no dropout.
        self.frozen = nn.ModuleDict(frozen).requires_grad_(False).train()
        return nn.ModuleDict(adapted).train()

    def default_targets(self) -> Sequence[str]:
        """Return the attention and feed-forward layers of the UNet and of the adapted text encoders.

        The last block of the first encoder of SDXL is left out, because its output is not used.
        """
        endings = {"unet": _OF_UNET}
        names = [
            name
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(endings.get(name.partition(".")[0], _OF_ENCODER))
        ]
        if "text_encoder_2" not in self.model:  # type: ignore[operator]  # a ModuleDict
            return names
        unused = f".layers.{self.parts.encoders['text_encoder'].config.num_hidden_layers - 1}."
        return [name for name in names if not (name.startswith("text_encoder.") and unused in name)]

    @cached_property
    def pipeline(self) -> Any:
        """The parts with their tokenizers as a pipeline of diffusers, for drawing."""
        return make_pipeline(self.model_name, self.parts)

    def setup(self, stage: str) -> None:
        """Forget the latents of earlier data, and load the model that compares images."""
        self._latents.clear()
        if self.similarity_model is not None and stage != "predict" and not hasattr(self, "similarity"):
            # In a list, so that its weights are not in the checkpoints.
            self.similarity = [Similarity(self.similarity_model)]

    def on_fit_start(self) -> None:
        """Refuse prompts that are too long, and draw the class images that are missing."""
        data = datamodule_of(self)
        check_lengths(self.pipeline.tokenizer, [*self.prompts, *getattr(data, "prompts", [])])
        # The list of the first process for all: one that looks late would find what others have drawn meanwhile.
        missing: dict[int, Path] = self.trainer.strategy.broadcast(getattr(data, "missing_class_images", dict)())
        if missing:
            with base_alone(self.model):
                mine = list(missing)[self.global_rank :: self.trainer.world_size]
                draw_files(self.draw, {number: missing[number] for number in mine}, data.class_prompt)
        self.trainer.strategy.barrier("class images")

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Draw an image for each prompt, with its own seed."""
        settings = (self.image_size, self.inference_steps, self.guidance_scale)
        if self._trainer is None:
            return draw(self.pipeline, prompts, seeds, *settings)
        with self.trainer.precision_plugin.forward_context():
            return draw(self.pipeline, prompts, seeds, *settings)

    def encode(self, prompts: Sequence[str], geometry: Tensor) -> dict[str, Any]:
        """What the UNet is told beside latents and timesteps.

        Args:
            prompts: One per image.
            geometry: (batch, 6), the sizes and the crop of the images, which SDXL is told.

        Returns:
            Arguments of the UNet.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
            encoded = self.pipeline.encode_prompt(
                list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if len(self.parts.encoders) == 1:
            return {"encoder_hidden_states": encoded[0]}
        states, _, pooled, _ = encoded
        return {
            "encoder_hidden_states": states,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": geometry.to(pooled)},
        }

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """Return the prediction of the UNet (batch, channels, height, width), of the same shape as the latents."""
        prediction: Tensor = self.parts.unet(latents, timesteps, **condition).sample
        return prediction

    def losses(self, latents: Tensor, noise: Tensor, timesteps: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """Return the squared error of each image (batch,), in float32."""
        scheduler = self.parts.scheduler
        noisy = scheduler.add_noise(latents, noise, timesteps)
        error: Tensor = self(noisy, timesteps, condition).float() - target(scheduler, latents, noise, timesteps).float()
        return error.square().flatten(1).mean(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the images, and with its weight that of the class images."""
        mean, deviation = self._latents.moments(self.parts.vae, batch["images"], "train", batch["indices"])
        numbers = step_generator(self.global_rank, self.current_epoch, batch_idx)
        latents = mean + deviation * noise_like(mean, numbers)
        noise = noise_like(mean, numbers)
        steps = self.parts.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(mean),), generator=numbers).to(mean.device)
        kept = torch.rand(len(mean), generator=numbers) >= self.caption_dropout
        prompts = [prompt if keep else "" for prompt, keep in zip(batch["prompts"], kept.tolist(), strict=True)]
        losses = self.losses(latents, noise, timesteps, self.encode(prompts, batch["geometry"]))
        if self.min_snr_gamma is not None:
            losses = losses * snr_weights(self.parts.scheduler, timesteps, self.min_snr_gamma)
        loss = mean_with_prior(losses, batch["is_prior"], self.prior_weight)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(mean))
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log the loss of held-out images at fixed timesteps with fixed noise."""
        mean, _ = self._latents.moments(self.parts.vae, batch["images"], "val", batch["indices"])
        condition = self.encode(batch["prompts"], batch["geometry"])
        noise = torch.cat([noise_like(mean[:1], torch.Generator().manual_seed(index)) for index in batch["indices"]])
        losses = [
            self.losses(mean, noise, torch.full((len(mean),), timestep, device=mean.device), condition)
            for timestep in spread_timesteps(self.parts.scheduler, _VAL_TIMESTEPS)
        ]
        self.log("val_loss", torch.stack(losses).mean(), prog_bar=True, batch_size=len(mean), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Draw the prompts, show them, and compare them with the images of the subject."""
        if not self.prompts or self.trainer.sanity_checking:
            return
        pictures = self.draw(self.prompts, range(self.seed, self.seed + len(self.prompts)))
        show_drawn(self.trainer, pictures, self.prompts)
        subject: list[Image.Image] = getattr(datamodule_of(self), "subject", list)()
        if subject and self.similarity_model is not None:
            similarity = self.similarity[0].to(self.device)(pictures, subject)
            self.log("val_similarity", similarity, prog_bar=True, sync_dist=True)

    def on_predict_start(self) -> None:
        """Refuse prompts that are too long."""
        check_lengths(self.pipeline.tokenizer, getattr(datamodule_of(self), "prompts", []))

    def predict_step(self, batch: Batch) -> Tensor:
        """Return the drawn images (batch, 3, height, width), of uint8; the seed of an image follows from its number."""
        return as_tensor(self.draw(batch["prompts"], [self.seed + index for index in batch["indices"]]))

    def save_model(self, folder: Path) -> None:
        """Write the pipeline for ``from_pretrained`` of diffusers."""
        with quiet():
            self.pipeline.save_pretrained(folder)

    def save_lora(self, folder: Path, compact: bool = False) -> int:
        """Write the adapters for ``load_lora_weights`` of diffusers, and return the largest rank."""
        return save_lora(self.parts.kind.pipeline, dict(self.model.named_children()), folder, compact)
