"""Table 3 as a record: what was measured, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import paper
from distill_phases import RENDERS, Costs
from distill_setting import Coupling, DistillSetting
from nested import Nested
from records import figure

from carv.report.experiment import Chart, Curve, Experiment, Figure, Table
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.values import Value

QUANTITIES = ("teacher score", "score difference", "parameter gradient")
DESIGNS: Mapping[str, tuple[int, Coupling]] = {
    "(8, 1) iid": (1, "iid"),
    "(8, 16) iid": (16, "iid"),
    "(8, 16) strata": (16, "per-render"),
}
CURVE_RENOISE = (1, 2, 4, 8, 16)
Found: TypeAlias = Mapping[tuple[str, str], Nested]
"""(design, quantity) -> nested variances of (1, K)."""


@dataclass(frozen=True)
class Settings(DistillSetting):
    """Table 3 and Figure 25."""

    checkpoints: tuple[int, ...] = (0, 30, 90, 240)
    """Generator updates after which the variance is measured."""
    inputs: int = 64
    """Generator inputs of each measurement, n."""
    estimates: int = 4
    """Estimates of (1, K) for each input, M."""
    brute_force: int = 48
    """Whole estimates of (8, K), at the last checkpoint."""
    generator_rate: float = 1e-4
    """Learning rate of the generator; smaller than in the other experiments, so that there is a middle of training."""
    fake_rate: float = 1e-4
    """Learning rate of the fake score and the discriminator."""


def record(
    settings: Settings,
    found: Mapping[int, Found],
    checked: Mapping[str, Value],
    phases: Mapping[str, Value],
    steps: Mapping[str, Value],
) -> Experiment:
    """Table 3 at every checkpoint, what it leaves at a fixed z, the check, and Figure 25."""
    last = settings.checkpoints[-1]
    costs = Costs.of(phases, settings.config().fake_steps)
    tables = [table_at(step, one) for step, one in found.items()]
    tables += [
        Table(
            "Gain of (8, 16) iid and (8, 16) strata over (8, 1) iid: all variance, and at a fixed z",
            [f"{design}, {what}" for design in list(DESIGNS)[1:] for what in ("z fresh", "z fixed")],
            {f"step {step}, {quantity}": gains(one, quantity) for step, one in found.items() for quantity in QUANTITIES}
            | {f"paper, {quantity}": paper_gains(quantity) for quantity in QUANTITIES},
        ),
        Table(
            f"Parameter gradient at step {last}: nested estimates beside {settings.brute_force} whole ones",
            ["nested", "brute force"],
            {
                name: (
                    figure(whole(found[last][name, QUANTITIES[2]]).measured) if name in DESIGNS else Figure(None),
                    figure(value),
                )
                for name, value in checked.items()
            },
        ),
        Table(
            "Seconds of one core at R = 8, by phase",
            ["seconds"],
            {name: (figure(value),) for name, value in phases.items()}
            | {f"a step {name}, timed whole": (figure(value),) for name, value in steps.items()},
        ),
        Table(
            "Cost of one generator input over that of one draw (teacher and fake score)",
            ["ratio"],
            {
                "generator alone": (figure(costs.ratio),),
                f"a whole step, its {settings.config().fake_steps} fake-score updates included": (
                    figure(costs.ratio_with_fake, paper.DISTILLATION_COST_RATIO),
                ),
            },
        ),
    ]
    return Experiment(
        "Table 3 and Figure 25",
        "How much variance of DMD's gradient do re-noising and strata remove, across and within generator inputs?",
        f"{settings.described()} One run at seed {settings.seeds[0]}, measured with {settings.inputs} inputs of "
        f"independent classes and {settings.estimates} estimates of (1, K) for each; variances are of (8, K): those of "
        "(1, K) over 8. Teacher score: w (z - mu_real) / (C S), the part of f that the frozen teacher gives. Errors "
        "are of a jackknife over inputs. The paper's columns are of DiT-XL/2 after 20,000 steps, in its own units: "
        "only ratios compare. Its three figures imply, by V(K) = across + within / K, -0.2 % of the parameter "
        "gradient's variance across inputs: none, as if z had been fixed.",
        finding(found, costs, last),
        tuple(tables),
        (variance_over_time(found[last], costs, steps), gains_over_steps(found)),
        config=settings.to_dict(),
    )


def table_at(step: int, found: Found) -> Table:
    """Rows: designs; columns: each quantity's variance, and its across- and within-input parts."""
    columns = [f"{quantity}{part}" for quantity in QUANTITIES for part in ("", ", across", ", within")]
    rows = {}
    for design in DESIGNS:
        row: list[Figure] = []
        for quantity in QUANTITIES:
            one = found[design, quantity]
            parts = (whole(one), over_renders(one.across), over_renders(one.within))
            theirs = (paper.TABLE_3[design][QUANTITIES.index(quantity)], None, None)
            row += [figure(part.measured, other) for part, other in zip(parts, theirs, strict=True)]
        rows[design] = tuple(row)
    return Table(f"Variance (trace of the covariance) at step {step}", tuple(columns), rows)


