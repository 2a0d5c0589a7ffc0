"""Teachers from diffusers pipeline folders: tiny random pipelines are saved, loaded, compared and differentiated.

No network and no downloads: every folder is made here, from configs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from torch import Tensor

import carv
from carv import weights
from carv.density import ShiftedUniform, uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Gradient, Renders
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.field import VoxelField
from carv.tasks.sds.task import SDS
from carv.tasks.sds.train import Trainer, load_teacher
from carv.teachers.base import Condition, Teacher
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.diffusers.hub import needed_files
from carv.teachers.guidance import Guided
from carv.world.cameras import WORLD_RANGE

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CLIP_WORDS = [*LETTERS, *[f"{letter}</w>" for letter in LETTERS], "<|startoftext|>", "<|endoftext|>"]
TOKENS = 16
PROMPTS = ("a red chair", "a blue duck")
HTML = ("a  red &amp; blue x", "a duck")  # Wan's pipeline cleans its prompts
LABELS = {"7": "tench, Tinca tinca", "134": "crane", "517": "crane"}

# Tiny pipelines, built as their authors' are


def clip_tokenizer() -> Any:
    words = {word: number for number, word in enumerate(CLIP_WORDS)}
    return transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=TOKENS)


def clip(projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(CLIP_WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=8,
        bos_token_id=52,
        eos_token_id=53,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return transformers.T5TokenizerFast(vocab=[*special, *[(letter, -3.0) for letter in LETTERS]], extra_ids=0)


def t5(kind: str = "T5", width: int = 32) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def vae(channels: int = 4, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )


def unet(**config: Any) -> Any:
    settings = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(settings | config))


def ddim(**config: Any) -> Any:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return diffusers.DDIMScheduler(**(betas | {"clip_sample": False, "steps_offset": 1} | config))


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(scaling_factor=0.3),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=ddim(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.4, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5]),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        scheduler=ddim(),
        add_watermarker=False,
    )


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    return diffusers.DiTPipeline(transformer, vae(), ddim(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))


def sd3(with_t5: bool = True) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(width=40) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5("UMT5"),
        transformer=transformer,
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1] * 4,
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@dataclass(frozen=True)
class Case:
    """One family: how to make it, how to load it, how to run its pipeline, and its formulas written by hand."""

    make: Callable[[], Any]
    load: dict[str, Any]
    call: dict[str, Any]  # of the pipeline, beside the latents
    prediction: str
    prompts: tuple[str, str] = PROMPTS
    negative: str = "blurry"
    mean: Any = 0.0
    scale: Any = 1.0


def of_channels(values: list[float], dims: int) -> Tensor:
    return torch.tensor(values).view(-1, *[1] * dims)


TEXT = {"prompt": list(PROMPTS), "negative_prompt": ["blurry"] * 2, "output_type": "latent"}
CASES = {
    "sd": Case(stable_diffusion, {}, TEXT | {"guidance_scale": 3.0}, "v", scale=0.3),
    "sdxl": Case(
        sdxl,
        {},
        TEXT | {"guidance_scale": 3.0, "negative_prompt": None},
        "epsilon",
        negative="",
        mean=of_channels([0.1, 0.2, 0.3, 0.4], 2),
        scale=0.4 / of_channels([1.0, 2.0, 0.5, 1.5], 2),
    ),
    "dit": Case(
        dit,
        {},
        {"class_labels": [207, 7], "guidance_scale": 3.0, "output_type": "pt"},
        "epsilon",
        prompts=("207", "Tinca tinca"),
        negative="",
        scale=0.18215,
    ),
    "sd3": Case(
        sd3,
        {"max_tokens": TOKENS},
        TEXT | {"guidance_scale": 3.0, "max_sequence_length": TOKENS},
        "flow",
        mean=0.06,
        scale=1.5,
    ),
    "flux": Case(
        flux,
        {"max_tokens": TOKENS, "size": 16, "distilled_guidance": 2.5},
        TEXT | {"true_cfg_scale": 3.0, "guidance_scale": 2.5, "height": 16, "width": 16, "max_sequence_length": TOKENS},
        "flow",
        mean=0.11,
        scale=0.36,
    ),
    "wan": Case(
        wan,
        {"max_tokens": TOKENS, "size": (16, 32), "frames": 5},
        TEXT
        | {
            "prompt": list(HTML),
            "guidance_scale": 3.0,
            "height": 16,
            "width": 32,
            "num_frames": 5,
            "max_sequence_length": TOKENS,
        },
        "flow",
        prompts=HTML,
        mean=of_channels([0.1, -0.2, 0.3, -0.4], 3),
        scale=1 / of_channels([1.0, 2.0, 0.5, 1.5], 3),
    ),
}
every_family = pytest.mark.parametrize("name", sorted(CASES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, made once."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                pipeline = CASES[name].make()
                pipeline.save_pretrained(path, safe_serialization=True)
            if name == "dit":
                edit(path / "model_index.json", id2label=LABELS)
        return path

    return folder


@pytest.fixture(scope="module")
def teachers(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    """The teacher of a family, loaded once."""
    loaded: dict[str, DiffusersTeacher] = {}

    def teacher(name: str) -> DiffusersTeacher:
        if name not in loaded:
            loaded[name] = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
        return loaded[name]

    return teacher


@pytest.fixture
def broken(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder, to break."""

    def copy(name: str = "sd") -> Path:
        return Path(shutil.copytree(folders(name), tmp_path / name))

    return copy


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(teacher: DiffusersTeacher, *fractions: float) -> Tensor:
    values = torch.tensor(fractions, dtype=torch.float64)
    return values if teacher.schedule.continuous else (values * 1000).long()


