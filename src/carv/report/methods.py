"""Methods and their cells: what a proposal, a coupling and paired noise amount to, over R and K."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from carv.report.records import Cell
from carv.runs.pilot_folder import PilotRecord
from carv.strata import COUPLINGS
from carv.variance.advice import Cost, Design, canonical
from carv.variance.efficiency import ECM, Figure, Point, ecm, relative_efficiency
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.paired import Blocks, paired_ratio
from carv.variance.predict import PAPER_DRAWS, PAPER_RENDERS, PAPER_RENOISE, Split, predict
from carv.variance.values import Value, ratio

_COUPLING_NAMES = {"iid": "", "per-render": "Strat", "global": "Strat (global)", "nested": "Strat (nested)"}


@dataclass(frozen=True)
class Method:
    """All of a design but R and K."""

    proposal: str
    coupling: str
    antithetic: bool = False

    @property
    def name(self) -> str:
        """As the paper calls it: IW is q ~ p w, Strat is strata in each render."""
        proposal = {"uniform": "", "weight": "IW"}.get(self.proposal, f"IW ({self.proposal})")
        coupling = _COUPLING_NAMES.get(self.coupling, self.coupling)
        pairs = "antithetic" if self.antithetic else ""
        return " + ".join(part for part in (proposal, coupling, pairs) if part) or "Uniform"

    def at(self, renders: int, renoise: int) -> Design:
        """The design with R and K, named as `canonical` does."""
        return canonical(Design(renders, renoise, self.proposal, self.coupling, self.antithetic))

    @classmethod
    def of(cls, design: Design) -> Method:
        return cls(design.proposal, design.coupling, design.antithetic)


_MOST_CURVES = 6  # that can be told apart in one figure
UNIFORM = Method("uniform", "iid")

RENDERS = (*PAPER_RENDERS, 16, 32)
"""The R of predictions: the paper's, and as many more as R K <= 32 leaves room for."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One cell of one method.

    Attributes:
        method: to whose curve it belongs; the design's own coupling may have another name, see `canonical`.
        design: what was measured or predicted.
        variance: with its error, gradient squared.
        interval: 95 % of the variance.
        cost: of one estimate.
        split: of a prediction; `None` for a measurement.
        seed: of a measurement; `None` for a prediction.
        blocks: of a measurement, see `carv.variance.paired`.
    """

    method: Method
    design: Design
    variance: Figure
    interval: tuple[float, float]
    cost: Value
    split: Split | None = None
    seed: int | None = None
    blocks: Blocks | None = None

    @property
    def point(self) -> Point:
        return Point(f"{self.method.name} ({self.design.renders}, {self.design.renoise})", self.variance, self.cost)

    @property
    def cell(self) -> tuple[int, int]:
        """(R, K)."""
        return self.design.renders, self.design.renoise

    @property
    def measured(self) -> Value:
        """The variance as it is printed."""
        return self.variance.measured if isinstance(self.variance, Jackknifed) else self.variance


@dataclass(frozen=True, eq=False)
class Costing:
    """What an estimate costs.

    Attributes:
        model: gives the cost of (R, K).
        unit: "seconds" or "teacher calls".
        assumed: whether the model is an assumption, not a measurement.
    """

    model: Cost
    unit: str
    assumed: bool


def methods_of_pilot(pilot: PilotRecord, advised: Design | None) -> tuple[Method, ...]:
    """The paper's four, or as many as there are proposals for, and the advised one: at most six."""
    names = [name for name in pilot.proposals if name not in ("uniform", "defensive")]
    names = names[:2]
    methods = [UNIFORM, *(Method(name, "iid") for name in names), Method("uniform", "per-render")]
    methods += [Method(name, "per-render") for name in names]
    # Couplings that differ only for R > 1 have one curve at R = 1.
    if advised is not None and Method.of(advised).at(1, 8) not in {method.at(1, 8) for method in methods}:
        methods.append(Method.of(advised))
    if len(methods) > _MOST_CURVES:
        methods.remove(Method(names[-1], "iid"))
    return tuple(methods)


def methods_of_cells(cells: Iterable[Cell]) -> tuple[Method, ...]:
    """Those of some measurements, uniform first, then as they come."""
    found = dict.fromkeys(Method.of(canonical(cell.design)) for cell in cells)
    return tuple(sorted(found, key=lambda method: (method != UNIFORM, method.antithetic, method.coupling != "iid")))


