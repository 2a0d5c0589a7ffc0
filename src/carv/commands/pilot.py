"""`carv pilot`: the tables from which the variance of every design follows, and what the work costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carv.console import Report
from carv.gradient import Renders, TeacherGradient
from carv.problems import Problem, ProblemConfig, load_problem
from carv.provenance import provenance
from carv.rng import Stream, stream
from carv.runs.pilot_folder import PilotRecord
from carv.strata import iid, per_render
from carv.variance.advice import Design
from carv.variance.cost import StepCost, fit_cost, measure_cost
from carv.variance.efficiency import Point, ecm
from carv.variance.moments import TRUSTED_SHARE
from carv.variance.pilot import MEMORY_LIMIT, pilot
from carv.variance.predict import predict
from carv.variance.tables import Tables

TIMED = ((1, 1), (1, 4), (1, 32), (2, 1), (2, 16), (4, 1))
"""Cells (R, K) that tell fixed, upstream and teacher costs apart."""

_AUTOMATIC_DIM = 4096
_SHOWN = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class PilotConfig:
    """How much to measure."""

    renders: int = 40
    """R0: independent renders, the units of every interval."""
    bins: int = 16
    """M: bins of t, equal in p-mass."""
    noises: int = 2
    """N: draws in each bin, each with a timestep and a noise of its own."""
    antithetic: bool = True
    """Also measure pairs eps, -eps: 1/N more draws."""
    projection_dim: int | None = None
    """Keep a random projection of each gradient, of this length; by default only if they do not fit in memory."""
    micro_batch: int | None = 32
    """At most how many draws the teacher sees at once."""
    repetitions: int = 15
    """Of each timing."""
    seed: int = 0
    """Of all randomness."""


def run_pilot(problem_config: ProblemConfig, config: PilotConfig, out: Path, quiet: bool = False) -> PilotRecord:
    """Time some steps side by side, measure the tables, and save both.

    Args:
        problem_config: what to measure.
        config: how much.
        out: the folder.
        quiet: say nothing but errors.

    Raises:
        ValueError: bad settings; a gradient that is not finite.
        OSError: a folder that cannot be written, which is found out before the work.
    """
    out.mkdir(parents=True, exist_ok=True)
    with Report(f"carv pilot: {problem_config.task}", config.renders, quiet) as report:
        problem = load_problem(problem_config, report.say)
        projection_dim = config.projection_dim or _projection(problem, config, report)
        report.say("timing estimates side by side")
        timed = time_cells(problem, TIMED, stream(config.seed, "cost"), config.repetitions, config.micro_batch)
        tables = pilot(
            problem.task,
            problem.base,
            stream(config.seed, "pilot"),
            renders=config.renders,
            bins=config.bins,
            noises=config.noises,
            antithetic=config.antithetic,
            projection_dim=projection_dim,
            micro_batch=config.micro_batch,
            progress=lambda done, _: report.update(done, "renders"),
        )
    weight = problem.weight
    record = PilotRecord(
        problem_config,
        tables,
        problem.proposals,
        None if weight is None else (weight.formula, tuple(weight(tables.t).tolist())),
        timed,
        fit_cost({cell: step.seconds for cell, step in timed.items()}),
        config.seed,
        dataclasses.asdict(config),
        problem.fingerprint,
        provenance(problem.task.device),
    )
    record.save(out)
    return record


def time_cells(
    problem: Problem, cells: tuple[tuple[int, int], ...], at: Stream, repetitions: int, micro_batch: int | None
) -> dict[tuple[int, int], StepCost]:
    """Seconds of one uniform iid estimate at each (R, K), interleaved."""

    def step(renders: int, renoise: int) -> Any:
        estimator = problem.estimator(Design(renders, renoise, "uniform", "iid"), micro_batch)
        return lambda: estimator.estimate(problem.task, at.child("step"))

    steps = {f"{r},{k}": step(r, k) for r, k in cells}
    found = measure_cost(steps, at, repetitions=repetitions, device=problem.task.device)
    return {(r, k): found[f"{r},{k}"] for r, k in cells}


def _projection(problem: Problem, config: PilotConfig, report: Report) -> int | None:
    """The length of a projection, if all gradients would not fit in memory."""
    needed = config.renders * config.bins * _gradient_bytes(problem.task)
    if needed <= MEMORY_LIMIT:
        return None
    report.say(f"{needed / 2**30:.1f} GiB of gradients do not fit: keeping projections of length {_AUTOMATIC_DIM}")
    return _AUTOMATIC_DIM


def _gradient_bytes(task: TeacherGradient) -> int:
    state = task.upstream(Renders((stream(0, "size"),), 0, 1))
    f = torch.zeros((1, *task.latent_shape), dtype=task.dtype, device=task.device)
    return sum(part.numel() * part.element_size() for part in task.pull_back(state, f))


def summary(record: PilotRecord, out: Path) -> str:
    """What it found, in a few lines."""
    tables, cost = record.tables, record.cost
    one = predict(tables, 1, 1, coupling=iid)
    split = one.split
    parts = ", ".join(f"{name} {getattr(split, name).measured}" for name in ("render", "timestep", "noise"))
    lines = [
        f"variance of one estimate at (R, K) = (1, 1), uniform iid: {one.variance} = {parts}",
        f"seconds of an estimate: {cost.c0} + {cost.c_upstream} R + {cost.c_denoise} R K"
        + (f"; one render costs {cost.ratio} draws" if cost.c_denoise.value > 0 else ""),
        f"the top 1 % of {tables.norm_sq.numel()} draws carry {tables.top_share:.0%} of the sum of squares"
        + (": too heavy a tail to trust these figures" if tables.top_share > TRUSTED_SHARE else ""),
        "ECM against uniform iid (1, 1), at the baseline's variance, by measured seconds:",
        "  " + " " * 22 + "".join(f"K={k:<11d}" for k in _SHOWN),
    ]
    lines += [f"  {name:22s}{''.join(f'{cell:13s}' for cell in row)}" for name, row in ecm_rows(record).items()]
    spent = tables.counts
    lines.append(f"from {spent.upstream} renders, {spent.teacher} teacher draws and {spent.backward} backward passes")
    lines.append(f"wrote {out}; next: carv advise {out}, carv report {out}")
    return "\n".join(lines)


def ecm_rows(record: PilotRecord) -> dict[str, list[str]]:
    """Each proposal, iid and in per-render strata: its ECM at R = 1 and K = 1, 2, ... 32."""
    tables, cost = record.tables, record.cost
    baseline = Point("uniform iid (1, 1)", predict(tables, 1, 1, None, iid).variance, cost.predict(1, 1))
    rows = {}
    for name, proposal in record.proposals.items():
        for joint, coupling in (("iid", iid), ("per-render", per_render)):
            points = [
                Point(f"(1, {k})", predict(tables, 1, k, proposal, coupling).variance, cost.predict(1, k))
                for k in _SHOWN
            ]
            rows[f"{name}, {joint}"] = [str(ecm(baseline, point)) for point in points]
    return rows


def to_json(record: PilotRecord, out: Path) -> dict[str, Any]:
    """For `--json`."""
    tables: Tables = record.tables
    split = predict(tables, 1, 1, coupling=iid).split
    return {
        "out": str(out),
        "split": {name: vars(getattr(split, name).measured) for name in ("render", "timestep", "noise")},
        "ecm": ecm_rows(record),
        "top_share": tables.top_share,
        "counts": vars(tables.counts),
        "cost_ratio": vars(record.cost.ratio) if record.cost.c_denoise.value > 0 else None,
        **record.provenance,
    }
