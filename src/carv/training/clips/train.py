"""The stages of the small video teacher in order, resumable, to a folder that diffusers loads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carv.checkpoint import load_or_make
from carv.devices import find_device
from carv.extras import require, without_progress_bars
from carv.rng import Stream, stream
from carv.training.clips.autoencoder import AutoencoderLoss, build_autoencoder, encode, standardise
from carv.training.clips.card import model_card
from carv.training.clips.config import STAGE_SHARES, ClipsConfig
from carv.training.clips.denoiser import Denoiser, DenoiserLoss, build_scheduler, build_transformer
from carv.training.clips.evaluate import Sampling, load_pipeline, measure, write_sheet
from carv.training.clips.finish import FinishLoss
from carv.training.clips.judge import ClipJudge, JudgeLoss
from carv.training.clips.latents import LatentClips, latent_clips
from carv.training.clips.text import build_text_encoder, build_tokenizer, caption_ids, text_states
from carv.training.clips.text_loss import Reader, TextLoss
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
from carv.world.clips import Clips, make_clips

JUDGE, SAMPLES = "judge", "samples"


def train(config: ClipsConfig, out: Path, overwrite: bool = False, say: Say = say_on_stderr) -> dict[str, Any]:
    """Train all stages, write the pipeline, measure it, and write its card.

    A stop at any time loses at most two minutes; the same call goes on from the checkpoints in `out`/training, which
    may be deleted once the pipeline is written.

    Args:
        config: the settings.
        out: the pipeline's folder; the judge goes to `out`/judge, sample sheets to `out`/samples.
        overwrite: start again where the folder holds another run.
        say: told about the progress, one line at a time.

    Returns:
        What quality.json holds.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ImportError: diffusers, transformers or scikit-learn are missing.
        ValueError: no such device, or a loss that is not finite.
    """
    device = find_device(config.device)
    if overwrite:
        forget(out / CHECKPOINTS, (*STAGE_SHARES, "latents"))
    say(f"making {config.clips} clips")
    run = Run(config, out / CHECKPOINTS, device, make_clips(config.clips, config.seed), say)
    networks = run.networks()
    save_pipeline(networks, out)
    networks.judge.cpu().save(out / JUDGE)
    say("measuring the saved pipeline")
    return write_facts(out, run.facts(networks) | measure_folder(config, out, device), model_card)


@dataclass(frozen=True)
class Networks:
    """The trained networks, as diffusers and transformers know them.

    Attributes:
        tokenizer: T5Tokenizer.
        vae: AutoencoderKLWan.
        text_encoder: UMT5EncoderModel.
        transformer: WanTransformer3DModel.
        judge: of clips.
        progress: of each stage.
    """

    tokenizer: Any
    vae: Any
    text_encoder: Any
    transformer: Any
    judge: ClipJudge
    progress: dict[str, Progress]


def save_pipeline(networks: Networks, out: Path) -> None:
    """Write the folder that `WanPipeline.from_pretrained` loads; weights in float16."""
    pipeline = require("diffusers", "diffusers").WanPipeline(
        tokenizer=networks.tokenizer,
        text_encoder=networks.text_encoder,
        vae=networks.vae,
        scheduler=build_scheduler(),
        transformer=networks.transformer,
    )
    for part in (networks.text_encoder, networks.vae, networks.transformer):
        for parameter in part.parameters():
            parameter.data = parameter.data.half()
    with without_progress_bars():
        pipeline.save_pretrained(out, safe_serialization=True)


def measure_folder(config: ClipsConfig, out: Path, device: torch.device) -> dict[str, Any]:
    """The quality of a saved folder; writes the sample sheets on the way."""
    pipeline = load_pipeline(out, device)
    unseen = make_clips(config.unseen_clips, config.seed + 2, split="test")
    rng = stream(config.seed, "training", "clips", "samples")
    how = Sampling(config.sampling_steps, config.guidance_scale, rng)
    facts, _ = measure(pipeline, ClipJudge.from_pretrained(out / JUDGE), unseen, how, config.samples_per_caption)
    write_sheet(out / SAMPLES, pipeline, dataclasses.replace(how, rng=rng.child("sheet")))
    return facts


@dataclass(frozen=True)
class Run:
    """One run of all stages.

    Attributes:
        config: the settings.
        checkpoints: the folder of the stages' checkpoints.
        device: where to train.
        clips: the training set.
        say: told about the progress.
    """

    config: ClipsConfig
    checkpoints: Path
    device: torch.device
    clips: Clips
    say: Say

    def networks(self) -> Networks:
        """Train every stage that is not done yet."""
        tokenizer = build_tokenizer()
        vae, first, second = self._autoencoder()
        reader, third = self._text(tokenizer)
        transformer, fourth = self._denoiser(reader, self._latents(vae))
        judge, fifth = self._judge()
        progress = {"autoencoder": first, "finish": second, "text": third, "denoiser": fourth, "judge": fifth}
        return Networks(tokenizer, vae, reader.text_encoder, transformer, judge, progress)

    def _autoencoder(self) -> tuple[Any, Progress, Progress]:
        config, rng = self.config, self.rng("autoencoder")
        with initialised_from(rng):
            vae = build_autoencoder(config.sizes).to(self.device)
        loss = AutoencoderLoss(vae, self.clips, config.sizes.autoencoder_batch, rng, self.device, config.bf16)
        first = self._fit("autoencoder", vae, loss)
        rng, batch = self.rng("finish"), config.sizes.finish_batch
        finish = FinishLoss(vae, self.clips, batch, rng, self.device, config.bf16)
        return vae, first, self._fit("finish", vae.requires_grad_(True), finish)

    def _latents(self, vae: Any) -> LatentClips:
        def encoded() -> dict[str, Tensor]:
            self.say(f"encoding {len(self.clips)} clips")
            return {str(i): latent for i, latent in enumerate(encode(vae, self.clips))}

        saved = load_or_make(self.checkpoints / "latents", self.config.to_json(), encoded)
        latents = standardise(vae, [saved[str(i)] for i in range(len(self.clips))])
        return latent_clips(latents, self.clips)

    def _text(self, tokenizer: Any) -> tuple[Reader, Progress]:
        config, rng = self.config, self.rng("text")
        with initialised_from(rng):
            reader = Reader(build_text_encoder(tokenizer, config.sizes), caption_ids(tokenizer)).to(self.device)
        return reader, self._fit("text", reader, TextLoss(reader, config.sizes.text_batch, rng, self.device))

    def _denoiser(self, reader: Reader, data: LatentClips) -> tuple[Any, Progress]:
        config, rng = self.config, self.rng("denoiser")
        with initialised_from(rng):
            transformer = build_transformer(config.sizes)
        with torch.no_grad():
            model = Denoiser(transformer, text_states(reader.text_encoder, reader.ids)).to(self.device)
        loss = DenoiserLoss(model, data, config.sizes.denoiser_batch, config.drop_captions, rng, self.device)
        return transformer, self._fit("denoiser", model, loss)

    def _judge(self) -> tuple[ClipJudge, Progress]:
        config, rng = self.config, self.rng("judge")
        with initialised_from(rng):
            judge = ClipJudge(config.sizes.judge_width).to(self.device)
        self.say(f"making {config.judge_clips} clips for the judge")
        clips = make_clips(config.judge_clips, config.seed + 1)
        return judge, self._fit("judge", judge, JudgeLoss(judge, clips, config.sizes.judge_batch, rng, self.device))

    def _fit(self, name: str, model: Any, loss: Any) -> Progress:
        return fit_stage(name, model, loss, self.config, STAGE_SHARES[name], self.checkpoints, self.say)

    def rng(self, name: str) -> Stream:
        """The stage's stream: its weights, batches and noise."""
        return stream(self.config.seed, "training", "clips", name)

    def facts(self, networks: Networks) -> dict[str, Any]:
        """What quality.json says about how the networks were made."""
        weights = weight_count(networks.vae, networks.text_encoder, networks.transformer)
        return run_facts(self.config, networks.progress, self.device, weights=weights)
