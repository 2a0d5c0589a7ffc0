"""For the tests of training: to say nothing, and to be killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from carv.training import loop


def silent(line: str) -> None:
    pass


class Killed(BaseException):
    pass


def killed(monkeypatch: pytest.MonkeyPatch, saves: int, work: Callable[[], Any]) -> None:
    """Do the work until the process dies, right after it has saved so many checkpoints."""
    real, calls = loop.save_checkpoint, 0

    def save(*args: Any) -> None:
        nonlocal calls
        real(*args)
        calls += 1
        if calls == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with pytest.raises(Killed):
            work()
