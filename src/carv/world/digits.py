"""Real handwritten digits, small enough to ship with a package: UCI's, as scikit-learn has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from carv.extras import require
from carv.rng import stream

DigitsSplit = Literal["train", "test", "all"]

SIZE, CLASSES = 16, 10
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """N grey pictures of handwritten digits, bright strokes on black, with what they show.

    Attributes:
        pictures: [N, 3, 16, 16] bytes, three equal channels.
        label: [N] the digit, 0 to 9.
    """

    pictures: UInt8[Tensor, "N 3 16 16"]
    label: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.pictures)

    def floats(self) -> Float[Tensor, "N 3 16 16"]:
        """The pictures in [0, 1]."""
        return self.pictures.float() / 255


def load_digits(split: DigitsSplit = "train") -> Digits:
    """The 1,797 digits of scikit-learn, 8x8 enlarged to 16x16 by bicubic interpolation.

    They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0):
    32x32 scans of 13 writers, with the ink counted in blocks of 4x4. The split here is fixed: a fifth of each digit is
    "test". Writers are not told apart in the data, so both parts have digits of the same writers.

    Args:
        split: "train" (1,438), "test" (359) or "all", in scikit-learn's order.

    Raises:
        ValueError: another split.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: it is 'train', 'test' or 'all'")
    raw = require("sklearn.datasets", "distill").load_digits()
    label = torch.as_tensor(raw.target).long()
    ink = torch.as_tensor(raw.images).float()[:, None] / 16
    large = functional.interpolate(ink, size=SIZE, mode="bicubic").clamp(0, 1)
    pictures = (255 * large).round().to(torch.uint8).repeat(1, 3, 1, 1)
    if split == "all":
        return Digits(pictures, label)
    kept = _is_test(label) == (split == "test")
    return Digits(pictures[kept], label[kept])


def _is_test(label: Tensor) -> Tensor:
    """A fifth of each digit, chosen by a stream of its own."""
    chosen = torch.zeros(len(label), dtype=torch.bool)
    for digit in range(CLASSES):
        places = (label == digit).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=stream(0, "digits", "split", digit).generator())
        chosen[places[order[: round(_TEST_SHARE * len(places))]]] = True
    return chosen
