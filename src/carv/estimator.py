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
from carv.noise import RenderNoise
from carv.rng import Stream
from carv.sampler import Draws, TimestepSampler


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
class MeanContribution:
    """The latent-space half of an estimate: f_bar_r = 1/K sum_k omega_rk f_rk, before any backward pass.

    Attributes:
        draws: the timesteps and weights that were used.
        f_mean: `[R, *latent]`, f_bar_r: the latent-space estimate for each render.
        f_norm_sq: `[R, K]`, |f_rk|^2 without p/q and before any clip: what an adaptive proposal learns from.
        not_finite: how many draws had a NaN or an infinity (a tensor, so that reading it is the only sync).
        clipped: how many draws, or means over K, the clip changed (a tensor).
        policy: one sentence on what was done to outliers; "" when nothing was, and the estimate is unbiased.
    """

    draws: Draws
    f_mean: Float[Tensor, "R *latent"]
    f_norm_sq: Float[Tensor, "R K"]
    not_finite: Tensor
    clipped: Tensor
    policy: str


@dataclass(frozen=True)
class Estimate(MeanContribution):
    """One estimate of the gradient, and what is known about its draws.

    Attributes:
        gradient: 1/R sum_r J_r^T f_bar_r, a tensor for each parameter. With several ranks, this rank's mean:
            their average over ranks (what DDP forms) is the estimate of the whole step.
    """

    gradient: Gradient

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
            costs a device sync for each batch of renders; "zero": the draw counts as zero, which biases; "ignore":
            nothing.

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
        draws, renders = self._drawn(task, stream, rank, world)
        group = self.render_batch or self.renders
        parts, gradient = [], None
        for first in range(0, self.renders, group):
            rows = range(first, min(first + group, self.renders))
            some = Renders(renders.streams[rows.start : rows.stop], renders.first + first, renders.total)
            state = task.upstream(some)
            parts.append(self._mean(task, state, some, _rows(draws, rows)))
            share = task.pull_back(state, parts[-1].f_mean / self.renders)
            gradient = share if gradient is None else tuple(a + b for a, b in zip(gradient, share, strict=True))
        assert gradient is not None
        estimate = Estimate(
            draws,
            torch.cat([part.f_mean for part in parts]),
            torch.cat([part.f_norm_sq for part in parts]),
            torch.stack([part.not_finite for part in parts]).sum(),
            torch.stack([part.clipped for part in parts]).sum(),
            self.policy,
            gradient,
        )
        learn(self.sampler, draws.t, estimate.f_norm_sq, world)
        return estimate

    def mean_contribution(
        self, task: TeacherGradient, state: Any, stream: Stream, *, rank: int = 0, world: int = 1
    ) -> MeanContribution:
        """f_bar of all R renders of a state that exists already, without a backward pass.

        For objectives of several terms that share their upstream work: add up the terms' `f_mean` and pull them back
        once, `task.pull_back(state, total / R)`. With the stream of `estimate` it is bit for bit the `f_mean` there.

        Args:
            task: the term; its `contribution` is asked.
            state: from `upstream(self.renders_of(stream))`, or with R renders from elsewhere.
            stream: of this term in this step; equal on all ranks. Give terms that are to be independent of each
                other different ones.
            rank, world: as in `estimate`.
        """
        draws, renders = self._drawn(task, stream, rank, world)
        mean = self._mean(task, state, renders, draws)
        learn(self.sampler, draws.t, mean.f_norm_sq, world)
        return mean

    def draw(
        self, task: TeacherGradient, stream: Stream, *, rank: int = 0, world: int = 1
    ) -> tuple[Draws, Shaped[Tensor, "R K *latent"]]:
        """The draws (t, p/q) and the noise eps of `estimate`, for losses of one's own, such as a learned score's."""
        draws, renders = self._drawn(task, stream, rank, world)
        return draws, RenderNoise(renders, task, draws.antithetic).of(0, self.renoise)

    def renders_of(self, stream: Stream, rank: int = 0, world: int = 1) -> Renders:
        """Which upstream states a step asks for: render r of all ranks is at ("render", r)."""
        first = rank * self.renders
        streams = tuple(stream.child("render", r) for r in range(first, first + self.renders))
        return Renders(streams, first, world * self.renders)

    def _drawn(self, task: TeacherGradient, stream: Stream, rank: int, world: int) -> tuple[Draws, Renders]:
        if len(task.latent_shape) == 0:
            raise ValueError(
                f"{type(task).__name__}.latent_shape is (); a latent needs at least one dimension, e.g. (1,)"
            )
        timesteps = stream.child("timesteps").generator(self.sampler.device)
        draws = self.sampler.sample(self.renders, self.renoise, timesteps, rank=rank, world=world)
        return draws, self.renders_of(stream, rank, world)

    def _mean(self, task: TeacherGradient, state: Any, renders: Renders, draws: Draws) -> MeanContribution:
        f_mean, f_norm_sq, not_finite, clipped = self._contributions(task, state, renders, draws)
        if self.clip is not None and self.clip.stage == "mean":
            f_mean, changed = self.clip.apply(f_mean, 1)
            clipped = clipped + changed.sum()
        return MeanContribution(draws, f_mean, f_norm_sq, not_finite, clipped, self.policy)

    @torch.no_grad()
    def _contributions(
        self, task: TeacherGradient, state: Any, renders: Renders, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, renoise = draws.t.shape
        step = renoise if self.micro_batch is None else max(1, self.micro_batch // count)
        noise = RenderNoise(renders, task, draws.antithetic)
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
            if self.on_not_finite == "zero":
                f = torch.where(finite.view(finite.shape + (1,) * (f.ndim - 2)), f, 0.0)
            if self.clip is not None and self.clip.stage == "draw":
                f, changed = self.clip.apply(f, 2)
                clipped += changed.sum()
            total += torch.einsum("rk,rk...->r...", weight[:, k : k + step], f)
            norms.append(norm_sq)
        if self.on_not_finite == "raise" and bool(bad):
            _refuse(task, torch.isfinite(torch.cat(norms, 1)), draws.t, renders.first)
        return total / renoise, torch.cat(norms, 1), bad, clipped


def learn(sampler: TimestepSampler, t: Tensor, second_moment: Tensor, world: int = 1) -> None:
    """Let the sampler's proposal, if it is adaptive, learn from draws that have been used.

    Every rank learns from the draws of all, so that all keep the same law and strata stay global.

    Args:
        sampler: whose proposal it is; one that is not adaptive stays as it is.
        t: `[R, K]`, the timesteps of this rank.
        second_moment: `[R, K]`, |f|^2 of each draw without p/q.
        world: how many ranks there are.

    Raises:
        ValueError: several ranks without torch.distributed.
    """
    if not isinstance(sampler.proposal, AdaptiveProposal):
        return
    if world > 1:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("an adaptive proposal on several ranks needs torch.distributed to be initialised")
        pairs = []
        for mine in (t.contiguous(), second_moment.contiguous()):
            gathered = [torch.empty_like(mine) for _ in range(world)]
            torch.distributed.all_gather(gathered, mine)
            pairs.append(torch.cat(gathered))
        t, second_moment = pairs
    sampler.proposal.update(t, second_moment)


def _rows(draws: Draws, rows: range) -> Draws:
    part = slice(rows.start, rows.stop)
    weighted = None if draws.weighted is None else draws.weighted[part]
    return Draws(draws.t[part], draws.weight[part], weighted, draws.antithetic)


def _refuse(task: TeacherGradient, finite: Tensor, t: Tensor, first_render: int) -> None:
    r, k = (int(i) for i in (~finite).nonzero()[0])
    raise ValueError(
        f"{type(task).__name__}.contribution is not finite at t = {t[r, k].item():g} (render {first_render + r}, "
        f"re-noising {k}; {int((~finite).sum())} of {finite.numel()} draws). Check the teacher "
        'there, e.g. its precision; on_not_finite="zero" drops such draws, with a bias'
    )
