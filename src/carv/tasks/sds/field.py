"""The 3D representation that SDS optimises: a grid of density and colour, rendered as in DreamFusion."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carv.world.cameras import Cameras
from carv.world.render import BACKGROUND
from carv.world.shapes import RADIUS, Colour


class VoxelField(nn.Module):
    """Density and colour on a grid over the cube [-radius, radius]^3, seen within the ball that it holds.

    The density at a point is `density_scale * softplus(d)` and the colour `sigmoid(c)`, d and c interpolated
    trilinearly between the grid's vertices. Along a ray through the ball, with N samples in equal steps of
    length h, the picture is (emission and absorption, Max 1995)

        T_i = exp(-h sum_{j<i} density_j),   w_i = T_i - T_{i+1},
        opacity = sum_i w_i = 1 - T_N,       rgb = sum_i w_i colour_i + T_N background.

    Attributes:
        density: [1, 1, G, G, G] the numbers d, indexed z, y, x.
        colour: [1, 3, G, G, G] the numbers c.
    """

    background: Tensor

    def __init__(
        self,
        resolution: int = 48,
        samples: int = 48,
        radius: float = RADIUS,
        density_scale: float = 20.0,
        background: Colour = BACKGROUND,
    ) -> None:
        """Starts as a soft grey blob in the middle, half as wide as the ball, translucent enough for gradients inside.

        Args:
            resolution: vertices along each side, G.
            samples: points along each ray, N; about one for each cell that a ray through the middle crosses.
            radius: of the ball, in units of the world.
            density_scale: per unit of length: what softplus(d) = 1 stands for. A wall two cells thick is opaque
                with d of about 2 then, which Adam reaches in tens of steps.
            background: behind everything.

        Raises:
            ValueError: fewer than two vertices or one sample.
        """
        super().__init__()
        if resolution < 2 or samples < 1:
            raise ValueError(f"a field needs resolution >= 2 and samples >= 1, got {resolution} and {samples}")
        self.resolution = resolution
        self.samples = samples
        self.radius = radius
        self.density_scale = density_scale
        distance = self.vertices(resolution).norm(dim=-1) / radius
        # d falls from 0 at the centre to -3 at half the radius: optical depth about 5 through the middle.
        self.density = nn.Parameter((-6.0 * distance).clamp(min=-5.0)[None, None])
        self.colour = nn.Parameter(torch.zeros(1, 3, resolution, resolution, resolution))
        self.register_buffer("background", torch.tensor(background), persistent=False)

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
        start = origins.to(self.density).repeat_interleave(size * size, dim=0)
        directions = directions.to(self.density).reshape(-1, 3)
        nearest = -(start * directions).sum(-1)
        half_squared = self.radius**2 - (start * start).sum(-1) + nearest**2
        # Rays past the ball, a quarter of them with `WORLD_RANGE`, see the background at no cost.
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

        density, colour = self._at(points)
        passed = torch.exp(-step[:, None] * density.cumsum(dim=-1))  # T_1 ... T_N
        weights = functional.pad(passed[:, :-1], (1, 0), value=1.0) - passed
        opacity = 1 - passed[:, -1]
        rgb = torch.einsum("pn,cpn->pc", weights, colour) + passed[:, -1:] * self.background

        picture = (len(cameras), size, size, -1)
        rgb = self.background.expand(len(start), 3).index_copy(0, meets, rgb)
        opacity = opacity.new_zeros(len(start)).index_copy(0, meets, opacity)
        return rgb.view(picture).movedim(-1, 1), opacity.view(picture).movedim(-1, 1)

    def density_grid(self, resolution: int) -> Float[Tensor, "D D D"]:
        """The density at the vertices of a grid over the cube, indexed x, y, z; 0 outside the ball. For meshing.

        Args:
            resolution: vertices along each side, D; vertex i lies at `radius (2 i/(D - 1) - 1)`.
        """
        points = self.vertices(resolution).to(self.density)
        density, _ = self._at(points.flatten(0, 1))
        inside = points.norm(dim=-1) <= self.radius
        return torch.where(inside, density.view(inside.shape), 0.0).permute(2, 1, 0)

    def colour_at(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The colour in [0, 1] at points of the world; outside the cube, that of its nearest point."""
        return self._at(points.to(self.density)[None])[1][:, 0].T

    def vertices(self, resolution: int) -> Float[Tensor, "D D D 3"]:
        """The points x, y, z of a grid over the cube, indexed z, y, x as the parameters are."""
        ticks = torch.linspace(-self.radius, self.radius, resolution)
        return torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1).flip(-1)

    def total_variation(self) -> Float[Tensor, ""]:
        """`mean |grad d|^2 + mean |grad c|^2` over the grid, with differences between neighbours: smoothness."""
        values = torch.cat([self.density, self.colour], dim=1)
        return sum((values.diff(dim=axis).square().mean() for axis in (2, 3, 4)), values.new_zeros(()))

    def _at(self, points: Float[Tensor, "P N 3"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "3 P N"]]:
        grid = torch.cat([self.density, self.colour], dim=1)  # one look-up for both
        # [1, 4, 1, P, N]; "border" as the ball touches the cube, where rounding may put a point outside.
        values = functional.grid_sample(
            grid, points[None, None] / self.radius, align_corners=True, padding_mode="border"
        )[0, :, 0]
        return self.density_scale * functional.softplus(values[0]), torch.sigmoid(values[1:])


def opacity_sparsity(opacity: Float[Tensor, "R 1 H W"]) -> Float[Tensor, ""]:
    """`mean sqrt(o^2 + 0.01)`: pulls haze down, and solid pixels hardly (as threestudio's `lambda_sparsity`)."""
    return (opacity.square() + 0.01).sqrt().mean()


def opacity_entropy(opacity: Float[Tensor, "R 1 H W"]) -> Float[Tensor, ""]:
    """`mean -o log2 o - (1-o) log2(1-o)`: pulls each pixel to clear or solid (threestudio's `lambda_opaque`)."""
    o = opacity.clamp(1e-3, 1 - 1e-3)  # so that the gradient stays bounded, and is 0 beyond
    return -(o * o.log2() + (1 - o) * (1 - o).log2()).mean()
