"""Fields in training and pilots of them, each made once and kept: by their settings, so that nothing is mixed up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from latent_residual import LatentResidual
from locks import alone
from sds_setting import Setting

from carv.checkpoint import load_checkpoint, save_checkpoint, write_whole
from carv.commands.pilot import PilotConfig, run_pilot
from carv.console import Report
from carv.problems import ProblemConfig, load_problem
from carv.rng import stream
from carv.runs.pilot_folder import PILOT, PilotRecord
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.train import Trainer, load_teacher
from carv.teachers.small import small_pipeline
from carv.variance.pilot import pilot

Subject: TypeAlias = tuple[str, int]
"""A prompt and a seed of training."""

Pilots: TypeAlias = Mapping[Subject, PilotRecord]


def pilots(setting: Setting, guidance_scale: float | None = None, step: int | None = None) -> Pilots:
    """Subject -> a pilot of the parameter gradient.

    Args:
        setting: prompts, seeds and sizes.
        guidance_scale: of training and pilot; by default the setting's.
        step: of the field; by default the last.
    """
    return _each(setting, guidance_scale, step, _pilot)


def residual_pilots(setting: Setting) -> Pilots:
    """Subject -> a pilot of the latent residual, with the cost of a step of the parameter gradient."""
    return _each(setting, None, None, _residual_pilot)


def checkpoints(setting: Setting, subject: Subject, guidance_scale: float | None = None) -> dict[int, Path]:
    """Step -> a folder that `carv pilot sds --run` takes. What is missing is trained."""
    config = setting.run(*subject, guidance_scale)
    folder = _run_folder(setting, config)
    folders = {step: folder / f"step-{step}" for step in setting.checkpoints}
    with alone(folder):
        _check_teacher(folder, config.teacher)
        _train(config, folders)
    return folders


_Make: TypeAlias = Callable[[Path, PilotConfig], PilotRecord]
"""(a checkpoint's folder, settings) -> the pilot, found there or made."""


def _each(setting: Setting, guidance_scale: float | None, step: int | None, make: _Make) -> Pilots:
    """Several processes at once share the work: what another one is at is left for the end."""
    found: dict[Subject, PilotRecord] = {}
    subjects = [(prompt, seed) for prompt in setting.prompts for seed in setting.seeds]
    for wait in (False, True):
        for prompt, seed in (subject for subject in subjects if subject not in found):
            folder = _run_folder(setting, setting.run(prompt, seed, guidance_scale))
            with alone(folder / "pilots", wait) as mine:
                if mine:
                    at = checkpoints(setting, (prompt, seed), guidance_scale)[step or setting.steps]
                    found[prompt, seed] = make(at, setting.pilot_of(prompt, seed))
    return {subject: found[subject] for subject in subjects}


def _train(config: SDSConfig, folders: Mapping[int, Path]) -> None:
    kept = {step: load_checkpoint(folder, config.to_json()) for step, folder in folders.items()}
    if all(kept.values()):
        return
    with Report(f"{config.prompt}, seed {config.seed}", config.steps) as report:
        trainer = Trainer(config, load_teacher(config, report.say))
        for tensors in kept.values():  # upwards, as far as the run has come without a gap
            if tensors is None:
                break
            trainer.load_state_dict(tensors)
        while trainer.steps_done < config.steps:
            trainer.step()
            report.update(trainer.steps_done)
            if trainer.steps_done in folders:
                save_checkpoint(folders[trainer.steps_done], trainer.state_dict(), config.to_json())


def _pilot(checkpoint: Path, config: PilotConfig) -> PilotRecord:
    folder = checkpoint / f"pilot-{_digest(json.dumps(dataclasses.asdict(config)))}"
    if not (folder / PILOT).exists():
        return run_pilot(ProblemConfig("sds", run=checkpoint), config, folder)
    return _kept(folder, dataclasses.asdict(config))


def _residual_pilot(checkpoint: Path, config: PilotConfig) -> PilotRecord:
    folder = checkpoint / f"residual-{_digest(json.dumps(dataclasses.asdict(config)))}"
    settings = {**dataclasses.asdict(config), "gradient": "latent residual"}
    if (folder / PILOT).exists():
        return _kept(folder, settings)
    problem = load_problem(ProblemConfig("sds", run=checkpoint))
    tables = pilot(
        LatentResidual(problem.task),
        problem.base,
        stream(config.seed, "pilot"),
        renders=config.renders,
        bins=config.bins,
        noises=config.noises,
        micro_batch=config.micro_batch,
        per_draw=lambda _, f: f.flatten(1),
    )
    record = dataclasses.replace(_pilot(checkpoint, config), tables=tables, settings=settings)
    record.save(folder)
    return record


def _kept(folder: Path, settings: Mapping[str, object]) -> PilotRecord:
    record = PilotRecord.load(folder)
    if dict(record.settings) != dict(settings):
        raise ValueError(f"{folder} holds a pilot with other settings; remove it, and it is made again")
    return record


def _run_folder(setting: Setting, config: SDSConfig) -> Path:
    name = config.prompt.replace(" ", "-").replace(",", "")
    return setting.runs / "runs" / f"{name}-{config.seed}-{_digest(config.to_json())}"


def _check_teacher(folder: Path, teacher: str) -> None:
    """Refuse runs of another version of carv's own teacher, whose name stays the same when it is trained anew.

    Raises:
        ValueError: the folder's run had a teacher of other weights.
    """
    if teacher != "small":
        return
    parts = ("text_encoder", "unet", "vae")
    files = [path for part in parts for path in sorted((small_pipeline() / part).glob("*.safetensors"))]
    here, kept = _digest("".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)), folder / "teacher"
    if not kept.exists():
        write_whole(kept, here.encode())
    if kept.read_text() != here:
        raise ValueError(f"the small teacher has been trained anew since {folder} was made; give another --runs")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
