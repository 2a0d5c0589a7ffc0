"""carv's own small Stable Diffusion: every stage at a tiny size, stops and resumptions, and the folder it leaves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from carv.checkpoint import RunFolderError
from carv.cli import main
from carv.clip import similarities
from carv.devices import find_device
from carv.rng import stream
from carv.training import evaluate, loop
from carv.training.autoencoder import AutoencoderLoss, build_autoencoder, encode, psnr, standardise
from carv.training.clip import augment, build_clip
from carv.training.config import SIZES, TrainConfig
from carv.training.data import (
    EMPTY,
    HELD_OUT,
    all_captions,
    all_pictures,
    caption_number,
    draw_captions,
    held_out,
    training_pictures,
)
from carv.training.denoiser import Denoiser, DenoiserLoss, build_scheduler, stratified_timesteps
from carv.training.evaluate import Judge, average, share, view_cells
from carv.training.loop import Stage, fit, learning_rate, recent_loss
from carv.training.tokenizer import LENGTH, WORDS, build_tokenizer, byte_pairs, caption_ids
from carv.training.train import Run, initialised_from, train
from carv.world.cameras import VIEW_WORDS
from carv.world.captions import parse_prompt
from carv.world.dataset import WorldDataset, load_world
from carv.world.shapes import COLOURS, SHAPES

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TINY = TrainConfig(
    size="tiny", views=4, autoencoder_steps=6, denoiser_steps=6, clip_steps=6, sampling_steps=1, samples_per_prompt=1
)
CPU = torch.device("cpu")


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(cache: Path) -> WorldDataset:
    return load_world(16, 4, cache_dir=cache)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARV_CACHE", str(cache))
        flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in vars(TINY).items() if name != "bf16")
        main(["teachers", "train", "world", "--out", str(out), "--bf16", *itertools.chain(*flags)])
    return out


# The words.


def test_every_known_word_is_one_token_of_its_own(tokenizer: Any) -> None:
    tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(WORDS)


def test_a_word_from_elsewhere_falls_into_letters_and_none_is_unknown(tokenizer: Any) -> None:
    ids = tokenizer("zebra 7 é", add_special_tokens=False).input_ids
    assert len(ids) > 3
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "zebra7é"


def test_every_caption_fits_and_reads_back(tokenizer: Any) -> None:
    ids = caption_ids(tokenizer)
    assert ids.shape == (len(all_captions()), LENGTH)
    assert (ids[:, -1] == tokenizer.eos_token_id).all()  # nothing was cut off: padding is the end token
    for caption, row in zip(all_captions(), ids, strict=True):
        read = tokenizer.decode(row, skip_special_tokens=True).replace(" , ", ", ")
        assert read == caption


def test_merges_applied_in_order_spell_every_word() -> None:
    merges = byte_pairs(WORDS)
    assert len(set(merges)) == len(merges)
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == (left, right):
                    symbols[i : i + 2] = [left + right]
                i += 1
        assert symbols == [word + "</w>"]


# The data.


def test_a_captions_number_is_its_place_among_all(world: WorldDataset) -> None:
    captions = all_captions()
    assert len(set(captions)) == len(captions) == 1 + len(SHAPES) * (len(COLOURS) + 1) * (len(VIEW_WORDS) + 1)
    numbers = caption_number(world.shape, world.colour, world.view)
    for i in range(0, len(world), 37):
        said = parse_prompt(captions[numbers[i]])
        assert (said.shape, said.colour) == (list(SHAPES)[world.shape[i]], list(COLOURS)[world.colour[i]])
        assert said.view == VIEW_WORDS[world.view[i]]


def test_drawn_captions_are_true_and_come_in_their_shares(world: WorldDataset) -> None:
    which = torch.arange(len(world)).repeat(20)  # 10240 captions: shares have standard errors below 0.005
    captions = all_captions()
    said = [parse_prompt(captions[n]) for n in draw_captions(world, which, 0.1, stream(0, "captions")).tolist()]
    named = [prompt for prompt in said if prompt.shape is not None]
    # Four standard errors: a false alarm once in 16,000 runs; shares that are off by 0.04 are always caught.
    assert len(named) / len(said) == pytest.approx(0.9, abs=0.02)
    assert sum(p.view is not None for p in named) / len(named) == pytest.approx(0.6, abs=0.02)
    assert sum(p.colour is None for p in named) / len(named) == pytest.approx(0.05, abs=0.02)
    for i, prompt in zip(which.tolist(), said, strict=True):
        assert prompt.shape in (None, list(SHAPES)[world.shape[i]])
        assert prompt.colour in (None, list(COLOURS)[world.colour[i]])
        assert prompt.view in (None, VIEW_WORDS[world.view[i]])


def test_held_out_objects_are_never_drawn_and_everything_else_is_once_an_epoch(world: WorldDataset) -> None:
    pictures = training_pictures(world)
    assert len(pictures.pool) == len(world) - 4 * len(HELD_OUT)
    each = len(pictures.pool) // 10
    drawn = torch.cat([pictures.batch(step, 10, stream(0, "data")) for step in range(each)])
    assert not held_out(world)[drawn].any()
    assert len(drawn.unique()) == len(drawn) == 10 * each
    again = torch.cat([pictures.batch(each + step, 10, stream(0, "data")) for step in range(each)])
    assert not torch.equal(again, drawn)  # another epoch, another order


def test_held_out_objects_use_each_shape_and_colour_once_at_most() -> None:
    assert len({shape for shape, _ in HELD_OUT}) == len(HELD_OUT) == len({colour for _, colour in HELD_OUT})
    assert ("chair", "red") not in HELD_OUT


def test_a_distinct_batch_repeats_no_caption_and_varies(world: WorldDataset) -> None:
    pictures, keys = all_pictures(world), caption_number(world.shape, world.colour)
    first, second = (pictures.distinct_batch(keys, 50, stream(0, "distinct", i)) for i in range(2))
    assert len(keys[first].unique()) == len(first) == 50
    assert not torch.equal(keys[first], keys[second])
    everything = pictures.distinct_batch(keys, 1000, stream(0, "distinct", 2))
    assert len(everything) == 128  # there are no more captions


# The loop.


def line_fit(steps: int, rate: float = 0.1, minutes: float = 1.0) -> Stage:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step: int) -> Tensor:
        x = torch.randn(8, 3, generator=stream(0, "line", step).generator())
        return ((model(x)[:, 0] - x.sum(dim=1)) ** 2).mean()

    return Stage("line", model, loss, rate, steps, minutes)


class Killed(BaseException):
    pass


def killed(monkeypatch: pytest.MonkeyPatch, saves: int, work: Callable[[], Any]) -> None:
    """Do the work until the process dies, right after it has saved so many checkpoints."""
    real, calls = loop.save_checkpoint, 0

    def save(*args: Any) -> None:
        nonlocal calls
        real(*args)
        calls += 1
        if calls == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with pytest.raises(Killed):
            work()


def test_a_killed_stage_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = line_fit(40), line_fit(40)
    straight = fit(whole, tmp_path / "a", "{}", silent)
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)
    killed(monkeypatch, 17, lambda: fit(broken, tmp_path / "b", "{}", silent))
    resumed = line_fit(40)
    lines: list[str] = []
    progress = fit(resumed, tmp_path / "b", "{}", lines.append)
    assert lines[0] == "line: going on from step 17 of 40"
    assert progress.losses == straight.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_stage_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    first = line_fit(10)
    fit(first, tmp_path, "{}", silent)
    again = line_fit(10)
    assert fit(again, tmp_path, "{}", silent).done == 10
    assert torch.equal(first.model.weight, again.model.weight)


def test_the_minutes_decide_the_steps_once_and_a_resumed_run_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))  # three looks at the clock a step or fewer: each timed step takes one second
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    killed(monkeypatch, 1, lambda: fit(line_fit(0, minutes=2.0), tmp_path, "{}", silent))
    lines: list[str] = []
    progress = fit(line_fit(0, minutes=2.0), tmp_path, "{}", lines.append)
    assert lines[0] == "line: going on from step 25 of 120"
    assert (progress.done, progress.planned) == (120, 120)


def test_timed_steps_have_rates_that_do_not_depend_on_the_plan() -> None:
    for step in range(loop._TIMED.stop):
        assert len({learning_rate(step, planned, 0.1) for planned in (0, 30, 5000)}) == 1
    rates = [learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert max(rates) == rates[99] == rates[100] == 0.1
    assert rates[-1] == pytest.approx(0.1 / 900)


def test_the_model_ends_with_the_averaged_weights(tmp_path: Path) -> None:
    stage = line_fit(300)
    progress = fit(stage, tmp_path, "{}", silent)
    assert torch.equal(stage.model.weight, progress.average["weight"])
    assert stage.model.weight.sub(1).abs().max() < 0.05  # it learned the line
    assert not stage.model.training
    assert not stage.model.weight.requires_grad


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    fit(line_fit(5), tmp_path, '{"seed": 0}', silent)
    with pytest.raises(RunFolderError, match="other settings"):
        fit(line_fit(5), tmp_path, '{"seed": 1}', silent)


def test_a_loss_that_is_not_finite_stops_the_stage_with_one_sentence(tmp_path: Path) -> None:
    stage = line_fit(5)
    broken = Stage("line", stage.model, lambda step: stage.loss(step) / 0, 0.1, 5, 1.0)
    with pytest.raises(ValueError, match="loss of the line is inf at step 0; lower its learning rate"):
        fit(broken, tmp_path, "{}", silent)
    assert not (tmp_path / "line").exists()


def test_the_recent_loss_has_the_standard_error_of_its_mean() -> None:
    mean, error = recent_loss([9.0, 1.0, 2.0, 3.0], count=3)
    assert (mean, error) == (2.0, pytest.approx(1 / 3**0.5))


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


# The whole.


def test_the_folder_is_a_pipeline_that_diffusers_loads_and_samples_from(trained: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(trained, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None
    picture = pipeline("a red chair, side view", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 16, 16)
    assert torch.isfinite(picture).all()


def test_the_saved_clip_is_loaded_with_its_processor(trained: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(trained / "clip", local_files_only=True)
    model = CLIPModel.from_pretrained(trained / "clip", local_files_only=True, dtype=torch.float32)
    batch = processor(
        text=["a red chair"], images=[Image.new("RGB", (40, 40), "white")], padding="max_length", return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert batch["pixel_values"].min() == 1  # white is 1 in [-1, 1]
    assert torch.isfinite(model(**batch).logits_per_image).all()


def test_weights_are_float16_safetensors_and_nothing_is_pickled(trained: Path) -> None:
    from safetensors import safe_open

    files = [path for path in trained.rglob("*.safetensors") if "training" not in path.parts]
    assert len(files) == 4
    for path in files:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not [path for path in trained.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


def test_the_card_says_how_it_was_made_and_every_figure_has_its_error(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    assert "--autoencoder-steps 6 --denoiser-steps 6 --clip-steps 6" in card
    assert all(f"{colour} {shape}" in card for shape, colour in HELD_OUT)
    rows = [line for line in card.splitlines() if line.startswith("|") and any(mark in line for mark in "%±")]
    assert len(rows) == 3
    assert all(row.count("[") == 3 for row in rows)
    facts = json.loads((trained / "quality.json").read_text())
    assert facts["quality"]["held_out"]["r_precision_of_128"]["count"] == len(HELD_OUT)
    assert facts["quality"]["trained"]["r_precision_of_512"]["count"] == 4 * (128 - len(HELD_OUT))


def test_a_run_killed_in_every_stage_ends_with_the_same_weights(
    trained: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARV_CACHE", str(cache))
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)
    for _ in range(3):  # each time five steps further: in the autoencoder, the denoiser, and CLIP
        killed(monkeypatch, 5, lambda: train(TINY, tmp_path, say=silent))
    train(TINY, tmp_path, say=silent)
    names = [path.relative_to(trained) for path in trained.rglob("*.safetensors") if "training" not in path.parts]
    assert len(names) == 4
    for name in names:
        first, second = load_file(trained / name), load_file(tmp_path / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    figures = [json.loads((folder / "quality.json").read_text())["quality"] for folder in (trained, tmp_path)]
    assert figures[0] == figures[1]


def test_other_settings_are_refused_unless_told_to_start_again(trained: Path) -> None:
    other = TrainConfig(**{**vars(TINY), "seed": 1})
    with pytest.raises(RunFolderError, match="--overwrite"):
        train(other, trained, say=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"views": 0}, "views must be at least 1"),
        ({"clip_steps": -1}, "clip_steps must not be negative"),
        ({"drop_captions": 1.0}, "drop_captions is a share"),
        ({"size": "huge"}, "unknown size 'huge'"),
    ],
)
def test_bad_settings_get_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_and_auto_does_without() -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        find_device("cuda")
    assert find_device("auto") == CPU


def test_the_default_pipeline_is_small_enough_to_ship(tokenizer: Any) -> None:
    from carv.training.denoiser import build_text_encoder, build_unet

    sizes = SIZES["small"]
    parts = [build_autoencoder(sizes), Denoiser(build_unet(sizes), build_text_encoder(tokenizer, sizes))]
    megabytes = 2 * sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6
    assert 5 < megabytes < 15
