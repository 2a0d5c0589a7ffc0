"""The parts of a teacher's training loss, and the parameters it is differentiated in."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from carv.schedule import NoiseSchedule


def training_target(schedule: NoiseSchedule, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the network was trained to output.

    ============  ==================
    prediction    target
    ============  ==================
    flow          eps - z
    epsilon       eps
    v_prediction  alpha eps - sigma z
    sample        z
    ============  ==================

    Args:
        schedule: gives alpha, sigma and what the network predicts.
        z, noise: `[n, *latent]`.
        t: `[n]`, in the units of the schedule.
    """
    if schedule.prediction == "flow":
        return noise - z
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return z
    shape = (-1, *[1] * (z.ndim - 1))
    return schedule.alpha(t, z.dtype).view(shape) * noise - schedule.sigma(t, z.dtype).view(shape) * z


def location_weight(mask: Tensor | None, noise: Tensor) -> Tensor:
    """M / F of Eq. 60, `[n, F, h, w]` (`[n, h, w]` of pictures); F, the number of latent frames, is 1 for pictures.

    Args:
        mask: in [0, 1], of one example or n of them; ones if `None`.
        noise: `[n, C, F, h, w]` or `[n, C, h, w]`, for the shape.

    Raises:
        ValueError: a mask of another shape, or with values outside [0, 1].
    """
    shape = (len(noise), *noise.shape[2:])
    frames = noise.shape[2] if noise.ndim == 5 else 1
    if mask is None:
        return torch.full((1,) * len(shape), 1 / frames).expand(shape)
    if mask.shape not in (shape, shape[1:]):
        raise ValueError(f"a mask of these latents has shape {list(shape[1:])}, got {list(mask.shape)}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("a mask must be finite and in [0, 1]")
    return mask.to(torch.float32).expand(shape) / frames


def chosen_parameters(network: nn.Module, pattern: str | None) -> dict[str, Tensor]:
    """The parameters that a pattern names, in the network's order.

    Args:
        network: of the teacher.
        pattern: fnmatch patterns separated by commas. `None`: the LoRA adapters ("lora_" in the name) if there are
            some, or else everything.

    Raises:
        ValueError: a pattern that matches nothing; the message names some parameters.
    """
    floating: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
    if pattern is None:
        adapters = {name: p for name, p in floating.items() if "lora_" in name}
        return adapters or floating
    patterns = [part.strip() for part in pattern.split(",")]
    for part in patterns:
        if not any(fnmatchcase(name, part) for name in floating):
            raise ValueError(
                f"no parameter of the network matches {part!r}; their names are like {', '.join(list(floating)[:3])}"
            )
    return {name: p for name, p in floating.items() if any(fnmatchcase(name, part) for part in patterns)}
