"""What a network outputs, converted once to epsilon (or to x0), at the teacher's edge."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.schedule import NoiseSchedule, Prediction


def to_epsilon(
    output: Tensor,
    z_t: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction | None = None,
) -> Tensor:
    """eps_hat from a network's output, by solving its definition and `z_t = alpha z + sigma eps` for eps.

    ============  ====================  ==========================================
    prediction    the network predicts  eps_hat
    ============  ====================  ==========================================
    epsilon       eps                   output
    sample        z                     (z_t - alpha output) / sigma
    v_prediction  alpha eps - sigma z   (alpha output + sigma z_t) / (alpha^2 + sigma^2)
    flow          eps - z               (z_t + alpha output) / (alpha + sigma)
    ============  ====================  ==========================================

    The formulas hold for any alpha and sigma; on DDPM schedules alpha^2 + sigma^2 = 1, on straight flows
    alpha + sigma = 1.

    Args:
        output: `[*batch, *latent]`, in any floating-point type.
        z_t: `[*batch, *latent]`, what the network was shown.
        t: `[*batch]`, in the units of `schedule`.
        schedule: gives alpha, sigma and, unless `prediction` says otherwise, what the network predicts.
        prediction: in place of `schedule.prediction`.

    Returns:
        `[*batch, *latent]` in float32, or in float64 where z_t is: half precision ends here.

    Raises:
        ValueError: shapes that do not fit; `sample` where sigma(t) = 0, since x0 then says nothing about
            the noise. That check is made where t is on the CPU only. An accelerator would have to wait
            for it: there the result is not finite, which the estimator reports.
    """
    kind, dtype = prediction or schedule.prediction, _working_dtype(output, z_t, t)
    output, z_t = output.to(dtype), z_t.to(dtype)
    if kind == "epsilon":
        return output
    alpha, sigma = _coefficients(schedule, t, z_t)
    if kind == "sample":
        _refuse_zero(sigma, "a network that predicts x0 says nothing about epsilon where sigma(t) = 0: draw larger t")
        return (z_t - alpha * output) / sigma
    if kind == "v_prediction":
        return (alpha * output + sigma * z_t) / (alpha**2 + sigma**2)
    return (z_t + alpha * output) / (alpha + sigma)


def to_sample(
    output: Tensor,
    z_t: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction | None = None,
) -> Tensor:
    """x0_hat from a network's output; with `prediction="epsilon"`, from an eps_hat (Tweedie's formula).

    epsilon: `(z_t - sigma output) / alpha`; sample: `output`; v_prediction: `(alpha z_t - sigma output) /
    (alpha^2 + sigma^2)`; flow: `(z_t - sigma output) / (alpha + sigma)`.

    Args:
        output, z_t, t, schedule, prediction: as in `to_epsilon`.

    Returns:
        `[*batch, *latent]` in float32, or in float64 where z_t is.

    Raises:
        ValueError: shapes that do not fit; `epsilon` where alpha(t) = 0 (checked as in `to_epsilon`).
    """
    kind, dtype = prediction or schedule.prediction, _working_dtype(output, z_t, t)
    output, z_t = output.to(dtype), z_t.to(dtype)
    if kind == "sample":
        return output
    alpha, sigma = _coefficients(schedule, t, z_t)
    if kind == "epsilon":
        _refuse_zero(alpha, "epsilon says nothing about x0 where alpha(t) = 0: draw smaller t")
        return (z_t - sigma * output) / alpha
    if kind == "v_prediction":
        return (alpha * z_t - sigma * output) / (alpha**2 + sigma**2)
    return (z_t - sigma * output) / (alpha + sigma)


def _working_dtype(output: Tensor, z_t: Tensor, t: Tensor) -> torch.dtype:
    if output.shape != z_t.shape:
        raise ValueError(
            f"a network's output must have the shape of z_t, {list(z_t.shape)}, got {list(output.shape)}; "
            "of a network that also predicts a variance, pass the first half of the channels"
        )
    if z_t.shape[: t.ndim] != t.shape:
        raise ValueError(f"t must have the leading dimensions of z_t, {list(z_t.shape)}, got {list(t.shape)}")
    return torch.promote_types(z_t.dtype, torch.float32)


def _coefficients(schedule: NoiseSchedule, t: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t) in the type of z_t and broadcastable to it."""
    shape = t.shape + (1,) * (z_t.ndim - t.ndim)
    return schedule.alpha(t, z_t.dtype).view(shape), schedule.sigma(t, z_t.dtype).view(shape)


def _refuse_zero(divisor: Tensor, message: str) -> None:
    if divisor.device.type == "cpu" and bool((divisor == 0).any()):
        raise ValueError(message)
