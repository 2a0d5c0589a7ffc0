"""What the finished pipeline can do: measured on the saved folder, as its users load it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from carv.clip import Value, average, share
from carv.extras import require, without_progress_bars
from carv.judge import Judge, Moments, frechet_distance, frechet_error, nearest_distance, pairwise_distance
from carv.rng import Stream
from carv.training.autoencoder import psnr
from carv.training.digits.data import AugmentedDigits
from carv.training.evaluate import write_sheet
from carv.world.digits import CLASSES, Digits, load_digits

_AT_ONCE = 100
_SHEET_ROWS = 8
_GROUPS = 20


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """The saved pipeline in float32, without its progress bar."""
    with without_progress_bars():
        pipeline = require("diffusers", "diffusers").DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float32)


def sample(pipeline: Any, labels: Int[Tensor, "M"], steps: int, scale: float, rng: Stream) -> Float[Tensor, "M 3 S S"]:
    """One picture in [0, 1] for each class, on the CPU; picture i starts from the noise at the stream's child i.

    Args:
        pipeline: from `load_pipeline`.
        labels: the classes asked for.
        steps: of DDIM.
        scale: s of e_u + s (e_c - e_u); 1 is without guidance.
        rng: of the noise.
    """
    pictures = []
    for first in range(0, len(labels), _AT_ONCE):
        chunk = labels[first : first + _AT_ONCE].tolist()
        generator = [rng.child(first + i).generator() for i in range(len(chunk))]
        drawn = pipeline(
            class_labels=chunk,
            generator=generator,
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="pt",
        ).images
        pictures.append(drawn.float().cpu())
    return torch.cat(pictures)


@dataclass(frozen=True)
class Reference:
    """The real pictures as the judge sees them; both splits are in random order.

    Attributes:
        judge: in float32 on the CPU.
        test, train: the two splits.
        test_features, train_features: of them.
        known: [K, 3 S S] every picture that the networks were trained on, distorted copies too, in [0, 1].
        test_distance: the test pictures' median `distance_to_known`.
    """

    judge: Judge
    test: Digits
    train: Digits
    test_features: Float[Tensor, "N d"]
    train_features: Float[Tensor, "T d"]
    known: Float[Tensor, "K D"]
    test_distance: float

    @classmethod
    def of(cls, judge: Judge, seen: AugmentedDigits, rng: Stream) -> Reference:
        """Both splits through the judge."""
        splits = [shuffled(load_digits(name), rng.child(name)) for name in ("test", "train")]
        test, train = splits
        features = [judge.features(split.floats()) for split in splits]
        known = seen.images.flatten(1).float() / 255
        median = float(distance_to_known(test.floats(), known).median())
        return cls(judge, test, train, features[0], features[1], known, median)

    def quality(self, pictures: Float[Tensor, "M 3 S S"], labels: Int[Tensor, "M"]) -> dict[str, Value]:
        """How good pictures are that should show these classes.

        Args:
            pictures: in [0, 1], at least three of each class.
            labels: what each should show.

        Returns:
            accuracy, the share that the judge takes for what they should be. frechet_test and frechet_train, the
            Frechet distance of its features to each split. diversity, the mean distance of pairs within a class over
            that of the test split, a mean over classes. near_known, the share of pictures whose nearest picture of
            the training is nearer than a test picture's median one: 0.5 for new pictures of the same kind, 1 for
            copies.
        """
        features = self.judge.features(pictures)
        hits = self.judge.probabilities(pictures).argmax(dim=1) == labels
        return {
            "accuracy": share(hits),
            "frechet_test": _frechet(features, self.test_features),
            "frechet_train": _frechet(features, self.train_features),
            "diversity": self._diversity(features, labels),
            "near_known": share(distance_to_known(pictures, self.known) < self.test_distance),
        }

    def _diversity(self, features: Tensor, labels: Tensor) -> Value:
        classes = torch.arange(CLASSES)
        ratios = [
            pairwise_distance(features[labels == one]) / pairwise_distance(self.test_features[self.test.label == one])
            for one in classes
        ]
        return average(torch.tensor(ratios), classes)


def distance_to_known(pictures: Float[Tensor, "M 3 S S"], known: Float[Tensor, "K D"]) -> Float[Tensor, "M"]:
    """Root mean square difference in pixels to the nearest known picture, both in [0, 1]."""
    return nearest_distance(pictures.flatten(1), known) / math.sqrt(known.shape[1])


def shuffled(digits: Digits, rng: Stream) -> Digits:
    """The same digits in random order."""
    order = torch.randperm(len(digits), generator=rng.generator())
    return Digits(digits.pictures[order], digits.label[order])


def asked_classes(each: int, rng: Stream) -> Int[Tensor, "M"]:
    """Every class so many times, in random order."""
    return torch.arange(CLASSES).repeat(each)[torch.randperm(CLASSES * each, generator=rng.generator())]


def real_quality(reference: Reference, each: int) -> dict[str, Value]:
    """The same measures of pictures of the training split, `each` of each digit: what samples can hope for.

    Their distance to the training split and their nearness to what was trained on are left out: they are of the
    pictures to themselves.
    """
    train = reference.train
    before = functional.one_hot(train.label, CLASSES).cumsum(dim=0).gather(1, train.label[:, None])[:, 0]
    chosen = before <= each
    measured = reference.quality(train.floats()[chosen], train.label[chosen])
    return {name: measured[name] for name in ("accuracy", "frechet_test", "diversity")}


@torch.no_grad()
def reconstruction_quality(vae: Any, test: Digits) -> Value:
    """PSNR in dB of decoded means for the test split, clipped to [0, 1]; its standard error is over pictures."""
    pictures = 2 * test.floats() - 1
    posterior = vae.encode(pictures.to(vae.device)).latent_dist
    decoded = vae.decode(posterior.mean).sample.cpu()
    values = psnr(decoded.clamp(-1, 1), pictures)
    return average(values, torch.arange(len(values)))


def write_samples(path: Path, pictures: Float[Tensor, "M 3 S S"], labels: Int[Tensor, "M"]) -> None:
    """Digits across, the first eight pictures of each down, twice as large, with grey lines between."""
    columns = [pictures[labels == one] for one in range(CLASSES)]
    high = min(_SHEET_ROWS, *map(len, columns))
    sheet = torch.stack([column[:high] for column in columns], dim=1)
    sheet = sheet.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    write_sheet(path, functional.pad(2 * sheet - 1, (1, 1, 1, 1), value=-0.4))


def _frechet(features: Tensor, real: Tensor) -> Value:
    return {
        "value": frechet_distance(Moments.of(features), Moments.of(real)),
        "standard_error": frechet_error(features, real, groups=min(_GROUPS, len(features) // 3)),
        "count": len(features),
    }
