"""How sure a ranking is: errors of scores that share their draws, and what follows for ranks and for the top-k."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv.rng import Stream
from carv.student import student_quantile
from carv.tasks.attribution.bank import Design

LEVEL = 0.95
_BLOCK = 2**22
"""Resampled scores at once: 32 MB."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Scores, and errors whose products are their covariance:  Cov(s_m, s_n) = sum_j E[m, j] E[n, j].

    All examples share their draws, so their errors are correlated, and the error of a difference of two scores is
    mostly smaller than theirs suggest. E keeps that for N examples without an N x N matrix.

    Attributes:
        scores: `[N]`, float64.
        errors: `[N, M]`, E.
        degrees: of freedom of the covariance, >= 1.
    """

    scores: Float[Tensor, "N"]
    errors: Float[Tensor, "N M"]
    degrees: int

    @property
    def standard_errors(self) -> Float[Tensor, "N"]:
        """One standard error of each score."""
        lengths: Tensor = torch.linalg.vector_norm(self.errors, dim=1)
        return lengths

    def covariance(self) -> Float[Tensor, "N N"]:
        """Of all scores; N^2 numbers."""
        return self.errors @ self.errors.T

    def intervals(self, level: float = LEVEL) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """Student's interval of each score by itself: low and high.

        Raises:
            ValueError: a level outside (0, 1).
        """
        _check_level(level)
        half = student_quantile(0.5 + level / 2, self.degrees) * self.standard_errors
        return self.scores - half, self.scores + half

    def resampled(self, stream: Stream, count: int) -> Float[Tensor, "count N"]:
        """Scores as they might have been: a wild bootstrap of the errors, jointly for all examples.

            s* = s + sqrt(nu / chi2_nu) E xi,     xi ~ N(0, I_M)

        Given E this is the multivariate Student law with `degrees` nu, whose margins are those of `intervals`. Random
        signs for xi (Rademacher) would have 2^M values only, and lighter tails than the mean of few draws.

        Args:
            stream: the only source of randomness.
            count: how many.
        """
        generator = stream.generator()
        xi = torch.randn(count, self.errors.shape[1], generator=generator, dtype=torch.float64)
        chi = torch.randn(count, self.degrees, generator=generator, dtype=torch.float64).square().sum(1, keepdim=True)
        return self.scores + (self.degrees / chi).sqrt() * (xi @ self.errors.T)


def estimate(
    terms: Float[Tensor, "N B"], design: Design, position: Float[Tensor, "B"] | None = None, *, antithetic: bool = False
) -> Estimate:
    """Scores as means over draws, with errors that know how the draws were made.

        iid:     Var = s^2 / B
        strata:  Var <= 1/B^2 sum_j (c_(2j) - c_(2j-1))^2,      draws sorted by u

    The second is by collapsed strata (Cochran 1977, Sec. 5A.12). With one draw in each, no stratum has a variance of
    its own; two neighbours have the sum of theirs, plus the square of the difference of their means. The estimate is
    too large by that, never too small in expectation. For a systematic sample, whose draws share one random number, it
    is the usual stand-in: right where the noise of the draws dominates or the terms are smooth in t, without a
    guarantee where they oscillate with the sample's period.

    Args:
        terms: `draw_cosines` or `draw_products` of one query: terms of each example at each draw, weights included.
        design: how the draws' u were made. "strata" and "global": one in each of B equal strata.
        position: t or u of each draw, in whose order strata are neighbours; not needed for "iid".
        antithetic: draws 2 j and 2 j + 1 are eps and -eps at one t, so only pairs are independent.

    Raises:
        ValueError: fewer than two independent draws, an odd number of antithetic ones, shapes that do not fit, or
            numbers that are not finite.
    """
    terms, position = _units(terms, position, antithetic)
    scores, draws = terms.mean(1), terms.shape[1]
    if design == "iid":
        return Estimate(scores, (terms - scores[:, None]) / math.sqrt(draws * (draws - 1)), draws - 1)
    if position is None:
        raise ValueError(f'the error of a design of "{design}" needs the position of each draw')
    ordered = terms[:, position.argsort(stable=True)]
    pairs = draws // 2
    # Groups of two from the left; an odd draw makes the last group one of three.
    even = ordered[:, : 2 * pairs].reshape(len(terms), pairs, 2)
    errors = (even[..., 1] - even[..., 0]) / draws
    if draws % 2:
        last = ordered[:, -3:]
        three = (last - last.mean(1, keepdim=True)) * math.sqrt(1.5) / draws
        errors = torch.cat([errors[:, :-1], three], 1)
    return Estimate(scores, errors, pairs + draws % 2)


def replicated(scores: Float[Tensor, "R N"]) -> Estimate:
    """The mean of R independent banks' scores, with their spread as error: unbiased for every design, for R times the
    draws. R - 1 degrees of freedom.

    Raises:
        ValueError: fewer than two banks.
    """
    return estimate(scores.T, "iid")


@dataclass(frozen=True, eq=False)
class Ranking:
    """One query's training examples by influence, with how sure that is.

    Attributes:
        order: `[N]`, examples from the most influential on; ties by their index.
        rank: `[N]`, of each example, from 1.
        rank_low, rank_high: `[N]`, an interval of each example's rank.
        top: `[k]`, the first of `order`.
        p_top: the probability that no example outside `top` is more influential than one inside.
        p_error: Monte Carlo error of `p_top`, one standard error.
    """

    order: Int[Tensor, "N"]
    rank: Int[Tensor, "N"]
    rank_low: Int[Tensor, "N"]
    rank_high: Int[Tensor, "N"]
    top: Int[Tensor, "k"]
    p_top: float
    p_error: float


def ranking(found: Estimate, top_k: int, stream: Stream, *, level: float = LEVEL, count: int = 4000) -> Ranking:
    """The ranking of one query, its intervals and P(top-k right), from `Estimate.resampled`.

    The probability is over what the scores may be given these draws, with nothing assumed before (a flat prior; so
    examples that tie are as likely in either order). It says nothing of errors that all draws share, such as that of
    the projection.

    Args:
        found: the scores and their errors.
        top_k: k, from 1 to N - 1. At k >= N the top is everything, and right.
        stream: the only source of randomness.
        level: of the intervals of ranks.
        count: resamples; p_top has a Monte Carlo error of sqrt(p (1 - p) / count).

    Raises:
        ValueError: top_k below 1, or a level outside (0, 1).
    """
    _check_level(level)
    examples = len(found.scores)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    order = found.scores.argsort(descending=True, stable=True)
    top, rest = order[:top_k], order[top_k:]
    slack = 1e-9 * float(found.scores.abs().max())  # the same clip twice: equal but for rounding
    right, ranks = 0, []
    step = max(1, _BLOCK // examples)
    for i, first in enumerate(range(0, count, step)):
        drawn = found.resampled(stream.child("block", i), min(step, count - first))
        if len(rest):
            right += int((drawn[:, top].amin(1) >= drawn[:, rest].amax(1) - slack).sum())
        ranks.append(_ranks(drawn).to(torch.int32))
    all_ranks = torch.cat(ranks).sort(0).values
    tail = math.floor((1 - level) / 2 * count)
    p = right / count if len(rest) else 1.0
    return Ranking(
        order,
        _ranks(found.scores[None])[0],
        all_ranks[tail].long(),
        all_ranks[count - 1 - tail].long(),
        top,
        p,
        math.sqrt(p * (1 - p) / count),
    )


def order_probability(found: Estimate, above: int, below: int, stream: Stream, count: int = 4000) -> float:
    """P(example `above` is more influential than `below`), from the error of their difference; 1/2 for a tie."""
    pair = torch.tensor([above, below])
    both = Estimate(found.scores[pair], found.errors[pair], found.degrees).resampled(stream, count)
    gap = both[:, 0] - both[:, 1]
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


@dataclass(frozen=True)
class StopRule:
    """When to stop drawing: the top-k is right with probability 1 - alpha, however often one looks.

    A look at each of L budgets that would stop at P >= 1 - alpha errs up to L times as often as it says: each is one
    more chance to be fooled. So alpha is spent in equal parts:

        stop at the first look with P(top-k right) >= 1 - alpha / L

    and the chance to stop with a wrong top-k at any of them is at most alpha (Bonferroni), as far as P is right.

    Attributes:
        looks: L, the number of budgets planned, >= 1.
        alpha: what may go wrong, in (0, 1).
    """

    looks: int
    alpha: float = 1 - LEVEL

    def __post_init__(self) -> None:
        if self.looks < 1 or not 0 < self.alpha < 1:
            raise ValueError(f"a stop rule needs at least one look and 0 < alpha < 1, got {self.looks}, {self.alpha}")

    @property
    def threshold(self) -> float:
        """1 - alpha / L."""
        return 1 - self.alpha / self.looks

    def stable(self, found: Ranking) -> bool:
        """Whether to stop here: also with two Monte Carlo errors off the probability."""
        return found.p_top - 2 * found.p_error >= self.threshold


def budgets(first: int, last: int) -> tuple[int, ...]:
    """The looks: first, 2 first, 4 first, ..., last.

    Raises:
        ValueError: first below 2, or last below first.
    """
    if not 2 <= first <= last:
        raise ValueError(f"budgets need 2 <= first <= last, got first {first} and last {last}")
    found = [first]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return tuple(found)


def _units(terms: Tensor, position: Tensor | None, antithetic: bool) -> tuple[Tensor, Tensor | None]:
    if terms.ndim != 2 or 0 in terms.shape or (position is not None and position.shape != terms.shape[1:]):
        given = "none" if position is None else list(position.shape)
        raise ValueError(f"errors need terms [N, B] and positions [B], got {list(terms.shape)} and {given}")
    if not torch.isfinite(terms).all():
        raise ValueError("the terms of a score must be finite")
    if antithetic:
        if terms.shape[1] % 2:
            raise ValueError(f"antithetic draws come in pairs, got {terms.shape[1]}")
        terms = (terms[:, ::2] + terms[:, 1::2]) / 2
        position = None if position is None else position[::2]
    if terms.shape[1] < 2:
        raise ValueError("an error needs at least two independent draws")
    return terms.double(), position


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 1 along the last axis, the largest first; ties by index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[-1] + 1).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is in (0, 1), got {level}")
