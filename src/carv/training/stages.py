"""What the runs of all teachers share: their files, their stages, and what they say about themselves.

A config is a dataclass with `minutes`, `sizes`, `to_json` and, for each stage, `NAME_steps` and `NAME_rate`; its sizes
have `NAME_batch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carv.checkpoint import CHECKPOINT, write_whole
from carv.provenance import provenance
from carv.rng import Stream
from carv.training.loop import Progress, Say, Stage, fit

CHECKPOINTS, QUALITY = "training", "quality.json"


def say_on_stderr(line: str) -> None:
    """One line for people, at once."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def initialised_from(rng: Stream) -> Iterator[None]:
    """Networks built inside get their weights from this stream, and torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(rng.child("weights").digest(4), "little"))
        yield


def fit_stage(
    name: str, model: nn.Module, loss: Callable[[int], Tensor], config: Any, share: float, folder: Path, say: Say
) -> Progress:
    """Train one stage as its run's config says, in this share of the run's minutes; see `carv.training.loop.fit`."""
    steps, rate = getattr(config, f"{name}_steps"), getattr(config, f"{name}_rate")
    return fit(Stage(name, model, loss, rate, steps, config.minutes * share), folder, config.to_json(), say)


def forget(folder: Path, names: Iterable[str]) -> None:
    """Delete the checkpoints of these names, and nothing else."""
    for name in names:
        (folder / name / CHECKPOINT).unlink(missing_ok=True)


def run_facts(config: Any, progress: Mapping[str, Progress], device: torch.device, **own: int) -> dict[str, Any]:
    """What quality.json says about how the networks were made; `own` is what only this teacher has to say."""
    return {
        "config": dataclasses.asdict(config),
        "sizes": dataclasses.asdict(config.sizes),
        **own,
        "stages": {name: stage.facts(getattr(config.sizes, f"{name}_batch")) for name, stage in progress.items()},
        **provenance(device),
    }


def weight_count(*networks: nn.Module) -> int:
    """How many weights these networks have."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def write_facts(out: Path, facts: dict[str, Any], card: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """The facts, once they are written to quality.json and, as the card tells them, to README.md."""
    write_whole(out / QUALITY, (json.dumps(facts, indent=1) + "\n").encode())
    write_whole(out / "README.md", card(facts).encode())
    return facts
