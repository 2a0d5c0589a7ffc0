"""Stable Diffusion 1, 2 and XL: a UNet that attends to CLIP's token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder, load_vae, spatial_factor
from carv.teachers.diffusers.family import check_channels, load_network
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options, check_width, pair
from carv.teachers.diffusers.text import TextEncoder

_UNUSED = ("frames", "max_tokens", "distilled_guidance")


class StableDiffusion:
    """Stable Diffusion 1 and 2: the last hidden state of one CLIP (Rombach et al. 2022)."""

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, *_UNUSED)
        _check_unet(folder, None)
        self.autoencoder = _autoencoder(folder, options)
        self.network = load_network(folder, "unet", ("UNet2DConditionModel",), options)
        self.text = [TextEncoder.clip(folder, "", options)]
        check_width(self.text[0].width, self.network.config.cross_attention_dim, "the text encoder")

    def condition(self, prompt: str) -> Condition:
        return Condition({"embeddings": self.text[0].states(prompt)})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        embeddings = condition.tensors["embeddings"]
        return torch.as_tensor(self.network(z_t, time, encoder_hidden_states=embeddings, return_dict=False)[0])


class StableDiffusionXL:
    """SDXL: two CLIPs' last but one hidden states, the second's pooled output, the picture's size (Podell et al. 2024).

    The sizes are those of a picture that was neither cropped nor scaled. The empty prompt is all zeros where
    the folder says `force_zeros_for_empty_prompt`, as SDXL's does.
    """

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, *_UNUSED)
        _check_unet(folder, "text_time")
        self.autoencoder = _autoencoder(folder, options)
        self.network = load_network(folder, "unet", ("UNet2DConditionModel",), options)
        self.text = [
            TextEncoder.clip(folder, "", options),
            TextEncoder.clip(folder, "_2", options, "CLIPTextModelWithProjection"),
        ]
        config, second = self.network.config, self.text[1].model.config
        check_width(sum(text.width for text in self.text), config.cross_attention_dim, "the text encoders together")
        # Six sizes. The refiner has five (an aesthetic score in place of two), and is no teacher by itself.
        added = second.projection_dim + 6 * config.addition_time_embed_dim
        check_width(added, config.projection_class_embeddings_input_dim, "the pooled text with six picture sizes")
        self._zeros = bool(folder.index.get("force_zeros_for_empty_prompt", True))
        height, width = self.autoencoder.picture_shape[-2:]
        self._sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=options.device)

    def condition(self, prompt: str) -> Condition:
        outputs = [text.read(prompt) for text in self.text]
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = outputs[1].text_embeds
        if prompt == "" and self._zeros:
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        return Condition({"embeddings": embeddings, "pooled": pooled, "sizes": self._sizes})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        tensors = condition.tensors
        added = {"text_embeds": tensors["pooled"], "time_ids": tensors["sizes"]}
        return torch.as_tensor(
            self.network(
                z_t,
                time,
                encoder_hidden_states=tensors["embeddings"],
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        )


def _autoencoder(folder: PipelineFolder, options: Options) -> Autoencoder:
    """The VAE, for the size of the UNet's training unless told otherwise."""
    config = folder.config("unet")
    vae = load_vae(folder, "AutoencoderKL", options)
    check_channels(folder, int(config.get("in_channels", 4)), int(vae.config["latent_channels"]))
    factor = spatial_factor(vae)
    if config.get("sample_size") is None and options.size is None:
        raise ValueError(f"the UNet in {folder.path} does not say its sample_size: pass size=, in pixels")
    height, width = pair(config.get("sample_size") or 0)
    size = options.picture_size((height * factor, width * factor), (factor, factor))
    return Autoencoder.image(vae, options, size)


def _check_unet(folder: PipelineFolder, addition: str | None) -> None:
    """Raise for UNets with inputs that carv does not give."""
    config = folder.config("unet")
    got = {name: config.get(name) for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")}
    expected = {"addition_embed_type": addition, "class_embed_type": None, "encoder_hid_dim_type": None}
    if got != expected or config.get("num_class_embeds") is not None:
        raise ValueError(
            f"the UNet in {folder.path} takes inputs that those of a {folder.pipeline} do not: "
            f"{', '.join(f'{name} {value}' for name, value in got.items())}, "
            f"num_class_embeds {config.get('num_class_embeds')}"
        )
