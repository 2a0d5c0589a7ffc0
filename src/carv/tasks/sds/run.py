"""`carv sds`: one text-to-3D run, resumable, that leaves a turntable, a mesh and its metrics."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from carv.checkpoint import load_checkpoint, save_checkpoint, write_whole
from carv.console import Report
from carv.provenance import provenance
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.evaluate import TrueObject, describes_one_object
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
        ValueError: bad settings, an unknown word in the prompt, or a teacher output that is not finite.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    saved = None if overwrite else load_checkpoint(out, config.to_json())
    with Report(f"carv sds: {config.prompt}", config.steps, quiet) as report:
        trainer = Trainer(config, load_teacher(config, report.say))
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
                    save_checkpoint(out, trainer.state_dict(), config.to_json())
        finally:  # also on Ctrl-C: nothing is lost then
            if trainer.steps_done > first:
                save_checkpoint(out, trainer.state_dict(), config.to_json())
        seconds = time.perf_counter() - started
    return _results(trainer, out, seconds, trainer.steps_done - first)


def _noise(trainer: Trainer) -> str:
    share = trainer.noise.share
    return "" if share is None else f"gradient noise {share:.0%}"


def _results(trainer: Trainer, out: Path, seconds: float, steps: int) -> dict[str, Any]:
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
        "bias": trainer.estimator.policy or "none: every gradient estimate is unbiased",
        "weight": trainer.task.weight.formula,
        "mesh_faces": faces,
        "config": dataclasses.asdict(config),
        **provenance(),
    }
    write_whole(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics
