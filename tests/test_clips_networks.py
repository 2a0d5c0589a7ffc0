"""The small video teacher's autoencoder, denoiser and judge: their batches, their losses, and what is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from carv.rng import stream
from carv.training.clips.autoencoder import AutoencoderLoss, build_autoencoder, encode, standardise
from carv.training.clips.config import CLIPS_SIZES
from carv.training.clips.denoiser import DenoiserLoss, build_scheduler, build_transformer, stratified_times
from carv.training.clips.evaluate import every_caption, judged, reconstruction
from carv.training.clips.finish import FinishLoss
from carv.training.clips.judge import ClipJudge, JudgeLoss, augment, judge_clips
from carv.training.clips.latents import LatentClips, draw_batch
from carv.training.clips.text import CAPTIONS, build_text_encoder, build_tokenizer, caption_ids
from carv.training.clips.text_loss import Reader, TextLoss, meanings
from carv.training.stages import initialised_from
from carv.world.clips import BACKGROUNDS, MOTIONS, Clips, all_captions, caption, make_clips

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU, SIZES = torch.device("cpu"), CLIPS_SIZES["tiny"]


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(12, 0)


@pytest.fixture(scope="module")
def vae() -> Any:
    with initialised_from(stream(0, "vae")):
        return build_autoencoder(SIZES).eval().requires_grad_(False)


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


# The text encoder.


def test_the_meaning_of_a_caption_is_what_it_says() -> None:
    said = [caption(d, MOTIONS[m], BACKGROUNDS[b]) for d, m, b in meanings().tolist()]
    assert said == list(CAPTIONS[1:])


def test_the_text_encoder_learns_to_say_all_of_a_caption_in_each_of_its_words() -> None:
    tokenizer = build_tokenizer()
    with initialised_from(stream(0, "reader")):
        reader = Reader(build_text_encoder(tokenizer, CLIPS_SIZES["small"]), caption_ids(tokenizer))
    loss = TextLoss(reader, 64, stream(0, "text"), CPU)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for step in range(40):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    logits, of = reader(torch.arange(1, len(CAPTIONS)))
    for part, wanted in zip(logits.split((10, len(MOTIONS), len(BACKGROUNDS)), 1), meanings().unbind(1), strict=True):
        assert (part.argmax(1) == wanted[of]).float().mean() > 0.95  # in each word, "the" among them


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
