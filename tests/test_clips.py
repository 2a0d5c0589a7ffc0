"""Clips of moving digits: what they show is what is said of them, and they are addressed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from carv.world.clips import (
    BACKGROUNDS,
    LENGTHS,
    MOTIONS,
    SIZE,
    Clips,
    all_captions,
    caption,
    grey_gif,
    make_clips,
    select_clips,
    write_clips,
)

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

COUNT = 200


@pytest.fixture(scope="module")
def clips() -> Clips:
    from carv.world.digits import load_digits

    assert len(load_digits("train").label) > 1000
    return make_clips(COUNT, 0)


def moving(name: str, count: int = 6) -> Clips:
    """Clips of one motion on a plain background."""
    return make_clips(count, 1, motions=[name], backgrounds=["plain"])


def centres(mask: Tensor) -> Tensor:
    """[F, 2] the mean x and y of the mask's pixels."""
    pixel = torch.arange(SIZE, dtype=torch.float64) + 0.5
    area = mask.sum(dim=(1, 2)).double()
    return torch.stack([(mask.double().sum(dim=1) @ pixel) / area, (mask.double().sum(dim=2) @ pixel) / area], dim=1)


def test_a_clip_is_addressed_by_its_seed_and_number_not_by_how_many_are_made(clips: Clips) -> None:
    few = make_clips(8, 0)
    assert all(map(torch.equal, few.pictures, clips.pictures))
    assert all(map(torch.equal, few.masks, clips.masks))
    for name in ("digit", "motion", "background", "source"):
        assert torch.equal(getattr(few, name), getattr(clips, name)[:8])
    other = make_clips(8, 1)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(few.pictures, other.pictures, strict=True))


def test_digits_motions_backgrounds_and_lengths_are_all_drawn_uniformly(clips: Clips) -> None:
    # Chi-squared at its 1e-4 quantile: four false alarms in 10,000 seeds. A value drawn half as often as the others
    # raises the statistic of 8 motions by about 6; one that is never drawn, by 25.
    lengths = torch.tensor([LENGTHS.index(len(clip)) for clip in clips.pictures])
    drawn = ((clips.digit, 10, 33.7), (clips.motion, 8, 29.9), (clips.background, 3, 18.4), (lengths, 3, 18.4))
    for values, kinds, limit in drawn:
        counts = torch.bincount(values, minlength=kinds).double()
        expected = COUNT / kinds
        assert float(((counts - expected) ** 2 / expected).sum()) < limit


def test_the_mask_is_where_the_picture_differs_from_its_background() -> None:
    clips = make_clips(12, 2, backgrounds=["plain"])
    for picture, mask in zip(clips.pictures, clips.masks, strict=True):
        near = functional.max_pool2d(mask[:, None].float(), 11, 1, 5)[:, 0].bool()  # faint ink around
        level = picture[~near].unique()
        assert len(level) == 1
        assert (picture[mask] > level).all()
        assert 25 < mask.sum(dim=(1, 2)).float().mean() < 200


@pytest.mark.parametrize(
    ("name", "step"),
    [("sliding left", (-1, 0)), ("sliding right", (1, 0)), ("sliding up", (0, -1)), ("sliding down", (0, 1))],
)
def test_a_sliding_digit_goes_the_way_its_caption_says_at_a_constant_speed(name: str, step: tuple[int, int]) -> None:
    for mask in moving(name).masks:
        path = centres(mask)
        travelled = (path[-1] - path[0]) @ torch.tensor(step, dtype=torch.float64)
        assert 9 < travelled < 18
        straight = path[0] + torch.linspace(0, 1, len(path), dtype=torch.float64)[:, None] * (path[-1] - path[0])
        assert (path - straight).abs().max() < 0.6  # pixels: a mask's edge is


def test_a_still_digit_stays_and_a_rotating_one_turns_in_its_place() -> None:
    for mask in moving("still").masks:
        assert (mask == mask[0]).all()
    for mask in moving("rotating").masks:
        assert (centres(mask) - centres(mask)[0]).norm(dim=1).max() < 4  # its ink is not centred in its picture
        overlap = (mask[0] & mask).sum(dim=(1, 2)) / (mask[0] | mask).sum(dim=(1, 2))
        assert overlap[4:].max() < 0.8
        area = mask.sum(dim=(1, 2)).double()
        assert area.std() / area.mean() < 0.15


def test_a_growing_digit_grows_in_its_place() -> None:
    for mask in moving("growing").masks:
        area = mask.sum(dim=(1, 2)).double()
        assert area[-1] > 3 * area[0]
        assert (area[2:] >= area[:-2]).all()


def test_a_bouncing_digit_goes_up_and_down_and_not_sideways() -> None:
    for mask in moving("bouncing").masks:
        path = centres(mask)
        assert (path[:, 0] - path[0, 0]).abs().max() < 0.6
        steps = path[:, 1].diff()
        assert steps.min() < -0.5
        assert steps.max() > 0.5


