"""The settings of a distillation run; the command line is made from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from carv.adaptive import AdaptiveProposal
from carv.density import Density, ShiftedUniform, uniform_steps
from carv.devices import DeviceName
from carv.estimator import HierarchicalEstimator
from carv.proposals import defensive, proportional
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import COUPLINGS

ProposalName = Literal["uniform", "adaptive", "table"]
CouplingName = Literal["iid", "per-render", "global", "systematic", "nested"]
WeightName = Literal["dmd", "paper"]
TargetName = Literal["network", "x0"]
FeatureName = Literal["fake", "teacher"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TermEstimator:
    """How one term draws its re-noisings (t, eps). The defaults are the plain DMD2 step."""

    renoise: int = 1
    """K: noisings of each generated latent."""
    proposal: ProposalName = "uniform"
    """q(t): the base p; learned while training; or from measured second moments."""
    coupling: CouplingName = "iid"
    """How the R K timesteps of a step depend on each other."""
    antithetic: bool = False
    """Noise in pairs eps, -eps at one timestep."""
    t_min: int = 20
    """The smallest timestep of 1000."""
    t_max: int = 980
    """The largest timestep of 1000."""
    proposal_table: Path | None = None
    """table: a JSON file {"edges": [n + 1 timesteps], "m2": [n second moments]}."""

    def __post_init__(self) -> None:
        if (self.proposal == "table") != (self.proposal_table is not None):
            raise ValueError('a proposal_table goes with the proposal "table", and the other way round')

    def base(self, schedule: NoiseSchedule) -> Density:
        """p: all of t_min..t_max alike, in the schedule's own units."""
        low, high = timestep(self.t_min, schedule), timestep(self.t_max, schedule)
        return ShiftedUniform(low, high) if schedule.continuous else uniform_steps(int(low), int(high))

    def build(
        self, schedule: NoiseSchedule, renders: int, micro_batch: int | None, device: torch.device
    ) -> HierarchicalEstimator:
        """The estimator of this term."""
        base = self.base(schedule)
        proposal: Any = base
        if self.proposal == "adaptive":
            proposal = AdaptiveProposal(base)
        elif self.proposal_table is not None:
            proposal = tabulated(base, self.proposal_table)
        sampler = TimestepSampler(base, proposal, coupling=COUPLINGS[self.coupling], antithetic=self.antithetic)
        return HierarchicalEstimator(sampler.to(device), renders, self.renoise, micro_batch)


