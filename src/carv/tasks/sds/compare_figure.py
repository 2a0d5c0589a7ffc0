"""The figures of `carv compare`: renders over time, and the scores against training time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from carv.extras import require
from carv.tasks.sds.compare_scores import SCORES

_COLOURS = ("#8a8f98", "#c2410c")
_WIDE, _PICTURES, _CURVES = 9.6, 3.1, 3.5  # inches: of all, of the renders, and of each row of curves


def plot(result: dict[str, Any], rows: list[Tensor], times: list[float], path: Path) -> None:
    """Renders over time, above the scores against training time.

    Args:
        result: what comparison.json holds.
        rows: for each method pictures of the first prompt at `times`, then the true object if there is one.
        times: seconds.
        path: of the PNG.
    """
    matplotlib = require("matplotlib", "sds")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "sds")
    names, scores = list(result["curves"]), result["scores"]
    high = _CURVES * math.ceil(len(scores) / 2)
    figure = pyplot.figure(figsize=(_WIDE, _PICTURES + high), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[_PICTURES, high])
    _draw_pictures(above, rows, times, names)
    panels = below.subplots(math.ceil(len(scores) / 2), min(2, len(scores)), squeeze=False).flatten()
    for axes, score in zip(panels, scores, strict=False):
        _draw_curves(axes, result["curves"], score)
    panels[min(1, len(scores) - 1)].legend(frameon=False, loc="lower right")
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    prompts = result["config"]["prompts"]
    what = f'"{prompts[0]}"' + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
    figure.suptitle(f"{what}: the same teacher, prompt and wall-clock time; thin lines are runs", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_pictures(figure: Any, rows: list[Tensor], times: list[float], names: list[str]) -> None:
    columns = len(rows[0])
    for r, (row, panels) in enumerate(zip(rows, figure.subplots(len(rows), columns), strict=True)):
        for c, (picture, axes) in enumerate(zip(row, panels, strict=True)):
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if r == 0:
                axes.set_title(f"{times[c]:.0f} s" if c < len(times) else "true object", fontsize=9)
            if c == 0:
                axes.set_ylabel(names[r].replace(" (", "\n("), fontsize=9, color=_COLOURS[r])


def _draw_curves(axes: Any, curves: dict[str, Any], score: str) -> None:
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=True):
        for seconds, values in zip(curve["seconds"], curve[score], strict=True):
            axes.plot(seconds, values, color=colour, alpha=0.35, linewidth=1)
        axes.plot(np.mean(curve["seconds"], 0), np.mean(curve[score], 0), color=colour, linewidth=2.4, label=name)
    axes.set_xlabel("training time (s)")
    axes.set_title(SCORES[score].title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
