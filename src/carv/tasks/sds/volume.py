"""Density and colour in a ball, seen from cameras by emission and absorption: what both fields share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carv.world.cameras import Cameras
from carv.world.shapes import Colour


class Volume(nn.Module, ABC):
    """A field that has a density and a colour at every point, seen within the ball of a radius.

    Along a ray through the ball, with N samples in equal steps of length h, the picture is (emission and
    absorption, Max 1995)

        T_i = exp(-h sum_{j<i} density_j),   w_i = T_i - T_{i+1},
        opacity = sum_i w_i = 1 - T_N,       rgb = sum_i w_i colour_i + T_N background.

    Every sample counts. Leaving out those that look empty would be faster, but the density there would get no
    gradient, so that nothing could grow in empty space: a bias.

    nerfacc's dense rendering is the same arithmetic, and the tests' reference; its faster modes need CUDA.

    Attributes:
        background: [3] the colour behind everything.
    """

    background: Tensor

    def __init__(self, samples: int, radius: float, background: Colour) -> None:
        """
        Args:
            samples: points along each ray, N.
            radius: of the ball, in units of the world.
            background: behind everything.

        Raises:
            ValueError: no samples.
        """
        super().__init__()
        if samples < 1:
            raise ValueError(f"a field needs samples >= 1, got {samples}")
        self.samples = samples
        self.radius = radius
        self.register_buffer("background", torch.tensor(background), persistent=False)

    @abstractmethod
    def at(self, points: Float[Tensor, "P N 3"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "3 P N"]]:
        """The density per unit of length and the colour in [0, 1] at points of the world."""

    def behind(self, directions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """The colour in [0, 1] that a ray sees which nothing stops, by its unit direction."""
        return self.background.expand(len(directions), 3)

    def forward(
        self, cameras: Cameras, size: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "R 3 size size"], Float[Tensor, "R 1 size size"]]:
        """Pictures and opacities, both in [0, 1].

        Args:
            cameras: R cameras.
            size: pixels along each side.
            generator: moves each sample within its step, independently and uniformly (stratified sampling);
                None samples the middles of the steps, for evaluation.
        """
        origins, directions = cameras.rays(size)
        start = origins.to(self.background).repeat_interleave(size * size, dim=0)
        directions = directions.to(self.background).reshape(-1, 3)
        nearest = -(start * directions).sum(-1)
        half_squared = self.radius**2 - (start * start).sum(-1) + nearest**2
        # Rays past the ball, a quarter of them with `WORLD_RANGE`, only see the background.
        meets = ((half_squared > 0) & (nearest + half_squared.clamp(min=0).sqrt() > 0)).nonzero()[:, 0]
        half = half_squared[meets].sqrt()
        enter = (nearest[meets] - half).clamp(min=0)
        step = (nearest[meets] + half - enter) / self.samples
        if generator is None:
            offset = step.new_full((1, self.samples), 0.5)
        else:
            shape = (len(meets), self.samples)
            offset = torch.rand(shape, generator=generator, device=generator.device, dtype=step.dtype).to(step)
        depth = enter[:, None] + (torch.arange(self.samples).to(step) + offset) * step[:, None]
        points = start[meets, None] + depth[..., None] * directions[meets, None]

        density, colour = self.at(points)
        behind = self.behind(directions)
        weights, passed = _absorb(step, density)
        seen = torch.einsum("pn,cpn->pc", weights, colour) + passed[:, None] * behind[meets]

        picture = (len(cameras), size, size, -1)
        rgb = behind.index_copy(0, meets, seen)
        opacity = passed.new_zeros(len(start)).index_copy(0, meets, 1 - passed)
        return rgb.view(picture).movedim(-1, 1), opacity.view(picture).movedim(-1, 1)

    def density_grid(self, resolution: int) -> Float[Tensor, "D D D"]:
        """The density at the vertices of a grid over the cube, indexed x, y, z; 0 outside the ball. For meshing.

        Args:
            resolution: vertices along each side, D; vertex i lies at `radius (2 i/(D - 1) - 1)`.
        """
        points = self.vertices(resolution).to(self.background)
        density, _ = self.at(points.flatten(0, 1))
        inside = points.norm(dim=-1) <= self.radius
        return torch.where(inside, density.view(inside.shape), 0.0).permute(2, 1, 0)

    def colour_at(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The colour in [0, 1] at points of the world; outside the cube, that of its nearest point."""
        return self.at(points.to(self.background)[None])[1][:, 0].T

    def vertices(self, resolution: int) -> Float[Tensor, "D D D 3"]:
        """The points x, y, z of a grid over the cube around the ball, indexed z, y, x."""
        ticks = torch.linspace(-self.radius, self.radius, resolution)
        return torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1).flip(-1)


def _absorb(step: Float[Tensor, "P"], density: Float[Tensor, "P N"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "P"]]:
    """What each sample adds to its ray, w_1 ... w_N, and what passes them all, T_N."""
    passed = torch.exp(-step[:, None] * density.cumsum(dim=-1))
    weights = functional.pad(passed[:, :-1], (1, 0), value=1.0) - passed
    return weights, passed[:, -1]
