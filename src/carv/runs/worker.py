"""The other side of an executor: one item in a fixed number of threads, and a local process that serves items."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

Item: TypeAlias = Mapping[str, Any]
Function: TypeAlias = Callable[[Item], dict[str, Any]]
"""Of a module, so that other processes find it by its name."""


@dataclass(frozen=True)
class CellError:
    """What went wrong with one item, in one sentence."""

    message: str


Result: TypeAlias = dict[str, Any] | CellError


def attempt(function: Function, item: Item, threads: int) -> Result:
    """function(item) in so many torch threads; an exception is a `CellError`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(item)
    except Exception as error:
        return CellError(_sentence(error))
    finally:
        torch.set_num_threads(before)


class Worker:
    """A process that serves one item at a time."""

    def __init__(self, function: Function, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, threads), daemon=True)
        self.process.start()
        theirs.close()  # the worker's is then the only one, and its death ends the pipe
        self.index, self.died = -1, False

    def give(self, index: int, item: Item) -> None:
        self.index = index
        with suppress(BrokenPipeError):  # it died meanwhile: `take` says so
            self.connection.send(item)

    def take(self) -> Result:
        try:
            result: Result = self.connection.recv()
            return result
        except (EOFError, OSError):
            self.died = True
            self.process.join()
            return CellError(f"the worker died ({_ending(self.process.exitcode)}); running the sweep again retries it")

    def stop(self) -> None:
        # Not asked politely: cells are pure functions, there is nothing to save.
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _serve(connection: Any, function: Function, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            connection.send(attempt(function, connection.recv(), threads))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, mostly for lack of memory" if name == "SIGKILL" else name
    return f"exit status {code}"


def _sentence(error: Exception) -> str:
    if isinstance(error, (ValueError, ImportError, OSError)):  # carv's own words
        return one_line(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({Path(where.filename).name}, line {where.lineno})"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