def whole(one: Nested) -> Jackknifed:
    """Of (8, K)."""
    return over_renders(one.variance)


def over_renders(part: Jackknifed) -> Jackknifed:
    return derived(lambda x: x / RENDERS, part)


def gain(found: Found, design: str, quantity: str, fixed: bool) -> Value:
    """Var of (8, 1) iid over Var of a design, on the same inputs."""

    def part(name: str) -> Jackknifed:
        return found[name, quantity].within if fixed else found[name, quantity].variance

    return derived(lambda a, b: a / b, part(next(iter(DESIGNS))), part(design)).measured


def gains(found: Found, quantity: str) -> tuple[Figure, ...]:
    """Of both designs, with z fresh and z fixed."""
    return tuple(
        figure(gain(found, design, quantity, fixed)) for design in list(DESIGNS)[1:] for fixed in (False, True)
    )


def paper_gains(quantity: str) -> tuple[Figure, ...]:
    """The paper's, which does not say whether z was fixed: shown in both places."""
    place = QUANTITIES.index(quantity)
    one, *others = (paper.TABLE_3[design][place] for design in DESIGNS)
    return tuple(Figure(None, None, one / other) for other in others for _ in range(2))


def variance_over_time(found: Found, costs: Costs, steps: Mapping[str, Value]) -> Chart:
    """Figure 25: the parameter gradient's variance over the seconds of a step."""
    quantity = QUANTITIES[2]
    one, strata = found["(8, 1) iid", quantity], whole(found["(8, 16) strata", quantity]).measured
    iid = [derived(lambda a, w, k=k: (a + w / k) / RENDERS, one.across, one.within).measured for k in CURVE_RENOISE]
    wide = derived(lambda v: v / 48, one.variance).measured
    lines = {
        "(8, K) iid, K = 1 to 16": ([costs.step(k).value for k in CURVE_RENOISE], iid),
        "(8, 16) strata": ([costs.step(16).value], [strata]),
        "(8, 1) and (48, 1) iid": ([steps["(8, 1)"].value, steps["(48, 1)"].value], [iid[0], wide]),
    }
    return Chart(
        "Variance of the parameter gradient against the time of a step (Fig. 25)",
        "seconds of one core for a generator update with its fake-score updates",
        "trace of the covariance",
        {
            name: Curve(tuple(x), *(tuple(v.value + s * v.error for v in y) for s in (0, -1, 1)))
            for name, (x, y) in lines.items()
        },
        "one standard error over inputs",
        log_x=True,
        log_y=True,
    )


def gains_over_steps(found: Mapping[int, Found]) -> Chart:
    """What the paper left open: the gain in the middle of training."""
    steps = tuple(float(step) for step in found)
    lines = {}
    for quantity in QUANTITIES:
        values = [gain(one, "(8, 16) strata", quantity, False) for one in found.values()]
        lines[quantity] = Curve(steps, *(tuple(v.value + s * v.error for v in values) for s in (0, -1, 1)))
    return Chart(
        "Gain of (8, 16) strata over (8, 1) iid during training",
        "generator updates",
        "variance of (8, 1) iid over that of (8, 16) strata",
        lines,
        "one standard error over inputs",
    )


def finding(found: Mapping[int, Found], costs: Costs, last: int) -> str:
    """One sentence with the numbers that matter."""
    quantity, (iid, strata) = QUANTITIES[2], list(DESIGNS)[1:]
    fresh, fixed = (
        " and by ".join(f"{gain(found[last], design, quantity, z)}" for design in (iid, strata)) for z in (False, True)
    )
    one = found[last]["(8, 1) iid", quantity]
    share = derived(lambda a, v: a / v, one.across, one.variance).measured
    return (
        f"At step {last}, {iid} and {strata} divide the variance of the parameter gradient by {fresh}; at a fixed z by "
        f"{fixed}, as the paper's 16.4 and 32: {share.scaled(100)} % of the variance of (8, 1) is across inputs, which "
        f"no re-noising touches. One input costs {costs.ratio} draws, {costs.ratio_with_fake} with its share of the "
        "fake-score updates (paper: 27, of both kinds of iteration averaged)."
    )
