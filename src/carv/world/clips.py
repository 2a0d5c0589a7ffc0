"""Short clips of real handwritten digits that move in named ways, with everything about them known."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from carv.checkpoint import write_whole
from carv.extras import require
from carv.rng import Stream, stream
from carv.world.digits import Digits, load_digits

SIZE = 32
"""Pixels along each side of a clip."""

LENGTHS = (9, 13, 17)
"""Frames: 1 + 4 n, which is what Wan's autoencoder takes."""

MOTIONS = (
    "still",
    "sliding left",
    "sliding right",
    "sliding up",
    "sliding down",
    "rotating",
    "bouncing",
    "growing",
)
"""The ways in which a digit moves, as captions say them."""

BACKGROUNDS = ("plain", "stripes", "drifting stripes")
"""What a digit moves over. Drifting stripes move too, without being what the caption's motion is about."""

_MARGIN = 7.0  # pixels from a centre to the border, half of the largest digit
_COVERED = 0.25  # opacity from which a pixel counts as the digit's
_FRAME_MILLISECONDS = 120


@dataclass(frozen=True)
class Clips:
    """N clips with what they show.

    Attributes:
        pictures: N clips [F, 32, 32] in grey, 0 to 255; F differs between clips.
        masks: N masks [F, 32, 32], where the digit is.
        digit: [N] 0 to 9.
        motion: [N] place in `MOTIONS`.
        background: [N] place in `BACKGROUNDS`.
        source: [N] place of the digit's picture in `load_digits(split)`.
    """

    pictures: tuple[UInt8[Tensor, "F 32 32"], ...]
    masks: tuple[Bool[Tensor, "F 32 32"], ...]
    digit: Int[Tensor, "N"]
    motion: Int[Tensor, "N"]
    background: Int[Tensor, "N"]
    source: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.pictures)

    def caption(self, i: int) -> str:
        """What clip i shows, in words."""
        return caption(int(self.digit[i]), MOTIONS[int(self.motion[i])], BACKGROUNDS[int(self.background[i])])

    def video(self, i: int) -> Float[Tensor, "3 F 32 32"]:
        """Clip i in [0, 1] with three equal channels, as teachers encode it."""
        return (self.pictures[i].float() / 255).expand(3, -1, -1, -1)

    @cached_property
    def lengths(self) -> dict[int, list[int]]:
        """Frames -> places of the clips that have so many."""
        places: dict[int, list[int]] = {}
        for i, clip in enumerate(self.pictures):
            places.setdefault(len(clip), []).append(i)
        return dict(sorted(places.items()))


def caption(digit: int, motion: str, background: str = "plain") -> str:
    """Such as "the digit 3 sliding left over drifting stripes"; a plain background is not mentioned."""
    return f"the digit {digit} {motion}" + ("" if background == "plain" else f" over {background}")


def all_captions() -> list[str]:
    """Every caption, digits first, backgrounds last to change least."""
    return [caption(d, motion, over) for over in BACKGROUNDS for motion in MOTIONS for d in range(10)]


def make_clips(
    count: int,
    seed: int,
    lengths: Sequence[int] = LENGTHS,
    motions: Sequence[str] = MOTIONS,
    backgrounds: Sequence[str] = BACKGROUNDS,
    split: Literal["train", "test", "all"] = "train",
) -> Clips:
    """Clips drawn uniformly over digits, motions, backgrounds and lengths.

    Clip i is addressed by (seed, i): the first 16 of 64 clips are the 16 that `make_clips(16, seed)` gives. Each
    frame is `a ink + (1 - a) background`, with the opacity a of the digit's picture, moved, turned and scaled
    (bilinear).

    Args:
        count: N.
        seed: of all randomness.
        lengths: numbers of frames to choose from.
        motions: names in `MOTIONS` to choose from.
        backgrounds: names in `BACKGROUNDS` to choose from.
        split: which of the digits' pictures to draw from, see `load_digits`.

    Raises:
        ValueError: no clips, no or unknown choices.
        ImportError: scikit-learn, which has the digits, is missing.
    """
    if count < 1:
        raise ValueError(f"make_clips needs count >= 1, got {count}")
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths must name numbers of frames, each at least 2, got {list(lengths)}")
    _check("motions", motions, MOTIONS)
    _check("backgrounds", backgrounds, BACKGROUNDS)
    digits = load_digits(split)
    drawn = [_draw(digits, stream(seed, "clips", i), lengths, motions, backgrounds) for i in range(count)]
    pictures, masks, numbers = zip(*drawn, strict=True)
    digit, motion, background, source = torch.tensor(numbers, dtype=torch.long).T.contiguous()
    return Clips(pictures, masks, digit, motion, background, source)


