"""How often the pilot's 95 % intervals cover the truth, on a task whose every variance has a closed form.

    python benchmarks/coverage.py [repetitions] [renders] [bins]

Each repetition is a pilot of its own. The target is 92 to 98 %; with 400 repetitions the coverage itself is known to
about 2.5 % (Wilson's interval is printed). All figures of a repetition come from one pilot, so the lines of a table are
correlated. `bias` is the mean of the predictions over the truth, with its error, and `error` the stated standard error
over the actual one.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np

from carv.density import Density, uniform_steps
from carv.proposals import proportional
from carv.rng import stream
from carv.strata import Coupling, global_strata, iid, nested, per_render, systematic
from carv.tasks.toy import GaussianToy
from carv.variance.jackknife import Jackknifed
from carv.variance.pilot import pilot
from carv.variance.predict import gain, predict
from carv.variance.tables import Tables
from carv.variance.values import Value

BASE = uniform_steps(20, 980)
CASES: tuple[tuple[str, GaussianToy, int | None], ...] = (
    ("mostly noise and t", GaussianToy(gain_std=0.1), None),
    ("mostly renders", GaussianToy(gain_std=0.3), None),
    ("256 parameters, projected to 128", GaussianToy(dim=256, gain_std=0.2), 128),
)


def designs(task: GaussianToy) -> dict[str, tuple[int, int, Density | None, Coupling, bool]]:
    weighted = proportional(BASE, task.weight)
    return {
        "(1, 1) iid": (1, 1, None, iid, False),
        "(1, 8) iid": (1, 8, None, iid, False),
        "(1, 8) iw": (1, 8, weighted, iid, False),
        "(1, 8) strata": (1, 8, None, per_render, False),
        "(2, 5) iw + strata": (2, 5, weighted, per_render, False),
        "(8, 1) global": (8, 1, None, global_strata, False),
        "(4, 4) nested": (4, 4, weighted, nested, False),
        "(4, 4) systematic": (4, 4, None, systematic, False),
        "(1, 8) antithetic": (1, 8, None, per_render, True),
    }


def figures(task: GaussianToy, tables: Tables) -> dict[str, Jackknifed]:
    found = {name: predict(tables, *design) for name, design in designs(task).items()}
    split = found["(1, 1) iid"].split
    return {
        **{name: prediction.variance for name, prediction in found.items()},
        "split: render": split.render,
        "split: timestep": split.timestep,
        "split: noise": split.noise,
        "gain of strata (1, 8)": gain(found["(1, 8) iid"], found["(1, 8) strata"]),
    }


def exact(task: GaussianToy) -> Tables:
    closed = task.exact(BASE)
    # <g(eps), g(-eps)>: the share of the noise in m2 changes its sign.
    antithetic = 2 * closed.within.diagonal() - closed.m2
    return Tables.exact(BASE, closed.m2, closed.within, closed.across, antithetic)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    z, share = 1.96, hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def main(repetitions: int = 400, renders: int = 40, bins: int = 16) -> None:
    for name, task, dim in CASES:
        start = time.perf_counter()
        truth = figures(task, exact(task))
        rows: dict[str, list[tuple[float, float, bool]]] = {key: [] for key in truth}
        for i in range(repetitions):
            at = stream(0, "coverage", name, i)
            options = {"renders": renders, "bins": bins, "vjp_batch": 64, "projection_dim": dim}
            for key, figure in figures(task, pilot(task, BASE, at, antithetic=True, **options)).items():
                low, high = figure.interval()
                rows[key].append((figure.value, figure.error, low <= truth[key].value <= high))
        seconds = time.perf_counter() - start
        print(f"\n{name}: {repetitions} pilots of {renders} renders x {bins} bins, {seconds:.0f} s")
        print(f"  {'':24}{'truth':>10}  {'bias':>12}  {'error':>5}  coverage of 95 %")
        for key, row in rows.items():
            values, errors, hits = (np.array(column) for column in zip(*row, strict=True))
            mean = Value(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(repetitions))
            stated = math.sqrt(np.square(errors).mean()) / values.std(ddof=1)
            low, high = wilson(int(hits.sum()), repetitions)
            line = f"  {key:24}{truth[key].value:10.4g}  {mean.scaled(1 / truth[key].value)!s:>12}  {stated:5.2f}"
            print(f"{line}  {hits.mean():.1%}  [{low:.1%}, {high:.1%}]", flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
