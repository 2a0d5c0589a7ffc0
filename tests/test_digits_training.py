"""carv's own small DiT on real digits: trained as a whole at a tiny size, the folder it leaves, and what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carv.checkpoint import RunFolderError
from carv.judge import Judge
from carv.rng import stream
from carv.teachers import small
from carv.teachers.diffusers import DiffusersTeacher
from carv.training import loop
from carv.training.digits.card import model_card
from carv.training.digits.config import GUIDANCE_SCALES, DigitsConfig
from carv.training.digits.denoiser import NULL_CLASS, build_scheduler
from carv.training.digits.evaluate import load_pipeline, sample
from carv.training.digits.train import train
from carv.world.digits import load_digits

from training_runs import killed, silent

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

TINY = DigitsConfig(
    size="tiny", autoencoder_steps=6, denoiser_steps=6, judge_steps=6, sampling_steps=1, samples_per_class=3
)
CPU = torch.device("cpu")


# The whole run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    train(TINY, out, say=silent)
    return out


def test_the_pipeline_of_diffusers_and_carvs_teacher_both_read_the_folder(trained: Path) -> None:
    pipeline = load_pipeline(trained, CPU)
    assert pipeline.get_label_ids(["3", "0"]) == [3, 0]
    asked = torch.tensor([3, 0, 3])
    together = sample(pipeline, asked, 2, 1.5, stream(0, "samples"))
    assert together.shape == (3, 3, 16, 16)
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    torch.testing.assert_close(sample(pipeline, asked[:1], 2, 1.5, stream(0, "samples")), together[:1])
    teacher = DiffusersTeacher.from_pretrained(trained)
    assert teacher.latent_shape == (4, 8, 8)
    assert teacher.picture_shape == (3, 16, 16)
    z, t = torch.randn(2, 4, 8, 8, generator=stream(0, "z").generator()), torch.tensor([10, 900])
    conditions = [teacher.encode_prompts([name] * 2) for name in ("", "3", "57")]
    empty, three, no_digit = teacher.predict_noise(z, t, conditions)
    assert torch.equal(empty, no_digit)
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(table[57], table[NULL_CLASS])
    assert table[NULL_CLASS].abs().sum() > 0
    expected = pipeline.transformer(z, timestep=t, class_labels=torch.tensor([3, 3])).sample
    noise = build_scheduler().get_velocity  # v = alpha eps - sigma z, so eps = alpha v + sigma z_t
    torch.testing.assert_close(three, noise(-z, expected, t), atol=1e-4, rtol=1e-4)


def test_latents_of_the_saved_autoencoder_have_unit_scale_in_each_channel(trained: Path) -> None:
    teacher = DiffusersTeacher.from_pretrained(trained)
    latents = teacher.encode(load_digits("train").floats()[:400])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert latents.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.1


def test_weights_are_float16_safetensors_and_nothing_is_pickled(trained: Path) -> None:
    files = [path for path in trained.rglob("*") if path.is_file() and "training" not in path.parts]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sorted(path.parent.name for path in weights) == ["judge", "transformer", "vae"]
    assert all(tensor.dtype == torch.float16 for path in weights for tensor in load_file(path).values())


def test_the_card_says_how_it_was_made_and_every_figure_has_its_error(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    assert "--autoencoder-steps 6 --denoiser-steps 6 --judge-steps 6" in card
    assert "CC BY 4.0" in card
    rows = [line for line in card.splitlines() if line.startswith(("| class acc", "| Frechet", "| divers", "| nearer"))]
    assert len(rows) == 5
    for row in rows:
        cells = [cell for cell in row.split("|")[2:-1] if cell.strip()]
        assert len(cells) >= len(GUIDANCE_SCALES)
        assert all("[" in cell or "+-" in cell for cell in cells)
    assert "nan" not in card


def test_a_run_killed_in_every_stage_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)
    for _ in range(3):  # each time five steps further: in the autoencoder, the transformer, and the judge
        killed(monkeypatch, 5, lambda: train(TINY, tmp_path, say=silent))
    train(TINY, tmp_path, say=silent)
    for part in ("vae", "transformer", "judge"):
        [name] = [path.relative_to(trained) for path in (trained / part).glob("*.safetensors")]
        first, second = load_file(trained / name), load_file(tmp_path / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    figures = [json.loads((folder / "quality.json").read_text())["quality"] for folder in (trained, tmp_path)]
    assert figures[0] == figures[1]


def test_other_settings_are_refused_unless_told_to_start_again(trained: Path) -> None:
    with pytest.raises(RunFolderError, match="--overwrite"):
        train(DigitsConfig(**{**vars(TINY), "seed": 1}), trained, say=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1"),
        ({"samples_per_class": 2}, "at least 3 to have errors"),
        ({"judge_steps": -1}, "judge_steps must not be negative"),
        ({"drop_classes": 1.0}, "drop_classes is a share"),
        ({"size": "huge"}, "unknown size 'huge'"),
    ],
)
def test_bad_settings_get_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**settings)


# What ships.


def test_the_package_holds_the_dit_as_data_and_its_card_is_made_from_its_measured_quality() -> None:
    folder = small.small_dit()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) < 8e6
    assert (folder / "samples.png").stat().st_size < 60_000
    assert (folder / "README.md").read_text() == model_card(json.loads((folder / "quality.json").read_text()))


def test_a_package_without_the_dit_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small, "__file__", str(tmp_path / "small.py"))
    with pytest.raises(FileNotFoundError, match="`carv teachers train digits --out DIR`"):
        small.small_dit()


def test_the_shipped_judge_knows_digits_that_it_has_not_seen() -> None:
    test = load_digits("test")
    found = Judge.from_pretrained(small.small_dit() / "judge").probabilities(test.floats()).argmax(dim=1)
    assert float((found == test.label).float().mean()) > 0.97


def test_the_shipped_dit_draws_the_digit_asked_for() -> None:
    folder = small.small_dit()
    asked = torch.arange(10).repeat(3)
    pictures = sample(load_pipeline(folder, CPU), asked, 10, 2.0, stream(0, "shipped"))
    found = Judge.from_pretrained(folder / "judge").probabilities(pictures).argmax(dim=1)
    assert int((found == asked).sum()) >= 27


def test_the_shipped_autoencoder_gives_pictures_back() -> None:
    teacher = DiffusersTeacher.from_pretrained(small.small_dit())
    pictures = load_digits("test").floats()[:50]
    error = (teacher.decode(teacher.encode(pictures)) - pictures).square().mean()
    assert float(-10 * error.log10()) > 28


def test_classes_that_are_no_digits_are_the_shipped_teachers_null_class() -> None:
    teacher = DiffusersTeacher.from_pretrained(small.small_dit())
    z, t = torch.randn(1, 4, 8, 8, generator=stream(0, "z").generator()), torch.tensor([700])
    empty, three, no_digit = teacher.predict_noise(z, t, [teacher.encode_prompts([name]) for name in ("", "3", "57")])
    assert torch.equal(empty, no_digit)
    assert not torch.allclose(empty, three, atol=1e-2)
