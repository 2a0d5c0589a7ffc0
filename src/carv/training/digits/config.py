"""The settings of a training run on digits; the command line is made from them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from carv.devices import DeviceName

DigitsSize = Literal["tiny", "small", "large"]

STAGE_SHARES = {"autoencoder": 0.1, "denoiser": 0.84, "judge": 0.06}
"""How the minutes are split. Encoding and measuring come on top: about two minutes on one core."""

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
"""That the saved pipeline is measured at."""


@dataclass(frozen=True)
class DigitsSizes:
    """How large the networks and their batches are.

    Attributes:
        image: pixels along each side; the data have no other size.
        autoencoder: channels at each resolution, halved once between neighbours.
        heads: of each attention layer of the DiT.
        head_width: channels of each head.
        layers: of the DiT.
        patch: latent entries along each side of a token.
        judge: channels of the judge at its highest resolution.
        features: of the judge, before its last layer.
        copies: pictures made of each one of the training split, the picture itself among them.
        autoencoder_batch: pictures in a step.
        denoiser_batch: latents in a step; also the number of timestep strata.
        judge_batch: pictures in a step.
    """

    image: int = 16
    autoencoder: tuple[int, ...] = (24, 48)
    heads: int = 2
    head_width: int = 64
    layers: int = 6
    patch: int = 2
    judge: int = 32
    features: int = 64
    copies: int = 16
    autoencoder_batch: int = 32
    denoiser_batch: int = 64
    judge_batch: int = 64

    @property
    def latent(self) -> int:
        """Entries along each side of a latent."""
        return self.image >> (len(self.autoencoder) - 1)


SIZES: dict[str, DigitsSizes] = {
    "tiny": DigitsSizes(
        autoencoder=(8, 8), heads=2, head_width=8, layers=1, judge=8, features=16, copies=2, autoencoder_batch=4,
        denoiser_batch=4, judge_batch=8,
    ),
    "small": DigitsSizes(),
    "large": DigitsSizes(
        autoencoder=(64, 128), heads=6, head_width=64, layers=8, copies=64, autoencoder_batch=128, denoiser_batch=512,
        judge_batch=256,
    ),
}  # fmt: skip
"""tiny: for tests, it learns nothing. small: 3 million weights, 20 minutes on a CPU core. large: for a GPU."""


@dataclass(frozen=True)
class DigitsConfig:
    """Train a small class-conditional DiT on real handwritten digits, and a classifier that judges it."""

    minutes: float = 20.0
    """Of training, split over the stages; each stage times its first steps and then fixes its number of steps."""
    seed: int = 0
    """Of all randomness."""
    size: DigitsSize = "small"
    """Of the networks: small for a CPU, large for a GPU, tiny for tests."""
    device: DeviceName = "cpu"
    """Where to train; auto takes a GPU if there is one."""
    bf16: bool = True
    """Autocast to bfloat16 while training; slower on a CPU without AVX512-BF16 or AMX."""
    autoencoder_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    denoiser_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    judge_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    autoencoder_rate: float = 2e-3
    """Highest learning rate of this stage."""
    denoiser_rate: float = 1e-3
    """Highest learning rate of this stage."""
    judge_rate: float = 2e-3
    """Highest learning rate of this stage."""
    drop_classes: float = 0.1
    """Share of the classes replaced by the null class, for classifier-free guidance."""
    sampling_steps: int = 25
    """DDIM steps of the measured samples."""
    samples_per_class: int = 40
    """Samples of each digit when quality is measured, at each guidance scale."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, got {self.sampling_steps}")
        if self.samples_per_class < 3:
            raise ValueError(f"samples_per_class must be at least 3 to have errors, got {self.samples_per_class}")
        for name in ("autoencoder_steps", "denoiser_steps", "judge_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 lets the minutes decide")
        if not 0 <= self.drop_classes < 1:
            raise ValueError(f"drop_classes is a share, at least 0 and below 1, got {self.drop_classes}")
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known sizes: {', '.join(SIZES)}")

    @property
    def sizes(self) -> DigitsSizes:
        """The networks' sizes."""
        return SIZES[self.size]

    def to_json(self) -> str:
        """One line that two equal configurations share."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)
