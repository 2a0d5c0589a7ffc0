"""The world's objects, as signed distance functions: negative inside, never more than the true distance.

Every function here is 1-Lipschitz (unions, intersections and rigid motions of 1-Lipschitz functions are), which
is what sphere tracing needs. Objects lie in the unit ball, stand upright along z and face +x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Solid: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Coordinates x, y, z, each [N], to distances [N]. Columns, since strided ones would be slow."""

Colour: TypeAlias = tuple[float, float, float]
"""Red, green and blue, between 0 and 1."""

RADIUS = 1.0
"""All objects lie in the ball of this radius around the origin."""

COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.13, 0.60, 0.20),
    "cyan": (0.10, 0.76, 0.80),
    "blue": (0.12, 0.26, 0.86),
    "purple": (0.50, 0.16, 0.68),
    "pink": (0.99, 0.54, 0.74),
}
"""The colours that a prompt may name."""

_WOOD = (0.50, 0.33, 0.18)
_BLACK = (0.10, 0.10, 0.11)
_SLATE = (0.30, 0.32, 0.37)
_METAL = (0.45, 0.45, 0.48)
_CREAM = (0.96, 0.91, 0.80)
_GLASS = (0.66, 0.84, 0.94)
_CARROT = (0.96, 0.48, 0.10)
_LIGHT = (1.00, 0.93, 0.55)
_BRICK = (0.55, 0.24, 0.18)
_COFFEE = (0.30, 0.17, 0.09)


@dataclass(frozen=True)
class Part:
    """One solid of an object.

    Attributes:
        solid: its signed distance function.
        colour: its own colour, or None for the one that the prompt names.
    """

    solid: Solid
    colour: Colour | None = None


