"""Figures 7, 8, 12 and 17: text-to-3D at the same wall-clock time, standard SDS and carv (Sec. 4.1, App. D.1.5).

    python experiments/fig_7_8.py [--quick] [--low] [--out DIR] [--teacher small]

Both methods train in turns of half a second, so that they see the same machine. With --low the guidance is low
(Fig. 17). A comparison that a folder already holds is not made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from records import publish
from sds_setting import Setting

from carv.report.experiment import Chart, Curve, Experiment, Figure, Table
from carv.tasks.sds.compare import CompareConfig, compare
from carv.tasks.sds.compare_scores import SCORES


@dataclass(frozen=True)
class Settings(Setting):
    """Figures 7, 8, 12 and 17."""

    prompts: tuple[str, ...] = ("a red chair", "a yellow duck", "a green rocket")
    """What is made; the last was held out of the small teacher's training."""
    seconds: float = 60.0
    """Training time of each run."""
    snapshots: int = 13
    """How often the scores are measured."""
    low: bool = False
    """The low guidance scale (Fig. 17)."""


def main(settings: Settings) -> None:
    settings = settings.sized(seconds=2.0, snapshots=3, field="voxel")
    name = "fig_17" if settings.low else "fig_7_8"
    folder = settings.folder(name)
    config = comparison(settings)
    found = kept(folder, config) or compare(config, folder)
    scores = found["scores"]
    experiment = Experiment(
        "Figure 17" if settings.low else "Figures 7, 8 and 12",
        "Does the cheaper gradient give better objects in the same time?",
        f"Teacher {settings.teacher!r}, {settings.field} field, guidance scale {config.guidance_scale:g}, "
        f"{len(config.prompts)} prompts ({', '.join(config.prompts)}) x {config.seeds} seeds, {config.seconds:g} s of "
        "training for each run at constant learning rates. Means over prompts and seeds, with standard errors over all "
        "these runs. CLIP is the small one of the same world, R-precision among its 128 captions of colour and shape, "
        "both over views.",
        sentence(found),
        (finals(found), times(found)),
        tuple(chart(found, score) for score in scores),
        pictures={
            f"Renders over training, rows in pairs: {rows(config)}; the last column is the true object": "renders.png"
        },
        config=settings.to_dict(),
    )
    publish(experiment, folder)


def comparison(settings: Settings) -> CompareConfig:
    return CompareConfig(
        prompts=settings.prompts,
        seconds=settings.seconds,
        seeds=max(2, len(settings.seeds)),
        snapshots=settings.snapshots,
        teacher=settings.teacher,
        teacher_dtype=settings.run("", 0).teacher_dtype,
        guidance_scale=settings.low_guidance if settings.low else settings.guidance_scale,
        field=settings.field,
    )


def kept(folder: Path, config: CompareConfig) -> dict[str, Any] | None:
    """The comparison of these settings that the folder holds."""
    path = folder / "comparison.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    same = {"prompt": config.prompts[0], **json.loads(json.dumps(dataclasses.asdict(config)))}
    return found if found["config"] == same else None


def sentence(found: Mapping[str, Any]) -> str:
    """In how many runs, and how much sooner, carv reached the baseline's final score."""
    runs = len(found["runs"])
    parts = []
    for score in found["scores"]:
        ratios = [ratio for ratio in found["time_to_baseline_final"][score] if ratio is not None]
        median = f", in a median of {np.median(ratios):.2f}x less time ({len(ratios)} runs)" if ratios else ""
        parts.append(f"{SCORES[score].label} in {found['reached_baseline_final'][score]} of {runs} runs{median}")
    return (
        f"carv reached the baseline's final {'; '.join(parts)}. The paper shows curves of the CLIP score "
        "against iterations at equal cost, without such figures."
    )


def finals(found: Mapping[str, Any]) -> Table:
    """Scores at the end of training."""
    scores = found["scores"]
    return Table(
        "Scores at the end of training (one without an error was the same in every run)",
        tuple(SCORES[score].label + SCORES[score].unit for score in scores),
        {
            name: tuple(Figure(ends[score]["value"], ends[score]["standard_error"] or None) for score in scores)
            for name, ends in found["final"].items()
        },
    )


def times(found: Mapping[str, Any]) -> Table:
    """How much sooner each run of carv was where its partner ended."""
    scores = found["scores"]
    ratios = found["time_to_baseline_final"]
    return Table(
        "How many times sooner carv reached what the baseline ended with, run by run (none where it never did)",
        tuple(SCORES[score].label for score in scores),
        {
            f"{run['prompt']}, seed {run['seed']}": tuple(Figure(ratios[score][i]) for score in scores)
            for i, run in enumerate(found["runs"])
        },
    )


def chart(found: Mapping[str, Any], score: str) -> Chart:
    written = SCORES[score]
    lines = {name: curve(lines["seconds"], lines[score]) for name, lines in found["curves"].items()}
    return Chart(written.title, "seconds of training", written.label, lines, "one standard error over runs")


def curve(seconds: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> Curve:
    """The mean over runs with a band of one standard error."""
    x, y = np.mean(seconds, axis=0), np.mean(values, axis=0)
    error = np.std(values, axis=0, ddof=1) / len(values) ** 0.5
    return Curve(tuple(x.tolist()), tuple(y.tolist()), tuple((y - error).tolist()), tuple((y + error).tolist()))


def rows(config: CompareConfig) -> str:
    return f"for each of {', '.join(config.prompts)} " + " above ".join(config.methods)


if __name__ == "__main__":
    main(tyro.cli(Settings))
