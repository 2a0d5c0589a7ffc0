"""One tiny pipeline of each family, how to load and to run it, and its formulas written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carv.teachers.diffusers import DiffusersTeacher

from tiny_pipelines import TOKENS, dit, flux, sd3, sdxl, stable_diffusion, wan

PROMPTS = ("a red chair", "a blue duck")
HTML = ("a  red &amp; blue x", "a duck")  # Wan's pipeline cleans its prompts
LABELS = {"7": "tench, Tinca tinca", "134": "crane", "517": "crane"}


@dataclass(frozen=True)
class Case:
    """One family: how to make it, how to load it, how to run its pipeline, and its formulas written by hand."""

    make: Callable[[], Any]
    load: dict[str, Any]
    call: dict[str, Any]  # of the pipeline, beside the latents
    prediction: str
    prompts: tuple[str, str] = PROMPTS
    negative: str = "blurry"
    mean: Any = 0.0
    scale: Any = 1.0


def of_channels(values: list[float], dims: int) -> Tensor:
    return torch.tensor(values).view(-1, *[1] * dims)


TEXT = {"prompt": list(PROMPTS), "negative_prompt": ["blurry"] * 2, "output_type": "latent"}
CASES = {
    "sd": Case(stable_diffusion, {}, TEXT | {"guidance_scale": 3.0}, "v", scale=0.3),
    "sdxl": Case(
        sdxl,
        {},
        TEXT | {"guidance_scale": 3.0, "negative_prompt": None},
        "epsilon",
        negative="",
        mean=of_channels([0.1, 0.2, 0.3, 0.4], 2),
        scale=0.4 / of_channels([1.0, 2.0, 0.5, 1.5], 2),
    ),
    "dit": Case(
        dit,
        {},
        {"class_labels": [207, 7], "guidance_scale": 3.0, "output_type": "pt"},
        "epsilon",
        prompts=("207", "Tinca tinca"),
        negative="",
        scale=0.18215,
    ),
    "sd3": Case(
        sd3,
        {"max_tokens": TOKENS},
        TEXT | {"guidance_scale": 3.0, "max_sequence_length": TOKENS},
        "flow",
        mean=0.06,
        scale=1.5,
    ),
    "flux": Case(
        flux,
        {"max_tokens": TOKENS, "size": 16, "distilled_guidance": 2.5},
        TEXT | {"true_cfg_scale": 3.0, "guidance_scale": 2.5, "height": 16, "width": 16, "max_sequence_length": TOKENS},
        "flow",
        mean=0.11,
        scale=0.36,
    ),
    "wan": Case(
        wan,
        {"max_tokens": TOKENS, "size": (16, 32), "frames": 5},
        TEXT
        | {
            "prompt": list(HTML),
            "guidance_scale": 3.0,
            "height": 16,
            "width": 32,
            "num_frames": 5,
            "max_sequence_length": TOKENS,
        },
        "flow",
        prompts=HTML,
        mean=of_channels([0.1, -0.2, 0.3, -0.4], 3),
        scale=1 / of_channels([1.0, 2.0, 0.5, 1.5], 3),
    ),
}
every_family = pytest.mark.parametrize("name", sorted(CASES))


def saved_families(root: Path) -> Callable[[str], Path]:
    """The folder of a family, made once."""

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                pipeline = CASES[name].make()
                pipeline.save_pretrained(path, safe_serialization=True)
            if name == "dit":
                edit(path / "model_index.json", id2label=LABELS)
        return path

    return folder


def loaded_families(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    """The teacher of a family, loaded once."""
    loaded: dict[str, DiffusersTeacher] = {}

    def teacher(name: str) -> DiffusersTeacher:
        if name not in loaded:
            loaded[name] = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
        return loaded[name]

    return teacher


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(teacher: DiffusersTeacher, *fractions: float) -> Tensor:
    values = torch.tensor(fractions, dtype=torch.float64)
    return values if teacher.schedule.continuous else (values * 1000).long()
