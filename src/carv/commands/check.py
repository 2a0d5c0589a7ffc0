"""`carv check`: does an estimator have the same expectation as the naive one?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from carv.commands.measure import DesignConfig
from carv.console import Report
from carv.gradient import Gradient
from carv.problems import Estimator, Problem, ProblemConfig, load_source
from carv.rng import Stream, stream
from carv.variance.advice import Design
from carv.variance.bias import BiasReport, bias_test


@dataclass(frozen=True)
class CheckConfig:
    """How sure to be."""

    naive: str | None = None
    """module:object, the naive estimator (or pipeline) to compare a function of your own with."""
    tolerance: float = 0.05
    """A bias above this share of the mean gradient's length fails."""
    cap: int = 4096
    """At most so many estimates of each."""
    seed: int = 0
    """Of all randomness."""


def run_check(
    problem_config: ProblemConfig, design: DesignConfig, config: CheckConfig, quiet: bool = False
) -> BiasReport:
    """Test a function of a stream against another, or a design of a pipeline against its uniform iid draws.

    Raises:
        ValueError: a function without a naive one to compare it with; estimates that are not finite.
    """
    with Report(f"carv check: {problem_config.task}", config.cap, quiet) as report:
        ours = load_source(problem_config, report.say)
        naive: Problem | Estimator = ours
        if config.naive is not None:
            naive = load_source(dataclasses.replace(problem_config, task=config.naive), report.say)
        elif not isinstance(ours, Problem):
            raise ValueError(
                f"{problem_config.task} returns single estimates: say with --naive module:object what they are to be "
                "compared with, e.g. one uniform draw a render"
            )
        return bias_test(
            _estimates(ours, design.design),
            _counted(_estimates(naive, design.baseline), report),
            stream(config.seed, "check"),
            tolerance=config.tolerance,
            cap=config.cap,
        )


def _estimates(source: Problem | Estimator, design: Design) -> Estimator:
    if not isinstance(source, Problem):
        return source
    estimator = source.estimator(design)
    return lambda at: estimator.estimate(source.task, at).gradient


def _counted(estimator: Estimator, report: Report) -> Estimator:
    done = 0

    def call(at: Stream) -> Any:
        nonlocal done
        done += 1
        report.update(done, "at most")
        found: Gradient | Any = estimator(at)
        return found

    return call


def to_json(found: BiasReport) -> dict[str, Any]:
    """For `--json`."""
    numbers = {key: value for key, value in vars(found).items() if not dataclasses.is_dataclass(value)}
    return numbers | {"bias": vars(found.bias), "scale": vars(found.scale), "description": found.describe()}
