"""The settings of a text-to-3D run; the command line is made from them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro

from carv.adaptive import AdaptiveProposal
from carv.density import Density, ShiftedUniform, uniform_steps
from carv.devices import DeviceName, find_device
from carv.estimator import HierarchicalEstimator
from carv.proposals import defensive, proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import COUPLINGS
from carv.tasks.sds.field import Field, VoxelField
from carv.tasks.sds.hash_grid import HashGridConfig, HashGridField
from carv.weights import WEIGHTS, Weight
from carv.world.cameras import PAPER_RANGE, WORLD_RANGE, CameraRange

ProposalName = Literal["uniform", "weight", "defensive", "adaptive"]
FieldName = Literal["voxel", "hash"]
CameraName = Literal["world", "paper"]
CouplingName = Literal["iid", "per-render", "global", "systematic", "nested"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EstimatorConfig:
    """Which estimator of the gradient to use. The defaults are carv's; the standard one is (4, 1) uniform iid."""

    renders: int = 1
    """R: renders in a step."""
    renoise: int = 16
    """K: noisings of each render."""
    proposal: ProposalName = "weight"
    """q(t): the base p; p w; a tenth of p with p w; or learned while training."""
    coupling: CouplingName = "per-render"
    """How the R K timesteps of a step depend on each other."""
    antithetic: bool = False
    """Noise in pairs eps, -eps at one timestep."""
    t_min: int = 20
    """The smallest timestep of 1000."""
    t_max: int = 980
    """The largest timestep of 1000."""
    micro_batch: int | None = None
    """At most how many draws the teacher sees at once; bounds memory, changes nothing else."""

    def base(self, schedule: NoiseSchedule) -> Density:
        """p: all of t_min..t_max alike. A flow's t is continuous: uniform on t_min/1000..t_max/1000, without shift."""
        if schedule.continuous:
            return ShiftedUniform(self.t_min / 1000, self.t_max / 1000)
        return uniform_steps(self.t_min, self.t_max)

    def build(
        self, weight: Weight, schedule: NoiseSchedule, device: torch.device | str = "cpu"
    ) -> HierarchicalEstimator:
        """The estimator for a teacher of this schedule whose contributions carry `weight`, with draws on a device."""
        base = self.base(schedule)
        sampler = TimestepSampler(
            base, self._proposal(base, weight), coupling=COUPLINGS[self.coupling], antithetic=self.antithetic, w=weight
        )
        return HierarchicalEstimator(sampler.to(device), self.renders, self.renoise, self.micro_batch)

    def _proposal(self, base: Density, weight: Weight) -> Any:
        if self.proposal == "uniform":
            return base
        if self.proposal == "adaptive":
            return AdaptiveProposal(base)
        by_weight = proportional(base, weight)
        return by_weight if self.proposal == "weight" else defensive(base, by_weight)

    def __str__(self) -> str:
        return f"(R, K) = ({self.renders}, {self.renoise}), {self.proposal} proposal, {self.coupling} coupling" + (
            ", antithetic" if self.antithetic else ""
        )


STANDARD = EstimatorConfig(renders=4, renoise=1, proposal="uniform", coupling="iid")
"""What SDS codes do: DreamFusion's estimator with a batch of four, the paper's baseline."""