def predicted(
    pilot: PilotRecord,
    methods: Sequence[Method],
    model: Cost,
    renders: Iterable[int] = RENDERS,
    renoise: Sequence[int] = PAPER_RENOISE,
) -> dict[Method, tuple[Entry, ...]]:
    """Every (R, K) with R K <= 32 of each method, from the tables; cells that come out negative are left out."""
    found: dict[Method, tuple[Entry, ...]] = {}
    for method in methods:
        sizes = [(r, k) for r in renders for k in renoise if r * k <= PAPER_DRAWS]
        sizes = [(r, k) for r, k in sizes if not (method.antithetic and k % 2)]
        entries = (predict_entry(pilot, method, r, k, model) for r, k in sizes)
        found[method] = tuple(entry for entry in entries if entry.variance.value > 0)
    return found


def predict_entry(pilot: PilotRecord, method: Method, renders: int, renoise: int, model: Cost) -> Entry:
    """One cell, from the tables."""
    design = method.at(renders, renoise)
    proposal, coupling = pilot.proposals.get(design.proposal), COUPLINGS[design.coupling]
    found = predict(pilot.tables, renders, renoise, proposal, coupling, design.antithetic)
    cost = model.predict(renders, renoise)
    return Entry(method, design, found.variance, found.interval, cost, found.split)


def measured(cells: Sequence[Cell], methods: Sequence[Method], model: Cost) -> dict[Method, tuple[Entry, ...]]:
    """The brute-force cells of each method, those that are the same design by definition under each of its names."""
    found: dict[Method, tuple[Entry, ...]] = {}
    for method in methods:
        here = []
        for cell in cells:
            r, k = cell.design.renders, cell.design.renoise
            if (method.antithetic and k % 2) or canonical(cell.design) != method.at(r, k):
                continue
            entry = Entry(
                method, cell.design, cell.variance, cell.interval, model.predict(r, k), None, cell.seed, cell.blocks
            )
            if cell.variance.value > 0:
                here.append(entry)
        found[method] = tuple(sorted(here, key=lambda entry: (entry.cell, entry.seed)))
    return found


def ecm_of(entry: Entry, uniform: Sequence[Entry], costing: Costing) -> ECM | None:
    """The ECM at the method's variance against uniform iid K = 1, `None` without such a baseline.

    A predicted baseline is taken at the R on both sides of the method's variance, a measured one where it was measured.

    Args:
        entry: the method's cell.
        uniform: cells of the uniform method, of the same kind.
        costing: of both.
    """
    curve = [other for other in uniform if other.design.renoise == 1 and other.seed == entry.seed]
    if not curve:
        return None
    baseline = min(curve, key=lambda other: other.design.renders)
    if canonical(baseline.design) == canonical(entry.design):
        return ECM(Value(1, 0), (1, 1), "method", baseline.point.name, entry.point.name, costing.unit, False)
    if isinstance(baseline.variance, Jackknifed):
        curve = _baseline(baseline, entry, costing.model)
    points = [other.point for other in curve]
    return ecm(baseline.point, entry.point, anchor="method", baseline_curve=points, cost=costing.unit)


def _baseline(first: Entry, entry: Entry, model: Cost) -> list[Entry]:
    """Uniform iid K = 1 at the R around the method's variance: iid is exactly ~ 1/R."""
    base = first.variance
    assert isinstance(base, Jackknifed)
    needed = first.design.renders * base.value / entry.variance.value
    curve = [first]
    for r in sorted({math.floor(needed), math.ceil(needed)} - {0, first.design.renders}):
        share = first.design.renders / r
        part = derived(lambda v, share=share: v * share, base)
        curve.append(Entry(UNIFORM, UNIFORM.at(r, 1), part, part.interval(), model.predict(r, 1)))
    return curve


def re_of(entry: Entry, uniform: Mapping[tuple[tuple[int, int], int | None], Entry]) -> Figure | None:
    """RE at the same (R, K), `None` where uniform was not measured there, or not with this seed."""
    other = uniform.get((entry.cell, entry.seed))
    if other is None:
        return None
    return Value(1, 0) if canonical(other.design) == canonical(entry.design) else variance_ratio(other, entry)


def variance_ratio(a: Entry, b: Entry) -> Figure:
    """Var_a / Var_b, paired over renders if predicted, by common random numbers if measured with one seed."""
    if isinstance(a.variance, Value) and isinstance(b.variance, Value) and a.blocks and b.blocks and a.seed == b.seed:
        alike = a.blocks["block"] == b.blocks["block"]
        return (
            paired_ratio(a.variance, b.variance, a.blocks, b.blocks).value if alike else ratio(a.variance, b.variance)
        )
    return relative_efficiency(a.variance, b.variance)
