"""The hierarchical estimator: upstream work once, K cheap re-noisings of it, one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.adaptive import AdaptiveProposal
from carv.gradient import Gradient, Renders, TeacherGradient
from carv.rng import Stream
from carv.sampler import Draws, TimestepSampler

# Noise is addressed in blocks of this many draws, so that it does not depend on the micro-batch, and so that
# the first 8 of 16 re-noisings are those of 8. Even, for antithetic pairs.
_NOISE_BLOCK = 8


@dataclass(frozen=True)
class Clip:
    """An explicit bound on contributions. It biases the estimate, and the report says so.

    Attributes:
        limit: the bound, > 0.
        by: "norm" scales a whole latent down to the limit; "value" clamps each entry (threestudio's `grad_clip`).
        stage: "draw" clips each f(x, t, eps) before p/q and the mean over K, so that the biased target does not
            depend on K or on the proposal; "mean" clips the mean over K of each render, which biases less, and
            less the larger K is.
    """

    limit: float
    by: Literal["norm", "value"] = "norm"
    stage: Literal["draw", "mean"] = "draw"

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"a clip's limit must be positive, got {self.limit}")

    def apply(self, f: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
        """The clipped f, and for each element of the batch whether it was clipped."""
        latent = tuple(range(batch_dims, f.ndim))
        if self.by == "value":
            return f.clamp(-self.limit, self.limit), (f.abs() > self.limit).any(dim=latent)
        norm = f.square().sum(dim=latent, keepdim=True).sqrt()
        return f * (self.limit / norm.clamp(min=1e-30)).clamp(max=1.0), (norm > self.limit).flatten()

    def __str__(self) -> str:
        where = "each draw before the mean over K" if self.stage == "draw" else "each render's mean over K"
        return f"{where} is clipped by {self.by} to {self.limit:g}, which biases the estimate"


@dataclass(frozen=True)
class Estimate:
    """One estimate of the gradient, and what is known about its draws.

    Attributes:
        gradient: 1/R sum_r J_r^T f_bar_r, a tensor for each parameter. With several ranks, this rank's mean:
            their average over ranks (what DDP forms) is the estimate of the whole step.
        draws: the timesteps and weights that were used.
        f_mean: `[R, *latent]`, f_bar_r = 1/K sum_k omega_rk f_rk: the latent-space estimate for each render.
        f_norm_sq: `[R, K]`, |f_rk|^2 without p/q and before any clip: what an adaptive proposal learns from.
        not_finite: how many draws had a NaN or an infinity (a tensor, so that reading it is the only sync).
        clipped: how many draws, or means over K, the clip changed (a tensor).
        policy: one sentence on what was done to outliers; "" when nothing was, and the estimate is unbiased.
    """

    gradient: Gradient
    draws: Draws
    f_mean: Float[Tensor, "R *latent"]
    f_norm_sq: Float[Tensor, "R K"]
    not_finite: Tensor
    clipped: Tensor
    policy: str

    def assign_to(self, parameters: Sequence[Tensor]) -> None:
        """Put the gradient into `parameter.grad`, for an optimiser."""
        for parameter, gradient in zip(parameters, self.gradient, strict=True):
            parameter.grad = gradient


@dataclass(frozen=True)
class HierarchicalEstimator:
    """g_hat = 1/R sum_r J_r^T [ 1/K sum_k  p(t_rk)/q(t_rk)  f(x_r, t_rk, eps_rk) ]     (Eq. 13, 17, Algorithm 1)

    Unbiased for every sampler: re-noising draws (t, eps) independently of the upstream states. One upstream
    evaluation and one backward pass for each render, K teacher evaluations.

    Attributes:
        sampler: the law and the coupling of t.
        renders: R, upstream states in a step (on each rank).
        renoise: K, draws for each state.
        micro_batch: at most how many draws one call of `contribution` gets (at least one for each render of
            the call). It bounds the teacher's memory and changes nothing else. `None`: all at once.
        render_batch: at most how many upstream states are alive at once; gradients add up over the groups.
            `None`: all R.
        clip: `None` leaves contributions as they are.
        on_not_finite: what a NaN or infinite contribution does. "raise": ValueError naming the draw, which
            costs one device sync a step; "zero": the draw counts as zero, which biases; "ignore": nothing.

    Raises:
        ValueError: counts below 1; an odd K with an antithetic sampler; from `estimate`, contributions of a
            wrong shape, or not finite under "raise".
    """

    sampler: TimestepSampler
    renders: int = 1
    renoise: int = 8
    micro_batch: int | None = None
    render_batch: int | None = None
    clip: Clip | None = None
    on_not_finite: Literal["raise", "zero", "ignore"] = "raise"

    def __post_init__(self) -> None:
        for name in ("renders", "renoise", "micro_batch", "render_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.sampler.antithetic and self.renoise % 2:
            raise ValueError(f"antithetic noise needs an even number of re-noisings, got renoise = {self.renoise}")
        if self.on_not_finite not in ("raise", "zero", "ignore"):
            raise ValueError(f"on_not_finite must be raise, zero or ignore, got {self.on_not_finite!r}")

    @property
    def policy(self) -> str:
        """One sentence on what biases the estimate; "" when nothing does."""
        zero = "draws that are not finite count as zero, which biases the estimate"
        return "; ".join([str(self.clip)] * (self.clip is not None) + [zero] * (self.on_not_finite == "zero"))

    def estimate(self, task: TeacherGradient, stream: Stream, *, rank: int = 0, world: int = 1) -> Estimate:
        """One estimate of the task's gradient.

        All randomness is addressed below `stream`: timesteps at "timesteps", render r (counted over all
        ranks) at ("render", r), its noise at ("render", r, "noise", block). So the same stream gives the same
        estimate for any micro-batch and any split over ranks.

        Args:
            task: the pipeline.
            stream: of this step, e.g. `carv.stream(seed, "step", i)`; equal on all ranks.
            rank, world: of this process among the data-parallel ones.
        """
        if len(task.latent_shape) == 0:
            raise ValueError(
                f"{type(task).__name__}.latent_shape is (); a latent needs at least one dimension, e.g. (1,)"
            )
        timesteps = stream.child("timesteps").generator(self.sampler.device)
        draws = self.sampler.sample(self.renders, self.renoise, timesteps, rank=rank, world=world)
        group = self.render_batch or self.renders
        parts = []
        for first in range(0, self.renders, group):
            rows = range(first, min(first + group, self.renders))
            streams = tuple(stream.child("render", rank * self.renders + r) for r in rows)
            renders = Renders(streams, rank * self.renders + first, world * self.renders)
            parts.append(self._group(task, renders, _rows(draws, rows)))
        gradient = parts[0].gradient
        for part in parts[1:]:
            gradient = tuple(a + b for a, b in zip(gradient, part.gradient, strict=True))
        estimate = Estimate(
            gradient,
            draws,
            torch.cat([part.f_mean for part in parts]),
            torch.cat([part.f_norm_sq for part in parts]),
            torch.stack([part.not_finite for part in parts]).sum(),
            torch.stack([part.clipped for part in parts]).sum(),
            self.policy,
        )
        if isinstance(self.sampler.proposal, AdaptiveProposal):
            _learn(self.sampler.proposal, draws.t, estimate.f_norm_sq, world)
        return estimate

    def _group(self, task: TeacherGradient, renders: Renders, draws: Draws) -> Estimate:
        """The share of some renders: their sum, divided by all R of this rank."""
        state = task.upstream(renders)
        f_mean, f_norm_sq, not_finite, clipped = self._contributions(task, state, renders, draws)
        if self.clip is not None and self.clip.stage == "mean":
            f_mean, changed = self.clip.apply(f_mean, 1)
            clipped = clipped + changed.sum()
        gradient = task.pull_back(state, f_mean / self.renders)
        return Estimate(gradient, draws, f_mean, f_norm_sq, not_finite, clipped, self.policy)

    @torch.no_grad()
    def _contributions(
        self, task: TeacherGradient, state: Any, renders: Renders, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, renoise = draws.t.shape
        step = renoise if self.micro_batch is None else max(1, self.micro_batch // count)
        noise = _Noise(renders, task, draws.antithetic)
        weight = draws.weight.to(task.device, task.dtype)
        total = torch.zeros((count, *task.latent_shape), dtype=task.dtype, device=task.device)
        norms: list[Tensor] = []
        bad = torch.zeros((), dtype=torch.long, device=task.device)
        clipped = torch.zeros_like(bad)
        for k in range(0, renoise, step):
            t = draws.t[:, k : k + step].to(task.device)
            eps = noise.of(k, min(k + step, renoise))
            f = task.contribution(state, t, eps)
            if f.shape != eps.shape:
                raise ValueError(
                    f"{type(task).__name__}.contribution returned shape {list(f.shape)}, expected {list(eps.shape)}: "
                    "[renders, re-noisings, *latent_shape]"
                )
            norm_sq = f.flatten(2).to(torch.promote_types(f.dtype, torch.float32)).square().sum(-1)
            finite = torch.isfinite(norm_sq)
            bad += (~finite).sum()
            if self.on_not_finite == "raise" and not bool(finite.all()):
                _refuse(task, finite, t, renders.first, k)
            if self.on_not_finite == "zero":
                f = torch.where(finite.view(finite.shape + (1,) * (f.ndim - 2)), f, 0.0)
            if self.clip is not None and self.clip.stage == "draw":
                f, changed = self.clip.apply(f, 2)
                clipped += changed.sum()
            total += torch.einsum("rk,rk...->r...", weight[:, k : k + step], f)
            norms.append(norm_sq)
        return total / renoise, torch.cat(norms, 1), bad, clipped


def _learn(proposal: AdaptiveProposal, t: Tensor, f_norm_sq: Tensor, world: int) -> None:
    """Every rank learns from the draws of all, so that all keep the same law and strata stay global."""
    if world > 1:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("an adaptive proposal on several ranks needs torch.distributed to be initialised")
        pairs = []
        for mine in (t.contiguous(), f_norm_sq.contiguous()):
            gathered = [torch.empty_like(mine) for _ in range(world)]
            torch.distributed.all_gather(gathered, mine)
            pairs.append(torch.cat(gathered))
        t, f_norm_sq = pairs
    proposal.update(t, f_norm_sq)


def _rows(draws: Draws, rows: range) -> Draws:
    part = slice(rows.start, rows.stop)
    weighted = None if draws.weighted is None else draws.weighted[part]
    return Draws(draws.t[part], draws.weight[part], weighted, draws.antithetic)


class _Noise:
    """eps[r, k] by address: block `k // 8` of render r has a stream of its own."""

    def __init__(self, renders: Renders, task: TeacherGradient, antithetic: bool) -> None:
        self.renders, self.task, self.antithetic = renders, task, antithetic
        self.blocks: dict[int, Tensor] = {}

    def of(self, start: int, stop: int) -> Shaped[Tensor, "R k *latent"]:
        """eps of draws start..stop-1. Blocks before `start` are forgotten: calls go upwards."""
        first, last = start // _NOISE_BLOCK, (stop - 1) // _NOISE_BLOCK
        self.blocks = {b: eps for b, eps in self.blocks.items() if b >= first}
        for b in range(first, last + 1):
            if b not in self.blocks:
                self.blocks[b] = torch.stack([self._block(stream, b) for stream in self.renders])
        joined = torch.cat([self.blocks[b] for b in range(first, last + 1)], 1)
        return joined[:, start - first * _NOISE_BLOCK : stop - first * _NOISE_BLOCK]

    def _block(self, stream: Stream, block: int) -> Tensor:
        task = self.task
        rng = stream.child("noise", block).generator(task.device)
        distinct = _NOISE_BLOCK // 2 if self.antithetic else _NOISE_BLOCK
        eps = torch.randn((distinct, *task.latent_shape), generator=rng, dtype=task.dtype, device=task.device)
        return torch.stack([eps, -eps], 1).flatten(0, 1) if self.antithetic else eps


def _refuse(task: TeacherGradient, finite: Tensor, t: Tensor, first_render: int, first_k: int) -> None:
    r, k = (int(i) for i in (~finite).nonzero()[0])
    raise ValueError(
        f"{type(task).__name__}.contribution is not finite at t = {t[r, k].item():g} (render {first_render + r}, "
        f"re-noising {first_k + k}; {int((~finite).sum())} of {finite.numel()} draws of this call). Check the teacher "
        'there, e.g. its precision; on_not_finite="zero" drops such draws, with a bias'
    )
