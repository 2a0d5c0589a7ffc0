"""`carv measure`: the variance of one estimator by brute force, beside the uniform one with the same R and K."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carv.console import Report
from carv.problems import Problem, ProblemConfig, load_source
from carv.rng import stream
from carv.runs.cell import Cell, StopConfig, run_cell
from carv.runs.store import RecordStore
from carv.variance.advice import Design, canonical
from carv.variance.measure import Measurement, measure
from carv.variance.paired import PairedRatio, paired_ratio
from carv.variance.reference import cosine_similarity, mse_to_reference, reference
from carv.variance.values import Value


@dataclass(frozen=True)
class DesignConfig:
    """One estimator of a pipeline's gradient."""

    renders: int = 1
    """R: upstream states of one estimate."""
    renoise: int = 8
    """K: draws for each state."""
    proposal: str = "uniform"
    """uniform (p itself), weight (q ~ p w), defensive, or the problem's own."""
    coupling: str = "per-render"
    """How the draws share strata: iid, per-render, global, nested, systematic."""
    antithetic: bool = False
    """Draws in pairs of opposite noise."""

    @property
    def design(self) -> Design:
        """Under its simplest name."""
        return canonical(Design(self.renders, self.renoise, self.proposal, self.coupling, self.antithetic))

    @property
    def baseline(self) -> Design:
        """Uniform iid draws with the same R and K."""
        return Design(self.renders, self.renoise, "uniform", "iid")


@dataclass(frozen=True)
class MeasureConfig:
    """How long to measure, and against what."""

    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    """When there are enough replicates."""
    baseline: bool = True
    """Also measure uniform iid draws with the same R and K, on the same renders and noise."""
    reference: int = 0
    """Estimates averaged into a long-run reference, for the squared error and the cosine to it; 0: none."""
    seed: int = 0
    """Of all randomness."""


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        record: of the estimator, as in a sweep.
        baseline: of uniform iid draws with the same R and K.
        efficiency: RE, the baseline's variance over this one's, by common random numbers.
        mse, cosine: to the reference (Eq. 62 and 64), if there is one.
    """

    record: dict[str, Any]
    baseline: dict[str, Any] | None = None
    efficiency: PairedRatio | None = None
    mse: Value | None = None
    cosine: Value | None = None


def run_measure(
    problem_config: ProblemConfig, design: DesignConfig, config: MeasureConfig, out: Path | None, quiet: bool = False
) -> Measured | Measurement:
    """Measure a design of a pipeline, or a user's own function as it is.

    With a folder the records are kept there, and those that are there already are not measured again.

    Raises:
        ValueError: bad settings; an estimate that is not finite; a folder of records that were made differently.
    """
    with Report(f"carv measure: {problem_config.task}", 2 if config.baseline else 1, quiet) as report:
        source = load_source(problem_config, report.say)
        if not isinstance(source, Problem):
            return measure(source, None, stream(config.seed, "measure"), stop=config.stop.build())
        cells = [Cell(problem_config, design.design, config.seed, config.stop)]
        if config.baseline and design.baseline != design.design:
            cells.append(Cell(problem_config, design.baseline, config.seed, config.stop))
        records = _records(cells, out, report)
        found = _with_reference(source, design.design, config, report)
    if len(records) == 1:
        return Measured(records[0], mse=found[0], cosine=found[1])
    ours, base = records
    efficiency = paired_ratio(_value(base["variance"]), _value(ours["variance"]), base["squares"], ours["squares"])
    return Measured(ours, base, efficiency, *found)


def _records(cells: list[Cell], out: Path | None, report: Report) -> list[dict[str, Any]]:
    if out is None:
        return [_run(cell, i, report) for i, cell in enumerate(cells)]
    with RecordStore(out, report.say) as store:
        known = {record["hash"]: record for record in store.records("cell")}
        records = []
        for i, cell in enumerate(cells):
            record = known.get(cell.hash) or _run(cell, i, report)
            store.check_compatible([record])
            if cell.hash not in known:
                store.append(record)
            records.append(record)
        return records


def _run(cell: Cell, index: int, report: Report) -> dict[str, Any]:
    report.say(f"measuring {cell.design}")
    record = run_cell(cell)
    report.update(index + 1)
    return record


def _with_reference(
    problem: Problem, design: Design, config: MeasureConfig, report: Report
) -> tuple[Value | None, Value | None]:
    if not config.reference:
        return None, None
    report.say(f"averaging {config.reference} estimates into a reference")
    estimator, at = problem.estimator(design), stream(config.seed, "measure")
    target = reference(problem.task, estimator, at, config.reference)
    return (
        mse_to_reference(problem.task, estimator, at, target),
        cosine_similarity(problem.task, estimator, at, target),
    )


def _value(given: dict[str, Any]) -> Value:
    return Value(given["value"], given["error"])


def summary(found: Measured | Measurement) -> str:
    """What it found, in a few lines."""
    if isinstance(found, Measurement):
        lines = [f"variance of one estimate: {found.variance}", f"|mean|^2: {found.mean_norm_squared}"]
        return "\n".join([*lines, found.tails.verdict, found.stopped])
    record = found.record
    design, counts = Design(**record["cell"]["design"]), record["counts"]
    lines = [
        f"variance of one estimate, {design}: {_value(record['variance'])}",
        f"in latent space: {_value(record['latent_variance'])}",
        f"|mean gradient|^2: {_value(record['mean_norm_squared'])}",
    ]
    if found.efficiency is not None:
        lines.append(f"relative efficiency against uniform iid at the same R and K: {found.efficiency.describe()}")
    if found.mse is not None:
        lines.append(f"squared error to the reference, without the reference's own variance: {found.mse}")
    if found.cosine is not None:
        lines.append(f"cosine to the mean gradient: {found.cosine}")
    work = (
        f"{record['replicates']} estimates: {counts['upstream']} renders, {counts['encoder']} encodings, "
        f"{counts['teacher']} teacher draws, {counts['backward']} backward passes"
    )
    lines += [record["tails"]["verdict"], f"{record['stopped']} ({work})"]
    if record["policy"]:
        lines.append(record["policy"])
    return "\n".join(lines)


def to_json(found: Measured | Measurement) -> dict[str, Any]:
    """For `--json`."""
    if isinstance(found, Measurement):
        tails = {"trusted": found.tails.trusted, "verdict": found.tails.verdict}
        return {
            "variance": vars(found.variance),
            "mean_norm_squared": vars(found.mean_norm_squared),
            "replicates": found.replicates,
            "converged": found.converged,
            "stopped": found.stopped,
            "tails": tails,
        }
    ratio = found.efficiency
    return {
        "record": found.record,
        "baseline": found.baseline,
        "relative_efficiency": None
        if ratio is None
        else {**vars(ratio.value), "paired": ratio.paired, "correlation": ratio.correlation},
        "mse_to_reference": None if found.mse is None else vars(found.mse),
        "cosine_similarity": None if found.cosine is None else vars(found.cosine),
    }
