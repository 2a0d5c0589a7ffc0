"""The variance of an estimator, measured by brute force: many whole estimates, until the figure is good enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from carv.estimator import HierarchicalEstimator
from carv.gradient import Gradient, TeacherGradient
from carv.rng import Stream
from carv.variance.moments import Moments, TailCheck
from carv.variance.stopping import Check, StopRule, target_error
from carv.variance.values import Value

Estimator: TypeAlias = Callable[[Stream], Tensor | Gradient]
"""A user's own code: one whole estimate, all of whose randomness comes from the stream."""

_CENTRE_REPLICATES = 32


@dataclass(frozen=True)
class Counts:
    """How much work was done.

    Attributes:
        upstream: upstream states evaluated (rendered and encoded), R a replicate.
        teacher: draws that the teacher saw, R K a replicate.
        backward: upstream states pulled back, R a replicate (R of them in one pass are R).
        encoder: upstream states that went through an encoder; tasks that have one say so, see `encoder_calls`.
    """

    upstream: int
    teacher: int
    backward: int
    encoder: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.upstream + other.upstream,
            self.teacher + other.teacher,
            self.backward + other.backward,
            self.encoder + other.encoder,
        )


def encoder_calls(task: object) -> int:
    """Encoder evaluations for each upstream state: the task's attribute `encoder_calls`, 0 for one without."""
    return int(getattr(task, "encoder_calls", 0))


@dataclass(frozen=True)
class Sample:
    """One replicate: float64 vectors, and what was done to its outliers.

    Attributes:
        gradient: `[D]`, the whole estimate g_hat.
        latent: `[d_z]`, 1/R sum_r f_bar_r, the latent-space estimate; None for a callable.
        not_finite, clipped: as in `carv.estimator.Estimate`.
    """

    gradient: Float[Tensor, "D"]
    latent: Float[Tensor, "z"] | None
    not_finite: int = 0
    clipped: int = 0


@dataclass(frozen=True)
class Centre:
    """The fixed centres about which the moments of all parts of a measurement are taken, see `Moments`."""

    gradient: Float[Tensor, "D"]
    latent: Float[Tensor, "z"] | None


@dataclass(frozen=True)
class Replicates:
    """What is kept of some replicates: a part of a measurement, to be merged with others.

    Attributes:
        ranges: which replicates, by their indices.
        gradient, latent: moments of the estimates.
        counts: work for these replicates; None for a callable.
        seconds: wall-clock spent on these estimates.
        not_finite, clipped: draws, summed.
        policy: what was done to outliers, one sentence; "" if nothing.
    """

    ranges: tuple[range, ...]
    gradient: Moments
    latent: Moments | None
    counts: Counts | None
    seconds: float
    not_finite: int = 0
    clipped: int = 0
    policy: str = ""

    def merge(self, other: Replicates) -> Replicates:
        """Both parts. Exact but for rounding; bit for bit the same if equal parts are merged in equal order.

        Raises:
            ValueError: a replicate that is in both; different centres.
        """
        for a in self.ranges:
            for b in other.ranges:
                both = range(max(a.start, b.start), min(a.stop, b.stop))
                if len(both):
                    raise ValueError(f"replicates {both.start} to {both.stop - 1} are in both parts")
        latent = None if self.latent is None or other.latent is None else self.latent.merge(other.latent)
        return Replicates(
            self.ranges + other.ranges,
            self.gradient.merge(other.gradient),
            latent,
            None if self.counts is None or other.counts is None else self.counts + other.counts,
            self.seconds + other.seconds,
            self.not_finite + other.not_finite,
            self.clipped + other.clipped,
            self.policy,
        )


@dataclass(frozen=True)
class Measurement:
    """A measured variance and what it rests on.

    Attributes:
        variance: tr Cov of one whole estimate of the parameter gradient (Eq. 3), with its standard error.
        latent_variance: the same of the latent-space estimate; None for a callable.
        replicates: n.
        mean: `[D]` float64, the mean of all estimates.
        mean_norm_squared: |E g_hat|^2, the noise of the mean removed.
        squares: `[n]` float64, |g_hat_i - c|^2 about the measurement's centre, in order of replicate i: for paired
            comparisons of measurements that share a stream.
        tails, latent_tails: whether the variances mean anything; show `verdict` beside them.
        stopped: one sentence, why the measurement ended.
        converged: whether the rule was satisfied; False when the cap ended it.
        counts: work, None for a callable; without the 32 estimates that fix the centre.
        seconds: wall-clock of the estimates, without those either.
        not_finite, clipped, policy: what was done to outliers, as in `carv.estimator.Estimate`.
    """

    variance: Value
    latent_variance: Value | None
    replicates: int
    mean: Float[Tensor, "D"]
    mean_norm_squared: Value
    squares: Float[Tensor, "n"]
    tails: TailCheck
    latent_tails: TailCheck | None
    stopped: str
    converged: bool
    counts: Counts | None
    seconds: float
    not_finite: int
    clipped: int
    policy: str


