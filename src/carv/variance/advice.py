"""What to run: the best design for a budget or a target, what it gains, what limits it, and why.

    K* = sqrt( c_upstream / c_denoise  *  sigma_w^2 / sigma_b^2 )

minimises (c_upstream + K c_denoise) (sigma_b^2 + sigma_w^2 / K), the product of cost and variance for iid draws. It
makes the decision tree of App. F.3 quantitative; the cells themselves are predicted, with their couplings, and
compared render by render.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from carv.density import Density
from carv.rng import Stream
from carv.strata import COUPLINGS, Coupling, iid
from carv.variance.efficiency import ECM, Figure, Point, comparable, ecm
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.predict import Prediction, oracle_proposal, predict
from carv.variance.tables import Tables
from carv.variance.values import Value

UNIFORM: Mapping[str, Density | None] = MappingProxyType({"uniform": None})
"""No proposal but p itself."""

SAFE: Mapping[str, Coupling] = MappingProxyType(
    {name: COUPLINGS[name] for name in ("iid", "per-render", "global", "nested")}
)
"""Couplings that are never worse than iid, for any F; `systematic` can be, so it has to be asked for."""

_SAME = 1e-10
_BOUND_SHARE = 0.01  # of p in the oracle of the bound: weights stay finite, and a gain of at most 1 % is lost


class Cost(Protocol):
    """What advice asks of a cost model: `carv.variance.cost.CostModel`, `SimulatedCost`, or a user's own."""

    def predict(self, renders: int, renoise: int) -> Value:
        """The cost of one estimate."""


@dataclass(frozen=True)
class Design:
    """What can be chosen.

    Attributes:
        renders, renoise: R and K.
        proposal, coupling: their names.
        antithetic: whether draws come in pairs of opposite noise.
    """

    renders: int
    renoise: int
    proposal: str
    coupling: str
    antithetic: bool = False

    def __str__(self) -> str:
        pairs = ", antithetic" if self.antithetic else ""
        return f"({self.renders}, {self.renoise}) {self.proposal}, {self.coupling}{pairs}"


