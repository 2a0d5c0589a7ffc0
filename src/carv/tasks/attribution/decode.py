"""Frames of video and picture files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from carv.extras import require

VIDEOS = frozenset({".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v"})
PICTURES = frozenset({".gif", ".png", ".jpg", ".jpeg", ".webp", ".bmp"})  # .gif and .webp may be animated


def decode(path: Path, max_frames: int | None = None) -> UInt8[Tensor, "F H W 3"]:
    """The frames of a file, RGB; a picture is one frame. Videos are read by PyAV, pictures by Pillow.

    Args:
        path: of the file.
        max_frames: stop after so many.

    Raises:
        ValueError: a file that cannot be decoded, without frames, or with frames of several sizes.
        ImportError: the package that decodes it is not installed.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    read = _video if path.suffix.lower() in VIDEOS else _pictures
    try:
        frames = list(islice(read(path), max_frames))
    except (OSError, EOFError, SyntaxError, ValueError) as error:  # PyAV's errors are OSErrors and ValueErrors
        raise ValueError(f"{path} cannot be decoded ({error}): it is damaged, or not what its name says") from error
    if not frames:
        raise ValueError(f"{path} has no frames")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        shown = " and ".join(f"{shape[1]} x {shape[0]}" for shape in sorted(sizes))
        raise ValueError(f"{path} has frames of several sizes: {shown}")
    return torch.from_numpy(np.stack(frames))


def _video(path: Path) -> Iterator[np.ndarray]:
    av = require("av", "attribution")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _pictures(path: Path) -> Iterator[np.ndarray]:
    image, ops = require("PIL.Image", "attribution"), require("PIL.ImageOps", "attribution")
    with image.open(path) as file:
        frames = getattr(file, "n_frames", 1)
        for index in range(frames):
            file.seek(index)
            shown = ops.exif_transpose(file) if frames == 1 else file
            yield np.asarray(shown.convert("RGB"))
