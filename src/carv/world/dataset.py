"""All pictures of the world: rendered when first asked for, then read from one cached file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, save
from torch import Tensor

from carv.rng import stream
from carv.world.cameras import VIEW_WORDS, WORLD_RANGE, Cameras
from carv.world.captions import parse_prompt
from carv.world.render import colourise, render_parts
from carv.world.shapes import COLOURS, SHAPES

_log = logging.getLogger(__name__)
_SOURCES = ("shapes.py", "render.py", "cameras.py")
_GOLDEN = (5**0.5 - 1) / 2
_FORMAT = 1  # raise it when this module draws other cameras or stores other tensors


@dataclass(frozen=True)
class WorldDataset:
    """M pictures with what they show: each shape in each colour from the same cameras.

    Attributes:
        images: [M, 3, S, S] bytes, 0 to 255.
        shape: [M] place in `SHAPES`.
        colour: [M] place in `COLOURS`.
        view: [M] place in `VIEW_WORDS`.
        azimuth: [M] degrees.
        elevation: [M] degrees.
    """

    images: UInt8[Tensor, "M 3 S S"]
    shape: Int[Tensor, "M"]
    colour: Int[Tensor, "M"]
    view: Int[Tensor, "M"]
    azimuth: Float[Tensor, "M"]
    elevation: Float[Tensor, "M"]

    def __len__(self) -> int:
        return len(self.images)

    def images_float(self) -> Float[Tensor, "M 3 S S"]:
        """The pictures in [-1, 1], as the teacher sees them."""
        return self.images.float() / 127.5 - 1

    def mask(self, prompt: str) -> Bool[Tensor, "M"]:
        """Which pictures the prompt describes; the empty prompt describes all.

        Raises:
            ValueError: from `parse_prompt`.
        """
        wanted = parse_prompt(prompt)
        described = torch.ones(len(self), dtype=torch.bool)
        if wanted.shape is not None:
            described &= self.shape == list(SHAPES).index(wanted.shape)
        if wanted.colour is not None:
            described &= self.colour == list(COLOURS).index(wanted.colour)
        if wanted.view is not None:
            described &= self.view == VIEW_WORDS.index(wanted.view)
        return described


def load_world(
    size: int = 32,
    views: int = 48,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WorldDataset:
    """The world's pictures, from the cache or rendered (about 12 s on one core for the defaults).

    The file's name carries a hash of the settings and of the renderer's source, so that no other renderer's
    pictures are ever read. It is written under a temporary name and then moved: a reader sees all of it or
    none, whoever is killed or races. A file that cannot be read is rendered again, a folder that cannot be
    written is done without; both log one line.

    Args:
        size: of the pictures, pixels; rendered at twice the size and averaged down.
        views: cameras for each shape.
        seed: of the cameras.
        cache_dir: else `$CARV_CACHE`, else `~/.cache/carv`.
        progress: called with the number of shapes rendered and of all shapes, as rendering goes on.
    """
    path = _cache_folder(cache_dir) / f"world-{size}px-{views}views-{_settings_hash(size, views, seed)}.safetensors"
    if path.exists():
        try:
            return WorldDataset(**load_file(path))
        except (safetensors.SafetensorError, OSError, TypeError) as error:
            _log.warning("the cached pictures %s cannot be read (%s), rendering them again", path, error)
    world = _render_world(size, views, seed, progress)
    try:
        _write(path, save({name: tensor.contiguous() for name, tensor in vars(world).items()}))
    except OSError as error:
        _log.warning("the pictures cannot be cached (%s), they will be rendered again next time", error)
    return world


def data_cameras(shape: str, views: int, seed: int) -> Cameras:
    """The cameras that see a shape in the data: spread evenly over azimuth and elevation together.

    Camera i is uniform in stratum i of the azimuths; the elevations go through their range in steps of the golden
    ratio, modulo 1, from a random start (a Kronecker sequence: with shuffled strata, some shapes would be seen from
    above mostly on one side). All have the distance and the middle field of view of `WORLD_RANGE`.

    Args:
        shape: its name; each shape has cameras of its own.
        views: how many.
        seed: any integer.
    """
    generator = stream(seed, "world", shape).generator()
    strata, around = torch.arange(views), torch.rand(views, generator=generator)
    above = (torch.rand((), generator=generator) + _GOLDEN * strata) % 1
    low, high = WORLD_RANGE.elevation
    return Cameras(
        360 * (strata + around) / views,
        low + (high - low) * above,
        torch.full((views,), WORLD_RANGE.distance),
        torch.full((views,), sum(WORLD_RANGE.fov) / 2),
    )


def _render_world(size: int, views: int, seed: int, progress: Callable[[int, int], None] | None) -> WorldDataset:
    images, cameras = [], []
    for done, (name, shape) in enumerate(SHAPES.items()):
        if progress is not None:
            progress(done, len(SHAPES))
        seen = data_cameras(name, views, seed)
        parts = render_parts(shape, seen, 2 * size)
        for colour in COLOURS.values():
            small = torch.nn.functional.avg_pool2d(colourise(shape, parts, colour), 2)
            images.append((small * 255).round().to(torch.uint8))
            cameras.append(seen)
    if progress is not None:
        progress(len(SHAPES), len(SHAPES))
    each = torch.arange(len(SHAPES) * len(COLOURS)).repeat_interleave(views)
    return WorldDataset(
        images=torch.cat(images),
        shape=each // len(COLOURS),
        colour=each % len(COLOURS),
        view=torch.tensor([VIEW_WORDS.index(word) for seen in cameras for word in seen.words()]),
        azimuth=torch.cat([seen.azimuth for seen in cameras]),
        elevation=torch.cat([seen.elevation for seen in cameras]),
    )


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    # An empty variable counts as none.
    return Path(cache_dir or os.environ.get("CARV_CACHE") or Path("~", ".cache", "carv")).expanduser()


def _settings_hash(size: int, views: int, seed: int) -> str:
    settings = {"format": _FORMAT, "size": size, "views": views, "seed": seed, "cameras": asdict(WORLD_RANGE)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in _SOURCES:
        # Lines as text: a checkout with other line ends is the same renderer.
        digest.update(Path(__file__).with_name(name).read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