def canonical(design: Design) -> Design:
    """The design under its simplest name; designs with one canonical name are the same by definition.

    With K' = K, or K/2 pairs of opposite noise: per-render strata with K' = 1 are iid, nested ones with K' = 1 are
    global and with R = 1 per-render, global ones with R = 1 are per-render, and a shifted lattice of one point is iid.
    """
    renders, distinct = design.renders, design.renoise // 2 if design.antithetic else design.renoise
    coupling = design.coupling
    if coupling == "nested" and distinct == 1:
        coupling = "global"
    if coupling in ("nested", "global") and renders == 1:
        coupling = "per-render"
    if distinct == 1 and (coupling == "per-render" or (coupling == "systematic" and renders == 1)):
        coupling = "iid"
    return dataclasses.replace(design, coupling=coupling)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A design with what is predicted for it.

    Attributes:
        design: what it is.
        prediction: its variance.
        cost: of one estimate.
    """

    design: Design
    prediction: Prediction
    cost: Value

    @property
    def point(self) -> Point:
        """For `carv.variance.efficiency`."""
        return Point(str(self.design), self.prediction.variance, self.cost)


@dataclass(frozen=True, eq=False)
class Bound:
    """How close a design is to what no design of its kind can pass: shares of its variance, at most 1 up to noise.

    Attributes:
        oracle: Var(oracle proposal) / Var, at the same R, K and coupling. The oracle is made from the same tables
            that judge it, so the bound is, if anything, too low.
        infinite: Var(K = infinity) / Var = sigma_b^2 / (R Var): what is left when t and eps cost nothing.
    """

    oracle: Jackknifed
    infinite: Jackknifed


@dataclass(frozen=True, eq=False)
class Advice:
    """What to run, and why.

    Attributes:
        best: the cell that was chosen. Being the best of many, its own figures are slightly optimistic.
        gain: its ECM against uniform iid K = 1, at as many renders as reach the same variance.
        bound: how much could still be won.
        best_renoise: K* for iid draws from the proposal of the best cell.
        binds: the largest part of its variance: "render", "timestep" or "noise".
        binds_clearly: whether that part is clearly larger than the next one.
        reason: one sentence.
        tied: cells that cannot be told apart from the best, from the cheapest on. With a target, those that cost no
            more and may meet it as well, and those of the same cost that do.
        cells: all that were predicted, designs that are the same by definition once.
    """

    best: Candidate
    gain: ECM
    bound: Bound
    best_renoise: Value
    binds: str
    binds_clearly: bool
    reason: str
    tied: tuple[Candidate, ...]
    cells: tuple[Candidate, ...]

    def __str__(self) -> str:
        return f"{self.best.design}: {self.gain.describe()}. {self.reason}"


def advise(
    tables: Tables,
    cost_model: Cost,
    *,
    budget: float | None = None,
    target_variance: float | None = None,
    renoise: Sequence[int] = (1, 2, 4, 8, 16, 32),
    renders: Sequence[int] = (1, 2, 4, 8),
    proposals: Mapping[str, Density | None] = UNIFORM,
    couplings: Mapping[str, Coupling] = SAFE,
    cost: str = "seconds",
    resample: Stream | None = None,
) -> Advice:
    """The best of the cells R x K x proposal x coupling, and, where the tables have them, antithetic pairs.

    With a budget: least variance among cells that cost no more. With a target: least cost among cells whose variance
    is no larger. With neither: least cost times variance, which is the largest ECM. Among equals the cheapest.

    Args:
        tables: of a pilot, or exact ones.
        cost_model: gives the cost of a cell.
        budget: the most that one estimate may cost, in the model's unit.
        target_variance: the most that its variance may be.
        renoise, renders: the K and R to try.
        proposals: name -> q; `None` is p. A proposal that was fitted to THESE tables looks better than it is.
        couplings: name -> function of `carv.strata`; of those that agree in a cell the first is named.
        cost: the unit, for the record.
        resample: for the interval of the gain, as of `carv.variance.efficiency.ecm`.

    Raises:
        ValueError: both a budget and a target; no cell that meets it; nothing to choose from; no positive variance.
    """
    if budget is not None and target_variance is not None:
        raise ValueError("give a budget or a target variance, not both")
    cells = _cells(tables, cost_model, renders, renoise, proposals, couplings)
    allowed, loss = _criterion(cells, budget, target_variance)
    least = min(_value(loss(cell)) for cell in allowed)
    equal = (cell for cell in allowed if _value(loss(cell)) <= least * (1 + _SAME))
    best = min(equal, key=lambda cell: (cell.cost.value, cell.prediction.variance.value))
    if target_variance is None:
        tied = [cell for cell in allowed if cell is not best and not comparable(loss(cell), loss(best))]
    else:
        tied = [cell for cell in cells if cell is not best and _may_meet(cell, best, target_variance)]
    tied.sort(key=lambda cell: (cell.cost.value, cell.prediction.variance.value))

    proposal, coupling = proposals[best.design.proposal], couplings[best.design.coupling]
    curve = _baseline(tables, cost_model, best)
    gain = ecm(curve[0], best.point, anchor="method", baseline_curve=curve, cost=cost, resample=resample)
    ideal = best_renoise(tables, cost_model, proposal)
    binds, clearly, share = _binding(best.prediction)
    reason = _reason(best, binds, share, ideal, cost_ratio(cost_model))
    bound = _bound(tables, best, coupling)
    return Advice(best, gain, bound, ideal, binds, clearly, reason, tuple(tied), tuple(cells))


def best_renoise(tables: Tables, cost_model: Cost, proposal: Density | None = None) -> Value:
    """K* = sqrt(c_upstream/c_denoise * sigma_w^2(q)/sigma_b^2) for iid draws from q.

    Infinite where sigma_b^2 is estimated as 0 or less, and where a draw is free; 0 where sigma_w^2 is estimated as 0 or
    less. Costs are taken as exact.

    Args:
        tables: of a pilot, or exact ones.
        cost_model: gives the cost of a cell.
        proposal: q; `None` is p.

    Raises:
        ValueError: as of `predict`.
    """
    one, relative = predict(tables, 1, 1, proposal, iid), cost_ratio(cost_model)

    def ideal(total: float | np.ndarray, between: float | np.ndarray) -> float | np.ndarray:
        within, floor = np.maximum(np.subtract(total, between), 0), np.maximum(between, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.sqrt(relative * np.divide(within, floor)))

    parts = one.variance, one.split.render
    if parts[1].value <= 0 or math.isinf(relative):
        return Value(math.inf, math.nan)
    found = derived(ideal, *parts)
    known = np.isfinite(found.without).all() and np.isfinite(found.without_block).all()
    return Value(found.value, found.error if known else math.inf)


def cost_ratio(cost_model: Cost) -> float:
    """c_upstream / c_denoise of any model: one more render against one more draw; infinite where a draw is free."""
    start = cost_model.predict(1, 1).value
    draw = cost_model.predict(1, 2).value - start
    if not draw > 0:
        return math.inf
    return max(0.0, cost_model.predict(2, 1).value - start - draw) / draw


def _cells(
    tables: Tables,
    cost_model: Cost,
    renders: Iterable[int],
    renoise: Sequence[int],
    proposals: Mapping[str, Density | None],
    couplings: Mapping[str, Coupling],
) -> list[Candidate]:
    cells: list[Candidate] = []
    pairs = (False,) if tables.antithetic is None else (False, True)
    for r in renders:
        for k in renoise:
            here: list[Candidate] = []
            for antithetic in (pair for pair in pairs if not (pair and k % 2)):
                for name, proposal in proposals.items():
                    for joint, coupling in couplings.items():
                        design = Design(r, k, name, joint, antithetic)
                        cell = _candidate(tables, cost_model, design, proposal, coupling)
                        if not any(_same(cell, other) for other in here):
                            here.append(cell)
            cells.extend(here)
    positive = [cell for cell in cells if cell.prediction.variance.value > 0]
    if not positive:
        raise ValueError("no cell to choose from has a positive variance: try more cells, or a pilot of more renders")
    return positive


def _candidate(
    tables: Tables, cost_model: Cost, design: Design, proposal: Density | None, coupling: Coupling
) -> Candidate:
    r, k = design.renders, design.renoise
    return Candidate(design, predict(tables, r, k, proposal, coupling, design.antithetic), cost_model.predict(r, k))


def _baseline(tables: Tables, cost_model: Cost, best: Candidate) -> list[Point]:
    """Uniform iid K = 1 at R = 1, and at the R on both sides of the best cell's variance: iid is exactly ~ 1/R."""
    one = _candidate(tables, cost_model, Design(1, 1, "uniform", "iid"), None, iid)
    needed = one.prediction.variance.value / best.prediction.variance.value
    others = {math.floor(needed), math.ceil(needed)} - {0, 1} if needed > 1 else set()
    more = [_candidate(tables, cost_model, Design(r, 1, "uniform", "iid"), None, iid) for r in sorted(others)]
    return [cell.point for cell in (one, *more)]


