"""Table 4 and Figures 6 and 28: influence from iid and from stratified draws of a bank, against the whole bank.

    python experiments/table_4.py [--quick] [--out DIR] [--teacher small]

A set of 11 clips, each in turn the query; the bank has one noise for each timestep. Rankings are compared in
Monte Carlo trials on cached gradients; variances need none, they are known exactly (`attribution_laws`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paper
import tyro
from attribution_gradients import Bank, BankSettings, gradients
from attribution_laws import Array, Terms, variance
from attribution_setting import BAND, Setting, over_sets
from attribution_splits import score_terms
from attribution_trials import Design, leave_one_out, matching_budget, rank_correlations, shares
from records import Row, curves, plain_curves, publish, table

from carv.report.experiment import Chart, Experiment, Table
from carv.rng import stream
from carv.variance.values import Value

DESIGNS: tuple[Design, ...] = ("iid", "strata")
THINNED = 3
"""Every third timestep, for motion masks."""
BEYOND = 16
"""Up to how many times the bank iid budgets go, to find what strata of most of the bank are worth."""


@dataclass(frozen=True)
class Settings(Setting):
    """Table 4, Figures 6 and 28."""


@dataclass(frozen=True)
class Found:
    """Of one set of clips.

    Attributes:
        budgets: of the designs.
        bank: whether they sample the very bank that they are compared with, all of which has no error.
        correlation: design -> mean rank correlation at each budget.
        iid: the same at `iid_budgets`.
        scores, gradient: design -> variance at each budget: mean over pairs of the score's, and over clips of the
            mean normalised gradient's.
    """

    budgets: tuple[int, ...]
    bank: bool
    correlation: Mapping[str, Array]
    iid: Mapping[int, float]
    scores: Mapping[str, Array]
    gradient: Mapping[str, Array]


def main(settings: Settings) -> None:
    settings = settings.sized()
    teacher, clips = settings.load_teacher(), settings.all_clips()
    whole = gradients(settings, teacher, clips, BankSettings())
    masked = gradients(settings, teacher, clips, BankSettings(masked=True, every=THINNED))
    found = {
        "one noise for each timestep": [of_set(settings, whole.at(at), i) for i, at in enumerate(settings.places())],
        "fresh noise": [
            of_set(settings, whole.at(at).cells(1, 2), i, reference=whole.at(at).cells(0, 2))
            for i, at in enumerate(settings.places())
        ],
        "with motion masks": [of_set(settings, masked.at(at), i) for i, at in enumerate(settings.places())],
    }
    tables = [paper_table(name, sets) for name, sets in found.items()]
    (first, *_) = found.values()
    experiment = Experiment(
        "Table 4",
        "How many draws of the bank do strata save when training clips are ranked by influence?",
        f"{settings.described()} {settings.trials} trials for each budget; iid draws with replacement. The multiplier "
        "is how many times more iid draws give the same mean rank correlation, or the same variance. Strata as many "
        "as the timesteps take each once: they ARE the bank, while as many draws with replacement miss some and "
        "repeat others, so that the last column has no finite multiplier. Fresh noise: rankings from "
        "every second timestep against those from the others, whose noise is independent. With motion masks (optical "
        f"flow, Eq. 60) the bank has every {THINNED}rd timestep.",
        finding(first),
        tuple(tables),
        charts(first),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("table_4"))


def paper_table(name: str, sets: Sequence[Found]) -> Table:
    """Table 4 of one kind of bank, at the paper's budgets as far as it has them."""
    budgets = [b for b in paper.TABLE_4_BUDGETS if b in sets[0].budgets] or list(sets[0].budgets)
    places = [paper.TABLE_4_BUDGETS.index(b) for b in budgets if b in paper.TABLE_4_BUDGETS]
    theirs = {row: [values[i] for i in places] for row, values in paper.TABLE_4.items() if len(places) == len(budgets)}
    return table(f"Table 4: {name}", [f"{b} draws" for b in budgets], table_rows(sets, budgets), theirs)


def budgets_of(cells: int) -> tuple[int, ...]:
    """2, 4, 8, ... and all of a bank."""
    return (*(2**i for i in range(1, 20) if 2**i < cells), cells)


def iid_budgets(cells: int) -> list[int]:
    """From 2 to `BEYOND` times the bank, by half powers of 2."""
    steps = int(2 * np.log2(cells * BEYOND))
    return sorted({round(2 ** (i / 2)) for i in range(2, steps + 1)})


