"""`carv sweep`: many designs by brute force, on one machine or a cluster, into one folder of records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from carv.console import Report
from carv.problems import ProblemConfig
from carv.runs.executors import Executor, InProcess, LocalProcesses, Ray, Slurm
from carv.runs.store import RecordStore
from carv.runs.sweep import SweepConfig, SweepResult, cells, sweep


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the cells run. The numbers do not depend on it."""

    executor: Literal["processes", "here", "slurm", "ray"] = "processes"
    """Processes of this machine, this process, a Slurm job array, or Ray."""
    workers: int = 2
    """Cells at once; a Slurm array is as wide as Slurm allows."""
    worker_threads: int = 1
    """Torch threads of each."""
    ray_address: str | None = None
    """Of a Ray cluster, e.g. auto; by default Ray is started on this machine."""
    gpus: float = 0
    """That each cell reserves (Ray and Slurm)."""
    slurm_partition: str | None = None
    """The partition."""
    slurm_minutes: int = 60
    """The time limit of one cell."""

    def build(self, out: Path) -> Executor:
        """The executor; Slurm's job files go to `out`/slurm."""
        if self.executor == "here":
            return InProcess(self.worker_threads)
        if self.executor == "processes":
            return LocalProcesses(self.workers, self.worker_threads)
        if self.executor == "ray":
            return Ray(self.ray_address, self.workers, self.worker_threads, self.gpus)
        given: dict[str, Any] = {"timeout_min": self.slurm_minutes}
        if self.slurm_partition is not None:
            given["slurm_partition"] = self.slurm_partition
        if self.gpus:
            given["gpus_per_node"] = int(self.gpus)
        return Slurm(out / "slurm", threads=self.worker_threads, **given)


def run_sweep(
    problem: ProblemConfig, config: SweepConfig, where: ExecutorConfig, out: Path, mix: bool, quiet: bool = False
) -> SweepResult:
    """Measure the cells whose records are not in the folder yet.

    Raises:
        ValueError: bad settings; another writer; records that were made differently.
    """
    planned = cells(config, problem)
    with Report(f"carv sweep: {problem.task}", len(planned), quiet) as report, RecordStore(out, report.say) as store:
        found = sweep(planned, store, where.build(out), report.say, report.update, mix=mix)
        if found.skipped:
            report.say(f"{found.skipped} of {len(planned)} cells were measured before")
    return found


def summary(found: SweepResult, out: Path) -> str:
    """How it ended."""
    lines = [f"{found.done} cells measured, {found.skipped} were there already, {len(found.failed)} failed"]
    if found.failed:
        lines.append("failed cells are tried again by the same command")
    lines.append(f"records are in {out}/records.jsonl; next: carv report {out}")
    return "\n".join(lines)


def to_json(found: SweepResult, out: Path) -> dict[str, Any]:
    """For `--json`."""
    failed = [{"cell": cell.to_dict(), "error": message} for cell, message in found.failed]
    return {"out": str(out), "done": found.done, "skipped": found.skipped, "failed": failed}
