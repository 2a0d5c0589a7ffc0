"""Stable Diffusion 3 and 3.5: a flow transformer on two CLIPs and T5 (Esser et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder, load_vae, spatial_factor
from carv.teachers.diffusers.family import check_channels, load_network
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options, check_width
from carv.teachers.diffusers.text import TextEncoder

_TOKENS = 256


class StableDiffusion3:
    """The embeddings are CLIP's and T5's tokens one after the other, CLIP's padded with zeros to T5's width.

    A folder without T5 (`text_encoder_3` null) gets zeros in its place, as the model was trained to allow.
    """

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, "frames", "distilled_guidance")
        self.network = load_network(folder, "transformer", ("SD3Transformer2DModel",), options)
        config = self.network.config
        vae = load_vae(folder, "AutoencoderKL", options)
        check_channels(folder, config.in_channels, int(vae.config["latent_channels"]))
        factor = spatial_factor(vae)
        default, step = config.sample_size * factor, config.patch_size * factor
        size = options.picture_size((default, default), (step, step))
        limit = config.pos_embed_max_size * step
        if max(size) > limit:
            raise ValueError(f"this teacher has positions for {limit} pixels a side, got {size[0]} x {size[1]}")
        self.autoencoder = Autoencoder.image(vae, options, size)
        clips = [TextEncoder.clip(folder, number, options, "CLIPTextModelWithProjection") for number in ("", "_2")]
        self.text = clips
        if folder.has("text_encoder_3"):
            self.text = [*clips, TextEncoder.t5(folder, "_3", options, _TOKENS)]
            check_width(self.text[2].width, config.joint_attention_dim, "text_encoder_3")
        pooled = sum(clip.model.config.projection_dim for clip in clips)
        check_width(pooled, config.pooled_projection_dim, "the pooled text")
        self._no_t5 = torch.zeros(
            (1, options.max_tokens or _TOKENS, config.joint_attention_dim), dtype=options.dtype, device=options.device
        )

    def condition(self, prompt: str) -> Condition:
        outputs = [clip.read(prompt) for clip in self.text[:2]]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        t5 = self.text[2].states(prompt) if len(self.text) == 3 else self._no_t5
        tokens = functional.pad(tokens, (0, t5.shape[-1] - tokens.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        return Condition({"embeddings": torch.cat([tokens, t5], 1), "pooled": pooled})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return torch.as_tensor(
            self.network(
                hidden_states=z_t,
                timestep=time,
                encoder_hidden_states=condition.tensors["embeddings"],
                pooled_projections=condition.tensors["pooled"],
                return_dict=False,
            )[0]
        )
