"""CLIP as a judge: the same numbers as transformers' own processor and model, and folders read as data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carv.clip import Clip, Preprocessing, average, clip_score, r_precision, share
from carv.rng import stream
from carv.tasks.sds.alignment import PromptAlignment, load_clip, scoring_cameras
from carv.tasks.sds.evaluate import held_out
from carv.training.tokenizer import build_tokenizer
from carv.world.captions import HELD_OUT, Prompt, object_captions
from carv.world.render import render_object

pytest.importorskip("transformers")

CAPTIONS = ["a red chair", "a blue car, side view", "an orange cup", "seven zebras"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 32 pixels in patches of 8 with random weights, saved as users save theirs."""
    import transformers

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        same = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        # Weights of CLIP's own scale make every picture look alike; with larger ones cosines range widely.
        same |= {"projection_dim": 24, "initializer_range": 0.1, "initializer_factor": 4.0}
        text = same | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
        text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        vision = same | {"image_size": 32, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config).eval()
    out = tmp_path_factory.mktemp("clip")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_settings(out, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3})
    return out


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip.from_pretrained(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def smooth(height: int, width: int, count: int = 6) -> Tensor:
    """Random pictures of whole bytes in [0, 1], with edges."""
    coarse = torch.rand(count, 3, 6, 5, generator=stream(0, "pictures").generator())
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return (255 * fine).round() / 255


def by_pillow(images: Tensor, settings: dict[str, Any]) -> Tensor:
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    arrays = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    processor = CLIPImageProcessorPil(**settings)
    return processor([Image.fromarray(array) for array in arrays], return_tensors="pt").pixel_values


# The numbers.


PILLOW = {
    "clip": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "bilinear": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "square": {"size": {"height": 32, "width": 32}, "do_center_crop": False, "image_std": [0.5] * 3, "crop_size": None},
    "scaled": {"size": {"shortest_edge": 32}, "crop_size": 32, "do_normalize": False, "rescale_factor": 1 / 127.5},
}


@pytest.mark.parametrize("shape", [(64, 64), (20, 20), (48, 80), (32, 32)])
@pytest.mark.parametrize("name", PILLOW)
def test_pictures_are_prepared_as_by_pillow_up_to_its_rounding(name: str, shape: tuple[int, int]) -> None:
    prepare, images = Preprocessing.from_dict(PILLOW[name]), smooth(*shape)
    expected, found = by_pillow(images, PILLOW[name]), prepare(images)
    assert found.shape == expected.shape == (6, 3, 32, 32)
    # Pillow rounds to bytes after each of its two passes: half a byte each, and a little for its fixed point.
    byte = prepare.scale / 255 / min(prepare.std)
    untouched = shape == (32, 32) and name != "bilinear"
    assert float((found - expected).abs().max()) <= (1e-5 if untouched else 1.1 * byte)


def test_a_tall_picture_keeps_its_proportions_and_its_middle() -> None:
    prepare, images = Preprocessing.from_dict(PILLOW["clip"]), smooth(97, 50)
    assert float((prepare(images) - by_pillow(images, PILLOW["clip"])).abs().max()) <= 1.1 / 255 / min(prepare.std)


def test_similarities_are_those_of_transformers_processor_and_model(folder: Path, clip: Clip) -> None:
    from transformers import CLIPModel

    images = smooth(64, 64)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = build_tokenizer()(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=by_pillow(images, settings)).logits_per_image / model.logit_scale.exp()
        exact = model(**tokens, pixel_values=clip.preprocess(images)).logits_per_image / model.logit_scale.exp()
    found = clip.similarities(images, CAPTIONS)
    assert found.dtype == torch.float32
    assert float(found.std(dim=0).min()) > 0.05, "pictures differ, so that agreement means something"
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, logits, atol=5e-3, rtol=0)  # Pillow's bytes, 0.4% each, random


