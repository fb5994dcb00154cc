"""The loss of a diffusion model: what it is given, what it should predict, and how much each timestep counts."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


def target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should predict of noisy latents: the noise, or the velocity.

    Args:
        scheduler: Its ``prediction_type`` says which.
        latents: (batch, channels, height, width), clean.
        noise: Of the same shape.
        timesteps: (batch,), from 0.

    Returns:
        Of the same shape.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]
    return noise


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    r"""The weights of min-SNR: a timestep counts as ``min(SNR, gamma)`` in the error of the clean latents.

    An error of the noise is one of the clean latents times the SNR, and one of the velocity times the SNR plus 1.

    Args:
        scheduler: Knows the signal-to-noise ratio of a timestep.
        timesteps: (batch,), from 0.
        gamma: Above 0.

    Returns:
        (batch,), between 0 and 1.

    Example:
        >>> weights = snr_weights(DDPMScheduler(), torch.tensor([0, 999]), gamma=5.0)
        >>> [round(weight, 3) for weight in weights.tolist()]
        [0.001, 1.0]
    """
    snr = compute_snr(scheduler, timesteps)
    of_velocity = scheduler.config.prediction_type == "v_prediction"
    # The second is min(SNR, gamma) / SNR, also where the SNR is 0.
    weights: Tensor = snr.clamp_max(gamma) / (snr + 1) if of_velocity else (gamma / snr).clamp_max(1)
    return weights


def mean_with_prior(losses: Tensor, is_prior: Tensor, prior_weight: float) -> Tensor:
    """The mean loss of the images, and with a weight that of the class images.

    Args:
        losses: (batch,).
        is_prior: (batch,), whether an image is a class image, which keeps what the model knew (prior preservation).
        prior_weight: At least 0.

    Example:
        >>> float(mean_with_prior(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([False, False, True]), 0.5))
        7.0
    """
    of_class = is_prior.to(losses.dtype)
    own, prior = ((losses * share).sum() / share.sum().clamp_min(1) for share in (1 - of_class, of_class))
    return own + prior_weight * prior


def spread_timesteps(scheduler: DDPMScheduler, count: int) -> list[int]:
    """Timesteps in the middles of equal parts of the schedule, by which losses can be compared between runs.

    Example:
        >>> spread_timesteps(DDPMScheduler(), 4)
        [125, 375, 625, 875]
    """
    steps = scheduler.config.num_train_timesteps
    return [(2 * part + 1) * steps // (2 * count) for part in range(count)]


def step_generator(rank: int, epoch: int, batch: int) -> torch.Generator:
    """The random numbers of one batch in one process, from the seed of the run, which all processes share.

    They follow from their place alone, so that a resumed run draws them again, and they are the same on every device.

    Args:
        rank: The number of the process, from 0.
        epoch: From 0.
        batch: The number of the batch in its epoch, from 0.

    Returns:
        A generator on the CPU.
    """
    place = np.random.SeedSequence([torch.initial_seed(), rank, epoch, batch])
    return torch.Generator().manual_seed(int(place.generate_state(1)[0]))


def noise_like(like: Tensor, numbers: torch.Generator) -> Tensor:
    """Noise that depends on nothing but its numbers, not even on the device.

    Args:
        like: A tensor of the shape, device and type that it gets.
        numbers: A generator on the CPU.
    """
    return torch.randn(like.shape, generator=numbers).to(like)
