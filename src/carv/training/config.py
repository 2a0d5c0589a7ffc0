"""The settings of a training run; the command line is made from them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from carv.devices import DeviceName

SizeName = Literal["tiny", "small", "large"]

STAGE_SHARES = {"autoencoder": 0.25, "denoiser": 0.66, "clip": 0.09}
"""How the minutes are split. Rendering, encoding and measuring come on top: about 7 minutes on one core."""


@dataclass(frozen=True)
class Sizes:
    """How large the networks and their batches are.

    Attributes:
        image: pixels along each side.
        autoencoder: channels at each resolution, halved once between neighbours.
        denoiser: channels at each resolution of the UNet; all but the first attend to the text.
        heads: of each attention layer.
        text_width: of the text encoder, and so of what the UNet attends to.
        text_layers: of the text encoder.
        clip_width: of both of CLIP's encoders.
        clip_layers: of its image encoder; its text encoder has `text_layers`.
        patch: pixels along each side of CLIP's patches.
        autoencoder_batch: pictures in a step.
        denoiser_batch: latents in a step; also the number of timestep strata.
        clip_batch: pictures in a step, each with another caption.
    """

    image: int = 64
    autoencoder: tuple[int, ...] = (16, 32, 64)
    denoiser: tuple[int, ...] = (64, 96, 128)
    heads: int = 4
    text_width: int = 64
    text_layers: int = 2
    clip_width: int = 96
    clip_layers: int = 3
    patch: int = 8
    autoencoder_batch: int = 16
    denoiser_batch: int = 32
    clip_batch: int = 128

    @property
    def latent(self) -> int:
        """Entries along each side of a latent."""
        return self.image >> (len(self.autoencoder) - 1)


SIZES: dict[str, Sizes] = {
    "tiny": Sizes(
        image=16, autoencoder=(8, 8), denoiser=(16, 16), heads=2, text_width=16, text_layers=1, clip_width=16,
        clip_layers=1, autoencoder_batch=4, denoiser_batch=4, clip_batch=8,
    ),
    "small": Sizes(),
    "large": Sizes(
        autoencoder=(48, 96, 128), denoiser=(160, 256, 320), heads=8, text_width=128, text_layers=4, clip_width=192,
        clip_layers=6, autoencoder_batch=128, denoiser_batch=512, clip_batch=128,
    ),
}  # fmt: skip
"""tiny: for tests, it learns nothing. small: 6 million weights, an hour on a CPU core. large: minutes on a GPU."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a small text-to-image diffusion pipeline on carv's captioned 3D world."""

    minutes: float = 60.0
    """Of training, split over the stages; each stage times its first steps and then fixes its number of steps."""
    seed: int = 0
    """Of all randomness."""
    size: SizeName = "small"
    """Of the networks: small for a CPU, large for a GPU, tiny for tests."""
    views: int = 96
    """Cameras for each object."""
    device: DeviceName = "cpu"
    """Where to train; auto takes a GPU if there is one."""
    bf16: bool = True
    """Autocast to bfloat16 while training; slower on a CPU without AVX512-BF16 or AMX."""
    autoencoder_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    denoiser_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    clip_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    autoencoder_rate: float = 2e-3
    """Highest learning rate of this stage."""
    denoiser_rate: float = 1e-3
    """Highest learning rate of this stage."""
    clip_rate: float = 1e-3
    """Highest learning rate of this stage."""
    drop_captions: float = 0.1
    """Share of the captions replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = 4.0
    """s of e_u + s (e_c - e_u), as in diffusers, for the measured samples."""
    sampling_steps: int = 25
    """DDIM steps of the measured samples."""
    samples_per_prompt: int = 2
    """Samples of each of the prompts without a view word when quality is measured; with one it is always 1."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        for name in ("views", "sampling_steps", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("autoencoder_steps", "denoiser_steps", "clip_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 lets the minutes decide")
        if not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions is a share, at least 0 and below 1, got {self.drop_captions}")
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known sizes: {', '.join(SIZES)}")

    @property
    def sizes(self) -> Sizes:
        """The networks' sizes."""
        return SIZES[self.size]

    def to_json(self) -> str:
        """One line that two equal configurations share."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)
