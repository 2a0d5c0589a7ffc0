"""Weights w(t): each a named function of a noise schedule, whose formula reports print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.schedule import NoiseSchedule


@dataclass(frozen=True)
class Weight:
    """A known weight of the contribution at t, `f = w(t) r`.

    The same word means another weight in another code base, so a report prints `formula`, not only `name`.
    In the formulas `alpha` and `sigma` are those of `z_t = alpha z + sigma eps`, `acp = alpha^2` (DDPM).

    Attributes:
        name: what people call it.
        formula: what it is.
        function: t (any shape) -> w(t), float64, of the same shape.

    Raises:
        ValueError: on a call, where w(t) is negative, infinite or NaN; the message names the first such t.
    """

    name: str
    formula: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """w(t) in float64, checked. For tables made once, not for the hot path: see `unchecked`."""
        w = self.unchecked(t)
        if w.shape != t.shape:
            raise ValueError(f"weight {self.name!r} must keep the shape of t: {list(t.shape)} became {list(w.shape)}")
        bad = ~(torch.isfinite(w) & (w >= 0))
        if bool(bad.any()):
            raise ValueError(
                f"weight {self.name!r} ({self.formula}) must be finite and not negative, "
                f"but it is {w[bad][0].item():g} at t = {t[bad][0].item():g}"
            )
        return w

    def unchecked(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """w(t) in float64 without the check, hence without a device sync."""
        return self.function(t).to(torch.float64)

    def times_alpha(self, schedule: NoiseSchedule) -> Weight:
        """The paper's w_SDS = w alpha (Eq. 8), which keeps the factor dz_t/dz that most codes drop."""
        return Weight(
            f"{self.name}*alpha",
            f"({self.formula}) alpha",
            lambda t: self.function(t) * schedule.alpha(t, torch.float64),
        )


def uniform(schedule: NoiseSchedule) -> Weight:
    """w = 1 (threestudio's `uniform`)."""
    return Weight("uniform", "1", lambda t: torch.ones(t.shape, dtype=torch.float64, device=t.device))


def sds(schedule: NoiseSchedule) -> Weight:
    """w = 1 - acp = sigma^2: DreamFusion's, and the default of threestudio (`sds`)."""
    return Weight("sds", "1 - acp", lambda t: schedule.sigma(t, torch.float64) ** 2)


def fantasia3d(schedule: NoiseSchedule) -> Weight:
    """w = sqrt(acp) (1 - acp) = alpha sigma^2 (Fantasia3D; threestudio's `fantasia3d`)."""
    return Weight(
        "fantasia3d",
        "sqrt(acp) (1 - acp)",
        lambda t: schedule.alpha(t, torch.float64) * schedule.sigma(t, torch.float64) ** 2,
    )


def snr(schedule: NoiseSchedule) -> Weight:
    """w = alpha^2 / sigma^2: the weight that makes an epsilon loss a loss on x0."""
    return Weight("snr", "alpha^2 / sigma^2", lambda t: schedule.snr(t, torch.float64))


def truncated_snr(schedule: NoiseSchedule, floor: float = 1.0) -> Weight:
    """w = max(alpha^2 / sigma^2, floor) (Salimans & Ho 2022, Eq. 9)."""
    return Weight(
        "truncated-snr",
        f"max(alpha^2 / sigma^2, {floor:g})",
        lambda t: schedule.snr(t, torch.float64).clamp(min=floor),
    )


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0) -> Weight:
    """w = min(SNR, gamma) / SNR = min(1, gamma / SNR), for an epsilon loss (Hang et al. 2023).

    Written as `min(1, gamma sigma^2 / alpha^2)`, which is 1 (not NaN) where alpha = 0.
    """

    def function(t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t, torch.float64), schedule.sigma(t, torch.float64)
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)

    return Weight("min-snr", f"min(1, {gamma:g} sigma^2 / alpha^2)", function)


def from_table(table: Tensor, name: str = "table") -> Weight:
    """w(t) = table[t] for integer t in 0..T-1.

    Args:
        table: `[T]`, finite and not negative.
        name: for reports.

    Raises:
        ValueError: the table is not one-dimensional, or negative, infinite or NaN anywhere.
    """
    if table.ndim != 1 or len(table) == 0:
        raise ValueError(f"a weight table has shape [T], got {list(table.shape)}")
    table = table.to(torch.float64)

    def function(t: Tensor) -> Tensor:
        if t.is_floating_point():
            raise ValueError(f"weight {name!r} is a table over integer timesteps; got floating-point t")
        return table.to(t.device)[t]

    weight = Weight(name, f"a table of {len(table)} values", function)
    weight(torch.arange(len(table)))
    return weight


WEIGHTS: dict[str, Callable[[NoiseSchedule], Weight]] = {
    "sds": sds,
    "uniform": uniform,
    "fantasia3d": fantasia3d,
    "snr": snr,
    "truncated-snr": truncated_snr,
    "min-snr": min_snr,
    "sds*alpha": lambda schedule: sds(schedule).times_alpha(schedule),
    "uniform*alpha": lambda schedule: uniform(schedule).times_alpha(schedule),
}
"""The names that the command line takes. In code, call the functions."""


def by_name(name: str, schedule: NoiseSchedule) -> Weight:
    """The weight of that name for a schedule.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown weight {name!r}; known weights: {', '.join(WEIGHTS)}")
    return WEIGHTS[name](schedule)
