"""`carv teachers train`: which small teacher, where to, and the settings of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from carv.training.clips.config import ClipsConfig
from carv.training.config import TrainConfig
from carv.training.digits.config import DigitsConfig

Threads = Annotated[int, tyro.conf.arg(help="CPU threads; 0 leaves torch's choice.")]


@dataclass(frozen=True)
class Into:
    """Where a teacher goes."""

    out: Path
    """The pipeline's folder."""
    overwrite: bool = False
    """Start again where the folder holds another run."""
    threads: Threads = 0


@dataclass(frozen=True)
class World:
    """A small Stable Diffusion on carv's own captioned 3D world, and a CLIP: about an hour on a CPU core."""

    config: TrainConfig
    into: Into

    def train(self) -> str:
        """Train it; what to do next."""
        from carv.training.train import train  # heavy, and an extra

        train(self.config, self.into.out, self.into.overwrite)
        return f'carv sds "a red chair" --teacher {self.into.out} --out chair'


@dataclass(frozen=True)
class Digits:
    """A small DiT on scikit-learn's digits, and a classifier to judge with: under half an hour on a CPU core."""

    config: DigitsConfig
    into: Into

    def train(self) -> str:
        """Train it; what to do next."""
        from carv.training.digits.train import train

        train(self.config, self.into.out, self.into.overwrite)
        return f"carv distill --teacher {self.into.out} --out generator"


@dataclass(frozen=True)
class Clips:
    """A small Wan video model on clips of moving digits: about an hour on a CPU core."""

    config: ClipsConfig
    into: Into

    def train(self) -> str:
        """Train it; what to do next."""
        from carv.training.clips.train import train

        train(self.config, self.into.out, self.into.overwrite)
        return f"carv attribute --teacher {self.into.out} --train FOLDER --query FILE --out influence"


Teacher: TypeAlias = (
    Annotated[World, tyro.conf.subcommand("world")]
    | Annotated[Digits, tyro.conf.subcommand("digits")]
    | Annotated[Clips, tyro.conf.subcommand("clips")]
)
