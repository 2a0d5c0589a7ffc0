"""Stage 1: Wan's causal video autoencoder, from clips to latents and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from carv.extras import require
from carv.rng import Stream
from carv.training.autoencoder import decoded_sample
from carv.training.clips.config import ClipsSizes
from carv.world.clips import Clips

PATCH, SPATIAL, TEMPORAL = 2, 8, 4
"""Pixels that are folded into channels along a side; pixels and frames for one latent."""

FRAMES = 9
"""Of the pieces that the autoencoder is trained on: its first, its second and a later chunk."""

SQUARES, EDGES, KL = 2.0, 0.5, 1e-4
"""Weights of e^2, of |de| and of the divergence, in both stages of the autoencoder."""
_NARROW = -5.0  # of the posterior's log variance at the start
_AT_ONCE = 32


def build_autoencoder(sizes: ClipsSizes) -> Any:
    """An `AutoencoderKLWan` with random weights, a narrow posterior, and residual branches that start at zero.

    It folds 2 x 2 pixels into channels first and has shortcuts across its resolutions, as Wan 2.2's. With the
    branches at zero it starts as a nearly linear map, which reaches in tens of steps what takes hundreds otherwise.
    """
    folded = 3 * PATCH**2
    vae = require("diffusers", "diffusers").AutoencoderKLWan(
        base_dim=sizes.base,
        decoder_base_dim=sizes.base,
        z_dim=sizes.channels,
        dim_mult=list(sizes.multiples),
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=folded,
        out_channels=folded,
        patch_size=PATCH,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
        latents_mean=[0.0] * sizes.channels,
        latents_std=[1.0] * sizes.channels,
    )
    with torch.no_grad():
        vae.quant_conv.bias[sizes.channels :] += _NARROW
        for module in vae.modules():
            last = {"WanResidualBlock": "conv2", "WanAttentionBlock": "proj"}.get(type(module).__name__)
            if last:
                getattr(module, last).weight.zero_()
                getattr(module, last).bias.zero_()
    return vae


@dataclass(frozen=True)
class AutoencoderLoss:
    """|e| + 2 e^2 + |de|/2 + 1e-4 KL, each a mean over entries, with the error e = x' - x.

    x' is decoded from a sample of the posterior, KL is the divergence of the posterior from N(0, 1), d is across
    neighbouring pixels. Each clip gives a piece of 9 frames.

    Attributes:
        vae: from `build_autoencoder`.
        clips: to draw from.
        batch: pieces in a step.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    vae: Any
    clips: Clips
    batch: int
    rng: Stream
    device: torch.device
    bf16: bool

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        videos = self._pieces(rng).to(self.device)
        decoded, divergence = decoded_sample(self.vae, videos, rng.child("noise"), self.bf16)
        error = decoded - videos
        edges: Tensor = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        pixels: Tensor = error.abs().mean() + SQUARES * error.square().mean()
        return pixels + EDGES * edges + KL * divergence

    def _pieces(self, rng: Stream) -> Float[Tensor, "B 3 9 32 32"]:
        places = torch.randint(len(self.clips), (self.batch,), generator=rng.child("clips").generator()).tolist()
        starts = torch.rand(self.batch, generator=rng.child("starts").generator()).tolist()
        pieces = []
        for i, start in zip(places, starts, strict=True):
            first = int(start * (len(self.clips.pictures[i]) - FRAMES + 1))
            pieces.append(self.clips.video(i)[:, first : first + FRAMES])
        return 2 * torch.stack(pieces) - 1


@torch.no_grad()
def encode(vae: Any, clips: Clips) -> list[Float[Tensor, "C f h w"]]:
    """The posterior's mean of each clip, standardised by the autoencoder's latents_mean and latents_std, on the CPU."""
    mean, std = units(vae)
    latents: dict[int, Tensor] = {}
    for places in _by_length(clips):
        videos = 2 * torch.stack([clips.video(i) for i in places]) - 1
        raw = vae.encode(videos.to(vae.device)).latent_dist.mean.cpu()
        latents |= dict(zip(places, (raw - mean) / std, strict=True))
    return [latents[i].clone() for i in range(len(clips))]


def standardise(vae: Any, raw: list[Float[Tensor, "C f h w"]]) -> list[Float[Tensor, "C f h w"]]:
    """The latents with mean 0 and variance 1 in each channel; latents_mean and latents_std of the config say how.

    Args:
        vae: the trained `AutoencoderKLWan`, whose config is changed in place.
        raw: the posterior's means of the training clips, not standardised.
    """
    entries = torch.cat([latent.flatten(1) for latent in raw], dim=1)
    mean, std = entries.mean(dim=1), entries.std(dim=1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    shape = (-1, 1, 1, 1)
    return [(latent - mean.view(shape)) / std.view(shape) for latent in raw]


def units(vae: Any) -> tuple[Float[Tensor, "C 1 1 1"], Float[Tensor, "C 1 1 1"]]:
    """latents_mean and latents_std of the autoencoder's config: z = (raw - mean) / std."""
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


@torch.no_grad()
def decode_encoded(vae: Any, clips: Clips) -> list[Float[Tensor, "3 F 32 32"]]:
    """Each clip through the autoencoder, by the posterior's mean, in [0, 1]."""
    decoded: dict[int, Tensor] = {}
    for places in _by_length(clips):
        videos = 2 * torch.stack([clips.video(i) for i in places]) - 1
        videos = vae.decode(vae.encode(videos.to(vae.device)).latent_dist.mean).sample.float().cpu()
        decoded |= dict(zip(places, (videos / 2 + 0.5).clamp(0, 1), strict=True))
    return [decoded[i] for i in range(len(clips))]


def _by_length(clips: Clips) -> list[list[int]]:
    """Places of clips of one length, at most 32 together."""
    chunks = []
    for places in clips.lengths.values():
        chunks += [places[first : first + _AT_ONCE] for first in range(0, len(places), _AT_ONCE)]
    return chunks
