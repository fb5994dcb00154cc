"""What packing conversations saves, and what a packed conversation sees of its neighbour: for ``docs/recipes.md``.

    python benchmarks/speed/chat_packing.py

Conversations of random words, with log-normal lengths of their turns, go through a small Llama with random weights: one
epoch packed, and one padded in batches of similar length, with as many tokens per batch. Times are those of the
processor, so that other work on the machine does not count. Results go to ``benchmarks/results/chat_packing.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is found from where this script lies

import argparse
import json
import random
import tempfile
import time
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.shared import results
from geolora_pl import GeoLoRACallback
from geolora_pl.data import ChatFiles
from geolora_pl.tasks import CausalLM

MARKS = ["<user>", "<assistant>", "<end>"]
WORDS = [f"w{number}" for number in range(2000)]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LIMIT = 512
MODEL = {
    "model_type": "llama",
    "vocab_size": len(WORDS) + len(MARKS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": LIMIT,
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words with a chat template."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, *MARKS])}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_chats(path: Path, count: int) -> None:
    """Conversations of one to four questions; half of the turns have up to 25 words, and one in forty over 180."""
    numbers = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            turns = [
                {
                    "role": role,
                    "content": " ".join(numbers.choices(WORDS, k=1 + int(numbers.lognormvariate(3.2, 1)))),
                }
                for _ in range(numbers.randint(1, 4))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def epoch(folder: Path, packed: bool, rows: int) -> dict[str, Any]:
    """One epoch: the share of padding, and the processor's seconds."""
    torch.manual_seed(0)
    file, cache = str(folder / "chats.jsonl"), str(folder / "cache")
    data = ChatFiles(file, file, max_length=LIMIT, batch_size=rows, packed=packed, num_workers=0, cache_dir=cache)
    module = CausalLM(str(folder), pretrained=False, model_args=MODEL)
    width = 0

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            nonlocal width
            width += batch["input_ids"].numel()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[GeoLoRACallback(), Count()],
        enable_model_summary=False,
        **quiet,
    )
    began = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - began
    lengths = torch.tensor(data.splits["train"]["length"][:])
    shuffled = lengths[torch.randperm(len(lengths))].split(rows)
    found = {"padding": 1 - int(lengths.sum()) / width, "steps": trainer.global_step, "seconds": seconds}
    return found | {
        "padding_in_random_batches": 1 - int(lengths.sum()) / sum(int(batch.max()) * len(batch) for batch in shuffled)
    }


def differences(folder: Path) -> dict[str, float]:
    """How far the logits of a text behind another one are from those of it alone, relative to the largest."""
    torch.manual_seed(0)
    module = CausalLM(str(folder), pretrained=False, model_args={**MODEL, "initializer_range": 0.1})
    module.configure_model()
    module.eval()
    both = torch.randint(len(WORDS), (1, LIMIT))
    half = LIMIT // 2
    with torch.no_grad():
        alone = module({"input_ids": both[:, half:]})
        found = {
            "isolated": module({"input_ids": both, "position_ids": torch.arange(half).repeat(2)[None]})[:, half:],
            "joined": module({"input_ids": both})[:, half:],
        }
    return {name: float((logits - alone).abs().max() / alone.abs().max()) for name, logits in found.items()}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder)
        write_chats(folder / "chats.jsonl", given.conversations)
        epoch(folder, True, 4)  # which makes the cache, and warms up
        found = {
            "conversations": given.conversations,
            "packed": epoch(folder, True, 4),
            "padded": epoch(folder, False, 10),
            "logits": differences(folder),
        }
    results.write("chat_packing", "python benchmarks/speed/chat_packing.py", found)


if __name__ == "__main__":
    main()
