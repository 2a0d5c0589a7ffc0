"""Stage 2: the text encoder and the UNet, trained together from scratch on latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from carv.extras import require
from carv.rng import Stream
from carv.training.autoencoder import LATENT_CHANNELS
from carv.training.config import Sizes
from carv.training.data import Pictures, draw_captions
from carv.training.tokenizer import LENGTH

STEPS = 1000


def build_scheduler() -> Any:
    """A `DDIMScheduler` with Stable Diffusion's schedule, for a network that predicts v."""
    return require("diffusers", "diffusers").DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # sampling starts at the last timestep, where training ended
    )


def text_config(tokenizer: Any, sizes: Sizes, width: int) -> dict[str, Any]:
    """The settings of a small CLIP text encoder for this tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_text_encoder(tokenizer: Any, sizes: Sizes) -> Any:
    """A `CLIPTextModel` with random weights."""
    transformers = require("transformers", "diffusers")
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config(tokenizer, sizes, sizes.text_width)))


def build_unet(sizes: Sizes) -> Any:
    """A `UNet2DConditionModel` with random weights.

    The highest resolution does not attend to the text: attention there doubles the cost of a step, and what a
    prompt decides (colour, shape, view) is decided lower down.
    """
    lower = len(sizes.denoiser) - 1
    return require("diffusers", "diffusers").UNet2DConditionModel(
        sample_size=sizes.latent,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * lower),
        up_block_types=(*("CrossAttnUpBlock2D",) * lower, "UpBlock2D"),
        block_out_channels=sizes.denoiser,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,  # which diffusers takes as the number of heads
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """The two networks as one, so that one optimiser and one checkpoint hold both.

    Args:
        unet: from `build_unet`.
        text_encoder: from `build_text_encoder`.
    """

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        # torch's fused attention has a slow backward pass on CPUs: a quarter of the whole step. Which kind of
        # attention computes is not saved with the weights.
        unet.set_attn_processor(require("diffusers.models.attention_processor", "diffusers").AttnProcessor())

    def forward(
        self, noisy: Float[Tensor, "B 4 s s"], t: Int[Tensor, "B"], ids: Int[Tensor, "B length"]
    ) -> Float[Tensor, "B 4 s s"]:
        """The predicted v."""
        states = self.text_encoder(ids).last_hidden_state
        predicted: Tensor = self.unet(noisy, t, encoder_hidden_states=states).sample
        return predicted


def stratified_timesteps(count: int, rng: Stream) -> Int[Tensor, "count"]:
    """One timestep in each of `count` equal strata of 0..999, in random order; each is uniform by itself."""
    generator = rng.child("timestep").generator()
    uniform = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    return (STEPS * uniform / count).long().clamp(max=STEPS - 1)


def noised(
    z: Float[Tensor, "B 4 s s"], alpha_squared: Float[Tensor, "B"], rng: Stream
) -> tuple[Float[Tensor, "B 4 s s"], Float[Tensor, "B 4 s s"]]:
    """z_t = alpha z + sigma eps and v = alpha eps - sigma z, with eps from the stream and sigma^2 = 1 - alpha^2."""
    noise = torch.randn(z.shape, generator=rng.generator())
    alpha_squared = alpha_squared[:, None, None, None]
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    return alpha * z + sigma * noise, alpha * noise - sigma * z


@dataclass(frozen=True)
class DenoiserLoss:
    """|v' - v|^2, a mean over entries, with v = alpha eps - sigma z and z_t = alpha z + sigma eps.

    v (Salimans and Ho 2022) and not eps: its error is an error of z where noise prevails and one of eps where
    the picture does, so that colour and layout, decided at high noise, are learned as fast as detail. In terms
    of the error of z its weight is 1 + SNR(t).

    Attributes:
        model: the networks.
        latents: [M, 4, s, s] of all pictures, of unit scale.
        pictures: to draw from.
        ids: tokens of `all_captions`.
        alphas_cumprod: [1000] alpha^2 of the scheduler.
        batch: latents in a step.
        drop: share of empty captions.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    model: Denoiser
    latents: Float[Tensor, "M 4 s s"]
    pictures: Pictures
    ids: Int[Tensor, "C length"]
    alphas_cumprod: Float[Tensor, "1000"]
    batch: int
    drop: float
    rng: Stream
    device: torch.device
    bf16: bool

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        which = self.pictures.batch(step, self.batch, self.rng)
        ids = self.ids[draw_captions(self.pictures.world, which, self.drop, rng)]
        t = stratified_timesteps(self.batch, rng)
        noisy, v = noised(self.latents[which], self.alphas_cumprod[t], rng.child("noise"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.model(noisy.to(self.device), t.to(self.device), ids.to(self.device))
        return functional.mse_loss(predicted.float(), v.to(self.device))