@dataclass(frozen=True)
class DistillConfig:
    """Distil a diffusion teacher into a generator of one step (DMD2)."""

    teacher: str = "small"
    """small: carv's own DiT of digits; or a diffusers pipeline, as a folder or a cached hub id."""
    prompts: tuple[str, ...] = ()
    """What is generated; by default all classes of a DiT."""
    steps: int = 2000
    """Generator updates."""
    fake_steps: int = 5
    """Updates of the fake score and the discriminator before each of the generator."""
    renders: int = 8
    """R: generated latents in an update."""
    generator: TermEstimator = TermEstimator()
    """The distribution-matching term."""
    fake: TermEstimator = TermEstimator(t_min=0, t_max=999)
    """The fake score's denoising loss."""
    gan: TermEstimator = TermEstimator()
    """The adversarial term, of generator and discriminator."""
    seed: int = 0
    """Of all randomness."""
    guidance_scale: float = 1.5
    """s of e_u + s (e_c - e_u) of the real score, as in diffusers; the paper's omega is s - 1."""
    generator_t: int | None = None
    """The timestep of 1000 at which the generator is asked; by default the last. Networks that predict epsilon need
    an earlier one (DMD2 takes 399): at the last, their error is divided by a tiny alpha."""
    weight: WeightName = "dmd"
    """dmd: 1 / mean |mu_real - z|, as both public codes; paper: alpha(t) times that, as Eqs. 10 and 53 together say."""
    fake_target: TargetName = "network"
    """What the fake score's loss compares: the network's own prediction, or x0 (Eq. 54)."""
    gan_weight: float = 3e-3
    """Of the adversarial term in the generator's loss; 0 switches the discriminator off, and no data is needed."""
    discriminator_weight: float = 1e-2
    """Of the discriminator's loss beside the denoising loss, whose optimiser it shares."""
    features: FeatureName = "fake"
    """Whose hidden states the discriminator reads: the fake score's, which it trains too (DMD2), or the teacher's."""
    layer: str = ""
    """The module whose output it reads, by name; by default the middle block."""
    data: str = "digits"
    """Real pictures for the discriminator: digits; a folder with a sub-folder for each class; or a safetensors file
    with latents and labels."""
    balance: bool = True
    """Spread a step's latents evenly over the classes, instead of drawing each class by itself."""
    generator_rate: float = 1e-4
    """AdamW's learning rate of the generator."""
    fake_rate: float = 1e-4
    """AdamW's learning rate of the fake score and the discriminator."""
    weight_decay: float = 0.01
    """AdamW's."""
    ema: float = 0.99
    """Decay of the average of the generator's weights, for each of its updates."""
    micro_batch: int | None = None
    """At most how many draws a network sees at once; bounds memory."""
    evaluate_every: int = 500
    """Generator updates between evaluations."""
    judge: str = ""
    """The classifier that evaluations use, as a folder; by default the one in the teacher's folder."""
    samples: int = 2000
    """Pictures that an evaluation looks at."""
    teacher_dtype: DtypeName = "float32"
    """Of the frozen teacher's network."""
    autocast: bool = False
    """Let the trained networks compute in bfloat16; their weights stay float32."""
    tensorboard: bool = False
    """Write scalars for TensorBoard too."""
    device: DeviceName = "cpu"
    """Where everything is computed; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "fake_steps", "renders", "evaluate_every", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("generator_rate", "fake_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("gan_weight", "discriminator_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        if self.weight not in ("dmd", "paper"):
            raise ValueError(f"weight must be dmd or paper, got {self.weight!r}")

    @property
    def terms(self) -> dict[str, TermEstimator]:
        """The three terms by name."""
        return {"generator": self.generator, "fake": self.fake, "gan": self.gan}

    def to_json(self) -> str:
        """One line that two equal configurations share; a proposal's table counts with its content."""
        settings = dataclasses.asdict(self)
        for name, term in self.terms.items():
            if term.proposal_table is not None:
                digest = hashlib.sha256(term.proposal_table.read_bytes()).hexdigest()[:16]
                settings[name] |= {"proposal_table": str(term.proposal_table), "proposal_digest": digest}
        return json.dumps(settings, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DistillConfig:
        """What `to_json` gave.

        Raises:
            ValueError: another version's settings, or none.
        """
        try:
            given = json.loads(text)
            for name in ("generator", "fake", "gan"):
                term = given[name]
                term.pop("proposal_digest", None)
                table = term.get("proposal_table")
                given[name] = TermEstimator(**{**term, "proposal_table": None if table is None else Path(table)})
            return cls(**{**given, "prompts": tuple(given["prompts"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"these are not the settings of a distillation run of this version: {error}") from error


def timestep(thousandths: int, schedule: NoiseSchedule) -> float:
    """A timestep given in 1000ths, in the schedule's units: an integer of 0..T-1, or a real of a flow's [0, 1]."""
    if not 0 <= thousandths <= 1000:
        raise ValueError(f"timesteps are given in 1000ths, 0..1000, got {thousandths}")
    if schedule.continuous:
        return thousandths / 1000
    return min(schedule.num_steps - 1, round(thousandths * schedule.num_steps / 1000))


def tabulated(base: Density, path: Path) -> Density:
    """q = 0.9 q* + 0.1 p with q* ~ p sqrt(m2(t)), m2 constant on the bins of a table (Eq. 24).

    Args:
        base: p.
        path: JSON, {"edges": [n + 1 increasing timesteps], "m2": [n second moments E |f|^2]}. Beyond the first and
            the last edge the nearest bin counts.

    Raises:
        ValueError: not such a table.
    """
    try:
        table = json.loads(path.read_text())
        edges = torch.tensor(table["edges"], dtype=torch.float64)
        m2 = torch.tensor(table["m2"], dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no table of a proposal, {{"edges": [...], "m2": [...]}}: {error}') from error
    good = m2.ndim == 1 and len(m2) > 0 and edges.shape == (len(m2) + 1,) and bool((edges.diff() > 0).all())
    if not good or not bool((torch.isfinite(m2) & (m2 >= 0)).all()):
        raise ValueError(f"{path} needs n + 1 increasing edges and n second moments that are finite and not negative")

    def root(t: torch.Tensor) -> torch.Tensor:
        where = torch.searchsorted(edges, t.to("cpu", torch.float64).contiguous(), right=True) - 1
        return m2[where.clamp(0, len(m2) - 1)].sqrt().to(t.device)

    return defensive(base, proportional(base, root))
