"""The page of an attribution: each query with the clips that it owes most and least to, moving, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carv.checkpoint import write_whole
from carv.report.embedded import EmbeddedPictures
from carv.report.style import colour, drawn, legend_above, series, set_ticks
from carv.report.template import fill, written
from carv.variance.values import Value

RESULTS, PAGE = "results.json", "index.html"

_MOST_QUERIES = 24  # with pictures, so that a page stays one that opens
_MOST_ROWS = 50
_MOST_CARDS = 12
_NAMED_CURVES = 6
_FEW = 3
_HEAD = ("rank", "example", "score", "interval", "ranks")


@dataclass(frozen=True)
class Card:
    """One training example beside a query, with its score on an axis common to the query's examples, in percent."""

    name: str
    caption: str
    uri: str
    small: bool
    rank: int
    rank_low: int
    rank_high: int
    score: str
    interval: str
    at: float
    left: float
    width: float
    zero: float | None


@dataclass(frozen=True)
class Query:
    """What the page says of one query."""

    key: str
    name: str
    caption: str
    uri: str
    small: bool
    certainty: str
    facts: tuple[tuple[str, str], ...]
    most: tuple[Card, ...]
    least: tuple[Card, ...]
    table: tuple[tuple[str, ...], ...]
    more: bool


def write(folder: str | Path) -> Path:
    """Write index.html of a folder that `carv attribute` made: one file that loads nothing and runs nothing.

    Pictures are small and go into the page itself. All text is escaped.

    Args:
        folder: with results.json, and the pictures in media.

    Returns:
        The page's path.

    Raises:
        ValueError: no results.json, or not one of an attribution.
        ImportError: matplotlib or jinja2 is missing; the message says how to install them.
    """
    folder = Path(folder)
    path = folder / PAGE
    write_whole(path, render(_read(folder), folder).encode())
    return path


def render(results: Mapping[str, Any], folder: Path) -> str:
    """The page as text.

    Args:
        results: what results.json holds.
        folder: of the pictures.

    Raises:
        ValueError: fields that an attribution's results have are missing.
    """
    try:
        given = _page(results, folder)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder / RESULTS} is not of this version of carv attribute: {error!r}") from error
    return fill("attribution.html", has_pictures=True, **given)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no {RESULTS}: is it the --out of `carv attribute`?") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run `carv attribute` again") from error
    if not isinstance(results, dict) or results.get("kind") != "attribution":
        raise ValueError(f"{path} is not of an attribution")
    return results


