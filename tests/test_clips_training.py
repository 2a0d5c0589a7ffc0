"""The small video teacher trained as a whole at a tiny size, the folder it leaves, and training again on some clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carv.checkpoint import RunFolderError
from carv.rng import stream
from carv.teachers.diffusers import DiffusersTeacher
from carv.training.clips.autoencoder import encode
from carv.training.clips.card import model_card
from carv.training.clips.config import CLIPS_SIZES, ClipsConfig
from carv.training.clips.denoiser import Denoiser
from carv.training.clips.evaluate import Sampling, every_caption, load_pipeline, sample
from carv.training.clips.latents import LatentClips
from carv.training.clips.retrain import FrozenParts, train_denoiser_on
from carv.training.clips.text import CAPTIONS, LENGTH, build_tokenizer, caption_ids, text_states, words
from carv.training.clips.train import Run, train
from carv.world.clips import Clips, make_clips

from training_runs import silent

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU, SIZES = torch.device("cpu"), CLIPS_SIZES["tiny"]
TINY = ClipsConfig(
    size="tiny",
    clips=12,
    judge_clips=12,
    unseen_clips=6,
    autoencoder_steps=2,
    finish_steps=2,
    text_steps=2,
    denoiser_steps=3,
    judge_steps=2,
    sampling_steps=1,
)


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
    assert "--autoencoder-steps 2 --finish-steps 2 --text-steps 2 --denoiser-steps 3 --judge-steps 2" in card
    assert facts["quality"]["samples"]["digit"]["count"] == 240
    assert {path.name for path in (trained / "samples").iterdir()} == {"motions.gif", "strips.png"}


def test_a_second_call_trains_nothing_and_gives_the_same_networks(trained: Path, clips: Clips) -> None:
    lines: list[str] = []
    run = Run(TINY, trained / "training", CPU, clips, lines.append)
    networks = run.networks()
    assert sum("going on" in line for line in lines) == 5
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
    v = Denoiser(parts.transformer, parts.states)(
        parts.data.latents[3][None], torch.tensor([0.5]), parts.data.caption[3:4]
    )
    [eps] = teacher.predict_noise(
        parts.data.latents[3][None], torch.tensor([0.5]), [teacher.encode_prompts([clips.caption(3)])]
    )
    torch.testing.assert_close(parts.data.latents[3][None] + 0.5 * v, eps, atol=1e-4, rtol=1e-3)
