"""`carv teachers train digits`: the stages in order, resumable, to a folder that diffusers and carv load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carv.checkpoint import write_whole
from carv.devices import find_device
from carv.extras import require
from carv.judge import Judge, JudgeNetwork
from carv.rng import Stream, stream
from carv.training.autoencoder import AutoencoderLoss, build_autoencoder, encode, standardise
from carv.training.digits.card import model_card
from carv.training.digits.config import GUIDANCE_SCALES, STAGE_SHARES, DigitsConfig
from carv.training.digits.data import AugmentedDigits, augmented
from carv.training.digits.denoiser import DitLoss, build_dit, build_scheduler, close_table
from carv.training.digits.evaluate import (
    Reference,
    asked_classes,
    load_pipeline,
    real_quality,
    reconstruction_quality,
    sample,
    write_samples,
)
from carv.training.digits.judge import JudgeLoss, judge_config
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
from carv.world.digits import CLASSES, load_digits

JUDGE, SAMPLES = "judge", "samples.png"
_SHOWN_SCALE = 1.5  # of the sample sheet


def train(config: DigitsConfig, out: Path, overwrite: bool = False, say: Say = say_on_stderr) -> dict[str, Any]:
    """Train all stages, write the pipeline, measure it, and write its card.

    A stop at any time loses at most two minutes; the same call goes on from the checkpoints in `out`/training, which
    may be deleted once the pipeline is written.

    Args:
        config: the settings.
        out: the pipeline's folder; the judge goes to `out`/judge.
        overwrite: start again where the folder holds another run.
        say: told about the progress, one line at a time.

    Returns:
        What quality.json holds.

    Raises:
        RunFolderError: the folder holds another run, or a damaged checkpoint.
        ImportError: diffusers or scikit-learn are missing.
        ValueError: no such device, or a loss that is not finite.
    """
    device = find_device(config.device)
    if overwrite:
        forget(out / CHECKPOINTS, STAGE_SHARES)
    rng = stream(config.seed, "training", "digits")
    pictures = augmented(load_digits("train"), config.sizes.copies, rng.child("copies"))
    run = Run(config, out / CHECKPOINTS, device, pictures, rng, say)
    networks = run.networks()
    save_pipeline(networks, out)
    networks.judge.save(out / JUDGE)
    say("measuring the saved pipeline")
    facts = run.facts(networks) | measure(config, out, pictures, device, rng.child("samples"))
    return write_facts(out, facts, model_card)


@dataclass(frozen=True)
class Networks:
    """The trained networks.

    Attributes:
        vae: AutoencoderKL.
        transformer: DiTTransformer2DModel.
        judge: of the same pictures.
        progress: of each stage.
    """

    vae: Any
    transformer: Any
    judge: Judge
    progress: dict[str, Progress]


def save_pipeline(networks: Networks, out: Path) -> None:
    """Write the folder that `DiTPipeline.from_pretrained` loads; weights in float16."""
    pipeline = require("diffusers", "diffusers").DiTPipeline(
        transformer=networks.transformer, vae=networks.vae, scheduler=build_scheduler()
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    path = out / "model_index.json"
    # The pipeline reads the classes' names from here, but does not write them.
    index = json.loads(path.read_text(encoding="utf-8")) | {"id2label": {str(i): str(i) for i in range(CLASSES)}}
    write_whole(path, (json.dumps(index, indent=2) + "\n").encode())


def measure(
    config: DigitsConfig, out: Path, seen: AugmentedDigits, device: torch.device, rng: Stream
) -> dict[str, Any]:
    """The quality of the saved folder; writes the sample sheet on the way."""
    pipeline = load_pipeline(out, device)
    reference = Reference.of(Judge.from_pretrained(out / JUDGE), seen, rng)
    asked = asked_classes(config.samples_per_class, rng.child("classes"))
    quality = {}
    for scale in GUIDANCE_SCALES:  # all from the same noise
        drawn = sample(pipeline, asked, config.sampling_steps, scale, rng.child("noise"))
        quality[f"{scale:g}"] = reference.quality(drawn, asked)
        if scale == _SHOWN_SCALE:
            write_samples(out / SAMPLES, drawn, asked)
    test = reference.test
    own = reference.quality(test.floats(), test.label)
    return {
        "quality": quality | {"real": real_quality(reference, config.samples_per_class)},
        "judge_accuracy": own["accuracy"],
        "test_distance_to_known": reference.test_distance,
        "autoencoder_psnr": reconstruction_quality(pipeline.vae, test),
        "pictures": {"train": len(reference.train), "test": len(test)},
    }


@dataclass(frozen=True)
class Run:
    """One run of all stages.

    Attributes:
        config: the settings.
        checkpoints: the folder of the stages' checkpoints.
        device: where to train.
        pictures: the training split and its distorted copies.
        rng: of everything; each stage has its child.
        say: told about the progress.
    """

    config: DigitsConfig
    checkpoints: Path
    device: torch.device
    pictures: AugmentedDigits
    rng: Stream
    say: Say

    def networks(self) -> Networks:
        """Train every stage that is not done yet."""
        vae, latents, first = self._autoencoder()
        transformer, second = self._denoiser(latents)
        judge, third = self._judge()
        return Networks(vae, transformer, judge, {"autoencoder": first, "denoiser": second, "judge": third})

    def _autoencoder(self) -> tuple[Any, Tensor, Progress]:
        config, rng = self.config, self.rng.child("autoencoder")
        with initialised_from(rng):
            vae = build_autoencoder(config.sizes).to(self.device, memory_format=torch.channels_last)
        batch = config.sizes.autoencoder_batch
        loss = AutoencoderLoss(vae, self.pictures, batch, rng, self.device, config.bf16)
        progress = self._fit("autoencoder", vae, loss)
        self.say(f"encoding {len(self.pictures)} pictures")
        latents = encode(vae, self.pictures, self.device)
        return vae, standardise(vae, latents, torch.arange(len(latents))), progress

    def _denoiser(self, latents: Tensor) -> tuple[Any, Progress]:
        config, rng = self.config, self.rng.child("denoiser")
        with initialised_from(rng):
            network = build_dit(config.sizes).to(self.device)
        loss = DitLoss(
            network,
            latents,
            self.pictures,
            build_scheduler().alphas_cumprod,
            config.sizes.denoiser_batch,
            config.drop_classes,
            rng,
            self.device,
            config.bf16,
        )
        progress = self._fit("denoiser", network, loss)
        close_table(network)
        return network, progress

    def _judge(self) -> tuple[Judge, Progress]:
        config, rng = self.config, self.rng.child("judge")
        shape = judge_config(config.sizes)
        with initialised_from(rng):
            network = JudgeNetwork(shape).to(self.device)
        loss = JudgeLoss(network, self.pictures, config.sizes.judge_batch, rng, self.device)
        progress = self._fit("judge", network, loss)
        return Judge(network, shape), progress

    def _fit(self, name: str, model: Any, loss: Any) -> Progress:
        return fit_stage(name, model, loss, self.config, STAGE_SHARES[name], self.checkpoints, self.say)

    def facts(self, networks: Networks) -> dict[str, Any]:
        """What quality.json says about how the networks were made."""
        latent, weights = self.config.sizes.latent, learned_weights(networks)
        return run_facts(self.config, networks.progress, self.device, latent=latent, weights=weights)


def learned_weights(networks: Networks) -> int:
    """How many weights the pipeline has, without the rows of its tables for classes that are no digits."""
    blocks = networks.transformer.transformer_blocks
    tables = [block.norm1.emb.class_embedder.embedding_table for block in blocks]
    unused: int = sum((table.num_embeddings - CLASSES - 1) * table.embedding_dim for table in tables)
    return weight_count(networks.vae, networks.transformer) - unused
