"""This folder has the tasks (model, loss and metrics); the libraries of a task are imported at its first use."""

from typing import TYPE_CHECKING

from geolora_pl.lazy import lazy_exports

if TYPE_CHECKING:
    from geolora_pl.tasks.causal_lm import CausalLM
    from geolora_pl.tasks.image import ImageClassification
    from geolora_pl.tasks.text import TextClassification

__all__ = ["CausalLM", "ImageClassification", "TextClassification"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"causal_lm": ["CausalLM"], "image": ["ImageClassification"], "text": ["TextClassification"]}
)
