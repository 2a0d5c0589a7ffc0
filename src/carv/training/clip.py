"""Stage 3: a small CLIP on the same captions, the judge of CLIP score and R-precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from carv.extras import require
from carv.rng import Stream
from carv.training.config import Sizes
from carv.training.data import Pictures, caption_number
from carv.training.denoiser import text_config

_SHIFT = 2  # pixels
_NOISE = 0.1  # the largest standard deviation; pictures are in [-1, 1]


def build_clip(tokenizer: Any, sizes: Sizes) -> Any:
    """A `CLIPModel` with random weights."""
    transformers = require("transformers", "diffusers")
    vision = {
        "hidden_size": sizes.clip_width,
        "intermediate_size": 4 * sizes.clip_width,
        "projection_dim": sizes.clip_width,
        "num_hidden_layers": sizes.clip_layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image,
        "patch_size": sizes.patch,
    }
    config = transformers.CLIPConfig(
        text_config=text_config(tokenizer, sizes, sizes.clip_width),
        vision_config=vision,
        projection_dim=sizes.clip_width,
    )
    model = transformers.CLIPModel(config)
    model.set_attn_implementation("eager")  # the fused one's backward pass nearly doubles a step on a CPU
    return model


def build_image_processor(sizes: Sizes) -> Any:
    """Pictures of any size to [-1, 1] at the model's size."""
    return require("transformers.models.clip.image_processing_pil_clip", "diffusers").CLIPImageProcessorPil(
        size={"shortest_edge": sizes.image},
        crop_size={"height": sizes.image, "width": sizes.image},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


@dataclass(frozen=True)
class ClipLoss:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021) over batches of distinct captions.

    Even steps compare colours and shapes, odd steps views too. No two captions of a batch are equal, since
    equal ones would be pushed apart. Pictures are shifted, blurred and made noisy, so that the judge does not
    lean on what only perfect renders have.

    Attributes:
        model: from `build_clip`.
        pictures: to draw from.
        ids: tokens of `all_captions`.
        batch: pictures in a step, if there are as many captions.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    model: Any
    pictures: Pictures
    ids: Int[Tensor, "C length"]
    batch: int
    rng: Stream
    device: torch.device
    bf16: bool

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        world = self.pictures.world
        captions = caption_number(world.shape, world.colour, world.view if step % 2 else None)
        which = self.pictures.distinct_batch(captions, self.batch, rng.child("pictures"))
        images = augment(self.pictures.floats(which), rng.child("augment")).to(self.device)
        ids = self.ids[captions[which]].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=ids, pixel_values=images).logits_per_image.float()
        diagonal = torch.arange(len(which), device=self.device)
        return (functional.cross_entropy(logits, diagonal) + functional.cross_entropy(logits.T, diagonal)) / 2


def augment(images: Float[Tensor, "B 3 S S"], rng: Stream) -> Float[Tensor, "B 3 S S"]:
    """The pictures shifted by up to two pixels together, a random half of them blurred, all with a little noise."""
    generator = rng.generator()
    padded = functional.pad(images, (_SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=generator).tolist()
    size = images.shape[-1]
    shifted = padded[..., down : down + size, right : right + size]
    blurred = functional.avg_pool2d(functional.pad(shifted, (1,) * 4, mode="replicate"), 3, stride=1)
    half = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    strength = _NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.where(half, blurred, shifted) + strength * torch.randn(images.shape, generator=generator)


def save_clip(model: Any, tokenizer: Any, sizes: Sizes, folder: Path) -> None:
    """Write a folder that `CLIPModel` and `CLIPProcessor` load; weights in float16."""
    processor = require("transformers", "diffusers").CLIPProcessor(build_image_processor(sizes), tokenizer)
    model.half().save_pretrained(folder)
    model.float()
    processor.save_pretrained(folder)
