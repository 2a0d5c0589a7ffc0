"""The networks of carv's own small Stable Diffusion, their losses, and the measures of its quality."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carv.clip import similarities
from carv.rng import stream
from carv.training import evaluate
from carv.training.autoencoder import AutoencoderLoss, build_autoencoder, encode, psnr, standardise
from carv.training.clip import augment, build_clip
from carv.training.config import SIZES, TrainConfig
from carv.training.data import EMPTY, all_captions, caption_number, training_pictures
from carv.training.denoiser import DenoiserLoss, build_scheduler, stratified_timesteps
from carv.training.evaluate import Judge, average, share, view_cells
from carv.training.stages import initialised_from
from carv.training.tokenizer import build_tokenizer, caption_ids
from carv.training.train import Run
from carv.world.dataset import WorldDataset, load_world

from training_runs import silent

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(cache: Path) -> WorldDataset:
    return load_world(16, 4, cache_dir=cache)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


# The networks.


def test_standardising_is_exact_and_leaves_pictures_as_they_were(world: WorldDataset) -> None:
    vae = build_autoencoder(SIZES["tiny"]).eval()
    images = world.images_float()[:8]
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        latents = encode(vae, world, CPU)
        standard = standardise(vae, latents, torch.arange(len(world)))
        after = vae.encode(images).latent_dist
        again = vae.decode(after.mean).sample
    torch.testing.assert_close(standard.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean, standard[:8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, decoded, atol=1e-4, rtol=1e-4)
    scale = latents.std(dim=(0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std * scale, before.std, atol=1e-5, rtol=1e-3)


def test_each_timestep_stratum_is_hit_once_in_an_order_of_its_own() -> None:
    first, second = (stratified_timesteps(40, stream(0, "t", i)) for i in range(2))
    assert torch.equal((first // 25).sort().values, torch.arange(40))
    assert not torch.equal(first // 25, second // 25)


def test_a_single_stratified_timestep_is_uniform_over_all_thousand() -> None:
    drawn = torch.cat([stratified_timesteps(4, stream(0, "t", i))[:1] for i in range(4000)])
    # The mean of 4000 uniform draws has a standard error of 4.6; five of them: one false alarm in 10^6.
    assert float(drawn.float().mean()) == pytest.approx(499.5, abs=23)
    assert 0 <= int(drawn.min()) < 5
    assert 995 <= int(drawn.max()) <= 999


class Oracle(nn.Module):
    """Knows that every latent is the same one, and so predicts v without error."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z
        self.seen: list[Tensor] = []

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        self.seen.append(ids)
        scheduler = build_scheduler()
        alpha = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
        noise = (noisy - alpha * self.z) / (1 - alpha**2).sqrt()
        velocity: Tensor = scheduler.get_velocity(self.z.expand_as(noise), noise, t)
        return velocity


def test_the_denoisers_target_is_the_v_of_diffusers(world: WorldDataset, tokenizer: Any) -> None:
    z = torch.randn(4, 8, 8, generator=stream(0, "z").generator())
    oracle = Oracle(z)
    model: Any = oracle
    assert build_scheduler().config.prediction_type == "v_prediction"
    loss = DenoiserLoss(
        model,
        z.expand(len(world), -1, -1, -1),
        training_pictures(world),
        caption_ids(tokenizer),
        build_scheduler().alphas_cumprod,
        16,
        0.5,
        stream(0, "denoiser"),
        CPU,
        bf16=False,
    )
    assert float(loss(3)) < 1e-5
    empty = (oracle.seen[0] == caption_ids(tokenizer)[EMPTY]).all(dim=1)
    assert 0 < int(empty.sum()) < 16


def test_augmentation_keeps_the_object_and_changes_the_pixels(world: WorldDataset) -> None:
    images = world.images_float()[:16]
    changed = augment(images, stream(0, "augment"))
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    torch.testing.assert_close(changed.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=0.15, rtol=0)


