"""Why less variance need not distil faster: the hypotheses of App. D.2.3, tested at equal time.

    python experiments/distill_hypotheses.py [--quick] [--out DIR] [--teacher small]

H1, auxiliary terms: the discriminator switched off. H2, diversity of inputs, and whether less variance allows a larger
learning rate: a sweep of (R, K) and the rate. H3, the data-dependent weight: a proposal that is learned while training.
Then the best K = 1 and the best K > 1 of the sweep meet again on seeds that chose neither of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tyro
from distill_curves import Axis, Histories, Measure, Paired, band, best_by, common_end, difference, over_seeds, time_to
from distill_runs import step_costs, trained
from distill_setting import DistillSetting
from fig_26_27 import BAND, spread
from records import figure, publish

from carv.report.experiment import Chart, Experiment, Figure, Table
from carv.tasks.distill.config import DistillConfig, TermEstimator
from carv.variance.values import Value

AXIS: Axis = "seconds"
EARLY = 0.75
"""The share of the time at which distances are compared: at its end all that works has reached the same floor."""


@dataclass(frozen=True)
class Settings(DistillSetting):
    """The hypotheses of App. D.2.3."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the sweep and the changed settings."""
    confirm: tuple[int, ...] = (10, 11, 12, 13, 14, 15)
    """Seeds on which the best of the sweep are compared; none of them chose."""
    renders: tuple[int, ...] = (2, 8)
    """R of the sweep."""
    renoise: tuple[int, ...] = (1, 4)
    """K of the sweep; the first is 1."""
    target: float = 5.0
    """The Frechet distance whose time decides between the best of the sweep."""
    large_rate: float = 1e-3
    """Learning rate of generator and fake score for R = 8 once more: less variance may allow a larger one."""


def main(settings: Settings) -> None:
    settings = settings.sized(confirm=(10, 11), renders=(2, 4), renoise=(1, 2))
    cells, pairs = sweep(settings), comparisons(settings)
    configs = {**cells, **{name: config for pair in pairs.values() for name, config in pair.items()}}
    costs = step_costs(settings, configs)
    found = trained(settings, configs, costs, settings.seeds)
    end = EARLY * common_end(list(found.values()), AXIS)
    chosen = best_of({name: found[name] for name in cells}, cells, end)
    confirmed = trained(settings, {name: cells[name] for name in chosen}, costs, settings.confirm)
    publish(record(settings, found, pairs, chosen, confirmed, costs, end), settings.folder("distill_hypotheses"))


def rows_of(settings: Settings) -> list[tuple[int, float]]:
    """(R, rate) of the sweep: every R at the usual rate, the last at the large one too."""
    return [
        *((renders, settings.generator_rate) for renders in settings.renders),
        (settings.renders[-1], settings.large_rate),
    ]


def sweep(settings: Settings) -> dict[str, DistillConfig]:
    """(R, K) and the learning rate, by name."""
    return {
        cell(renders, renoise, rate): settings.config(renders, renoise, generator_rate=rate, fake_rate=rate)
        for renders, rate in rows_of(settings)
        for renoise in settings.renoise
    }


def cell(renders: int, renoise: int, rate: float) -> str:
    return f"({renders}, {renoise}) at {rate:g}"


def comparisons(settings: Settings) -> dict[str, dict[str, DistillConfig]]:
    """Name -> two configurations at R = 8, in this order: K = 1 and K > 1; for H3, uniform and learned."""
    many = settings.renoise[-1]
    bare = "H1: no discriminator"
    pairs = {bare: {f"{bare}, (8, {k})": settings.config(8, k, gan_weight=0.0) for k in (1, many)}}
    plain = settings.config(8, many)
    learned = dataclasses.replace(plain, generator=TermEstimator(many, "adaptive", "per-render"))
    pairs["H3: learned proposal"] = {f"uniform, (8, {many})": plain, f"learned, (8, {many})": learned}
    return pairs


def best_of(found: Mapping[str, Histories], cells: Mapping[str, DistillConfig], end: float) -> list[str]:
    """The best cell with K = 1, then the best with K > 1, by the mean best distance at equal time."""

    def mean(name: str) -> float:
        value = over_seeds(found[name], best_by(end, AXIS))
        assert value is not None  # end is where all runs are
        return value.value

    plain = [name for name, config in cells.items() if config.generator.renoise == 1]
    return [min(plain, key=mean), min((name for name in cells if name not in plain), key=mean)]