def by_hand(prediction: str, output: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """epsilon from the network's output: z from its definition, then (z_t - alpha z) / sigma."""
    if prediction == "epsilon":
        return output
    z = alpha * z_t - sigma * output if prediction == "v" else z_t - sigma * output
    return (z_t - alpha * z) / sigma


# The network's output


def what_the_scheduler_is_shown(pipeline: Any, call: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(guided output, t, z_t) of each step of a real pipeline."""
    seen = []
    step = pipeline.scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((output, t, sample))
        return step(output, t, sample, *rest, **options)

    pipeline.scheduler.step = spy
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**call, num_inference_steps=3)
    return seen


@every_family
def test_guidance_gives_what_the_pipeline_shows_its_scheduler(
    name: str,
    folders: Callable[[str], Path],
    teachers: Callable[[str], DiffusersTeacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, teacher = CASES[name], teachers(name)
    assert isinstance(teacher, Teacher)
    latents = normal(2, *teacher.latent_shape, seed=1)
    pipeline = type(case.make()).from_pretrained(folders(name), local_files_only=True)
    flux_pack, flux_unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    if name == "flux":
        latents = flux_pack(latents, 2, *teacher.latent_shape)
    if name == "dit":  # its pipeline takes no latents
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: latents)
    seen = what_the_scheduler_is_shown(pipeline, case.call | ({} if name == "dit" else {"latents": latents}))
    assert len(seen) == 3
    guided = Guided.from_prompts(teacher, case.prompts, 3.0, case.negative)
    for output, t, z_t in seen:
        output, z_t = output[:2], z_t[:2]
        if name == "flux":
            output, z_t = (flux_unpack(tensor, 16, 16, 2) for tensor in (output, z_t))
        if teacher.schedule.continuous:
            t = (t.double() / 1000).expand(2)
            alpha, sigma = 1 - t[0], t[0]
        else:
            acp = pipeline.scheduler.alphas_cumprod.double()[int(t)]
            t, alpha, sigma = t.expand(2), acp.sqrt(), (1 - acp).sqrt()
        expected = by_hand(case.prediction, output.double(), z_t.double(), alpha, sigma)
        got = guided(z_t[:, None], t[:, None])[:, 0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@every_family
def test_rows_do_not_see_each_other(name: str, teachers: Callable[[str], DiffusersTeacher]) -> None:
    """Rows of unequal t and condition, asked for together under two conditions, or one by one."""
    teacher, prompts = teachers(name), CASES[name].prompts
    z_t, t = normal(3, *teacher.latent_shape), times(teacher, 0.02, 0.5, 0.97)
    conditions = teacher.encode_prompts([*prompts, ""]), teacher.encode_prompts(["", "", prompts[0]])
    together = teacher.predict_noise(z_t, t, conditions)
    assert len(together) == 2
    for condition, outputs in zip(conditions, together, strict=True):
        for row in range(3):
            only = torch.tensor([row])
            [alone] = teacher.predict_noise(z_t[only], t[only], [condition.rows(only)])
            torch.testing.assert_close(outputs[only], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)  # the conditions do something


@every_family
def test_a_prediction_never_waits_for_the_device(
    name: str,
    folders: Callable[[str], Path],
    teachers: Callable[[str], DiffusersTeacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the "meta" device there are no numbers: asking for one raises."""
    case, conditions = CASES[name], teachers(name).encode_prompts(["", CASES[name].prompts[0]])
    monkeypatch.setattr(NoiseSchedule, "__post_init__", lambda self: None)  # looks at its table, once
    teacher = DiffusersTeacher.from_pretrained(folders(name), device="meta", **case.load)
    moved = Condition({key: tensor.to("meta") for key, tensor in conditions.tensors.items()})
    guided = Guided(teacher, 3.0, moved, moved)
    z_t = torch.empty(2, 3, *teacher.latent_shape, device="meta")
    assert guided(z_t, times(teacher, 0.1, 0.2, 0.3).expand(2, 3).to("meta")).device.type == "meta"


def spy_on_network(teacher: DiffusersTeacher) -> list[int]:
    """The batch size of each call of the network from now on."""
    sizes: list[int] = []
    teacher._family.network.register_forward_hook(lambda _, __, output: sizes.append(len(output[0])))
    return sizes


@every_family
def test_guidance_calls_the_network_once(name: str, folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    calls = spy_on_network(teacher)
    guided = Guided.from_prompts(teacher, CASES[name].prompts, 7.5, CASES[name].negative)
    guided(normal(2, 3, *teacher.latent_shape), times(teacher, 0.1, 0.2, 0.3).expand(2, 3))
    assert calls == [2 * 2 * 3]


@every_family
def test_every_network_is_frozen_and_no_random_number_is_drawn(
    name: str, teachers: Callable[[str], DiffusersTeacher]
) -> None:
    teacher = teachers(name)
    family: Any = teacher._family
    networks = [family.network, family.autoencoder._model, *[text.model for text in family.text]]
    assert len(networks) == {"sd": 3, "sdxl": 4, "dit": 2, "sd3": 5, "flux": 4, "wan": 3}[name]
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    before = torch.get_rng_state()
    z_t = normal(1, *teacher.latent_shape).requires_grad_()
    [noise] = teacher.predict_noise(z_t, times(teacher, 0.3), [teacher.encode_prompts([CASES[name].prompts[0]])])
    teacher.decode(teacher.encode(torch.rand(1, *teacher.picture_shape, generator=torch.Generator())))
    assert not noise.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_half_precision_networks_give_float32_near_the_full_ones(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    full = teachers(name)
    half = DiffusersTeacher.from_pretrained(folders(name), dtype=torch.bfloat16, **CASES[name].load)
    assert {p.dtype for p in half._family.autoencoder._model.parameters()} == {torch.float32}
    # 0.5 and 0.25 are exact in bfloat16, which Flux turns t into.
    z_t, t = normal(2, *full.latent_shape), times(full, 0.5, 0.25)
    [expected] = full.predict_noise(z_t, t, [full.encode_prompts(PROMPTS)])
    [got] = half.predict_noise(z_t, t, [half.encode_prompts(PROMPTS)])
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.05


def test_what_is_not_a_prediction_stays_exact_in_half_precision(folders: Callable[[str], Path]) -> None:
    """eps_hat = alpha v + sigma z_t with z_t as it is, not as the network is shown it."""
    half = DiffusersTeacher.from_pretrained(folders("sd"), dtype=torch.bfloat16)
    z_t, t = normal(1, *half.latent_shape), torch.tensor([999])
    condition = half.encode_prompts([""])
    [noise] = half.predict_noise(z_t, t, [condition])
    output = half._family.output(z_t.bfloat16(), t, condition).float()
    alpha, sigma = half.schedule.alpha(t), half.schedule.sigma(t)
    torch.testing.assert_close(noise, alpha * output + sigma * z_t)


def test_compile_wraps_the_network(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def spy(network: Any) -> Any:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", spy)
    DiffusersTeacher.from_pretrained(folders("dit"))
    assert not compiled
    teacher = DiffusersTeacher.from_pretrained(folders("dit"), compile=True)
    assert [type(network).__name__ for network in compiled] == ["DiTTransformer2DModel"]
    teacher.predict_noise(normal(1, *teacher.latent_shape), torch.tensor([10]), [teacher.encode_prompts(["3"])])


# Pictures and latents


@every_family
def test_latents_have_the_folders_units(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    case, teacher = CASES[name], teachers(name)
    raw = type(case.make().vae).from_pretrained(folders(name) / "vae").eval()
    pictures = torch.rand(2, *teacher.picture_shape, generator=torch.Generator().manual_seed(0))
    xi = normal(2, *teacher.latent_shape)
    with torch.no_grad():
        posterior = raw.encode(2 * pictures - 1).latent_dist
        mean, sample = posterior.mean, posterior.mean + posterior.std * xi
        torch.testing.assert_close(teacher.encode(pictures), (mean - case.mean) * case.scale)
        torch.testing.assert_close(teacher.encode(pictures, xi), (sample - case.mean) * case.scale)
        decoded = raw.decode(xi / case.scale + case.mean).sample
    torch.testing.assert_close(teacher.decode(xi), (decoded * 0.5 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert teacher.decode(xi).shape == pictures.shape


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_pictures_of_another_size_are_resized(name: str, teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers(name)
    colour = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, *[1] * (len(teacher.picture_shape) - 1))
    exact = colour.expand(2, *teacher.picture_shape)
    for size in ((8, 8), (40, 24)):
        z = teacher.encode(colour.expand(2, *teacher.picture_shape[:-2], *size))
        torch.testing.assert_close(z, teacher.encode(exact), rtol=1e-4, atol=1e-4)
    ramp = torch.linspace(0, 1, exact.shape[-1]).expand(exact.shape)  # nothing is transposed or mixed up
    fine = torch.linspace(0, 1, 4 * exact.shape[-1]).expand(*exact.shape[:-2], 4 * exact.shape[-2], -1)
    torch.testing.assert_close(teacher._family.autoencoder._resized(fine), ramp, rtol=0, atol=0.05)


def test_a_video_of_one_frame_takes_pictures(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("wan"), size=16, frames=1, max_tokens=TOKENS)
    assert (teacher.picture_shape, teacher.latent_shape) == ((3, 1, 16, 16), (4, 1, 2, 2))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.encode(pictures), teacher.encode(pictures[:, :, None]))


class Pictures:
    """R pictures sigmoid(theta + a little noise of their own), distilled: a `TeacherGradient`."""

    def __init__(self, teacher: DiffusersTeacher, guided: Guided) -> None:
        self.teacher, self.guided, self.latent_shape = teacher, guided, teacher.latent_shape
        self.theta = normal(*teacher.picture_shape, seed=3).requires_grad_()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def pictures(self, renders: Renders) -> Tensor:
        shape = self.theta.shape
        return torch.stack([(self.theta + torch.randn(shape, generator=s.generator()) / 4).sigmoid() for s in renders])

    def upstream(self, renders: Renders) -> Tensor:
        return self.teacher.encode(self.pictures(renders))

    def contribution(self, state: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.guided(self.teacher.schedule.add_noise(state[:, None], t, noise), t) - noise

    def pull_back(self, state: Tensor, f: Tensor, retain: bool = False) -> Gradient:
        return torch.autograd.grad(state, [self.theta], f, retain_graph=retain)


@every_family
def test_the_estimate_is_the_gradient_of_the_sds_surrogate_whatever_the_micro_batch(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    """The surrogate is 1/R sum_r 0.5 |z_r - sg(z_r - f_r)|^2, with z from the raw VAE by the formula."""
    case, teacher = CASES[name], teachers(name)
    task = Pictures(teacher, Guided.from_prompts(teacher, case.prompts[:1], 3.0, case.negative))
    law = ShiftedUniform(0.02, 0.98, 3.0) if teacher.schedule.continuous else uniform_steps(20, 980)
    sampler, step = TimestepSampler(law), carv.stream(0, "step", 1)
    estimate = HierarchicalEstimator(sampler, renders=2, renoise=4).estimate(task, step)

    raw = type(case.make().vae).from_pretrained(folders(name) / "vae").eval()
    streams = tuple(step.child("render", r) for r in range(2))
    z = (raw.encode(2 * task.pictures(Renders(streams, 0, 2)) - 1).latent_dist.mean - case.mean) * case.scale
    surrogate = 0.5 * (z - (z - estimate.f_mean).detach()).square().sum() / 2
    [expected] = torch.autograd.grad(surrogate, [task.theta])
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(estimate.gradient[0] / scale, expected / scale, rtol=1e-3, atol=1e-5)

    for micro_batch in (2, 6):
        parts = HierarchicalEstimator(sampler, renders=2, renoise=4, micro_batch=micro_batch).estimate(task, step)
        torch.testing.assert_close(parts.gradient[0] / scale, estimate.gradient[0] / scale, rtol=1e-3, atol=1e-5)


def test_text_to_3d_takes_a_pipeline_and_its_encoder(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("sd")
    field = VoxelField(8, 6)
    task = SDS(teacher, field, "a", weights.sds(teacher.schedule), 3.0, WORLD_RANGE, size=12, encode=teacher.encode)
    estimator = HierarchicalEstimator(TimestepSampler(uniform_steps(20, 980)), renders=2, renoise=2)
    estimate = estimator.estimate(task, carv.stream(0))
    assert estimate.f_mean.shape == (2, *teacher.latent_shape)
    assert all(bool(gradient.isfinite().all()) for gradient in estimate.gradient)
    assert any(bool((gradient != 0).any()) for gradient in estimate.gradient)


def test_a_text_to_3d_run_names_its_teacher_by_its_folder(folders: Callable[[str], Path]) -> None:
    config = SDSConfig("a", teacher=str(folders("sd")), size=12, field="voxel", resolution=8, samples=4)
    trainer = Trainer(config, load_teacher(config))
    before = trainer.field.density.detach().clone()
    trainer.step()
    assert trainer.task.encoder_calls == 1
    assert not torch.equal(trainer.field.density, before)
    with pytest.raises(ValueError, match="absent"):
        load_teacher(dataclasses.replace(config, teacher="absent"))


@pytest.mark.parametrize("proposal", ["weight", "adaptive"])
def test_a_text_to_3d_run_takes_a_flow_matching_teacher_whose_t_is_continuous(
    proposal: Any, folders: Callable[[str], Path]
) -> None:
    estimator = EstimatorConfig(renoise=4, proposal=proposal)
    config = SDSConfig("a", estimator, teacher=str(folders("sd3")), size=12, field="voxel", resolution=8, samples=4)
    trainer = Trainer(config, load_teacher(config))
    before = trainer.field.density.detach().clone()
    trainer.step()
    assert not torch.equal(trainer.field.density, before)
    law = trainer.estimator.sampler
    t = law.sample(2, 500, torch.Generator().manual_seed(0)).t
    assert t.is_floating_point()
    assert 0.02 <= float(t.min()) < 0.3
    assert 0.9 < float(t.max()) <= 0.98


def test_the_gradient_through_encode_agrees_with_finite_differences(
    folders: Callable[[str], Path],
) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sd"), vae_dtype=torch.float64)
    x = torch.rand(1, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction, f = normal(1, 3, 12, 12, seed=1).double(), normal(1, *teacher.latent_shape, seed=2).double()
    [gradient] = torch.autograd.grad(teacher.encode(x), [x], f)
    with torch.no_grad():
        ends = [(teacher.encode(x + h * direction) * f).sum() for h in (1e-5, -1e-5)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


# Prompts


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_a_prompt_is_encoded_once_and_alike_in_any_company(name: str, folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    calls: list[int] = []
    for text in teacher._family.text:
        text.model.register_forward_hook(lambda *_: calls.append(1))
    together = teacher.encode_prompts([*PROMPTS, *PROMPTS])
    assert len(calls) == 2 * len(teacher._family.text)
    fresh = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    alone = fresh.encode_prompts([PROMPTS[1]])
    for key, tensor in alone.tensors.items():
        assert torch.equal(tensor[0], together.tensors[key][1])
        assert torch.equal(tensor[0], together.tensors[key][3])


def test_released_text_encoders_leave_the_prompts_that_were_encoded(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sd"))
    before = teacher.encode_prompts(PROMPTS)
    teacher.release_text_encoders()
    assert not teacher._family.text
    assert torch.equal(teacher.encode_prompts(PROMPTS).tensors["embeddings"], before.tensors["embeddings"])
    with pytest.raises(ValueError, match="'a new one' is new, and the text encoders were released"):
        teacher.encode_prompts(["a new one"])


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(teachers: Callable[[str], DiffusersTeacher]) -> None:
    with pytest.warns(UserWarning, match="the teacher reads 16 tokens of a prompt, and 'abcdefghijklmnopqrs' has 21"):
        teachers("sd").encode_prompts(["abcdefghijklmnopqrs"])


def test_sdxl_s_empty_prompt_is_zero_only_where_the_folder_says_so(broken: Callable[[str], Path]) -> None:
    path = broken("sdxl")
    for forced in (True, False):
        edit(path / "model_index.json", force_zeros_for_empty_prompt=forced)
        tensors = DiffusersTeacher.from_pretrained(path).encode_prompts(["", "a"]).tensors
        for key in ("embeddings", "pooled"):
            assert bool((tensors[key][0] == 0).all()) == forced
            assert bool((tensors[key][1] != 0).any())


def test_sdxl_is_told_the_size_of_the_picture(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sdxl"), size=(32, 24))
    assert teacher.latent_shape == (4, 16, 12)
    assert teacher.encode_prompts(["a"]).tensors["sizes"].tolist() == [[32, 24, 0, 0, 32, 24]]


def test_sd3_without_t5_gets_zeros_in_its_place(tmp_path: Path) -> None:
    sd3(with_t5=False).save_pretrained(tmp_path)
    teacher = DiffusersTeacher.from_pretrained(tmp_path)
    embeddings = teacher.encode_prompts(["a"]).tensors["embeddings"]
    assert embeddings.shape == (1, TOKENS + 256, 40)
    assert bool((embeddings[:, TOKENS:] == 0).all())
    assert bool((embeddings[:, :TOKENS, :32] != 0).all())


def test_dit_knows_its_classes_by_number_and_name(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("dit")
    labels = teacher.encode_prompts(["0", "999", "Tench", "tinca tinca", ""]).tensors["label"]
    assert labels.tolist() == [0, 999, 7, 7, 1000]
    with pytest.raises(ValueError, match="'crane' names the classes 134, 517: give the number"):
        teacher.encode_prompts(["crane"])
    for unknown in ("1000", "-1", "a red chair"):
        with pytest.raises(ValueError, match=f"'{unknown}' is no class of this DiT: give a number in 0..999 or a name"):
            teacher.encode_prompts([unknown])


# The folder


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


# The hub


def test_a_hub_id_is_looked_for_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        pytest.fail("something asked for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(ValueError, match="someone/a-pipeline is neither a folder nor in the local cache"):
        DiffusersTeacher.from_pretrained("someone/a-pipeline")
    for wrong in ("/nowhere/at/all", "./here", "one-word", "a/b/c"):
        with pytest.raises(ValueError, match=f"{wrong} is not a folder, nor a hub id of the form owner/name"):
            DiffusersTeacher.from_pretrained(wrong)


def test_a_download_fetches_what_a_teacher_needs_and_no_more(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders("sd")
    there = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    more = ["pipeline.py", "v1.ckpt", "v1.safetensors", "safety_checker/model.safetensors", "vae/x.bin", "unet/code.py"]
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name} | options)
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: [*there, *more])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    DiffusersTeacher.from_pretrained("someone/a-pipeline", download=True, revision="main")
    [request] = asked
    assert (request["name"], request["revision"]) == ("someone/a-pipeline", "main")
    assert sorted(request["allow_patterns"]) == sorted(there)


def test_a_download_takes_one_variant_and_refuses_pickles_beforehand() -> None:
    entries = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    files = [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.bin",
        "scheduler/scheduler_config.json",
    ]
    shared = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    plain = needed_files(files, entries, None, "a/b")
    assert sorted(plain) == sorted([*shared, "unet/diffusion_pytorch_model.safetensors"])
    half = needed_files(files, entries, "fp16", "a/b")
    assert sorted(half) == sorted([*shared, "unet/diffusion_pytorch_model.fp16.safetensors"])
    with pytest.raises(ValueError, match=r"a/b/unet has no safetensors, only .*\.fp16\.bin"):
        needed_files([file for file in files if not file.endswith(".safetensors")], entries, None, "a/b")


def test_a_failed_download_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(ValueError, match=r"someone/a-pipeline could not be fetched from the hub \(RuntimeError\)$"):
        DiffusersTeacher.from_pretrained("someone/a-pipeline", download=True)


def test_the_condition_is_one_row_a_prompt(teachers: Callable[[str], DiffusersTeacher]) -> None:
    for name, case in CASES.items():
        condition = teachers(name).encode_prompts([*case.prompts, ""])
        assert isinstance(condition, Condition)
        assert len(condition) == 3
