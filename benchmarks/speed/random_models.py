"""Models with random weights to measure what a step costs: BERTs of any size, GPT-2s and ViTs, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedConfig

from benchmarks.shared.image_tasks import WithLoss
from benchmarks.shared.task import Batch, Samples, Task
from geolora_pl import AdapterConfig, inject_adapters
from geolora_pl.tasks.text_models import block_linears, head_names

BERTS = {
    "bert_tiny": (128, 2, 2),
    "minilm": (384, 6, 12),
    "bert_768x6": (768, 6, 12),
    "bert_base": (768, 12, 12),
}  # width, depth, heads
GPT2S = {"gpt2_mini": (384, 6, 12), "gpt2": (768, 12, 12)}  # width, depth, heads
VITS: dict[str, dict[str, int]] = {  # what is not as in timm's model of that size, for images of 224 pixels
    "vit_tiny": {},
    "vit_small": {},
    "vit_base": {},
    "vit_384x6": {"embed_dim": 384, "depth": 6, "num_heads": 6, "img_size": 96},  # 37 tokens per image
}
VOCABULARY = 30522
CLASSES = 8
BATCHES = 8  # the data, which is trained on again and again
STEPS = 10_000  # length of the run whose middle is measured; the cadence and AdaLoRA's phases depend on it


@dataclass(frozen=True)
class Setup:
    """What is measured, and how.

    Attributes:
        name: Name of the model, from ``BERTS``, ``GPT2S`` or ``VITS``; with ``sizes`` it may be any.
        rank: Columns allocated for each adapter.
        batch_size: Texts or images per step.
        length: Tokens per text, which images do not use.
        device: ``cpu`` or ``cuda``.
        precision: ``32`` or ``bf16-mixed``.
        threads: Threads of the CPU.
        sizes: Width, depth and heads of a BERT that is not in ``BERTS``.
    """

    name: str
    rank: int = 8
    batch_size: int = 32
    length: int = 64
    device: str = "cpu"
    precision: str = "32"
    threads: int = 1
    sizes: tuple[int, int, int] | None = None

    @property
    def of_images(self) -> bool:
        return self.name in VITS

    @property
    def unit(self) -> str:
        """What the throughput counts, ``images`` or ``tokens``."""
        return "images" if self.of_images else "tokens"

    @property
    def amount(self) -> int:
        """Images or tokens per step."""
        return self.batch_size * (1 if self.of_images else self.length)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16-mixed")


def load(setup: Setup, steps: int = STEPS) -> Task:
    """A model without dropout and with PyTorch's own attention, and a few batches that it can learn.

    Args:
        setup: The model and the size of a batch.
        steps: Length of the run.
    """
    if setup.of_images:
        return _vit(setup, steps)
    return _texts(setup, steps, _gpt2(setup) if setup.name in GPT2S else _bert(setup))


def _bert(setup: Setup) -> PreTrainedConfig:
    width, depth, heads = setup.sizes or BERTS[setup.name]
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(512, setup.length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )


def _gpt2(setup: Setup) -> PreTrainedConfig:
    width, depth, heads = GPT2S[setup.name]
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_positions=max(512, setup.length),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=VOCABULARY - 1,
        num_labels=CLASSES,
    )


def _texts(setup: Setup, steps: int, config: PreTrainedConfig) -> Task:
    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")  # type: ignore[no-any-return]

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(BATCHES * setup.batch_size) % CLASSES
    words = torch.randint(VOCABULARY, (len(labels), setup.length), generator=generator)
    words[:, ::8] = words[:, ::8] // CLASSES * CLASSES + labels[:, None]  # every eighth word reveals the class
    words = words.clamp_max(VOCABULARY - 1)
    model = make_model(0)
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    return _task(setup, steps, make_model, inputs, block_linears(model), head_names(model))


def _vit(setup: Setup, steps: int) -> Task:
    sizes = VITS[setup.name]
    pixels = sizes.get("img_size", 224)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = "vit_small" if sizes else setup.name
        return WithLoss(timm.create_model(f"{size}_patch16_224", num_classes=CLASSES, **sizes))

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(BATCHES * setup.batch_size) % CLASSES
    images = torch.randn(len(labels), 3, pixels, pixels, generator=generator)
    images += torch.randn(CLASSES, 3, 1, 1, generator=generator)[labels]  # the colour reveals the class
    heads = ["model.head"]
    targets = list(inject_adapters(make_model(0), AdapterConfig(modules_to_save=heads)))
    return _task(setup, steps, make_model, {"images": images, "labels": labels}, targets, heads)


def _task(
    setup: Setup,
    steps: int,
    make_model: object,
    inputs: dict[str, Tensor],
    targets: Sequence[str],
    heads: Sequence[str],
) -> Task:
    def batch(index: Sequence[int]) -> Batch:
        return {name: values[list(index)] for name, values in inputs.items()}

    samples = Samples(len(inputs["labels"]), batch)
    size = setup.batch_size
    return Task(setup.name, make_model, samples, samples, CLASSES, ["accuracy"], targets, heads, size, steps, 1e-3)
