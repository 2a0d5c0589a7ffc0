"""The folder of a diffusers teacher: its schedule, old names, shards, mistakes in one sentence, no code run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

from pipeline_families import CASES, PROMPTS, edit, loaded_families, normal, saved_families


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_families(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def teachers(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    return loaded_families(folders)


@pytest.fixture
def broken(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder, to break."""

    def copy(name: str = "sd") -> Path:
        return Path(shutil.copytree(folders(name), tmp_path / name))

    return copy


def test_sdxl_s_empty_prompt_is_zero_only_where_the_folder_says_so(broken: Callable[[str], Path]) -> None:
    path = broken("sdxl")
    for forced in (True, False):
        edit(path / "model_index.json", force_zeros_for_empty_prompt=forced)
        tensors = DiffusersTeacher.from_pretrained(path).encode_prompts(["", "a"]).tensors
        for key in ("embeddings", "pooled"):
            assert bool((tensors[key][0] == 0).all()) == forced
            assert bool((tensors[key][1] != 0).any())


def test_dit_is_read_under_its_old_class_name(broken: Callable[[str], Path]) -> None:
    path = broken("dit")
    edit(path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    assert DiffusersTeacher.from_pretrained(path).latent_shape == (4, 8, 8)


def schedule_of(path: Path) -> NoiseSchedule:
    return DiffusersTeacher.from_pretrained(path).schedule


def test_the_schedule_and_the_prediction_are_the_scheduler_s(broken: Callable[[str], Path]) -> None:
    path = broken("sd")
    assert schedule_of(path).prediction == "v_prediction"
    diffusers.EulerDiscreteScheduler(
        beta_schedule="linear", beta_start=0.001, beta_end=0.01, num_train_timesteps=500, prediction_type="sample"
    ).save_pretrained(path / "scheduler")
    schedule = schedule_of(path)
    assert (schedule.prediction, schedule.num_steps) == ("sample", 500)
    acp = torch.cumprod(1 - torch.linspace(0.001, 0.01, 500, dtype=torch.float64), 0)
    torch.testing.assert_close(schedule.acp, acp)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(path)), path, {"format": "pt"})


def test_the_old_names_of_attention_weights_are_read(broken: Callable[[str], Path]) -> None:
    """Stable Diffusion's own VAE has them."""
    path = broken("sd")
    expected = DiffusersTeacher.from_pretrained(path).encode(torch.full((1, 3, 16, 16), 0.3))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {}
        for name, tensor in weights.items():
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
            named[name] = tensor
        assert set(named) != set(weights)
        return named

    rewrite(path / "vae" / "diffusion_pytorch_model.safetensors", rename)
    torch.testing.assert_close(DiffusersTeacher.from_pretrained(path).encode(torch.full((1, 3, 16, 16), 0.3)), expected)


