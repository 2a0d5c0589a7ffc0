"""Beyond Table 4: which designs of the draws (t, eps) beat the paper's strata for influence scores, and what bounds it?

    python experiments/attribution_designs.py [--quick] [--out DIR] [--teacher small]

A bank has three noises for (nearly) each timestep: eps, its negative, and another. They give the variance of a score
its parts, and the variance of any design exactly (`attribution_laws`), with fresh noise for every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tyro
from attribution_gradients import BankSettings, gradients
from attribution_laws import Array, Terms, variance
from attribution_setting import BAND, Setting, over_sets
from attribution_splits import Split, ranked_terms, root_proposal, score_terms, split
from records import Row, beside, curves, publish, table

from carv.report.experiment import Chart, Experiment
from carv.variance.values import Value

BUDGETS = (4, 8, 16, 32, 64, 128, 256)
THINNED = 3
"""Every third timestep has the antithetic noise, too; the next one gives an independent noise."""

TERMS: Mapping[str, Callable[[Array], Array]] = {"scores": score_terms, "what ranks see": ranked_terms}


@dataclass(frozen=True)
class Settings(Setting):
    """Designs of draws for attribution."""

    bins: int = 24
    """Of t, for the tuned proposal."""
    share: float = 0.1
    """Of p in it."""


@dataclass(frozen=True)
class Known:
    """Terms of one set of clips, `[M, P]`: at eps, at -eps, and at another noise."""

    first: Array
    antithetic: Array
    second: Array

    @classmethod
    def centred(cls, *three: Array) -> Known:
        """Less the mean of each column. It changes no variance of unweighted draws, and makes errors smaller; weighted
        ones are then, to first order, those of estimates whose weights are divided by their mean."""
        mean = np.mean(three, (0, 1))
        return cls(*(one - mean for one in three))

    @property
    def fresh(self) -> Terms:
        return Terms.fresh(self.first, self.second)

    @property
    def pairs(self) -> Terms:
        """Means over eps and -eps."""
        both = (self.first + self.antithetic) / 2
        return Terms(both**2, both, self.second)


def main(settings: Settings) -> None:
    settings = settings.sized(bins=4)
    teacher, clips = settings.load_teacher(), settings.all_clips()
    whole = gradients(settings, teacher, clips, BankSettings())
    antithetic = gradients(settings, teacher, clips, BankSettings(sign=-1, every=THINNED))
    banks = [whole.cells(1, THINNED), antithetic, whole.cells(2, THINNED)]
    cosines = [[bank.at(place).cosines() for bank in banks] for place in settings.places()]
    known = {name: [Known.centred(*map(terms, three)) for three in cosines] for name, terms in TERMS.items()}
    splits = {name: [split(one.first, one.antithetic, one.second) for one in sets] for name, sets in known.items()}
    budgets = [b for b in BUDGETS if b <= settings.cells // THINNED // 2]
    cases = fresh_cases(settings, known["what ranks see"])
    fresh = multipliers(cases, budgets, (*UNIFORM, "tuned", "tuned strata"))
    against = multipliers(cases, budgets, ("systematic", "antithetic strata", "tuned strata"), "strata")
    scores = multipliers(fresh_cases(settings, known["scores"]), budgets, UNIFORM)
    fixed_budgets = [b for b in BUDGETS if b < settings.cells]
    everything = [ranked_terms(whole.at(place).cosines()) for place in settings.places()]
    bank = [Terms.fixed(one - one.mean(0)) for one in everything]
    fixed = multipliers(
        [replace(case, terms=terms) for case, terms in zip(cases, bank, strict=True)], fixed_budgets, FIXED
    )
    columns, fixed_columns = ([f"{b} draws" for b in some] for some in (budgets, fixed_budgets))
    experiment = Experiment(
        "Attribution designs",
        "Which design of the draws saves at least twice the budget that the paper's strata save?",
        f"{settings.described()} Variances are exact for the bank; fresh noise means noise of its own for every draw, "
        f"and is known from timesteps next to each other, taken as one. The multiplier is how many times more iid "
        "draws have the same variance, at the same cost in gradients. Tuned proposals q ~ p sqrt(moment at t), with a "
        f"share of {settings.share:g} of p, are fitted to the other sets; their weights are divided by their mean. An "
        "antithetic pair is two draws. What ranks see: scores less their mean over the candidates.",
        finding(splits["what ranks see"], fresh, against, budgets),
        (
            table("Shares of the variance of one draw", list(PARTS), of_splits(splits, PARTS), {}),
            table(
                "Multiplier that no such design can exceed, fresh noise", list(BOUNDS), of_splits(splits, BOUNDS), {}
            ),
            table("Multiplier against iid, fresh noise: what ranks see", columns, fresh, {}),
            table("Multiplier against strata, fresh noise: what ranks see", columns, against, {}),
            table("Multiplier against iid, fresh noise: scores", columns, scores, {}),
            table("Multiplier against iid, one noise for each timestep: what ranks see", fixed_columns, fixed, {}),
        ),
        (
            Chart(
                "Multiplier against iid: what ranks see",
                "B, draws",
                "multiplier",
                curves(budgets, fresh),
                BAND,
                log_x=True,
            ),
            Chart(
                "Multiplier against iid: scores", "B, draws", "multiplier", curves(budgets, scores), BAND, log_x=True
            ),
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("attribution_designs"))


PARTS: Mapping[str, Callable[[Split], float]] = {
    "between timesteps": lambda s: s.timesteps / s.total,
    "noise, odd": lambda s: s.odd / s.total,
    "noise, even": lambda s: s.even / s.total,
}

BOUNDS: Mapping[str, Callable[[Split], float]] = {
    "strata": lambda s: s.total / s.noise,
    "antithetic": lambda s: s.total / (2 * s.even),
}
"""Timesteps without error; and the odd part of the noise without error too, with half as many noises."""


def of_splits(splits: Mapping[str, Sequence[Split]], columns: Mapping[str, Callable[[Split], float]]) -> dict[str, Row]:
    """One row for each kind of terms."""
    return {name: [over_sets([f(one) for one in sets]) for f in columns.values()] for name, sets in splits.items()}


@dataclass(frozen=True)
class Case:
    """One set of clips, and the proposals fitted to the others.

    Attributes:
        terms: of single draws.
        pairs: of antithetic pairs.
        tuned, tuned_strata: proposals for iid draws and for strata, in bins of t.
    """

    terms: Terms
    pairs: Terms
    tuned: Array
    tuned_strata: Array

    def variance(self, design: str, budget: int) -> float:
        """Summed over columns."""
        cells = len(self.terms.square)
        found = {
            "iid": lambda: variance(self.terms, "iid", budget),
            "strata": lambda: variance(self.terms, "strata", budget),
            "systematic": lambda: variance(self.terms, "systematic", budget),
            "antithetic strata": lambda: variance(self.pairs, "strata", budget // 2),
            "tuned": lambda: variance(self.terms, "iid", budget, spread(self.tuned, cells)),
            "tuned strata": lambda: variance(self.terms, "strata", budget, spread(self.tuned_strata, cells)),
        }
        return float(found[design]().sum())


UNIFORM = ("strata", "systematic", "antithetic strata")
FIXED = ("strata", "systematic", "tuned strata")


def fresh_cases(settings: Settings, sets: Sequence[Known]) -> list[Case]:
    """Each set with the proposals of the others."""
    cases = []
    for i, one in enumerate(sets):
        others = [other for j, other in enumerate(sets) if j != i]
        square = np.mean([other.fresh.square.sum(1) for other in others], 0)
        noise = np.mean([((other.first - other.second) ** 2).sum(1) / 2 for other in others], 0)
        laws = (root_proposal(moment, settings.bins, settings.share) for moment in (square, noise))
        cases.append(Case(one.fresh, one.pairs, *laws))
    return cases


def spread(law: Array, cells: int) -> Array:
    """A law of cells, for another number of cells."""
    at = (np.arange(cells) + 0.5) / cells * len(law)
    found = law[at.astype(int)]
    return np.asarray(found / found.sum())


def multipliers(
    cases: Sequence[Case], budgets: Sequence[int], designs: Sequence[str], baseline: str = "iid"
) -> dict[str, Row]:
    """Design -> Var_baseline / Var at each budget; `None` where nothing is left of the variance."""

    def one(case: Case, design: str, budget: int) -> float | None:
        above, below = case.variance(baseline, budget), case.variance(design, budget)
        return None if below <= 1e-9 * above else above / below

    return {d: [over_sets([one(case, d, b) for case in cases]) for b in budgets] for d in designs}


def finding(
    splits: Sequence[Split], rows: Mapping[str, Row], against: Mapping[str, Row], budgets: Sequence[int]
) -> str:
    in_t, both = (over_sets([bound(one) for one in splits]) for bound in BOUNDS.values())
    noise, odd = (over_sets([part(one) / one.total for one in splits]) for part in (lambda s: s.noise, lambda s: s.odd))
    at = budgets.index(32) if 32 in budgets else len(budgets) - 1
    best = max(against, key=lambda d: value(against[d][at]))
    reach = "within the reach" if value(both) >= 2 * value(in_t) else "out of the reach"
    return (
        f"Of what ranks see in one draw, {percent(noise)} is noise at a given t, so that no choice of timesteps saves "
        f"more than {beside(in_t)}; {percent(odd)} changes its sign with the noise, and antithetic pairs raise the "
        f"bound to {beside(both)}. With {budgets[at]} draws strata save {beside(rows['strata'][at])}, and the best "
        f"design ({best}) {beside(against[best][at])} of that again. Twice the saving of strata is {reach} of designs "
        "of timesteps and signs."
    )


def value(one: Value | None) -> float:
    return -np.inf if one is None else one.value


def percent(one: Value | None) -> str:
    return "an unknown share" if one is None else f"{one.scaled(100)} %"


if __name__ == "__main__":
    main(tyro.cli(Settings))
