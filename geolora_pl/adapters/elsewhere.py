"""What other libraries call their settings, and what they are called here: for errors, and for the README's table."""

from __future__ import annotations

from typing import NamedTuple


class Ours(NamedTuple):
    """The setting of this package that does what one of another library does.

    Args:
        name: Its name.
        how: How the name goes on in a sentence: what becomes of the value.
        group: Where the command line has it, unless that is among the settings of the adapter.
    """

    name: str
    how: str = ""
    group: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.how}"


_RANK = Ours("init_rank", ", which ranks start from, and max_rank, which they may grow to")
_LR = Ours("lr", " of the optimizer, as in RiemannianAdam(model, lr=0.3)", "optimizer.init_args")

# By the name in PEFT, for which LoRA and AdaLoRA are the same library.
PEFT = {
    "r": _RANK,
    "lora_alpha": Ours("alpha", ", which is lora_alpha / r"),
    "use_rslora": Ours("alpha", ", which is lora_alpha / sqrt(r) then"),
    "lora_dropout": Ours("dropout"),
    "bias": Ours("train_bias", ', which is true for "lora_only", and "all" for "all"'),
    "alpha_pattern": Ours("alpha", ", which is the same for all layers"),
    "layers_to_transform": Ours("target_modules", ", as a regular expression"),
    "init_r": _RANK,
    "target_r": Ours("budget", " of GeoLoRACallback, a number of parameters in all", "geolora"),
    "deltaT": Ours("adapt_every", " of GeoLoRACallback", "geolora"),
}
_OF = " of RankAdaptiveIntegrator or GeoLoRACallback"
ELSEWHERE = PEFT | {
    "rank": _RANK,
    "lr": _LR,
    "learning_rate": _LR,
    "tau": Ours("tau", _OF, "geolora"),
    "budget": Ours("budget", _OF, "geolora"),
}
