"""A CLIP tokenizer over the world's words: byte-pair merges that make every known word one token."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from carv.extras import require
from carv.training.data import all_captions
from carv.world.cameras import VIEW_WORDS
from carv.world.shapes import COLOURS, SHAPES

LENGTH = 16
"""Tokens of every caption, with padding; the longest has 9 with its first and last."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"  # CLIP's mark on the last symbol of a word

WORDS = ("a", "an", "the", "view", *COLOURS, *SHAPES, *VIEW_WORDS)
"""The words that are single tokens; any other text falls into letters, so nothing is ever unknown."""


def build_tokenizer() -> Any:
    """A `CLIPTokenizer` of about 650 tokens: all bytes, the merges that spell `WORDS`, and the two marks."""
    letters = sorted(require("tokenizers", "diffusers").pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pairs(WORDS)
    tokens = [
        *letters,
        *(letter + _LAST for letter in letters),
        *(left + right for left, right in merges),
        _START,
        _END,
    ]
    return require("transformers", "diffusers").CLIPTokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=LENGTH,
    )


def byte_pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that, applied in order, turn each word into one token (Sennrich et al. 2016, until none is left).

    Each merge is the most frequent pair of neighbours, the alphabetically first one if several are.

    Example:
        >>> byte_pairs(("cat", "at"))
        [('a', 't</w>'), ('c', 'at</w>')]
    """
    spelled = [[*word[:-1], word[-1] + _LAST] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelled):
        counts: dict[tuple[str, str], int] = {}
        for symbols in spelled:
            for pair in itertools.pairwise(symbols):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def caption_ids(tokenizer: Any) -> Int[Tensor, "C length"]:
    """The tokens of `all_captions`, padded as the pipeline pads prompts."""
    ids: Tensor = tokenizer(
        all_captions(), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(torch.long)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