def test_every_digit_stays_in_the_picture(clips: Clips) -> None:
    for i, mask in enumerate(clips.masks):
        assert (mask.sum(dim=(1, 2)) > 5).all()
        share = mask.sum(dim=(1, 2)).double()
        if MOTIONS[int(clips.motion[i])] in ("still", "bouncing") or "sliding" in MOTIONS[int(clips.motion[i])]:
            assert share.min() > 0.6 * share.max()  # a little of a corner may be cut off


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_only_drifting_stripes_change_where_no_digit_ever_is(name: str) -> None:
    clips = make_clips(6, 3, backgrounds=[name], motions=["still", "sliding up"])
    for picture, mask in zip(clips.pictures, clips.masks, strict=True):
        free = ~functional.max_pool2d(mask.any(dim=0)[None].float(), 5, 1, 2)[0].bool()
        over_time = picture[:, free].float().std(dim=0).mean()
        over_space = picture[:, free].float().std(dim=1).mean()
        assert (over_time > 5) == (name == "drifting stripes")
        assert (over_space > 5) == (name != "plain")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_source_is_the_place_of_a_picture_of_that_digit_in_its_split(split: str) -> None:
    from carv.world.digits import load_digits

    label = load_digits(split).label  # type: ignore[arg-type]
    clips = make_clips(20, 4, split=split)  # type: ignore[arg-type]
    assert torch.equal(label[clips.source], clips.digit)


def test_a_caption_names_digit_motion_and_background() -> None:
    assert caption(3, "sliding left", "drifting stripes") == "the digit 3 sliding left over drifting stripes"
    assert caption(3, "still") == "the digit 3 still"
    assert len(set(all_captions())) == 10 * len(MOTIONS) * len(BACKGROUNDS)


def test_a_clips_caption_is_among_all_and_its_video_is_grey_in_the_unit_interval(clips: Clips) -> None:
    known = set(all_captions())
    for i in range(20):
        assert clips.caption(i) in known
        video = clips.video(i)
        assert video.shape == (3, *clips.pictures[i].shape)
        assert torch.equal(video[0], video[2])
        assert torch.equal((255 * video[1]).round().to(torch.uint8), clips.pictures[i])


def test_lengths_hold_every_clip_once_and_a_selection_keeps_its_order(clips: Clips) -> None:
    assert sorted(i for places in clips.lengths.values() for i in places) == list(range(COUNT))
    assert all(len(clips.pictures[i]) == frames for frames, places in clips.lengths.items() for i in places)
    some = select_clips(clips, [7, 3])
    assert torch.equal(some.pictures[0], clips.pictures[7])
    assert torch.equal(some.masks[1], clips.masks[3])
    assert [some.caption(i) for i in range(2)] == [clips.caption(7), clips.caption(3)]
    assert some.source.tolist() == [int(clips.source[7]), int(clips.source[3])]


def test_gifs_hold_every_frame_unchanged_equal_ones_too(clips: Clips, tmp_path: Path) -> None:
    still = make_clips(2, 5, lengths=[13], motions=["still"], backgrounds=["plain"])
    few = Clips(
        still.pictures + clips.pictures[:6],
        still.masks + clips.masks[:6],
        *(torch.cat([getattr(still, n), getattr(clips, n)[:6]]) for n in ("digit", "motion", "background", "source")),
    )
    paths = write_clips(few, tmp_path)
    for path, picture in zip(paths, few.pictures, strict=True):
        with Image.open(path) as file:
            assert file.n_frames == len(picture)
            for f in range(file.n_frames):
                file.seek(f)
                assert np.array_equal(np.array(file.convert("L")), picture[f].numpy())
    captions, labels = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "labels"))
    assert list(captions) == list(labels) == [path.name for path in paths]
    for i, path in enumerate(paths):
        said = labels[path.name]
        assert captions[path.name] == few.caption(i) == caption(said["digit"], said["motion"], said["background"])


def test_a_gif_keeps_all_256_greys_and_other_sizes() -> None:
    ramp = torch.arange(512, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 16, 32).repeat(3, 1, 1)
    import io

    with Image.open(io.BytesIO(grey_gif(ramp))) as file:
        assert file.size == (32, 16)
        assert file.info["loop"] == 0
        assert file.info["duration"] == 120
        assert np.array_equal(np.array(file.convert("L")), ramp[0].numpy())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 0}, "count >= 1, got 0"),
        ({"lengths": []}, "lengths must name numbers of frames"),
        ({"lengths": [9, 1]}, "each at least 2, got"),
        ({"motions": ["flying"]}, "motions must be of still, .*got 'flying'"),
        ({"backgrounds": []}, "backgrounds must be of plain, .*got 'none'"),
        ({"split": "validation"}, "split"),
    ],
)
def test_a_wrong_choice_is_named_with_what_is_known(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_clips(**({"count": 2, "seed": 0} | wrong))  # type: ignore[arg-type]