def of_set(settings: Setting, bank: Bank, number: int, reference: Bank | None = None) -> Found:
    """What iid and stratified draws of the bank give for one set.

    Args:
        settings: trials and seed.
        bank: gradients of the set's clips.
        number: of the set.
        reference: gradients with other noise, for the ranking that is compared with; otherwise the bank itself.
    """
    cosines = bank.cosines()
    cells, pairs = len(cosines), leave_one_out(cosines)
    truth = (pairs if reference is None else leave_one_out(reference.cosines())).mean(0)

    def correlations(design: Design, budgets: Sequence[int]) -> Array:
        at = stream(settings.seed, "table 4", number, design)
        each = [shares(design, b, settings.trials, cells, at.child(b)) for b in budgets]
        return np.array([rank_correlations(pairs, truth, weights).mean() for weights in each])

    scores = Terms.fixed(score_terms(cosines))
    units = [Terms.fixed(rows.double().numpy()) for rows in bank.directions]
    budgets = budgets_of(cells)
    return Found(
        budgets,
        reference is None,
        {design: correlations(design, budgets) for design in DESIGNS},
        dict(zip(iid_budgets(cells), correlations("iid", iid_budgets(cells)).tolist(), strict=True)),
        {d: np.array([variance(scores, d, b).mean() for b in budgets]) for d in DESIGNS},
        {d: np.array([np.mean([variance(unit, d, b).sum() for unit in units]) for b in budgets]) for d in DESIGNS},
    )


def table_rows(sets: Sequence[Found], budgets: Sequence[int]) -> dict[str, Row]:
    """The rows of Table 4, and two multipliers from variances."""
    where = [sets[0].budgets.index(b) for b in budgets]
    correlations = {
        f"rank correlation, {d}": [over_sets([float(one.correlation[d][i]) for one in sets]) for i in where]
        for d in DESIGNS
    }
    rows = {
        **correlations,
        "multiplier from correlation": [over_sets([multiplier(one, i) for one in sets]) for i in where],
    }
    if sets[0].bank:
        rows["multiplier from score variance"] = [over_sets([ratio(one.scores, i) for one in sets]) for i in where]
        rows["multiplier from gradient variance"] = [over_sets([ratio(one.gradient, i) for one in sets]) for i in where]
    return rows


def multiplier(found: Found, i: int) -> float | None:
    """How many times the budget iid draws need for the rank correlation of strata; `None` for the whole bank."""
    budget = found.budgets[i]
    if budget == found.budgets[-1]:
        return None
    target = float(found.correlation["strata"][i])
    needed = matching_budget(list(found.iid), np.array(list(found.iid.values())), target)
    return None if needed is None else needed / budget


def ratio(variances: Mapping[str, Array], i: int) -> float | None:
    """Var_iid / Var_strata at one budget: iid variance goes as 1 / B, so it is a multiplier. `None`: no variance."""
    below, above = float(variances["strata"][i]), float(variances["iid"][i])
    return None if below <= 1e-9 * above else above / below


def charts(sets: Sequence[Found]) -> tuple[Chart, ...]:
    """Figures 6 and 28."""
    budgets = sets[0].budgets
    x = "B, draws for each clip"

    def means(of: str) -> dict[str, Row]:
        count = range(len(budgets))
        return {d: [over_sets([float(getattr(one, of)[d][i]) for one in sets]) for i in count] for d in DESIGNS}

    correlation = means("correlation")
    short = {name: [at_least(v) for v in row[: len(budgets) - (name == "strata")]] for name, row in correlation.items()}
    missing = {name: [None if v is None else Value(1 - v.value, v.error) for v in row] for name, row in short.items()}
    theirs = {f"paper: {d}": paper.TABLE_4[f"rank correlation, {d}"] for d in DESIGNS}
    rows = table_rows(sets, budgets)
    multipliers = {name: row[:-1] for name, row in rows.items() if name.startswith("multiplier")}
    return (
        Chart(
            "Rank correlation with the whole bank",
            x,
            "Spearman's correlation",
            curves(budgets, correlation) | plain_curves(paper.TABLE_4_BUDGETS, theirs),
            BAND,
            log_x=True,
        ),
        Chart(
            "What is missing of it",
            x,
            "1 - Spearman's correlation",
            {name: one for n, row in missing.items() for name, one in curves(budgets[: len(row)], {n: row}).items()},
            BAND,
            log_x=True,
            log_y=True,
        ),
        Chart(
            "Variance of the mean normalised gradient",
            x,
            "tr Cov",
            curves(budgets[:-1], {name: row[:-1] for name, row in means("gradient").items()}),
            BAND,
            log_x=True,
            log_y=True,
        ),
        Chart(
            "How many times the draws iid sampling needs",
            x,
            "effective compute multiplier",
            curves(budgets[:-1], multipliers)
            | plain_curves(paper.TABLE_4_BUDGETS[:-1], {"paper": paper.TABLE_4["multiplier from correlation"][:-1]}),
            BAND,
            log_x=True,
        ),
    )


def at_least(value: Value | None) -> Value | None:
    """Not so near 1 that its band would leave a logarithmic axis."""
    if value is None or value.value + value.error >= 1:
        return None
    return value


def finding(sets: Sequence[Found]) -> str:
    budgets = sets[0].budgets[1:-1]
    row = table_rows(sets, budgets)["multiplier from correlation"]
    known = [(b, v) for b, v in zip(budgets, row, strict=True) if v is not None]
    sure = [v for _, v in known if v.value - 2 * v.error > 1]
    listed = ", ".join(f"{v.times()} at {b}" for b, v in known)
    return (
        f"Strata give the rank correlation of more iid draws: {listed}; above 1 by two standard errors at {len(sure)} "
        f"of {len(known)} budgets (paper: 1.8 to 3.8 from 4 to 256 draws)."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
