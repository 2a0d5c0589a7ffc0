"""What a record from a stranger may hold: each check gives its value back, or says in one sentence what is wrong."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from carv.strict_json import plain

LARGEST, SMALLEST = 1e100, 1e-100
"""Of any number, and of those on a logarithmic axis: beyond them axes and sums overflow."""
DEEPEST = 16
"""Levels of settings in settings."""


@contextmanager
def within(where: str) -> Iterator[None]:
    """Says of an error in the block where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def text(given: Any, what: str, *, empty: bool = False) -> str:
    """Text that any page can show.

    Raises:
        ValueError: another type; empty, unless it may be; control characters or halves of surrogate pairs.
    """
    if not isinstance(given, str):
        raise ValueError(f"{what} is text, got {_kind(given)}")
    if not (given.strip() or empty):
        raise ValueError(f"{what} must not be empty")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in given):
        raise ValueError(f"{what} holds a control character or half a surrogate pair: remove it")
    return given


def number(given: Any, what: str) -> float:
    """A finite number of at most 1e100.

    Raises:
        ValueError: another type, with true and false; NaN, infinite, or larger.
    """
    if isinstance(given, bool) or not isinstance(given, Real):
        raise ValueError(f"{what} is a number, got {_kind(given)}")
    try:
        value = float(given)
    except OverflowError:  # an integer of more than 308 digits
        value = math.inf
    if not abs(value) <= LARGEST:  # NaN, too
        raise ValueError(
            f"{what} is a finite number of at most {LARGEST:g}, got {value:g}: write None, or leave the point out, "
            "where it is not known"
        )
    return value


def settings(given: Any, what: str) -> dict[str, Any]:
    """Settings as they read back from JSON: lists for tuples, null for what is not finite.

    Raises:
        ValueError: no mapping; something that JSON does not have; too deep.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} maps names to settings, got {_kind(given)}")
    if _depth(given) > DEEPEST:
        raise ValueError(f"{what} is nested more than {DEEPEST} deep")
    try:
        written = json.dumps(plain(given), allow_nan=False)
        json.dumps(plain(given), ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} holds something that JSON does not have ({error}): give text, numbers, lists"
        ) from error
    read: dict[str, Any] = json.loads(written)
    return read


def fields(given: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """A mapping with these names, no fewer and no more."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} has the names {', '.join(names)}, got {_kind(given)}")
    lacking, unknown = [name for name in names if name not in given], [name for name in given if name not in names]
    if lacking:
        raise ValueError(f"{what} lacks {', '.join(lacking)}")
    if unknown:
        raise ValueError(f"{what} has {unknown[0]!r:.60}, which this version does not know")
    return given


def listed(given: Any, what: str) -> list[Any]:
    """A list of JSON."""
    if not isinstance(given, list):
        raise ValueError(f"{what} is a list, got {_kind(given)}")
    return given


def named(given: Any, what: str) -> dict[str, Any]:
    """A mapping of JSON."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} maps names to what they have, got {_kind(given)}")
    return given


def _depth(given: Any) -> int:
    if not isinstance(given, (Mapping, list, tuple)):
        return 0
    return 1 + max(map(_depth, given.values() if isinstance(given, Mapping) else given), default=0)


def _kind(given: Any) -> str:
    return f"{given!r:.40}" if isinstance(given, (bool, str, int, float)) or given is None else type(given).__name__
