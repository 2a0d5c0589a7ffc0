"""Sweeps: from settings to cells, and from cells to records, whatever was done before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from carv.problems import ProblemConfig
from carv.provenance import provenance
from carv.runs.cell import Cell, StopConfig, run_described
from carv.runs.executors import Executor
from carv.runs.store import RecordStore
from carv.runs.worker import CellError
from carv.strata import COUPLINGS
from carv.variance.advice import Design, canonical
from carv.variance.predict import PAPER_DRAWS, PAPER_RENDERS, PAPER_RENOISE
from carv.variance.values import Value


@dataclass(frozen=True)
class SweepConfig:
    """Which designs to measure: by default the 18 cells of App. D.1.1 for each of its four methods."""

    renders: tuple[int, ...] = PAPER_RENDERS
    """R, upstream states of one estimate."""
    renoise: tuple[int, ...] = PAPER_RENOISE
    """K, draws for each state."""
    max_draws: int = PAPER_DRAWS
    """The largest R K."""
    proposals: tuple[str, ...] = ("uniform", "weight")
    """Laws to draw t from: uniform (p itself), weight (q ~ p w), defensive, or the problem's own."""
    couplings: tuple[str, ...] = ("iid", "per-render")
    """How draws share strata: iid, per-render, global, nested, systematic."""
    antithetic: bool = False
    """Measure every design with an even K also with draws in pairs of opposite noise."""
    seed: int = 0
    """Of the measurements."""
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        done: cells that were measured now.
        skipped: cells whose records were there.
        failed: cells that could not be measured, each with one sentence. They are tried again next time.
    """

    done: int
    skipped: int
    failed: tuple[tuple[Cell, str], ...] = ()


def cells(config: SweepConfig, problem: ProblemConfig) -> list[Cell]:
    """The cells of a sweep, designs that are the same by definition once, always in the same order.

    Args:
        config: which designs, and how they are measured.
        problem: the pipeline.

    Raises:
        ValueError: a count below 1, an unknown coupling, no design at all.
    """
    if min((*config.renders, *config.renoise, config.max_draws), default=1) < 1:
        raise ValueError("renders, renoise and max-draws must be at least 1")
    unknown = [name for name in config.couplings if name not in COUPLINGS]
    if unknown:
        raise ValueError(f"no coupling {unknown[0]!r}; known: {', '.join(COUPLINGS)}")
    designs = list(dict.fromkeys(canonical(design) for design in _designs(config)))
    if not designs:
        raise ValueError(f"no design has R K <= {config.max_draws}, a proposal and a coupling: widen the sweep")
    return [Cell(problem, design, config.seed, config.stop) for design in designs]


def _designs(config: SweepConfig) -> Iterator[Design]:
    for proposal in config.proposals:
        for coupling in config.couplings:
            for antithetic in (False, True) if config.antithetic else (False,):
                for r in config.renders:
                    for k in config.renoise:
                        if r * k <= config.max_draws and not (antithetic and k % 2):
                            yield Design(r, k, proposal, coupling, antithetic)


def sweep(
    cells: Sequence[Cell],
    store: RecordStore,
    executor: Executor,
    say: Callable[[str], None] | None = None,
    progress: Callable[[float, str], None] | None = None,
    *,
    mix: bool = False,
) -> SweepResult:
    """Measures the cells that the store does not hold yet; each record is on the disk as soon as it is made.

    What was made differently is refused before any work where that can be known, and otherwise (device, fingerprint)
    at the first record.

    Args:
        cells: of `cells`, or any others.
        store: open for writing.
        executor: where they run.
        say: told about failures.
        progress: called with the number of cells that are finished, and a note about the last one.
        mix: as of `RecordStore.check_compatible`.

    Raises:
        ValueError: records that were made differently; a store that is not open.
    """
    say, progress = say or (lambda line: None), progress or (lambda done, note: None)
    by_hash = {cell.hash: cell for cell in cells}
    store.check_compatible((_planned(cell) for cell in by_hash.values()), mix)
    there = store.hashes("cell")
    waiting = [cell for name, cell in by_hash.items() if name not in there]
    skipped, done, failed = len(by_hash) - len(waiting), 0, list[tuple[Cell, str]]()
    progress(skipped, "")
    if not waiting:
        return SweepResult(0, skipped)
    with closing(executor.run(run_described, [cell.to_dict() for cell in waiting])) as results:
        for index, result in results:
            cell = waiting[index]
            if isinstance(result, CellError):
                failed.append((cell, result.message))
                say(f"{cell.design}: {result.message}")
            else:
                store.check_compatible([result], mix)
                store.append(result)
                done += 1
            progress(skipped + done + len(failed), _note(cell, result))
    return SweepResult(done, skipped, tuple(failed))


def _planned(cell: Cell) -> dict[str, Any]:
    """What is known of a record beforehand: not the device, which may be another machine's."""
    here = {name: value for name, value in provenance().items() if name != "device"}
    return {"cell": cell.to_dict(), "provenance": here}


def _note(cell: Cell, result: Mapping[str, Any] | CellError) -> str:
    if isinstance(result, CellError):
        return f"{cell.design}: failed"
    variance = result["variance"]
    if variance["value"] is None or variance["error"] is None:
        return f"{cell.design}: not finite"
    return f"{cell.design}: {Value(variance['value'], variance['error'])}"
