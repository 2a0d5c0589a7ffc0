"""What the distillation experiments share: the teacher, the sizes, and each run made once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from carv.rng import stream
from carv.tasks.distill.config import DistillConfig, TermEstimator

DIGITS = tuple("0123456789")
Coupling = Literal["iid", "per-render", "global"]

QUICK: Mapping[str, Any] = {
    "seeds": (0, 1), "seconds": 0.1, "evaluations": 2, "samples": 200, "timings": 6, "fake_steps": 1,
}  # fmt: skip
"""Sizes that show that everything works; the numbers mean nothing."""


@dataclass(frozen=True)
class DistillSetting:
    """What all distillation experiments share."""

    runs: Path = Path("out/experiments")
    """Where runs are kept. All experiments share them, and so do several processes at once."""
    out: Path | None = None
    """Where the record goes; by default a folder of the experiment's name below --runs."""
    teacher: str = "small"
    """small: carv's DiT on digits; or a diffusers pipeline of digits with a judge in its folder."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of training."""
    seconds: float = 40.0
    """Of training on one quiet core, for each run: every configuration gets as many steps as fit."""
    evaluations: int = 5
    """Of each run, evenly spread."""
    samples: int = 400
    """That an evaluation looks at."""
    generator_rate: float = 3e-4
    """Learning rate of the generator; the paper's is 1e-5, for networks and runs that are far larger."""
    fake_rate: float = 3e-4
    """Learning rate of the fake score and the discriminator."""
    fake_steps: int = 5
    """Fake-score updates for each of the generator."""
    timings: int = 9
    """Repetitions of each step that is timed."""
    quick: bool = False
    """Tiny sizes, to see that it works."""

    def sized(self, **own: Any) -> Self:
        """These settings, or with --quick tiny ones; `own` are those of an experiment's own settings."""
        return dataclasses.replace(self, **{**QUICK, **own}) if self.quick else self

    def folder(self, name: str) -> Path:
        """Where the record of an experiment goes."""
        return self.out or self.runs / name

    def config(self, renders: int = 8, student: int = 1, fake: int = 1, **changes: Any) -> DistillConfig:
        """A configuration of DMD2.

        Args:
            renders: R.
            student, fake: K of the generator's and of the fake score's step, in strata per render where above 1.
            changes: other settings of `DistillConfig`.
        """
        given: dict[str, Any] = {
            "teacher": self.teacher,
            "prompts": DIGITS,
            "renders": renders,
            "fake_steps": self.fake_steps,
            "generator": TermEstimator(student, coupling=strata(student)),
            "fake": TermEstimator(fake, coupling=strata(fake), t_min=0, t_max=999),
            "generator_rate": self.generator_rate,
            "fake_rate": self.fake_rate,
            "samples": self.samples,
        }
        return DistillConfig(**{**given, **changes})

    def described(self) -> str:
        """For a record."""
        plain = self.config()
        return (
            f"Teacher {self.teacher!r}, a class-conditional DiT on handwritten digits; DMD2 with guidance scale "
            f"{plain.guidance_scale:g}, {plain.fake_steps} fake-score updates for each of the generator, a "
            f"discriminator with weight {plain.gan_weight:g} and AdamW at {self.generator_rate:g} (generator) and "
            f"{self.fake_rate:g} (fake score) unless said otherwise. The Frechet distance is to the training pictures "
            f"in the judge's features, always with the same {self.samples} samples at the same noise. Seconds are of "
            "one core (processor time of a step, its median over interleaved repetitions, times the number of steps), "
            "without evaluations. A busy machine makes them longer: only ratios of steps that were timed side by "
            "side mean much."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        given = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def strata(renoise: int) -> Coupling:
    """Per render, where there is more than one draw for each."""
    return "per-render" if renoise > 1 else "iid"


def digest(config: DistillConfig) -> str:
    """A short name of a configuration."""
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:10]


def seed_of(*path: int | str) -> int:
    """A seed for measurements that are independent of training."""
    return int.from_bytes(stream(0, "measurement", *path).digest(4), "little")


def as_json(value: object) -> str:
    """One line, with sorted keys."""
    return json.dumps(value, sort_keys=True)
