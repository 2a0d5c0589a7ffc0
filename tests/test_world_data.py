"""The data of the small world: the same for a seed, evenly seen, and cached."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from carv.world import dataset
from carv.world.cameras import VIEW_WORDS, WORLD_RANGE, view_word
from carv.world.dataset import WorldDataset, data_cameras, load_world
from carv.world.render import render_object
from carv.world.shapes import COLOURS, SHAPES


def load_small(folder: Path, seed: int = 0) -> WorldDataset:
    return load_world(size=8, views=4, seed=seed, cache_dir=folder)


def same(first: WorldDataset, second: WorldDataset) -> bool:
    return all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(folder: Path) -> WorldDataset:
    return load_small(folder)


@pytest.fixture
def rendered(world: WorldDataset, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rendering for the tests of the cache: at once, and counted."""
    seeds: list[int] = []

    def render(size: int, views: int, seed: int, progress: object) -> WorldDataset:
        seeds.append(seed)
        return world

    monkeypatch.setattr(dataset, "_render_world", render)
    return seeds


def test_same_seed_gives_the_same_images(world: WorldDataset, tmp_path: Path) -> None:
    assert same(world, load_small(tmp_path))


def test_another_seed_gives_other_images(world: WorldDataset, tmp_path: Path) -> None:
    assert not torch.equal(world.images, load_small(tmp_path, seed=1).images)


def test_the_data_holds_every_shape_in_every_colour_from_every_view(world: WorldDataset) -> None:
    assert world.images.shape == (len(SHAPES) * len(COLOURS) * 4, 3, 8, 8)
    pairs = world.shape * len(COLOURS) + world.colour
    assert (torch.bincount(pairs) == 4).all()
    for index in (0, 100, len(world) - 1):
        word = view_word(world.azimuth[index].item(), world.elevation[index].item())
        assert VIEW_WORDS[world.view[index]] == word


def test_the_data_agrees_with_the_true_pictures(world: WorldDataset) -> None:
    seen = world.mask("a green house")
    truth = render_object("a green house", data_cameras("house", 4, 0), 8)
    assert (world.images[seen] / 255 - truth).abs().max() <= 0.5 / 255 + 1e-6


def test_data_cameras_cover_azimuth_and_elevation_evenly() -> None:
    cameras = data_cameras("chair", 48, 0)
    low, high = WORLD_RANGE.elevation
    assert torch.equal((cameras.azimuth / 7.5).long(), torch.arange(48))
    elevation = (cameras.elevation - low) / (high - low)
    # Each cell of 6 x 4 has its two of the 48, give or take one.
    cells = torch.bincount((cameras.azimuth / 60).long() * 4 + (elevation * 4).long(), minlength=24)
    assert cells.min() >= 1
    assert cells.max() <= 3


def test_the_teacher_sees_images_between_minus_one_and_one(world: WorldDataset) -> None:
    images = world.images_float()
    assert -1 <= images.min() < -0.8
    assert images.max() <= 1
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), world.images)


def test_a_mask_selects_what_the_prompt_describes(world: WorldDataset) -> None:
    assert world.mask("").all()
    assert world.mask("a chair").sum() == 4 * len(COLOURS)
    assert world.mask("a red chair").sum() == 4
    views = torch.stack([world.mask(f"a red chair, {word} view") for word in VIEW_WORDS])
    assert torch.equal(views.sum(0).bool(), world.mask("a red chair"))
    assert views.sum() == 4
    with pytest.raises(ValueError, match="burger"):
        world.mask("a burger")


def test_the_second_load_reads_the_cache(
    world: WorldDataset, folder: Path, rendered: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert same(world, load_small(folder))
    assert not rendered
    assert not caplog.records


def test_the_cache_folder_comes_from_the_environment(
    world: WorldDataset, folder: Path, rendered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARV_CACHE", str(folder))
    assert same(world, load_world(size=8, views=4))
    assert not rendered


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_the_cache_survives_damage(
    damage: str,
    world: WorldDataset,
    folder: Path,
    rendered: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (cached,) = folder.iterdir()
    content = cached.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 5000}[damage]
    (tmp_path / cached.name).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert same(world, load_small(tmp_path))
    assert rendered == [0]
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "rendering them again" in caplog.text
    assert (tmp_path / cached.name).read_bytes() == content


def test_an_unwritable_cache_is_done_without(
    world: WorldDataset, rendered: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert same(world, load_small(tmp_path / "file" / "below"))
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "cannot be cached" in caplog.text


def test_a_failed_write_leaves_nothing_behind(
    world: WorldDataset, rendered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    assert same(world, load_small(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_changed_renderer_reads_no_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataset._settings_hash(8, 4, 0)
    source = Path(dataset.__file__).parent
    for name in dataset._SOURCES:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr(dataset, "__file__", str(tmp_path / "dataset.py"))
    assert dataset._settings_hash(8, 4, 0) == before
    for name in dataset._SOURCES:
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        after = dataset._settings_hash(8, 4, 0)
        assert after != before
        before = after


def test_other_settings_have_other_files() -> None:
    hashes = {dataset._settings_hash(*settings) for settings in ((8, 4, 0), (16, 4, 0), (8, 5, 0), (8, 4, 1))}
    assert len(hashes) == 4


def test_progress_counts_the_shapes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_world(size=4, views=1, cache_dir=tmp_path, progress=lambda done, count: calls.append((done, count)))
    assert calls == [(done, len(SHAPES)) for done in range(len(SHAPES) + 1)]