def test_a_pictures_and_a_captions_number_does_not_depend_on_their_company(clip: Clip) -> None:
    images = smooth(40, 40, 5)
    whole = clip.similarities(images, CAPTIONS)
    alone = torch.cat([clip.similarities(images[i : i + 1], CAPTIONS) for i in range(5)])
    single = torch.cat([clip.similarities(images, [caption]) for caption in CAPTIONS], dim=1)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=0)


def test_the_clip_score_is_that_of_torchmetrics_where_no_cosine_is_negative() -> None:
    cosines = torch.tensor([0.31, 0.0, 0.27, -0.2])
    assert clip_score(cosines).tolist() == pytest.approx([31, 0, 27, 0])
    assert float(clip_score(cosines[:3]).mean()) == pytest.approx(float((100 * cosines[:3]).mean().clamp(min=0)))


def test_a_hit_is_the_own_caption_alone_in_first_place() -> None:
    cosines = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.3], [float("nan")] * 3, [0.3, 0.2, 0.1]])
    assert r_precision(cosines, torch.tensor([1, 0, 0, 2])).tolist() == [True, False, False, False]


def test_views_of_one_object_are_one_observation_of_a_mean() -> None:
    hits = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]) == 1
    assert average(hits.float(), torch.arange(8) // 4) == {"value": 0.5, "standard_error": 0.5, "count": 2}
    independent = share(hits)
    assert independent["count"] == 8
    assert independent["high"] - independent["low"] < 0.6 < 2 * 1.96 * 0.5


# Folders are data.


def test_a_folder_of_either_age_is_read_and_a_clip_is_frozen(folder: Path, copy: Path, clip: Clip) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert Clip.from_pretrained(copy).preprocess == clip.preprocess
    write_settings(folder := copy, {"size": 32, "crop_size": 32})
    (folder / "processor_config.json").unlink()
    assert Clip.from_pretrained(folder).preprocess == clip.preprocess, "sizes as single numbers, CLIP's own mean"
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def config_with(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BAD_FOLDERS = [
    (without("config.json"), "is not a CLIP: it has no config.json"),
    (config_with(model_type="siglip"), "is not a CLIP: the model_type of its config.json is 'siglip'"),
    (config_with(quantization_config={"bits": 4}), "sets quantization_config; carv reads plain, unquantised weights"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter to another model"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    (pickles_only, "has no safetensors, only pytorch_model.bin, and pickle files can run code"),
    (cut_short, "cannot be loaded as a CLIPModel"),
    (without_a_tensor, "1 tensors of the CLIPModel are missing or of another shape, first visual_projection.weight"),
    (without("tokenizer.json"), "has no vocabulary: tokenizer.json or vocab.json must be there"),
    (without("preprocessor_config.json"), "does not say how its pictures are prepared"),
    (lambda folder: write_settings(folder, {"resample": 1}), "resample must be 2 .bilinear. or 3 .bicubic., got 1"),
    (lambda folder: write_settings(folder, {"image_mean": [0.5]}), "need three numbers, got 1"),
    (lambda folder: write_settings(folder, {"size": 64, "crop_size": 48}), "reads 32x32 pixels, and its settings make"),
    (lambda folder: write_settings(folder, {"size": 20, "crop_size": 32}), "a crop of 32x32 pixels needs pictures as"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS, ids=[message[:32] for _, message in BAD_FOLDERS])
def test_a_folder_that_is_no_clip_gets_one_sentence(damage: Any, message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        Clip.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_what_is_neither_a_folder_nor_cached_is_said_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder, nor a hub id"):
        Clip.from_pretrained("nowhere")
    import huggingface_hub

    asked: dict[str, Any] = {}

    def refuse(*args: Any, **options: Any) -> None:
        asked.update(options)
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="owner/name is neither a folder nor in the local cache; fetch it first"):
        Clip.from_pretrained("owner/name")
    assert asked["local_files_only"] is True


def test_only_data_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    listed = [path.name for path in folder.iterdir()]
    there = [*listed, "pytorch_model.bin", "flax_model.msgpack", "modeling.py", "README.md", "onnx/config.json"]
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: there)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Clip.from_pretrained("owner/name", download=True, revision="r").name == "owner/name"
    assert sorted(asked["allow_patterns"]) == sorted(listed)
    assert asked["revision"] == "r"


def test_a_pipeline_around_a_clip_is_answered_with_where_the_clip_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    with pytest.raises(ValueError, match=r"it has no config.json; there is one in .*clip"):
        Clip.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [-1.0, 1.1, 255.0, float("nan")])
def test_pictures_outside_0_to_1_are_refused(bad: float, clip: Clip) -> None:
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"CLIP takes pictures in \[0, 1\], got values from"):
        clip.image_features(images)


def test_a_caption_that_does_not_fit_is_cut_with_a_warning(clip: Clip) -> None:
    with pytest.warns(UserWarning, match="reads 16 tokens of a caption, and 'seven") as caught:
        long = clip.text_features(["a red chair", "seven zebras and eight giraffes"])
    assert len(caught) == 1
    assert torch.isfinite(long).all()


# Against a prompt.


def test_the_papers_views_are_ten_at_12_5_degrees_evenly_around() -> None:
    cameras = scoring_cameras("paper")
    assert cameras.azimuth.tolist() == pytest.approx([36.0 * i for i in range(10)])
    assert {(float(c.elevation), float(c.distance), float(c.fov)) for c in (cameras[i : i + 1] for i in range(10))} == {
        (12.5, 2.0, 40.0)
    }
    assert len(scoring_cameras("world")) == 8


def test_a_prompt_is_scored_without_its_view_and_among_all_objects(clip: Clip) -> None:
    pictures = render_object("a red chair", scoring_cameras("world")[:3], 32)
    judged = PromptAlignment(clip, "the red chair, side view").score(pictures)
    cosines = clip.similarities(pictures, object_captions())
    own = object_captions().index("a red chair")
    torch.testing.assert_close(judged.score, 100 * cosines[:, own].clamp(min=0), atol=1e-3, rtol=0)
    assert judged.hits is not None
    assert judged.hits.tolist() == (cosines.argmax(dim=1) == own).tolist()
    assert judged.chosen == object_captions()[int(cosines.mean(dim=0).argmax())]
    best = PromptAlignment(clip, judged.chosen).score(pictures)
    record = best.to_dict()
    assert record["r_precision"]["hits"] == int((cosines.argmax(1) == object_captions().index(best.chosen)).sum())
    assert record["r_precision"]["hits"] > 0
    assert record["captions"] == len(set(object_captions())) == 128


def test_a_prompt_of_another_language_has_a_score_and_no_r_precision(clip: Clip) -> None:
    judged = PromptAlignment(clip, "a wooden boat").score(smooth(32, 32)).to_dict()
    assert judged["r_precision"] is judged["chosen"] is None
    assert judged["views"] == 6
    assert {"mean", "std_over_views"} == judged["score"].keys()


def test_held_out_is_known_of_the_worlds_objects_only() -> None:
    shape, colour = HELD_OUT[0]
    assert held_out(f"{Prompt(colour, shape)}, back view") is True
    assert held_out("a red chair") is False
    assert held_out("a chair") is held_out("a wooden boat") is None


def test_without_the_extra_the_exact_teacher_runs_without_a_score_and_others_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    said: list[str] = []
    assert load_clip("none", "world", "cpu", said.append) is None
    assert said == []
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_clip("small", "world", "cpu", said.append) is None
    assert len(said) == 1
    assert said[0].startswith("no CLIP score: this needs the package 'transformers'; install it with: pip install")
    with pytest.raises(ImportError, match="pip install"):
        load_clip("small", "small", "cpu", said.append)
    with pytest.raises(ImportError, match="pip install"):
        load_clip(str(folder), "world", "cpu", said.append)
