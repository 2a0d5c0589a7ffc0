"""The model card: how the pipeline was made, and its measured quality."""

from __future__ import annotations

from typing import Any

from carv.clip import Value
from carv.training.card_rows import row, run_fields
from carv.training.digits.config import GUIDANCE_SCALES
from carv.training.digits.data import MOVE, SCALE, SHEAR, TURN

_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# carv's small DiT

A class-conditional latent diffusion transformer of {millions:.1f} million weights for {image}x{image} pictures of
handwritten digits, trained from scratch by `carv teachers train digits`. It is a teacher for tests, demonstrations and
measurements of gradient estimators, one-step distillation above all: a real `DiTPipeline` with a learned autoencoder
and transformer, small enough for a CPU. It draws digits and nothing else.

    from diffusers import DiTPipeline
    pipeline = DiTPipeline.from_pretrained(FOLDER)
    pipeline(class_labels=[3], num_inference_steps=25, guidance_scale=1.5).images[0]

Classes are 0 to 9, and 1000 is the null class, the one that `DiTPipeline` asks for. Classes 10 to 999 are no digits:
their rows are copies of the null class's.

## How it was made

- Data: the {train} digits of the training split of `carv.world.digits`: scikit-learn's, UCI "Optical Recognition of
  Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0), 8x8 enlarged to {image}x{image} by bicubic interpolation.
  {test} are left out for testing; both splits have digits of the same writers.
- Augmentation: {copies} pictures of each, the digit itself and {distorted} copies turned by up to {turn:g} degrees,
  scaled by up to {scale:.0%} along each axis, sheared by up to {shear:g} and moved by up to {move:g} pixels.
- Autoencoder: `AutoencoderKL`, 4 x {latent} x {latent} latents, standardised in each channel by its own 1x1
  convolutions (scaling factor 1). Loss |e| + 2 e^2 + |de|/2 + 1e-4 KL and a term in hues, for the errors e of pixels
  and de of edges.
- Transformer: `DiTTransformer2DModel`, {layers} blocks of width {width}, patch {patch}, v-prediction. The schedule is
  Stable Diffusion's with beta up to 0.02: alpha is 0.015 at the last timestep. Timesteps stratified over the batch,
  {drop:.0%} null classes, weights averaged (0.999). The weights counted above leave out the rows of no digit.
- `judge/`: a convolutional classifier (`carv.judge.Judge`) trained on the same split, the judge of the table below.

| stage | steps | batch | minutes | loss of the last 200 steps |
|---|---|---|---|---|
{stages}

Machine: {machine}, torch {torch}. The same steps again, whatever the clock says:

    carv teachers train digits --out DIR --size {size} --seed {seed} {steps}

## Quality

Measured on this folder's files (weights in float16, computed in float32): DDIM, {sampling} steps, {samples} samples,
{each} of each digit, at each guidance scale s; "real" are {real} pictures of the training split.

| | {columns} | real |
|---|{rule}---|
{quality}

- Class accuracy: the share that the judge takes for the digit asked for, with a 95% interval.
- Frechet distance: between the judge's {features} features of samples and of a split, with a jackknife standard error.
  It depends on the judge and on the number of pictures: compare it with the real pictures' and with nothing else.
- Diversity: mean distance of pairs of one digit in the judge's features over that of the test split; standard error
  over digits.
- Nearer to training pictures than test pictures are: the share of samples whose distance in pixels to the nearest
  picture of the training, distorted copies included, is below the test pictures' median, {median:.3f}. New pictures
  of the same kind would give 50%, copies 100%; pictures smoother or more typical than real ones give more than 50% too.

The judge takes {judge} of the test split for what they are. The autoencoder reaches {psnr} dB PSNR on the test split.

## Limits

The judge saw the same pictures as the pipeline, and is as small. These figures say nothing about other pictures or
other models.
"""

_MEASURES = {
    "accuracy": "class accuracy",
    "frechet_test": "Frechet distance to the test split",
    "frechet_train": "Frechet distance to the training split",
    "diversity": "diversity within a digit",
    "near_known": "nearer to training pictures than test pictures are",
}


def model_card(facts: dict[str, Any]) -> str:
    """README.md of the pipeline's folder from the facts that `quality.json` holds."""
    config, sizes, quality = facts["config"], facts["sizes"], facts["quality"]
    columns = [*(f"{scale:g}" for scale in GUIDANCE_SCALES), "real"]
    rows = [row(title, [quality[column].get(name) for column in columns], _cell) for name, title in _MEASURES.items()]
    return _HEAD.format(
        **run_fields(facts),
        image=sizes["image"],
        latent=facts["latent"],
        train=facts["pictures"]["train"],
        test=facts["pictures"]["test"],
        copies=sizes["copies"],
        distorted=sizes["copies"] - 1,
        turn=TURN,
        scale=SCALE,
        shear=SHEAR,
        move=MOVE,
        layers=sizes["layers"],
        width=sizes["heads"] * sizes["head_width"],
        patch=sizes["patch"],
        drop=config["drop_classes"],
        samples=10 * config["samples_per_class"],
        each=config["samples_per_class"],
        real=quality["real"]["accuracy"]["count"],
        columns=" | ".join(f"s = {scale:g}" for scale in GUIDANCE_SCALES),
        rule="---|" * len(GUIDANCE_SCALES),
        quality="\n".join(rows),
        features=sizes["features"],
        median=facts["test_distance_to_known"],
        judge=_cell(facts["judge_accuracy"]),
        psnr=_cell(facts["autoencoder_psnr"]),
    )


def _cell(value: Value) -> str:
    if "low" in value:
        return f"{value['value']:.1%} [{max(0.0, value['low']):.1%}, {value['high']:.1%}]"
    return f"{value['value']:.2f} +- {value['standard_error']:.2f}"
