"""Data-parallel processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel ones, each with R renders of its own."""

    rank: int = 0
    world: int = 1

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their mean over all ranks, in place."""
        if self.world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat / self.world, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


ALONE = Ranks()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started (WORLD_SIZE in the environment), or this process alone.

    Args:
        device: nccl on a GPU, of which each process takes the one of its LOCAL_RANK; gloo elsewhere.
    """
    distributed = torch.distributed
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    ours = not distributed.is_initialized()
    if ours:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if ours:
            distributed.destroy_process_group()
