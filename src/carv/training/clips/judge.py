"""Stage 3: a small classifier of clips, which says what digit it sees and how it moves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from carv.checkpoint import write_whole
from carv.rng import Stream
from carv.training.clips.latents import draw_batch
from carv.world.clips import MOTIONS, Clips

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NOISE, _SHIFT = 0.08, 2  # the largest standard deviation (pictures are in [0, 1]); pixels
_AT_ONCE = 64


class ClipJudge(nn.Module):
    """Clips [B, F, 32, 32] in [0, 1], grey, to logits of 10 digits and of `MOTIONS`.

    Three convolutions of stride 2 look at each frame. The digit is decided from the mean over frames, the motion from
    two convolutions over time.

    Args:
        width: channels of the last convolution and of the convolutions over time.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.frames = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, 2, 1),
            nn.GroupNorm(2, width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            nn.GroupNorm(2, width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, 1, 1),
            nn.GELU(),
        )
        self.places = nn.Linear(32 * width, width)
        self.times = nn.Sequential(
            nn.Conv1d(width, width, 3, 1, 1), nn.GELU(), nn.Conv1d(width, width, 3, 1, 1), nn.GELU()
        )
        self.digit, self.motion = nn.Linear(2 * width, 10), nn.Linear(width, len(MOTIONS))

    def forward(self, pictures: Float[Tensor, "B F 32 32"]) -> tuple[Float[Tensor, "B 10"], Float[Tensor, "B 8"]]:
        """Logits of the digit and of the motion."""
        count, frames = pictures.shape[:2]
        seen = self.frames(2 * pictures.flatten(0, 1)[:, None] - 1)
        looks = seen.amax(dim=(2, 3)).view(count, frames, -1).mean(dim=1)
        where = self.places(seen.flatten(1)).view(count, frames, -1)
        moves = self.times(where.transpose(1, 2)).mean(dim=2)
        return self.digit(looks), self.motion(moves)

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, in float16."""
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / _WEIGHTS, save(weights))
        write_whole(folder / _CONFIG, (json.dumps({"class": "ClipJudge", "width": self.width}) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: Path) -> ClipJudge:
        """The judge in a folder, frozen.

        Raises:
            ValueError: it is not there, or not one of these.
        """
        try:
            judge = cls(int(json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["width"]))
            judge.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / _WEIGHTS).items()})
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no judge of clips: {error}") from error
        return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdicts:
    """What the judge makes of N clips.

    Attributes:
        digit: [N] the likeliest digit.
        motion: [N] the likeliest place in `MOTIONS`.
    """

    digit: Int[Tensor, "N"]
    motion: Int[Tensor, "N"]


@torch.no_grad()
def judge_clips(judge: ClipJudge, clips: list[Float[Tensor, "F 32 32"]]) -> Verdicts:
    """The likeliest digit and motion of grey clips in [0, 1], which may differ in length."""
    digit, motion = torch.zeros(len(clips), dtype=torch.long), torch.zeros(len(clips), dtype=torch.long)
    for frames in sorted({len(clip) for clip in clips}):
        places = [i for i, clip in enumerate(clips) if len(clip) == frames]
        for first in range(0, len(places), _AT_ONCE):
            chunk = places[first : first + _AT_ONCE]
            digits, motions = judge(torch.stack([clips[i] for i in chunk]))
            digit[chunk], motion[chunk] = digits.argmax(1), motions.argmax(1)
    return Verdicts(digit, motion)


@dataclass(frozen=True)
class JudgeLoss:
    """Cross-entropy of the digit plus that of the motion, on clips that are shifted and made noisy.

    Noise keeps the judge from leaning on what only true clips have.

    Attributes:
        judge: to train.
        clips: to draw from.
        batch: clips in a step.
        rng: the stage's stream.
        device: where the network is.
    """

    judge: ClipJudge
    clips: Clips
    batch: int
    rng: Stream
    device: torch.device

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        places = draw_batch(self.clips.lengths, self.batch, rng)
        pictures = augment(torch.stack([self.clips.pictures[i] for i in places]).float() / 255, rng).to(self.device)
        digits, motions = self.judge(pictures)
        return functional.cross_entropy(digits, self.clips.digit[places].to(self.device)) + functional.cross_entropy(
            motions, self.clips.motion[places].to(self.device)
        )


def augment(pictures: Float[Tensor, "B F 32 32"], rng: Stream) -> Float[Tensor, "B F 32 32"]:
    """Each clip moved by up to two pixels (edges repeated), with noise of a strength of its own."""
    generator = rng.child("augment").generator()
    shifts = torch.randint(2 * _SHIFT + 1, (len(pictures), 2), generator=generator).tolist()
    padded = functional.pad(pictures, (_SHIFT,) * 4, mode="replicate")
    size = pictures.shape[-1]
    moved = torch.stack([clip[:, y : y + size, x : x + size] for clip, (y, x) in zip(padded, shifts, strict=True)])
    strength = _NOISE * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return (moved + strength * torch.randn(moved.shape, generator=generator)).clamp(0, 1)
