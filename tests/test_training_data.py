"""The words and pictures that carv's own small Stable Diffusion is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carv.rng import stream
from carv.training.data import (
    HELD_OUT,
    all_captions,
    all_pictures,
    caption_number,
    draw_captions,
    held_out,
    training_pictures,
)
from carv.training.tokenizer import LENGTH, WORDS, build_tokenizer, byte_pairs, caption_ids
from carv.world.cameras import VIEW_WORDS
from carv.world.captions import parse_prompt
from carv.world.dataset import WorldDataset, load_world
from carv.world.shapes import COLOURS, SHAPES

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(cache: Path) -> WorldDataset:
    return load_world(16, 4, cache_dir=cache)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


# The words.


def test_every_known_word_is_one_token_of_its_own(tokenizer: Any) -> None:
    tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(WORDS)


def test_a_word_from_elsewhere_falls_into_letters_and_none_is_unknown(tokenizer: Any) -> None:
    ids = tokenizer("zebra 7 é", add_special_tokens=False).input_ids
    assert len(ids) > 3
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "zebra7é"


def test_every_caption_fits_and_reads_back(tokenizer: Any) -> None:
    ids = caption_ids(tokenizer)
    assert ids.shape == (len(all_captions()), LENGTH)
    assert (ids[:, -1] == tokenizer.eos_token_id).all()  # nothing was cut off: padding is the end token
    for caption, row in zip(all_captions(), ids, strict=True):
        read = tokenizer.decode(row, skip_special_tokens=True).replace(" , ", ", ")
        assert read == caption


def test_merges_applied_in_order_spell_every_word() -> None:
    merges = byte_pairs(WORDS)
    assert len(set(merges)) == len(merges)
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == (left, right):
                    symbols[i : i + 2] = [left + right]
                i += 1
        assert symbols == [word + "</w>"]


# The data.


def test_a_captions_number_is_its_place_among_all(world: WorldDataset) -> None:
    captions = all_captions()
    assert len(set(captions)) == len(captions) == 1 + len(SHAPES) * (len(COLOURS) + 1) * (len(VIEW_WORDS) + 1)
    numbers = caption_number(world.shape, world.colour, world.view)
    for i in range(0, len(world), 37):
        said = parse_prompt(captions[numbers[i]])
        assert (said.shape, said.colour) == (list(SHAPES)[world.shape[i]], list(COLOURS)[world.colour[i]])
        assert said.view == VIEW_WORDS[world.view[i]]


def test_drawn_captions_are_true_and_come_in_their_shares(world: WorldDataset) -> None:
    which = torch.arange(len(world)).repeat(20)  # 10240 captions: shares have standard errors below 0.005
    captions = all_captions()
    said = [parse_prompt(captions[n]) for n in draw_captions(world, which, 0.1, stream(0, "captions")).tolist()]
    named = [prompt for prompt in said if prompt.shape is not None]
    # Four standard errors: a false alarm once in 16,000 runs; shares that are off by 0.04 are always caught.
    assert len(named) / len(said) == pytest.approx(0.9, abs=0.02)
    assert sum(p.view is not None for p in named) / len(named) == pytest.approx(0.6, abs=0.02)
    assert sum(p.colour is None for p in named) / len(named) == pytest.approx(0.05, abs=0.02)
    for i, prompt in zip(which.tolist(), said, strict=True):
        assert prompt.shape in (None, list(SHAPES)[world.shape[i]])
        assert prompt.colour in (None, list(COLOURS)[world.colour[i]])
        assert prompt.view in (None, VIEW_WORDS[world.view[i]])


def test_held_out_objects_are_never_drawn_and_everything_else_is_once_an_epoch(world: WorldDataset) -> None:
    pictures = training_pictures(world)
    assert len(pictures.pool) == len(world) - 4 * len(HELD_OUT)
    each = len(pictures.pool) // 10
    drawn = torch.cat([pictures.batch(step, 10, stream(0, "data")) for step in range(each)])
    assert not held_out(world)[drawn].any()
    assert len(drawn.unique()) == len(drawn) == 10 * each
    again = torch.cat([pictures.batch(each + step, 10, stream(0, "data")) for step in range(each)])
    assert not torch.equal(again, drawn)  # another epoch, another order


def test_held_out_objects_use_each_shape_and_colour_once_at_most() -> None:
    assert len({shape for shape, _ in HELD_OUT}) == len(HELD_OUT) == len({colour for _, colour in HELD_OUT})
    assert ("chair", "red") not in HELD_OUT


def test_a_distinct_batch_repeats_no_caption_and_varies(world: WorldDataset) -> None:
    pictures, keys = all_pictures(world), caption_number(world.shape, world.colour)
    first, second = (pictures.distinct_batch(keys, 50, stream(0, "distinct", i)) for i in range(2))
    assert len(keys[first].unique()) == len(first) == 50
    assert not torch.equal(keys[first], keys[second])
    everything = pictures.distinct_batch(keys, 1000, stream(0, "distinct", 2))
    assert len(everything) == 128  # there are no more captions
