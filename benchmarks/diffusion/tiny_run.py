"""A whole DreamBooth run on 16 x 16 pixels, with a pipeline that knows squares and discs: for ``docs/diffusion.md``.

    python benchmarks/diffusion/tiny_run.py

A VAE, a UNet and a text encoder with .6 million parameters in all learn squares and discs in two colours from scratch.
Then `TextToImage` adapts them to one subject, a square of two colours that they have never seen, with class images that
the base draws. It takes some minutes on two cores and writes ``docs/figures/diffusion.png`` and
``results/tiny_diffusion.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from benchmarks.diffusion.tiny_pipeline import SIZE, save_tiny_pipeline
from benchmarks.shared import results
from benchmarks.shared.paths import FIGURES
from geolora_pl import GeoLoRACallback
from geolora_pl.data import DreamBooth
from geolora_pl.tasks import TextToImage

COLOURS = {"red": "#d62728", "green": "#2ca02c"}
SUBJECT, CLASS = "a photo of sks square", "a photo of a square"
PROMPTS = [SUBJECT, CLASS, "a photo of green disc"]
ENLARGED = 4  # times


def shape(kind: str, colour: str, second: str | None = None) -> Image.Image:
    """A shape at a random place, its right half in a second colour if there is one."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    drawing = ImageDraw.Draw(image)
    side = random.randint(7, 9)
    left, top = (random.randint(1, SIZE - side - 2) for _ in range(2))
    corners = (left, top, left + side, top + side)
    (drawing.rectangle if kind == "square" else drawing.ellipse)(corners, fill=COLOURS[colour])
    if second is not None:
        drawing.rectangle((left + side // 2 + 1, top, left + side, top + side), fill=COLOURS[second])
    return image


def sample(count: int) -> tuple[Tensor, list[str]]:
    """Images (count, 3, size, size) in [-1, 1] of known shapes, and their prompts."""
    rows = [(random.choice(["square", "disc"]), random.choice(list(COLOURS))) for _ in range(count)]
    pixels = np.stack([np.asarray(shape(*row)) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [f"a photo of {random.choice(['a', colour])} {kind}" for kind, colour in rows]


def pretrain(folder: Path, vae_steps: int, unet_steps: int) -> None:
    """Train a tiny pipeline from scratch on the known shapes, and write it."""
    save_tiny_pipeline(folder, vae_channels=16, block_out_channels=(32, 48))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    vae, unet, encoder = pipeline.vae.train(), pipeline.unet.train(), pipeline.text_encoder.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(vae_steps):
        images, _ = sample(32)
        latents = vae.encode(images).latent_dist
        loss = F.mse_loss(vae.decode(latents.sample()).sample, images) + 1e-4 * latents.kl().mean() / SIZE**2
        step(optimizer, loss)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / float(vae.encode(sample(256)[0]).latent_dist.mean.std()))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW([*unet.parameters(), *encoder.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, unet_steps)
    for _ in range(unet_steps):
        images, prompts = sample(32)
        prompts = [prompt if random.random() > 0.1 else "" for prompt in prompts]
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        states = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        step(
            optimizer, F.mse_loss(unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample, noise)
        )
        schedule.step()
    pipeline.save_pretrained(folder)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images, enlarged, with white between them."""
    side, gap = SIZE * ENLARGED, 6
    whole = Image.new("RGB", (max(map(len, rows)) * (side + gap) + gap, len(rows) * (side + gap) + gap), "#cccccc")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            place = (gap + x * (side + gap), gap + y * (side + gap))
            whole.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return whole


def run(folder: Path, vae_steps: int, unet_steps: int, epochs: int) -> tuple[Image.Image, dict[str, Any]]:
    """Train the base, adapt it, and draw."""
    L.seed_everything(0, verbose=False)
    pretrain(folder / "base", vae_steps, unet_steps)
    (folder / "subject").mkdir()
    subject = [shape("square", "red", "green") for _ in range(6)]
    for number, image in enumerate(subject):
        image.save(folder / "subject" / f"{number}.png")
    module = TextToImage(str(folder / "base"), size=SIZE, train_text_encoder=True, guidance_scale=3.0)
    data = DreamBooth(
        str(folder / "subject"), SUBJECT, str(folder / "class"), CLASS, num_class_images=60, batch_size=6, num_workers=0
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=GeoLoRACallback(), **quiet)
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    seeds = range(6)
    drawn = [module.draw([prompt] * 6, seeds) for prompt in PROMPTS]
    trainer.fit(module, data)
    after = float(trainer.callback_metrics["val_loss"])
    adapted = [module.draw([prompt] * 6, seeds) for prompt in PROMPTS]
    rows = [subject, *(row for pair in zip(drawn, adapted, strict=True) for row in pair)]
    parameters = {
        "base": sum(p.numel() for name, p in module.named_parameters() if name.rpartition(".")[2] not in set("USVKL")),
        "adapters": int(trainer.callback_metrics["geolora/adapter_params"]),
    }
    said = {"val_loss_before": before, "val_loss_after": after, "steps": trainer.global_step, "parameters": parameters}
    return grid(rows), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae_steps", type=int, default=400)
    parser.add_argument("--unet_steps", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=FIGURES / "diffusion.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture, said = run(Path(folder), options.vae_steps, options.unet_steps, options.epochs)
    picture.save(options.output, optimize=True)
    results.write("tiny_diffusion", "python benchmarks/diffusion/tiny_run.py", said)
    print(said)


if __name__ == "__main__":
    main()
