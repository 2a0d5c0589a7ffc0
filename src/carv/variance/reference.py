"""Estimates against a long-run reference: their mean squared error and their direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv.estimator import HierarchicalEstimator
from carv.gradient import TeacherGradient
from carv.rng import Stream
from carv.variance.measure import Estimator, measure, replicate_of
from carv.variance.moments import TailCheck
from carv.variance.stopping import fixed_count
from carv.variance.values import Value


@dataclass(frozen=True)
class Reference:
    """The mean of many estimates, mu_GT, and how good it is.

    Attributes:
        mean: `[D]` float64.
        variance: of ONE of the estimates that it averages.
        replicates: n_GT, how many it averages.
        tails: whether that variance means anything.
    """

    mean: Float[Tensor, "D"]
    variance: Value
    replicates: int
    tails: TailCheck

    @property
    def own_variance(self) -> Value:
        """E|mu_GT - mu|^2 = Var / n_GT."""
        return self.variance.scaled(1 / self.replicates)


def reference(
    source: TeacherGradient | Estimator,
    estimator: HierarchicalEstimator | None,
    stream: Stream,
    replicates: int = 20_000,
) -> Reference:
    """The reference of Eq. 62: a mean of estimates at stream.child("reference"), so independent of `measure`'s.

    Args:
        source, estimator, stream: as for `measure`.
        replicates: n_GT, 1000 to 20 000 in the paper (Sec. C.1.1).
    """
    found = measure(source, estimator, stream.child("reference"), stop=fixed_count(replicates))
    return Reference(found.mean, found.variance, replicates, found.tails)


def mse_to_reference(
    source: TeacherGradient | Estimator,
    estimator: HierarchicalEstimator | None,
    stream: Stream,
    target: Reference,
    replicates: int = 1000,
) -> Value:
    """E|g_hat - mu|^2 = variance + |bias|^2, from distances to the reference with its own variance removed:

        1/n sum_i |g_hat_i - mu_GT|^2 - Var_GT/n_GT                                                  (Eq. 62)

    It agrees with `measure`'s variance for an unbiased estimator whose reference is unbiased. The error covers the
    spread over replicates, that of Var_GT, and that of |mu_GT - mu|^2 by its bound, sqrt(2) Var_GT/n_GT.

    Args:
        source, estimator, stream: as for `measure`; the replicates are those that it would use.
        target: of `reference`, or of another estimator of the same mean.
        replicates: n >= 2.
    """
    draw = replicate_of(source, estimator)
    squares = torch.tensor(
        [float((draw(at).gradient - target.mean).square().sum()) for at in _streams(stream, replicates)],
        dtype=torch.float64,
    )
    own = target.own_variance
    spread = float(squares.var()) / replicates
    return Value(float(squares.mean()) - own.value, math.sqrt(spread + own.error**2 + 2 * own.value**2))


def cosine_similarity(
    source: TeacherGradient | Estimator,
    estimator: HierarchicalEstimator | None,
    stream: Stream,
    target: Reference,
    replicates: int = 1000,
) -> Value:
    """The mean cosine between estimates and the mean gradient (Eq. 63, 64), 1/n sum_i <g_hat_i, mu>/(|g_hat_i| |mu|).

    The reference stands for mu in the product; its noise would make |mu| too long, so |mu|^2 is taken as
    |mu_GT|^2 - Var_GT/n_GT. The error covers the spread over replicates and, by a bound, the reference's direction.

    Args:
        source, estimator, stream, target, replicates: as for `mse_to_reference`.

    Raises:
        ValueError: a reference too noisy to have a direction; an estimate that is exactly zero.
    """
    own = target.own_variance.value
    norm_squared = float(target.mean.square().sum()) - own
    if norm_squared <= 4 * own:
        raise ValueError(
            f"the reference's direction is not known: |mu|^2 is {norm_squared:.3g} and its own variance {own:.3g}; "
            "give it more replicates"
        )
    draw = replicate_of(source, estimator)
    towards = torch.zeros_like(target.mean)
    cosines = []
    for at in _streams(stream, replicates):
        unit = torch.nn.functional.normalize(draw(at).gradient, dim=0, eps=0.0)
        towards += unit / replicates
        cosines.append(float(unit.dot(target.mean)) / math.sqrt(norm_squared))
    found = torch.tensor(cosines, dtype=torch.float64)
    if not bool(found.isfinite().all()):
        raise ValueError("an estimate is exactly zero or not finite, so it has no direction")
    # Turning the reference by a small angle changes the mean cosine only by the part of `towards` across it.
    along = float(towards.dot(target.mean)) ** 2 / float(target.mean.square().sum())
    across = max(0.0, float(towards.square().sum()) - along)
    return Value(float(found.mean()), math.sqrt(float(found.var()) / replicates + across * own / norm_squared))


def _streams(stream: Stream, replicates: int) -> list[Stream]:
    if replicates < 2:
        raise ValueError(f"an error needs at least 2 replicates, got {replicates}")
    return [stream.child("replicate", i) for i in range(replicates)]