def _same(a: Candidate, b: Candidate) -> bool:
    """Whether two designs are one: equal with all renders, and without each of them."""
    x, y = a.prediction.variance, b.prediction.variance
    return np.allclose([x.value, *x.without], [y.value, *y.without], rtol=_SAME, atol=0)


def _criterion(
    cells: list[Candidate], budget: float | None, target: float | None
) -> tuple[list[Candidate], Callable[[Candidate], Figure]]:
    """The cells that are allowed, and what of them is to be small."""
    if budget is not None:
        allowed = [cell for cell in cells if cell.cost.value <= budget * (1 + _SAME)]
        if not allowed:
            least = min(cell.cost.value for cell in cells)
            raise ValueError(f"no cell costs at most {budget:g}; the cheapest costs {least:.4g}")
        return allowed, lambda cell: cell.prediction.variance
    if target is not None:
        allowed = [cell for cell in cells if cell.prediction.variance.value <= target * (1 + _SAME)]
        if not allowed:
            least = min(cell.prediction.variance.value for cell in cells)
            raise ValueError(
                f"no cell has a variance of at most {target:g}; the least is {least:.4g}: try more renders"
            )
        return allowed, lambda cell: cell.cost
    return cells, lambda cell: derived(lambda v: v * cell.cost.value, cell.prediction.variance)


def _value(figure: Figure) -> float:
    return figure.value


def _may_meet(cell: Candidate, best: Candidate, target: float) -> bool:
    """Whether a cell that costs no more than the best may meet the target as well."""
    if cell.cost.value > best.cost.value * (1 + _SAME):
        return False
    return cell.prediction.variance.value <= target or not comparable(cell.prediction.variance, Jackknifed(target))


def _binding(prediction: Prediction) -> tuple[str, bool, float]:
    """The largest part of a variance, whether it clearly is, and its share."""
    split = prediction.split
    parts = {"render": split.render, "timestep": split.timestep, "noise": split.noise}
    first, second, _ = sorted(parts, key=lambda name: -parts[name].value)
    return first, comparable(parts[first], parts[second]), parts[first].value / prediction.variance.value


_REMEDY = {
    "render": "more renders or stratified cameras help, more re-noising does not",
    "timestep": "a better proposal or finer strata help",
    "noise": "more re-noising or antithetic noise helps",
}


def _reason(best: Candidate, binds: str, share: float, ideal: Value, relative: float) -> str:
    spread = f"{(ideal.value / math.sqrt(relative)) ** 2:.3g}" if relative > 0 else "any"
    reuse = "reuse pays" if ideal.value >= 2 else "reuse does not pay"
    design = best.design
    if math.isinf(relative):
        first = "One more draw cost nothing that could be measured, so the largest K is best"
    else:
        first = (
            f"One render costs as much as {relative:.3g} draws and sigma_w^2/sigma_b^2 is {spread}, so K* is {ideal} "
            f"and {reuse}"
        )
    return (
        f"{first}; at (R, K) = ({design.renders}, {design.renoise}) the {binds} binds with {share:.0%} of the "
        f"variance, so {_REMEDY[binds]}."
    )


def _bound(tables: Tables, best: Candidate, coupling: Coupling) -> Bound:
    design, variance = best.design, best.prediction.variance
    ideal = [
        predict(
            tables,
            design.renders,
            design.renoise,
            oracle_proposal(tables, strata, _BOUND_SHARE),
            coupling,
            design.antithetic,
        ).variance
        for strata in (False, True)
    ]
    least = min([*ideal, variance], key=_value)
    return Bound(
        derived(lambda a, b: a / b, least, variance),
        derived(lambda a, b: a / b, best.prediction.split.render, variance),
    )
