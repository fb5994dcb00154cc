"""The tasks: model, loss and metrics."""

from geolora_pl.tasks.image import ImageClassification

__all__ = ["ImageClassification"]
