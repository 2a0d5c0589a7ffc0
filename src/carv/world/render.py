"""Pictures of the world's objects by sphere tracing: what the teacher is trained on, and what SDS is scored with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from carv.world.cameras import Cameras
from carv.world.captions import parse_prompt
from carv.world.shapes import COLOURS, RADIUS, SHAPES, Colour, Shape

BACKGROUND: Colour = (0.92, 0.93, 0.95)
"""What rays see that hit nothing; the 3D representation composites onto it as well."""

# The sun stands still in the world, so the same spot has the same colour from everywhere, as in a field
# without view dependence. In front, to the left, high: front, sides and back are told apart by their shade.
_SUN = (0.50, -0.42, 0.76)
_AMBIENT, _SKY, _DIFFUSE = 0.52, 0.13, 0.35  # the sum, 1, is the brightest possible
_OCCLUSION, _REACH = 0.35, 0.15  # how dark creases get, and how far away a surface still darkens

_STEPS = 96
_NEAR_ENOUGH = 1e-3  # a pixel of 64 spans 3e-2 there
_CHUNK = 32768  # rays at a time: the columns stay in the cache
_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))


class Parts(NamedTuple):
    """What every pixel sees, without the prompt's colour.

    Attributes:
        shade: [R, H, W] brightness between 0 and 1; 1 where nothing is hit.
        part: [R, H, W] number of the shape's part; 0 where nothing is hit.
        hit: [R, H, W] whether the ray meets the object.
    """

    shade: Float[Tensor, "R H W"]
    part: Int[Tensor, "R H W"]
    hit: Bool[Tensor, "R H W"]


def render_parts(shape: Shape, cameras: Cameras, size: int) -> Parts:
    """Traces one ray through the centre of every pixel; the expensive part, the same for all colours.

    The shade is `a + s (1 + n_z)/2 + d max(0, n.sun)` (ambient light, sky, sun), times a factor for creases
    from the distance function at one point a little above the surface.

    Args:
        shape: the object.
        cameras: R cameras.
        size: H = W, pixels.
    """
    origins, directions = cameras.rays(size)
    ray_count = size * size
    directions = directions.reshape(-1, 3)
    shade, part = torch.ones(len(directions)), torch.zeros(len(directions), dtype=torch.long)
    hit = torch.zeros(len(directions), dtype=torch.bool)
    # Only the stretch inside the bounding ball can meet the object.
    start = origins.repeat_interleave(ray_count, dim=0)
    nearest = -(start * directions).sum(-1)
    half_squared = RADIUS**2 - (start * start).sum(-1) + nearest**2
    meets = (half_squared > 0).nonzero()[:, 0]
    half = half_squared[meets].sqrt()
    enter, leave = (nearest[meets] - half).clamp(min=0), nearest[meets] + half
    for first in range(0, len(meets), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        rays = meets[chunk]
        found, points = _trace(shape, start[rays], directions[rays], enter[chunk], leave[chunk])
        where = rays[found]
        hit[where] = True
        shade[where] = _shade(shape, points)
        part[where] = shape.sample(points)[1]
    picture = (len(cameras), size, size)
    return Parts(shade.view(picture), part.view(picture), hit.view(picture))


def colourise(shape: Shape, parts: Parts, colour: Colour) -> Float[Tensor, "R 3 H W"]:
    """The pictures in [0, 1] of a traced shape in one colour.

    Args:
        shape: the shape that `parts` was traced from.
        parts: from `render_parts`.
        colour: of the parts that have none of their own.
    """
    lit = shape.palette(colour)[parts.part] * parts.shade[..., None]
    return torch.where(parts.hit[..., None], lit, torch.tensor(BACKGROUND)).movedim(-1, 1)


def render_object(caption: str, cameras: Cameras, size: int, supersample: int = 2) -> Float[Tensor, "R 3 size size"]:
    """The true pictures in [0, 1] of the object that a caption names; the caption's view word is ignored.

    Args:
        caption: with a colour and a shape, such as "a red chair".
        cameras: R cameras.
        size: pixels along each side.
        supersample: every pixel is the average of this many squared.

    Raises:
        ValueError: the caption has an unknown word, or lacks the colour or the shape.
    """
    prompt = parse_prompt(caption)
    if prompt.shape is None or prompt.colour is None:
        raise ValueError(f"only a caption with a colour and a shape can be drawn, got {caption!r}")
    shape = SHAPES[prompt.shape]
    pictures = colourise(shape, render_parts(shape, cameras, size * supersample), COLOURS[prompt.colour])
    return torch.nn.functional.avg_pool2d(pictures, supersample)


def _trace(
    shape: Shape,
    start: Float[Tensor, "N 3"],
    direction: Float[Tensor, "N 3"],
    enter: Float[Tensor, "N"],
    leave: Float[Tensor, "N"],
) -> tuple[Int[Tensor, "H"], Float[Tensor, "H 3"]]:
    """Sphere tracing: which of the rays hit, and where. Each step goes as far as the distance function allows."""
    which, depth, ends = torch.arange(len(enter)), enter, leave
    ox, oy, oz = start.T.contiguous()
    dx, dy, dz = direction.T.contiguous()
    hits, points = [], []
    for step in range(_STEPS):
        x, y, z = ox + depth * dx, oy + depth * dy, oz + depth * dz
        distance = shape.distance(x, y, z)
        # Rays that still creep along a surface after all steps graze it: they count as hits.
        arrived = distance < (_NEAR_ENOUGH if step < _STEPS - 1 else 10 * _NEAR_ENOUGH)
        hits.append(which[arrived])
        points.append(torch.stack([x[arrived], y[arrived], z[arrived]], dim=-1))
        depth = depth + distance
        going = ~arrived & (depth < ends)
        which, depth, ends = which[going], depth[going], ends[going]
        ox, oy, oz, dx, dy, dz = (column[going] for column in (ox, oy, oz, dx, dy, dz))
        if len(which) == 0:
            break
    return torch.cat(hits), torch.cat(points)


def _shade(shape: Shape, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N"]:
    x, y, z = points.T.contiguous()
    # The gradient from four values at the corners of a tetrahedron.
    normal, h = torch.zeros(3, len(points)), 2e-3
    for corner in _TETRAHEDRON:
        ex, ey, ez = corner
        normal += torch.tensor(corner)[:, None] * shape.distance(x + h * ex, y + h * ey, z + h * ez)
    normal = torch.nn.functional.normalize(normal, dim=0)
    sun = torch.nn.functional.normalize(torch.tensor(_SUN), dim=0)
    light = _AMBIENT + _SKY * (1 + normal[2]) / 2 + _DIFFUSE * (sun @ normal).clamp(min=0)
    free = shape.distance(x + _REACH * normal[0], y + _REACH * normal[1], z + _REACH * normal[2]) / _REACH
    return light * (1 - _OCCLUSION * (1 - free.clamp(0, 1)))
