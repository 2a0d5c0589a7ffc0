"""The most memory that a piece of work needs."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak between `start` and `bytes`.

    On a CUDA device what tensors hold at once, in all. On a CPU by how much the process grows (its resident set,
    which Linux keeps the peak of): memory that it held before and uses again does not count. Elsewhere unknown.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            try:
                _CLEAR.write_text("5")  # proc(5): resets the peak resident set size
                self._before = _resident("VmRSS")
            except OSError:  # not Linux, or a container that forbids it
                self._before = None

    def bytes(self) -> int | None:
        """The peak since `start`; `None` where it is not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self._before is None:
            return None
        return max(0, _resident("VmHWM") - self._before)


def _resident(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
