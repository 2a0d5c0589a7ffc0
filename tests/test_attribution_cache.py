"""The cache of latents and projected gradients: whole files, growth, and whose it is."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from carv.checkpoint import RunFolderError
from carv.tasks.attribution import cache as cache_module
from carv.tasks.attribution.cache import GradientCache

SETTINGS = {"teacher": "small", "bank": {"seed": 0, "design": "strata"}, "dimensions": 8}


def made(first: int, last: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a computation of these draws gives."""
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))[first:last]
    return vectors, vectors.norm(dim=1)


def equal(found: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor]) -> bool:
    return found is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def cache(tmp_path: Path) -> GradientCache:
    return GradientCache(tmp_path / "cache", SETTINGS)


def test_what_is_read_is_what_was_computed_bit_by_bit(cache: GradientCache) -> None:
    assert cache.rows("a", 0, 16) is None
    cache.put("a", 0, *made(0, 16))
    assert equal(cache.rows("a", 0, 16), made(0, 16))
    assert equal(cache.rows("a", 3, 5), made(3, 5))
    assert cache.rows("b", 0, 16) is None
    assert equal(GradientCache(cache.folder, SETTINGS).rows("a", 0, 16), made(0, 16))


def test_a_larger_budget_asks_only_for_what_is_missing(cache: GradientCache) -> None:
    assert cache.missing("a", 0, 64) == [(0, 64)]
    cache.put("a", 0, *made(0, 16))
    assert cache.missing("a", 0, 16) == []
    assert cache.missing("a", 0, 64) == [(16, 64)]
    cache.put("a", 32, *made(32, 40))
    assert cache.missing("a", 0, 64) == [(16, 32), (40, 64)]
    assert cache.missing("a", 4, 36) == [(16, 32)]
    assert cache.missing("a", 20, 30) == [(20, 30)]
    assert cache.rows("a", 0, 40) is None
    for first, last in cache.missing("a", 0, 64):
        cache.put("a", first, *made(first, last))
    assert equal(cache.rows("a", 0, 64), made(0, 64))


def test_files_that_overlap_are_read_once_each_draw(cache: GradientCache) -> None:
    for first, last in ((0, 4), (0, 9), (2, 6), (6, 14), (13, 20)):
        cache.put("a", first, *made(first, last))
    for first, last in ((0, 20), (5, 15), (3, 4), (8, 20)):
        assert equal(cache.rows("a", first, last), made(first, last))
    assert cache.missing("a", 0, 22) == [(20, 22)]


def test_a_damaged_file_is_dropped_and_its_draws_redone(cache: GradientCache) -> None:
    cache.put("a", 0, *made(0, 16))
    cache.put("a", 16, *made(16, 32))
    file = cache.folder / "gradients" / "a" / "16-32.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert cache.rows("a", 0, 32) is None
    assert cache.missing("a", 0, 32) == [(16, 32)]
    cache.put("a", 16, *made(16, 32))
    assert equal(cache.rows("a", 0, 32), made(0, 32))
    file.unlink()
    (cache.folder / "gradients" / "a" / "0-16.safetensors").rename(file)  # whole, but not what its name says
    other = cache.folder / "gradients" / "a" / "16-30.safetensors"
    file.rename(other)
    assert cache.rows("a", 16, 30) is None
    assert not other.exists()


def test_where_another_file_has_the_draws_of_a_damaged_one_they_are_read_there(cache: GradientCache) -> None:
    cache.put("a", 0, *made(0, 32))
    cache.put("a", 0, *made(0, 16))
    (cache.folder / "gradients" / "a" / "0-32.safetensors").write_bytes(b"torn")
    assert equal(cache.rows("a", 0, 16), made(0, 16))


def test_an_interrupted_write_loses_that_file_only(cache: GradientCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("a", 0, *made(0, 16))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("carv.checkpoint.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.put("a", 16, *made(16, 32))
    (cache.folder / "gradients" / "a" / ".16-32.safetensors.xyz").write_bytes(b"left by a killed process")
    again = GradientCache(cache.folder, SETTINGS)
    assert again.missing("a", 0, 32) == [(16, 32)]
    assert equal(again.rows("a", 0, 16), made(0, 16))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    number: int, cache: GradientCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put("a", 0, *made(0, 16))

    def full(*_: object) -> None:
        raise OSError(number, "no space")

    with monkeypatch.context() as patched:
        patched.setattr("carv.checkpoint.os.fsync", full)
        with pytest.raises(RunFolderError, match=r"the disk of .* is full: 16-32\.safetensors is not written"):
            cache.put("a", 16, *made(16, 32))
    assert equal(cache.rows("a", 0, 16), made(0, 16))
    assert cache.missing("a", 0, 32) == [(16, 32)]
    assert [path.name for path in (cache.folder / "gradients" / "a").iterdir()] == ["0-16.safetensors"]


def test_other_failures_of_a_write_are_not_called_a_full_disk(
    cache: GradientCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(cache_module, "write_whole", denied)
    with pytest.raises(PermissionError):
        cache.put("a", 0, *made(0, 16))


def test_the_cache_of_other_settings_is_refused_and_what_differs_is_named(cache: GradientCache) -> None:
    other = SETTINGS | {"bank": {"seed": 1, "design": "strata"}, "masks": "flow"}
    with pytest.raises(RunFolderError, match="another run: its bank, masks differs; name another folder"):
        GradientCache(cache.folder, other)
    GradientCache(cache.folder, dict(reversed(SETTINGS.items())))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds files but no cache\.json"):
        GradientCache(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_fingerprint_is_one_sentence(cache: GradientCache) -> None:
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(RunFolderError, match="is damaged"):
        GradientCache(cache.folder, SETTINGS)
    (cache.folder / "cache.json").write_text(json.dumps([1]))
    with pytest.raises(RunFolderError, match="another run"):
        GradientCache(cache.folder, SETTINGS)
    with pytest.raises(ValueError, match="JSON values only"):
        GradientCache(cache.folder, {"t": float("nan")})


def test_latents_are_kept_too(cache: GradientCache) -> None:
    latent = torch.randn(4, 3, 2, 2)
    assert cache.latent("a") is None
    cache.put_latent("a", latent)
    assert torch.equal(cache.latent("a"), latent)  # type: ignore[arg-type]
    (cache.folder / "latents" / "a.safetensors").write_bytes(b"torn")
    assert cache.latent("a") is None
    cache.put_latent("a", latent.transpose(2, 3))
    assert torch.equal(cache.latent("a"), latent.transpose(2, 3))  # type: ignore[arg-type]


def test_what_cannot_be_kept_is_refused(cache: GradientCache) -> None:
    with pytest.raises(ValueError, match="not finite"):
        cache.put("a", 0, torch.tensor([[float("nan")]]), torch.ones(1))
    with pytest.raises(ValueError, match="not finite"):
        cache.put_latent("a", torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match=r"vectors \[n, k\] and norms \[n\]"):
        cache.put("a", 0, torch.ones(3, 8), torch.ones(2))
    for name in ("../a", "", ".a", "a/b"):
        with pytest.raises(ValueError, match="becomes a file name"):
            cache.put(name, 0, *made(0, 4))
