"""From pictures in [0, 1] to a teacher's latents and back, with the scaling that the folder gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options


class Autoencoder:
    """A frozen VAE with its latent units, `z = scale (raw - mean)`.

    ============================  =========================  ==========================
    config                        mean                       scale
    ============================  =========================  ==========================
    AutoencoderKL                 shift_factor, or 0         scaling_factor
    ... with latents_mean, _std   latents_mean               scaling_factor / latents_std
    AutoencoderKLWan (video)      latents_mean               1 / latents_std
    ============================  =========================  ==========================

    It works in its own precision, float32 unless told otherwise: the Stable Diffusion VAEs overflow in fp16.

    Attributes:
        picture_shape: `(3, H, W)`, or `(3, F, H, W)` of a video.
        latent_shape: `(C, H / f, W / f)`, or `(C, (F - 1) / g + 1, H / f, W / f)`.
    """

    def __init__(
        self, model: Any, options: Options, picture_shape: tuple[int, ...], latent_shape: tuple[int, ...]
    ) -> None:
        self.picture_shape, self.latent_shape = picture_shape, latent_shape
        self._model, self._dtype = model, options.vae_dtype
        mean, scale = _units(model.config)
        per_channel = (-1, *[1] * (len(latent_shape) - 1))
        self._mean = mean.view(per_channel).to(options.device)
        self._scale = scale.view(per_channel).to(options.device)

    @classmethod
    def image(cls, model: Any, options: Options, size: tuple[int, int]) -> Autoencoder:
        """An AutoencoderKL for pictures of some height and width."""
        factor = spatial_factor(model)
        latent_shape = (int(model.config["latent_channels"]), size[0] // factor, size[1] // factor)
        return cls(model, options, (3, *size), latent_shape)

    @classmethod
    def video(cls, model: Any, options: Options, size: tuple[int, int], frames: int) -> Autoencoder:
        """An AutoencoderKLWan for videos of some height, width and number of frames.

        Raises:
            ValueError: a number of frames that it does not take.
        """
        factor = spatial_factor(model)
        one = cls(model, options, (3, 1, *size), (int(model.config["z_dim"]), 1, size[0] // factor, size[1] // factor))
        return one.with_frames(frames)

    @property
    def frames_per_latent(self) -> int:
        """How many frames a latent frame stands for, after the first; 1 of an autoencoder of pictures."""
        return int(self._model.config["scale_factor_temporal"]) if len(self.picture_shape) == 4 else 1

    def with_frames(self, frames: int) -> Autoencoder:
        """The same autoencoder for videos of another number of frames.

        Raises:
            ValueError: a number of frames that it does not take, or an autoencoder of pictures.
        """
        if len(self.picture_shape) == 3:
            raise ValueError(f"this teacher takes pictures, not videos of {frames} frames")
        per_latent = self.frames_per_latent
        if frames < 1 or (frames - 1) % per_latent:
            raise ValueError(f"this teacher takes videos of 1 + {per_latent} n frames, got frames = {frames}")
        other = copy.copy(self)
        other.picture_shape = (3, frames, *self.picture_shape[2:])
        other.latent_shape = (self.latent_shape[0], (frames - 1) // per_latent + 1, *self.latent_shape[2:])
        return other

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """z of pictures, differentiable: the posterior's mean, or a sample of it.

            z = scale (mu(x) + s(x) xi - mean),       x = 2 pictures - 1,       xi = noise or 0

        Pictures of another size are brought to the teacher's (bilinear, antialiased), which is also
        differentiable.

        Args:
            pictures: `[R, 3, h, w]` in [0, 1], or `[R, 3, F, h, w]` for video (F = 1 may be left out).
            noise: xi, `[R, *latent_shape]`, standard normal. It is a third source of randomness beside t and
                eps: draw it from a stream of its own.

        Returns:
            `[R, *latent_shape]`, in the type of the pictures and at least float32.

        Raises:
            ValueError: pictures or noise of another shape.
        """
        frames = self.picture_shape[1:-2]
        if frames == (1,) and pictures.ndim == 4:
            pictures = pictures[:, :, None]
        if pictures.ndim != len(self.picture_shape) + 1 or pictures.shape[1:-2] != self.picture_shape[:-2]:
            raise ValueError(
                f"this teacher encodes pictures [R, {', '.join(map(str, self.picture_shape[:-2]))}, height, width] "
                f"in [0, 1], got {list(pictures.shape)}"
            )
        posterior = self._model.encode((2 * self._resized(pictures) - 1).to(self._dtype)).latent_dist
        dtype = torch.promote_types(pictures.dtype, torch.float32)
        raw: Tensor = posterior.mean.to(dtype)
        if noise is not None:
            if noise.shape != raw.shape:
                raise ValueError(f"the posterior's noise must have shape {list(raw.shape)}, got {list(noise.shape)}")
            raw = raw + posterior.std.to(dtype) * noise.to(dtype)
        return (raw - self._mean.to(dtype)) * self._scale.to(dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], float32 `[N, *picture_shape]`, without gradients: to look at.

        Args:
            latents: `[N, *latent_shape]`; other heights and widths are decoded too.
        """
        raw = latents.to(torch.float32) / self._scale + self._mean
        pictures: Tensor = self._model.decode(raw.to(self._dtype)).sample
        return (pictures.to(torch.float32) / 2 + 0.5).clamp(0, 1)

    def _resized(self, pictures: Tensor) -> Tensor:
        size = self.picture_shape[-2:]
        if pictures.shape[-2:] == size:
            return pictures
        # interpolate knows pictures only: frames join the batch.
        frames = pictures.movedim(1, -3)
        small = functional.interpolate(frames.flatten(0, -4), size=size, mode="bilinear", antialias=True)
        return small.reshape(*frames.shape[:-2], *size).movedim(-3, 1)


def load_vae(folder: PipelineFolder, known: str, options: Options) -> Any:
    """The pipeline's autoencoder."""
    return folder.model("vae", (known,), options.vae_dtype, options.device)


def spatial_factor(vae: Any) -> int:
    """Pixels for one latent, along a side."""
    if "scale_factor_spatial" in vae.config:
        return int(vae.config["scale_factor_spatial"])
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def _units(config: Any) -> tuple[Tensor, Tensor]:
    """mean and scale of `z = scale (raw - mean)`, one number or one for each channel."""
    scale = torch.tensor(float(config.get("scaling_factor", 1.0)))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return torch.tensor(float(config.get("shift_factor") or 0.0)), scale
    return torch.tensor(mean, dtype=torch.float32), scale / torch.tensor(std, dtype=torch.float32)
