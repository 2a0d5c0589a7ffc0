"""What the attribution experiments share: the clips, the sizes of banks, and where things are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.small import small_wan
from carv.variance.values import Value
from carv.world.clips import SIZE, Clips, make_clips

QUICK: Mapping[str, Any] = {"sets": 3, "clips": 4, "cells": 24, "trials": 40, "dimensions": 32, "parameters": None}
"""Sizes that show that everything works; the numbers mean nothing."""

BAND = "one standard error over sets of clips"

CLIPS_SEED = 4
"""Of the clips of Table 4 and of the designs: the teacher has not seen them."""

LONGEST = 17
"""Frames."""


@dataclass(frozen=True)
class Setting:
    """What all attribution experiments share."""

    runs: Path = Path("out/experiments")
    """Where gradients are kept. All experiments share them."""
    out: Path | None = None
    """Where the record goes; by default a folder of the experiment's name below --runs."""
    teacher: str = "small"
    """small: carv's small Wan; or a Wan folder or hub id."""
    sets: int = 5
    """Sets of clips, each attributed by itself; errors are over the sets."""
    clips: int = 11
    """In a set: each in turn is the query, and the others are ranked."""
    cells: int = 384
    """Timesteps of the bank; the paper has 768."""
    shift: float = 2.0
    """Of the law of t in training, t = s u / (1 + (s - 1) u) with u uniform; that of the small teacher."""
    trials: int = 1000
    """Samplings of the bank for each budget."""
    dimensions: int = 512
    """Of the projected gradients."""
    parameters: str | None = "blocks.[345].*"
    """Which of the network's parameters, by their names; the later half of the small teacher's blocks, at half the cost
    of all."""
    seed: int = 0
    """Of the noise, the projection and the trials."""
    quick: bool = False
    """Tiny sizes, to see that it works."""

    def __post_init__(self) -> None:
        if self.sets < 2 or self.clips < 3:
            raise ValueError(
                f"give at least 2 sets (for errors) of 3 clips (to rank), got {self.sets} and {self.clips}"
            )

    def sized(self, **own: Any) -> Self:
        """These settings, or with --quick tiny ones; `own` are those of an experiment's own settings."""
        return dataclasses.replace(self, **{**QUICK, **own}) if self.quick else self

    def folder(self, name: str) -> Path:
        """Where the record of an experiment goes."""
        return self.out or self.runs / name

    def load_teacher(self) -> DiffusersTeacher:
        """The teacher, for clips of up to `LONGEST` frames."""
        folder = small_wan() if self.teacher == "small" else self.teacher
        return DiffusersTeacher.from_pretrained(folder, size=SIZE, frames=LONGEST)

    def all_clips(self) -> Clips:
        """Those of all sets, one set after the other."""
        return make_clips(self.sets * self.clips, CLIPS_SEED)

    def places(self) -> list[slice]:
        """Of each set's clips among all."""
        return [slice(i * self.clips, (i + 1) * self.clips) for i in range(self.sets)]

    def described(self) -> str:
        """For a record: what was measured, how, and what its errors are."""
        return (
            f"Teacher {self.teacher!r}, a flow-matching video model; {self.sets} sets of {self.clips} clips that it "
            "was not trained on, each in turn the query and the others ranked; gradients of "
            f"{self.parameters or 'all parameters'} without guidance, projected to {self.dimensions} dimensions; a "
            f"bank of {self.cells} timesteps, evenly spaced in the quantiles of the law of training. Means over the "
            "sets, with standard errors over them."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        given = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


VALUE_SEED = 6
"""Of these clips: the teacher has not seen them."""


@dataclass(frozen=True)
class ValueSetting(Setting):
    """What a ranking is worth."""

    clips: int = 120
    """Candidates and queries."""
    queries: int = 24
    """The last so many clips, where networks are fine-tuned; for retrieval each clip is a query."""
    cells: int = 64
    """Timesteps of the bank."""
    trials: int = 100
    """Samplings of the bank for each budget."""
    budgets_shown: tuple[int, ...] = (4, 8, 16, 32)
    """Draws."""
    top: int = 10
    """Clips that are retrieved."""
    race_starts: tuple[int, ...] = (1, 2, 4)
    """Draws for all candidates before the first halving."""
    race_trials: int = 20
    """Samplings of the bank for successive halving."""
    lds_trials: int = 10
    """Samplings of the bank for each budget, for the LDS."""
    resamples: int = 400
    """Of the bootstrap."""
    subsets: int = 32
    """Random halves of the candidates, each with a fine-tuned network."""
    steps: int = 40
    """Of fine-tuning."""
    batch: int = 16
    """Clips in a step."""
    rate: float = 1e-4
    """Of learning."""
    loss_draws: int = 32
    """At which a query's loss is measured."""
    tuned_queries: int = 8
    """For which networks are fine-tuned on their top clips."""
    tuned_top: int = 16
    """On how many."""
    tuned_budget: int = 4
    """Draws of the rankings that are fine-tuned on."""

    @property
    def candidates(self) -> int:
        return self.clips - self.queries


def over_sets(numbers: Sequence[float | None]) -> Value | None:
    """The mean over sets of clips, with its standard error from their spread; `None` if some set has no number."""
    known = [one for one in numbers if one is not None]
    if not known or len(known) < len(numbers):
        return None
    mean = sum(known) / len(known)
    spread = sum((one - mean) ** 2 for one in known) / (len(known) - 1)
    return Value(mean, (spread / len(known)) ** 0.5)
