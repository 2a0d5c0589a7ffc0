"""Stage 1: the variational autoencoder, from pictures to latents of unit scale and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from carv.extras import require
from carv.rng import Stream

LATENT_CHANNELS = 4
_SQUARES, _CHROMA_SQUARES, _EDGES, _KL = 2.0, 6.0, 0.5, 1e-4
_NARROW = -5.0  # of the posterior's log variance at the start
_ENCODED_AT_ONCE = 64


class Sizes(Protocol):
    """What decides the shape of an autoencoder.

    Attributes:
        image: pixels along each side.
        autoencoder: channels at each resolution, halved once between neighbours.
    """

    @property
    def image(self) -> int: ...

    @property
    def autoencoder(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """Where batches of pictures come from; see `carv.training.data.Pictures`."""

    def batch(self, step: int, count: int, rng: Stream) -> Int[Tensor, "count"]:
        """Places of the pictures of a step."""
        ...

    def floats(self, which: Int[Tensor, "B"]) -> Float[Tensor, "B 3 S S"]:
        """The pictures at these places in [-1, 1]."""
        ...


class Stored(Protocol):
    """Pictures in memory."""

    @property
    def images(self) -> UInt8[Tensor, "M 3 S S"]: ...


def build_autoencoder(sizes: Sizes) -> Any:
    """An `AutoencoderKL` with random weights, and a posterior that is narrow from the start.

    A fresh posterior has the width of a unit Gaussian, which hides the latents from the decoder for hundreds of
    steps. There is no attention: at this size it costs more than it brings.
    """
    levels = len(sizes.autoencoder)
    vae = require("diffusers", "diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.autoencoder,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=sizes.image,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # `standardise` builds the scale into the weights
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] += _NARROW
    return vae


@dataclass(frozen=True)
class AutoencoderLoss:
    """|e| + 2 e^2 + |c| + 6 c^2 + |de|/2 + 1e-4 KL, each a mean over entries, with the error e = x' - x.

    x' is decoded from a sample of the posterior, KL is the divergence of the posterior from N(0, 1). c is e less
    its mean over red, green and blue, d is across neighbouring pixels. Brightness makes up most of e: without the
    terms in c, hues come hundreds of steps after shapes. |de| keeps edges sharp.

    Attributes:
        vae: from `build_autoencoder`.
        pictures: to draw from.
        batch: pictures in a step.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    vae: Any
    pictures: Source
    batch: int
    rng: Stream
    device: torch.device
    bf16: bool

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        images = self.pictures.floats(self.pictures.batch(step, self.batch, self.rng))
        images = images.to(self.device, memory_format=torch.channels_last)
        decoded, divergence = decoded_sample(self.vae, images, self.rng.child("step", step), self.bf16)
        error = decoded - images
        edges: Tensor = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        chroma = error - error.mean(dim=1, keepdim=True)
        pixels: Tensor = error.abs().mean() + _SQUARES * error.square().mean()
        hues: Tensor = chroma.abs().mean() + _CHROMA_SQUARES * chroma.square().mean()
        return pixels + hues + _EDGES * edges + _KL * divergence


def decoded_sample(vae: Any, x: Float[Tensor, "B ..."], rng: Stream, bf16: bool) -> tuple[Tensor, Tensor]:
    """x', decoded from a sample m + s eps of x's posterior N(m, s^2), and KL = (m^2 + s^2 - 1 - log s^2)/2.

    x, in [-1, 1], lies where the networks are; KL, from N(0, 1), is a mean over entries. eps is the stream's.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(x).latent_dist
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=rng.generator()).to(x.device)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
    divergence: Tensor = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return decoded.float(), divergence


@torch.no_grad()
def encode(vae: Any, world: Stored, device: torch.device) -> Float[Tensor, "M 4 s s"]:
    """The posterior's mean for each picture, on the CPU; in chunks, the pictures as floats would be large."""
    chunks = torch.split(world.images, _ENCODED_AT_ONCE)
    latents = torch.cat([vae.encode(chunk.to(device) / 127.5 - 1).latent_dist.mean.cpu() for chunk in chunks])
    return latents.contiguous()  # as a checkpoint gives them: other strides would round the next stage differently


@torch.no_grad()
def standardise(vae: Any, latents: Float[Tensor, "M 4 s s"], pool: Int[Tensor, "N"]) -> Float[Tensor, "M 4 s s"]:
    """The latents with mean 0 and variance 1 in each channel; the autoencoder is changed to give and take these.

    z' = (z - m)/s for each channel. Its 1x1 convolutions absorb this exactly: the last one of the encoder gives
    (mean - m)/s and log variance - 2 log s, the first one of the decoder takes s z' + m. So at the last
    timestep nothing of m is left, and the scaling factor is 1.

    Args:
        vae: the trained `AutoencoderKL`, changed in place.
        latents: its latents of all pictures.
        pool: the places of those that m and s are taken from.
    """
    mean, scale = latents[pool].mean(dim=(0, 2, 3)), latents[pool].std(dim=(0, 2, 3))
    out, into = vae.quant_conv, vae.post_quant_conv
    m, s = mean.to(out.weight.device), scale.to(out.weight.device)
    out.bias[:LATENT_CHANNELS] = (out.bias[:LATENT_CHANNELS] - m) / s
    out.weight[:LATENT_CHANNELS] /= s[:, None, None, None]
    out.bias[LATENT_CHANNELS:] -= 2 * s.log()
    into.bias += into.weight[:, :, 0, 0] @ m
    into.weight *= s[None, :, None, None]
    return (latents - mean[:, None, None]) / scale[:, None, None]


def psnr(decoded: Float[Tensor, "M 3 S S"], images: Float[Tensor, "M 3 S S"], peak: float = 2.0) -> Float[Tensor, "M"]:
    """Peak signal-to-noise ratio of each picture in dB: 10 log10(peak^2 / mean squared error).

    Args:
        decoded: the reconstructions.
        images: the pictures.
        peak: the range of the values; 2 for [-1, 1].
    """
    error = functional.mse_loss(decoded, images, reduction="none").mean(dim=(1, 2, 3))
    return 10 * torch.log10(peak**2 / error.clamp(min=1e-12))
