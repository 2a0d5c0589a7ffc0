"""What the finished pipeline can do: measured on the saved folder, as its users load it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from carv.clip import Value as Value  # the card names it here
from carv.clip import average, clip_score, r_precision, share, similarities
from carv.extras import require, without_progress_bars
from carv.rng import Stream
from carv.training.autoencoder import psnr
from carv.training.data import HELD_OUT, caption_number, held_out
from carv.world.cameras import VIEW_WORDS
from carv.world.captions import Prompt
from carv.world.dataset import WorldDataset
from carv.world.shapes import COLOURS, SHAPES

_AT_ONCE = 64


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        steps: of DDIM.
        guidance_scale: s of e_u + s (e_c - e_u).
        rng: sample i starts from the noise at its child i.
    """

    steps: int
    guidance_scale: float
    rng: Stream


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """The saved pipeline in float32, without its progress bar."""
    with without_progress_bars():
        pipeline = require("diffusers", "diffusers").StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float32)


def sample(pipeline: Any, prompts: list[str], how: Sampling) -> Float[Tensor, "M 3 S S"]:
    """One picture in [-1, 1] for each prompt, on the CPU."""
    shape = (pipeline.unet.config.in_channels, *(pipeline.unet.config.sample_size,) * 2)
    pictures = []
    for first in range(0, len(prompts), _AT_ONCE):
        chunk = prompts[first : first + _AT_ONCE]
        noise = [torch.randn(shape, generator=how.rng.child(first + i).generator()) for i in range(len(chunk))]
        drawn = pipeline(
            prompt=chunk,
            latents=torch.stack(noise).to(pipeline.device),
            num_inference_steps=how.steps,
            guidance_scale=how.guidance_scale,
            output_type="pt",
        ).images
        pictures.append(2 * drawn.float().cpu() - 1)
    return torch.cat(pictures)


@torch.no_grad()
def reconstruction_quality(vae: Any, unseen: WorldDataset) -> dict[str, Value]:
    """PSNR in dB of decoded means for pictures from unseen cameras, of trained and of held-out objects."""
    images, device = unseen.images_float(), vae.device
    chunks = torch.split(images, _AT_ONCE)
    decoded = [vae.decode(vae.encode(chunk.to(device)).latent_dist.mean).sample.cpu() for chunk in chunks]
    values, out = psnr(torch.cat(decoded).clamp(-1, 1), images), held_out(unseen)
    objects = unseen.shape * len(COLOURS) + unseen.colour
    return {name: average(values[which], objects[which]) for name, which in (("trained", ~out), ("held_out", out))}


@dataclass(frozen=True)
class Judge:
    """The small CLIP and the captions that it chooses among.

    Attributes:
        model: the `CLIPModel`.
        ids: tokens of `all_captions`.
    """

    model: Any
    ids: Int[Tensor, "C length"]

    def objects(self, images: Float[Tensor, "M 3 S S"], cells: Int[Tensor, "M 3"]) -> dict[str, Value]:
        """R-precision among the 128 captions of colour and shape, and the CLIP score.

        Args:
            images: in [-1, 1], at the model's size: as it was trained on them.
            cells: what each should show: places of its shape, its colour and its view.
        """
        choices = torch.tensor([(s, c, 0) for s in range(len(SHAPES)) for c in range(len(COLOURS))])
        cosine = similarities(self.model, images, self.ids[caption_number(choices[:, 0], choices[:, 1])])
        own = cells[:, 0] * len(COLOURS) + cells[:, 1]
        return {
            "r_precision_of_128": share(r_precision(cosine, own)),
            "clip_score": average(clip_score(cosine.gather(1, own[:, None])[:, 0]), own),
        }

    def views(self, images: Float[Tensor, "M 3 S S"], cells: Int[Tensor, "M 3"]) -> dict[str, Value]:
        """R-precision among the 512 captions with a view word, and among the 4 of the right object."""
        choices = view_cells()
        cosine = similarities(self.model, images, self.ids[caption_number(*choices.T)])
        own = (cells[:, 0] * len(COLOURS) + cells[:, 1]) * len(VIEW_WORDS) + cells[:, 2]
        first = own - cells[:, 2]
        of_object = cosine.gather(1, first[:, None] + torch.arange(len(VIEW_WORDS)))
        return {
            "r_precision_of_512": share(r_precision(cosine, own)),
            "view_of_4": share(r_precision(of_object, cells[:, 2])),
        }


