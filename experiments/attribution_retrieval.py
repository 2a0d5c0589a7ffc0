"""What the clips that a ranking puts first share with their query: its motion, its digit, its background."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attribution_laws import Array
from attribution_setting import ValueSetting
from attribution_trials import Design, leave_one_out, shares
from records import Row, table
from torch import Tensor

from carv.report.experiment import Table
from carv.rng import stream
from carv.variance.values import Value
from carv.world.clips import Clips


def labels(clips: Clips) -> Mapping[str, Tensor]:
    """What may be shared with a query."""
    return {
        "motion": clips.motion,
        "digit": clips.digit,
        "background": clips.background,
    }


def top_shares(scores: Array, same: Array, top: int) -> Array:
    """`[..., Q]`: the share of each query's top clips that are alike.

    Args:
        scores: `[..., Q, N]`.
        same: `[Q, N]`, 1 where a clip is like the query.
        top: how many are looked at.
    """
    best = np.argpartition(-scores, top - 1, axis=-1)[..., :top]
    return np.take_along_axis(np.broadcast_to(same, scores.shape), best, -1).mean(-1)


def over_queries(each: Array) -> Value:
    """The mean with its standard error, queries being independent."""
    return Value(float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))))


def retrieval_tables(settings: ValueSetting, clips: Clips, cosines: Mapping[str, Array]) -> list[Table]:
    """For each kind of gradient what the top clips share with their query; each clip is a query."""
    columns = [f"{b} draws" for b in settings.budgets_shown]
    alike = {name: _same(of) for name, of in labels(clips).items()}
    whole: dict[str, Row] = {"chance": [over_queries(same.mean(1)) for same in alike.values()]}
    by_budget: dict[str, Row] = {}
    for kind, terms in cosines.items():
        pairs = leave_one_out(terms)
        scores = pairs.mean(0)
        whole[f"whole bank {kind}".strip()] = [
            over_queries(top_shares(scores, same, settings.top)) for same in alike.values()
        ]
        truth = scores >= -np.partition(-scores, settings.top - 1, -1)[:, settings.top - 1 : settings.top]
        wanted = {"of the motion": alike["motion"], "of the whole bank's top": truth.astype(float)}
        for what, same in wanted.items():
            found = {d: _by_budget(settings, pairs, same, d) for d in ("iid", "strata")}
            for design, row in found.items():
                by_budget[f"{what} {kind}, {design}".replace(" ,", ",")] = [over_queries(one) for one in row]
            gain = [over_queries(b - a) for a, b in zip(found["iid"], found["strata"], strict=True)]
            by_budget[f"{what} {kind}, gain".replace(" ,", ",")] = gain
    return [
        table(f"Share of the top {settings.top} like their query, by", list(alike), whole, {}),
        table(f"Share of the top {settings.top}", columns, by_budget, {}),
    ]


def _by_budget(settings: ValueSetting, pairs: Array, same: Array, design: Design) -> list[Array]:
    """For each budget `[Q]`, the mean over trials."""
    cells, queries, count = pairs.shape
    found = []
    for budget in settings.budgets_shown:
        at = stream(settings.seed, "value", design, budget)
        weights = shares(design, budget, settings.trials, cells, at)
        scores = (weights @ pairs.reshape(cells, -1)).reshape(-1, queries, count)
        found.append(top_shares(scores, same, settings.top).mean(0))
    return found


def _same(label: Tensor) -> Array:
    """`[Q, N - 1]`: 1 where another clip has the query's label."""
    return leave_one_out((label[:, None] == label[None]).double().numpy())