def test_weights_start_from_their_stream_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (start_of(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def start_of(seed: int) -> Tensor:
    with initialised_from(stream(seed, "training", "line")):
        return nn.Linear(3, 1).weight.detach()


def test_hues_cost_more_than_equal_errors_of_brightness(world: WorldDataset) -> None:
    """Without it, colours come hundreds of steps after shapes."""

    class Shifting(nn.Module):
        def __init__(self, shift: list[float]) -> None:
            super().__init__()
            self.vae, self.shift = build_autoencoder(SIZES["tiny"]), torch.tensor(shift)[:, None, None]

        def encode(self, images: Tensor) -> Any:
            self.images = images
            return self.vae.encode(images)

        def decode(self, z: Tensor) -> Any:
            return SimpleNamespace(sample=self.images + self.shift)

    pictures, losses = training_pictures(world), []
    for shift in ([0.1, 0.1, 0.1], [0.1, -0.1, 0.1], [0.0, 0.0, 0.0]):
        with initialised_from(stream(0, "vae")):
            model = Shifting(shift)
        losses.append(AutoencoderLoss(model, pictures, 4, stream(0, "vae"), CPU, bf16=False)(0).item())
    grey, hue, nothing = losses
    assert grey - nothing == pytest.approx(0.1 + 2 * 0.01, abs=1e-4)
    c = torch.tensor([0.1, -0.1, 0.1]) - 0.1 / 3
    assert hue - grey == pytest.approx(float(c.abs().mean() + 6 * (c**2).mean()), abs=1e-4)


def test_the_posterior_is_narrow_from_the_start_and_the_seed_reaches_every_stage(world: WorldDataset) -> None:
    with initialised_from(stream(0, "vae")):
        vae = build_autoencoder(SIZES["small"])
    posterior = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist
    assert posterior.std.mean().item() < 0.2
    runs = [Run(TrainConfig(size="tiny", seed=seed), Path(), CPU, world, silent) for seed in (0, 1)]
    assert len({run.rng(name) for run in runs for name in ("autoencoder", "denoiser", "clip")}) == 6


# The measures.


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(images + 0.2, images), torch.full((2,), 20.0))


def test_a_share_has_wilsons_interval_and_a_mean_the_error_over_objects() -> None:
    nothing = share(torch.zeros(10, dtype=torch.bool))
    assert nothing["value"] == nothing["low"] == pytest.approx(0, abs=1e-12)
    assert nothing["high"] == pytest.approx(0.2775, abs=1e-4)
    values = torch.tensor([1.0, 1.0, 3.0, 3.0])
    mean = average(values, torch.tensor([0, 0, 1, 1]))
    assert mean == {"value": 2.0, "standard_error": 1.0, "count": 2}  # not the 0.58 of four independent values


def test_r_precision_counts_a_picture_only_if_its_own_caption_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is replaced by one that reads the caption's number off the picture."""

    def reading(model: Any, images: Tensor, ids: Tensor) -> Tensor:
        return -(images[:, 0, 0, :1] - ids[:, 0]).abs()

    monkeypatch.setattr(evaluate, "similarities", reading)
    cells = view_cells()
    judge = Judge(None, torch.arange(len(all_captions()))[:, None])
    right = caption_number(*cells.T)[:, None, None, None].float().expand(-1, 3, 1, 1).clone()
    assert judge.views(right, cells)["r_precision_of_512"]["value"] == 1
    wrong_view = right.clone()
    wrong_view[::4] += 1  # front pictures look like side views
    measured = judge.views(wrong_view, cells)
    assert measured["r_precision_of_512"]["value"] == measured["view_of_4"]["value"] == 0.75
    plain = caption_number(cells[:, 0], cells[:, 1])[:, None, None, None].float().expand(-1, 3, 1, 1)
    assert judge.objects(plain, cells)["r_precision_of_128"]["value"] == 1
    assert judge.objects(plain, cells.roll(4, dims=0))["r_precision_of_128"]["value"] == 0


def test_similarities_are_those_of_the_clip_model(world: WorldDataset, tokenizer: Any) -> None:
    model = build_clip(tokenizer, SIZES["tiny"]).eval()
    images, ids = world.images_float()[::100], caption_ids(tokenizer)[::90]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=images).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(similarities(model, images, ids), logits, atol=1e-5, rtol=1e-4)
