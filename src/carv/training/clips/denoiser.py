"""Stage 4: Wan's transformer, trained from scratch on latents, with the text encoder as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from carv.extras import require
from carv.rng import Stream
from carv.training.clips.config import ClipsSizes
from carv.training.clips.latents import LatentClips, draw_batch

STEPS, SHIFT = 1000, 2.0
"""Units of the network's time; s of t = s u / (1 + (s - 1) u), the law of t in training and the steps of sampling."""

_EMPTY = 0


def build_scheduler() -> Any:
    """A `FlowMatchEulerDiscreteScheduler` with the shift of the training."""
    return require("diffusers", "diffusers").FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=SHIFT)


def build_transformer(sizes: ClipsSizes) -> Any:
    """A `WanTransformer3DModel` with random weights. One token is one entry of a latent frame: they have 4 x 4."""
    return require("diffusers", "diffusers").WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_width,
        in_channels=sizes.channels,
        out_channels=sizes.channels,
        text_dim=sizes.text_width,
        freq_dim=64,
        ffn_dim=sizes.feed_forward,
        num_layers=sizes.layers,
        rope_max_seq_len=64,
    )


class Denoiser(nn.Module):
    """The transformer under captions given by their numbers; what they mean is fixed.

    Args:
        transformer: a `WanTransformer3DModel`.
        states: of `text.CAPTIONS`, from `text.text_states`.
    """

    states: Tensor

    def __init__(self, transformer: Any, states: Float[Tensor, "C length w"]) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("states", states)

    def forward(
        self, noisy: Float[Tensor, "B C f h w"], t: Float[Tensor, "B"], caption: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C f h w"]:
        """The predicted v at t in [0, 1] under captions given by their numbers."""
        return velocity(self.transformer, noisy, t, self.states[caption])


def velocity(transformer: Any, noisy: Tensor, t: Tensor, states: Tensor) -> Float[Tensor, "B C f h w"]:
    """One call of the network, with its time in 0..1000."""
    predicted: Tensor = transformer(
        hidden_states=noisy, timestep=STEPS * t, encoder_hidden_states=states, return_dict=False
    )[0]
    return predicted


def stratified_times(count: int, rng: Stream, shift: float = SHIFT) -> Float[Tensor, "count"]:
    """One t in each of `count` strata of equal probability, in random order; each follows the shifted uniform law."""
    generator = rng.child("timestep").generator()
    u = (
        torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    ) / count
    return (shift * u / (1 + (shift - 1) * u)).float()


@dataclass(frozen=True)
class DenoiserLoss:
    """|v' - v|^2, a mean over entries, with v = eps - z and z_t = (1 - t) z + t eps: flow matching.

    Attributes:
        model: to train.
        data: the clips to draw from.
        batch: latents in a step.
        drop: share of empty captions.
        rng: the stage's stream.
        device: where the network is.
    """

    model: Denoiser
    data: LatentClips
    batch: int
    drop: float
    rng: Stream
    device: torch.device

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        places = draw_batch(self.data.lengths, self.batch, rng)
        z = torch.stack([self.data.latents[i] for i in places])
        empty = torch.rand(len(places), generator=rng.child("caption").generator()) < self.drop
        caption = torch.where(empty, _EMPTY, self.data.caption[places])
        t = stratified_times(len(places), rng)
        noise = torch.randn(z.shape, generator=rng.child("noise").generator())
        share = t.view(-1, 1, 1, 1, 1)
        noisy = (1 - share) * z + share * noise
        predicted = self.model(noisy.to(self.device), t.to(self.device), caption.to(self.device))
        return functional.mse_loss(predicted, (noise - z).to(self.device))
