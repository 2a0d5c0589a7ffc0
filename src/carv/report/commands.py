"""The commands that make the records of a study again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from carv.report.records import Cell, Study


def commands(study: Study, folders: Sequence[Path]) -> tuple[str, ...]:
    """One line each: the pilot, the sweeps, the report."""
    lines = list(_pilot(study))
    key = _folder_and_seed
    for (folder, seed), cells in groupby(sorted(study.cells, key=key), key=key):
        lines.append(_sweep(study, folder, seed, list(cells)))
    return (*lines, shlex.join(["carv", "report", *map(str, folders)]))


def _pilot(study: Study) -> Iterator[str]:
    if study.pilot is not None:
        flags = {**study.pilot.settings, "seed": study.pilot.seed, "out": str(study.pilot_folder)}
        yield shlex.join(["carv", "pilot", *_problem(study.problem), *_flags(flags)])


def _sweep(study: Study, folder: str, seed: int, cells: Sequence[Cell]) -> str:
    designs, stop = [cell.design for cell in cells], cells[0].stop
    flags: dict[str, Any] = {
        "renders": sorted({design.renders for design in designs}),
        "renoise": sorted({design.renoise for design in designs}),
        "max_draws": max(design.renders * design.renoise for design in designs),
        "proposals": list(dict.fromkeys(design.proposal for design in designs)),
        "couplings": list(dict.fromkeys(design.coupling for design in designs)),
        "antithetic": any(design.antithetic for design in designs),
        **stop,
        "seed": seed,
        "out": folder,
    }
    return shlex.join(["carv", "sweep", *_problem(study.problem), *_flags(flags)])


def _folder_and_seed(cell: Cell) -> tuple[str, int]:
    return str(cell.folder), cell.seed


def _problem(problem: Mapping[str, Any]) -> list[str]:
    rest = {name: value for name, value in problem.items() if name != "task"}
    return [str(problem["task"]), *_flags(rest)]


def _flags(settings: Mapping[str, Any]) -> Iterable[str]:
    """As tyro reads them; a setting that is unknown is left at its default."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, (list, tuple)):
            yield from (flag, *map(str, value))
        elif not isinstance(value, Mapping):
            yield from (flag, str(value))
