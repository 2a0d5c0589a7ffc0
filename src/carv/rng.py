"""Addressable random streams: the numbers depend on an address, never on order, worker or rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

# Layout of torch's CPU generator state (CPUGeneratorImplState): 24 bytes of counters, then the 624
# words of MT19937, each in 8 bytes. `tests/test_rng.py` checks it against NumPy's MT19937.
_MT19937_WORDS = 624
_MT19937_OFFSET = 24
_FRESH_STATE = torch.Generator().manual_seed(0).get_state().numpy()


@dataclass(frozen=True)
class Stream:
    """A random stream named by a seed and a path, such as `stream(0, "step", 12, "render", 3)`.

    Two streams with different addresses are independent; the same address gives the same numbers on
    every worker and rank, in any order. Children are addressed relative to their parent.

    Attributes:
        seed: any integer.
        path: integers and strings; `1` and `"1"` are different addresses.

    Example:
        >>> step = stream(0, "step", 12)
        >>> step.child("render", 3) == stream(0, "step", 12, "render", 3)
        True
    """

    seed: int
    path: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        for part in (self.seed, *self.path):
            if isinstance(part, bool) or not isinstance(part, (int, str)):
                raise TypeError(
                    f"a stream's address holds integers and strings only, got {part!r} of type {type(part).__name__}"
                )

    def child(self, *path: int | str) -> Stream:
        """The stream at `path` below this one."""
        return Stream(self.seed, self.path + path)

    def digest(self, length: int) -> bytes:
        """`length` bytes that stand for this address: SHAKE-256 of its parts, each with type and length."""
        shake = hashlib.shake_256()
        for part in (self.seed, *self.path):
            text = str(part).encode()
            shake.update(b"%b%d:%b" % (b"i" if isinstance(part, int) else b"s", len(text), text))
        return shake.digest(length)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator at the start of this stream.

        torch's CPU generator keeps only 32 bits of a seed, so that among 10^5 streams some would be
        equal; here all 624 words of its state come from the address instead. Generators on other
        devices (Philox) take a 63-bit seed. CPU and accelerator numbers differ.

        Args:
            device: where the random numbers will be made.
        """
        device = torch.device(device)
        if device.type != "cpu":
            return torch.Generator(device).manual_seed(int.from_bytes(self.digest(8), "little") >> 1)
        words = np.frombuffer(self.digest(4 * _MT19937_WORDS), np.uint32).copy()
        words[0] = 0x80000000  # as in the reference initialisation: the state is never all zero
        state = _FRESH_STATE.copy()
        state[_MT19937_OFFSET : _MT19937_OFFSET + 8 * _MT19937_WORDS].view(np.uint64)[:] = words
        generator = torch.Generator()
        generator.set_state(torch.from_numpy(state))
        return generator


def stream(seed: int, *path: int | str) -> Stream:
    """The stream at an address, see `Stream`."""
    return Stream(seed, path)
