"""The fake score: a denoiser that keeps learning what the generator makes now."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carv.schedule import NoiseSchedule
from carv.tasks.distill.config import TargetName
from carv.tasks.distill.gradient import Generated
from carv.tasks.distill.networks import over_draws
from carv.teachers.prediction import to_sample


def denoising_losses(
    denoiser: nn.Module, schedule: NoiseSchedule, state: Generated, t: Tensor, noise: Tensor, target: TargetName
) -> Tensor:
    """Each draw's mean squared error of a denoiser on given latents, differentiable in the denoiser.

        l_rk = mean_{C S} (prediction(z_t, t, c) - target)^2,      z_t = alpha z + sigma eps          (Eq. 54)

    For z ~ N(m, s^2) in each entry, no denoiser is better on average than sigma^2 s^2 / (alpha^2 s^2 + sigma^2) at t
    with the target x0.

    Args:
        denoiser: called with z_t `[N, *latent]`, t `[N]` and N rows of condition.
        schedule: also says what the denoiser predicts.
        state: R latents; they get no gradient.
        t: `[R, K]`.
        noise: `[R, K, *latent]`.
        target: "network" compares what the network predicts (eps, x0, v or a flow), "x0" the denoised latent.

    Returns:
        `[R, K]`.
    """
    z = state.z.detach()[:, None]
    z_t = schedule.add_noise(z, t, noise)
    predicted = over_draws(denoiser, z_t, t, state.condition)
    if target == "x0":
        error = to_sample(predicted, z_t, t, schedule) - z
    else:
        error = predicted - network_target(z, t, noise, schedule)
    return error.square().flatten(2).mean(-1)


def network_target(z: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What a network of this schedule should predict: eps, z, alpha eps - sigma z, or eps - z."""
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return z.expand_as(noise)
    if schedule.prediction == "flow":
        return noise - z
    shape = t.shape + (1,) * (noise.ndim - t.ndim)
    alpha, sigma = schedule.alpha(t, noise.dtype).view(shape), schedule.sigma(t, noise.dtype).view(shape)
    return torch.addcmul(-sigma * z, alpha, noise)
