"""What SDS optimises: the protocol of a 3D representation, and the simplest, a grid of density and colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carv.tasks.sds.volume import Volume
from carv.world.cameras import Cameras
from carv.world.render import BACKGROUND
from carv.world.shapes import RADIUS, Colour


class Field(Protocol):
    """What text-to-3D needs of a 3D representation: `VoxelField`, `HashGridField`, or your own module.

    Attributes:
        radius: the object lies in the cube [-radius, radius]^3.
    """

    radius: float

    def __call__(
        self, cameras: Cameras, size: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "R 3 size size"], Float[Tensor, "R 1 size size"]]:
        """Pictures and opacities in [0, 1]; a generator makes samples along rays random, None is for evaluation."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All that is optimised."""
        ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The same, by the name of the learning rate that they have in `SDSConfig.rates`."""
        ...

    def at_step(self, step: int) -> None:
        """What changes along the training changes here, as a function of the step alone: so runs can be resumed."""
        ...

    def regulariser(self, smoothness: float, sparsity: float, generator: torch.Generator) -> Float[Tensor, ""]:
        """What is added to the loss for each latent entry; random only by the generator."""
        ...

    def density_grid(self, resolution: int) -> Float[Tensor, "D D D"]:
        """The density at vertices of a grid over the cube, indexed x, y, z."""
        ...

    def colour_at(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The colour in [0, 1] at points of the world."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All tensors that a checkpoint needs."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Go on from them."""
        ...


class VoxelField(Volume):
    """Density and colour on a grid over the cube [-radius, radius]^3, seen within the ball that it holds.

    The density at a point is `density_scale * softplus(d)` and the colour `sigmoid(c)`, d and c interpolated
    trilinearly between the grid's vertices.

    Attributes:
        density: [1, 1, G, G, G] the numbers d, indexed z, y, x.
        colour: [1, 3, G, G, G] the numbers c.
    """

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
        if resolution < 2 or samples < 1:
            raise ValueError(f"a field needs resolution >= 2 and samples >= 1, got {resolution} and {samples}")
        super().__init__(samples, radius, background)
        self.resolution = resolution
        self.density_scale = density_scale
        distance = self.vertices(resolution).norm(dim=-1) / radius
        # d falls from 0 at the centre to -3 at half the radius: optical depth about 5 through the middle.
        self.density = nn.Parameter((-6.0 * distance).clamp(min=-5.0)[None, None])
        self.colour = nn.Parameter(torch.zeros(1, 3, resolution, resolution, resolution))

    def at(self, points: Float[Tensor, "P N 3"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "3 P N"]]:
        grid = torch.cat([self.density, self.colour], dim=1)  # one look-up for both
        # [1, 4, 1, P, N]; "border" as the ball touches the cube, where rounding may put a point outside.
        values = functional.grid_sample(
            grid, points[None, None] / self.radius, align_corners=True, padding_mode="border"
        )[0, :, 0]
        return self.density_scale * functional.softplus(values[0]), torch.sigmoid(values[1:])

    def at_step(self, step: int) -> None:
        """Nothing changes along the training."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The "density" and the "colour"."""
        return {"density": [self.density], "colour": [self.colour]}

    def regulariser(self, smoothness: float, sparsity: float, generator: torch.Generator) -> Float[Tensor, ""]:
        """`smoothness total_variation + sparsity mean softplus(d)`: smooth, and empty where nothing asks for matter.

        Args:
            smoothness, sparsity: weights.
            generator: not used.
        """
        return smoothness * self.total_variation() + sparsity * functional.softplus(self.density).mean()

    def total_variation(self) -> Float[Tensor, ""]:
        """`mean |grad d|^2 + mean |grad c|^2` over the grid, with differences between neighbours: smoothness."""
        values = torch.cat([self.density, self.colour], dim=1)
        return sum((values.diff(dim=axis).square().mean() for axis in (2, 3, 4)), values.new_zeros(()))


def opacity_sparsity(opacity: Float[Tensor, "R 1 H W"]) -> Float[Tensor, ""]:
    """`mean sqrt(o^2 + 0.01)`: pulls haze down, and solid pixels hardly (as threestudio's `lambda_sparsity`)."""
    return (opacity.square() + 0.01).sqrt().mean()


def opacity_entropy(opacity: Float[Tensor, "R 1 H W"]) -> Float[Tensor, ""]:
    """`mean -o log2 o - (1-o) log2(1-o)`: pulls each pixel to clear or solid (threestudio's `lambda_opaque`)."""
    o = opacity.clamp(1e-3, 1 - 1e-3)  # so that the gradient stays bounded, and is 0 beyond
    return -(o * o.log2() + (1 - o) * (1 - o).log2()).mean()
