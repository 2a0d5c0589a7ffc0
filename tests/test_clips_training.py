"""The small video teacher: every stage at a tiny size, the folder it leaves, and training again on some clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from carv.checkpoint import RunFolderError
from carv.rng import stream
from carv.teachers import small
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.small import small_wan
from carv.training.clips.autoencoder import (
    AutoencoderLoss,
    build_autoencoder,
    encode,
    standardise,
)
from carv.training.clips.card import model_card
from carv.training.clips.config import CLIPS_SIZES, ClipsConfig
from carv.training.clips.denoiser import (
    SHIFT,
    DenoiserLoss,
    FixedText,
    build_scheduler,
    build_transformer,
    stratified_times,
)
from carv.training.clips.evaluate import Sampling, every_caption, judged, load_pipeline, reconstruction, sample
from carv.training.clips.finish import FinishLoss
from carv.training.clips.judge import ClipJudge, JudgeLoss, augment, judge_clips
from carv.training.clips.latents import LatentClips, draw_batch
from carv.training.clips.retrain import FrozenParts, train_denoiser_on
from carv.training.clips.text import (
    CAPTIONS,
    LENGTH,
    build_tokenizer,
    caption_ids,
    text_states,
    words,
)
from carv.training.clips.train import Run, train
from carv.training.train import initialised_from
from carv.world.clips import MOTIONS, Clips, all_captions, make_clips

pytest.importorskip("sklearn")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU, SIZES = torch.device("cpu"), CLIPS_SIZES["tiny"]
TINY = ClipsConfig(
    size="tiny",
    clips=12,
    judge_clips=12,
    unseen_clips=6,
    autoencoder_steps=2,
    finish_steps=2,
    denoiser_steps=3,
    judge_steps=2,
    sampling_steps=1,
)


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(12, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wan")
    train(TINY, out, say=silent)
    return out


@pytest.fixture(scope="module")
def vae() -> Any:
    with initialised_from(stream(0, "vae")):
        return build_autoencoder(SIZES).eval().requires_grad_(False)


# The words.


def test_every_word_of_a_caption_is_one_token_and_other_text_falls_into_letters(tokenizer: Any) -> None:
    tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in words()]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(words())
    other = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(other) > 3
    assert tokenizer.unk_token_id not in other


def test_every_caption_fits_and_reads_back_and_the_empty_one_is_first(tokenizer: Any) -> None:
    ids = caption_ids(tokenizer)
    assert ids.shape == (len(CAPTIONS), LENGTH)
    assert CAPTIONS[0] == ""
    assert (ids[:, -1] == tokenizer.pad_token_id).all()  # nothing was cut off
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == list(CAPTIONS)


def test_training_sees_the_texts_that_the_pipeline_and_the_teacher_see(trained: Path, tokenizer: Any) -> None:
    pipeline, teacher = load_pipeline(trained, CPU), DiffusersTeacher.from_pretrained(trained, size=32, frames=9)
    states = text_states(pipeline.text_encoder, caption_ids(tokenizer))
    for number in (0, 5, 200):
        piped = pipeline.encode_prompt(
            CAPTIONS[number], do_classifier_free_guidance=False, max_sequence_length=LENGTH, device=CPU
        )[0]
        torch.testing.assert_close(states[number], piped[0])
        torch.testing.assert_close(states[number], teacher.encode_prompts([CAPTIONS[number]]).tensors["embeddings"][0])


# The autoencoder.


@pytest.mark.parametrize("size", CLIPS_SIZES)
def test_the_networks_of_every_size_can_be_built(size: str) -> None:
    with torch.device("meta"):
        vae, transformer = build_autoencoder(CLIPS_SIZES[size]), build_transformer(CLIPS_SIZES[size])
    assert vae.config.z_dim == transformer.config.in_channels == CLIPS_SIZES[size].channels


def test_latents_have_a_frame_for_the_first_frame_and_one_for_every_four_after_it(vae: Any, clips: Clips) -> None:
    for latent, picture in zip(encode(vae, clips), clips.pictures, strict=True):
        assert latent.shape == (SIZES.channels, (len(picture) - 1) // 4 + 1, 4, 4)


def test_the_autoencoder_is_causal_so_a_piece_from_the_start_has_the_same_latents(vae: Any) -> None:
    clip = make_clips(1, 0, lengths=[17]).video(0)[None]
    whole, part = (vae.encode(2 * video - 1).latent_dist.mean for video in (clip, clip[:, :, :9]))
    torch.testing.assert_close(whole[:, :, :3], part)


def test_it_starts_with_a_narrow_posterior_and_with_shortcuts_alone(vae: Any, clips: Clips) -> None:
    posterior = vae.encode(2 * clips.video(0)[None] - 1).latent_dist
    assert posterior.logvar.max() < -3
    branches = [module for module in vae.modules() if type(module).__name__ == "WanResidualBlock"]
    assert len(branches) > 5
    assert all(not branch.conv2.weight.any() for branch in branches)


def test_standardised_latents_have_unit_scale_and_are_those_of_the_teacher(clips: Clips) -> None:
    with initialised_from(stream(1, "vae")):
        vae = build_autoencoder(SIZES).eval().requires_grad_(False)
    latents = standardise(vae, encode(vae, clips))
    entries = torch.cat([latent.flatten(1) for latent in latents], dim=1)
    torch.testing.assert_close(entries.mean(dim=1), torch.zeros(SIZES.channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(entries.std(dim=1), torch.ones(SIZES.channels), atol=1e-4, rtol=0)
    for first, second in zip(encode(vae, clips), latents, strict=True):
        torch.testing.assert_close(first, second)


def test_the_autoencoders_loss_is_addressed_by_its_step_and_falls(clips: Clips) -> None:
    with initialised_from(stream(0, "loss")):
        vae = build_autoencoder(SIZES)
    loss = AutoencoderLoss(vae, clips, 2, stream(0, "loss"), CPU, bf16=False)
    first = loss(0).detach()
    assert torch.equal(first, loss(0).detach())
    assert not torch.equal(first, loss(1).detach())
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(8):
        optimiser.zero_grad()
        torch.autograd.backward(loss(0))
        optimiser.step()
    assert loss(0) < 0.9 * first


def test_an_error_weighs_eleven_times_as_much_near_the_digit_as_elsewhere() -> None:
    clips = make_clips(1, 0, lengths=[9], motions=["growing"])

    def loss(frame: int) -> float:
        wrong = 2 * clips.video(0)[None] - 1
        wrong[:, :, frame] += 0.1  # the same everywhere in a frame, so that no edge is wrong
        posterior = SimpleNamespace(mean=torch.zeros(1, 4, 3, 4, 4), logvar=torch.zeros(1, 4, 3, 4, 4))
        vae = SimpleNamespace(
            encode=lambda videos: SimpleNamespace(latent_dist=posterior),
            decode=lambda raw: SimpleNamespace(sample=wrong),
        )
        return float(FinishLoss(vae, clips, 1, stream(0, "finish"), CPU, bf16=False)(0))

    near = functional.max_pool2d(clips.masks[0][None].float(), 3, 1, 1)[0].sum(dim=(1, 2))
    share = (32 * 32 + 10 * near) / (32 * 32 + 10 * near).sum()
    for frame in (0, 8):
        assert loss(frame) == pytest.approx(float(share[frame]) * (0.1 + 2 * 0.01), rel=1e-4)
    assert loss(8) > 1.5 * loss(0)


def test_whole_clips_of_one_length_finish_the_autoencoder_and_its_loss_falls(clips: Clips) -> None:
    with initialised_from(stream(0, "finish")):
        vae = build_autoencoder(SIZES)
    shown: list[tuple[int, ...]] = []
    real = vae.encode
    vae.encode = lambda videos: shown.append(tuple(videos.shape)) or real(videos)
    loss = FinishLoss(vae, clips, 2, stream(0, "finish"), CPU, bf16=False)
    first = loss(0).detach()
    assert torch.equal(first, loss(0).detach())
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)
    for step in range(6):
        optimiser.zero_grad()
        torch.autograd.backward(loss(step))
        optimiser.step()
    assert loss(0).detach() < first
    assert {shape[2] for shape in shown} == set(clips.lengths)


# The denoiser.


def test_times_have_one_in_each_stratum_and_follow_the_shifted_uniform_law() -> None:
    for step in range(5):
        t = stratified_times(16, stream(0, "times", step), shift=3.0).double()
        u = t / (3 - 2 * t)  # the inverse of t = 3 u / (1 + 2 u)
        assert torch.equal((16 * u).floor().sort().values, torch.arange(16).double())
    scheduler = build_scheduler()  # which shifts the same way, from its own even grid
    scheduler.set_timesteps(10)
    top, bottom = 1.0, float(scheduler.sigma_min)
    even = torch.linspace(top, bottom, 10)
    torch.testing.assert_close(scheduler.sigmas[:-1], 2 * even / (1 + even), atol=1e-4, rtol=0)


def test_a_batch_has_one_length_and_every_clip_is_as_likely_as_every_other() -> None:
    lengths = {3: list(range(10)), 4: list(range(10, 13)), 5: list(range(13, 20))}
    drawn = torch.zeros(20)
    for step in range(3000):
        places = draw_batch(lengths, 4, stream(0, "batch", step))
        assert any(set(places) <= set(pool) for pool in lengths.values())
        assert len(set(places)) == len(places) <= 4
        drawn[places] += 1
    # Each is drawn with probability p = 1/5.25 a step. Four standard errors: one false alarm in 800 runs of 20 clips.
    # A law that chooses lengths by their number of clips alone draws the short list 1.3 times too rarely: 11 of them.
    p = 1 / (10 / 4 + 1 + 7 / 4)
    assert (drawn / 3000 - p).abs().max() < 4 * (p * (1 - p) / 3000) ** 0.5


class Oracle(nn.Module):
    """Knows every clip, and so the true v = (z_t - z)/t - ... of each z_t."""

    def __init__(self, data: LatentClips, error: float) -> None:
        super().__init__()
        self.by_caption = {int(number): z for number, z in zip(data.caption, data.latents, strict=True)}
        self.error, self.seen = error, []

    def forward(self, noisy: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        self.seen += caption.tolist()
        z = torch.stack([self.by_caption[int(number)] for number in caption])
        return (noisy - z) / t.view(-1, 1, 1, 1, 1) + self.error


def test_the_loss_is_flow_matching_zero_for_the_true_velocity_and_its_squared_error_otherwise() -> None:
    latents = tuple(torch.randn(4, 3, 4, 4, generator=stream(0, "z", i).generator()) for i in range(6))
    data = LatentClips(latents, torch.arange(1, 7))
    for error, wanted in ((0.0, 0.0), (0.5, 0.25)):
        loss = DenoiserLoss(Oracle(data, error), data, 4, 0.0, stream(0, "loss"), CPU)
        assert float(loss(0).detach()) == pytest.approx(wanted, abs=1e-5)
        assert float(loss(0).detach()) == float(loss(0).detach())


def test_the_share_of_empty_captions_is_dropped_and_no_clip_gets_another_ones_caption() -> None:
    z = torch.zeros(4, 3, 4, 4)
    data = LatentClips((z,) * 6, torch.arange(1, 7))
    oracle = Oracle(data, 0.0)
    oracle.by_caption[0] = z
    loss = DenoiserLoss(oracle, data, 6, 0.25, stream(0, "drop"), CPU)
    for step in range(200):
        loss(step)
    seen = torch.tensor(oracle.seen)
    # 1200 captions: five standard errors of the share.
    assert float((seen == 0).double().mean()) == pytest.approx(0.25, abs=0.0625)
    assert all(abs(int((seen == i).sum()) - 150) < 50 for i in range(1, 7))


# The judge.


def test_a_judge_learns_and_comes_back_from_its_folder_frozen(clips: Clips, tmp_path: Path) -> None:
    with initialised_from(stream(0, "judge")):
        judge = ClipJudge(8)
    loss = JudgeLoss(judge, clips, 12, stream(0, "judge"), CPU)
    before = float(loss(0).detach())
    optimiser = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        torch.autograd.backward(loss(0))
        optimiser.step()
    assert float(loss(0).detach()) < 0.8 * before
    judge.half().float().save(tmp_path)
    again = ClipJudge.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    shown = [clips.video(i)[0] for i in range(len(clips))]
    first, second = judge_clips(judge, shown), judge_clips(again, shown)
    assert torch.equal(first.digit, second.digit)
    assert torch.equal(first.motion, second.motion)


def test_a_folder_without_a_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no judge of clips"):
        ClipJudge.from_pretrained(tmp_path)


def test_augmented_clips_are_shifted_as_a_whole_and_stay_in_the_unit_interval(clips: Clips) -> None:
    pictures = clips.pictures[0][None].float() / 255
    made = augment(pictures.repeat(8, 1, 1, 1), stream(0, "augment"))
    assert made.shape == (8, *pictures.shape[1:])
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, augment(pictures.repeat(8, 1, 1, 1), stream(0, "augment")))
    assert len({float(clip.sum()) for clip in made}) == 8


# Measuring.


def test_every_caption_is_wanted_and_each_length_shows_every_motion_and_digit() -> None:
    wanted = every_caption(2)
    assert sorted(clip.caption for clip in wanted) == sorted(2 * all_captions())
    for frames in (9, 13, 17):
        some = [clip for clip in wanted if clip.frames == frames]
        assert {clip.motion for clip in some} == set(range(len(MOTIONS)))
        assert {clip.digit for clip in some} == set(range(10))


def test_shares_count_digit_motion_and_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from carv.training.clips import evaluate

    wanted = every_caption()[:4]
    right = torch.tensor([clip.digit for clip in wanted]), torch.tensor([clip.motion for clip in wanted])
    verdicts = SimpleNamespace(
        digit=right[0] + torch.tensor([0, 1, 0, 0]), motion=right[1] + torch.tensor([0, 0, 0, 1])
    )
    monkeypatch.setattr(evaluate, "judge_clips", lambda judge, clips: verdicts)
    shares = judged(ClipJudge(8), [torch.zeros(9, 32, 32)] * 4, wanted)
    assert (shares["digit"]["value"], shares["motion"]["value"], shares["both"]["value"]) == (0.75, 0.75, 0.5)


def test_psnr_is_that_of_the_error_with_a_standard_error_over_digits(clips: Clips) -> None:
    decoded = [clips.video(i) + 0.1 for i in range(len(clips))]
    found = reconstruction(decoded, clips)
    assert found["value"] == pytest.approx(20, abs=1e-3)
    assert found["count"] == len(clips.source.unique())


# The whole.


def test_the_folder_is_a_pipeline_and_a_teacher_for_every_length(trained: Path, clips: Clips) -> None:
    pipeline = load_pipeline(trained, CPU)
    how = Sampling(2, 3.0, stream(0, "samples"))
    wanted = every_caption()[:3]
    drawn = sample(pipeline, wanted, how)
    assert [clip.shape for clip in drawn] == [(clip.frames, 32, 32) for clip in wanted]
    torch.testing.assert_close(drawn, sample(pipeline, wanted, how))
    for frames, places in clips.lengths.items():
        teacher = DiffusersTeacher.from_pretrained(trained, size=32, frames=frames)
        z = teacher.encode(clips.video(places[0])[None])
        torch.testing.assert_close(z[0], encode(pipeline.vae, clips)[places[0]], atol=1e-4, rtol=1e-3)
        [noise] = teacher.predict_noise(z, torch.tensor([0.5]), [teacher.encode_prompts([clips.caption(places[0])])])
        assert noise.shape == z.shape
        assert noise.isfinite().all()


def test_a_teacher_reads_no_more_tokens_than_its_tokenizer(trained: Path) -> None:
    teacher = DiffusersTeacher.from_pretrained(trained, size=32, frames=9)
    assert teacher.encode_prompts(["the digit 3 still"]).tensors["embeddings"].shape[1] == LENGTH


def test_the_folder_holds_float16_safetensors_and_a_card_made_from_its_quality(trained: Path) -> None:
    for part in ("vae", "transformer", "text_encoder", "judge"):
        [file] = list((trained / part).glob("*.safetensors"))
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    facts = json.loads((trained / "quality.json").read_text())
    card = (trained / "README.md").read_text()
    assert card == model_card(facts)
    assert "--autoencoder-steps 2 --finish-steps 2 --denoiser-steps 3 --judge-steps 2" in card
    assert facts["quality"]["samples"]["digit"]["count"] == 240
    assert {path.name for path in (trained / "samples").iterdir()} == {"motions.gif", "strips.png"}


def test_a_second_call_trains_nothing_and_gives_the_same_networks(trained: Path, clips: Clips) -> None:
    lines: list[str] = []
    run = Run(TINY, trained / "training", CPU, clips, lines.append)
    networks = run.networks()
    assert sum("going on" in line for line in lines) == 4
    assert not any("encoding" in line for line in lines)
    saved = load_file(trained / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in networks.transformer.state_dict().items():
        assert torch.equal(tensor.half(), saved[name])


def test_another_configuration_does_not_go_on_in_the_same_folder(trained: Path) -> None:
    with pytest.raises(RunFolderError, match="other settings"):
        train(ClipsConfig(**{**vars(TINY), "seed": 1}), trained, say=silent)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"clips": 0}, "clips must be at least 1, got 0"),
        ({"judge_steps": -1}, "judge_steps must not be negative"),
        ({"drop_captions": 1.0}, "drop_captions is a share"),
        ({"size": "huge"}, "unknown size 'huge'; known sizes: tiny, small, large"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClipsConfig(**setting)


# Training again on a part.


@pytest.fixture(scope="module")
def parts(trained: Path, clips: Clips) -> FrozenParts:
    return FrozenParts.load(trained, clips)


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_same_places_and_seed_give_the_same_network_and_others_another(parts: FrozenParts) -> None:
    first = weights(train_denoiser_on([0, 1, 5], parts, steps=3, seed=0, batch=2))
    assert torch.equal(first, weights(train_denoiser_on([5, 0, 1], parts, steps=3, seed=0, batch=2)))
    assert not torch.equal(first, weights(train_denoiser_on([0, 1, 6], parts, steps=3, seed=0, batch=2)))
    assert not torch.equal(first, weights(train_denoiser_on([0, 1, 5], parts, steps=3, seed=1, batch=2)))


def test_clips_that_are_left_out_are_never_looked_at(parts: FrozenParts) -> None:
    spoiled = tuple(z if i in (2, 3) else torch.full_like(z, torch.nan) for i, z in enumerate(parts.data.latents))
    other = FrozenParts(LatentClips(spoiled, parts.data.caption), parts.states, parts.transformer)
    first, second = (weights(train_denoiser_on([2, 3], given, steps=3, seed=0)) for given in (parts, other))
    assert torch.equal(first, second)


def test_going_on_from_the_teacher_starts_at_its_weights_and_leaves_it_alone(parts: FrozenParts) -> None:
    before = weights(parts.transformer).clone()
    near = weights(train_denoiser_on([0, 1], parts, steps=1, seed=0, start="teacher", rate=1e-6))
    assert (near - before).abs().max() < 1e-5
    assert torch.equal(weights(parts.transformer), before)
    fresh = weights(train_denoiser_on([0, 1], parts, steps=1, seed=0, rate=1e-6))
    assert (fresh - before).abs().max() > 1e-2


def test_a_folder_keeps_the_training_so_that_it_is_not_done_twice(parts: FrozenParts, tmp_path: Path) -> None:
    lines: list[str] = []
    first = weights(train_denoiser_on([0], parts, steps=2, seed=0, folder=tmp_path))
    again = weights(train_denoiser_on([0], parts, steps=2, seed=0, folder=tmp_path, say=lines.append))
    assert torch.equal(first, again)
    assert "going on from step 2 of 2" in lines[0]
    with pytest.raises(RunFolderError):
        train_denoiser_on([1], parts, steps=2, seed=0, folder=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"places": []}, "at least one place"), ({"start": "zero"}, "start is 'scratch' or 'teacher', got 'zero'")],
)
def test_a_wrong_retraining_is_named(parts: FrozenParts, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train_denoiser_on(**({"places": [0], "parts": parts, "steps": 1, "seed": 0} | wrong))


def test_frozen_parts_are_the_teachers_latents_and_captions(parts: FrozenParts, trained: Path, clips: Clips) -> None:
    teacher = DiffusersTeacher.from_pretrained(trained, size=32, frames=len(clips.pictures[3]))
    torch.testing.assert_close(parts.data.latents[3], teacher.encode(clips.video(3)[None])[0], atol=1e-4, rtol=1e-3)
    assert CAPTIONS[int(parts.data.caption[3])] == clips.caption(3)
    v = FixedText(parts.transformer, parts.states)(
        parts.data.latents[3][None], torch.tensor([0.5]), parts.data.caption[3:4]
    )
    [eps] = teacher.predict_noise(
        parts.data.latents[3][None], torch.tensor([0.5]), [teacher.encode_prompts([clips.caption(3)])]
    )
    torch.testing.assert_close(parts.data.latents[3][None] + 0.5 * v, eps, atol=1e-4, rtol=1e-3)


# The one that ships.


@pytest.fixture(scope="module")
def shipped() -> Path:
    return small_wan()


def test_the_package_holds_the_pipeline_as_data_and_no_pickles(shipped: Path) -> None:
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".gif", ".png"}
    assert sum(path.stat().st_size for path in files) < 10e6


def test_its_card_is_made_from_its_measured_quality(shipped: Path) -> None:
    facts = json.loads((shipped / "quality.json").read_text())
    assert (shipped / "README.md").read_text() == model_card(facts)


def test_it_reads_the_words_that_its_captions_have(shipped: Path, tokenizer: Any) -> None:
    saved = json.loads((shipped / "tokenizer" / "tokenizer.json").read_text())
    assert saved["model"]["vocab"] == json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]


def test_its_samples_move_as_asked_for(shipped: Path) -> None:
    wanted = [clip for clip in every_caption() if clip.frames == 9 and clip.background == 0][:16]
    drawn = sample(load_pipeline(shipped, CPU), wanted, Sampling(12, 4.0, stream(0, "shipped")))
    shares = judged(ClipJudge.from_pretrained(shipped / "judge"), drawn, wanted)
    # A pipeline with half of the motions right has so many 1 time in 10, one that guesses never.
    assert shares["motion"]["value"] >= 11 / 16


def test_its_noise_predictions_are_better_under_a_clips_own_caption(shipped: Path) -> None:
    clips = make_clips(16, 0, lengths=[9], backgrounds=["plain"])
    teacher = DiffusersTeacher.from_pretrained(shipped, size=32, frames=9)
    assert teacher.schedule.continuous
    assert teacher.schedule.shift == SHIFT
    z = teacher.encode(torch.stack([clips.video(i) for i in range(16)]))
    assert float(z.std()) == pytest.approx(1, abs=0.3)
    noise = torch.randn(z.shape, generator=stream(0, "noise").generator())
    t = torch.full((16,), 0.8)
    own = teacher.encode_prompts([clips.caption(i) for i in range(16)])
    other = teacher.encode_prompts([clips.caption((i + 5) % 16) for i in range(16)])
    z_t = teacher.schedule.add_noise(z, t, noise)
    errors = [
        (predicted - noise).square().mean(dim=(1, 2, 3, 4)) for predicted in teacher.predict_noise(z_t, t, [own, other])
    ]
    difference = (errors[1] - errors[0]).double()
    assert difference.mean() > 2 * difference.std() / len(difference) ** 0.5


def test_a_package_without_its_data_says_how_to_get_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small, "__file__", str(tmp_path / "small.py"))
    with pytest.raises(FileNotFoundError, match="train one with `carv teachers train clips"):
        small_wan()
