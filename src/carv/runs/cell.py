"""A cell of a sweep, its variance by brute force: a description goes in, a record comes out, nothing else matters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from carv.problems import ProblemConfig, load_problem
from carv.provenance import provenance
from carv.rng import stream
from carv.strict_json import plain
from carv.variance.advice import Design
from carv.variance.figures import as_json
from carv.variance.measure import Measurement, measure
from carv.variance.stopping import StopRule, fixed_count, paper_rule, target_error

FORMAT = 1
BLOCK = 50
"""Replicates in a block of `squares`."""

_USED = {"target": ("relative", "minimum", "every", "cap"), "paper": (), "fixed": ("cap",)}


@dataclass(frozen=True)
class StopConfig:
    """When a cell has seen enough replicates, see `carv.variance.stopping`."""

    rule: Literal["target", "paper", "fixed"] = "target"
    """target: until the variance's standard error is small; paper: Sec. D.1.1; fixed: cap replicates."""
    relative: float = 0.02
    """target: the standard error aimed at, relative to the variance."""
    minimum: int = 100
    """target: replicates before the first check."""
    every: int = 50
    """target: replicates between checks."""
    cap: int = 20_000
    """target: the most replicates; fixed: how many."""

    def __post_init__(self) -> None:
        if self.rule not in _USED:
            raise ValueError(f"unknown stop rule {self.rule!r}; use {', '.join(_USED)}")
        for field in dataclasses.fields(self)[1:]:
            if field.name not in _USED[self.rule] and getattr(self, field.name) != field.default:
                raise ValueError(f"the stop rule {self.rule!r} has no setting {field.name!r}; leave it out")
        self.build()

    def build(self) -> StopRule:
        """The rule.

        Raises:
            ValueError: numbers that no rule can have.
        """
        if self.rule == "paper":
            return paper_rule()
        if self.rule == "fixed":
            return fixed_count(self.cap)
        return target_error(self.relative, self.minimum, self.every, self.cap)

    def to_dict(self) -> dict[str, Any]:
        """The settings that this rule has."""
        return {name: getattr(self, name) for name in ("rule", *_USED[self.rule])}


@dataclass(frozen=True)
class Cell:
    """All that a measured variance depends on, apart from code and machine.

    Attributes:
        problem: which pipeline.
        design: R, K, proposal, coupling, antithetic.
        seed: of the measurement. Cells of one seed share their upstream states and noise (common random numbers).
        stop: when it ends.
    """

    problem: ProblemConfig
    design: Design
    seed: int = 0
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "problem": self.problem.to_dict(),
            "design": dataclasses.asdict(self.design),
            "seed": self.seed,
            "stop": self.stop.to_dict(),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Cell:
        """What `to_dict` gave.

        Raises:
            ValueError: settings that are missing or unknown.
        """
        try:
            problem, design = ProblemConfig.from_dict(given["problem"]), Design(**given["design"])
            return cls(problem, design, given["seed"], StopConfig(**given["stop"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this does not describe a cell: {error}") from error

    @property
    def hash(self) -> str:
        """16 hex digits of SHA-256 of the description: sorted keys, no spaces."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_cell(cell: Cell) -> dict[str, Any]:
    """The record of one cell: Var(g_hat) of its design with an error, from whole estimates.

    Replicate i draws from stream(seed, "measure").child("replicate", i) in every cell. `squares` holds the means of
    |g_hat_i - c|^2 over blocks of 50 consecutive replicates (a last block that is not full is left out), so that the
    difference of two cells of one seed can be given its own, smaller error.

    Args:
        cell: what to measure.

    Returns:
        JSON. A figure that is not finite is null. All of it but "spent" (seconds of wall-clock) is bit for bit the
        same wherever and in whatever order cells run, given the code, the machine and the number of threads.

    Raises:
        ValueError: a problem, proposal or coupling that is not known; an estimate that is not finite.
    """
    problem = load_problem(cell.problem)
    estimator = problem.estimator(cell.design)
    begin = time.perf_counter()
    found = measure(problem.task, estimator, stream(cell.seed, "measure"), stop=cell.stop.build())
    seconds = time.perf_counter() - begin
    described = {"kind": "cell", "format": FORMAT, "hash": cell.hash, "cell": cell.to_dict()}
    known = {"fingerprint": dict(problem.fingerprint), "provenance": provenance(problem.task.device)}
    record: dict[str, Any] = plain(described | known | _figures(found) | {"spent": {"seconds": seconds}})
    return record


def run_described(description: Mapping[str, Any]) -> dict[str, Any]:
    """`run_cell` of what `Cell.to_dict` gave: the function that executors run."""
    return run_cell(Cell.from_dict(description))


def block_means(squares: Tensor) -> list[float]:
    """Means over consecutive blocks of 50 numbers; a last block that is not full is left out."""
    whole = len(squares) // BLOCK
    means: list[float] = squares[: whole * BLOCK].view(whole, BLOCK).mean(1).tolist()
    return means


def _figures(found: Measurement) -> dict[str, Any]:
    tails = found.tails
    return {
        "variance": as_json(found.variance),
        "latent_variance": None if found.latent_variance is None else as_json(found.latent_variance),
        "mean_norm_squared": as_json(found.mean_norm_squared),
        "tails": {
            "trusted": tails.trusted,
            "kurtosis": tails.kurtosis,
            "top_share": tails.top_share,
            "verdict": tails.verdict,
        },
        "replicates": found.replicates,
        "converged": found.converged,
        "stopped": found.stopped,
        "counts": None if found.counts is None else dataclasses.asdict(found.counts),
        "not_finite": found.not_finite,
        "clipped": found.clipped,
        "policy": found.policy,
        "squares": {"block": BLOCK, "means": block_means(found.squares)},
    }
