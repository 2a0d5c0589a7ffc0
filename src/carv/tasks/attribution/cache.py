"""Latents and projected gradients on disk: whole files only, resumable, growing, and of one run's settings."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from carv.checkpoint import RunFolderError, write_whole

_INDEX = "cache.json"
_RANGE = re.compile(r"(\d+)-(\d+)\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class GradientCache:
    """A folder of latents and projected gradients, addressed by (example, draw).

        FOLDER/cache.json                                  the fingerprint
        FOLDER/latents/EXAMPLE.safetensors                 z
        FOLDER/gradients/EXAMPLE/FIRST-LAST.safetensors    vectors [n, k] and norms [n] of the draws FIRST .. LAST - 1

    Every file is written whole, and the names are the index: a crash loses at most the file in the making, workers do
    not disturb each other, and a damaged file is dropped so that its draws are made again.

    Args:
        folder: made if absent.
        fingerprint: what is kept depends on beside the example and the draw's number: teacher, size and frames, masks,
            bank, projector, parameters. JSON values.

    Raises:
        RunFolderError: the folder holds the cache of another fingerprint (the message names what differs), or other
            files and no cache; or the disk is full.
        ValueError: a fingerprint that is not JSON.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        try:
            ours = json.dumps(dict(fingerprint), sort_keys=True, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a cache's fingerprint holds JSON values only: {error}") from error
        index = self.folder / _INDEX
        if index.exists():
            self._compare(index, json.loads(ours))
            return
        if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise RunFolderError(f"{self.folder} holds files but no {_INDEX}: name an empty folder for the cache")
        self._write(index, ours.encode())

    def rows(self, example: str, first: int, last: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]] | None:
        """(vectors, norms), float32, of the draws first, ..., last - 1; `None` if some of them are missing.

        Args:
            example: its digest.
            first, last: draws of the bank.
        """
        vectors, norms, at = [], [], first
        for start, end in sorted(self._kept(example), key=lambda kept: (kept[0], -kept[1])):
            if start > at or at >= last:
                break
            if end <= at:
                continue
            tensors = self._read(self._shard(example, start, end), "vectors", "norms")
            if tensors is None or {len(tensors["vectors"]), len(tensors["norms"])} != {end - start}:
                self._shard(example, start, end).unlink(missing_ok=True)
                return self.rows(example, first, last)  # another file may hold these draws
            part = slice(at - start, min(end, last) - start)
            vectors.append(tensors["vectors"][part])
            norms.append(tensors["norms"][part])
            at = end
        if at < last:
            return None
        return torch.cat(vectors), torch.cat(norms)

    def missing(self, example: str, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges (from, to) of draws in first, ..., last - 1 that are still to be made, in order."""
        gaps, at = [], first
        for start, end in sorted(self._kept(example)):
            if start > at:
                gaps.append((at, min(start, last)))
            at = max(at, end)
            if at >= last:
                return gaps
        return [*gaps, (at, last)]

    def put(self, example: str, first: int, vectors: Float[Tensor, "n k"], norms: Float[Tensor, " n"]) -> None:
        """Keep the draws first, ..., first + n - 1 of an example.

        Raises:
            ValueError: shapes that do not fit, or numbers that are not finite.
            RunFolderError: the disk is full; what was there is still there.
        """
        if vectors.ndim != 2 or norms.shape != vectors.shape[:1] or len(norms) == 0 or first < 0:
            raise ValueError(
                f"a cache keeps vectors [n, k] and norms [n] from draw 0 on, got {list(vectors.shape)}, "
                f"{list(norms.shape)} from draw {first}"
            )
        if not bool(torch.isfinite(vectors).all() and torch.isfinite(norms).all()):
            raise ValueError(f"the gradients of {example} are not finite: they are not kept")
        path = self._shard(example, first, first + len(norms))
        self._save(path, {"vectors": vectors.to(torch.float32), "norms": norms.to(torch.float32)})

    def latent(self, example: str) -> Tensor | None:
        """The latent of an example, or `None`."""
        path = self.folder / "latents" / f"{_checked(example)}.safetensors"
        if not path.exists():
            return None
        tensors = self._read(path, "latent")
        if tensors is None:
            path.unlink(missing_ok=True)
            return None
        return tensors["latent"]

    def put_latent(self, example: str, latent: Tensor) -> None:
        """Keep the latent of an example; raises as `put`."""
        if not bool(torch.isfinite(latent).all()):
            raise ValueError(f"the latent of {example} is not finite: it is not kept")
        self._save(self.folder / "latents" / f"{_checked(example)}.safetensors", {"latent": latent})

    def _compare(self, index: Path, ours: dict[str, object]) -> None:
        try:
            theirs = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{index} is damaged ({error}); remove {self.folder} to start again") from error
        if theirs != ours:
            known = theirs if isinstance(theirs, dict) else {}
            absent = object()
            differing = sorted(k for k in known.keys() | ours.keys() if known.get(k, absent) != ours.get(k, absent))
            raise RunFolderError(
                f"{self.folder} holds the gradients of another run: its {', '.join(differing) or 'content'} differs; "
                "name another folder"
            )

    def _kept(self, example: str) -> list[tuple[int, int]]:
        folder = self.folder / "gradients" / _checked(example)
        if not folder.exists():
            return []
        found = (_RANGE.fullmatch(path.name) for path in folder.iterdir())
        return [(int(match[1]), int(match[2])) for match in found if match]

    def _shard(self, example: str, first: int, last: int) -> Path:
        return self.folder / "gradients" / _checked(example) / f"{first}-{last}.safetensors"

    def _read(self, path: Path, *names: str) -> dict[str, Tensor] | None:
        """The tensors of a file; `None` if it is damaged."""
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None
        return tensors if tensors.keys() == set(names) else None

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._write(path, save({name: part.detach().cpu().contiguous() for name, part in tensors.items()}))

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_whole(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunFolderError(
                f"the disk of {self.folder} is full: {path.name} is not written, all before it is kept; make room and "
                "run again"
            ) from error


def _checked(example: str) -> str:
    if not _NAME.fullmatch(example):
        raise ValueError(f"an example's digest becomes a file name: letters, digits, - and _ only, got {example!r}")
    return example
