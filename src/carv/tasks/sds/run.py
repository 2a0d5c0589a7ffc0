"""`carv sds`: one text-to-3D run, resumable, that leaves a turntable, a mesh and its metrics."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from carv.checkpoint import load_checkpoint, save_checkpoint, write_whole
from carv.clip import Clip
from carv.console import Report
from carv.provenance import provenance
from carv.tasks.sds.alignment import PromptAlignment, load_clip
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.evaluate import TrueObject, describes_one_object, held_out
from carv.tasks.sds.export import render_all, turntable_cameras, write_contact_sheet, write_mesh, write_turntable
from carv.tasks.sds.train import Trainer, load_teacher


def run(
    config: SDSConfig, out: Path, checkpoint_every: int = 50, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train to the configured number of steps, from the folder's checkpoint if it has one, and write the results.

    A stop at any time (Ctrl-C, kill -9, power) loses at most the steps since the last checkpoint; the same
    call goes on from there, to the same numbers as if it had never stopped.

    Args:
        config: the settings.
        out: the run's folder.
        checkpoint_every: steps between checkpoints.
        overwrite: start again where the folder holds another run.
        quiet: say nothing but errors.

    Returns:
        What `metrics.json` holds.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ValueError: bad settings, an unknown word in the prompt, a CLIP that cannot be read, or a teacher output
            that is not finite.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    own = dataclasses.replace(config, clip=SDSConfig.clip).to_json()  # the judge is no part of what a run is
    saved = None if overwrite else load_checkpoint(out, own)
    with Report(f"carv sds: {config.prompt}", config.steps, quiet) as report:
        trainer = Trainer(config, load_teacher(config, report.say))
        # Before the work: a CLIP that cannot be read is said at once.
        clip = load_clip(config.clip, config.teacher, trainer.task.device, report.say)
        if saved is not None:
            trainer.load_state_dict(saved)
            report.say(f"going on from step {trainer.steps_done} in {out}")
        out.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be written is said at once
        started, first = time.perf_counter(), trainer.steps_done
        try:
            while trainer.steps_done < config.steps:
                trainer.step()
                report.update(trainer.steps_done, _noise(trainer))
                if trainer.steps_done % checkpoint_every == 0:
                    save_checkpoint(out, trainer.state_dict(), own)
        finally:  # also on Ctrl-C: nothing is lost then
            if trainer.steps_done > first:
                save_checkpoint(out, trainer.state_dict(), own)
        seconds = time.perf_counter() - started
    return _results(trainer, clip, out, seconds, trainer.steps_done - first)


def _noise(trainer: Trainer) -> str:
    share = trainer.noise.share
    return "" if share is None else f"gradient noise {share:.0%}"


def _results(trainer: Trainer, clip: Clip | None, out: Path, seconds: float, steps: int) -> dict[str, Any]:
    config, field = trainer.config, trainer.field
    write_turntable(out / "turntable.gif", field)
    rows = [render_all(field, turntable_cameras(8), 128)]
    agreement = None
    if describes_one_object(config.prompt):
        truth = TrueObject(config.prompt)
        agreement = truth.agreement(field).to_dict()
        rows.append(TrueObject(config.prompt, size=128).pictures)
    write_contact_sheet(out / "contact_sheet.png", rows)
    faces = write_mesh(out / "mesh.glb", field)
    metrics = {
        "prompt": config.prompt,
        "steps": trainer.steps_done,
        "seconds_per_step": seconds / steps if steps else None,
        "renders_per_step": config.estimator.renders,
        "teacher_draws_per_step": config.estimator.renders * config.estimator.renoise,
        "gradient_noise_share": trainer.noise.share,
        "agreement_with_true_object": agreement,
        "clip": None if clip is None else _clip(clip, trainer),
        "held_out": held_out(config.prompt),
        "bias": trainer.estimator.policy or "none: every gradient estimate is unbiased",
        "weight": trainer.task.weight.formula,
        "mesh_faces": faces,
        "config": dataclasses.asdict(config),
        **provenance(trainer.task.device),
    }
    write_whole(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def _clip(clip: Clip, trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    return {"model": config.clip, **PromptAlignment(clip, config.prompt, config.cameras).of(trainer.field).to_dict()}


def summary(metrics: dict[str, Any], out: Path) -> str:
    """The results of a run in a few lines.

    Args:
        metrics: from `run`.
        out: the run's folder.
    """
    lines = []
    if (agreement := metrics["agreement_with_true_object"]) is not None:
        psnr, ssim = agreement["psnr"], agreement["ssim"]
        lines.append(
            f"agreement with the true object over 8 held-out views, mean and standard deviation: "
            f"PSNR {psnr['mean']:.1f} +- {psnr['std_over_views']:.1f} dB, "
            f"SSIM {ssim['mean']:.2f} +- {ssim['std_over_views']:.2f}"
        )
    lines.append("no CLIP score" if metrics["clip"] is None else _clip_line(metrics["clip"]))
    lines.append(f"wrote {out}/turntable.gif, contact_sheet.png, mesh.glb and metrics.json")
    return "\n".join(lines)


def _clip_line(clip: dict[str, Any]) -> str:
    score, found = clip["score"], clip["r_precision"]
    line = (
        f"CLIP score ({clip['model']}) over {clip['views']} views, mean and standard deviation: "
        f"{score['mean']:.1f} +- {score['std_over_views']:.1f}"
    )
    if found is None:
        return line
    return (
        f"{line}; the prompt's caption is the best of {clip['captions']} for {found['hits']} of them, "
        f"and on average {clip['chosen']!r} is"
    )
