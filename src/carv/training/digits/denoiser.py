"""Stage 2: the DiT, trained from scratch on latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from carv.extras import require
from carv.rng import Stream
from carv.training.autoencoder import LATENT_CHANNELS
from carv.training.denoiser import STEPS, noised, stratified_timesteps
from carv.training.digits.config import DigitsSizes
from carv.training.digits.data import AugmentedDigits
from carv.world.digits import CLASSES

NULL_CLASS = 1000
"""`DiTPipeline` asks for this one, whatever the network's table: so the table has as many rows as ImageNet's."""


def build_scheduler() -> Any:
    """A `DDIMScheduler` for a network that predicts v: Stable Diffusion's schedule up to a beta of 0.02, not 0.012.

    alpha is 0.015 at the last timestep (Stable Diffusion: 0.068), so that what a one-step generator makes of pure
    noise is what the network was trained on, and still far enough from 0 to divide by.
    """
    return require("diffusers", "diffusers").DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # sampling starts at the last timestep, where training ended
    )


def build_dit(sizes: DigitsSizes) -> Any:
    """A `DiTTransformer2DModel` with random weights, whose blocks start as the identity (adaLN-Zero).

    Each block has a table of 1,001 classes of its own. All rows start at 0, and those of no digit stay there.
    """
    network = require("diffusers", "diffusers").DiTTransformer2DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_width,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,  # `DiTPipeline` reads it from the settings
        num_layers=sizes.layers,
        sample_size=sizes.latent,
        patch_size=sizes.patch,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for block in network.transformer_blocks:
        # In training mode each block would drop classes by itself, from torch's global generator.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        torch.nn.init.zeros_(block.norm1.emb.class_embedder.embedding_table.weight)
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (network.proj_out_1, network.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # torch's fused attention has a slow backward pass on CPUs. Which kind computes is not saved with the weights.
    plain = require("diffusers.models.attention_processor", "diffusers").AttnProcessor
    for block in network.transformer_blocks:
        block.attn1.set_processor(plain())
    return network


@torch.no_grad()
def close_table(network: Any) -> None:
    """Give the classes 10 to 999, which are no digits, the null class's row: they mean any digit."""
    for block in network.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[CLASSES:NULL_CLASS] = table[NULL_CLASS]


@dataclass(frozen=True)
class DitLoss:
    """|v' - v|^2, a mean over entries, with v = alpha eps - sigma z and z_t = alpha z + sigma eps.

    As in `carv.training.denoiser.DenoiserLoss`: one timestep in each of as many strata as the batch has latents.

    Attributes:
        network: from `build_dit`.
        latents: [M, 4, s, s] of all pictures, of unit scale.
        pictures: to draw from.
        alphas_cumprod: [1000] alpha^2 of the scheduler.
        batch: latents in a step.
        drop: share of null classes.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    network: Any
    latents: Float[Tensor, "M 4 s s"]
    pictures: AugmentedDigits
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
        label = self.drawn_classes(which, rng)
        t = stratified_timesteps(self.batch, rng)
        noisy, v = noised(self.latents[which], self.alphas_cumprod[t], rng.child("noise"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = self.network(
                noisy.to(self.device), timestep=t.to(self.device), class_labels=label.to(self.device)
            ).sample
        return functional.mse_loss(predicted.float(), v.to(self.device))

    def drawn_classes(self, which: Int[Tensor, "B"], rng: Stream) -> Int[Tensor, "B"]:
        """The class of each picture, or the null class for a share `drop` of them."""
        dropped = torch.rand(len(which), generator=rng.child("class").generator()) < self.drop
        return torch.where(dropped, NULL_CLASS, self.pictures.label[which])
