"""The settings of an attribution; the command line is made from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from carv.density import ShiftedUniform
from carv.devices import DeviceName
from carv.proposals import defensive
from carv.schedule import NoiseSchedule
from carv.tasks.attribution.bank import PAPER_CELLS, Design, DrawBank, NoiseMode, base_density
from carv.tasks.attribution.projector import Projector, ProjectorKind
from carv.tasks.attribution.stability import StopRule, budgets

DtypeName = Literal["float32", "bfloat16", "float16"]
MASKS = ("none", "flow")


@dataclass(frozen=True)
class AttributionConfig:
    """Which training clips or pictures a teacher's behaviour on some queries came from, and how sure that is."""

    train: tuple[str, ...]
    """The training examples: folders or files of videos, GIFs or pictures; or clips: carv's own moving digits."""
    query: tuple[str, ...]
    """The queries: files or folders."""
    teacher: str = "small"
    """small: carv's own small Wan, trained on clips; small-dit: its DiT, of digits; or a diffusers pipeline, as a
    folder or a cached hub id."""
    checkpoints: tuple[str, ...] = ()
    """Earlier states of the teacher, whose terms are added to its own, draw by draw (TracIn over checkpoints)."""
    rates: tuple[float, ...] = ()
    """The learning rates at the teacher and at each of the checkpoints, as shares of their sum; by default equal."""
    prompt: str | None = None
    """The caption of examples without one (a captions.json in their folder, or a .txt beside them)."""
    draws: int = 64
    """The budget: gradients of each example; with until-stable the most."""
    first: int = 16
    """The budget at which the ranking is looked at first; it then doubles up to draws."""
    until_stable: bool = False
    """Stop as soon as the top-k of every query is stable at `level`, all looks together."""
    top_k: int = 10
    """How many of the most influential examples matter."""
    level: float = 0.95
    """Of all intervals and of the stop rule."""
    design: Design = "strata"
    """How the draws' timesteps depend on each other; all but global grow."""
    noise: NoiseMode = "fresh"
    """fresh: each draw has its own; fixed: one for each of the bank's timesteps, as in the paper."""
    cells: int = PAPER_CELLS
    """Of fixed noise: timesteps of the bank."""
    antithetic: bool = False
    """Noise in pairs eps, -eps at one timestep."""
    normalise: bool = True
    """Cosines (Eq. 11); otherwise inner products, as TracIn."""
    masks: str = "none"
    """none; flow: motion masks from optical flow (Eq. 60); or a folder of your own, named as the examples."""
    parameters: str | None = None
    """Which of the network's parameters, as patterns of names, e.g. "blocks.*.attn1.*"; by default all, or LoRA's."""
    dimensions: int = 512
    """To which gradients are projected."""
    projector: ProjectorKind = "sparse"
    """The law of the projection."""
    shift: float = 1.0
    """Of a flow's training law p of t; 1 is uniform."""
    proposal_shift: float | None = None
    """q of a flow: this shift instead, with a tenth of p mixed in and weights p/q; by default q is p."""
    seed: int = 0
    """Of all randomness."""
    clips: int = 64
    """clips: how many of them."""
    size: int | None = None
    """Pixels along each side; by default the pipeline's."""
    frames: int | None = None
    """At most how many frames of a clip; by default the pipeline's."""
    max_tokens: int | None = None
    """Tokens that the text encoder reads; by default the pipeline's."""
    teacher_dtype: DtypeName = "float32"
    """Of the teacher's network; its autoencoder stays in float32."""
    micro_batch: int | None = None
    """At most how many gradients are held at once, by default what fits 1 GiB; changes nothing else."""
    device: DeviceName = "cpu"
    """Where everything is computed; auto takes a GPU if there is one."""
    exclude_query: bool = True
    """Leave a query that is also a training example out of its own ranking."""

    def __post_init__(self) -> None:
        if not self.train or not self.query:
            raise ValueError("attribution needs training examples and queries: give --train FOLDER and --query FILES")
        for name in ("top_k", "clips", "dimensions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.proposal_shift is not None and self.proposal_shift <= 0:
            raise ValueError(f"proposal_shift must be above 0, got {self.proposal_shift}")
        if self.rates and len(self.rates) != 1 + len(self.checkpoints):
            raise ValueError(
                f"rates are of the teacher and of each checkpoint, got {len(self.rates)} for {len(self.checkpoints)} "
                "checkpoints"
            )
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"learning rates are finite and above 0, got {min(self.rates)}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be in (0, 1), got {self.level}")
        if self.draws < (4 if self.antithetic else 2):
            raise ValueError(f"an error needs at least two independent draws, got draws = {self.draws}")
        if self.design in ("strata", "systematic") and any(math.log2(budget) % 1 for budget in self.budgets):
            raise ValueError(
                f"the draws of {self.design} fill equal strata at powers of two only: give powers of two for first "
                f"and draws, got {self.first} and {self.draws}"
            )
        if self.antithetic and any(budget % 2 for budget in self.budgets):
            raise ValueError(f"antithetic draws come in pairs: first and draws must be even, got {self.first}")

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets at which the ranking is looked at; "global" has the last one only."""
        if self.design == "global":
            return (self.draws,)
        return budgets(min(self.first, self.draws), self.draws)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the teacher's terms and of each checkpoint's; they sum to 1."""
        rates = self.rates or (1.0,) * (1 + len(self.checkpoints))
        return tuple(rate / math.fsum(rates) for rate in rates)

    @property
    def stop_rule(self) -> StopRule:
        """For all looks together, or for the one look at a fixed budget."""
        return StopRule(len(self.budgets) if self.until_stable else 1, 1 - self.level)

    def bank(self, schedule: NoiseSchedule) -> DrawBank:
        """The draws that all examples share, for a teacher of this schedule.

        Raises:
            ValueError: a shift without a flow; what `DrawBank` refuses.
        """
        base, proposal, size = base_density(schedule, self.shift), None, None
        if self.proposal_shift is not None:
            if not schedule.continuous:
                raise ValueError("proposal_shift is for flow matching; this teacher has a discrete schedule")
            proposal = defensive(base, ShiftedUniform(shift=self.proposal_shift))
        if self.design == "global":
            size = self.draws
        options: dict[str, Any] = {"cells": self.cells, "size": size, "antithetic": self.antithetic}
        return DrawBank(self.seed, self.design, base, proposal, self.noise, **options)

    def projection(self) -> Projector:
        """The projection of gradients."""
        return Projector(self.dimensions, self.projector, self.seed)

    def masks_folder(self) -> Path | None:
        """The folder of the user's own masks, if there is one.

        Raises:
            ValueError: it is not a folder.
        """
        if self.masks in MASKS:
            return None
        if not Path(self.masks).is_dir():
            raise ValueError(f"masks are none, flow or a folder of masks; {self.masks} is none of them")
        return Path(self.masks)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return dataclasses.asdict(self)