def record(
    settings: Settings,
    found: Mapping[str, Histories],
    pairs: Mapping[str, Mapping[str, DistillConfig]],
    chosen: Sequence[str],
    confirmed: Mapping[str, Histories],
    costs: Mapping[str, Value],
    end: float,
) -> Experiment:
    """The sweep, the changed settings, and the confirmation on seeds of its own."""
    last = common_end(list(confirmed.values()), AXIS)
    compared: dict[str, Measure] = {
        f"seconds to {settings.target:g}": time_to(settings.target, AXIS),
        **{f"best by {share * last:.3g} s": best_by(share * last, AXIS) for share in (0.5, EARLY, 1.0)},
    }
    plain, many = (confirmed[name] for name in chosen)
    decided = {name: difference(many, plain, measure) for name, measure in compared.items()}
    return Experiment(
        "App. D.2.3: the hypotheses",
        "When does less variance of the distribution-matching gradient improve the distilled generator at equal time?",
        f"{settings.described()} Every run has {settings.seconds:g} such seconds; the sweep has {len(settings.seeds)} "
        f"seeds, R, K and the rate as named. Distances are the best so far at {end:.3g} s. "
        f"The best cells with K = 1 and with K > 1 are trained again at {len(settings.confirm)} seeds that chose "
        "neither. Differences are taken seed by seed, with Student's interval; they are one comparison each, not "
        "corrected for their number.",
        finding(chosen, decided, changed(found, pairs, end)),
        (
            sweep_table(settings, found, end),
            changes_table(found, pairs, end),
            Table(
                f"Best K > 1, {chosen[1]}, minus best K = 1, {chosen[0]}, on {len(settings.confirm)} fresh seeds",
                (f"{chosen[1]}", f"{chosen[0]}", "difference", "low", "high"),
                {
                    name: (
                        figure(over_seeds(many, measure)),
                        figure(over_seeds(plain, measure)),
                        *spread(decided[name]),
                    )
                    for name, measure in compared.items()
                },
            ),
            Table(
                "Seconds of one core for an update of the generator with its fake-score updates",
                ("seconds",),
                {name: (figure(cost),) for name, cost in costs.items()},
            ),
        ),
        (
            Chart(
                "The best K = 1 and the best K > 1 on fresh seeds",
                "seconds of one core",
                "best Frechet distance so far",
                {name: band(confirmed[name], AXIS) for name in chosen},
                BAND,
            ),
        ),
        config=settings.to_dict(),
    )


def sweep_table(settings: Settings, found: Mapping[str, Histories], end: float) -> Table:
    """Rows R and rate, columns K, and the difference of the last to the first."""
    rows: dict[str, tuple[Figure, ...]] = {}
    for renders, rate in rows_of(settings):
        names = [cell(renders, k, rate) for k in settings.renoise]
        gain = difference(found[names[-1]], found[names[0]], best_by(end, AXIS))
        values = [figure(over_seeds(found[name], best_by(end, AXIS))) for name in names]
        rows[f"R = {renders}, rate {rate:g}"] = (*values, *spread(gain))
    columns = (*(f"K = {k}" for k in settings.renoise), "difference", "low", "high")
    return Table(f"H2: best Frechet distance at {end:.3g} s, and last K minus first", columns, rows)


def changed(
    found: Mapping[str, Histories], pairs: Mapping[str, Mapping[str, DistillConfig]], end: float
) -> dict[str, Paired | None]:
    """Second of each pair minus the first."""
    by_then = best_by(end, AXIS)
    return {kind: difference(found[list(pair)[1]], found[next(iter(pair))], by_then) for kind, pair in pairs.items()}


def changes_table(
    found: Mapping[str, Histories], pairs: Mapping[str, Mapping[str, DistillConfig]], end: float
) -> Table:
    """H1 and H3."""
    rows: dict[str, tuple[Figure, ...]] = {}
    for kind, one in changed(found, pairs, end).items():
        first, second = (figure(over_seeds(found[name], best_by(end, AXIS))) for name in pairs[kind])
        rows[kind] = (first, second, *spread(one))
    return Table(
        f"H1 and H3: best Frechet distance at {end:.3g} s",
        ("K = 1 or uniform", "K > 1 or learned", "difference", "low", "high"),
        rows,
    )


def finding(chosen: Sequence[str], decided: Mapping[str, Paired | None], changes: Mapping[str, Paired | None]) -> str:
    """Whether the best K > 1 beats the best K = 1, and what the changed settings did."""
    plain, many = chosen
    told = "; ".join(f"{name} {verdict(one)}" for name, one in decided.items())
    rest = "; ".join(f"{kind}: {verdict(one)}" for kind, one in changes.items())
    return f"On fresh seeds the best K > 1, {many}, against the best K = 1, {plain}, seed by seed: {told}. {rest}."


def verdict(found: Paired | None) -> str:
    """In words, with the interval."""
    if found is None:
        return "not reached by all"
    word = "better" if found.high < 0 else "worse" if found.low > 0 else "not told apart"
    return f"{word}, {found}"


if __name__ == "__main__":
    main(tyro.cli(Settings))
