"""The model card: how the pipeline was made, and its measured quality."""

from __future__ import annotations

from typing import Any

from carv.training.card_rows import row, run_fields
from carv.training.clips.denoiser import SHIFT
from carv.training.clips.evaluate import Value
from carv.training.clips.text import LENGTH
from carv.world.clips import BACKGROUNDS, LENGTHS, MOTIONS

_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# carv's small Wan

A text-to-video pipeline of {millions:.1f} million weights for 32x32 clips of {lengths} frames, trained from scratch by
`carv teachers train clips`. It is a teacher for tests, demonstrations and measurements of gradient estimators and of
data attribution: a real `WanPipeline` with a causal video autoencoder, a UMT5 text encoder and Wan's transformer,
small enough for a CPU. It draws handwritten digits that move, and nothing else.

    from diffusers import WanPipeline
    pipeline = WanPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline("the digit 3 sliding left", height=32, width=32, num_frames=9, num_inference_steps={sampling},
             guidance_scale={scale:g}, max_sequence_length={length})

`max_sequence_length={length}` is needed: the pipeline's default, 512, is more than the tokenizer's length.

![digits down, motions across](samples/motions.gif)

## Language

`the digit N MOTION` or `the digit N MOTION over BACKGROUND`, with N from 0 to 9.

- motions: {motions}
- backgrounds: {backgrounds}; a plain one is not mentioned

## How it was made

- Data: `carv.world.clips.make_clips({clips}, seed={seed})`, which are the training clips of the autoencoder and the
  transformer, all of them: real handwritten digits (UCI's, as scikit-learn has them, CC BY 4.0), moved, turned and
  scaled. A fifth of the digits' pictures was kept back for measuring.
- Autoencoder: `AutoencoderKLWan` with 2 x 2 pixels folded into channels; one latent frame for the first frame and one
  for every four after it, {channels} x 4 x 4 each; standardised by latents_mean and latents_std. Loss
  |e| + 2 e^2 + |de|/2 + 1e-4 KL, for the errors e of pixels and de of edges. First on pieces of 9 frames; then on
  whole clips, where pixels near the digit weigh 11 times as much as others.
- Text encoder: trained first, so that digit, motion and background can be told from each of a caption's states by a
  linear map; then left as it is.
- Transformer: flow matching, |v - (eps - z)|^2, on one token for each of the 4 x 4 entries of a latent frame.
  t = s u / (1 + (s - 1) u) with s = {shift:g}, which is also the scheduler's shift, u stratified over the batch;
  {drop:.0%} empty captions, weights averaged (0.999).
- `judge/`: a small classifier of digit and motion, trained on {judge_clips} other clips of the same digits.

| stage | steps | batch | minutes | loss of the last 200 steps |
|---|---|---|---|---|
{stages}

Machine: {machine}, torch {torch}; the minutes are by the clock, beside other work.
The same steps again, whatever the clock says:

    carv teachers train clips --out DIR --size {size} --seed {seed} --clips {clips} \\
        {steps}

## Quality

Measured on this folder's files (weights in float16, computed in float32): {sampling} Euler steps, guidance {scale:g},
{each} sample(s) of each of the 240 captions. The judge says which digit it sees and how it moves; chance is 10% and
12.5%. 95% intervals (Wilson) in brackets. "True clips" are clips of digits that nothing was trained on: what the judge
makes of them bounds what samples can reach.

| | samples | true clips, through the autoencoder | true clips |
|---|---|---|---|
{quality}

Autoencoder, PSNR of these clips: {psnr[value]:.1f} +- {psnr[standard_error]:.1f} dB (standard error over
{psnr[count]} pictures of digits).

## Limits

Motions and backgrounds are learned long before digits: how a sample moves can be trusted more than what it shows. The
judge is as small as the pipeline and saw the same world, so these figures say nothing about other clips or other
models. With {clips} training clips the pipeline sees each one many times, which suits attribution and is unlike a large
model's single pass.
"""

_MEASURES = {"digit": "digit", "motion": "motion", "both": "both"}


def model_card(facts: dict[str, Any]) -> str:
    """README.md of the pipeline's folder from the facts that `quality.json` holds."""
    config, quality = facts["config"], facts["quality"]
    return _HEAD.format(
        **run_fields(facts),
        lengths=", ".join(map(str, LENGTHS)),
        length=LENGTH,
        motions=", ".join(MOTIONS),
        backgrounds=", ".join(BACKGROUNDS),
        clips=config["clips"],
        judge_clips=config["judge_clips"],
        channels=facts["sizes"]["channels"],
        shift=SHIFT,
        drop=config["drop_captions"],
        scale=config["guidance_scale"],
        each=config["samples_per_caption"],
        quality="\n".join(
            row(title, [quality[kind][name] for kind in ("samples", "decoded", "unseen")], _cell)
            for name, title in _MEASURES.items()
        ),
        psnr=facts["autoencoder_psnr"],
    )


def _cell(value: Value) -> str:
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}], {value['count']} clips"
