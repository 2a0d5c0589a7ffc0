"""What one family of pipelines implements: its condition for a prompt, and one call of its network."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options
from carv.teachers.diffusers.text import TextEncoder


class Family(Protocol):
    """A kind of pipeline, loaded.

    Attributes:
        autoencoder: pictures to latents; its `latent_shape` is the teacher's.
        network: the denoising network, frozen.
        text: the text encoders, or none. The list is emptied when their memory is wanted back.
    """

    autoencoder: Autoencoder
    network: Any
    text: list[TextEncoder]

    def condition(self, prompt: str) -> Condition:
        """The condition of one prompt, one row."""
        ...

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """What the network outputs, before any conversion.

        Args:
            z_t: `[N, *latent_shape]` in the network's type.
            time: `[N]`, in the units of diffusers' schedulers: 0..T-1, or T t of a flow.
            condition: N rows.
        """
        ...


def load_network(folder: PipelineFolder, component: str, known: tuple[str, ...], options: Options) -> Any:
    """The denoising network; compiled if asked for."""
    network = folder.model(component, known, options.dtype, options.device)
    return torch.compile(network) if options.compile else network


def check_channels(folder: PipelineFolder, got: int, latent: int) -> None:
    """Raise for networks that are shown more than z_t: inpainting, editing, image-to-video.

    Raises:
        ValueError: naming both numbers.
    """
    if got != latent:
        raise ValueError(
            f"the network in {folder.path} takes {got} channels and its latents have {latent}: it is shown more than "
            "z_t (inpainting, editing, image-to-video), which carv does not read"
        )
