"""The real digits that the small DiT is trained on, and distorted copies of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from carv.rng import stream
from carv.training.digits import data
from carv.training.digits.data import augmented, distorted
from carv.world.digits import Digits, load_digits

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


# The digits.


def test_the_digits_are_scikit_learns_enlarged_in_grey() -> None:
    digits = load_digits("all")
    assert digits.pictures.shape == (1797, 3, 16, 16)
    assert digits.pictures.dtype == torch.uint8
    assert (digits.pictures == digits.pictures[:, :1]).all()
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    assert digits.label.tolist() == raw.target.tolist()
    small_again = functional.avg_pool2d(digits.floats()[:, 0], 2)
    assert (small_again - torch.as_tensor(raw.images / 16)).abs().mean() < 0.05


def test_the_split_is_a_fixed_fifth_of_each_digit_and_loses_none() -> None:
    train_split, test_split, everything = (load_digits(name) for name in ("train", "test", "all"))
    assert (len(train_split), len(test_split)) == (1438, 359)
    shares = torch.bincount(test_split.label) / torch.bincount(everything.label)
    assert shares.sub(0.2).abs().max() < 0.003
    rows = [sorted(map(bytes, part.pictures.flatten(1).numpy())) for part in (train_split, test_split, everything)]
    assert sorted(rows[0] + rows[1]) == rows[2]
    assert not set(rows[0]) & set(rows[1])  # no picture is in both
    assert test_split.label[:20].tolist() == [4, 7, 8, 4, 1, 7, 3, 1, 0, 8, 0, 6, 5, 5, 0, 7, 1, 3, 7, 9]


def test_another_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train', 'test' or 'all'"):
        load_digits("validation")  # type: ignore[arg-type]


# Copies of them.


def test_the_first_of_each_copies_is_the_real_picture_and_the_others_resemble_it() -> None:
    digits = load_digits("test")
    seen = augmented(digits, 4, stream(0, "copies"))
    assert torch.equal(seen.images[::4], digits.pictures)
    assert torch.equal(seen.label, digits.label.repeat_interleave(4))
    pictures = seen.images.float().reshape(len(digits), 4, -1) / 255
    apart = (pictures[:, 1:] - pictures[:, :1]).square().mean(dim=2).sqrt()
    strangers = (pictures[1:, 0] - pictures[:-1, 0]).square().mean(dim=1).sqrt()
    assert apart.min() > 0.005
    assert apart.mean() < 0.4 * strangers.mean()


def dots(count: int) -> Tensor:
    """A round blob right of the middle."""
    axis = torch.arange(16) - 7.5
    blob = torch.exp(-((axis[None] - 3) ** 2 + axis[:, None] ** 2) / 4)
    return blob.expand(count, 3, 16, 16)


def middles(pictures: Tensor) -> Tensor:
    """[N, 2] down and right, in pixels from the middle."""
    axis, mass = torch.arange(16) - 7.5, pictures[:, 0] / pictures[:, 0].sum(dim=(1, 2), keepdim=True)
    return torch.stack([mass.sum(dim=2) @ axis, mass.sum(dim=1) @ axis], dim=1)


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in {"TURN", "SCALE", "SHEAR", "MOVE"} - {name}:
        monkeypatch.setattr(data, other, 0.0)


def test_a_distortion_of_size_zero_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "none")
    pictures = load_digits("test").floats()[:9]
    torch.testing.assert_close(distorted(pictures, stream(0, "d")), pictures, atol=1e-5, rtol=0)


def test_each_distortion_has_the_size_it_is_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest of 2000 uniform draws is within 1% of the bound, except once in e^20 runs.
    start = middles(dots(1))[0]
    for name, size in (("MOVE", 0.5), ("TURN", 3 * torch.pi * 8 / 180), ("SCALE", 3 * 0.06), ("SHEAR", 0.0)):
        with monkeypatch.context() as patch:
            only(patch, name)
            moved = middles(distorted(dots(2000), stream(0, name))) - start
            largest = moved.abs().amax(dim=0)
        if name == "MOVE":
            assert largest.tolist() == pytest.approx([size, size], rel=0.05)
        if name == "TURN":
            assert float(largest[0]) == pytest.approx(size, rel=0.05)
            assert float(moved[:, 0].mean()) == pytest.approx(0, abs=0.03)  # both ways: 4 standard errors
        if name == "SCALE":
            assert float(largest[1]) == pytest.approx(size, rel=0.1)
        if name == "SHEAR":  # about the middle: what lies to its right stays
            assert largest.max() < 0.05


def test_an_epoch_shows_every_picture_once() -> None:
    seen = augmented(load_digits("test"), 2, stream(0, "copies"))
    each = len(seen) // 50
    drawn = torch.cat([seen.batch(step, 50, stream(0, "data")) for step in range(each)])
    assert len(drawn.unique()) == len(drawn) == 50 * each
    again = torch.cat([seen.batch(each + step, 50, stream(0, "data")) for step in range(each)])
    assert not torch.equal(again, drawn)


def test_digits_are_a_dataclass_of_bytes_and_labels() -> None:
    digits = Digits(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8), torch.tensor([1, 2]))
    assert len(digits) == 2
    assert float(digits.floats().max()) == 1
