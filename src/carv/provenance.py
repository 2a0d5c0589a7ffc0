"""What every record carries: versions, machine and device."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Versions of carv (with a digest of its source), torch and Python, the device, and the number of threads."""
    try:
        carv_version = version("carv")
    except PackageNotFoundError:  # run from a source tree that is not installed
        carv_version = "not installed"
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "carv": carv_version,
        "source": source_digest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


@cache
def source_digest() -> str:
    """16 hex digits that change with any of carv's Python files: versions alone do not tell two checkouts apart."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
