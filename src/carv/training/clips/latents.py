"""The latents that the decoder and the transformer are trained on, and how batches of them are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv.rng import Stream
from carv.training.clips.text import CAPTIONS
from carv.world.clips import Clips


@dataclass(frozen=True)
class LatentClips:
    """The latents of N clips, of unit scale, with their captions.

    Attributes:
        latents: N tensors [C, f, 4, 4], with f = (F - 1)/4 + 1.
        caption: [N] place in `carv.training.clips.text.CAPTIONS`.
    """

    latents: tuple[Float[Tensor, "C f h w"], ...]
    caption: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def lengths(self) -> dict[int, list[int]]:
        """Latent frames -> places of the clips that have so many."""
        places: dict[int, list[int]] = {}
        for i, latent in enumerate(self.latents):
            places.setdefault(latent.shape[1], []).append(i)
        return dict(sorted(places.items()))

    def select(self, places: list[int]) -> LatentClips:
        """The latents at these places, in this order."""
        return LatentClips(tuple(self.latents[i] for i in places), self.caption[places])


def latent_clips(latents: list[Float[Tensor, "C f h w"]], clips: Clips) -> LatentClips:
    """Latents of clips with the numbers of the clips' captions."""
    number = {caption: i for i, caption in enumerate(CAPTIONS)}
    return LatentClips(tuple(latents), torch.tensor([number[clips.caption(i)] for i in range(len(clips))]))


def draw_batch(lengths: dict[int, list[int]], batch: int, rng: Stream) -> list[int]:
    """Places of at most `batch` different clips of one length; each clip is as likely as every other.

    Args:
        lengths: latent frames -> places of the clips that have so many.
        batch: how many; all clips of the length, if they are fewer.
        rng: of this step.
    """
    counts = torch.tensor([len(places) for places in lengths.values()], dtype=torch.float64)
    # A short list is drawn as often as its clips' share asks for, in batches as large as it has.
    sizes = counts.clamp(max=batch)
    chosen = int(torch.multinomial(counts / sizes, 1, generator=rng.child("length").generator()))
    places = list(lengths.values())[chosen]
    order = torch.randperm(len(places), generator=rng.child("clips").generator())[:batch]
    return [places[i] for i in order.tolist()]
