"""What people see while a command works: a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_EVERY = 10.0
"""Seconds between two lines when there is no terminal."""


class Report:
    """Progress and messages of one command, on standard error: standard output is for results.

    Use as a context manager around the work; `update` is cheap enough for every step.

    Args:
        what: the name of the work.
        total: how many units it has.
        quiet: say nothing but errors.
    """

    def __init__(self, what: str, total: float, quiet: bool = False) -> None:
        self.what, self.total, self.quiet = what, total, quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Report:
        if self.console.is_terminal and not self.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.bar.add_task(self.what, total=self.total, note="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: float, note: str = "") -> None:
        """So much is done; `note` is a short state, such as the current gradient noise."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, note=note)
        elif done >= self.total or time.monotonic() - self._last >= _PLAIN_EVERY:
            self._last = time.monotonic()
            self.say(f"{self.what}: {done:g}/{self.total:g} {note}".rstrip())

    def say(self, line: str) -> None:
        """One line for people."""
        if not self.quiet:
            self.console.print(line, markup=False)


def fail(message: str) -> None:
    """One line about what went wrong."""
    print(f"carv: {message}", file=sys.stderr)
