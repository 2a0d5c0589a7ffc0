"""What a CLIP does to pictures before it looks at them, read from its folder and done in torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Newer folders have the first file, with the pictures' settings inside; older ones the second.
_FILES = ("processor_config.json", "preprocessor_config.json")
_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# What a CLIPImageProcessor assumes where its file says nothing.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": 224,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale and normalise: x -> (scale x - mean) / std for pictures x in [0, 1].

    Resizing is antialiased and clamped to [0, 1], as Pillow's but for its rounding to bytes.

    Attributes:
        mean: of each channel.
        std: of each channel.
        shortest: pixels that the shorter side gets, if `size` is None; None for no resizing.
        size: height and width in pixels that every picture gets.
        crop: height and width in pixels of the middle that is kept; None keeps all.
        mode: of resizing, bicubic or bilinear.
        scale: 1 for the usual rescaling of bytes by 1/255.

    Source:
        CLIPImageProcessor of transformers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mode: str = "bicubic"
    scale: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """The settings in a folder's processor_config.json or preprocessor_config.json.

        Raises:
            ValueError: neither file is there, or one that says something else.
        """
        path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if path is None:
            raise ValueError(f"{folder} does not say how its pictures are prepared: it lacks {_FILES[1]}")
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(given.get("image_processor", given))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a CLIP image processor's settings: {error}") from error

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Preprocessing:
        """The settings in the words of a CLIPImageProcessor."""
        said = _DEFAULTS | {key: value for key, value in given.items() if value is not None}
        size = said["size"] if said["do_resize"] else {}
        if said["do_resize"] and said["resample"] not in _MODES:
            raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic), got {said['resample']!r}")
        shortest = size.get("shortest_edge") if isinstance(size, Mapping) else int(size)
        return cls(
            mean=_three(said["image_mean"]) if said["do_normalize"] else (0.0,) * 3,
            std=_three(said["image_std"]) if said["do_normalize"] else (1.0,) * 3,
            shortest=shortest,
            size=_height_and_width(size) if size and shortest is None else None,
            crop=_height_and_width(said["crop_size"]) if said["do_center_crop"] else None,
            mode=_MODES.get(said["resample"], "bicubic"),
            scale=255 * float(said["rescale_factor"]) if said["do_rescale"] else 255.0,
        )

    def __call__(self, images: Float[Tensor, "M 3 H W"]) -> Float[Tensor, "M 3 h w"]:
        """What the model reads.

        Args:
            images: in [0, 1].

        Raises:
            ValueError: pictures smaller than the crop.
        """
        mean, std = (torch.tensor(numbers).to(images)[:, None, None] for numbers in (self.mean, self.std))
        return (self.scale * self._cropped(self._resized(images)) - mean) / std

    def _resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.size is not None:
            wanted = self.size
        elif self.shortest is not None:
            ratio = self.shortest * max(height, width)
            longest = ratio // min(height, width)
            wanted = (self.shortest, longest) if height <= width else (longest, self.shortest)
        else:
            return images
        if wanted == (height, width):
            return images
        # Across and then down, clamped in between: what a bicubic overshoots is cut off twice, as by Pillow.
        for step in ((height, wanted[1]), wanted):
            images = functional.interpolate(images, step, mode=self.mode, antialias=True).clamp(0, 1)
        return images

    def _cropped(self, images: Tensor) -> Tensor:
        if self.crop is None:
            return images
        (height, width), (high, wide) = images.shape[-2:], self.crop
        if high > height or wide > width:
            raise ValueError(f"a crop of {high}x{wide} pixels needs pictures as large, got {height}x{width}")
        top, left = (height - high) // 2, (width - wide) // 2
        return images[..., top : top + high, left : left + wide]


def _height_and_width(given: Any) -> tuple[int, int]:
    if isinstance(given, Mapping):
        return int(given["height"]), int(given["width"])
    return int(given), int(given)


def _three(given: Any) -> tuple[float, ...]:
    numbers = tuple(map(float, given))
    if len(numbers) != 3:
        raise ValueError(f"image_mean and image_std need three numbers, got {len(numbers)}")
    return numbers
