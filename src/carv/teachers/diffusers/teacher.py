"""The teacher of a diffusers pipeline folder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.teachers.base import Condition
from carv.teachers.diffusers.dit import DiT
from carv.teachers.diffusers.family import Family
from carv.teachers.diffusers.flux import Flux
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options
from carv.teachers.diffusers.sd3 import StableDiffusion3
from carv.teachers.diffusers.unet import StableDiffusion, StableDiffusionXL
from carv.teachers.diffusers.wan import Wan
from carv.teachers.prediction import to_epsilon

_FAMILIES: dict[str, Callable[[PipelineFolder, Options], Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "DiTPipeline": DiT,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
}

# A prompt's condition is 0.1 MB (Stable Diffusion) to 4 MB (Flux): at most a gigabyte is kept.
_REMEMBERED = 256


class DiffusersTeacher:
    """A frozen teacher with the networks, the schedule and the scaling of a diffusers pipeline.

    Its latents z are what the network was trained on: `encode` and `decode` apply the VAE's scaling and shift.
    Whatever the network predicts (epsilon, x0, v, a flow; with or without a learned variance) is converted to
    epsilon in float32. Networks are in evaluation mode, without gradients of their own.

    Attributes:
        schedule: from the folder's scheduler; also what the network predicts.
        latent_shape: `(C, h, w)`, or `(C, f, h, w)` of a video.
        picture_shape: `(3, H, W)` in pixels, or `(3, F, H, W)`.
        device, dtype: where the network is, and the type of its weights.

    Example:
        >>> teacher = DiffusersTeacher.from_pretrained("sd21-folder", dtype=torch.float16)      # doctest: +SKIP
        >>> guided = Guided.from_prompts(teacher, ["a red chair"], scale=100)                   # doctest: +SKIP
    """

    def __init__(self, family: Family, schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> None:
        self._family, self.device, self.dtype = family, device, dtype
        self.schedule = schedule.to(device)
        self.latent_shape = family.autoencoder.latent_shape
        self.picture_shape = family.autoencoder.picture_shape
        self._conditions: OrderedDict[str, Condition] = OrderedDict()
        self._released = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        size: int | tuple[int, int] | None = None,
        frames: int | None = None,
        max_tokens: int | None = None,
        distilled_guidance: float | None = None,
        variant: str | None = None,
        revision: str | None = None,
        download: bool = False,
        compile: bool = False,
    ) -> DiffusersTeacher:
        """The teacher in a folder, or of a hub id that is in the local cache.

        Only JSON and safetensors are read, and only classes that carv knows are made: a folder's own code, its
        pickles and its safety checker are left alone.

        Args:
            path_or_id: a folder with a `model_index.json`, or "owner/name" on the hub.
            device: of all networks.
            dtype: of the network and the text encoders. On an accelerator float16 suits the UNets, bfloat16
                the transformers. Guidance multiplies their rounding error by its scale.
            vae_dtype: of the VAE. Many of them overflow in float16.
            size: height and width in pixels, or one number for both; otherwise the folder's, or (Flux, Wan) the
                pipeline's default.
            frames: of a video, 1 + 4 n; otherwise the pipeline's default, 81.
            max_tokens: how many tokens T5 reads of a prompt; otherwise the pipeline's default.
            distilled_guidance: the scale that a guidance-distilled network (FLUX.1-dev) is told; 3.5 otherwise.
            variant: which weights, e.g. "fp16", where there are several. Components without it use the others.
            revision: of the hub id.
            download: fetch from the hub what the cache lacks. Otherwise nothing goes over the network.
            compile: `torch.compile` the network: slower to start, faster afterwards.

        Raises:
            ValueError: not a pipeline or not one that carv reads, a missing or damaged component, pickles only;
                one sentence each.
            ImportError: diffusers or transformers is not installed.
        """
        where = torch.device(device)
        options = Options(where, dtype, vae_dtype, size, frames, max_tokens, distilled_guidance, compile)
        folder = PipelineFolder.open(path_or_id, download, revision, variant)
        family = _FAMILIES.get(folder.pipeline)
        if family is None:
            raise ValueError(f"{folder.path} is a {folder.pipeline}; carv reads {', '.join(_FAMILIES)}")
        schedule = NoiseSchedule.from_diffusers(folder.config("scheduler", "scheduler_config.json"))
        return cls(family(folder, options), schedule, where, dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """One row of condition for each prompt; each prompt is encoded once and then remembered.

        Args:
            prompts: texts, or classes for DiT (numbers, or names that the folder has). "" is the
                unconditional row: the empty text, SDXL's zeros, DiT's null class.

        Raises:
            ValueError: no prompts; a class that DiT does not have; a new prompt after `release_text_encoders`.
        """
        if not prompts:
            raise ValueError("encode_prompts needs at least one prompt")
        return Condition.concatenate([self._condition(prompt) for prompt in prompts])

    def predict_noise(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """eps_hat(z_t, t, c) for each condition c, in one call of the network and without gradients.

        Args:
            z_t: `[N, *latent_shape]`.
            t: `[N]`, in the units of `schedule`.
            conditions: each with N rows, from `encode_prompts`.

        Returns:
            One `[N, *latent_shape]` tensor for each condition, in float32, or in float64 where z_t is.

        Raises:
            ValueError: shapes that do not fit.
        """
        with torch.no_grad():
            return self.predict_noise_with_graph(z_t, t, conditions)

    def predict_noise_with_graph(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """The same, differentiable in z_t and in whatever of `network` requires gradients: for adapters."""
        self._check(z_t, t, conditions)
        copies = len(conditions)
        output = self.network_output(
            z_t.repeat(copies, *[1] * (z_t.ndim - 1)), t.repeat(copies), Condition.concatenate(conditions)
        )
        return [
            to_epsilon(part, z_t.to(self.device), t.to(self.device), self.schedule) for part in output.chunk(copies)
        ]

    def network_output(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What `network` outputs, before any conversion: what its training loss compares; differentiable.

        Args:
            z_t: `[N, *latent]`, of any size that the network takes.
            t: `[N]`, in the units of `schedule`.
            condition: N rows.

        Returns:
            `[N, *latent]`, in the type of the network, without a predicted variance.
        """
        t = t.to(self.device)
        time = self.schedule.teacher_time(t)
        time = time.to(torch.float32) if self.schedule.continuous else time.long()
        output = self._family.output(z_t.to(self.device, self.dtype), time, condition)
        # A network that also predicts a variance does so in the second half of its channels.
        channels = self.latent_shape[0]
        return output[:, :channels] if output.shape[1] == 2 * channels else output

    @property
    def frames_per_latent(self) -> int:
        """How many frames of a video a latent frame stands for, after the first; 1 of a teacher of pictures."""
        return self._family.autoencoder.frames_per_latent

    def with_frames(self, frames: int) -> DiffusersTeacher:
        """The same teacher, weights and remembered prompts shared, for videos of another number of frames.

        Raises:
            ValueError: a teacher of pictures, or a number that the autoencoder does not take.
        """
        other, family = copy.copy(self), copy.copy(self._family)
        family.autoencoder = family.autoencoder.with_frames(frames)
        other._family = family
        other.latent_shape, other.picture_shape = family.autoencoder.latent_shape, family.autoencoder.picture_shape
        return other

    def with_network(self, network: torch.nn.Module) -> DiffusersTeacher:
        """The same teacher around another network of the same kind, such as a trainable copy of its own.

        Args:
            network: what `network` is afterwards; z_t is given to it in the type of its weights.
        """
        other, other._family = copy.copy(self), copy.copy(self._family)
        other._family.network = network
        other.dtype = next(network.parameters()).dtype
        return other

    @property
    def network(self) -> Any:
        """The denoising network, a `torch.nn.Module`."""
        return self._family.network

    @property
    def classes(self) -> tuple[str, ...]:
        """The prompts of a class-conditional teacher's classes; none of any other."""
        found: tuple[str, ...] = getattr(self._family, "classes", ())
        return found

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of pictures in [0, 1], differentiable; see `Autoencoder.encode`.

        Args:
            pictures: `[R, 3, h, w]`, or `[R, 3, F, h, w]`; resized to `picture_shape`.
            noise: `[R, *latent_shape]` for a sample of the VAE's posterior; its mean otherwise.
        """
        return self._family.autoencoder.encode(pictures, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1] of latents, float32 `[N, *picture_shape]`, without gradients."""
        return self._family.autoencoder.decode(latents)

    def release_text_encoders(self) -> None:
        """Let go of the text encoders' memory. The last 256 prompts that were encoded can still be asked for."""
        self._released = self._released or bool(self._family.text)
        self._family.text.clear()

    def _condition(self, prompt: str) -> Condition:
        if prompt not in self._conditions:
            if self._released:
                raise ValueError(f"{prompt!r} is new, and the text encoders were released: encode all prompts before")
            self._conditions[prompt] = self._family.condition(prompt)
            if len(self._conditions) > _REMEMBERED:
                self._conditions.popitem(last=False)
        return self._conditions[prompt]

    def _check(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> None:
        if z_t.shape[1:] != self.latent_shape or t.shape != z_t.shape[:1] or len(t) == 0:
            raise ValueError(
                f"this teacher takes z_t [N, {', '.join(map(str, self.latent_shape))}] and t [N], "
                f"got {list(z_t.shape)} and {list(t.shape)}"
            )
        rows = [len(condition) for condition in conditions]
        if not rows or set(rows) != {len(t)}:
            raise ValueError(f"give conditions of one row a draw, {len(t)} rows each, got {rows}")
