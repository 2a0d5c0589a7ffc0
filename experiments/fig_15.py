"""Figure 15: the cosine of an estimate with the true gradient, against its cost, by brute force (App. D.1.4).

    python experiments/fig_15.py [--quick] [--out DIR] [--teacher small]

The true gradient is not known. With an independent reference mu + e in its place the cosine is too small, by the factor
|mu| / |mu + e|; so |mu|^2 is estimated from inner products of independent parts of the reference instead:

    E cos(g, mu) = E<g/|g|, reference> / sqrt(E<part, other part>)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tyro
from records import Row, curves, publish, table
from replicates import Products, Reference, reference, replicates
from sds_pilots import checkpoints, pilots
from sds_setting import PROMPTS, Setting

from carv.problems import ProblemConfig, load_problem
from carv.report.experiment import Chart, Curve, Experiment
from carv.rng import stream
from carv.variance.advice import Design
from carv.variance.predict import PAPER_DRAWS, PAPER_RENDERS, PAPER_RENOISE
from carv.variance.values import Value

METHODS = {"uniform": ("uniform", "iid"), "IW + strata": ("weight", "per-render")}
GRID = [(r, k) for r in PAPER_RENDERS for k in PAPER_RENOISE if r * k <= PAPER_DRAWS]


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 15."""

    prompts: tuple[str, ...] = PROMPTS[2:3]
    """The first one is used, with the first seed."""
    replicates: int = 128
    """Estimates with one render, of each method and K; those with R renders are means of R of them."""
    reference: int = 512
    """Estimates in the reference."""
    blocks: int = 16
    """Independent parts of the reference."""


def main(settings: Settings) -> None:
    settings = settings.sized(replicates=8, reference=8, blocks=4)
    settings = dataclasses.replace(settings, prompts=settings.prompts[:1], seeds=settings.seeds[:1])
    ((subject, record),) = pilots(settings).items()
    folder = checkpoints(settings, subject)[settings.steps]
    problem = load_problem(ProblemConfig("sds", run=folder))
    own = folder / f"cosine-{settings.replicates}-{settings.reference}-{settings.blocks}"
    at = stream(settings.pilot.seed, "cosine")
    truth = reference(
        problem,
        Design(1, 16, "weight", "per-render"),
        at.child("reference"),
        settings.reference,
        settings.blocks,
        own / "reference",
    )
    found = {
        (name, k): replicates(
            problem, Design(1, k, *method), at.child(name, k), settings.replicates, truth, own / f"{method[0]}-{k}"
        )
        for name, method in METHODS.items()
        for k in PAPER_RENOISE
    }
    one = record.cost.predict(1, 1).value
    costs = {(r, k): record.cost.predict(r, k).scaled(1 / one) for r, k in GRID}
    cosines = {str(cell): [mean_cosine(found[name, cell[1]], truth, cell[0]) for name in METHODS] for cell in GRID}
    bias = shrinkage(truth)
    experiment = Experiment(
        "Figure 15",
        "How near in direction is an estimate to the true gradient, for what it costs?",
        f"{settings.described(1)} Beside it {settings.replicates} estimates of each method and K by brute force, and "
        f"a reference of {settings.reference} estimates in {settings.blocks} parts. The reference's own noise makes a "
        f"cosine with it too small by a factor of {'unknown size' if bias is None else bias}, for which the cosines "
        "here are corrected. Errors are over replicates and over the reference's parts.",
        finding(cosines, costs),
        (
            table(
                "Expected cosine with the true gradient, and cost over that of uniform (1, 1)",
                [*METHODS, "cost"],
                {str(cell): [*cosines[str(cell)], costs[cell]] for cell in GRID},
                {},
            ),
        ),
        (
            Chart(
                "Cosine against cost",
                "cost over that of uniform (1, 1)",
                "expected cosine with the true gradient",
                lines(cosines, costs),
                "one standard error over replicates and the reference",
                log_x=True,
            ),
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_15"))


def mean_cosine(products: Products, truth: Reference, renders: int) -> Value | None:
    """E cos(g, mu) of estimates with R renders; `None` of fewer than two, or if the reference is too short for it."""
    cross, norm = (part.numpy() for part in products.averaged(renders))
    if len(norm) < 2:
        return None
    along = cross / norm[:, None]  # <g/|g|, block>

    def cosine(kept: np.ndarray) -> float:
        length = true_length(truth, kept)
        return float(along[:, kept].mean()) / length if length > 0 else math.nan

    whole = np.arange(len(truth.blocks))
    if not math.isfinite(cosine(whole)):
        return None
    over_replicates = float(along.mean(1).std(ddof=1)) / math.sqrt(len(along)) / true_length(truth, whole)
    error = math.hypot(over_replicates, jackknife_error(cosine, len(whole)))
    return Value(cosine(whole), error) if math.isfinite(error) else None


def shrinkage(truth: Reference) -> Value | None:
    """|mu| / |mu + e|: the factor by which a cosine with the reference itself is too small."""

    def factor(kept: np.ndarray) -> float:
        gram = truth.gram.numpy()[np.ix_(kept, kept)]
        return true_length(truth, kept) / math.sqrt(float(gram.mean()))

    whole = np.arange(len(truth.blocks))
    value, error = factor(whole), jackknife_error(factor, len(whole))
    return Value(value, error) if value > 0 and math.isfinite(error) else None


def true_length(truth: Reference, kept: np.ndarray) -> float:
    """|mu|: the root of the mean inner product of two different blocks; 0 where that is not positive."""
    gram, n = truth.gram.numpy()[np.ix_(kept, kept)], len(kept)
    return math.sqrt(max(0.0, float(gram.sum() - gram.trace()) / (n * (n - 1))))


def jackknife_error(function: Callable[[np.ndarray], float], count: int) -> float:
    """The standard error of a function of blocks, from leaving each out."""
    without = np.array([function(np.delete(np.arange(count), b)) for b in range(count)])
    return math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))


def lines(cosines: Mapping[str, Row], costs: Mapping[tuple[int, int], Value]) -> dict[str, Curve]:
    """One for each method and R, over K."""
    drawn: dict[str, Curve] = {}
    for renders in PAPER_RENDERS:
        cells = [cell for cell in GRID if cell[0] == renders]
        rows = {f"{name}, R = {renders}": [cosines[str(c)][i] for c in cells] for i, name in enumerate(METHODS)}
        drawn |= curves([costs[cell].value for cell in cells], rows)
    return drawn


def finding(cosines: Mapping[str, Row], costs: Mapping[tuple[int, int], Value]) -> str:
    """The paper's two runs of equal cost, and the smallest estimate."""
    small, plain, both = cosines["(1, 1)"][0], cosines["(4, 1)"][0], cosines["(1, 16)"][1]
    return (
        f"Uniform (1, 1) has a cosine of {small}, uniform (4, 1) of {plain} at {costs[4, 1]} times the cost, and "
        f"IW + strata (1, 16) of {both} at {costs[1, 16]} times; the paper finds IW + strata better at equal cost."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