def view_cells() -> Int[Tensor, "512 3"]:
    """Every shape, colour and view, as places."""
    return torch.cartesian_prod(
        torch.arange(len(SHAPES)), torch.arange(len(COLOURS)), torch.arange(len(VIEW_WORDS))
    )  # fmt: skip


def prompts_of(cells: Int[Tensor, "M 3"], with_view: bool) -> list[str]:
    """The prompts for these places of shape, colour and view."""
    shapes, colours = list(SHAPES), list(COLOURS)
    return [str(Prompt(colours[c], shapes[s], VIEW_WORDS[v] if with_view else None)) for s, c, v in cells.tolist()]


def sample_quality(
    pipeline: Any, judge: Judge, unseen: WorldDataset, how: Sampling, each: int
) -> tuple[dict[str, dict[str, Value]], dict[str, Tensor]]:
    """R-precision of samples, of trained and held-out objects and of true renders, and the samples themselves.

    Args:
        pipeline: from `load_pipeline`.
        judge: the small CLIP.
        unseen: true renders from unseen cameras: what the judge makes of them bounds what samples can reach.
        how: samples are drawn.
        each: samples of each prompt without a view word; with one it is one.

    Returns:
        For "trained", "held_out" and "renders" each measure; and "objects" [128, 3, S, S] (the first of each
        prompt) and "views" [512, 3, S, S], in the order of `view_cells`.
    """
    views = view_cells()
    objects = views[:: len(VIEW_WORDS)]
    plain = sample(pipeline, prompts_of(objects, False) * each, _child(how, "objects"))
    viewed = sample(pipeline, prompts_of(views, True), _child(how, "views"))
    quality = {}
    for name, keep_plain, keep_viewed in _splits(objects.repeat(each, 1), views):
        quality[name] = judge.objects(plain[keep_plain], objects.repeat(each, 1)[keep_plain])
        quality[name] |= judge.views(viewed[keep_viewed], views[keep_viewed])
    true_cells = torch.stack([unseen.shape, unseen.colour, unseen.view], dim=1)
    renders = unseen.images_float()
    quality["renders"] = judge.objects(renders, true_cells) | judge.views(renders, true_cells)
    return quality, {"objects": plain[: len(objects)], "views": viewed}


def write_sheets(folder: Path, pictures: dict[str, Tensor]) -> None:
    """objects.png: shapes down, colours across; views.png: shapes down, views across, each shape in a colour of
    its own; held_out.png: `HELD_OUT` down, views across."""
    shapes, colours = list(SHAPES), list(COLOURS)
    views = pictures["views"].reshape(len(SHAPES), len(COLOURS), len(VIEW_WORDS), *pictures["views"].shape[1:])
    held = torch.stack([views[shapes.index(shape), colours.index(colour)] for shape, colour in HELD_OUT])
    write_sheet(
        folder / "objects.png", pictures["objects"].reshape(len(SHAPES), len(COLOURS), *pictures["objects"].shape[1:])
    )
    write_sheet(folder / "views.png", torch.stack([views[i, i % len(COLOURS)] for i in range(len(SHAPES))]))
    write_sheet(folder / "held_out.png", held)


def write_sheet(path: Path, rows: Float[Tensor, "R C 3 S S"]) -> None:
    """A grid of pictures in [-1, 1] as a PNG."""
    high, wide, _, size, _ = rows.shape
    grid = rows.permute(0, 3, 1, 4, 2).reshape(high * size, wide * size, 3)
    image = require("PIL.Image", "diffusers")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()).save(path)


def _child(how: Sampling, name: str) -> Sampling:
    return Sampling(how.steps, how.guidance_scale, how.rng.child(name))


def _splits(
    plain: Int[Tensor, "M 3"], viewed: Int[Tensor, "V 3"]
) -> Iterator[tuple[str, Bool[Tensor, "M"], Bool[Tensor, "V"]]]:
    pairs = {(list(SHAPES).index(shape), list(COLOURS).index(colour)) for shape, colour in HELD_OUT}
    out = [torch.tensor([(s, c) in pairs for s, c, _ in cells.tolist()]) for cells in (plain, viewed)]
    yield "trained", ~out[0], ~out[1]
    yield "held_out", out[0], out[1]
