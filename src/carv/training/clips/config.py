"""The settings of a training run of the small video teacher."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from carv.devices import DeviceName

SizeName = Literal["tiny", "small", "large"]

STAGE_SHARES = {"autoencoder": 0.35, "finish": 0.15, "text": 0.02, "denoiser": 0.4, "judge": 0.08}
"""How the minutes are split. Making the clips, encoding and measuring come on top."""


@dataclass(frozen=True)
class ClipsSizes:
    """How large the networks and their batches are.

    Attributes:
        base: channels of the autoencoder at its highest resolution, 16 x 16 patches of 2 x 2 pixels.
        multiples: of `base` at its three resolutions; the last two are equal, for the shortcut between them.
        channels: of the latents.
        heads: of the transformer.
        head_width: of each; a multiple of 6 or more, which the rotary positions share.
        layers: of the transformer.
        feed_forward: hidden units of its layers.
        text_width: of the text encoder.
        text_layers: of the text encoder.
        judge_width: channels of the judge's last convolution.
        autoencoder_batch: pieces of 9 frames in a step.
        finish_batch: whole clips in a step.
        text_batch: captions in a step.
        denoiser_batch: latents in a step; also the number of timestep strata. Few are best on a CPU: in equal time,
            steps of 8 at a rate of 2e-3 reach a lower loss than steps of 32 at 1e-3.
        judge_batch: clips in a step.
    """

    base: int = 24
    multiples: tuple[int, int, int] = (1, 2, 2)
    channels: int = 16
    heads: int = 4
    head_width: int = 24
    layers: int = 6
    feed_forward: int = 384
    text_width: int = 64
    text_layers: int = 2
    judge_width: int = 64
    autoencoder_batch: int = 8
    finish_batch: int = 6
    text_batch: int = 64
    denoiser_batch: int = 8
    judge_batch: int = 64


CLIPS_SIZES: dict[str, ClipsSizes] = {
    "tiny": ClipsSizes(
        base=4, multiples=(1, 1, 1), channels=4, heads=2, head_width=12, layers=1, feed_forward=16, text_width=16,
        text_layers=1, judge_width=8, autoencoder_batch=2, finish_batch=2, text_batch=4, denoiser_batch=4,
        judge_batch=4,
    ),
    "small": ClipsSizes(),
    "large": ClipsSizes(
        base=64, multiples=(1, 4, 4), heads=8, head_width=48, layers=12, feed_forward=1536, text_width=256,
        text_layers=4, judge_width=128, autoencoder_batch=64, finish_batch=64, denoiser_batch=256, judge_batch=128,
    ),
}  # fmt: skip
"""tiny: for tests, it learns nothing. small: 2.6 million weights, an hour on a CPU core. large: for a GPU."""


@dataclass(frozen=True)
class ClipsConfig:
    """Train a small text-to-video diffusion pipeline on clips of moving digits."""

    minutes: float = 40.0
    """Of training, split over the stages; each stage times its first steps and then fixes its number of steps."""
    seed: int = 0
    """Of all randomness; the training set is `make_clips(clips, seed)`."""
    size: SizeName = "small"
    """Of the networks: small for a CPU, large for a GPU, tiny for tests."""
    clips: int = 1024
    """Clips in the training set of the autoencoder and the transformer."""
    judge_clips: int = 3072
    """Clips that the judge is trained on; of the same digits, drawn with the next seed."""
    unseen_clips: int = 480
    """Clips of digits that nothing was trained on, for measuring; drawn with the seed after that."""
    device: DeviceName = "cpu"
    """Where to train; auto takes a GPU if there is one."""
    bf16: bool = True
    """Autocast the autoencoder to bfloat16 while training; the transformer is slower with it on a CPU."""
    autoencoder_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    finish_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    text_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    denoiser_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    judge_steps: int = 0
    """Steps of this stage; 0 lets the minutes decide."""
    autoencoder_rate: float = 3e-3
    """Highest learning rate of this stage."""
    finish_rate: float = 2e-3
    """Highest learning rate of this stage."""
    text_rate: float = 3e-3
    """Highest learning rate of this stage."""
    denoiser_rate: float = 2e-3
    """Highest learning rate of this stage."""
    judge_rate: float = 2e-3
    """Highest learning rate of this stage."""
    drop_captions: float = 0.1
    """Share of the captions replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = 4.0
    """s of v_u + s (v_c - v_u), as in diffusers, for the measured samples."""
    sampling_steps: int = 20
    """Euler steps of the measured samples."""
    samples_per_caption: int = 1
    """Samples of each of the 240 captions when quality is measured."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        for name in ("clips", "judge_clips", "unseen_clips", "sampling_steps", "samples_per_caption"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("autoencoder_steps", "finish_steps", "text_steps", "denoiser_steps", "judge_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 lets the minutes decide")
        if not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions is a share, at least 0 and below 1, got {self.drop_captions}")
        if self.size not in CLIPS_SIZES:
            raise ValueError(f"unknown size {self.size!r}; known sizes: {', '.join(CLIPS_SIZES)}")

    @property
    def sizes(self) -> ClipsSizes:
        """The networks' sizes."""
        return CLIPS_SIZES[self.size]

    def to_json(self) -> str:
        """One line that two equal configurations share."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)