@dataclass(frozen=True)
class Shape:
    """An object: the union of its parts. The first part takes the prompt's colour.

    Attributes:
        parts: what it is made of.
    """

    parts: tuple[Part, ...]

    def distance(self, x: Float[Tensor, "N"], y: Float[Tensor, "N"], z: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The signed distance alone, from coordinates: the inner loop of sphere tracing."""
        return union(*(part.solid for part in self.parts))(x, y, z)

    def sample(self, points: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
        """The signed distance of each point and the number of the part that it is nearest to."""
        x, y, z = points.T.contiguous()
        distance, part = torch.stack([part.solid(x, y, z) for part in self.parts]).min(dim=0)
        return distance, part

    def palette(self, colour: Colour) -> Float[Tensor, "P 3"]:
        """The colour of each part when the prompt names `colour`."""
        return torch.tensor([part.colour or colour for part in self.parts])


def ball(radius: float) -> Solid:
    """A ball around the origin."""
    return lambda x, y, z: torch.sqrt(x * x + y * y + z * z) - radius


def ellipsoid(a: float, b: float, c: float) -> Solid:
    """An ellipsoid with these half-axes; its distance is only a bound, exact for a = b = c."""
    least = min(a, b, c)
    return lambda x, y, z: (torch.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) - 1) * least


def box(a: float, b: float, c: float, rounded: float = 0.0) -> Solid:
    """A box with these half-sides, its edges rounded off with a radius."""

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        qx, qy, qz = x.abs() - (a - rounded), y.abs() - (b - rounded), z.abs() - (c - rounded)
        outside = torch.sqrt(qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2 + qz.clamp(min=0) ** 2)
        return outside + torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0) - rounded

    return distance


def cylinder(radius: float, half: float) -> Solid:
    """An upright cylinder of height 2 half."""

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        side, cap = torch.sqrt(x * x + y * y) - radius, z.abs() - half
        return torch.sqrt(side.clamp(min=0) ** 2 + cap.clamp(min=0) ** 2) + torch.maximum(side, cap).clamp(max=0)

    return distance


def cone(bottom: float, top: float, half: float) -> Solid:
    """An upright truncated cone of height 2 half, with its radii below and above."""
    slope_r, slope_z = top - bottom, 2 * half
    length = slope_r**2 + slope_z**2

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        r = torch.sqrt(x * x + y * y)
        cap_r = (r - torch.where(z < 0, bottom, top)).clamp(min=0)
        cap_z = z.abs() - half
        along = (((r - bottom) * slope_r + (z + half) * slope_z) / length).clamp(0, 1)
        side_r, side_z = r - bottom - along * slope_r, z + half - along * slope_z
        nearest = torch.sqrt(torch.minimum(cap_r**2 + cap_z**2, side_r**2 + side_z**2))
        return torch.where((side_r < 0) & (cap_z < 0), -nearest, nearest)

    return distance


def torus(major: float, minor: float) -> Solid:
    """A ring around the z axis: circles of radius `minor` at `major` from the axis."""
    return lambda x, y, z: torch.sqrt((torch.sqrt(x * x + y * y) - major) ** 2 + z * z) - minor


def gable(a: float, b: float, height: float) -> Solid:
    """A roof over the rectangle of half-sides a and b at z = 0; its ridge runs along x, at z = height."""
    norm = math.hypot(b, height)
    along_y, along_z = height / norm, b / norm

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        slope = y.abs() * along_y + (z - height) * along_z
        return torch.maximum(torch.maximum(slope, -z), x.abs() - a)

    return distance


def above(height: float) -> Solid:
    """The half-space over z = height."""
    return lambda x, y, z: height - z


def below(height: float) -> Solid:
    """The half-space under z = height."""
    return lambda x, y, z: z - height


def union(*solids: Solid) -> Solid:
    """What lies in any of the solids."""

    def distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        nearest = solids[0](x, y, z)
        for solid in solids[1:]:
            nearest = torch.minimum(nearest, solid(x, y, z))
        return nearest

    return distance


def overlap(first: Solid, second: Solid) -> Solid:
    """What lies in both solids."""
    return lambda x, y, z: torch.maximum(first(x, y, z), second(x, y, z))


def carved(solid: Solid, hole: Solid) -> Solid:
    """The solid without the hole."""
    return lambda x, y, z: torch.maximum(solid(x, y, z), -hole(x, y, z))


def at(x0: float, y0: float, z0: float, solid: Solid) -> Solid:
    """The solid moved so that its origin is there."""
    return lambda x, y, z: solid(x - x0, y - y0, z - z0)


def along_x(solid: Solid) -> Solid:
    """The solid laid down so that its z axis points to +x."""
    return lambda x, y, z: solid(y, z, x)


def along_y(solid: Solid) -> Solid:
    """The solid laid down so that its z axis points to +y."""
    return lambda x, y, z: solid(z, x, y)


def tilted(degrees: float, solid: Solid) -> Solid:
    """The solid turned around the y axis, its top towards +x."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y, z: solid(c * x - s * z, y, s * x + c * z)


def turned(degrees: float, solid: Solid) -> Solid:
    """The solid turned around the z axis, from +x towards +y."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y, z: solid(c * x + s * y, c * y - s * x, z)


def left_and_right(solid: Solid) -> Solid:
    """The solid's half at y > 0, and its mirror image at y < 0."""
    return lambda x, y, z: solid(x, y.abs(), z)


def four_times(solid: Solid) -> Solid:
    """The solid's quarter at x > 0, y > 0, mirrored into all four quarters."""
    return lambda x, y, z: solid(x.abs(), y.abs(), z)


_CHAIR = Shape(
    (
        Part(union(at(0, 0, -0.08, box(0.40, 0.38, 0.07, 0.03)), at(-0.34, 0, 0.36, box(0.06, 0.38, 0.44, 0.03)))),
        Part(four_times(at(0.31, 0.30, -0.47, box(0.055, 0.055, 0.35))), _WOOD),
    )
)

_TABLE = Shape(
    (
        Part(at(0, 0, 0.26, box(0.46, 0.72, 0.07, 0.03))),
        Part(four_times(at(0.35, 0.58, -0.20, box(0.06, 0.06, 0.42))), _WOOD),
    )
)

_HOUSE = Shape(
    (
        Part(union(at(0, 0, -0.30, box(0.46, 0.46, 0.36)), at(0, 0, 0.05, gable(0.46, 0.46, 0.50)))),
        # The roof: a larger gable without the smaller one that the walls fill.
        Part(carved(at(0, 0, 0.03, gable(0.54, 0.60, 0.65)), at(0, 0, -0.08, gable(0.9, 0.60, 0.65))), _SLATE),
        Part(at(0.46, 0, -0.44, box(0.03, 0.12, 0.22)), _WOOD),
        Part(
            union(
                left_and_right(at(0.46, 0.30, -0.22, box(0.02, 0.09, 0.10))),
                left_and_right(at(0, 0.46, -0.20, box(0.18, 0.02, 0.12))),
            ),
            _GLASS,
        ),
        Part(at(-0.20, 0.30, 0.46, box(0.08, 0.08, 0.22)), _BRICK),
    )
)

_TREE = Shape(
    (
        Part(
            union(
                at(0, 0, -0.14, cone(0.60, 0.16, 0.27)),
                at(0, 0, 0.21, cone(0.48, 0.12, 0.24)),
                at(0, 0, 0.60, cone(0.36, 0.0, 0.31)),
            )
        ),
        Part(at(0, 0, -0.62, cylinder(0.11, 0.30)), _WOOD),
    )
)

_ROCKET = Shape(
    (
        Part(union(at(0, 0, -0.08, cylinder(0.25, 0.42)), at(0, 0, 0.39, cone(0.25, 0.19, 0.05)))),
        Part(at(0, 0, 0.68, cone(0.19, 0.0, 0.24)), _SLATE),
        Part(
            four_times(
                turned(
                    45, overlap(at(0.38, 0, -0.46, box(0.18, 0.035, 0.32)), at(0.40, 0, -0.36, tilted(48, below(0))))
                )
            ),
            _SLATE,
        ),
        Part(at(0.21, 0, 0.14, ball(0.12)), _GLASS),
        Part(at(0, 0, -0.70, cone(0.03, 0.18, 0.20)), _CARROT),
    )
)

_SNOWMAN = Shape(
    (
        Part(union(at(0, 0, -0.50, ball(0.40)), at(0, 0, 0.06, ball(0.30)), at(0, 0, 0.46, ball(0.21)))),
        Part(
            union(
                at(0, 0, 0.60, cylinder(0.27, 0.025)),
                at(0, 0, 0.76, cylinder(0.17, 0.17)),
                left_and_right(at(0.18, 0.09, 0.52, ball(0.055))),
                at(0.28, 0, 0.12, ball(0.055)),
                at(0.28, 0, -0.03, ball(0.055)),
                at(0.36, 0, -0.36, ball(0.055)),
            ),
            _BLACK,
        ),
        Part(at(0.31, 0, 0.44, along_x(cone(0.07, 0.01, 0.14))), _CARROT),
        Part(left_and_right(at(0, 0.44, 0.14, along_y(cylinder(0.035, 0.22)))), _WOOD),
    )
)

_MUSHROOM = Shape(
    (
        Part(overlap(at(0, 0, 0.06, ellipsoid(0.74, 0.74, 0.66)), above(0.06))),
        Part(at(0, 0, -0.36, cone(0.30, 0.20, 0.44)), _CREAM),
        Part(
            union(
                at(0, 0, 0.70, ellipsoid(0.18, 0.18, 0.06)),
                four_times(turned(45, at(0.57, 0, 0.44, tilted(48, ellipsoid(0.15, 0.15, 0.06))))),
                turned(22, four_times(at(0.71, 0, 0.22, ball(0.09)))),
                turned(22, four_times(at(0, 0.71, 0.22, ball(0.09)))),
            ),
            _CREAM,
        ),
    )
)

_LAMP = Shape(
    (
        Part(at(0, 0, 0.40, cone(0.56, 0.28, 0.34))),
        Part(union(at(0, 0, -0.80, cylinder(0.34, 0.05)), at(0, 0, -0.37, cylinder(0.055, 0.45))), _METAL),
        Part(at(0, 0, 0.04, ball(0.16)), _LIGHT),
    )
)

_CUP = Shape(
    (
        Part(
            union(
                carved(at(0, -0.12, 0, cone(0.46, 0.54, 0.56)), at(0, -0.12, 0.16, cone(0.42, 0.47, 0.56))),
                carved(at(0, 0.44, 0, along_x(torus(0.30, 0.075))), at(0, -0.12, 0, cylinder(0.46, 0.5))),
            )
        ),
        Part(at(0, -0.12, 0.0, cylinder(0.47, 0.36)), _COFFEE),
    )
)

_CAR = Shape(
    (
        Part(union(at(0, 0, -0.16, box(0.82, 0.36, 0.19, 0.07)), at(-0.10, 0, 0.31, box(0.36, 0.29, 0.045, 0.03)))),
        Part(at(-0.10, 0, 0.14, overlap(box(0.46, 0.31, 0.18, 0.03), at(0, 0, 0, cone(0.62, 0.46, 0.18)))), _GLASS),
        Part(
            union(*(left_and_right(at(x, 0.33, -0.34, along_y(cylinder(0.20, 0.08)))) for x in (-0.48, 0.48))), _BLACK
        ),
        Part(
            union(*(left_and_right(at(x, 0.38, -0.34, along_y(cylinder(0.09, 0.05)))) for x in (-0.48, 0.48))), _METAL
        ),
        Part(left_and_right(at(0.80, 0.23, -0.11, ball(0.085))), _LIGHT),
        Part(left_and_right(at(-0.81, 0.25, -0.10, box(0.03, 0.08, 0.05))), _BRICK),
    )
)

_DUCK = Shape(
    (
        Part(
            union(
                at(-0.08, 0, -0.34, ellipsoid(0.66, 0.48, 0.40)),
                at(0.26, 0, 0.30, ball(0.34)),
                at(-0.66, 0, -0.10, tilted(-50, cone(0.22, 0.03, 0.20))),
                left_and_right(at(-0.12, 0.46, -0.24, tilted(-75, ellipsoid(0.18, 0.09, 0.34)))),
            )
        ),
        Part(at(0.62, 0, 0.24, ellipsoid(0.20, 0.17, 0.075)), _CARROT),
        Part(left_and_right(at(0.51, 0.16, 0.42, ball(0.065))), _BLACK),
    )
)

SHAPES: dict[str, Shape] = {
    "sphere": Shape((Part(ball(0.80)),)),
    "cube": Shape((Part(box(0.54, 0.54, 0.54, 0.02)),)),
    "cylinder": Shape((Part(cylinder(0.50, 0.68)),)),
    "cone": Shape((Part(at(0, 0, 0.05, cone(0.64, 0.0, 0.72))),)),
    # Upright, its hole to the front.
    "torus": Shape((Part(along_x(torus(0.60, 0.23))),)),
    "chair": _CHAIR,
    "table": _TABLE,
    "house": _HOUSE,
    "tree": _TREE,
    "rocket": _ROCKET,
    "snowman": _SNOWMAN,
    "mushroom": _MUSHROOM,
    "lamp": _LAMP,
    "cup": _CUP,
    "car": _CAR,
    "duck": _DUCK,
}
"""The objects that a prompt may name; the place of a shape here is its number in `WorldDataset.shape`."""
