"""Pinhole cameras that look at the origin: z is up, azimuth 0 sees the front, positive elevation is above.

The world's objects lie in the unit ball around the origin and face +x. A camera at azimuth a and elevation e,
at distance d, stands at d (cos e cos a, cos e sin a, sin e); so azimuth 0 is on the +x axis (the front), and
azimuth 90 on the +y axis, which is to the right in a picture of the front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv.gradient import Renders

VIEW_WORDS = ("front", "side", "back", "overhead")
"""What a prompt may say about the camera; the place of a word here is its number in `WorldDataset.view`."""

FRONT_WITHIN = 45.0
"""Degrees of azimuth from 0 that still are "front", and from 180 that still are "back"."""

OVERHEAD_ABOVE = 30.0
"""Degrees of elevation above which a view is "overhead" at any azimuth; `WORLD_RANGE` reaches 45."""

_HELD_OUT_ELEVATION = 15.0


@dataclass(frozen=True)
class Cameras:
    """R cameras, see the module for the axes.

    Attributes:
        azimuth: [R] degrees.
        elevation: [R] degrees, between -90 and 90.
        distance: [R] from the origin, in units of the world (objects have radius up to 1).
        fov: [R] the vertical field of view, degrees; pictures are square, so the horizontal one too.
    """

    azimuth: Float[Tensor, "R"]
    elevation: Float[Tensor, "R"]
    distance: Float[Tensor, "R"]
    fov: Float[Tensor, "R"]

    def __post_init__(self) -> None:
        shapes = {tuple(part.shape) for part in (self.azimuth, self.elevation, self.distance, self.fov)}
        if len(shapes) != 1 or len(shapes.pop()) != 1:
            raise ValueError("azimuth, elevation, distance and fov must be vectors of one length")

    def __len__(self) -> int:
        return len(self.azimuth)

    def __getitem__(self, which: slice | Tensor) -> Cameras:
        """Some of the cameras, by a slice, indices or a mask as for a tensor."""
        return Cameras(self.azimuth[which], self.elevation[which], self.distance[which], self.fov[which])

    def words(self) -> list[str]:
        """`view_word` of each camera."""
        pairs = zip(self.azimuth.tolist(), self.elevation.tolist(), strict=True)
        return [view_word(azimuth, elevation) for azimuth, elevation in pairs]

    def rays(self, size: int) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R size size 3"]]:
        """The rays through the pixels' centres, row 0 on top.

        The point of row i and column j on the image plane at depth 1 is
        `forward + tan(fov/2) (u right - v up)`, u = 2(j + 1/2)/size - 1 and v = 2(i + 1/2)/size - 1.

        Args:
            size: pixels along each side.

        Returns:
            The origins, one for each camera, and the unit directions.
        """
        azimuth, elevation = torch.deg2rad(self.azimuth), torch.deg2rad(self.elevation)
        level = torch.zeros_like(azimuth)
        # `right` does not come from a cross product with z, so cameras straight above are no special case.
        outward = torch.stack(
            [azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], dim=-1
        )
        right = torch.stack([-azimuth.sin(), azimuth.cos(), level], dim=-1)
        up = torch.linalg.cross(outward, right)
        steps = (2 * torch.arange(size, dtype=azimuth.dtype, device=azimuth.device) + 1) / size - 1
        plane = torch.tan(torch.deg2rad(self.fov) / 2)[:, None] * steps
        directions = (
            -outward[:, None, None] + plane[:, None, :, None] * right[:, None, None]
            - plane[:, :, None, None] * up[:, None, None]
        )  # fmt: skip
        return self.distance[:, None] * outward, torch.nn.functional.normalize(directions, dim=-1)


@dataclass(frozen=True)
class CameraRange:
    """What cameras are drawn from: each quantity uniform between its bounds, independent of the others.

    Attributes:
        elevation: lowest and highest, degrees.
        fov: smallest and largest, degrees.
        distance: from the origin, in units of the world; one for all cameras.
        azimuth: first and last, degrees; `stratify_azimuth` cuts this range into strata.
    """

    elevation: tuple[float, float]
    fov: tuple[float, float]
    distance: float
    azimuth: tuple[float, float] = (0.0, 360.0)

    def __post_init__(self) -> None:
        for name in ("elevation", "fov", "azimuth"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"the {name} range must go upwards, got {low} to {high}")
        if self.distance <= 0:
            raise ValueError(f"the distance must be positive, got {self.distance}")

    def sample(self, renders: Renders, stratify_azimuth: bool) -> Cameras:
        """One camera for each of the renders, from the generator of its own stream at "camera".

        With strata the azimuth of state i is `((first + i) + u) / total` of the way through the range, u uniform
        in [0, 1): the renders of a step cover the circle evenly, over all ranks (threestudio's
        `batch_uniform_azimuth`). State i alone is uniform within its stratum only; a state picked at random from
        the step is uniform over the range, so averages over the step's states stay unbiased.

        Args:
            renders: the streams of the states, and their place among the step's.
            stratify_azimuth: one stratum of azimuth for each state of the step; else they are independent.
        """
        numbers = torch.stack([torch.rand(3, generator=render.child("camera").generator()) for render in renders])
        around, above, opening = numbers.unbind(-1)
        if stratify_azimuth:
            around = (renders.first + torch.arange(len(renders)) + around) / renders.total
        return Cameras(
            _between(self.azimuth, around),
            _between(self.elevation, above),
            torch.full_like(above, self.distance),
            _between(self.fov, opening),
        )


PAPER_RANGE = CameraRange(elevation=(-10.0, 45.0), fov=(15.0, 80.0), distance=2.0)
"""The cameras of the paper's text-to-3D runs (App. D.1.1)."""

