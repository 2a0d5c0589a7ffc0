"""Noise schedules: z_t = alpha(t) z + sigma(t) eps, read from any diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")

# Schedulers that have `alphas_cumprod` or `sigmas`, but whose teachers are not read by these two rules.
# Helios is a pyramid of flows: where a stage starts, its noise is not that of the straight path.
_REFUSED = (
    "EDM",
    "SCM",
    "ScoreSdeVe",
    "ScoreSdeVp",
    "IPNDM",
    "KarrasVe",
    "VQDiffusion",
    "Consistency",
    "RePaint",
    "Helios",
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha(t) and sigma(t) of the forward process `z_t = alpha(t) z + sigma(t) eps` (Eq. 39).

    Discrete schedules (DDPM) are tables over the integers 0..T-1. The flow-matching schedule is the
    straight path `alpha = 1 - t`, `sigma = t` over real t in [0, 1]; its teachers' integer time is `T t`.

    Attributes:
        prediction: what the teacher's network outputs: "epsilon", "sample" (x0), "v_prediction" or "flow".
        num_steps: T, the number of training timesteps.
        acp: float64 `[T]`, the cumulative product of 1 - beta; `None` for flow matching.
        shift: the flow shift s of the scheduler's config. It changes only the law of t, never alpha or
            sigma: pass it to `carv.density.LogitNormal` or `carv.density.shifted_uniform`. (Dynamic
            shifting, by the size of the picture, is not read.)

    Raises:
        ValueError: a table that is not in [0, 1], not one-dimensional or not finite; an unknown prediction.

    Example:
        >>> schedule = NoiseSchedule.scaled_linear()
        >>> t = torch.tensor([20, 980])
        >>> bool(((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1).abs() < 1e-6).all())
        True
    """

    prediction: Prediction
    num_steps: int
    acp: Tensor | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in _PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(_PREDICTIONS)}, got {self.prediction!r}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a positive number, got {self.shift}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.acp is None:
            return
        if self.acp.ndim != 1 or len(self.acp) != self.num_steps:
            raise ValueError(f"acp must have shape [{self.num_steps}], got {list(self.acp.shape)}")
        if not bool(((self.acp >= 0) & (self.acp <= 1)).all()):
            raise ValueError("acp (alphas_cumprod) must be finite and in [0, 1] at every t")

    # Constructors

    @classmethod
    def from_betas(cls, betas: Float[Tensor, " T"], prediction: Prediction = "epsilon") -> NoiseSchedule:
        """The discrete schedule with acp(t) = prod_{s <= t} (1 - beta_s).

        Args:
            betas: `[T]`, each in [0, 1].
            prediction: what the teacher's network outputs.
        """
        acp = torch.cumprod(1.0 - betas.to(torch.float64), 0)
        return cls(prediction, len(acp), acp)

    @classmethod
    def scaled_linear(
        cls,
        num_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction: Prediction = "epsilon",
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule: sqrt(beta) linear in t (App. D.1.1)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        return cls.from_betas(betas, prediction)

    @classmethod
    def linear(
        cls,
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: Prediction = "epsilon",
    ) -> NoiseSchedule:
        """DDPM's schedule (Ho et al. 2020), also DiT's: beta linear in t."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), prediction)

    @classmethod
    def cosine(cls, num_steps: int = 1000, prediction: Prediction = "epsilon") -> NoiseSchedule:
        """Nichol & Dhariwal (2021): acp(t) ~ cos^2((t/T + 0.008) / 1.008 pi/2), betas at most 0.999."""
        return cls.from_betas(_betas_of_bar(_BARS["squaredcos_cap_v2"], num_steps), prediction)

    @classmethod
    def flow(cls, shift: float = 1.0, num_steps: int = 1000) -> NoiseSchedule:
        """Rectified flow: z_t = (1 - t) z + t eps for t in [0, 1], the teacher predicts v = eps - z."""
        return cls("flow", num_steps, None, shift)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """Read the schedule of a diffusers scheduler, or of its JSON config, without importing diffusers.

        The order matters, since e.g. a flow UniPC scheduler also has `alphas_cumprod`: flow schedulers
        first (`FlowMatch*`, `use_flow_sigmas`, `flow_prediction`), then `alphas_cumprod` or the betas.
        A scheduler with `use_flow_sigmas` keeps its `prediction_type`: a network on the straight path may
        still output epsilon, x0 or v.

        Args:
            scheduler: a scheduler object, or the mapping read from its `scheduler_config.json`.

        Raises:
            ValueError: the scheduler's forward process is of another kind (named in the message), or its
                config has neither betas nor a flow.
        """
        config: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", {})
        anonymous = "a config without _class_name" if config is scheduler else type(scheduler).__name__
        name = str(config.get("_class_name", anonymous))
        _refuse_other_processes(config, name)
        flow_path = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
        prediction = config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else "epsilon")
        if prediction == "flow_prediction":
            flow_path, prediction = True, "flow"
        if prediction not in _PREDICTIONS:
            raise ValueError(
                f"{name} has prediction_type {prediction!r}; carv reads {', '.join(_PREDICTIONS)}_prediction"
            )
        if flow_path:
            shift = config.get("shift", config.get("flow_shift"))
            flow = cls.flow(1.0 if shift is None else float(shift), int(config.get("num_train_timesteps", 1000)))
            return replace(flow, prediction=prediction)
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is not None:
            acp = torch.as_tensor(table).detach().to("cpu", torch.float64, copy=True)
            if config.get("rescale_betas_zero_snr"):
                acp[-1] = 0  # some schedulers have 2^-24 here, only so that their sampler's first sigma is finite
        else:
            acp = _acp_of(config, name)
        return cls(prediction, len(acp), acp)

    # The schedule itself

    @property
    def continuous(self) -> bool:
        """True for flow matching (t real in [0, 1]), false for a table over 0..T-1."""
        return self.acp is None

    def alpha(self, t: Shaped[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha(t), the factor of the signal; same shape as t. Discrete: t integer in 0..T-1."""
        if self.acp is None:
            return 1 - t.to(dtype)
        return self.acp[self._index(t)].sqrt().to(dtype)

    def sigma(self, t: Shaped[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Tensor:
        """sigma(t), the factor of the noise; same shape as t. Discrete: sqrt(1 - acp(t))."""
        if self.acp is None:
            return t.to(dtype)
        return (1 - self.acp[self._index(t)]).sqrt().to(dtype)

    def snr(self, t: Shaped[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha^2 / sigma^2; infinite where sigma = 0."""
        return (self.alpha(t, torch.float64) ** 2 / self.sigma(t, torch.float64) ** 2).to(dtype)

    def add_noise(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t = alpha(t) z + sigma(t) eps (Eq. 39). z and noise `[*t.shape, *latent]`, or broadcastable to it."""
        shape = t.shape + (1,) * (noise.ndim - t.ndim)
        return self.alpha(t, noise.dtype).view(shape) * z + self.sigma(t, noise.dtype).view(shape) * noise

    def teacher_time(self, t: Tensor) -> Tensor:
        """t in the units that diffusers' networks take: the integer itself, or T t for flow matching."""
        return t if self.acp is not None else t * self.num_steps

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on a device."""
        return self if self.acp is None else replace(self, acp=self.acp.to(device))

    def _index(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            raise ValueError("a discrete schedule takes integer timesteps; got floating-point t (never round a draw)")
        # Only on the CPU, where looking at t waits for nothing. There -1 would silently mean T - 1.
        if t.device.type == "cpu" and bool(((t < 0) | (t >= self.num_steps)).any()):
            raise ValueError(f"t must lie in 0..{self.num_steps - 1}, got {int(t.min())}..{int(t.max())}")
        return t.long()


def _refuse_other_processes(config: Mapping[str, Any], name: str) -> None:
    """Raise for a scheduler that would be read without a complaint, but wrongly."""
    if any(word in name for word in _REFUSED):
        raise ValueError(
            f"{name} is not a DDPM or flow-matching schedule; carv reads schedulers with alphas_cumprod or flow sigmas"
        )
    if config.get("timestep_type") == "continuous":  # Stable Video Diffusion: the network takes log(sigma) / 4
        raise ValueError(
            f"{name} with timestep_type 'continuous' is an EDM schedule; carv reads discrete timesteps only"
        )
    if config.get("invert_sigmas"):  # Mochi: time and velocity run from noise to data
        raise ValueError(
            f"{name} with invert_sigmas runs from noise to data; carv reads flows with z_t = (1 - t) z + t eps"
        )


def _acp_of(config: Mapping[str, Any], name: str) -> Tensor:
    """acp as the scheduler's constructor makes it from its config, in float64."""
    acp = torch.cumprod(1 - _betas_of(config, name, int(config.get("num_train_timesteps", 1000))), 0)
    # CogVideoX divides the signal-to-noise ratio by a constant, 3 unless told otherwise.
    divisor = config.get("snr_shift_scale", 3.0 if name.startswith("CogVideoX") else None)
    if divisor is not None:
        acp = acp / (divisor + (1 - divisor) * acp)
    return _zero_terminal_snr(acp) if config.get("rescale_betas_zero_snr") else acp


def _betas_of(config: Mapping[str, Any], name: str, num_steps: int) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    kind = config.get("beta_schedule")
    start: float | None = config.get("beta_start")
    end: float | None = config.get("beta_end")
    if kind in _BARS:
        return _betas_of_bar(_BARS[kind], num_steps)
    if start is not None and end is not None:
        if kind in ("linear", "scaled_linear"):
            power = 1 if kind == "linear" else 2
            return torch.linspace(start ** (1 / power), end ** (1 / power), num_steps, dtype=torch.float64) ** power
        if kind == "sigmoid":  # GeoDiff
            return start + (end - start) * torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid()
    raise ValueError(
        f"cannot read a noise schedule from {name}: beta_schedule is {kind!r}, beta_start {start}, beta_end {end}; "
        f"carv reads linear, scaled_linear, sigmoid, {', '.join(_BARS)}, trained_betas and flow matching. "
        "Pass the scheduler object if it has alphas_cumprod"
    )


def _laplace_bar(s: float) -> float:
    """diffusers' "laplace": the root of sigmoid(lambda) with a Laplace quantile lambda (Hang et al. 2024)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - s) * math.log(1 - 2 * abs(0.5 - s) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


# acp as a function of s = t/T in [0, 1], under the names of diffusers' `beta_schedule`.
_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2,
    "laplace": _laplace_bar,
    "exp": lambda s: math.exp(-12 * s),
}


def _betas_of_bar(bar: Callable[[float], float], num_steps: int) -> Tensor:
    """beta_t = 1 - bar((t + 1)/T) / bar(t/T), at most 0.999."""
    values = torch.tensor([bar(i / num_steps) for i in range(num_steps + 1)], dtype=torch.float64)
    return (1 - values[1:] / values[:-1]).clamp(max=0.999)


def _zero_terminal_snr(acp: Tensor) -> Tensor:
    """Lin et al. (2024), Algorithm 1: shift and scale sqrt(acp) so that its last entry is 0."""
    root = acp.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