def select_clips(clips: Clips, places: Sequence[int]) -> Clips:
    """The clips at these places, in this order."""
    index = torch.tensor(list(places), dtype=torch.long)
    return Clips(
        tuple(clips.pictures[i] for i in places),
        tuple(clips.masks[i] for i in places),
        clips.digit[index],
        clips.motion[index],
        clips.background[index],
        clips.source[index],
    )


def write_clips(clips: Clips, folder: Path) -> list[Path]:
    """Write a grey GIF for each clip, captions.json and labels.json; returns the GIFs' paths, in order.

    The GIFs are lossless and hold every frame, equal ones too. captions.json maps file names to captions,
    labels.json maps them to {"digit", "motion", "background"}.
    """
    names = [f"clip-{i:04}.gif" for i in range(len(clips))]
    for name, clip in zip(names, clips.pictures, strict=True):
        write_whole(folder / name, grey_gif(clip))
    captions = {name: clips.caption(i) for i, name in enumerate(names)}
    labels = {
        name: {
            "digit": int(clips.digit[i]),
            "motion": MOTIONS[int(clips.motion[i])],
            "background": BACKGROUNDS[int(clips.background[i])],
        }
        for i, name in enumerate(names)
    }
    for file, content in (("captions.json", captions), ("labels.json", labels)):
        write_whole(folder / file, (json.dumps(content, indent=1) + "\n").encode())
    return [folder / name for name in names]


def grey_gif(clip: UInt8[Tensor, "F H W"]) -> bytes:
    """A GIF that loops, with all 256 greys: Pillow's own writer would merge equal frames and shorten the clip."""
    image, plugin = require("PIL.Image", "diffusers"), require("PIL.GifImagePlugin", "diffusers")
    height, width = clip.shape[1:]
    out = io.BytesIO()
    out.write(b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + bytes([0xF7, 0, 0]))
    out.write(bytes(grey for level in range(256) for grey in (level,) * 3))
    out.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")
    for frame in clip:
        for part in plugin.getdata(image.fromarray(frame.numpy()), duration=_FRAME_MILLISECONDS):
            out.write(part)
    out.write(b";")
    return out.getvalue()


@dataclass(frozen=True)
class _Path:
    """Where the digit is in each frame: centre and side in pixels, angle in radians, clockwise."""

    x: Tensor
    y: Tensor
    side: Tensor
    angle: Tensor


def _draw(
    digits: Digits, rng: Stream, lengths: Sequence[int], motions: Sequence[str], backgrounds: Sequence[str]
) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    frames = int(_choose(rng.child("length"), lengths))
    motion, background = (
        str(_choose(rng.child("motion"), motions)),
        str(_choose(rng.child("background"), backgrounds)),
    )
    digit = int(_choose(rng.child("digit"), range(10)))
    source = int(_choose(rng.child("source"), (digits.label == digit).nonzero()[:, 0].tolist()))
    ink = digits.pictures[source, 0].float() / 255
    opacity = _opacity(ink, _path(motion, frames, rng.child("path")))
    grey = _background(background, frames, rng.child("stripes"))
    brightness = 0.85 + 0.15 * _uniforms(rng.child("brightness"), 1)
    picture = opacity * brightness + (1 - opacity) * grey
    numbers = (digit, MOTIONS.index(motion), BACKGROUNDS.index(background), source)
    return (255 * picture).round().to(torch.uint8), opacity > _COVERED, numbers


