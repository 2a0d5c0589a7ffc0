"""Optional packages: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """The module, or one sentence that says how to get it.

    Args:
        module: its full name, e.g. "skimage.measure".
        extra: carv's extra that installs it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}; install it with: pip install 'carv[{extra}]'"
        ) from error


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Bars of transformers and diffusers for loading, off inside: carv prints its own lines, and with --json none."""
    logs = [require(f"{package}.utils.logging", "diffusers") for package in ("transformers", "diffusers")]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
