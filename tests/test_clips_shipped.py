"""The small video teacher that ships: plain data, its card, and motions as asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from carv.rng import stream
from carv.teachers import small
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.small import small_wan
from carv.training.clips.card import model_card
from carv.training.clips.config import CLIPS_SIZES
from carv.training.clips.denoiser import SHIFT
from carv.training.clips.evaluate import Sampling, every_caption, judged, load_pipeline, sample
from carv.training.clips.judge import ClipJudge
from carv.training.clips.text import build_tokenizer
from carv.world.clips import make_clips

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU, SIZES = torch.device("cpu"), CLIPS_SIZES["tiny"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


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
