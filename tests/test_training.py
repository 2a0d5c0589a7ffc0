"""carv's own small Stable Diffusion trained as a whole at a tiny size, and the folder that it leaves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carv.checkpoint import RunFolderError
from carv.cli import main
from carv.devices import find_device
from carv.training import loop
from carv.training.autoencoder import build_autoencoder
from carv.training.config import SIZES, TrainConfig
from carv.training.data import HELD_OUT
from carv.training.denoiser import Denoiser
from carv.training.tokenizer import build_tokenizer
from carv.training.train import train

from training_runs import killed, silent

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TINY = TrainConfig(
    size="tiny", views=4, autoencoder_steps=6, denoiser_steps=6, clip_steps=6, sampling_steps=1, samples_per_prompt=1
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


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
