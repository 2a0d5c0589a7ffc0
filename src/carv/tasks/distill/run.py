"""`carv distill`: one distillation, resumable, that leaves a generator, its history and its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from carv.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_whole
from carv.console import Report
from carv.devices import find_device
from carv.extras import require
from carv.provenance import provenance
from carv.strict_json import dumps
from carv.tasks.distill.config import DistillConfig
from carv.tasks.distill.data import load_real
from carv.tasks.distill.evaluate import load_evaluation
from carv.tasks.distill.networks import Classes
from carv.tasks.distill.ranks import Ranks, process_group
from carv.tasks.distill.train import Trainer, load_teacher
from carv.teachers.diffusers import DiffusersTeacher

HISTORY = "history.jsonl"
_SCALARS_EVERY = 10

Evaluation: TypeAlias = Callable[[Trainer], Mapping[str, float]]
"""What is known of a trainer's generator, as numbers by name."""


def run(
    config: DistillConfig,
    out: Path,
    checkpoint_every: int = 200,
    overwrite: bool = False,
    quiet: bool = False,
    evaluation: Evaluation | None = None,
    evaluate: bool = False,
) -> dict[str, Any]:
    """Train to the configured number of generator updates, from the folder's checkpoint if it has one.

    A stop at any time (Ctrl-C, kill -9, power) loses at most the updates since the last checkpoint; the same call goes
    on from there, to the same numbers as if it had never stopped. Under torchrun each process has R renders of its own
    and the first one writes.

    Args:
        config: the settings.
        out: the run's folder.
        checkpoint_every: generator updates between checkpoints.
        overwrite: start again where the folder holds another run.
        quiet: say nothing but errors.
        evaluation: asked every `config.evaluate_every` updates and at the end; OUT/history.jsonl gets a line each
            time: the step, the seconds of training before it (of this and earlier calls, without evaluations), and the
            values.
        evaluate: without an `evaluation`, take the one that the settings name (`config.judge`, `config.samples`), and
            write OUT/samples.png at the end.

    Returns:
        What `metrics.json` holds. The averaged generator is in OUT/generator, as diffusers saves a network.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ValueError: bad settings, a teacher output that is not finite, or a collapsed weight; the checkpoint then holds
            the last good state.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    own = identity(config)
    with process_group(find_device(config.device)) as ranks:
        writes = ranks.rank == 0
        saved = None if overwrite else load_checkpoint(out, own)
        with Report(f"carv distill: {config.teacher}", config.steps, quiet or not writes) as report:
            trainer = _trainer(config, ranks)
            history = History(out) if writes else None
            if saved is not None:
                trainer.load_state_dict(saved)
                report.say(f"going on from step {trainer.steps_done} in {out}")
            if history is not None:
                history.keep_until(trainer.steps_done if saved is not None else -1)
            judged = load_evaluation(config, trainer.teacher) if evaluate and evaluation is None and writes else None
            first = (trainer.steps_done, trainer.fake_done)
            scalars = _Scalars(out) if writes and config.tensorboard else None
            try:
                _train(trainer, history, evaluation or judged, report, out, own, checkpoint_every, scalars)
            finally:  # also on Ctrl-C or a ValueError: nothing is lost then
                if writes and trainer.whole and (trainer.steps_done, trainer.fake_done) != first:
                    save_checkpoint(out, trainer.state_dict(), own)
                if scalars is not None:
                    scalars.close()
            if judged is not None:
                judged.write_sheet(trainer.generate, out / "samples.png")
        return _results(trainer, history, out) if history is not None else {}


def summary(metrics: Mapping[str, Any], out: Path) -> str:
    """The results of a run in a few lines.

    Args:
        metrics: from `run`.
        out: the run's folder.
    """
    seconds, last = metrics["seconds"], metrics["last"] or {}
    spent = (
        f"{metrics['steps']} updates of the generator in {seconds['generator']:.0f} s, {metrics['fake_steps']} of the "
        f"fake score in {seconds['fake']:.0f} s"
    )
    lines = [
        f"{name.replace('_', ' ')}: {last[name]:.4g} +- {last[f'{name}_error']:.2g}"
        for name in last
        if f"{name}_error" in last
    ]
    if not last:
        lines.append("no evaluation: the teacher's folder has no judge, or none was asked for")
    return "\n".join([spent, *lines, f"wrote {out}/generator, history.jsonl and metrics.json"])


def identity(config: DistillConfig) -> str:
    """What a run is, as JSON: its settings without those that change no number of it."""
    return dataclasses.replace(config, tensorboard=False).to_json()


def restore(out: Path, teacher: DiffusersTeacher | None = None) -> Trainer:
    """The trainer of a run at its checkpoint, to generate or to measure with; it has no data to go on training.

    Args:
        out: the run's folder.
        teacher: the run's own, if it is loaded already.

    Raises:
        RunFolderError: there is no checkpoint, or it is damaged.
        ValueError: it is not of a distillation of this version.
    """
    return restored(*read_checkpoint(out), teacher)


def restored(tensors: dict[str, Tensor], described: str, teacher: DiffusersTeacher | None = None) -> Trainer:
    """As `restore`, from what `read_checkpoint` gave.

    Args:
        tensors, described: the run's state, and its configuration as JSON.
        teacher: the run's own, if it is loaded already.

    Raises:
        ValueError: it is not of a distillation of this version.
    """
    config = DistillConfig.from_json(described)
    trainer = Trainer(config, teacher or load_teacher(config))
    trainer.load_state_dict(tensors)
    return trainer


class History:
    """OUT/history.jsonl: one line for each evaluation. A torn last line is dropped when it is read."""

    def __init__(self, out: Path) -> None:
        self.path = out / HISTORY
        self.rows: list[dict[str, Any]] = []

    def keep_until(self, step: int) -> None:
        """Read what is there, and forget evaluations after a step: they are made again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if row["step"] <= step:
                    self.rows.append(row)
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def has(self, step: int) -> bool:
        return any(row["step"] == step for row in self.rows)

    def _write(self) -> None:
        write_whole(self.path, "".join(dumps(row) + "\n" for row in self.rows).encode())


