"""What the trainer takes and cannot mean is refused from Python as from the command line."""

import pytest
from foreign import ADAPTER, Foreign, loader, trainer

from geolora_pl import GeoLoRACallback


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": -1.0}, "gradient_clip_val=-1.0 must be at least 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be at least 1"),
        ({"max_epochs": 0}, "max_epochs=0 leaves nothing to train"),
        ({"limit_train_batches": 0}, "limit_train_batches=0 leaves nothing to train"),
    ],
)
def test_settings_of_the_trainer_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(GeoLoRACallback(adapter=ADAPTER), **settings).fit(Foreign(), loader())


def test_a_trainer_that_only_tests_needs_nothing_to_train():
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=0)
    assert "val_loss" in runs.test(Foreign(), loader(), verbose=False)[0]
