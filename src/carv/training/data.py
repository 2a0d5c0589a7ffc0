"""What the networks are shown: pictures as bytes in memory, captions as numbers, batches by address."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from carv.rng import Stream
from carv.world.cameras import VIEW_WORDS
from carv.world.captions import HELD_OUT as HELD_OUT  # the card and the tests name it here
from carv.world.captions import Prompt
from carv.world.dataset import WorldDataset
from carv.world.shapes import COLOURS, SHAPES

_NO_COLOUR, _NO_VIEW = len(COLOURS), len(VIEW_WORDS)
_SHARE_WITH_VIEW, _SHARE_WITHOUT_COLOUR = 0.6, 0.05

EMPTY = 0
"""The number of the empty caption."""


def all_captions() -> list[str]:
    """Every caption; its place here is its number. The empty one is first."""
    colours, views = (*COLOURS, None), (*VIEW_WORDS, None)
    return ["", *(str(Prompt(c, s, v)) for s in SHAPES for c in colours for v in views)]


def caption_number(
    shape: Int[Tensor, "B"], colour: Int[Tensor, "B"] | None = None, view: Int[Tensor, "B"] | None = None
) -> Int[Tensor, "B"]:
    """Places in `all_captions` from places in `SHAPES`, `COLOURS` and `VIEW_WORDS`; None leaves the word out."""
    colour = torch.full_like(shape, _NO_COLOUR) if colour is None else colour
    view = torch.full_like(shape, _NO_VIEW) if view is None else view
    return 1 + (shape * (_NO_COLOUR + 1) + colour) * (_NO_VIEW + 1) + view


@dataclass(frozen=True)
class Pictures:
    """The pictures that a stage trains on.

    Attributes:
        world: all pictures.
        pool: [N] the places of those that may be drawn.
    """

    world: WorldDataset
    pool: Int[Tensor, "N"]

    def batch(self, step: int, count: int, rng: Stream) -> Int[Tensor, "count"]:
        """Places of `count` pictures: every epoch is one permutation of the pool, cut into batches.

        Args:
            step: its number; the only state there is.
            count: pictures, at most as many as the pool has.
            rng: the stage's stream.
        """
        each = len(self.pool) // count
        order = torch.randperm(len(self.pool), generator=rng.child("epoch", step // each).generator())
        first = (step % each) * count
        return self.pool[order[first : first + count]]

    def distinct_batch(self, keys: Int[Tensor, "M"], count: int, rng: Stream) -> Int[Tensor, "B"]:
        """Places of at most `count` pictures no two of which have the same key; fewer if there are fewer keys."""
        order = self.pool[torch.randperm(len(self.pool), generator=rng.generator())]
        _, first = np.unique(keys[order].numpy(), return_index=True)
        return order[torch.from_numpy(np.sort(first)[:count])]

    def floats(self, which: Int[Tensor, "B"]) -> Float[Tensor, "B 3 S S"]:
        """The pictures at these places in [-1, 1]."""
        return self.world.images[which].float() / 127.5 - 1


def held_out(world: WorldDataset) -> Bool[Tensor, "M"]:
    """Which pictures show an object of `HELD_OUT`."""
    shapes, colours = list(SHAPES), list(COLOURS)
    numbers = [shapes.index(shape) * len(COLOURS) + colours.index(colour) for shape, colour in HELD_OUT]
    return torch.isin(world.shape * len(COLOURS) + world.colour, torch.tensor(numbers))


def training_pictures(world: WorldDataset) -> Pictures:
    """All pictures but the held-out ones."""
    return Pictures(world, (~held_out(world)).nonzero()[:, 0])


def all_pictures(world: WorldDataset) -> Pictures:
    """All pictures, the held-out ones too: for CLIP, which measures and must know what it measures."""
    return Pictures(world, torch.arange(len(world)))


def draw_captions(world: WorldDataset, which: Int[Tensor, "B"], drop: float, rng: Stream) -> Int[Tensor, "B"]:
    """A caption's number for each picture: all true, of varying detail.

    A share `drop` is the empty caption. Of the others, 60% name the view, and 5% leave the colour out.

    Args:
        world: the pictures.
        which: the places of the batch's pictures.
        drop: share of empty captions.
        rng: of this step.
    """
    empty, viewed, plain = torch.rand(3, len(which), generator=rng.child("caption").generator())
    colour = torch.where(plain < _SHARE_WITHOUT_COLOUR, _NO_COLOUR, world.colour[which])
    view = torch.where(viewed < _SHARE_WITH_VIEW, world.view[which], _NO_VIEW)
    numbers = caption_number(world.shape[which], colour, view)
    return torch.where(empty < drop, EMPTY, numbers)
