"""A model whose weights are NaN, as after a training that has diverged."""

import torch
from foreign import trainer

from geolora_pl import GeoLoRACallback


def validation_loss(module, data):
    """The loss that a task logs for such a model, in float32."""
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.fill_(float("nan"))
    (found,) = trainer(GeoLoRACallback()).validate(module, data, verbose=False)
    return torch.tensor(found["val_loss"])