def _trainer(config: DistillConfig, ranks: Ranks) -> Trainer:
    teacher = load_teacher(config)
    real = None
    if config.gan_weight > 0:
        real = load_real(config.data, teacher, Classes.of(teacher, config.prompts))
    return Trainer(config, teacher, real, ranks)


def _train(
    trainer: Trainer,
    history: History | None,
    evaluation: Evaluation | None,
    report: Report,
    out: Path,
    own: str,
    checkpoint_every: int,
    scalars: _Scalars | None,
) -> None:
    config = trainer.config
    while True:
        done = trainer.steps_done
        due = done > 0 and (done % config.evaluate_every == 0 or done >= config.steps)
        if due and evaluation is not None and history is not None and not history.has(done):
            values = {name: float(value) for name, value in evaluation(trainer).items()}
            seconds = sum(trainer.seconds.values())
            history.add({"step": done, "seconds": seconds, "phases": dict(trainer.seconds), **values})
            if scalars is not None:
                scalars.write(done, values)
        if history is not None and done > 0 and done % checkpoint_every == 0:
            save_checkpoint(out, trainer.state_dict(), own)
        if done >= config.steps:
            return
        trainer.step()
        report.update(trainer.steps_done)
        if scalars is not None and trainer.steps_done % _SCALARS_EVERY == 0:
            scalars.write(trainer.steps_done, {name: float(value) for name, value in trainer.scalars.items()})


class _Scalars:
    """Scalars of training and evaluation for TensorBoard, in OUT/tensorboard."""

    def __init__(self, out: Path) -> None:
        require("tensorboard", "distill")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _results(trainer: Trainer, history: History, out: Path) -> dict[str, Any]:
    config = trainer.config
    trainer.average.denoiser.network.save_pretrained(out / "generator")  # type: ignore[operator]
    metrics = {
        "steps": trainer.steps_done,
        "fake_steps": trainer.fake_done,
        "seconds": dict(trainer.seconds),
        "generator_t": trainer.generator.t,
        "weight": config.weight,
        "classes": len(trainer.dmd.classes.names),
        "last": history.rows[-1] if history.rows else None,
        "bias": trainer.estimators["generator"].policy or "none: every gradient estimate is unbiased",
        "config": json.loads(config.to_json()),
        **provenance(trainer.teacher.device),
    }
    write_whole(out / "metrics.json", (dumps(metrics, 1) + "\n").encode())
    return metrics