def _path(motion: str, frames: int, rng: Stream) -> _Path:
    """A path of this motion with a random place, size, speed."""
    across, along, speed, phase, size, way = _uniforms(rng, 6)
    s = torch.arange(frames, dtype=torch.float64)
    one = torch.ones(frames, dtype=torch.float64)
    room = SIZE - 2 * _MARGIN
    middle = _MARGIN + room * (0.15 + 0.7 * across)
    path = _Path(middle * one, (_MARGIN + room * (0.15 + 0.7 * along)) * one, (12 + 2 * size) * one, 0 * one)
    if motion.startswith("sliding"):
        travel = 10 + 7 * speed
        place = _MARGIN + along * (room - travel) + travel * s / (frames - 1)
        if motion in ("sliding left", "sliding up"):
            place = SIZE - place
        moved = (place, middle * one) if motion in ("sliding left", "sliding right") else (middle * one, place)
        return _Path(*moved, path.side, path.angle)
    if motion == "rotating":
        turn = math.radians(10 + 8 * float(speed)) * (1 if way < 0.5 else -1)
        return _Path(path.x, path.y, path.side, turn * s)
    if motion == "bouncing":
        hop = (math.pi * (s / (5 + 3 * speed) + phase)).sin().abs()
        return _Path(path.x, SIZE - _MARGIN - (8 + 8 * along) * hop, path.side, path.angle)
    if motion == "growing":
        side = 6 + 2 * size + (10 + 4 * speed) * s / (frames - 1)
        centre = [SIZE / 2 + 6 * (u - 0.5) for u in (across, along)]
        return _Path(centre[0] * one, centre[1] * one, side, path.angle)
    return path


def _opacity(ink: Float[Tensor, "s s"], path: _Path) -> Float[Tensor, "F 32 32"]:
    """The digit's picture, drawn along a path: u = 2 R(-angle) (pixel - centre) / side, bilinear, 0 outside."""
    pixel = torch.arange(SIZE, dtype=torch.float64) + 0.5
    dx, dy = pixel[None, None, :] - path.x[:, None, None], pixel[None, :, None] - path.y[:, None, None]
    cosine, sine = path.angle.cos()[:, None, None], path.angle.sin()[:, None, None]
    scale = (2 / path.side)[:, None, None]
    where = torch.stack([scale * (cosine * dx + sine * dy), scale * (cosine * dy - sine * dx)], dim=-1)
    drawn: Tensor = functional.grid_sample(
        ink.double().expand(len(where), 1, -1, -1), where, padding_mode="zeros", align_corners=False
    )
    return drawn[:, 0]


def _background(kind: str, frames: int, rng: Stream) -> Float[Tensor, "F 32 32"]:
    """A plain dark grey, or a dark plane wave that stands still or drifts."""
    level, contrast, direction, wavelength, phase, speed, way = _uniforms(rng, 7)
    if kind == "plain":
        return torch.full((frames, SIZE, SIZE), 0.3 * float(level), dtype=torch.float64)
    angle = math.pi * direction
    pixel = torch.arange(SIZE, dtype=torch.float64)
    along = pixel[None, :] * angle.cos() + pixel[:, None] * angle.sin()
    drift = (0.7 + 0.8 * float(speed)) * (1 if way < 0.5 else -1) if kind == "drifting stripes" else 0.0
    moved = along - drift * torch.arange(frames, dtype=torch.float64)[:, None, None]
    wave: Tensor = (2 * math.pi * (moved / (8 + 8 * wavelength) + phase)).sin()
    return 0.22 + (0.12 + 0.08 * float(contrast)) * wave


def _uniforms(rng: Stream, count: int) -> Float[Tensor, "count"]:
    return torch.rand(count, generator=rng.generator(), dtype=torch.float64)


def _choose(rng: Stream, choices: Sequence[int] | Sequence[str]) -> int | str:
    return choices[int(torch.randint(len(choices), (1,), generator=rng.generator()))]


def _check(name: str, chosen: Sequence[str], known: tuple[str, ...]) -> None:
    wrong = [choice for choice in chosen if choice not in known]
    if wrong or not chosen:
        raise ValueError(f"{name} must be of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}")
