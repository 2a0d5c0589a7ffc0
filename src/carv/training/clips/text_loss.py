"""Stage 3: the text encoder, before the transformer sees its states, as Wan's own is trained before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from carv.rng import Stream
from carv.training.clips.text import CAPTIONS, text_states
from carv.world.clips import BACKGROUNDS, MOTIONS

DIGITS = 10
_PARTS = (DIGITS, len(MOTIONS), len(BACKGROUNDS))


def meanings() -> Int[Tensor, "C 3"]:
    """Digit, place in `MOTIONS` and place in `BACKGROUNDS` of each of `CAPTIONS` but the first, the empty one."""
    grid = [torch.arange(count) for count in (len(BACKGROUNDS), len(MOTIONS), DIGITS)]
    return torch.cartesian_prod(*grid).flip(1)  # `all_captions` changes digits first, backgrounds last


class Reader(nn.Module):
    """Tells digit, motion and background from each of a caption's states by one linear map.

    Trained with the encoder, so that each state of a caption says all of it: the transformer's attention over states is
    even at first, and its loss says little about digits until late. An encoder that learned from that loss alone, at
    the transformer's rate, gave all digits nearly the same states.

    Args:
        text_encoder: from `text.build_text_encoder`.
        ids: tokens of `text.CAPTIONS`.
    """

    ids: Tensor

    def __init__(self, text_encoder: Any, ids: Int[Tensor, "C length"]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.tell = nn.Linear(text_encoder.config.d_model, sum(_PARTS))
        self.register_buffer("ids", ids)

    def forward(self, caption: Int[Tensor, "B"]) -> tuple[Float[Tensor, "n logits"], Int[Tensor, "n"]]:
        """Logits of every word of these captions, and the place of each word's caption in the batch."""
        ids = self.ids[caption]
        words = ids != int(self.text_encoder.config.pad_token_id)
        logits: Tensor = self.tell(text_states(self.text_encoder, ids)[words])
        return logits, words.nonzero()[:, 0]


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of digit, motion and background, a sum of the three, a mean over words.

    Attributes:
        reader: to train.
        batch: captions in a step, none of them empty.
        rng: the stage's stream.
        device: where the network is.
    """

    reader: Reader
    batch: int
    rng: Stream
    device: torch.device

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        drawn = torch.randint(len(CAPTIONS) - 1, (self.batch,), generator=self.rng.child("step", step).generator())
        logits, of = self.reader((drawn + 1).to(self.device))
        wanted = meanings()[drawn].to(self.device)[of]
        parts = zip(logits.split(_PARTS, dim=1), wanted.unbind(1), strict=True)
        return torch.stack([functional.cross_entropy(told, true) for told, true in parts]).sum()
