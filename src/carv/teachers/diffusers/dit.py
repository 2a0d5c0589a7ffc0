"""DiT: a transformer conditioned on a class (Peebles & Xie 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.teachers.base import Condition
from carv.teachers.diffusers.autoencoder import Autoencoder, load_vae, spatial_factor
from carv.teachers.diffusers.family import check_channels, load_network
from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options
from carv.teachers.diffusers.text import TextEncoder


class DiT:
    """A prompt is a class: its number, or its name where the folder has names. The empty prompt is the null class.

    The null class is the one after the last, `num_embeds_ada_norm`.

    Attributes:
        classes: the prompts of all classes, as numbers: those that the folder names, or all if it names none.
    """

    def __init__(self, folder: PipelineFolder, options: Options) -> None:
        options.refuse(folder.pipeline, "frames", "max_tokens", "distilled_guidance")
        self.network = load_network(folder, "transformer", ("DiTTransformer2DModel", "Transformer2DModel"), options)
        config = self.network.config
        vae = load_vae(folder, "AutoencoderKL", options)
        check_channels(folder, config.in_channels, int(vae.config["latent_channels"]))
        # Its positions are a table: it has one size.
        pixels = int(config.sample_size) * spatial_factor(vae)
        size = options.picture_size((pixels, pixels), (1, 1))
        if size != (pixels, pixels):
            raise ValueError(f"this DiT has one size, {pixels} x {pixels} pixels, got {size[0]} x {size[1]}")
        self.autoencoder = Autoencoder.image(vae, options, size)
        self.text: list[TextEncoder] = []
        self._classes, self._device = int(config.num_embeds_ada_norm), options.device
        labels = folder.index.get("id2label")
        self._names = _names(labels)
        # A folder may name fewer classes than its table has rows: carv's digits name ten of a thousand.
        named = sorted(int(number) for number in labels) if isinstance(labels, dict) else []
        self.classes = tuple(map(str, named or range(self._classes)))

    def condition(self, prompt: str) -> Condition:
        """`label`, an integer `[1]`.

        Raises:
            ValueError: a prompt that is no class, or a name that several classes have.
        """
        return Condition({"label": torch.tensor([self._label(prompt)], device=self._device)})

    def output(self, z_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        labels = condition.tensors["label"]
        return torch.as_tensor(self.network(z_t, timestep=time, class_labels=labels, return_dict=False)[0])

    def _label(self, prompt: str) -> int:
        if prompt == "":
            return self._classes
        if prompt.isdecimal() and int(prompt) < self._classes:
            return int(prompt)
        found = self._names.get(prompt.strip().lower(), set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise ValueError(f"{prompt!r} names the classes {', '.join(map(str, sorted(found)))}: give the number")
        known = f" or a name such as {min(self._names)!r}" if self._names else "; the folder has no names of classes"
        raise ValueError(f"{prompt!r} is no class of this DiT: give a number in 0..{self._classes - 1}{known}")


def _names(id2label: object) -> dict[str, set[int]]:
    """Name -> classes; a folder writes "tench, Tinca tinca" for the names of one class."""
    names: dict[str, set[int]] = {}
    for number, words in (id2label if isinstance(id2label, dict) else {}).items():
        for word in str(words).split(","):
            names.setdefault(word.strip().lower(), set()).add(int(number))
    return names
