"""A figure as records and `--json` hold it."""

from __future__ import annotations

from typing import Any

from carv.variance.efficiency import Figure


def as_json(figure: Figure, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """The value, its standard error, and its 95 % interval: the figure's own if no other is given."""
    return {"value": figure.value, "error": figure.error, "interval": list(interval or figure.interval())}
