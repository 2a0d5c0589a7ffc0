"""Two estimators on one prompt at the same wall-clock time: what `make demo` shows."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from carv.checkpoint import write_whole
from carv.console import Report
from carv.extras import require
from carv.provenance import provenance
from carv.tasks.sds.config import STANDARD, EstimatorConfig, SDSConfig
from carv.tasks.sds.evaluate import TrueObject
from carv.tasks.sds.export import write_contact_sheet
from carv.tasks.sds.train import Trainer, world_teacher

_SLICE = 0.5
"""Seconds that one method trains before the other's turn, so that both see the same drift of the machine."""


@dataclass(frozen=True)
class CompareConfig:
    """Standard SDS, (R, K) = (4, 1) uniform iid, and carv's (1, K), each given the same seconds of training."""

    prompt: Annotated[str, tyro.conf.Positional] = "a red chair"
    """What to make; it names a colour and a shape, so that there is a true object."""
    seconds: float = 30.0
    """Training time for each run."""
    seeds: int = 4
    """Runs of each method; at least 2, for a spread."""
    renoise: int = 16
    """carv's K."""
    snapshots: int = 16
    """How often agreement is measured during a run (not counted as training time)."""
    density_rate: float = 0.1
    """Adam's learning rate for the density; half of it for the colour. The same for both methods."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"a comparison needs at least 2 seeds for a spread, got {self.seeds}")
        if not (self.seconds > 0 and self.snapshots >= 2):
            raise ValueError("seconds must be positive and snapshots at least 2")

    @property
    def methods(self) -> dict[str, EstimatorConfig]:
        """The two estimators, by the name that figures show."""
        ours = EstimatorConfig(renders=1, renoise=self.renoise)
        return {
            f"standard SDS ({STANDARD.renders}, {STANDARD.renoise})": STANDARD,
            f"carv ({ours.renders}, {ours.renoise})": ours,
        }


@dataclass
class _Contestant:
    """One run in a comparison, with what was measured of it so far."""

    trainer: Trainer
    used: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    psnr: list[float] = dataclasses.field(default_factory=list)
    ssim: list[float] = dataclasses.field(default_factory=list)
    pictures: list[Tensor] = dataclasses.field(default_factory=list)

    def train(self, until: float) -> None:
        """Step until `until` seconds of training have been used; evaluation does not count."""
        while self.used < until:
            start = time.perf_counter()
            self.trainer.step()
            self.used += time.perf_counter() - start

    def look(self, truth: TrueObject) -> None:
        rendered = truth.render(self.trainer.field)
        agreement = truth.score(rendered)
        self.times.append(self.used)
        self.psnr.append(float(agreement.psnr.mean()))
        self.ssim.append(float(agreement.ssim.mean()))
        self.pictures.append(rendered[1])


def compare(config: CompareConfig, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Run both methods from each seed, in short turns, and write figures and `comparison.json` to `out`.

    Returns:
        The content of `comparison.json`.

    Raises:
        ValueError: a prompt without a true object.
    """
    truth = TrueObject(config.prompt, views=4)
    out.mkdir(parents=True, exist_ok=True)
    marks = [config.seconds * i / (config.snapshots - 1) for i in range(config.snapshots)]
    runs: dict[str, list[_Contestant]] = {name: [] for name in config.methods}
    with Report(f"carv compare: {config.prompt}", config.seeds * len(marks), quiet) as report:
        teacher = world_teacher(SDSConfig(config.prompt), report.say)
        for seed in range(config.seeds):
            pair = {
                name: _Contestant(Trainer(_settings(config, estimator, seed), teacher))
                for name, estimator in config.methods.items()
            }
            for i, mark in enumerate(marks):
                _train_in_turns(list(pair.values()), mark)
                for contestant in pair.values():
                    contestant.look(truth)
                note = ", ".join(f"{name} {contestant.psnr[-1]:.1f} dB" for name, contestant in pair.items())
                report.update(seed * len(marks) + i + 1, note)
            for name, contestant in pair.items():
                runs[name].append(contestant)
    result = _result(config, runs)
    write_whole(out / "comparison.json", (json.dumps(result, indent=1) + "\n").encode())
    shown = [int(i) for i in np.linspace(1, len(marks) - 1, 6).round()]
    rows = [_strip([contestants[0].pictures[i] for i in shown], truth) for contestants in runs.values()]
    write_contact_sheet(out / "renders.png", rows)
    plot(result, rows, [marks[i] for i in shown], out / "comparison.png")
    return result


def _settings(config: CompareConfig, estimator: EstimatorConfig, seed: int) -> SDSConfig:
    rate = config.density_rate
    # Constant rates: how many steps a run will make in its time is not known.
    return SDSConfig(config.prompt, estimator, seed=seed, density_rate=rate, colour_rate=rate / 2, final_rate=1.0)


