"""Where tensors live, by the names that the command line has."""

from __future__ import annotations

from typing import Literal

import torch

DeviceName = Literal["cpu", "cuda", "auto"]


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; use --device cpu")
    return torch.device(name)
