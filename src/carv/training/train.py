"""`carv teachers train world`: the stages in order, resumable, to a folder that diffusers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carv.checkpoint import load_or_make
from carv.devices import find_device
from carv.extras import require
from carv.rng import Stream, stream
from carv.training.autoencoder import AutoencoderLoss, build_autoencoder, encode, standardise
from carv.training.card import model_card
from carv.training.clip import ClipLoss, build_clip, save_clip
from carv.training.config import STAGE_SHARES, TrainConfig
from carv.training.data import all_pictures, training_pictures
from carv.training.denoiser import Denoiser, DenoiserLoss, build_scheduler, build_text_encoder, build_unet
from carv.training.evaluate import Judge, Sampling, load_pipeline, reconstruction_quality, sample_quality, write_sheets
from carv.training.loop import Progress, Say
from carv.training.stages import (
    CHECKPOINTS,
    fit_stage,
    forget,
    initialised_from,
    run_facts,
    say_on_stderr,
    weight_count,
    write_facts,
)
from carv.training.tokenizer import build_tokenizer, caption_ids
from carv.world.dataset import WorldDataset, load_world

_UNSEEN_VIEWS = 8


def train(config: TrainConfig, out: Path, overwrite: bool = False, say: Say = say_on_stderr) -> dict[str, Any]:
    """Train all stages, write the pipeline, measure it, and write its card.

    A stop at any time loses at most two minutes; the same call goes on from the checkpoints in `out`/training, which
    may be deleted once the pipeline is written.

    Args:
        config: the settings.
        out: the pipeline's folder; CLIP goes to `out`/clip, sample sheets to `out`/samples.
        overwrite: start again where the folder holds another run.
        say: told about the progress, one line at a time.

    Returns:
        What quality.json holds.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ImportError: diffusers or transformers are missing.
        ValueError: no such device, or a loss that is not finite.
    """
    device = find_device(config.device)
    checkpoints = out / CHECKPOINTS
    if overwrite:
        forget(checkpoints, (*STAGE_SHARES, "latents"))
    run = Run(config, checkpoints, device, _world(config, config.views, config.seed, say), say)
    networks = run.networks()
    save_pipeline(networks, out)
    save_clip(networks.clip, networks.tokenizer, config.sizes, out / "clip")
    say("measuring the saved pipeline")
    unseen = _world(config, _UNSEEN_VIEWS, config.seed + 1, say)
    facts = run.facts(networks) | measure(config, out, networks, unseen, device)
    return write_facts(out, facts, model_card)


@dataclass(frozen=True)
class Networks:
    """The trained networks, as diffusers and transformers know them.

    Attributes:
        tokenizer: CLIPTokenizer.
        vae: AutoencoderKL.
        text_encoder: CLIPTextModel.
        unet: UNet2DConditionModel.
        clip: CLIPModel.
        progress: of each stage.
    """

    tokenizer: Any
    vae: Any
    text_encoder: Any
    unet: Any
    clip: Any
    progress: dict[str, Progress]


def save_pipeline(networks: Networks, out: Path) -> None:
    """Write the folder that `StableDiffusionPipeline.from_pretrained` loads; weights in float16."""
    pipeline = require("diffusers", "diffusers").StableDiffusionPipeline(
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)


def measure(
    config: TrainConfig, out: Path, networks: Networks, unseen: WorldDataset, device: torch.device
) -> dict[str, Any]:
    """The quality of the saved pipeline; writes the sample sheets on the way."""
    pipeline = load_pipeline(out, device)
    judge = Judge(networks.clip.cpu(), caption_ids(networks.tokenizer))
    how = Sampling(config.sampling_steps, config.guidance_scale, stream(config.seed, "training", "samples"))
    quality, pictures = sample_quality(pipeline, judge, unseen, how, config.samples_per_prompt)
    write_sheets(out / "samples", pictures)
    return {"quality": quality, "autoencoder_psnr": reconstruction_quality(pipeline.vae, unseen)}


@dataclass(frozen=True)
class Run:
    """One run of all stages.

    Attributes:
        config: the settings.
        checkpoints: the folder of the stages' checkpoints.
        device: where to train.
        world: all pictures.
        say: told about the progress.
    """

    config: TrainConfig
    checkpoints: Path
    device: torch.device
    world: WorldDataset
    say: Say

    def networks(self) -> Networks:
        """Train every stage that is not done yet."""
        tokenizer = build_tokenizer()
        ids = caption_ids(tokenizer)
        vae, latents, first = self._autoencoder()
        denoiser, second = self._denoiser(tokenizer, ids, latents)
        clip, third = self._clip(tokenizer, ids)
        progress = {"autoencoder": first, "denoiser": second, "clip": third}
        return Networks(tokenizer, vae, denoiser.text_encoder, denoiser.unet, clip, progress)

    def _autoencoder(self) -> tuple[Any, Tensor, Progress]:
        config, rng = self.config, self.rng("autoencoder")
        pictures = training_pictures(self.world)
        with initialised_from(rng):
            vae = build_autoencoder(config.sizes).to(self.device, memory_format=torch.channels_last)
        loss = AutoencoderLoss(vae, pictures, config.sizes.autoencoder_batch, rng, self.device, config.bf16)
        progress = self._fit("autoencoder", vae, loss)

        def encoded() -> dict[str, Tensor]:
            self.say(f"encoding {len(self.world)} pictures")
            return {"latents": encode(vae, self.world, self.device)}

        saved = load_or_make(self.checkpoints / "latents", config.to_json(), encoded)
        return vae, standardise(vae, saved["latents"], pictures.pool), progress

    def _denoiser(self, tokenizer: Any, ids: Tensor, latents: Tensor) -> tuple[Denoiser, Progress]:
        config, rng = self.config, self.rng("denoiser")
        with initialised_from(rng):
            model = Denoiser(build_unet(config.sizes), build_text_encoder(tokenizer, config.sizes)).to(self.device)
        loss = DenoiserLoss(
            model,
            latents,
            training_pictures(self.world),
            ids,
            build_scheduler().alphas_cumprod,
            config.sizes.denoiser_batch,
            config.drop_captions,
            rng,
            self.device,
            config.bf16,
        )
        return model, self._fit("denoiser", model, loss)

    def _clip(self, tokenizer: Any, ids: Tensor) -> tuple[Any, Progress]:
        config, rng = self.config, self.rng("clip")
        with initialised_from(rng):
            model = build_clip(tokenizer, config.sizes).to(self.device)
        pictures = all_pictures(self.world)
        loss = ClipLoss(model, pictures, ids, config.sizes.clip_batch, rng, self.device, config.bf16)
        return model, self._fit("clip", model, loss)

    def _fit(self, name: str, model: Any, loss: Any) -> Progress:
        return fit_stage(name, model, loss, self.config, STAGE_SHARES[name], self.checkpoints, self.say)

    def rng(self, name: str) -> Stream:
        """The stage's stream: its weights, batches and noise."""
        return stream(self.config.seed, "training", name)

    def facts(self, networks: Networks) -> dict[str, Any]:
        """What quality.json says about how the networks were made."""
        latent, pictures = self.config.sizes.latent, len(self.world)
        weights = weight_count(networks.vae, networks.text_encoder, networks.unet)
        return run_facts(self.config, networks.progress, self.device, latent=latent, pictures=pictures, weights=weights)


def _world(config: TrainConfig, views: int, seed: int, say: Say) -> WorldDataset:
    def progress(done: int, total: int) -> None:
        if done % 4 == 0:
            say(f"rendering {views} views of each object, once: {done} of {total} shapes")

    return load_world(config.sizes.image, views, seed, progress=progress)
