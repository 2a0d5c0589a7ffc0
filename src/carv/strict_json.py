"""JSON as the standard has it: no NaN, no infinities, which other readers refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def plain(given: Any) -> Any:
    """The same with null for every number that JSON does not have, and lists for tuples."""
    if isinstance(given, Mapping):
        return {key: plain(value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [plain(value) for value in given]
    return None if isinstance(given, float) and not math.isfinite(given) else given


def dumps(given: Any, indent: int | None = None) -> str:
    """The text of `plain(given)`."""
    return json.dumps(plain(given), allow_nan=False, indent=indent)
