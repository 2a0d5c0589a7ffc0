"""Embeddings of pictures and captions by a CLIPModel of transformers, and their cosines."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from carv.clip.folder import load_model, load_tokenizer, locate
from carv.clip.preprocess import Preprocessing
from carv.extras import require

_AT_ONCE = 128
_SLACK = 1e-3  # beyond [0, 1]: a renderer's rounding


@torch.no_grad()
def image_features(model: Any, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M D"]:
    """Unit embeddings of pictures that are prepared for the model already.

    Args:
        model: a `CLIPModel`.
        pixels: resized and normalised, see `Preprocessing`.
    """
    # The parts and not get_image_features: what that returns has changed between transformers' versions.
    pooled = [model.vision_model(pixel_values=chunk).pooler_output for chunk in torch.split(pixels, _AT_ONCE)]
    return functional.normalize(model.visual_projection(torch.cat(pooled)), dim=-1)


@torch.no_grad()
def text_features(model: Any, ids: Int[Tensor, "C length"]) -> Float[Tensor, "C D"]:
    """Unit embeddings of captions.

    Args:
        model: a `CLIPModel`.
        ids: their tokens, padded behind the end token. The encoder is causal, so that padding changes nothing.
    """
    return functional.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)


def similarities(model: Any, pixels: Float[Tensor, "M 3 S S"], ids: Int[Tensor, "C length"]) -> Float[Tensor, "M C"]:
    """Cosine of every picture's and every caption's embedding; arguments as above."""
    return image_features(model, pixels) @ text_features(model, ids).T


@dataclass(frozen=True)
class Clip:
    """A CLIP with its own preparation of pictures and captions, frozen, in float32.

    Attributes:
        name: what records call it.
        model: a `CLIPModel`.
        tokenizer: a `CLIPTokenizer`.
        preprocess: of pictures.

    Source:
        CLIP (Radford et al. 2021, arXiv 2103.00020).

    Example:
        >>> clip = Clip.from_pretrained("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")     # doctest: +SKIP
        >>> cosines = clip.similarities(pictures, ["a red chair", "a blue car"])     # doctest: +SKIP
        >>> clip_score(cosines[:, 0]), r_precision(cosines, own)                     # doctest: +SKIP
    """

    name: str
    model: Any
    tokenizer: Any
    preprocess: Preprocessing

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: torch.device | str = "cpu",
        download: bool = False,
        revision: str | None = None,
    ) -> Clip:
        """A CLIP from a folder that `CLIPModel` and `CLIPProcessor` load; safetensors only, and no code is run.

        Args:
            path_or_id: a folder, or "owner/name" on the hub.
            device: where the networks go.
            download: fetch what the local cache lacks; otherwise only the cache is looked at.
            revision: the hub's branch, tag or commit; a model whose main branch has pickles only may have one with
                safetensors.

        Raises:
            ValueError: nothing is there, it is not a CLIP, or it is damaged: one sentence that says which.
            ImportError: transformers is not installed.
        """
        require("transformers", "diffusers")
        folder = locate(path_or_id, download, revision)
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        clip = cls(str(path_or_id), model.to(device), tokenizer, Preprocessing.read(folder))
        clip._prepare(torch.zeros(1, 3, clip.size, clip.size))
        return clip

    @property
    def size(self) -> int:
        """Pixels along each side of what the model reads; pictures of this size are not resized."""
        return int(self.model.config.vision_config.image_size)

    def image_features(self, images: Float[Tensor, "M 3 H W"]) -> Float[Tensor, "M D"]:
        """Unit embeddings of pictures, on the CPU.

        Args:
            images: in [0, 1], of any size.

        Raises:
            ValueError: pictures that are not in [0, 1], or not finite.
        """
        low, high = images.min(), images.max()
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # false for NaN too
            raise ValueError(f"CLIP takes pictures in [0, 1], got values from {float(low):.3g} to {float(high):.3g}")
        chunks = torch.split(images.float().clamp(0, 1), _AT_ONCE)
        return torch.cat([image_features(self.model, self._prepare(chunk)).cpu() for chunk in chunks])

    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "C D"]:
        """Unit embeddings of captions, on the CPU. A caption's end that does not fit is cut off, with a warning."""
        length = min(int(self.tokenizer.model_max_length), int(self.model.config.text_config.max_position_embeddings))
        tokens = self.tokenizer(list(captions), truncation=False).input_ids
        for caption, ids in zip(captions, tokens, strict=True):
            if len(ids) > length:
                warnings.warn(
                    f"the CLIP reads {length} tokens of a caption, and {caption!r} has {len(ids)}: its end is cut off",
                    stacklevel=2,
                )
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = self.tokenizer(list(captions), **options).input_ids
        return text_features(self.model, ids.to(self.model.device)).cpu()

    def similarities(self, images: Float[Tensor, "M 3 H W"], captions: Sequence[str]) -> Float[Tensor, "M C"]:
        """Cosine of every picture's and every caption's embedding, float32, on the CPU.

        Args:
            images: in [0, 1], of any size.
            captions: C texts.

        Raises:
            ValueError: pictures that are not in [0, 1], or not finite.
        """
        return self.image_features(images) @ self.text_features(captions).T

    def _prepare(self, images: Tensor) -> Tensor:
        pixels = self.preprocess(images.to(self.model.device))
        if pixels.shape[-2:] != (self.size, self.size):
            high, wide = pixels.shape[-2:]
            raise ValueError(f"{self.name} reads {self.size}x{self.size} pixels, and its settings make {high}x{wide}")
        return pixels
