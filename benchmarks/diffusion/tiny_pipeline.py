"""A tiny Stable Diffusion pipeline with random weights, as a folder that save_pretrained wrote, and images for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

WORDS = ["a", "photo", "of", "sks", "dog", "red", "green", "square", "disc", "on", "white"]
LENGTH = 16  # tokens that the text encoder takes
SCHEDULE = {  # that of Stable Diffusion
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}
SIZE = 16  # pixels of an image, 8 of its latents


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single characters and a few whole words."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(parts[:2]))
            parts = ["".join(parts[:2]), *parts[2:]]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)


def save_tiny_pipeline(
    folder: Path, prediction_type: str = "epsilon", xl: bool = False, vae_channels: int = 8, **unet: Any
) -> str:
    """A pipeline of Stable Diffusion, or of its XL, with random weights."""
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    names = ["tokenizer", *(["tokenizer_2"] if xl else [])]
    for name in names:
        write_tokenizer(folder / name)
    tokenizers = {name: CLIPTokenizer.from_pretrained(folder / name) for name in names}
    tokenizer = tokenizers["tokenizer"]
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = {"norm_num_groups": 4, "layers_per_block": 1}
    of_xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "cross_attention_dim": 32,
    }
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 24),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "use_linear_projection": xl,
        **blocks,
        **(of_xl if xl else {}),
        **unet,
    }
    parts = {
        "unet": UNet2DConditionModel(**settings),
        "vae": AutoencoderKL(
            block_out_channels=(vae_channels, vae_channels),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **blocks,
        ),
        "text_encoder": CLIPTextModel(config),
        "scheduler": DDPMScheduler(**SCHEDULE, prediction_type=prediction_type),
    }
    if xl:
        pipeline = StableDiffusionXLPipeline(
            **parts, **tokenizers, text_encoder_2=CLIPTextModelWithProjection(config), add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, **tokenizers, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return str(folder)


def draw_subject(folder: Path, count: int = 4, colour: str = "red", size: tuple[int, int] = (24, 20)) -> str:
    """A few images of one thing at several places."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((3 + number, 4, 12 + number, 14), fill=colour)
        image.save(folder / f"{number}.png")
    return str(folder)
