"""Tiny diffusers pipelines with random weights, built as their authors' are: no network and no downloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CLIP_WORDS = [*LETTERS, *[f"{letter}</w>" for letter in LETTERS], "<|startoftext|>", "<|endoftext|>"]
TOKENS = 16


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


def t5_tokenizer(**options: Any) -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [*special, *[(letter, -3.0) for letter in LETTERS]]
    return transformers.T5TokenizerFast(vocab=words, extra_ids=0, **options)


def t5(kind: str = "T5", width: int = 32, layers: int = 2) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, d_model=width, d_kv=8, d_ff=16, num_layers=layers, num_heads=2
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


def dit_network(**config: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
    }
    return diffusers.DiTTransformer2DModel(**(settings | config))


def dit(classes: int = 1000, **scheduler: Any) -> Any:
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    return diffusers.DiTPipeline(dit_network(num_embeds_ada_norm=classes), vae(), ddim(**(betas | scheduler)))


def dit_nowhere_zero(classes: int, layers: int = 2, prediction: str = "v_prediction") -> Any:
    """Weights are random and nowhere zero: a zero-initialised block would hide its conditions."""
    config = {"attention_head_dim": 4, "out_channels": 4, "num_layers": layers, "num_embeds_ada_norm": classes}
    network = dit_network(**config)
    for parameter in network.parameters():
        if bool((parameter == 0).all()):
            torch.nn.init.normal_(parameter, std=0.2)
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=prediction)
    return diffusers.DiTPipeline(network, vae(), scheduler)


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


def wan(
    width: int = 32,
    layers: int = 2,
    text_layers: int = 2,
    latents: tuple[list[float], list[float]] = ([0.1, -0.2, 0.3, -0.4], [1.0, 2.0, 0.5, 1.5]),
    scheduler: Any = None,
    **tokenizer: Any,
) -> Any:
    """`latents`: their means and standard deviations; `width`: of the text's states."""
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(**tokenizer),
        text_encoder=t5("UMT5", width, text_layers),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=width,
            freq_dim=16,
            ffn_dim=16,
            num_layers=layers,
            rope_max_seq_len=32,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1] * 4,
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=latents[0],
            latents_std=latents[1],
        ),
        scheduler=scheduler
        or diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def wan_of_plain_latents(layers: int, scheduler: Any = None, **tokenizer: Any) -> Any:
    """A smaller Wan whose latents are those of its autoencoder, neither shifted nor scaled."""
    return wan(16, layers, 1, ([0.0] * 4, [1.0] * 4), scheduler, **tokenizer)
