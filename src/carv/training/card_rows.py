"""What the model cards of all teachers have in common: how they tell of the run, and the rows of their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from carv.clip import Value


def run_fields(facts: dict[str, Any]) -> dict[str, Any]:
    """What each card's text says of the run, from the facts that `quality.json` holds: where, with which settings."""
    config, stages = facts["config"], facts["stages"]
    return {
        "millions": facts["weights"] / 1e6,
        "size": config["size"],
        "seed": config["seed"],
        "sampling": config["sampling_steps"],
        "stages": "\n".join(_stage_row(name, stage) for name, stage in stages.items()),
        "steps": " ".join(f"--{name}-steps {stage['steps']}" for name, stage in stages.items()),
        "machine": f"{facts['device']}, {facts['threads']} CPU thread(s)",
        "torch": facts["torch"],
    }


def row(title: str, values: Iterable[Value | None], cell: Callable[[Value], str]) -> str:
    """A row of a table; what was not measured is left empty."""
    return f"| {title} | " + " | ".join("" if value is None else cell(value) for value in values) + " |"


def _stage_row(name: str, stage: dict[str, Any]) -> str:
    loss = f"{stage['loss']:.4f} +- {stage['loss_standard_error']:.4f}"
    return f"| {name} | {stage['steps']} | {stage['batch']} | {stage['minutes']:.1f} | {loss} |"
