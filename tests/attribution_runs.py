"""Runs of `carv attribute` on a tiny random Wan and clips of noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from carv.rng import stream
from carv.tasks.attribution.config import AttributionConfig
from carv.tasks.attribution.run import load_teacher

from tiny_pipelines import wan_of_plain_latents

image = pytest.importorskip("PIL.Image")

_LOADED: dict[str, Any] = {}


def save_teacher(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    wan_of_plain_latents(layers=1).save_pretrained(folder)
    return folder


def write_clip(path: Path, seed: int, frames: int = 5, still: bool = False) -> None:
    grey = torch.rand(frames, 16, 16, generator=stream(seed, "clip").generator())
    grey = grey[:1].expand(frames, -1, -1) if still else grey
    drawn = [image.fromarray((255 * frame).to(torch.uint8).numpy()) for frame in grey]
    if still:  # equal frames are merged by Pillow: a last pixel keeps them apart
        for i, frame in enumerate(drawn):
            frame.putpixel((15, 15), 4 * (i % 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=100, loop=0)


def settings(teacher: Path, data: Path, **changes: Any) -> AttributionConfig:
    base = AttributionConfig(
        train=(str(data / "train"),),
        query=(str(data / "query" / "one.gif"),),
        teacher=str(teacher),
        draws=8,
        first=4,
        top_k=1,
        dimensions=64,
        size=16,
        frames=9,
        max_tokens=16,
    )
    return dataclasses.replace(base, **changes)


def load_once(config: AttributionConfig) -> Any:
    if config.teacher not in _LOADED:
        _LOADED[config.teacher] = load_teacher(config)
    return _LOADED[config.teacher]
