"""What a comparison measures of a field, and how much sooner one curve of it gets where another ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carv.clip import Clip, Value, average
from carv.tasks.sds.alignment import PromptAlignment
from carv.tasks.sds.config import CameraName
from carv.tasks.sds.evaluate import TrueObject, describes_one_object
from carv.tasks.sds.export import render_all
from carv.tasks.sds.field import Field
from carv.world.cameras import held_out_cameras

_VIEWS, _SHOWN, _SIZE = 4, 1, 64


@dataclass(frozen=True)
class Score:
    """How a score is written.

    Attributes:
        label: for people.
        unit: with a space before it, or "".
        digits: behind the point.
        title: of its figure.
    """

    label: str
    unit: str
    digits: int
    title: str


SCORES = {
    "psnr": Score("PSNR", " dB", 2, "PSNR (dB) against the true object, held-out views"),
    "ssim": Score("SSIM", "", 3, "SSIM against the true object, held-out views"),
    "clip_score": Score("CLIP score", "", 2, "CLIP score against the prompt"),
    "r_precision": Score("R-precision", "", 3, "R-precision of views, among 128 captions"),
}
"""Every score that a comparison may have, in the order of its record; larger is better in each."""


class Examiner:
    """Measures fields that were optimised for one prompt.

    Args:
        prompt: what was asked for.
        exact: whether the teacher is the exact one, which knows the world's objects only.
        cameras: of the CLIP scores.
        clip: None for agreement with the true object alone.

    Attributes:
        truth: the prompt's true object; None if the world has none.

    Raises:
        ValueError: the prompt has no true object, and it would be the only measure or the teacher needs one.
    """

    def __init__(self, prompt: str, exact: bool, cameras: CameraName, clip: Clip | None) -> None:
        if clip is None and not exact and not describes_one_object(prompt):
            raise ValueError(
                f"{prompt!r} describes no object of carv's world to compare with, so that only CLIP can score it: "
                "name one with --clip"
            )
        self.truth = TrueObject(prompt, _VIEWS, _SIZE) if exact or describes_one_object(prompt) else None
        self.alignment = None if clip is None else PromptAlignment(clip, prompt, cameras)

    def look(self, field: Field) -> tuple[dict[str, float], Tensor]:
        """The scores of a field by their names in `SCORES`, each a mean over views, and one picture of it."""
        scores: dict[str, float] = {}
        if self.truth is None:
            shown = render_all(field, held_out_cameras(_VIEWS)[_SHOWN : _SHOWN + 1], _SIZE)[0]
        else:
            rendered = self.truth.render(field)
            agreement, shown = self.truth.score(rendered), rendered[_SHOWN]
            scores |= {"psnr": float(agreement.psnr.mean()), "ssim": float(agreement.ssim.mean())}
        if self.alignment is not None:
            alignment = self.alignment.of(field)
            scores["clip_score"] = float(alignment.score.mean())
            if alignment.hits is not None:
                scores["r_precision"] = float(alignment.hits.float().mean())
        return scores, shown

    @property
    def true_picture(self) -> Tensor | None:
        """The true object as `look` shows it."""
        return None if self.truth is None else self.truth.pictures[_SHOWN]


Curves = Mapping[str, Any]
"""Of one method: "seconds" and each score, a list of snapshots for each run."""


def final(curves: Curves, score: str) -> Value:
    """The mean of a score at the end of training, with its standard error over the runs."""
    ends = torch.tensor([run[-1] for run in curves[score]], dtype=torch.float64)
    return average(ends, torch.arange(len(ends)))


def speed_up(baseline: Curves, ours: Curves, score: str) -> list[float | None]:
    """`time_ratio` of each pair of runs."""
    parts = (baseline["seconds"], baseline[score], ours["seconds"], ours[score])
    return [time_ratio(*pair) for pair in zip(*parts, strict=True)]


def reached(baseline: Curves, ours: Curves, score: str) -> int:
    """In how many runs the other method was as good as the baseline at its end, at any snapshot."""
    return sum(max(other) >= own[-1] for own, other in zip(baseline[score], ours[score], strict=True))


def time_ratio(
    baseline_times: list[float], baseline: list[float], times: list[float], scores: list[float]
) -> float | None:
    """How much sooner the other method first reached the baseline's final score than the baseline itself did.

    Both are times of first crossings, interpolated linearly between snapshots. The baseline's is not simply its end:
    with a baseline that stands still for its last half, every method of the same speed would seem twice as fast.

    Returns:
        The ratio; `None` if the other never got there, or if either was there from the start.
    """
    own = _first_reached(baseline_times, baseline, baseline[-1])
    other = _first_reached(times, scores, baseline[-1])
    return own / other if own and other else None


def _first_reached(times: list[float], scores: list[float], goal: float) -> float | None:
    for i, score in enumerate(scores):
        if score >= goal:
            if i == 0:
                return times[0]
            share = (goal - scores[i - 1]) / (score - scores[i - 1])
            return times[i - 1] + share * (times[i] - times[i - 1])
    return None
