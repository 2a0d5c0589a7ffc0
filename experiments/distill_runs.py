"""Runs of DMD2 with their evaluations, each made once and kept; and what a step of each costs on a quiet core."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from distill_curves import Histories, History
from distill_setting import DIGITS, DistillSetting, digest
from locks import alone

from carv.checkpoint import write_whole
from carv.console import Report
from carv.rng import stream
from carv.tasks.distill.config import DistillConfig
from carv.tasks.distill.data import RealLatents, load_real
from carv.tasks.distill.evaluate import Evaluation, load_evaluation
from carv.tasks.distill.networks import Classes
from carv.tasks.distill.train import Trainer, load_teacher
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.small import small_dit
from carv.variance.cost import measure_cost
from carv.variance.values import Value

Configs: TypeAlias = Mapping[str, DistillConfig]
"""Name -> configuration, of any seed and number of steps."""

Costs: TypeAlias = Mapping[str, Value]
"""Name -> seconds of one core for a generator update with its fake-score updates."""


def trained(setting: DistillSetting, configs: Configs, costs: Costs, seeds: Sequence[int]) -> dict[str, Histories]:
    """Name -> seed -> history, each run as long as `setting.seconds` of one core. What is missing is trained.

    Several processes at once share the work: what another one is at is left for the end.
    """
    jobs = [(name, seed) for seed in seeds for name in configs]
    found: dict[tuple[str, int], History] = {}
    for wait in (False, True):
        for name, seed in (job for job in jobs if job not in found):
            config = timed(setting, dataclasses.replace(configs[name], seed=seed), costs[name])
            folder = setting.runs / "distill" / f"{digest(config)}-{weights_digest(setting.teacher)}"
            with alone(folder, wait) as mine:
                if mine:
                    found[name, seed] = _history(config, folder / "history.json", costs[name])
    return {name: {seed: found[name, seed] for seed in seeds} for name in configs}


def timed(setting: DistillSetting, config: DistillConfig, cost: Value) -> DistillConfig:
    """The configuration with as many steps as fit into the setting's seconds, and evaluations at equal times."""
    every = max(1, round(setting.seconds / cost.value / setting.evaluations))
    return dataclasses.replace(config, steps=every * setting.evaluations, evaluate_every=every)


def step_costs(setting: DistillSetting, configs: Configs) -> dict[str, Value]:
    """Processor seconds of one step of each configuration, timed side by side; kept, so that runs do not change."""
    plain = [dataclasses.replace(config, seed=0, steps=1, evaluate_every=1) for config in configs.values()]
    found: dict[str, Value] = {}
    folder = setting.runs / "distill" / f"costs-{weights_digest(setting.teacher)}"
    with alone(folder):
        paths = {name: folder / f"{digest(config)}.json" for name, config in zip(configs, plain, strict=True)}
        missing = {name: c for (name, path), c in zip(paths.items(), plain, strict=True) if not path.exists()}
        if missing:
            steps = {name: trainer_of(config).step for name, config in missing.items()}
            rng = stream(0, "order")
            timed_steps = measure_cost(steps, rng, repetitions=setting.timings, clock=time.process_time)
            for name, cost in timed_steps.items():
                write_whole(paths[name], json.dumps(dataclasses.asdict(cost.seconds)).encode())
        for name, path in paths.items():
            found[name] = Value(**json.loads(path.read_text()))
    return found


def trainer_of(config: DistillConfig) -> Trainer:
    """A run at its start."""
    teacher = _teacher(config.teacher)
    return Trainer(config, teacher, _real(config.teacher) if config.gan_weight > 0 else None)


def weights_digest(teacher: str) -> str:
    """A short name of a teacher's weights: runs of another one are other runs."""
    folder = small_dit() if teacher == "small" else Path(teacher)
    parts = [path for part in ("transformer", "vae", "judge") for path in sorted((folder / part).glob("*.safetensors"))]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in parts)).hexdigest()[:6]


def _history(config: DistillConfig, path: Path, cost: Value) -> History:
    if not path.exists():
        write_whole(path, json.dumps(_train(config)).encode())
    rows = json.loads(path.read_bytes())
    start = {"step": 0, "frechet": _at_the_start(config.teacher, config.samples)}
    step, frechet = (np.array([row[name] for row in (start, *rows)], dtype=float) for name in ("step", "frechet"))
    return History(step, frechet, cost.value)


def _train(config: DistillConfig) -> list[dict[str, float]]:
    """The run's evaluations; `carv distill` with the same settings has the same, and keeps checkpoints as well."""
    trainer, evaluation, rows = trainer_of(config), _evaluation(config.teacher, config.samples), []
    title = f"R = {config.renders}, K = {config.generator.renoise}, seed {config.seed}"
    with Report(title, config.steps) as report:
        while trainer.steps_done < config.steps:
            trainer.step()
            if trainer.steps_done % config.evaluate_every == 0:
                rows.append({"step": trainer.steps_done, **evaluation(trainer)})
            report.update(trainer.steps_done)
    return rows


@cache
def _at_the_start(teacher: str, samples: int) -> float:
    """The distance of the teacher itself asked once, where all runs start."""
    config = DistillConfig(teacher=teacher, prompts=DIGITS, samples=samples, gan_weight=0.0)
    return _evaluation(teacher, samples)(trainer_of(config))["frechet"]


@cache
def _teacher(name: str) -> DiffusersTeacher:
    return load_teacher(DistillConfig(teacher=name))


@cache
def _real(teacher: str) -> RealLatents:
    loaded = _teacher(teacher)
    return load_real("digits", loaded, Classes.of(loaded, DIGITS))


@cache
def _evaluation(teacher: str, samples: int) -> Evaluation:
    found = load_evaluation(DistillConfig(teacher=teacher, samples=samples), _teacher(teacher))
    if found is None:
        raise ValueError(f"{teacher} has no judge in its folder: train one with `carv teachers train digits`")
    return found
