"""Two estimators on the same prompts at the same wall-clock time: what `make demo` shows."""

from __future__ import annotations

import dataclasses
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
from carv.devices import DeviceName, find_device
from carv.provenance import provenance
from carv.strict_json import dumps
from carv.tasks.sds.alignment import load_clip
from carv.tasks.sds.compare_figure import plot
from carv.tasks.sds.compare_scores import SCORES, Examiner, final, reached, speed_up
from carv.tasks.sds.config import STANDARD, CameraName, DtypeName, EstimatorConfig, FieldName, SDSConfig
from carv.tasks.sds.evaluate import held_out
from carv.tasks.sds.export import write_contact_sheet
from carv.tasks.sds.train import Trainer, load_teacher

_SLICE = 0.5
"""Seconds that one method trains before the other's turn, so that both see the same drift of the machine."""


@dataclass(frozen=True)
class CompareConfig:
    """Standard SDS, (R, K) = (4, 1) uniform iid, and carv's (1, K), each given the same seconds of training."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ("a red chair", "a yellow duck")
    """What to make, one or several. The exact teacher needs a colour and a shape of carv's world in each."""
    seconds: float = 45.0
    """Training time for each run."""
    seeds: int = 2
    """Runs of each method for each prompt; at least 2, for a spread."""
    renoise: int = 16
    """carv's K."""
    snapshots: int = 10
    """How often the scores are measured during a run (not counted as training time)."""
    teacher: str = "small"
    """small: carv's own small Stable Diffusion; world: the exact denoiser of carv's own pictures; or a diffusers
    pipeline, as a folder or a cached hub id."""
    teacher_dtype: DtypeName = "float32"
    """Of the teacher's denoiser; its autoencoder stays in float32. The exact teacher has no other."""
    clip: str = "small"
    """The CLIP that scores the result: small is carv's own; or a folder or a cached hub id; none for no score."""
    guidance_scale: float | None = None
    """s of e_u + s (e_c - e_u), as in diffusers; the paper's omega is s - 1. By default 3 for the teacher world, 5 for
    others."""
    cameras: CameraName = "world"
    """What cameras are drawn from: those of the world's pictures, or the paper's (App. D.1.1)."""
    field: FieldName = "hash"
    """What is optimised: a voxel grid, or an Instant-NGP style hash grid under small networks."""
    device: DeviceName = "cpu"
    """Where everything runs."""
    density_rate: float = 0.1
    """Adam's learning rate for the voxel grid's density; half of it for its colour. The same for both methods."""

    def __post_init__(self) -> None:
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError("a comparison needs at least one prompt, and each once")
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

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Prompt and seed of each method's runs. No two share a seed: their noise is independent."""
        places = range(len(self.prompts) * self.seeds)
        return [(self.prompts[seed // self.seeds], seed) for seed in places]

    def settings(self, prompt: str, estimator: EstimatorConfig, seed: int) -> SDSConfig:
        """Of one run. Its rates are constant: how many steps it will make in its time is not known."""
        same = ("teacher", "teacher_dtype", "clip", "guidance_scale", "cameras", "field", "device", "density_rate")
        shared: dict[str, Any] = {name: getattr(self, name) for name in same}
        return SDSConfig(prompt, estimator, seed=seed, colour_rate=self.density_rate / 2, final_rate=1.0, **shared)


@dataclass
class _Contestant:
    """One run in a comparison, with what was measured of it so far."""

    trainer: Trainer
    used: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    scores: list[dict[str, float]] = dataclasses.field(default_factory=list)
    pictures: list[Tensor] = dataclasses.field(default_factory=list)

    def train(self, until: float) -> None:
        """Step until `until` seconds of training have been used; evaluation does not count."""
        while self.used < until:
            start = time.perf_counter()
            self.trainer.step()
            if self.trainer.task.device.type == "cuda":
                torch.cuda.synchronize()
            self.used += time.perf_counter() - start

    def look(self, examiner: Examiner) -> None:
        scores, picture = examiner.look(self.trainer.field)
        self.times.append(self.used)
        self.scores.append(scores)
        self.pictures.append(picture)


_Runs = dict[str, list[_Contestant]]


def compare(config: CompareConfig, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Run both methods for each prompt and seed, in short turns, and write figures and `comparison.json` to `out`.

    Returns:
        The content of `comparison.json`.

    Raises:
        ValueError: a prompt without a true object where the teacher, or the lack of a CLIP, needs one.
    """
    marks = [config.seconds * i / (config.snapshots - 1) for i in range(config.snapshots)]
    runs: _Runs = {name: [] for name in config.methods}
    what = config.prompts[0] if len(config.prompts) == 1 else f"{len(config.prompts)} prompts"
    with Report(f"carv compare: {what}", len(config.runs) * len(marks), quiet) as report:
        clip = load_clip(config.clip, config.teacher, find_device(config.device), report.say)
        exact = config.teacher == "world"
        examiners = {prompt: Examiner(prompt, exact, config.cameras, clip) for prompt in config.prompts}
        out.mkdir(parents=True, exist_ok=True)
        teacher = load_teacher(config.settings(config.prompts[0], STANDARD, 0), report.say)
        for number, (prompt, seed) in enumerate(config.runs):
            pair = {
                name: _Contestant(Trainer(config.settings(prompt, estimator, seed), teacher))
                for name, estimator in config.methods.items()
            }
            for i, mark in enumerate(marks):
                _train_in_turns(list(pair.values()), mark)
                for contestant in pair.values():
                    contestant.look(examiners[prompt])
                report.update(number * len(marks) + i + 1, _note(pair))
            for name, contestant in pair.items():
                runs[name].append(contestant)
    result = _result(config, runs, scored=clip is not None)
    write_whole(out / "comparison.json", (dumps(result, indent=1) + "\n").encode())
    _write_figures(result, runs, examiners, marks, out)
    return result


def _train_in_turns(contestants: list[_Contestant], until: float) -> None:
    while any(contestant.used < until for contestant in contestants):
        for contestant in contestants:
            contestant.train(min(until, contestant.used + _SLICE))


def _note(pair: dict[str, _Contestant]) -> str:
    """The first score of each method, for the progress bar."""
    score = SCORES[first := next(iter(next(iter(pair.values())).scores[-1]))]
    return ", ".join(f"{name} {run.scores[-1][first]:.1f}{score.unit}" for name, run in pair.items())


def _result(config: CompareConfig, runs: _Runs, scored: bool) -> dict[str, Any]:
    everyone = [run for contestants in runs.values() for run in contestants]
    # A score that some prompt lacks, such as PSNR without a true object, has no mean over all runs.
    shared = [score for score in SCORES if all(score in run.scores[0] for run in everyone)]
    curves = {
        name: {
            "estimator": str(config.methods[name]),
            "seconds": [run.times for run in contestants],
            **{score: [[at[score] for at in run.scores] for run in contestants] for score in shared},
            "steps": [run.trainer.steps_done for run in contestants],
        }
        for name, contestants in runs.items()
    }
    baseline, ours = curves.values()
    return {
        "config": {"prompt": config.prompts[0], **dataclasses.asdict(config)},
        "clip": config.clip if scored else None,
        "scores": shared,
        "runs": [{"prompt": prompt, "seed": seed, "held_out": held_out(prompt)} for prompt, seed in config.runs],
        "curves": curves,
        "final": {name: {score: final(curve, score) for score in shared} for name, curve in curves.items()},
        "time_to_baseline_final": {score: speed_up(baseline, ours, score) for score in shared},
        "reached_baseline_final": {score: reached(baseline, ours, score) for score in shared},
        **provenance(find_device(config.device)),
    }


def _write_figures(
    result: dict[str, Any], runs: _Runs, examiners: dict[str, Examiner], marks: list[float], out: Path
) -> None:
    """renders.png: a row for each prompt and method; comparison.png: the first prompt's renders and all scores."""
    shown = [int(i) for i in np.linspace(1, len(marks) - 1, 6).round()]
    first_runs = [[run["prompt"] for run in result["runs"]].index(prompt) for prompt in examiners]
    rows = []
    for number, examiner in zip(first_runs, examiners.values(), strict=True):
        truth = [] if examiner.true_picture is None else [examiner.true_picture]
        for contestants in runs.values():
            rows.append(torch.stack([contestants[number].pictures[i] for i in shown] + truth))
    wide = max(map(len, rows))
    padded = [torch.nn.functional.pad(row, (0, 0) * 3 + (0, wide - len(row)), value=1.0) for row in rows]
    write_contact_sheet(out / "renders.png", padded)
    plot(result, rows[: len(runs)], [marks[i] for i in shown], out / "comparison.png")


def summary(result: dict[str, Any], out: Path) -> str:
    """The comparison in a few lines, each figure as mean +- standard error over the runs."""
    config = result["config"]
    what = ", ".join(f'"{prompt}"' for prompt in config["prompts"])
    each = "each " if len(config["prompts"]) > 1 else ""
    over = "seeds" if len(config["prompts"]) == 1 else "runs of all prompts"
    head = f"{what}, {config['seconds']:g} s of training for each run, {each}{config['seeds']} seeds"
    lines = [f"{head} (mean +- standard error over {over}):"]
    for name, curve in result["curves"].items():
        ends = [_final_line(curve, score) for score in result["scores"]]
        lines.append(f"  {name:22s} {spread(curve['steps'], 0)} steps, final {', '.join(ends)}")
    for score, ratios in result["time_to_baseline_final"].items():
        lines.append(_speed_line(SCORES[score].label, ratios, result["reached_baseline_final"][score]))
    if result["clip"] is None:
        lines.append("  no CLIP score")
    lines.append(f"  see {out / 'comparison.png'}")
    return "\n".join(lines)


def _final_line(curve: dict[str, Any], score: str) -> str:
    written = SCORES[score]
    return f"{written.label} {spread([run[-1] for run in curve[score]], written.digits)}{written.unit}"


def _speed_line(label: str, ratios: list[float | None], reached_by: int) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) == len(ratios):
        return f"  carv reached the baseline's final {label} {spread(known, 2)}x sooner"
    line = f"  carv reached the baseline's final {label} in {reached_by} of {len(ratios)} runs"
    return line + (f", there {', '.join(f'{ratio:.2f}x' for ratio in known)} sooner" if known else "")


def spread(values: list[float], digits: int) -> str:
    """Mean +- standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} +- {error:.{digits}f}"
