"""The names in the metrics.csv of a run."""

import csv
from pathlib import Path

OF_A_CLASSIFIER = {
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_accuracy",
    "geolora/mean_rank",
    "geolora/adapter_params",
}


def logged_names(path: Path) -> set[str]:
    """Those with a value in some row."""
    return {name for row in csv.DictReader(path.read_text().splitlines()) for name, value in row.items() if value}
