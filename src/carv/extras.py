"""Optional packages: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
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
