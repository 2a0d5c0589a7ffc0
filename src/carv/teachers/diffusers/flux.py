"""Flux: a flow transformer on patches of latents, conditioned on T5's tokens and CLIP's pooled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder, load_vae, spatial_factor
from carv.teachers.diffusers.family import check_channels, load_network
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options, check_width
from carv.teachers.diffusers.text import TextEncoder

_TOKENS = 512
_PIXELS = 1024  # the pipeline's default; the folder does not say
_DISTILLED_GUIDANCE = 3.5  # the pipeline's default
_TIME = 1000  # the network takes its time in [0, 1] and multiplies it by this itself


class Flux:
    """Latents go in and out as patches of 2 x 2, with their positions.

    FLUX.1-dev is distilled from guided outputs: its network takes a guidance scale as an input
    (`distilled_guidance`), which has nothing to do with `Guided`'s. Schnell has none.
    """

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, "frames")
        self.network = load_network(folder, "transformer", ("FluxTransformer2DModel",), options)
        config = self.network.config
        if not config.guidance_embeds:
            options.refuse(folder.pipeline, "distilled_guidance")
        guidance = _DISTILLED_GUIDANCE if options.distilled_guidance is None else options.distilled_guidance
        self._guidance = torch.tensor([guidance], device=options.device) if config.guidance_embeds else None
        vae = load_vae(folder, "AutoencoderKL", options)
        check_channels(folder, config.in_channels, 4 * int(vae.config["latent_channels"]))
        step = 2 * spatial_factor(vae)
        self.autoencoder = Autoencoder.image(vae, options, options.picture_size((_PIXELS, _PIXELS), (step, step)))
        self.text = [
            TextEncoder.clip(folder, "", options),
            TextEncoder.t5(folder, "_2", options, _TOKENS),
        ]
        check_width(self.text[0].width, config.pooled_projection_dim, "text_encoder")
        check_width(self.text[1].width, config.joint_attention_dim, "text_encoder_2")
        height, width = self.autoencoder.latent_shape[-2:]
        self._positions = _positions(height // 2, width // 2, options.device)
        self._text_positions = torch.zeros(self.text[1].length, 3, device=options.device)

    def condition(self, prompt: str) -> Condition:
        clip, t5 = self.text
        return Condition({"embeddings": t5.states(prompt), "pooled": clip.read(prompt).pooler_output})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        patches = self.network(
            hidden_states=pack(z_t),
            timestep=time / _TIME,
            guidance=None if self._guidance is None else self._guidance.expand(len(z_t)),
            pooled_projections=condition.tensors["pooled"],
            encoder_hidden_states=condition.tensors["embeddings"],
            txt_ids=self._text_positions,
            img_ids=self._positions,
            return_dict=False,
        )[0]
        return unpack(patches, z_t.shape[-2], z_t.shape[-1])


def pack(z: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N, H W / 4, 4 C]`: patches of 2 x 2, row by row."""
    n, channels, height, width = z.shape
    patches = z.reshape(n, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    n, channels = len(patches), patches.shape[-1] // 4
    grid = patches.reshape(n, height // 2, width // 2, channels, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, height, width)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """`[height width, 3]`: 0, row and column of each patch."""
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1)
