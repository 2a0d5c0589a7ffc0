"""What the text-to-3D experiments share: the prompts and the sizes of runs and pilots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from carv.commands.pilot import PilotConfig
from carv.rng import stream
from carv.tasks.sds.config import FieldName, SDSConfig

PROMPTS = ("a green rocket", "a yellow duck", "a red chair", "a purple mushroom", "a pink snowman")
"""They stand for the paper's emerald beetle, gold mask, mahogany piano, orchid pot and teddy bear.

The small teacher has never seen the first: it is one of `carv.training.data.HELD_OUT`.
"""

QUICK: Mapping[str, Any] = {
    "prompts": PROMPTS[:1],
    "checkpoints": (2, 4, 6),
    "size": 32,
    "samples": 8,
    "resolution": 8,
    "pilot": PilotConfig(renders=8, bins=4, noises=2, antithetic=False, repetitions=6),
}
"""Sizes that show that everything works; the numbers mean nothing."""

FULL = PilotConfig(renders=24, bins=16, noises=2, antithetic=False, repetitions=6)
"""About a minute and a half on one core, with the timing."""


@dataclass(frozen=True)
class Setting:
    """What all text-to-3D experiments share."""

    runs: Path = Path("out/experiments")
    """Where runs and pilots are kept. All experiments share them, and so do several processes at once."""
    out: Path | None = None
    """Where the record goes; by default a folder of the experiment's name below --runs."""
    teacher: str = "small"
    """small: carv's small Stable Diffusion; world: the exact denoiser; or a diffusers pipeline."""
    field: FieldName = "hash"
    """What is optimised."""
    prompts: tuple[str, ...] = PROMPTS
    """What is made."""
    seeds: tuple[int, ...] = (0, 1)
    """Of training; each (prompt, seed) has a pilot with draws of its own."""
    guidance_scale: float = 5.0
    """s of e_u + s (e_c - e_u); the paper's omega is s - 1, and 100."""
    checkpoints: tuple[int, ...] = (100, 200, 300)
    """Steps of training at which the field is kept; pilots are made at the last, where nothing else is said."""
    size: int = 64
    """Pixels along each side of a render."""
    samples: int = 32
    """Points along each ray."""
    resolution: int = 32
    """Of a voxel field."""
    pilot: PilotConfig = FULL
    """How much each pilot measures."""
    quick: bool = False
    """Tiny sizes, to see that it works."""

    def sized(self, **own: Any) -> Self:
        """These settings, or with --quick tiny ones; `own` are those of an experiment's own settings."""
        return dataclasses.replace(self, **{**QUICK, **own}) if self.quick else self

    def folder(self, name: str) -> Path:
        """Where the record of an experiment goes."""
        return self.out or self.runs / name

    @property
    def steps(self) -> int:
        """Of training, in all."""
        return self.checkpoints[-1]

    @property
    def low_guidance(self) -> float:
        """The scale whose omega = s - 1 is a quarter, as 25 is of the paper's 100."""
        return 1 + (self.guidance_scale - 1) / 4

    def run(self, prompt: str, seed: int, guidance_scale: float | None = None) -> SDSConfig:
        """The settings of one training run, with carv's own estimator."""
        return SDSConfig(
            prompt,
            steps=self.steps,
            seed=seed,
            teacher=self.teacher,
            teacher_dtype="float32" if self.teacher == "world" else "bfloat16",
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            size=self.size,
            field=self.field,
            resolution=self.resolution,
            samples=self.samples,
            stratify_azimuth=False,
        )

    def pilot_of(self, prompt: str, seed: int) -> PilotConfig:
        """The settings of one pilot: its cameras and noise are its own, so that errors of pilots are independent."""
        own = stream(self.pilot.seed, "pilot", prompt, seed).digest(4)
        return dataclasses.replace(self.pilot, seed=int.from_bytes(own, "little"))

    def described(self, pilots: int) -> str:
        """For a record: what was measured, how, and what its errors are."""
        pilot = self.pilot
        return (
            f"Teacher {self.teacher!r}, {self.field} field, guidance scale {self.guidance_scale:g} unless said "
            f"otherwise, {self.steps} steps of training with {self.run('', 0).estimator}, {len(self.prompts)} prompts "
            f"({', '.join(self.prompts)}) x {len(self.seeds)} seeds; pilots of {pilot.renders} renders x {pilot.bins} "
            f"bins of t x {pilot.noises} noises. "
            + (
                "One pilot, with standard errors over its renders."
                if pilots == 1
                else f"Means over {pilots} pilots, with standard errors over them."
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        given = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