def measure(
    source: TeacherGradient | Estimator,
    estimator: HierarchicalEstimator | None,
    stream: Stream,
    *,
    stop: StopRule | None = None,
) -> Measurement:
    """The variance of one whole estimate, from replicates until a rule is satisfied.

        Var = 1/(n-1) sum_i |g_hat_i - mean|^2            (Eq. 3), replicate i at stream.child("replicate", i)

    A replicate is one WHOLE estimate: the K draws of a stratified one depend on each other, so that their own s^2/K
    overstates its variance.

    Args:
        source: a pipeline, or a callable that returns one estimate as a tensor or a tuple of tensors.
        estimator: how the pipeline's gradient is estimated; None for a callable.
        stream: of the measurement.
        stop: a rule of `carv.variance.stopping`; None is `target_error(0.02)`.

    Raises:
        ValueError: an estimator for a callable or none for a pipeline; an adaptive proposal, whose replicates
            would depend on each other; an estimate that is not finite.
    """
    stop = stop or target_error()
    centre, checks = pilot_centre(source, estimator, stream), list[Check]()
    replicates = collect(source, estimator, stream, 0, stop.minimum, centre=centre)
    while True:
        checks.append(Check(replicates.gradient.count, replicates.gradient.variance))
        reason, done = stop.reason(checks), replicates.gradient.count
        if reason is not None or done >= stop.cap:
            break
        more = collect(source, estimator, stream, done, min(stop.every, stop.cap - done), centre=centre)
        replicates = replicates.merge(more)
    if reason is None:
        return conclude(replicates, stop.unmet(checks) or f"{done} replicates", converged=False)
    return conclude(replicates, reason)


def collect(
    source: TeacherGradient | Estimator,
    estimator: HierarchicalEstimator | None,
    stream: Stream,
    first: int,
    count: int,
    *,
    centre: Centre | None = None,
) -> Replicates:
    """Replicates first .. first + count - 1: the part of a measurement that one worker does.

    `conclude` turns merged parts into a `Measurement`. With parts of one fixed size that are merged in order of
    `first`, the result is bit for bit the same for any number of workers.

    Args:
        source, estimator, stream: as for `measure`, equal for all parts.
        first, count: which replicates.
        centre: of `pilot_centre`, equal for all parts; None makes it here, at 32 further estimates, not counted.
    """
    if first < 0 or count < 1:
        raise ValueError(f"a part needs first >= 0 and count >= 1, got {first} and {count}")
    if centre is None:
        centre = pilot_centre(source, estimator, stream)
    draw = replicate_of(source, estimator)
    gradient = Moments(centre.gradient)
    latent = None if centre.latent is None else Moments(centre.latent)
    not_finite, clipped = 0, 0
    begin = time.perf_counter()
    for i in range(first, first + count):
        sample = draw(stream.child("replicate", i))
        try:
            gradient.update(sample.gradient)
            if latent is not None and sample.latent is not None:
                latent.update(sample.latent)
        except ValueError as error:
            raise ValueError(f"replicate {i} of {stream}: {error}") from error
        not_finite += sample.not_finite
        clipped += sample.clipped
    seconds = time.perf_counter() - begin
    counts = None
    if estimator is not None:
        states = count * estimator.renders
        counts = Counts(states, states * estimator.renoise, states, states * encoder_calls(source))
    policy = "" if estimator is None else estimator.policy
    return Replicates((range(first, first + count),), gradient, latent, counts, seconds, not_finite, clipped, policy)


def conclude(replicates: Replicates, stopped: str, *, converged: bool = True) -> Measurement:
    """The measurement that merged parts amount to.

    Args:
        replicates: at least two.
        stopped: one sentence, why there are no more.
        converged: whether the aim was reached.
    """
    gradient, latent = replicates.gradient, replicates.latent
    return Measurement(
        gradient.variance,
        None if latent is None else latent.variance,
        gradient.count,
        gradient.mean.clone(),
        gradient.mean_norm_squared,
        _by_replicate(replicates),
        gradient.tails,
        None if latent is None else latent.tails,
        stopped,
        converged,
        replicates.counts,
        replicates.seconds,
        replicates.not_finite,
        replicates.clipped,
        replicates.policy,
    )


def _by_replicate(replicates: Replicates) -> Float[Tensor, "n"]:
    """The squares in order of replicate, in whatever order the parts were merged."""
    index = torch.cat([torch.arange(part.start, part.stop) for part in replicates.ranges])
    return replicates.gradient.in_order[index.argsort()]


def pilot_centre(
    source: TeacherGradient | Estimator, estimator: HierarchicalEstimator | None, stream: Stream
) -> Centre:
    """The mean of 32 estimates of their own, at stream.child("centre", i): near the mean, and fixed."""
    draw = replicate_of(source, estimator)
    samples = [draw(stream.child("centre", i)) for i in range(_CENTRE_REPLICATES)]
    latents = [sample.latent for sample in samples if sample.latent is not None]
    gradient = torch.stack([sample.gradient for sample in samples]).mean(0)
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"an estimate among the first {_CENTRE_REPLICATES} of {stream} holds a NaN or an infinity")
    return Centre(gradient, torch.stack(latents).mean(0) if latents else None)


def replicate_of(
    source: TeacherGradient | Estimator, estimator: HierarchicalEstimator | None
) -> Callable[[Stream], Sample]:
    """stream -> one replicate; the checks of `measure` are done here, once."""
    if isinstance(source, TeacherGradient):
        if estimator is None:
            raise ValueError(f"{type(source).__name__} is a pipeline: say with which estimator it is to be measured")
        if estimator.sampler.law() is not estimator.sampler.proposal:
            raise ValueError("an adaptive proposal learns between replicates: freeze it, proposal = sampler.law()")
        return lambda at: _of_estimate(source, estimator, at)
    if estimator is not None:
        raise ValueError("a callable is its own estimator: pass estimator = None")
    return lambda at: Sample(_flat(source(at)), None)


def _of_estimate(task: TeacherGradient, estimator: HierarchicalEstimator, at: Stream) -> Sample:
    estimate = estimator.estimate(task, at)
    latent = estimate.f_mean.to(torch.float64).mean(0).flatten()
    return Sample(_flat(estimate.gradient), latent, int(estimate.not_finite), int(estimate.clipped))


def _flat(estimate: Tensor | Gradient) -> Float[Tensor, "D"]:
    parts = (estimate,) if isinstance(estimate, Tensor) else estimate
    return torch.cat([part.detach().to(torch.float64).flatten() for part in parts])
