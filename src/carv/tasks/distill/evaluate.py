"""How good a one-step generator is: a judge's Frechet distance, class accuracy and diversity, at fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv.extras import require
from carv.judge import Judge, Moments, frechet_distance, pairwise_distance
from carv.rng import stream
from carv.tasks.distill.config import DistillConfig
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.small import small_dit
from carv.world.digits import load_digits

GROUPS = 20
"""Of samples, for the jackknife; every group has the same number of samples of each class."""

_NOISE_SEED = 20_020  # of the evaluation alone: no run's seed enters, so that all runs are judged on the same noise
_BATCH = 250
_SHEET_COLUMNS = 12

Generate: TypeAlias = Callable[[Tensor, Condition], Tensor]
"""(noise `[n, *latent]`, n conditions) -> latents `[n, *latent]`."""


class Generating(Protocol):
    """What is evaluated: a trainer, or anything else that generates."""

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """Latents `[n, *latent]` from noise `[n, *latent]` and n conditions, without gradients."""
        ...


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: real pictures in a judge's features.

    Attributes:
        train: moments of the training pictures, as is the custom for this distance.
        test: moments of the held-out pictures, which a generator that copies would miss.
        spread: mean distance between two training pictures of one class, averaged over classes.
    """

    train: Moments
    test: Moments
    spread: float

    @classmethod
    def digits(cls, judge: Judge) -> Reference:
        """Of scikit-learn's digits."""
        train, test = load_digits("train"), load_digits("test")
        with torch.no_grad():
            features, held_out = judge.features(train.floats()), judge.features(test.floats())
        return cls(Moments.of(features), Moments.of(held_out), _spread(features, train.label, judge.classes))


@dataclass(frozen=True)
class Quality:
    """Of one set of samples. Errors are standard errors over samples, by a jackknife over `GROUPS` groups of them.

    Attributes:
        frechet: to the training pictures. Of N samples it is too large by about a constant over N, which no error
            shows: compare at one N only.
        frechet_test: to the held-out pictures.
        accuracy: share of samples in which the judge sees the class that was asked for.
        diversity: mean distance between two samples of one class over that of real pictures; 1 is real, 0 collapsed.
        samples: N.
    """

    frechet: float
    frechet_error: float
    frechet_test: float
    frechet_test_error: float
    accuracy: float
    accuracy_error: float
    diversity: float
    diversity_error: float
    samples: int

    def to_dict(self) -> dict[str, float]:
        """For a line of history.jsonl."""
        return dict(vars(self))