WORLD_RANGE = CameraRange(elevation=(-10.0, 45.0), fov=(40.0, 40.0), distance=3.0)
"""The cameras of the small world's pictures, and of SDS with its teacher.

The unit ball spans 2 asin(1/3) = 39 of the 40 degrees: it just fits, so nothing is ever cut off.
"""


def view_word(azimuth: float, elevation: float) -> str:
    """What a caption says about a camera, one of `VIEW_WORDS`.

    "overhead" above `OVERHEAD_ABOVE` degrees of elevation (27% of `WORLD_RANGE`); below it, "front" up to
    `FRONT_WITHIN` degrees from azimuth 0, "back" up to as many from 180, else "side".

    Args:
        azimuth: degrees, any turn.
        elevation: degrees.

    Example:
        >>> view_word(350.0, 10.0), view_word(90.0, 10.0), view_word(180.0, 10.0), view_word(0.0, 40.0)
        ('front', 'side', 'back', 'overhead')
    """
    if elevation > OVERHEAD_ABOVE:
        return "overhead"
    from_front = abs((azimuth + 180.0) % 360.0 - 180.0)
    if from_front <= FRONT_WITHIN:
        return "front"
    return "back" if from_front >= 180.0 - FRONT_WITHIN else "side"


def held_out_cameras(count: int) -> Cameras:
    """A ring of cameras for evaluation, the first at azimuth 0, all at 15 degrees of elevation.

    The data's cameras are drawn from a continuous range, so that none of them is one of these.

    Args:
        count: how many, evenly spaced around the object.
    """
    if count < 1:
        raise ValueError(f"a ring needs at least one camera, got {count}")
    same = torch.ones(count)
    return Cameras(
        torch.arange(count) * (360.0 / count),
        _HELD_OUT_ELEVATION * same,
        WORLD_RANGE.distance * same,
        sum(WORLD_RANGE.fov) / 2 * same,
    )


def _between(bounds: tuple[float, float], uniform: Float[Tensor, "R"]) -> Float[Tensor, "R"]:
    low, high = bounds
    return low + (high - low) * uniform
