"""The small Stable Diffusion that ships with the package: it is there, it is what its card says, and it teaches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from carv.clip import Clip
from carv.rng import stream
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.run import run
from carv.tasks.sds.train import Trainer, load_teacher
from carv.teachers import small
from carv.training.card import model_card
from carv.training.evaluate import Sampling, load_pipeline, sample
from carv.training.tokenizer import build_tokenizer
from carv.world.captions import Prompt
from carv.world.shapes import COLOURS, SHAPES

PROMPTS = ["a red chair", "a green tree", "a blue lamp", "a purple duck"]  # the last is held out


def test_the_package_holds_the_pipeline_as_data_and_no_pickles() -> None:
    files = [path for path in small.small_pipeline().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 15e6


def test_its_card_is_made_from_its_measured_quality() -> None:
    facts = json.loads((small.small_pipeline() / "quality.json").read_text())
    assert (small.small_pipeline() / "README.md").read_text() == model_card(facts)


def test_a_package_without_its_data_says_how_to_get_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small, "__file__", str(tmp_path / "small.py"))
    with pytest.raises(FileNotFoundError, match="train one with `carv teachers train"):
        small.small_pipeline()


def test_it_reads_the_captions_that_its_world_has() -> None:
    saved = json.loads((small.small_pipeline() / "tokenizer" / "tokenizer.json").read_text())
    assert saved["model"]["vocab"] == build_tokenizer().get_vocab()


def test_its_samples_show_what_was_asked_for_also_where_that_was_held_out() -> None:
    pipeline = load_pipeline(small.small_pipeline(), torch.device("cpu"))
    pictures = sample(pipeline, PROMPTS, Sampling(8, 4.0, stream(0, "samples")))
    captions = [str(Prompt(colour, shape)) for shape in SHAPES for colour in COLOURS]
    cosines = Clip.from_pretrained(small.small_clip()).similarities((pictures + 1) / 2, captions)
    found = [captions[i] for i in cosines.argmax(dim=1).tolist()]
    assert found == PROMPTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_default_teacher_of_a_text_to_3d_run_in_either_precision(dtype: Any) -> None:
    config = SDSConfig(PROMPTS[0], EstimatorConfig(renoise=2), samples=4, teacher_dtype=dtype)
    trainer = Trainer(config, load_teacher(config))
    before = [parameter.detach().clone() for parameter in trainer.task.parameters]
    estimate = trainer.step()
    assert estimate.f_mean.shape == (1, 4, 16, 16)
    assert not all(map(torch.equal, trainer.task.parameters, before))


def test_loading_prints_nothing_that_is_not_carvs_and_leaves_the_bars_of_others_on(capfd: Any) -> None:
    logs = [pytest.importorskip(f"{package}.utils.logging") for package in ("transformers", "diffusers")]
    shown = [log.is_progress_bar_enabled() for log in logs]
    load_teacher(SDSConfig(PROMPTS[0]))
    load_pipeline(small.small_pipeline(), torch.device("cpu"))
    Clip.from_pretrained(small.small_clip())
    assert "Loading" not in capfd.readouterr().err
    assert [log.is_progress_bar_enabled() for log in logs] == shown


def test_another_judge_scores_a_finished_run_without_training_again(tmp_path: Path) -> None:
    config = SDSConfig(
        PROMPTS[0], EstimatorConfig(renoise=1), steps=1, field="voxel", resolution=8, samples=4, clip="none"
    )
    assert run(config, tmp_path, quiet=True)["clip"] is None
    again = run(dataclasses.replace(config, clip="small"), tmp_path, quiet=True)
    assert again["clip"]["captions"] == 128
    assert again["seconds_per_step"] is None


def test_the_exact_teacher_has_one_precision() -> None:
    with pytest.raises(ValueError, match="computes in float32, not in bfloat16"):
        load_teacher(SDSConfig(PROMPTS[0], teacher="world", teacher_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("teacher", "given", "scale"), [("world", None, 3.0), ("small", None, 5.0), ("small", 7.5, 7.5)]
)
def test_the_default_guidance_scale_is_that_of_the_teacher(teacher: str, given: float | None, scale: float) -> None:
    assert SDSConfig(PROMPTS[0], teacher=teacher, guidance_scale=given).scale == scale
