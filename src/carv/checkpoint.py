"""A run's folder: its configuration, and a checkpoint that is always whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"

FileState: TypeAlias = tuple[int, int, int]
"""Inode, time of the last change in ns, and bytes: another one for every file that `write_whole` writes."""


class RunFolderError(ValueError):
    """A folder that holds something else than this run."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash at any byte either the old or the new one is there, whole.

    Others may read it as far as the umask lets them, which a temporary file of `tempfile` would not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Write the checkpoint of a run.

    Args:
        folder: of the run; made if absent.
        tensors: all of the run's state.
        config: the run's configuration as JSON; another run will not go on from this checkpoint.
    """
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"config": config})
    write_whole(folder / CHECKPOINT, content)


def load_checkpoint(folder: Path, config: str) -> dict[str, Tensor] | None:
    """The checkpoint of this very run in a folder; `None` if there is none.

    Raises:
        RunFolderError: the folder holds a checkpoint of another configuration, or a damaged one.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    tensors, saved = read_checkpoint(folder)
    if saved == config:
        return tensors
    raise other_settings(folder)


def load_or_make(folder: Path, config: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The checkpoint of this configuration in a folder; made and kept there if there is none.

    Raises:
        RunFolderError: as `load_checkpoint`.
    """
    found = load_checkpoint(folder, config)
    if found is None:
        found = make()
        save_checkpoint(folder, found, config)
    return found


def other_settings(folder: Path) -> RunFolderError:
    """The error of a folder that holds another run."""
    return RunFolderError(
        f"{folder} holds a run with other settings; give another --out, or --overwrite to start again there"
    )


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The checkpoint in a run's folder, and the configuration it was made with, as JSON.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise RunFolderError(f"{folder} holds no {CHECKPOINT}: is it the --out of a `carv sds` run?")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, (file.metadata() or {}).get("config", "{}")
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); remove it to start this run again") from error


def checkpoint_state(folder: Path) -> FileState | None:
    """Which checkpoint is in a run's folder, without reading it; `None` if there is none."""
    try:
        found = (folder / CHECKPOINT).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