class Evaluation:
    """Scores a generator on the same noise and classes at every step of every run (common random numbers).

        FD = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))        (Heusel et al. 2017), on the judge's features

    Args:
        teacher: decodes, and knows the classes.
        judge: a frozen classifier.
        reference: real pictures in its features.
        samples: N, the same number of each class in each of `GROUPS` groups.

    Raises:
        ValueError: N that is no multiple of classes x groups.
    """

    def __init__(self, teacher: DiffusersTeacher, judge: Judge, reference: Reference, samples: int = 1000) -> None:
        unit = judge.classes * GROUPS
        if samples < unit or samples % unit:
            raise ValueError(
                f"an evaluation needs a multiple of {unit} samples ({judge.classes} classes x {GROUPS} groups), "
                f"got {samples}"
            )
        self.teacher, self.judge, self.reference, self.samples = teacher, judge, reference, samples
        self.label: Int[Tensor, "N"] = torch.arange(samples) % judge.classes
        rows = teacher.encode_prompts([str(c) for c in range(judge.classes)])
        self.condition = rows.rows(self.label.to(teacher.device))
        rng = stream(_NOISE_SEED, "evaluation").generator()
        self.noise = torch.randn((samples, *teacher.latent_shape), generator=rng).to(teacher.device)

    def __call__(self, trainer: Generating) -> dict[str, float]:
        """Scores of what it generates, for history.jsonl."""
        return self.score(self.pictures(trainer.generate)).to_dict()

    @torch.no_grad()
    def pictures(self, generate: Generate, count: int | None = None) -> Float[Tensor, "N 3 H W"]:
        """The first `count` of the samples, decoded, in [0, 1]; by default all.

        Raises:
            ValueError: latents that are not finite.
        """
        found = []
        wanted = torch.arange(count or self.samples, device=self.teacher.device)
        for first in range(0, len(wanted), _BATCH):
            rows = wanted[first : first + _BATCH]
            latents = generate(self.noise[rows], self.condition.rows(rows))
            if not bool(torch.isfinite(latents).all()):
                raise ValueError("the generator's latents are not finite: its training has diverged, lower its rate")
            found.append(self.teacher.decode(latents).cpu())
        return torch.cat(found)

    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> Quality:
        """Scores of pictures in the order of `label`.

        Raises:
            ValueError: another number of them.
        """
        if len(pictures) != self.samples:
            raise ValueError(f"an evaluation of {self.samples} samples got {len(pictures)}")
        with torch.no_grad():
            features = self.judge.features(pictures).cpu()
            right = (self.judge.probabilities(pictures).argmax(1).cpu() == self.label).double()
        group = torch.arange(self.samples) // self.judge.classes % GROUPS
        whole = self._figures(features, right, self.label)
        without = [
            self._figures(features[kept], right[kept], self.label[kept]) for kept in (group != g for g in range(GROUPS))
        ]
        frechet, test, accuracy, diversity = (
            (x, _jackknife_error([one[i] for one in without])) for i, x in enumerate(whole)
        )
        binomial = (*accuracy[:1], max(accuracy[1], _least_error(float(right.sum()), self.samples)))
        return Quality(*frechet, *test, *binomial, *diversity, self.samples)

    def write_sheet(self, generate: Generate, path: Path) -> None:
        """A PNG of samples: a row for each class, the same noise in every sheet."""
        classes = self.judge.classes
        pictures = self.pictures(generate, min(self.samples, classes * _SHEET_COLUMNS))
        grid = pictures.reshape(-1, classes, *pictures.shape[1:]).permute(1, 3, 0, 4, 2)  # class, y, column, x, channel
        high, wide = grid.shape[0] * grid.shape[1], grid.shape[2] * grid.shape[3]
        pixels = (grid.reshape(high, wide, -1) * 255).round().to(torch.uint8).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        require("PIL.Image", "diffusers").fromarray(pixels).save(path)

    def _figures(self, features: Tensor, right: Tensor, label: Tensor) -> tuple[float, float, float, float]:
        moments = Moments.of(features)
        return (
            frechet_distance(moments, self.reference.train),
            frechet_distance(moments, self.reference.test),
            float(right.mean()),
            _spread(features, label, self.judge.classes) / self.reference.spread,
        )


def load_evaluation(config: DistillConfig, teacher: DiffusersTeacher) -> Evaluation | None:
    """The evaluation that a run's settings name; `None` if they name no judge and the teacher's folder has none.

    Raises:
        ValueError: a judge that cannot be read; a number of samples that does not divide, see `Evaluation`.
    """
    if config.judge:
        folder = Path(config.judge)
    else:
        folder = (small_dit() if config.teacher == "small" else Path(config.teacher)) / "judge"
        if not folder.is_dir():
            return None
    judge = Judge.from_pretrained(folder)
    return Evaluation(teacher, judge, Reference.digits(judge), config.samples)


def _spread(features: Float[Tensor, "N d"], label: Int[Tensor, "N"], classes: int) -> float:
    return sum(pairwise_distance(features[label == c]) for c in range(classes)) / classes


def _jackknife_error(without: list[float]) -> float:
    """sqrt((G - 1)/G sum_g (x_g - mean)^2) of figures that leave one group out."""
    mean = sum(without) / len(without)
    return math.sqrt((len(without) - 1) / len(without) * sum((x - mean) ** 2 for x in without))


def _least_error(hits: float, count: int) -> float:
    """Agresti and Coull's, with two hits and two misses added: not 0 where every sample is right."""
    share = (hits + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))
