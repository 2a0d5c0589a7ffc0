"""Projected gradients of clips over all cells of a bank, made once and kept: all that the experiments need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from attribution_setting import Setting
from jaxtyping import Float
from torch import Tensor

from carv.console import Report
from carv.tasks.attribution.bank import DrawBank, base_density
from carv.tasks.attribution.cache import GradientCache
from carv.tasks.attribution.gradients import ExampleGradients
from carv.tasks.attribution.motion import motion_mask
from carv.tasks.attribution.projector import Projector
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.world.clips import Clips

_IN_A_FILE = 128  # draws


@dataclass(frozen=True)
class Bank:
    """Gradients of N clips at M draws (t_c, eps_c) that all share.

    Attributes:
        t: `[M]`, increasing.
        vectors: `[N, M, k]`, projected.
        norms: `[N, M]`, of the gradients themselves.
    """

    t: Float[Tensor, " M"]
    vectors: Float[Tensor, "N M k"]
    norms: Float[Tensor, "N M"]

    @property
    def directions(self) -> Float[Tensor, "N M k"]:
        """Unit vectors; zero where the gradient is zero."""
        return self.vectors / self.vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)

    def at(self, place: slice) -> Bank:
        """Some of the clips."""
        return Bank(self.t, self.vectors[place], self.norms[place])

    def cells(self, first: int, every: int) -> Bank:
        """Each `every`th cell from the first one.

        Those next to each other are at nearly one t, but each has noise of its own: two such parts, one cell apart, are
        two noises for each of M / every timesteps.
        """
        chosen = range(first, len(self.t) // every * every, every)
        return Bank(self.t[list(chosen)], self.vectors[:, list(chosen)], self.norms[:, list(chosen)])

    def cosines(self) -> npt.NDArray[np.float64]:
        """`[M, N, N]`, the terms of Eq. 11 for all pairs of clips."""
        unit = self.directions.transpose(0, 1)
        return (unit @ unit.transpose(1, 2)).double().numpy()


@dataclass(frozen=True)
class BankSettings:
    """Which gradients.

    Attributes:
        sign: of all noise; -1 is the antithetic bank.
        masked: weigh the loss with motion masks (Eq. 60).
        every: odd; 3 takes the second, fifth, eighth, ... cell only. (c + 1/2) / M are then (j + 1/2) / (M / 3).
    """

    sign: int = 1
    masked: bool = False
    every: int = 1


def gradients(setting: Setting, teacher: DiffusersTeacher, clips: Clips, which: BankSettings) -> Bank:
    """The gradients of all clips at all cells; kept below the setting's --runs, so that they are made once.

    Args:
        setting: cells, dimensions, parameters, seed.
        teacher: whose loss.
        clips: of any lengths; noise is shared frame by frame.
        which: sign, masks, and every how manieth cell.
    """
    base = base_density(teacher.schedule, setting.shift)
    bank = DrawBank(setting.seed, "iid", base, noise="fixed", cells=setting.cells)
    made = ExampleGradients(teacher, Projector(setting.dimensions, seed=setting.seed), setting.parameters)
    fingerprint = {
        "teacher": teacher_digest(teacher),
        "bank": bank.settings,
        "gradients": made.settings,
        "sign": which.sign,
        "masked": which.masked,
        "every": which.every,
    }
    folder = setting.runs / "attribution" / _short(fingerprint)
    cache = GradientCache(folder, fingerprint)
    cells = range((which.every - 1) // 2, setting.cells, which.every)
    rows = []
    with Report(f"gradients of {len(clips)} clips x {len(cells)} draws", len(clips)) as report:
        for i in range(len(clips)):
            _make(teacher, made, bank, cache, clips, i, which, cells)
            kept = cache.rows(clip_digest(clips, i), 0, len(cells))
            assert kept is not None
            rows.append(kept)
            report.update(i + 1)
    vectors, norms = (torch.stack(part) for part in zip(*rows, strict=True))
    return Bank(bank.grid()[list(cells)], vectors, norms)


def latent_and_condition(teacher: DiffusersTeacher, clips: Clips, i: int) -> tuple[Tensor, Condition]:
    """z and the caption's condition of a clip."""
    fitted = teacher.with_frames(len(clips.pictures[i]))
    with torch.no_grad():
        latent = fitted.encode(clips.video(i)[None])[0]
    return latent, teacher.encode_prompts([clips.caption(i)])


def teacher_digest(teacher: DiffusersTeacher) -> str:
    """Of the network's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(teacher.network.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _make(
    teacher: DiffusersTeacher,
    made: ExampleGradients,
    bank: DrawBank,
    cache: GradientCache,
    clips: Clips,
    i: int,
    which: BankSettings,
    cells: range,
) -> None:
    """What the cache lacks of a clip."""
    name = clip_digest(clips, i)
    missing = cache.missing(name, 0, len(cells))
    if not missing:
        return
    latent, condition = latent_and_condition(teacher, clips, i)
    mask = motion_mask(clips.video(i), tuple(latent.shape)).mask if which.masked else None
    for first, last in missing:
        for low in range(first, last, _IN_A_FILE):
            some = cells[low : min(low + _IN_A_FILE, last)]
            noise = torch.stack([bank.cell_noise(c, tuple(latent.shape)) for c in some])
            found = made(latent, condition, bank.grid()[list(some)], which.sign * noise, mask)
            cache.put(name, low, found.vectors, found.norms)


def clip_digest(clips: Clips, i: int) -> str:
    """Of its pictures and its caption."""
    return hashlib.sha256(clips.pictures[i].numpy().tobytes() + clips.caption(i).encode()).hexdigest()[:32]


def _short(fingerprint: dict[str, object]) -> Path:
    return Path(hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()[:12])
