"""Motion masks are where a clip moves, on the latent grid, and a user's own are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from carv.rng import stream
from carv.tasks.attribution.motion import motion_magnitude, motion_mask, read_mask, to_latent_grid
from carv.world.clips import make_clips

LATENT = (16, 3, 8, 8)  # of nine frames of 64 x 64


def texture(*shape: int, seed: int) -> Tensor:
    """Smooth random grey levels in [0, 1]: something that flow can follow."""
    rough = torch.rand(1, 1, *(side // 4 for side in shape), generator=stream(seed).generator())
    return interpolate(rough, size=shape, mode="bicubic").clamp(0, 1)[0, 0]


def moving(dx: int, dy: int, frames: int = 9, background: float = 1.0) -> tuple[Tensor, Tensor]:
    """A textured square of 20 pixels that moves over a textured still ground, and where it is: `[F, 64, 64]`."""
    ground, square = background * texture(64, 64, seed=0) * 0.4, 0.5 + 0.5 * texture(20, 20, seed=1)
    clip, where = ground.repeat(frames, 1, 1), torch.zeros(frames, 64, 64)
    for f in range(frames):
        place = (f, slice(22 + dy * f, 42 + dy * f), slice(14 + dx * f, 34 + dx * f))
        clip[place], where[place] = square, 1
    return clip.expand(3, -1, -1, -1), where


@pytest.fixture(autouse=True)
def _opencv() -> None:
    pytest.importorskip("cv2")


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, 2), (1, -2)])
def test_the_flow_of_a_moving_square_is_its_speed_and_nothing_elsewhere(dx: int, dy: int) -> None:
    clip, where = moving(dx, dy)
    found, speed = motion_magnitude(clip), (dx**2 + dy**2) ** 0.5
    assert found.shape == (9, 64, 64)
    for f in range(9):  # the last frame, too
        assert float(found[f][where[f] == 1].median()) == pytest.approx(speed, rel=0.05)
    far = torch.nn.functional.max_pool2d(where[:, None], 25, 1, 12)[:, 0] == 0
    assert float(found[far].mean()) < 0.01 * speed


def test_the_mask_is_on_the_latent_grid_and_bright_where_the_clip_moves() -> None:
    clip, where = moving(2, 0)
    found, true = motion_mask(clip, LATENT), to_latent_grid(where, LATENT)
    assert found.mask.shape == LATENT[1:]
    assert not found.still
    assert float(found.mask.min()) >= 0
    assert float(found.mask.max()) <= 1
    assert float(found.mask[true > 0.9].mean()) > 0.8
    assert float(found.mask[true == 0].mean()) < 0.25
    assert float(torch.corrcoef(torch.stack([found.mask.flatten(), true.flatten()]))[0, 1]) > 0.8


@pytest.mark.parametrize("background", ["plain", "stripes"])
def test_the_masks_of_moving_digits_are_where_the_digits_are(background: str) -> None:
    """Against the true masks of twelve clips, grown by the pixel that interpolation blurs over."""
    pytest.importorskip("sklearn")
    motions = ("sliding left", "sliding up", "rotating", "bouncing")
    clips, found = make_clips(12, 1, motions=motions, backgrounds=[background]), []
    for i, digit in enumerate(clips.masks):
        shape = (16, 1 + (len(digit) - 1) // 4, 4, 4)
        grown = torch.nn.functional.max_pool2d((digit | digit.roll(-1, 0))[:, None].float(), 3, 1, 1)[:, 0]
        both = torch.stack([motion_mask(clips.video(i), shape).mask, to_latent_grid(grown, shape)])
        found.append(float(torch.corrcoef(both.flatten(1))[0, 1]))
    assert min(found) > 0.65
    assert sum(found) / 12 > 0.9


def test_digits_that_stand_still_are_still() -> None:
    pytest.importorskip("sklearn")
    clips = make_clips(4, 2, motions=["still"], backgrounds=["plain", "stripes"], lengths=[9])
    assert all(motion_mask(clips.video(i), (16, 3, 4, 4)).still for i in range(4))


def test_slow_and_fast_clips_have_the_same_mask_scale() -> None:
    slow, fast = (motion_mask(moving(dx, 0)[0], LATENT).mask for dx in (1, 3))
    assert float(slow.max()) == pytest.approx(float(fast.max()), abs=0.1)


def test_a_still_clip_is_said_and_keeps_all_of_its_loss() -> None:
    """The mutants: zeros, which have no gradient, and codec noise scaled up to 1."""
    clip, _ = moving(0, 0)
    noise = torch.randn(clip.shape, generator=stream(3).generator()) / 255
    for still in (clip, (clip + noise).clamp(0, 1), torch.zeros(3, 9, 64, 64)):
        found = motion_mask(still, LATENT)
        assert found.still
        assert torch.equal(found.mask, torch.ones(3, 8, 8))


def test_small_clips_are_enlarged_for_the_flow() -> None:
    clip, where = moving(2, 0)
    small = interpolate(clip[0][:, None], size=(32, 32), mode="area")[:, 0].expand(3, -1, -1, -1)
    at = interpolate(where[:, None], size=(32, 32), mode="area")[:, 0] == 1
    assert float(motion_magnitude(small)[at].median()) == pytest.approx(1, rel=0.2)


def test_the_same_clip_has_the_same_mask_whatever_came_before() -> None:
    clip, _ = moving(2, 0)
    first = motion_magnitude(clip)
    motion_magnitude(moving(0, 2)[0])
    assert torch.equal(motion_magnitude(clip), first)


def test_latent_frame_zero_is_frame_zero_and_the_others_average_four() -> None:
    mask = torch.arange(9.0)[:, None, None].expand(9, 64, 64)
    assert to_latent_grid(mask, LATENT)[:, 0, 0].tolist() == [0, 2.5, 6.5]
    half = torch.zeros(1, 64, 64)
    half[:, :, :4] = 1
    assert to_latent_grid(half, (16, 1, 8, 8))[0, 0].tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="8 frames does not fit 3 latent frames"):
        to_latent_grid(mask[:8], LATENT)


def test_a_picture_has_no_motion() -> None:
    for picture in (torch.rand(3, 64, 64), torch.rand(3, 1, 64, 64)):
        with pytest.raises(ValueError, match="at least two frames"):
            motion_mask(picture, LATENT)


@pytest.mark.parametrize(
    ("shape", "want"),
    [((3, 8, 8), [0.25] * 3), ((9, 64, 64), [0.25] * 3), ((12, 16, 16), [0.25] * 3), ((16, 16), [0.25] * 3)],
)
def test_own_masks_come_on_the_latent_grid_or_in_frames_or_as_one(
    tmp_path: Path, shape: tuple[int, ...], want: list[float]
) -> None:
    (tmp_path / "cats").mkdir()
    save_file({"mask": torch.full(shape, 0.25)}, tmp_path / "cats" / "one.safetensors")
    found = read_mask(tmp_path, "cats/one.mp4", 9, LATENT)
    assert found.shape == (3, 8, 8)
    assert found[:, 0, 0].tolist() == want


def test_own_masks_may_be_pictures_and_gifs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = [image.new("L", (16, 16), 255 * (f % 2)) for f in range(9)]
    frames[0].save(tmp_path / "one.gif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "two.png")
    assert read_mask(tmp_path, "one.mp4", 9, LATENT)[:, 0, 0].tolist() == [0, 0.5, 0.5]
    assert read_mask(tmp_path, "two.png", 1, (4, 8, 8)).tolist() == torch.ones(8, 8).tolist()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no mask for one.mp4"),
        ({"masks": torch.ones(9, 8, 8)}, 'no tensor "mask" but masks'),
        ({"mask": torch.ones(9, 8, 8) * 1.5}, r"within \[0, 1\]"),
        ({"mask": torch.ones(9, 8, 8) / 0}, r"within \[0, 1\]"),
        ({"mask": torch.zeros(9, 8, 8)}, "zero everywhere"),
        ({"mask": torch.ones(5, 8, 8)}, "5 frames, its clip 9"),
        ({"mask": torch.ones(2, 9, 8, 8)}, "shape"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_sentence(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    if tensors:
        save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=says):
        read_mask(tmp_path, "one.mp4", 9, LATENT)


@pytest.mark.parametrize("name", ["one.safetensors", "one.gif"])
def test_a_damaged_mask_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GIF89a no more")
    with pytest.raises(ValueError, match="cannot be read"):
        read_mask(tmp_path, "one.mp4", 9, LATENT)
