"""The training loop that all stages share: AdamW, a moving average of the weights, checkpoints, resumption."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carv.checkpoint import load_checkpoint, save_checkpoint

Say = Callable[[str], None]

WARM_UP = 100
"""Steps over which the learning rate rises; more than are timed, so that their rates do not depend on the plan."""

_TIMED = range(5, 25)  # the first steps allocate memory and choose kernels
_CHECKPOINT_SECONDS = 120.0
_LOG_SECONDS = 15.0
_AVERAGE = 0.999


@dataclass(frozen=True)
class Stage:
    """One network to train.

    Attributes:
        name: of the stage; its checkpoint lies in a folder of this name.
        model: holds every parameter that is trained.
        loss: the loss of a step from its number; all randomness in it is addressed by that number.
        rate: the highest learning rate.
        steps: how many, or 0 to decide from the minutes.
        minutes: for the whole stage.
    """

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    rate: float
    steps: int
    minutes: float


@dataclass
class Progress:
    """How far a stage has come.

    Attributes:
        done: steps.
        planned: steps in all; 0 until that is decided.
        losses: of each step.
        seconds: spent on steps, in all.
        average: the moving average of each parameter.
    """

    done: int
    planned: int
    losses: list[float]
    seconds: float
    average: dict[str, Tensor]

    def facts(self, batch: int) -> dict[str, float]:
        """What quality.json says of the stage; its losses by their last mean and that one's standard error."""
        loss, error = recent_loss(self.losses)
        counts = {"steps": self.done, "batch": batch, "minutes": self.seconds / 60}
        return counts | {"loss": loss, "loss_standard_error": error}


def learning_rate(step: int, planned: int, highest: float) -> float:
    """Rises linearly over `WARM_UP` steps, then falls linearly to 0 at the last of the planned steps.

    Args:
        step: its number, from 0.
        planned: steps in all; 0 if not known yet, which only the timed steps may see.
        highest: the rate at the end of the rise.
    """
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = 1.0 if step < WARM_UP or planned <= WARM_UP else (planned - step) / (planned - WARM_UP)
    return highest * rise * fall


def average_decay(step: int) -> float:
    """Share of the old average that is kept: 0.999, less while it is young, so that the start is forgotten."""
    return min(_AVERAGE, (1 + step) / (10 + step))


def fit(stage: Stage, folder: Path, config: str, say: Say) -> Progress:
    """Train a stage to its planned number of steps, from its checkpoint if there is one.

    A stop at any time loses at most two minutes; the same call goes on to the same numbers, on the same machine
    with the same number of threads. Afterwards the model holds the averaged weights.

    Args:
        stage: what to train.
        folder: of all the stages' checkpoints.
        config: of the run as JSON; another run will not go on from this checkpoint.
        say: told about the progress, one line at a time.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ValueError: the loss is not finite.
    """
    parameters = dict(stage.model.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values(), lr=stage.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = _restore(stage, optimiser, load_checkpoint(folder / stage.name, config))
    if progress.done:
        say(f"{stage.name}: going on from step {progress.done} of {progress.planned}")
    stage.model.train()
    seconds: list[float] = []
    saved = logged = time.perf_counter()
    while progress.planned == 0 or progress.done < progress.planned:
        started = time.perf_counter()
        progress.losses.append(_step(stage, parameters, optimiser, progress))
        progress.done += 1
        now = time.perf_counter()
        seconds = [*seconds[-99:], now - started]
        progress.seconds += now - started
        planned_now = progress.planned == 0 and progress.done == _TIMED.stop
        if planned_now:
            each = statistics.median(seconds[_TIMED.start :])
            progress.planned = max(progress.done, round(60 * stage.minutes / each))
            say(f"{stage.name}: {progress.planned} steps of {1000 * each:.0f} ms fit into {stage.minutes:.1f} minutes")
        if planned_now or progress.done == progress.planned or now - saved > _CHECKPOINT_SECONDS:
            save_checkpoint(folder / stage.name, _tensors(stage, optimiser, progress), config)
            saved = time.perf_counter()
        if progress.done == progress.planned or now - logged > _LOG_SECONDS:
            say(_line(stage.name, progress, seconds))
            logged = now
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(progress.average[name])
    stage.model.eval().requires_grad_(False)
    return progress


def recent_loss(losses: list[float], count: int = 200) -> tuple[float, float]:
    """Mean of the last losses and its standard error, which is `nan` for a single one."""
    last = losses[-count:]
    error = statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else float("nan")
    return statistics.fmean(last), error


def _step(stage: Stage, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, at: Progress) -> float:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(at.done, at.planned, stage.rate)
    loss = stage.loss(at.done)
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise ValueError(
            f"the loss of the {stage.name} is {value} at step {at.done}; lower its learning rate (now {stage.rate:g})"
        )
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    new = [parameter.detach() for parameter in parameters.values()]
    torch._foreach_lerp_([at.average[name] for name in parameters], new, 1 - average_decay(at.done))
    return value


def _line(name: str, progress: Progress, seconds: list[float]) -> str:
    left = (progress.planned - progress.done) * statistics.fmean(seconds) / 60 if progress.planned else float("nan")
    mean, error = recent_loss(progress.losses, 100)
    planned = progress.planned or "?"
    return f"{name}: {progress.done}/{planned} loss {mean:.4f} +- {error:.4f}, {left:.1f} minutes left"


def _tensors(stage: Stage, optimiser: torch.optim.Optimizer, progress: Progress) -> dict[str, Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in stage.model.named_parameters()}
    tensors |= {f"average.{name}": value for name, value in progress.average.items()}
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
    counts = {"done": torch.tensor(progress.done), "planned": torch.tensor(progress.planned)}
    counts["seconds"] = torch.tensor(progress.seconds, dtype=torch.float64)
    return tensors | counts | {"losses": torch.tensor(progress.losses, dtype=torch.float64)}


def _restore(stage: Stage, optimiser: torch.optim.Optimizer, saved: dict[str, Tensor] | None) -> Progress:
    parameters = dict(stage.model.named_parameters())
    if saved is None:
        average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return Progress(0, stage.steps, [], 0.0, average)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[f"model.{name}"])
    moments: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        if name.startswith("adam."):
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = _like(list(parameters.values())[int(i)], value)
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    average = {name: _like(parameter, saved[f"average.{name}"]) for name, parameter in parameters.items()}
    done, planned = int(saved["done"]), int(saved["planned"])
    return Progress(done, planned, saved["losses"].tolist(), float(saved["seconds"]), average)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """The value with the parameter's device and strides: fused AdamW walks through both in memory order."""
    return value if value.shape != parameter.shape else torch.empty_like(parameter.detach()).copy_(value)