def _page(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    config, queries = results["config"], results["queries"]
    examples = {one["name"]: one for one in results["examples"]}
    uris = EmbeddedPictures(folder)
    shown = [_query(one, f"q{i}", config, examples, uris) for i, one in enumerate(queries[:_MOST_QUERIES])]
    return {
        "title": f"{_count(len(queries), 'query', 'queries')}, {_count(len(examples), 'training example')}",
        "answer": _answer(results),
        "facts": _facts(results),
        "notes": results["notes"],
        "links": len(shown) > _FEW,
        "queries": shown,
        "more_queries": len(queries) - len(shown),
        "curve": _curve(queries, results["threshold"], config["top_k"]) if len(queries[0]["curve"]) > 1 else "",
        "k": config["top_k"],
        "head": _HEAD,
        "settings": [(name, written(value)) for name, value in sorted({**config, **_provenance(results)}.items())],
    }


def _answer(results: Mapping[str, Any]) -> str:
    queries, k, level = results["queries"], results["config"]["top_k"], results["config"]["level"]
    sure = sum(query["p_top_k"] >= level for query in queries)
    after = f"after {results['draws']} draws of timestep and noise"
    if len(queries) == 1:
        return f"The top {k} of {queries[0]['name']}: {_certain(queries[0])} {after}."
    return f"For {sure} of {len(queries)} queries the top {k} is right with at least {100 * level:g} % {after}."


def _facts(results: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    config = results["config"]
    scores = "cosines of gradients (Eq. 11)" if config["normalise"] else "inner products of gradients"
    return (
        ("teacher", str(config["teacher"])),
        ("scores", scores),
        ("masks", str(config["masks"])),
        ("draws", f"{results['draws']}, {results['design']}, {config['noise']} noise"),
        ("gradients of", f"{results['parameters']:,} parameters".replace(",", "\u202f")),
        ("error of a projected cosine", f"{results['projection_error']:.3f} in {config['dimensions']} dimensions"),
        ("level of intervals", f"{100 * config['level']:g} %"),
    )


def _query(
    one: Mapping[str, Any], key: str, config: Mapping[str, Any], examples: Mapping[str, Any], uris: EmbeddedPictures
) -> Query:
    rows, k = one["scores"], min(config["top_k"], _MOST_CARDS)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    cards = [_card(row, examples[row["example"]], low, high, uris) for row in rows[:k]]
    last = [_card(row, examples[row["example"]], low, high, uris) for row in rows[max(k, len(rows) - k) :]]
    stable = one["stable_at"]
    facts = [
        (f"the top {config['top_k']} is right", _certain(one)),
        ("stable", f"at {stable} draws" if stable else "not yet"),
        ("examples ranked", str(len(rows))),
    ]
    if one["excluded"]:
        facts.append(("left out", f"{', '.join(one['excluded'])}: the query itself"))
    uri = uris.uri(one["media"])
    return Query(
        key,
        one["name"],
        one["caption"],
        uri,
        uris.small(one["media"]),
        _certain(one),
        tuple(facts),
        tuple(cards),
        tuple(last),
        tuple(_row(row) for row in rows[:_MOST_ROWS]),
        len(rows) > _MOST_ROWS,
    )


def _card(row: Mapping[str, Any], example: Mapping[str, Any], low: float, high: float, uris: EmbeddedPictures) -> Card:
    def percent(x: float) -> float:
        return round(100 * (x - low) / (high - low), 2) if high > low else 50.0

    return Card(
        row["example"],
        example["caption"],
        uris.uri(example["media"]),
        uris.small(example["media"]),
        row["rank"],
        row["rank_low"],
        row["rank_high"],
        str(Value(row["score"], row["standard_error"])),
        _interval(row),
        percent(row["score"]),
        percent(row["low"]),
        round(percent(row["high"]) - percent(row["low"]), 2),
        percent(0.0) if low < 0 < high else None,
    )


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = str(Value(row["score"], row["standard_error"]))
    return str(row["rank"]), row["example"], value, _interval(row), f"{row['rank_low']} to {row['rank_high']}"


def _interval(row: Mapping[str, Any]) -> str:
    digits = 2 - math.floor(math.log10(row["standard_error"])) if row["standard_error"] > 0 else 6
    return f"{row['low']:.{max(0, digits)}f} to {row['high']:.{max(0, digits)}f}"


def _certain(one: Mapping[str, Any]) -> str:
    p, error = one["p_top_k"], one["p_error"]
    if p >= 0.999:
        return "with over 99.9 % probability"
    if p <= 0.001:
        return "with under 0.1 % probability"
    return f"with {Value(100 * p, 100 * error)} % probability"


def _curve(queries: Sequence[Mapping[str, Any]], threshold: float, top_k: int) -> str:
    """P(top-k right) and the standard error against the number of draws."""

    def draw(above: Any, below: Any) -> None:
        for i, query in enumerate(queries):
            draws = [look["draws"] for look in query["curve"]]
            named = len(queries) <= _NAMED_CURVES
            how = series(i) if named else {"color": colour("c1"), "alpha": 0.35}
            above.plot(draws, [look["p_top_k"] for look in query["curve"]], label=query["name"], **how)
            below.plot(draws, [look["standard_error"] for look in query["curve"]], **how)
        above.axhline(threshold, color=colour("soft"), linestyle=":", linewidth=1)
        above.set_ylim(-0.03, 1.03)
        above.set_ylabel(f"P(top {top_k} right)")
        below.set_ylabel("standard error")
        below.set_xlabel("draws")
        below.set_xscale("log", base=2)
        below.set_ylim(bottom=0)
        set_ticks(below.xaxis, sorted({look["draws"] for query in queries for look in query["curve"]}))
        if 1 < len(queries) <= _NAMED_CURVES:
            legend_above(above)

    about = "The probability that the top is right, and the standard error of a score, against the number of draws"
    return drawn(draw, "curve", about, size=(4.4, 4.0), rows=2)


def _provenance(results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: results[name] for name in ("carv", "source", "torch", "python", "device", "threads") if name in results
    }


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
