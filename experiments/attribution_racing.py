"""Successive halving: draws where they matter, on the candidates that may still be among a query's top clips.

The bank grows (`carv.tasks.attribution.bank`, design "strata"), so that every survivor has all draws of the rounds
before, and scores are compared on draws that all survivors share (after Karnin et al. 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from attribution_laws import Array
from attribution_setting import ValueSetting, over_sets
from attribution_trials import leave_one_out, matching_budget
from records import Row, table

from carv.density import ShiftedUniform
from carv.report.experiment import Table
from carv.tasks.attribution.bank import DrawBank

GROUPS = 8
"""Of queries, for errors of the multiplier."""


@dataclass(frozen=True)
class Plan:
    """Which candidates get how many draws.

    Attributes:
        draws: of each round, in all: B_1 < B_2 < ...
        survivors: candidates in each round, from all of them downwards.
    """

    draws: tuple[int, ...]
    survivors: tuple[int, ...]

    @property
    def cost(self) -> float:
        """Gradients for each candidate and the query, on average."""
        steps = np.diff([0, *self.draws])
        return float((steps @ np.array(self.survivors) + self.draws[-1]) / (self.survivors[0] + 1))


def halving(candidates: int, top: int, first: int, most: int) -> Plan:
    """Rounds of first, 2 first, 4 first, ... draws, each with half the candidates, until twice the top are left.

    Args:
        candidates: N.
        top: k.
        first: draws for all.
        most: draws that no round exceeds.
    """
    draws, survivors = [first], [candidates]
    while survivors[-1] > 2 * top and 2 * draws[-1] <= most:
        draws.append(2 * draws[-1])
        survivors.append(max(2 * top, -(-survivors[-1] // 2)))
    return Plan(tuple(draws), tuple(survivors))


def survivors_top(terms: Array, cells: Sequence[int], plan: Plan, top: int) -> list[int]:
    """The top candidates of one query.

    Args:
        terms: `[M, N]`, cosines with the query in each cell.
        cells: of the draws, in order.
        plan: of the rounds.
        top: how many are wanted.
    """
    left = np.arange(terms.shape[1])
    for draws, count in zip(plan.draws, (*plan.survivors[1:], top), strict=True):
        scores = terms[np.ix_(list(cells[:draws]), left)].mean(0)
        left = left[np.argsort(-scores)[:count]]
    return sorted(left.tolist())


def racing_table(settings: ValueSetting, cosines: Array) -> Table:
    """What halving saves against the same bank of strata with as many draws for every candidate."""
    pairs = leave_one_out(cosines)
    cells, queries, count = pairs.shape
    truth = np.argsort(-pairs.mean(0), -1)[:, : settings.top]
    orders = [
        DrawBank(settings.seed, "strata", ShiftedUniform(), noise="fixed", cells=cells, replicate=i)
        for i in range(settings.race_trials)
    ]
    drawn = [bank.cell(0, cells).tolist() for bank in orders]
    budgets = [2**i for i in range(20) if 2**i <= cells]
    plans = [halving(count, settings.top, first, cells) for first in settings.race_starts]

    def recall(plan: Plan) -> Array:
        """`[Q]`, the share of the whole bank's top that is found, over trials."""
        found = [
            [
                len(set(survivors_top(pairs[:, q], order, plan, settings.top)) & set(truth[q].tolist())) / settings.top
                for q in range(queries)
            ]
            for order in drawn
        ]
        return np.mean(found, 0)

    even = np.array([recall(Plan((b,), (count,))) for b in budgets])
    groups = np.array_split(np.random.default_rng(settings.seed).permutation(queries), min(GROUPS, queries // 2))
    rows: dict[str, Row] = {}
    for plan in plans:
        each = recall(plan)
        saved = []
        for group in groups:
            needed = matching_budget(budgets, even[:, group].mean(1), float(each[group].mean()))
            saved.append(None if needed is None else needed / plan.cost)
        rows[f"from {plan.draws[0]} to {plan.draws[-1]} draws, mean {plan.cost:.2f}"] = [
            over_sets([float(each[group].mean()) for group in groups]),
            over_sets(saved),
        ]
    columns = [f"share of the top {settings.top} found", "multiplier against strata"]
    return table("Successive halving of the candidates, one query at a time", columns, rows, {})
