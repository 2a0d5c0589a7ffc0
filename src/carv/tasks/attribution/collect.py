"""Gradients of examples at the draws they share: from the cache, or made and kept there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from carv.tasks.attribution.bank import DrawBank
from carv.tasks.attribution.cache import GradientCache
from carv.tasks.attribution.config import AttributionConfig
from carv.tasks.attribution.examples import Example, encode, fit
from carv.tasks.attribution.gradients import ExampleGradients
from carv.tasks.attribution.motion import mask_file, motion_mask, read_mask
from carv.teachers.diffusers import DiffusersTeacher

AT_ONCE = 16
"""Draws of an example between two writes: what a crash can lose."""

_SAMPLED = 4096  # entries of each parameter that stand for it in a digest


class Collector:
    """Projected gradients by example and draw, the same whatever was asked for before.

    Args:
        config: the settings.
        teacher: whose loss it is.
        folder: of the cache.

    Attributes:
        bank: the draws.
        cache: what is kept; examples are in it by `key`.

    Raises:
        RunFolderError: the folder holds the cache of other settings or of another teacher.
        ValueError: settings that do not fit the teacher.
    """

    def __init__(self, config: AttributionConfig, teacher: DiffusersTeacher, folder: Path) -> None:
        self.config, self.teacher = config, teacher
        self.bank: DrawBank = config.bank(teacher.schedule)
        self.gradients = ExampleGradients(teacher, config.projection(), config.parameters, config.micro_batch)
        self._masks = config.masks_folder()
        self.cache = GradientCache(folder, self._fingerprint())
        self._noise: tuple[tuple[int, int, tuple[int, ...]], Tensor] | None = None

    def extend(self, examples: list[Example], first: int, last: int, done: Callable[[int], None]) -> None:
        """Have the draws first, ..., last - 1 of all examples in the cache; `done` is told how many are new.

        Raises:
            ValueError: a file that cannot be read, a mask that does not fit, or a gradient that is not finite; it names
                the example.
            RunFolderError: the disk is full; nothing that was there is lost.
        """
        for start in range(first, last, AT_ONCE):
            end = min(start + AT_ONCE, last)
            for example in examples:
                for gap in self.cache.missing(self.key(example), start, end):
                    self._make(example, *gap)
                done(end - start)

    def rows(self, example: Example, first: int, last: int) -> Float[Tensor, "n k"]:
        """P g of an example at the draws first, ..., last - 1; those that the cache has lost since are made again."""
        while (found := self.cache.rows(self.key(example), first, last)) is None:
            self.extend([example], first, last, lambda _: None)
        return found[0]

    def key(self, example: Example) -> str:
        """The example's name in the cache: of its bytes, its caption, and its own mask if it has one."""
        if self._masks is None:
            return example.digest
        mask = mask_file(self._masks, example.name).read_bytes()
        return hashlib.sha256(example.digest.encode() + mask).hexdigest()

    def mask(self, example: Example, latent_shape: tuple[int, ...]) -> Tensor | None:
        """M of Eq. 60 for an example, `[F, h, w]`, or `None` without masks."""
        if self.config.masks == "none":
            return None
        name = f"{self.key(example)}-mask"
        kept = self.cache.latent(name)
        if kept is not None:
            return kept
        pictures = self.pictures(example)
        if self._masks is None:
            found = motion_mask(pictures, latent_shape).mask
        else:
            frames = pictures.shape[1] if pictures.ndim == 4 else 1
            found = read_mask(self._masks, example.name, frames, latent_shape)
        self.cache.put_latent(name, found)
        return found

    def stands_still(self, example: Example) -> bool:
        """Whether optical flow saw no motion in a clip, so that its mask is 1 everywhere."""
        if self.config.masks != "flow":
            return False
        mask = self.mask(example, tuple(self.latent(example).shape))
        return mask is not None and bool((mask == 1).all())

    def latent(self, example: Example) -> Tensor:
        """z of an example, encoded once."""
        name = self.key(example)
        kept = self.cache.latent(name)
        if kept is None:
            kept = encode(self.teacher, example, self.config.frames).cpu()
            self.cache.put_latent(name, kept)
        return kept

    def pictures(self, example: Example) -> Tensor:
        """An example as the teacher sees it, `[3, F, H, W]` or `[3, H, W]`."""
        shape, most = self.teacher.picture_shape, self.config.frames
        decoded = example.pictures((most or shape[1]) if len(shape) == 4 else 2)
        return fit(decoded, shape, most, self.teacher.frames_per_latent)

    def _make(self, example: Example, first: int, last: int) -> None:
        try:
            latent = self.latent(example)
            shape = tuple(latent.shape)
            mask = self.mask(example, shape)
            t, _ = self.bank.timesteps(first, last)
            condition = self.teacher.encode_prompts([example.caption])
            found = self.gradients(latent, condition, t, self._noises(first, last, shape), mask)
        except ValueError as error:
            message = str(error)
            raise error if example.name in message else ValueError(f"{example.name}: {message}") from error
        self.cache.put(self.key(example), first, found.vectors, found.norms)

    def _noises(self, first: int, last: int, shape: tuple[int, ...]) -> Tensor:
        address = (first, last, shape)
        if self._noise is None or self._noise[0] != address:  # the next example mostly has the same
            self._noise = address, self.bank.noises(first, last, shape)
        return self._noise[1]

    def _fingerprint(self) -> dict[str, object]:
        config = self.config
        return {
            "network": weights_digest(self.teacher.network),
            "picture size": list(self.teacher.picture_shape[-2:]),
            "frames": self.teacher.picture_shape[1] if config.frames is None else config.frames,
            "tokens": config.max_tokens,
            "type": config.teacher_dtype,
            "masks": "own" if self._masks is not None else config.masks,
            "draws": self.bank.settings,
            "gradients": self.gradients.settings,
        }


def weights_digest(network: nn.Module) -> str:
    """16 hex digits that change with the weights of a network: by names, shapes, and 4096 entries of each."""
    digest = hashlib.sha256()
    for name, parameter in network.state_dict().items():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {list(parameter.shape)}\0".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