def test_sharded_weights_and_variants_are_read(folders: Callable[[str], Path], broken: Callable[[str], Path]) -> None:
    path = broken("sd")
    network = diffusers.UNet2DConditionModel.from_pretrained(path / "unet")
    for file in (path / "unet").glob("*.safetensors"):
        file.unlink()
    network.save_pretrained(path / "unet", max_shard_size="20KB", variant="fp16")
    assert len(list((path / "unet").glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="has weights of the variant 'fp16' only: pass variant='fp16'"):
        DiffusersTeacher.from_pretrained(path)
    # The other components have no such variant: their plain weights are used.
    sharded, whole = (
        DiffusersTeacher.from_pretrained(path, variant="fp16"),
        DiffusersTeacher.from_pretrained(folders("sd")),
    )
    z_t, t = normal(1, *whole.latent_shape), torch.tensor([500])
    condition = whole.encode_prompts([""])
    torch.testing.assert_close(sharded.predict_noise(z_t, t, [condition]), whole.predict_noise(z_t, t, [condition]))


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda path: shutil.rmtree(path.joinpath(*parts))


def pickled(path: Path) -> None:
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def pickled_shard(path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model.bin"}}
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def lost_shard(path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def truncated(path: Path) -> None:
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def incomplete(component: str, file: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        rewrite(path / component / file, lambda weights: dict(sorted(weights.items())[1:]))

    return drop


def narrow_text(path: Path) -> None:
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    encoder.save_pretrained(path / "text_encoder")


def index(**entries: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "model_index.json", **entries)


def config(component: str, **entries: Any) -> Callable[[Path], None]:
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    return lambda path: edit(path / component / file, **entries)


def emptied(file: str, content: str = "{") -> Callable[[Path], None]:
    def overwrite(path: Path) -> None:
        (path / file).write_text(content)

    return overwrite


MISTAKES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no index": (
        "sd",
        lambda path: (path / "model_index.json").unlink(),
        "is not a diffusers pipeline: it has no ",
    ),
    "torn index": ("sd", emptied("model_index.json"), "model_index.json is not valid JSON"),
    "list": (
        "sd",
        emptied("model_index.json", content="[]"),
        "must be a JSON object, got a list",
    ),
    "other pipeline": (
        "sd",
        index(_class_name="StableDiffusionInpaintPipeline"),
        "is a StableDiffusionInpaintPipeline; carv reads StableDiffusionPipeline, .*DiTPipeline, .*WanPipeline",
    ),
    "no vae": ("sd", remove("vae"), "lacks the component 'vae', which a StableDiffusionPipeline needs"),
    "null unet": ("sd", index(unet=[None, None]), "lacks the component 'unet'"),
    "no scheduler": ("sd", remove("scheduler"), "lacks scheduler/scheduler_config.json"),
    "no tokenizer": ("sd", remove("tokenizer"), "lacks the component 'tokenizer'"),
    "no vocabulary": (
        "wan",
        lambda path: (path / "tokenizer" / "tokenizer.json").unlink(),
        "tokenizer has no vocabulary: one of tokenizer.json, vocab.json, spiece.model must be there",
    ),
    "no text encoder 2": ("sdxl", remove("text_encoder_2"), "lacks the component 'text_encoder_2'"),
    "pickles": (
        "sd",
        pickled,
        "vae has no safetensors, only diffusion_pytorch_model.bin, and pickle files",
    ),
    "no weights": (
        "sd",
        lambda path: (path / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae has no weights: no .safetensors",
    ),
    "pickled shard": ("sd", pickled_shard, "names 'diffusion_pytorch_model.bin'; carv loads .safetensors files of the"),
    "lost shard": ("sd", lost_shard, "unet lacks diffusion_pytorch_model-00001-of-00002.safetensors"),
    "torn weights": ("sd", truncated, "unet cannot be loaded as a UNet2DConditionModel: "),
    "missing tensor": (
        "sd",
        incomplete("unet", "diffusion_pytorch_model.safetensors"),
        "unet are not those of its config.json: 1 tensors of UNet2DConditionModel are missing or of another shape",
    ),
    "missing text tensor": (
        "sd",
        incomplete("text_encoder", "model.safetensors"),
        "text_encoder are not those of its config.json: 1 tensors of CLIPTextModel are missing",
    ),
    "another shape": (
        "sd",
        config("unet", cross_attention_dim=24),
        "cannot be loaded as a UNet2DCond.* expected shape",
    ),
    "unknown class": (
        "sd",
        index(unet=["diffusers", "UNet3DConditionModel"]),
        "the unet of .* is a diffusers.UNet3DConditionModel; in a StableDiffusionPipeline carv reads UNet2DCondit",
    ),
    "class of another component": (
        "sd",
        index(vae=["diffusers", "UNet2DConditionModel"]),
        "carv reads AutoencoderKL ",
    ),
    "inpainting": ("sd", config("unet", in_channels=9), "takes 9 channels and its latents have 4: it is shown more"),
    "upscaler": ("sd", config("unet", class_embed_type="timestep"), "takes inputs that those of a StableDiffusionPip"),
    "refiner": (
        "sdxl",
        config("unet", addition_time_embed_dim=5),
        "the pooled text with six picture sizes has width 38, not 32",
    ),
    "edm": ("sd", config("scheduler", _class_name="EDMEulerScheduler"), "EDMEulerScheduler is not a DDPM or flow"),
    "two experts": ("wan", index(boundary_ratio=0.875), "has two networks, one for large and one for small t"),
    "narrow text": ("wan", narrow_text, "do not fit together: the text encoder has width 16, not 32"),
    "adapter": ("sd", emptied("text_encoder/adapter_config.json"), "is an adapter to another model"),
    "other weights": (
        "sd",
        config("text_encoder", transformers_weights="other.safetensors"),
        "config.json sets transformers_weights; carv reads plain, unq",
    ),
    "quantised": ("flux", config("transformer", quantization_config={"quant_method": "bitsandbytes"}), "sets quantiz"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_folder_that_cannot_be_read_gets_one_sentence(
    mistake: str, broken: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, damage, sentence = MISTAKES[mistake]
    path = broken(name)
    damage(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        DiffusersTeacher.from_pretrained(
            path, **{k: v for k, v in CASES[name].load.items() if k != "distilled_guidance"}
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_never_run(broken: Callable[[str], Path]) -> None:
    path = broken("sd")
    for file in (path / "pipeline.py", path / "unet" / "my_unet.py", path / "text_encoder" / "modeling.py"):
        file.write_text(f"open({str(path / 'ran')!r}, 'w').close()\nclass MyUNet: pass\nclass Mine: pass\n")
    edit(path / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Mine"})
    DiffusersTeacher.from_pretrained(path)  # what it needs is there; the code is left alone
    index(unet=["my_unet", "MyUNet"])(path)
    with pytest.raises(ValueError, match=r"is a my_unet\.MyUNet; .* and runs no code of a folder"):
        DiffusersTeacher.from_pretrained(path)
    index(_class_name=["pipeline", "Mine"])(path)
    with pytest.raises(ValueError, match="carv reads StableDiffusionPipeline"):
        DiffusersTeacher.from_pretrained(path)
    assert not (path / "ran").exists()


OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "size": ("sd", {"size": 15}, "multiples of 2 and 2 pixels, got size 15 x 15"),
    "zero": ("sd", {"size": (0, 16)}, "got size 0 x 16"),
    "frames of a picture": ("sd", {"frames": 5}, "frames means nothing to this StableDiffusionPipeline"),
    "tokens": ("sdxl", {"max_tokens": 5}, "max_tokens means nothing to this StableDiffusionXLPipeline"),
    "guidance": ("sd3", {"distilled_guidance": 5.0}, "distilled_guidance means nothing"),
    "dit": ("dit", {"size": 32}, "this DiT has one size, 16 x 16 pixels, got 32 x 32"),
    "sd3": ("sd3", {"size": 64}, "has positions for 32 pixels a side, got 64 x 64"),
    "flux": ("flux", {"size": 18}, "multiples of 4 and 4 pixels"),
    "frames": ("wan", {"size": 16, "frames": 4}, r"videos of 1 \+ 4 n frames, got frames = 4"),
    "no frames": ("wan", {"size": 16, "frames": 0}, r"videos of 1 \+ 4 n frames, got frames = 0"),
    "no tokens": ("flux", {"size": 16, "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    "nan": ("flux", {"size": 16, "distilled_guidance": float("nan")}, "distilled_guidance must be a finite number"),
    "integers": ("sd", {"dtype": torch.int8}, "must be floating-point types"),
}


@pytest.mark.parametrize("mistake", sorted(OPTIONS))
def test_a_wrong_option_gets_one_sentence(mistake: str, folders: Callable[[str], Path]) -> None:
    name, options, sentence = OPTIONS[mistake]
    with pytest.raises(ValueError, match=sentence):
        DiffusersTeacher.from_pretrained(folders(name), **options)


def test_shapes_that_do_not_fit_are_refused(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("sd")
    z_t, t, condition = normal(2, 4, 8, 8), torch.tensor([1, 2]), teacher.encode_prompts(PROMPTS)
    for wrong_z, wrong_t in ((z_t[:, :3], t), (z_t, t[:1]), (z_t[:0], t[:0])):
        with pytest.raises(ValueError, match=r"takes z_t \[N, 4, 8, 8\] and t \[N\], got"):
            teacher.predict_noise(wrong_z, wrong_t, [condition])
    for wrong in ([condition.rows(torch.tensor([0]))], list[Condition]()):
        with pytest.raises(ValueError, match="give conditions of one row a draw, 2 rows each"):
            teacher.predict_noise(z_t, t, wrong)
    with pytest.raises(ValueError, match=r"encodes pictures \[R, 3, height, width\] in \[0, 1\], got \[2, 4, 16, 16\]"):
        teacher.encode(torch.zeros(2, 4, 16, 16))
    with pytest.raises(ValueError, match=r"noise must have shape \[1, 4, 8, 8\], got \[4, 8, 8\]"):
        teacher.encode(torch.zeros(1, 3, 16, 16), normal(4, 8, 8))
    with pytest.raises(ValueError, match="at least one prompt"):
        teacher.encode_prompts([])
