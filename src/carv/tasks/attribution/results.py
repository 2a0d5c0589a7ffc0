"""What an attribution found, as records: results.json, scores.csv, and small pictures for the page."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from carv.checkpoint import write_whole
from carv.extras import require
from carv.strict_json import dumps
from carv.tasks.attribution.stability import Estimate, Ranking

RESULTS, SCORES, MEDIA = "results.json", "scores.csv", "media"
COLUMNS = ("query", "example", "score", "standard_error", "low", "high", "rank", "rank_low", "rank_high")
_LARGEST, _MOST_FRAMES = 160, 40  # pixels and frames of what the page shows
_FRAME_MILLISECONDS = 120


def score_rows(names: list[str], found: Estimate, ranked: Ranking, level: float) -> list[dict[str, Any]]:
    """A row for each example of one query, the most influential first: `COLUMNS` without the query."""
    low, high = found.intervals(level)
    columns = (found.scores, found.standard_errors, low, high, ranked.rank, ranked.rank_low, ranked.rank_high)
    table = zip(*(column.tolist() for column in columns), strict=True)
    rows = [dict(zip(COLUMNS[1:], (name, *numbers), strict=True)) for name, numbers in zip(names, table, strict=True)]
    return [rows[i] for i in ranked.order.tolist()]


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results.json and scores.csv.

    Args:
        out: the folder.
        results: what `carv.tasks.attribution.run.run` returns.
    """
    write_whole(out / RESULTS, (dumps(results, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for query in results["queries"]:
        writer.writerows({"query": query["name"], **row} for row in query["scores"])
    write_whole(out / SCORES, text.getvalue().encode())


def write_media(out: Path, name: str, pictures: Tensor) -> str:
    """Write what the teacher sees of an example, small, as an animated GIF (a PNG of a picture).

    Args:
        out: the run's folder.
        name: of the file, without its ending.
        pictures: `[3, F, H, W]` or `[3, H, W]` in [0, 1].

    Returns:
        The path below `out`.
    """
    image = require("PIL.Image", "attribution")
    frames = pictures[:, None] if pictures.ndim == 3 else pictures
    every = -(-frames.shape[1] // _MOST_FRAMES)
    frames = frames[:, ::every].transpose(0, 1).float()
    scale = _LARGEST / max(frames.shape[-2:])
    if scale < 1:
        frames = interpolate(frames, scale_factor=scale, mode="area")
    bytes_ = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    drawn = [image.fromarray(frame) for frame in bytes_]
    content, still = io.BytesIO(), len(drawn) == 1
    path = f"{MEDIA}/{name}.{'png' if still else 'gif'}"
    if still:
        drawn[0].save(content, "PNG")
    else:
        # Without dithering equal parts of frames stay equal, and files small.
        paletted = [frame.quantize(256, dither=image.Dither.NONE) for frame in drawn]
        options = {"save_all": True, "append_images": paletted[1:], "loop": 0, "duration": every * _FRAME_MILLISECONDS}
        paletted[0].save(content, "GIF", **options)
    write_whole(out / path, content.getvalue())
    return path
