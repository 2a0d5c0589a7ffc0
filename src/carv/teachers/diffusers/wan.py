"""Wan: a flow transformer on video latents, conditioned on UMT5's tokens (Wan Team 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.extras import require
from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder, load_vae, spatial_factor
from carv.teachers.diffusers.family import check_channels, load_network
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options, check_width
from carv.teachers.diffusers.text import TextEncoder

# The pipeline's defaults; the folder does not say.
_TOKENS = 512
_SIZE = (480, 832)
_FRAMES = 81


class Wan:
    """Wan 2.1, and those of 2.2 that have one network. Latents are `[C, F, H, W]`.

    Wan 2.2's 5B network is given a time for each patch (`expand_timesteps`); from text alone these are all
    equal, and one time for each video is the same.
    """

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, "distilled_guidance")
        if folder.has("transformer_2") or folder.index.get("boundary_ratio") is not None:
            raise ValueError(
                f"{folder.path} has two networks, one for large and one for small t (Wan 2.2 A14B); "
                "carv reads pipelines with one"
            )
        self.network = load_network(folder, "transformer", ("WanTransformer3DModel",), options)
        config = self.network.config
        vae = load_vae(folder, "AutoencoderKLWan", options)
        check_channels(folder, config.in_channels, int(vae.config["z_dim"]))
        if config.patch_size[0] != 1:
            raise ValueError(f"the network in {folder.path} has patches over {config.patch_size[0]} frames, not 1")
        factor = spatial_factor(vae)
        size = options.picture_size(_SIZE, (config.patch_size[1] * factor, config.patch_size[2] * factor))
        frames = _FRAMES if options.frames is None else options.frames
        self.autoencoder = Autoencoder.video(vae, options, size, frames)
        self.text = [TextEncoder.t5(folder, "", options, _TOKENS, "UMT5EncoderModel")]
        check_width(self.text[0].width, config.text_dim, "the text encoder")

    def condition(self, prompt: str) -> Condition:
        clean = require("diffusers.pipelines.wan.pipeline_wan", "diffusers").prompt_clean
        return Condition({"embeddings": self.text[0].masked_states(clean(prompt))})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        embeddings = condition.tensors["embeddings"]
        return torch.as_tensor(
            self.network(hidden_states=z_t, timestep=time, encoder_hidden_states=embeddings, return_dict=False)[0]
        )
