"""Several processes at once share the work: a lock on each folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone works in the folder; the lock ends with the process, however it ends.

    Args:
        folder: made if absent.
        wait: for another process to end its work there; otherwise false where one is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
