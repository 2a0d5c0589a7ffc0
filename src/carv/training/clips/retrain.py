"""The transformer trained again on a part of the clips, with the autoencoder and the text encoder as they are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from carv.rng import stream
from carv.training.clips.autoencoder import encode
from carv.training.clips.denoiser import Denoiser, DenoiserLoss
from carv.training.clips.evaluate import load_pipeline
from carv.training.clips.latents import LatentClips, latent_clips
from carv.training.clips.text import caption_ids, text_states
from carv.training.loop import Say, Stage, fit
from carv.training.stages import initialised_from
from carv.world.clips import Clips


@dataclass(frozen=True)
class FrozenParts:
    """What stays as it is while the transformer is trained again.

    Attributes:
        data: the clips' latents and captions.
        states: [C, length, w] of `text.CAPTIONS`.
        transformer: the teacher's own, which `start="teacher"` copies.
    """

    data: LatentClips
    states: Float[Tensor, "C length w"]
    transformer: Any

    @classmethod
    def load(cls, folder: Path, clips: Clips) -> FrozenParts:
        """Encode the clips with a trained folder's autoencoder, and all captions with its text encoder."""
        pipeline = load_pipeline(folder, torch.device("cpu"))
        vae, transformer, encoder = pipeline.vae, pipeline.transformer, pipeline.text_encoder
        with torch.no_grad():
            states = text_states(encoder, caption_ids(pipeline.tokenizer))
        return cls(latent_clips(encode(vae, clips), clips), states, transformer)


def train_denoiser_on(
    places: Sequence[int],
    parts: FrozenParts,
    *,
    steps: int,
    seed: int,
    start: str = "scratch",
    rate: float = 2e-3,
    batch: int = 8,
    drop: float = 0.1,
    folder: Path | None = None,
    say: Say = lambda line: None,
) -> Any:
    """A transformer trained on the clips at these places alone: what leave-out retraining (LDS) needs.

    The weights, the batches and the noise are addressed by the seed: the same places and seed give the same network.

    Args:
        places: of the clips in `parts.data`.
        parts: from `FrozenParts.load`.
        steps: of AdamW, with `training.loop.fit`'s schedule and average.
        seed: of all randomness.
        start: "scratch" for random weights, "teacher" to go on from a copy of the teacher's.
        rate: highest learning rate.
        batch: latents in a step.
        drop: share of empty captions.
        folder: where to keep a checkpoint; a stopped training goes on from it. Without one nothing is kept.
        say: told about the progress.

    Returns:
        A `WanTransformer3DModel` with the averaged weights, frozen.

    Raises:
        ValueError: no places, an unknown start, or a loss that is not finite.
    """
    if not places:
        raise ValueError("train_denoiser_on needs at least one place")
    if start not in ("scratch", "teacher"):
        raise ValueError(f"start is 'scratch' or 'teacher', got {start!r}")
    places = sorted(places)
    rng = stream(seed, "training", "clips", "retrain")
    with initialised_from(rng):
        transformer = copy.deepcopy(parts.transformer) if start == "teacher" else _fresh(parts.transformer)
    model = Denoiser(transformer.requires_grad_(True), parts.states)
    loss = DenoiserLoss(model, parts.data.select(places), batch, drop, rng, torch.device("cpu"))
    stage = Stage("transformer", model, loss, rate, steps, 1.0)
    settings = f"retrain {places} {steps} {seed} {start} {rate} {batch} {drop}"
    if folder is not None:
        fit(stage, folder, settings, say)
        return transformer
    with tempfile.TemporaryDirectory() as temporary:
        fit(stage, Path(temporary), settings, say)
    return transformer


def _fresh(like: Any) -> Any:
    return type(like).from_config(like.config)
