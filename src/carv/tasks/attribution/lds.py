"""The linear datamodelling score: do influence scores say what leaving examples out will do?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from carv.rng import Stream
from carv.tasks.attribution.ranks import spearman

_FEWEST = 3  # subsets: of two a rank correlation is +-1


@dataclass(frozen=True)
class LDS:
    """A linear datamodelling score with its interval.

    Attributes:
        value: the mean over the queries.
        low, high: the bootstrap interval over subsets and queries.
        level: of the interval.
        each: `[Q]`, Spearman's correlation for each query.
        resampled: `[resamples]`, the value in each resample. Those of two scores made with the same stream are of the
            same subsets and queries, so that their difference has an interval too.
    """

    value: float
    low: float
    high: float
    level: float
    each: Float[Tensor, " Q"]
    resampled: Float[Tensor, " resamples"]

    @property
    def error(self) -> float:
        """One standard error: the deviation over the resamples."""
        return float(self.resampled.std())


def subset_scores(scores: Float[Tensor, "Q N"], subsets: Bool[Tensor, "M N"]) -> Float[Tensor, "Q M"]:
    """What additive scores predict for each query and subset: the sum of the scores of the subset's members, float64.

    Args:
        scores: `[Q, N]`, influence of training example n on query q; larger is better for the query.
        subsets: `[M, N]`, True where n is in subset m.

    Raises:
        ValueError: other shapes; scores that are not finite.
    """
    if scores.ndim != 2 or subsets.ndim != 2 or subsets.dtype != torch.bool or subsets.shape[1] != scores.shape[1]:
        raise ValueError(
            f"scores are [queries, examples] and subsets a mask [subsets, examples], got {list(scores.shape)} and "
            f"{subsets.dtype} {list(subsets.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError("the scores hold numbers that are not finite")
    return scores.double() @ subsets.double().T


def lds(
    scores: Float[Tensor, "Q N"],
    subsets: Bool[Tensor, "M N"],
    outcomes: Float[Tensor, "M Q"],
    *,
    stream: Stream,
    resamples: int = 1000,
    level: float = 0.95,
) -> LDS:
    """The linear datamodelling score of influence scores (Park et al. 2023, TRAK, Sec. 2).

        LDS = mean_q Spearman_m( sum_{n in S_m} I(q, n),  f_q(S_m) )

    with f_q(S) the outcome on query q of a model trained on S. The interval is a percentile bootstrap that draws
    subsets and queries anew, both with replacement, the same ones for scores and outcomes (Owen 2007: conservative).
    The scale of a query's scores, and a constant in them where subsets are of one size, change nothing.

    Args:
        scores: `[Q, N]`, larger for examples that help the query.
        subsets: `[M, N]`, who each of the M models was trained on; all of one size, or the size itself is predicted.
        outcomes: `[M, Q]`, larger is better: MINUS the query's loss.
        stream: which resamples are drawn.
        resamples: how many.
        level: of the interval.

    Raises:
        ValueError: shapes that do not fit; fewer than 3 subsets; numbers that are not finite; a level outside (0, 1).
    """
    predicted = subset_scores(scores, subsets)
    queries, models = predicted.shape
    if outcomes.shape != (models, queries):
        raise ValueError(f"outcomes are [subsets, queries] = [{models}, {queries}], got {list(outcomes.shape)}")
    if not torch.isfinite(outcomes).all():
        raise ValueError("the outcomes hold numbers that are not finite: did a training run diverge?")
    if models < _FEWEST or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"an LDS needs at least {_FEWEST} subsets, a level in (0, 1) and resamples, got {models}, {level} and "
            f"{resamples}"
        )
    found = outcomes.double().T
    each = spearman(predicted, found)
    generator = stream.generator()
    means = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        chosen = torch.randint(models, (models,), generator=generator)
        asked = torch.randint(queries, (queries,), generator=generator)
        means[i] = spearman(predicted[asked][:, chosen], found[asked][:, chosen]).mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return LDS(float(each.mean()), low, high, level, each, means)
