"""Real latents for the discriminator: digits, a folder of pictures, or latents made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from carv.extras import require
from carv.gradient import Renders
from carv.tasks.distill.gradient import Generated
from carv.tasks.distill.networks import Classes
from carv.teachers.diffusers import DiffusersTeacher

_BATCH = 64
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class RealLatents:
    """Latents of real pictures, each with the place of its class in `Classes.names`.

    Attributes:
        z: `[N, *latent]`.
        label: `[N]`.
    """

    z: Tensor
    label: Tensor

    def draw(self, renders: Renders, classes: Classes) -> Generated:
        """One of the latents for each render, drawn with replacement from the render's stream."""
        index = torch.tensor(
            [int(torch.randint(len(self.z), (), generator=s.child("picture").generator())) for s in renders],
            device=self.z.device,
        )
        label = self.label[index]
        return Generated(self.z[index], classes.rows.rows(label), label)


def load_real(data: str, teacher: DiffusersTeacher, classes: Classes) -> RealLatents:
    """The real latents that the settings name.

    Args:
        data: "digits" (the training split of `carv.world.digits`); a folder with one sub-folder of pictures for each
            class, of the class's name; or a safetensors file with `latents` `[N, *latent]` in the teacher's scaling and
            `labels` `[N]`, which are the class numbers.
        teacher: whose autoencoder encodes pictures.
        classes: what is distilled; pictures of others are left out.

    Raises:
        ValueError: nothing of that name, or none of the classes in it.
    """
    if data == "digits":
        from carv.world.digits import load_digits  # scikit-learn, an extra

        digits = load_digits("train")
        names = [str(int(label)) for label in digits.label]
        return _encoded(digits.pictures, names, teacher, classes, data)
    path = Path(data)
    if path.suffix == ".safetensors":
        return _latents(path, teacher, classes)
    if path.is_dir():
        pictures, names = _pictures(path, teacher.picture_shape)
        return _encoded(pictures, names, teacher, classes, data)
    raise ValueError(f"no data {data!r}: give digits, a folder with a sub-folder for each class, or a safetensors file")


def _pictures(folder: Path, shape: tuple[int, ...]) -> tuple[Tensor, list[str]]:
    """uint8 `[N, 3, H, W]` at the teacher's size, and the sub-folder of each."""
    image = require("PIL.Image", "diffusers")
    found, names = [], []
    for path in sorted(p for p in folder.glob("*/*") if p.suffix.lower() in _PICTURES):
        with image.open(path) as picture:
            small = picture.convert("RGB").resize((shape[-1], shape[-2]), image.Resampling.BICUBIC)
        data = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        found.append(data.view(shape[-2], shape[-1], 3).permute(2, 0, 1))
        names.append(path.parent.name)
    if not found:
        raise ValueError(f"{folder} has no pictures ({', '.join(_PICTURES)}) in sub-folders named after classes")
    return torch.stack(found), names


def _encoded(
    pictures: Tensor, names: Sequence[str], teacher: DiffusersTeacher, classes: Classes, data: str
) -> RealLatents:
    place = {name: number for number, name in enumerate(classes.names)}
    kept = [i for i, name in enumerate(names) if name in place]
    if not kept:
        raise ValueError(f"no picture of {data} is of a class that is distilled ({', '.join(classes.names[:5])}, ...)")
    with torch.no_grad():
        parts = [
            teacher.encode(pictures[kept[i : i + _BATCH]].to(teacher.device).float() / 255)
            for i in range(0, len(kept), _BATCH)
        ]
    return RealLatents(torch.cat(parts), torch.tensor([place[names[i]] for i in kept], device=teacher.device))


def _latents(path: Path, teacher: DiffusersTeacher, classes: Classes) -> RealLatents:
    try:
        with safe_open(path, "pt") as file:
            latents, labels = file.get_tensor("latents"), file.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file with latents and labels: {error}") from error
    if latents.shape[1:] != teacher.latent_shape or labels.shape != latents.shape[:1]:
        raise ValueError(
            f"{path} needs latents [N, {', '.join(map(str, teacher.latent_shape))}] and labels [N], "
            f"got {list(latents.shape)} and {list(labels.shape)}"
        )
    place = {name: number for number, name in enumerate(classes.names)}
    kept = [i for i, label in enumerate(labels.tolist()) if str(label) in place]
    if not kept:
        raise ValueError(f"no latent of {path} is of a class that is distilled ({', '.join(classes.names[:5])}, ...)")
    where = torch.tensor([place[str(labels[i].item())] for i in kept], device=teacher.device)
    return RealLatents(latents[kept].to(teacher.device, torch.float32), where)
