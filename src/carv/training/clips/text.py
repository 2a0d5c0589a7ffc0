"""The words of the clips' captions: a T5 tokenizer in which each is one token, and a small UMT5 encoder."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv.extras import require
from carv.training.clips.config import ClipsSizes
from carv.world.clips import all_captions

LENGTH = 16
"""Tokens of every caption, with padding; the longest has 9 with its last."""

CAPTIONS = ("", *all_captions())
"""Every caption; its place here is its number. The empty one is first."""

_SPACE = "▁"  # sentencepiece's mark of a word's beginning
_SPECIAL = ("<pad>", "</s>", "<unk>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
_WORD, _LETTER = -3.0, -12.0  # log probabilities: a known word is always cheaper than its letters


def words() -> list[str]:
    """The words that are single tokens; any other text falls into letters."""
    return sorted({word for caption in CAPTIONS for word in caption.split()})


def build_tokenizer() -> Any:
    """A `T5Tokenizer` of about 70 tokens that pads to `LENGTH`."""
    tokens = [(token, 0.0) for token in _SPECIAL]
    tokens += [(_SPACE + word, _WORD) for word in words()]
    known = {token for token, _ in tokens}
    tokens += [(letter, _LETTER) for letter in (_SPACE, *_LETTERS) if letter not in known]
    return require("transformers", "diffusers").T5TokenizerFast(vocab=tokens, extra_ids=0, model_max_length=LENGTH)


def build_text_encoder(tokenizer: Any, sizes: ClipsSizes) -> Any:
    """A `UMT5EncoderModel` with random weights."""
    transformers = require("transformers", "diffusers")
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer),
        d_model=sizes.text_width,
        d_kv=sizes.text_width // 4,
        d_ff=2 * sizes.text_width,
        num_layers=sizes.text_layers,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=LENGTH,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return transformers.UMT5EncoderModel(config)


def caption_ids(tokenizer: Any) -> Int[Tensor, "C length"]:
    """The tokens of `CAPTIONS`, padded as the pipeline pads prompts."""
    ids: Tensor = tokenizer(
        list(CAPTIONS), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(torch.long)


def text_states(text_encoder: Any, ids: Int[Tensor, "B length"]) -> Float[Tensor, "B length w"]:
    """The last hidden states as Wan's pipeline gives them: zero at padding, which nothing attends to."""
    mask = ids != int(text_encoder.config.pad_token_id)
    states: Tensor = text_encoder(ids, mask.long()).last_hidden_state
    return states * mask[:, :, None].to(states.dtype)
