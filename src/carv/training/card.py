"""The model card: how the pipeline was made, and its measured quality."""

from __future__ import annotations

from typing import Any

from carv.training.card_rows import row, run_fields
from carv.training.data import HELD_OUT
from carv.training.evaluate import Value
from carv.world.cameras import VIEW_WORDS
from carv.world.captions import Prompt
from carv.world.shapes import COLOURS, SHAPES

_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# carv's small Stable Diffusion

A latent diffusion pipeline of {millions:.1f} million weights for {image}x{image} pictures, trained from scratch by
`carv teachers train world`. It is a teacher for tests, demonstrations and measurements of gradient estimators: a real
`StableDiffusionPipeline` with a learned autoencoder, text encoder and UNet, small enough for a CPU. It draws
carv's captioned 3D world and nothing else.

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline("a red chair, side view", num_inference_steps=25, guidance_scale=4.0).images[0]

## Language

`a COLOUR SHAPE` or `a COLOUR SHAPE, VIEW view`; the colour may be left out.

- shapes: {shapes}
- colours: {colours}
- views: {views}

## How it was made

- Data: {pictures} renders by carv's own sphere tracer, {count} cameras for each shape, every shape in every colour; no
  pictures from anywhere else. Left out of the training of the autoencoder, the text encoder and the UNet: {held_out}.
- Autoencoder: `AutoencoderKL`, 4 x {latent} x {latent} latents, standardised in each channel by its own 1x1
  convolutions (scaling factor 1). Loss |e| + 2 e^2 + |c| + 6 c^2 + |de|/2 + 1e-4 KL, for the errors e of pixels, c of
  hues and de of edges.
- UNet and CLIP text encoder: trained together, v-prediction, Stable Diffusion's schedule, timesteps stratified over
  the batch, {drop:.0%} empty captions, weights averaged (0.999).
- `clip/`: a `CLIPModel` trained on the same captions and on all objects, the judge of the table below.

| stage | steps | batch | minutes | loss of the last 200 steps |
|---|---|---|---|---|
{stages}

Machine: {machine}, torch {torch}. The same steps again, whatever the clock says:

    carv teachers train world --out DIR --size {size} --seed {seed} --views {count} {steps}

## Quality

Measured on this folder's files (weights in float16, computed in float32): DDIM, {sampling} steps, guidance {scale:g}.
R-precision is the share of samples whose own caption ranks first among all captions of its kind. 95% intervals
in brackets, as if pictures were independent; the CLIP score and PSNR have standard errors over objects. "True renders"
are pictures from unseen cameras, 8 of each object: what the judge makes of them bounds what samples can reach.

| | trained objects | held-out objects | true renders |
|---|---|---|---|
{quality}

## Limits

One object on a plain background, seen by cameras between 10 degrees below and 45 above. The judge is as small as the
pipeline and saw the same world, so these figures say nothing about other pictures or other models.
"""

_MEASURES = {
    "r_precision_of_128": "R-precision, colour and shape (of 128)",
    "r_precision_of_512": "R-precision, with view word (of 512)",
    "view_of_4": "view, given the object (of 4)",
    "clip_score": "CLIP score (100 cos)",
}


def model_card(facts: dict[str, Any]) -> str:
    """README.md of the pipeline's folder from the facts that `quality.json` holds."""
    config, quality = facts["config"], facts["quality"]
    rows = [
        row(title, [quality[split][name] for split in ("trained", "held_out", "renders")], _cell)
        for name, title in _MEASURES.items()
    ]
    decoded = facts["autoencoder_psnr"]
    rows.append(row("autoencoder, PSNR in dB, unseen cameras", [decoded["trained"], decoded["held_out"], None], _cell))
    return _HEAD.format(
        **run_fields(facts),
        image=facts["sizes"]["image"],
        latent=facts["latent"],
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        views=", ".join(VIEW_WORDS),
        pictures=facts["pictures"],
        count=config["views"],
        held_out=", ".join(str(Prompt(colour, shape)) for shape, colour in HELD_OUT),
        drop=config["drop_captions"],
        scale=config["guidance_scale"],
        quality="\n".join(rows),
    )


def _cell(value: Value) -> str:
    if "low" in value:
        return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}], {value['count']} pictures"
    return f"{value['value']:.1f} +- {value['standard_error']:.1f}, {value['count']} objects"