@dataclass(frozen=True)
class SDSConfig:
    """Optimise a 3D object towards a prompt by score distillation."""

    prompt: Annotated[str, tyro.conf.Positional]
    """What to make, e.g. "a red chair"."""
    estimator: EstimatorConfig = EstimatorConfig()
    """How the gradient is estimated."""
    steps: int = 500
    """Optimiser steps."""
    seed: int = 0
    """Of all randomness."""
    teacher: str = "small"
    """small: carv's own small Stable Diffusion; world: the exact denoiser of carv's own pictures; or a diffusers
    pipeline, as a folder or a cached hub id."""
    teacher_dtype: DtypeName = "float32"
    """Of the teacher's denoiser; its autoencoder stays in float32. The exact teacher has no other."""
    device: DeviceName = "cpu"
    """Where everything is computed; auto takes a GPU if there is one."""
    clip: str = "small"
    """The CLIP that scores the result: small is carv's own; or a folder or a cached hub id; none for no score."""
    weight: str = "sds"
    """w(t), by name; see carv.weights.WEIGHTS."""
    guidance_scale: float | None = None
    """s of e_u + s (e_c - e_u), as in diffusers; the paper's omega is s - 1. By default 3 for the teacher world, 5 for
    others."""
    negative: str = ""
    """A negative prompt; empty is unconditional."""
    bandwidth: float = 0.1
    """world: h of the exact teacher: each picture is a Gaussian of this width."""
    size: int = 64
    """Pixels along each side of a render."""
    cameras: CameraName = "world"
    """What cameras are drawn from: those of the world's pictures, or the paper's (App. D.1.1)."""
    field: FieldName = "hash"
    """What is optimised: an Instant-NGP style hash grid under small networks, or a voxel grid."""
    hash_grid: HashGridConfig = dataclasses.field(default_factory=HashGridConfig)
    """The hash grid's settings."""
    resolution: int = 48
    """Voxels along each side of the voxel grid."""
    samples: int = 32
    """Points along each ray."""
    density_rate: float = 0.1
    """Adam's learning rate for the voxel grid's density."""
    colour_rate: float = 0.05
    """Adam's learning rate for the voxel grid's colour."""
    final_rate: float = 0.1
    """The learning rates fall along a cosine to this share of themselves at the last step."""
    smoothness: float = 1e-4
    """Weight of the field's total variation, per latent entry."""
    sparsity: float = 1e-4
    """Weight of the field's mean density, per latent entry: clears haze."""
    stratify_azimuth: bool = True
    """Cover the circle evenly with a step's cameras."""

    def __post_init__(self) -> None:
        for name in ("steps", "size", "resolution", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.weight not in WEIGHTS:
            raise ValueError(f"unknown weight {self.weight!r}; known weights: {', '.join(WEIGHTS)}")

    def to_json(self) -> str:
        """One line that two equal configurations share."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SDSConfig:
        """What `to_json` gave.

        Raises:
            ValueError: another version's settings, or none.
        """
        try:
            given = json.loads(text)
            nested = {
                "estimator": EstimatorConfig(**given["estimator"]),
                "hash_grid": HashGridConfig(**given.get("hash_grid", {})),
            }
            before = {"field": "voxel", "teacher": "world"}  # when there was nothing else
            return cls(**{**before, **given, **nested})
        except (TypeError, KeyError) as error:
            raise ValueError(f"these are not the settings of a text-to-3D run of this version: {error}") from error

    def build_field(self) -> Field:
        """The field before the first step, made on the CPU and so the same on every device."""
        device = find_device(self.device)
        if self.field == "voxel":
            return VoxelField(self.resolution, self.samples).to(device)
        return HashGridField(self.hash_grid, self.samples, stream(self.seed, "field")).to(device)

    @property
    def scale(self) -> float:
        """The guidance scale s, with its default filled in."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return 3.0 if self.teacher == "world" else 5.0

    @property
    def camera_range(self) -> CameraRange:
        """The range that `cameras` names."""
        return PAPER_RANGE if self.cameras == "paper" else WORLD_RANGE

    @property
    def rates(self) -> dict[str, float]:
        """Adam's learning rates by the names of a field's parameter groups, before they decay."""
        return {
            "density": self.density_rate,
            "colour": self.colour_rate,
            "geometry": self.hash_grid.geometry_rate,
            "background": self.hash_grid.background_rate,
        }

    @property
    def schedule(self) -> NoiseSchedule:
        """Stable Diffusion's, which the paper uses."""
        return NoiseSchedule.scaled_linear()
