"""Frechet distances of training runs: best so far, at equal steps or equal seconds, compared seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from carv.report.experiment import Curve
from carv.variance.values import Value

Axis: TypeAlias = Literal["steps", "seconds"]


@dataclass(frozen=True)
class History:
    """The evaluations of one run.

    Attributes:
        step: `[n]`, generator updates so far.
        frechet: `[n]`, the Frechet distance then.
        step_seconds: of one generator update with its fake-score updates, on a quiet core.
    """

    step: Float[np.ndarray, " n"]
    frechet: Float[np.ndarray, " n"]
    step_seconds: float

    @property
    def best(self) -> Float[np.ndarray, " n"]:
        """The smallest distance so far."""
        return np.minimum.accumulate(self.frechet)

    def along(self, axis: Axis) -> Float[np.ndarray, " n"]:
        """The evaluations' places on an axis."""
        return self.step * self.step_seconds if axis == "seconds" else self.step

    def at(self, x: float, axis: Axis, best: bool = True) -> float | None:
        """The (best) distance at a place between the first and the last evaluation, by linear interpolation; else
        `None`: nothing is extrapolated."""
        places = self.along(axis)
        if not places[0] <= x <= places[-1] * (1 + 1e-9):
            return None
        return float(np.interp(x, places, self.best if best else self.frechet))

    def reaches(self, value: float, axis: Axis) -> float | None:
        """The place at which the distance first is down to a value, by linear interpolation; `None` if it never is."""
        places, best = self.along(axis), self.best
        if best[-1] > value:
            return None
        after = int(np.argmax(best <= value))
        if after == 0:
            return float(places[0])
        share = (best[after - 1] - value) / (best[after - 1] - best[after])
        return float(places[after - 1] + share * (places[after] - places[after - 1]))


Measure: TypeAlias = Callable[[History], float | None]
"""A figure of one run; `None` if the run does not have it."""

Histories: TypeAlias = Mapping[int, History]
"""Seed -> run, of one configuration."""


def best_by(x: float, axis: Axis) -> Measure:
    """The smallest distance by x."""
    return lambda run: run.at(x, axis)


def time_to(value: float, axis: Axis) -> Measure:
    """Where the distance first is down to a value."""
    return lambda run: run.reaches(value, axis)


def last(run: History) -> float:
    """The distance at the end of the run."""
    return float(run.frechet[-1])


def over_seeds(histories: Histories, measure: Measure) -> Value | None:
    """The mean over seeds with its standard error; `None` if some run has no such figure."""
    known = np.array([value for value in map(measure, histories.values()) if value is not None])
    if len(known) < len(histories) or len(known) < 2:
        return None
    return Value(known.mean(), known.std(ddof=1) / len(known) ** 0.5)


@dataclass(frozen=True)
class Paired:
    """The mean over seeds of a difference; below 0 the first is better.

    Attributes:
        mean: with its standard error.
        low, high: Student's 95 % interval.
        seeds: how many.
    """

    mean: Value
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean} (95 % interval {self.low:.3g} to {self.high:.3g}, {self.seeds} seeds)"


def difference(ours: Histories, other: Histories, measure: Measure) -> Paired | None:
    """Ours minus the other's at the same seed; `None` if some run has no such figure.

    Runs of one seed see the same real pictures, and all are judged at the same noise.
    """
    pairs = [(measure(ours[seed]), measure(other[seed])) for seed in sorted(ours.keys() & other)]
    known = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if len(known) < len(pairs) or len(known) < 2:
        return None
    mean = Value(known.mean(), known.std(ddof=1) / len(known) ** 0.5)
    half = float(student.ppf(0.975, len(known) - 1)) * mean.error
    return Paired(mean, mean.value - half, mean.value + half, len(known))


def band(histories: Histories, axis: Axis, best: bool = True, points: int = 40) -> Curve:
    """The mean over seeds with a band of one standard deviation over them, as the paper's, where all runs are."""
    runs = list(histories.values())
    first, last = max(one.along(axis)[0] for one in runs), min(one.along(axis)[-1] for one in runs)
    places = np.linspace(first, last, points)
    values = np.array([[one.at(float(x), axis, best) for x in places] for one in runs], dtype=np.float64)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0 * values[0]
    return Curve(*(tuple(map(float, line)) for line in (places, mean, mean - spread, mean + spread)))


def common_end(runs: Sequence[Histories], axis: Axis) -> float:
    """The last place that all runs of all configurations reach."""
    return min(float(one.along(axis)[-1]) for histories in runs for one in histories.values())