def _train_in_turns(contestants: list[_Contestant], until: float) -> None:
    while any(contestant.used < until for contestant in contestants):
        for contestant in contestants:
            contestant.train(min(until, contestant.used + _SLICE))


def _strip(pictures: list[Tensor], truth: TrueObject) -> Tensor:
    """Snapshots of one view, then the truth."""
    return torch.stack([*pictures, truth.pictures[1]])


def _result(config: CompareConfig, runs: dict[str, list[_Contestant]]) -> dict[str, Any]:
    baseline, ours = runs.values()
    curves = {
        name: {
            "estimator": str(config.methods[name]),
            "seconds": [run.times for run in contestants],
            "psnr": [run.psnr for run in contestants],
            "ssim": [run.ssim for run in contestants],
            "steps": [run.trainer.steps_done for run in contestants],
        }
        for name, contestants in runs.items()
    }
    speed_up = {
        score: [
            time_ratio(b.times, getattr(b, score), o.times, getattr(o, score))
            for b, o in zip(baseline, ours, strict=True)
        ]
        for score in ("psnr", "ssim")
    }
    return {
        "config": dataclasses.asdict(config),
        "curves": curves,
        "time_to_baseline_final": speed_up,
        **provenance(),
    }


def time_ratio(
    baseline_times: list[float], baseline: list[float], times: list[float], scores: list[float]
) -> float | None:
    """The baseline's whole time over the time in which the other method first reached its final score.

    Interpolated linearly between snapshots; `None` if it never got there.
    """
    final = baseline[-1]
    for i, score in enumerate(scores):
        if score >= final:
            if i == 0:
                return None if times[0] == 0 else baseline_times[-1] / times[0]
            share = (final - scores[i - 1]) / (score - scores[i - 1])
            return baseline_times[-1] / (times[i - 1] + share * (times[i] - times[i - 1]))
    return None


def summary(result: dict[str, Any], out: Path) -> str:
    """The comparison in a few lines, each figure as mean +- standard error over the seeds."""
    config = result["config"]
    head = f'"{config["prompt"]}", {config["seconds"]:g} s of training for each run, {config["seeds"]} seeds'
    lines = [f"{head} (mean +- standard error over seeds):"]
    for name, curve in result["curves"].items():
        psnr, ssim = ([run[-1] for run in curve[score]] for score in ("psnr", "ssim"))
        lines.append(
            f"  {name:22s} {spread(curve['steps'], 0)} steps, final PSNR {spread(psnr, 2)} dB, SSIM {spread(ssim, 3)}"
        )
    for score, ratios in result["time_to_baseline_final"].items():
        reached = [ratio for ratio in ratios if ratio is not None]
        if len(reached) == len(ratios):
            lines.append(f"  carv reached the baseline's final {score.upper()} {spread(reached, 2)}x sooner")
        else:
            lines.append(
                f"  carv reached the baseline's final {score.upper()} in {len(reached)} of {len(ratios)} runs"
                + (f", there {', '.join(f'{ratio:.2f}x' for ratio in reached)} sooner" if reached else "")
            )
    lines.append(f"  see {out / 'comparison.png'}")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean +- standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} +- {error:.{digits}f}"


def plot(result: dict[str, Any], rows: list[Tensor], times: list[float], path: Path) -> None:
    """Renders over time, above the agreement with the true object against training time."""
    matplotlib = require("matplotlib", "sds")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "sds")
    colours = ("#8a8f98", "#c2410c")
    names = list(result["curves"])
    columns = len(times) + 1
    figure = pyplot.figure(figsize=(9.6, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    for r, (row, panels) in enumerate(zip(rows, above.subplots(len(rows), columns), strict=True)):
        for c, (picture, axes) in enumerate(zip(row, panels, strict=True)):
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if r == 0:
                axes.set_title("true object" if c == columns - 1 else f"{times[c]:.0f} s", fontsize=9)
            if c == 0:
                axes.set_ylabel(names[r].replace(" (", "\n("), fontsize=9, color=colours[r])
    left, right = below.subplots(1, 2)
    for axes, score, label in (
        (left, "psnr", "PSNR (dB)"),
        (right, "ssim", "SSIM"),
    ):
        for name, colour in zip(names, colours, strict=True):
            curve = result["curves"][name]
            for seconds, values in zip(curve["seconds"], curve[score], strict=True):
                axes.plot(seconds, values, color=colour, alpha=0.35, linewidth=1)
            axes.plot(np.mean(curve["seconds"], 0), np.mean(curve[score], 0), color=colour, linewidth=2.4, label=name)
        axes.set_xlabel("training time (s)")
        axes.set_title(f"{label} against the true object, held-out views", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.legend(frameon=False, loc="lower right")
    prompt = result["config"]["prompt"]
    figure.suptitle(f'"{prompt}": the same teacher, prompt and wall-clock time; thin lines are seeds', fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
