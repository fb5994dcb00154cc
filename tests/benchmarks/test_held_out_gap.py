"""The variants that explain the gap to full fine-tuning train what their names say, on a tiny ViT."""

from dataclasses import replace

import pytest
import timm
import torch
from tiny_vit import SIZE

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.peers.held_out_gap import VARIANTS, rows
from benchmarks.shared import harness
from benchmarks.shared.image_tasks import WithLoss
from benchmarks.shared.task import Samples, Task

KINDS = {
    "embeddings": ("cls_token", "pos_embed", "patch_embed.proj.weight"),
    "norms": ("norm.weight", "norm1.weight", "norm2.weight"),
    "linear weights": ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"),
    "head": ("head",),
    "biases": ("bias",),
}  # what a parameter is called that belongs to each of them; the first that fits counts


def task() -> Task:
    x = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = Samples(32, lambda index: {"images": x[list(index)], "labels": torch.tensor(index) % 3})
    targets = [f"model.blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]

    def make_model(seed: int) -> WithLoss:
        torch.manual_seed(seed)
        return WithLoss(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZE))

    return Task("tiny", make_model, samples, samples, 3, ["accuracy"], targets, ["model.head"], 16, 2, 1e-2)


def train(name: str) -> tuple[set[str], int]:
    """Kinds of the parameters of the plain model that two steps of a variant change, and what it counts at the end."""
    models = []
    made = replace(task(), make_model=lambda seed: models.append(task().make_model(seed)) or models[-1])
    method, rates = VARIANTS[name]
    counted = harness.run(made, method, rates[-1], 0)["parameters"]
    after = {key.replace(".base.", "."): value for key, value in models[0].named_parameters()}
    changed = {
        next(kind for kind, parts in KINDS.items() if any(part in key for part in parts))
        for key, value in task().make_model(0).named_parameters()
        if key in after and not torch.equal(value, after[key])
    }
    return changed, counted


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("full fine-tuning", {*KINDS}),
        ("without embeddings", {*KINDS} - {"embeddings"}),
        ("without norms", {*KINDS} - {"norms"}),
        ("without biases", {*KINDS} - {"biases"}),
        ("linear weights of the blocks alone", {"linear weights", "head"}),
        ("geolora_pl", {"head"}),
        ("with biases", {"biases", "head"}),
        ("with norms", {"norms", "biases", "head"}),
        ("with the patch embedding", {"embeddings", "biases", "head"}),
        ("with norms, biases and the patch embedding", {"embeddings", "norms", "biases", "head"}),
        ("LoRA r 32", {"head"}),
    ],
)
def test_a_variant_trains_what_its_name_says(name, kinds):
    assert train(name)[0] == kinds


def test_what_is_trained_beside_the_adapters_is_counted():
    model = task().make_model(0)
    norms = sum(p.numel() for key, p in model.named_parameters() if "norm" in key)
    biases = sum(p.numel() for key, p in model.named_parameters() if "bias" in key and "head" not in key)
    plain = train("geolora_pl")[1]
    assert train("with norms")[1] == plain + norms
    assert train("with biases")[1] == plain + biases


def test_a_variant_is_one_row():
    record = {"task": "held_out", "method": "with norms", "lr": 0.3, "seed": 0, "score": 0.7, "parameters": 1234}
    record |= {"scores": [], "sizes": []}
    records = [record, {**record, "seed": 1, "score": 0.8}]
    assert rows(records) == [["with norms", "0.750 ± 0.071", "0.3", "1,234"]]
