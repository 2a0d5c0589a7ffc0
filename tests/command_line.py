"""The command as its entry point runs it, for the tests of all commands."""

import contextlib
import io
from typing import NamedTuple

from carv.cli import main


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def carv(*args: object) -> Said:
    """Runs in this process: importing torch anew takes seconds each time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())
