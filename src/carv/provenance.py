"""What every record carries: versions, machine and device."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def provenance(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Versions of carv, torch and Python, the device, and the number of threads."""
    try:
        carv_version = version("carv")
    except PackageNotFoundError:  # run from a source tree that is not installed
        carv_version = "not installed"
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "carv": carv_version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
