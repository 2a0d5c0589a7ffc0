"""What a caller may choose when a teacher is read from a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """The choices of `DiffusersTeacher.from_pretrained`, see there. `None` means the pipeline's own value.

    Raises:
        ValueError: a value that no pipeline can have.
    """

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    size: int | tuple[int, int] | None = None
    frames: int | None = None
    max_tokens: int | None = None
    distilled_guidance: float | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if not (self.dtype.is_floating_point and self.vae_dtype.is_floating_point):
            raise ValueError(f"dtype and vae_dtype must be floating-point types, got {self.dtype} and {self.vae_dtype}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.distilled_guidance is not None and not math.isfinite(self.distilled_guidance):
            raise ValueError(f"distilled_guidance must be a finite number, got {self.distilled_guidance}")

    def refuse(self, pipeline: str, *names: str) -> None:
        """Raise for options that a pipeline has no use for.

        Raises:
            ValueError: one of them was given.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} means nothing to this {pipeline}: leave it out")

    def picture_size(self, default: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels.

        Args:
            default: the pipeline's.
            multiple: what height and width must be multiples of.

        Raises:
            ValueError: they are not.
        """
        size = (self.size, self.size) if isinstance(self.size, int) else self.size or default
        if any(pixels < 1 or pixels % step for pixels, step in zip(size, multiple, strict=True)):
            raise ValueError(
                f"this teacher takes pictures whose height and width are multiples of {multiple[0]} and "
                f"{multiple[1]} pixels, got size {size[0]} x {size[1]}"
            )
        return size


def pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Height and width from a config that may give one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_width(got: int, expected: int, what: str) -> None:
    """Raise where two components of a folder do not fit together, before a matrix product does.

    Raises:
        ValueError: naming both widths.
    """
    if got != expected:
        raise ValueError(f"the folder's components do not fit together: {what} has width {got}, not {expected}")
