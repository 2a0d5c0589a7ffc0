"""An Instant-NGP style field: a hash encoding under two small networks, in front of a learned background."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carv.rng import Stream
from carv.tasks.sds.hash_encoding import HashEncoding
from carv.tasks.sds.volume import Volume
from carv.world.render import BACKGROUND
from carv.world.shapes import RADIUS, Colour

_CHUNK = 4096
"""Points at a time through the networks on a CPU: their activations stay in the cache."""

_REGULARISED = 2048
"""Points that each step's regulariser looks at."""

_BACKGROUND_WIDTH = 16


@dataclass(frozen=True)
class HashGridConfig:
    """The hash-grid field's size and rates. The defaults are for a CPU; `PAPER` is the paper's field."""

    levels: int = 8
    """Grids of the hash encoding."""
    features: int = 2
    """Numbers that each entry of a grid holds."""
    log2_entries: int = 14
    """A grid has at most 2 to the power of this many entries."""
    coarsest: int = 16
    """Cells along each side of the first grid."""
    finest: int = 128
    """Cells along each side of the last grid."""
    width: int = 32
    """Neurons in the one hidden layer of each network."""
    open_levels: int = 4
    """Grids in use at first, the coarsest; the others open one by one."""
    open_after: int = 50
    """The step from which on grids open."""
    open_every: int = 50
    """Steps for each of them."""
    geometry_rate: float = 0.01
    """Adam's learning rate for the grids and the networks of density and colour."""
    background_rate: float = 1e-4
    """Adam's learning rate for the background."""
    learn_background: bool = True
    """A small network of the ray's direction behind the object; else the world's colour."""

    def __post_init__(self) -> None:
        for name in ("levels", "features", "log2_entries", "coarsest", "width", "open_levels", "open_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.log2_entries > 24:
            raise ValueError(f"log2_entries must be at most 24 (16 million entries a grid), got {self.log2_entries}")
        if self.finest < self.coarsest:
            raise ValueError(f"finest must be at least coarsest, got {self.finest} and {self.coarsest}")
        if self.open_levels > self.levels:
            raise ValueError(f"open_levels must be at most levels = {self.levels}, got {self.open_levels}")
        if self.open_after < 0:
            raise ValueError(f"open_after must not be negative, got {self.open_after}")

    def levels_at(self, step: int) -> int:
        """Grids in use at a step: `min(levels, open_levels + max(0, step - open_after) // open_every)`."""
        return min(self.levels, self.open_levels + max(0, step - self.open_after) // self.open_every)


PAPER = HashGridConfig(
    levels=16,
    log2_entries=19,
    finest=4096,
    width=64,
    open_levels=8,
    open_after=2000,
    open_every=500,
    geometry_rate=0.005,
)
"""App. D.1.1, for 5000 steps; resolutions and opening, which it does not state, are threestudio's for DreamFusion."""


class HashGridField(Volume):
    """Density and colour from a hash encoding e(x), by one network each (App. D.1.1).

        density = density_scale softplus(D(e(x)) + b(x)),   b(x) = max(-6 |x| / radius, -5),
        colour = sigmoid(C(e(x))).

    D and C have one hidden layer of ReLUs and no biases. As e is nearly 0 at first, the field starts as `VoxelField`
    does, as a grey blob b. Colours do not depend on the direction. The background is `sigmoid(B(s(direction)) +
    logit(background))`, s the spherical harmonics up to degree 2 and B a network with two hidden layers of 16
    whose last layer starts at 0.

    Attributes:
        encoding: e, of the unit cube.
        density_net, colour_net: D and C.
        background_net: B; `None` where the background is not learned.
    """

    def __init__(
        self,
        config: HashGridConfig,
        samples: int,
        rng: Stream,
        radius: float = RADIUS,
        density_scale: float = 20.0,
        background: Colour = BACKGROUND,
    ) -> None:
        """Starts at step 0, with `config.open_levels` grids in use.

        Args:
            config: sizes.
            samples: points along each ray, N.
            rng: for the first values.
            radius: of the ball, in units of the world.
            density_scale: per unit of length, as for `VoxelField`.
            background: behind everything, at first or for good.

        Raises:
            ValueError: no samples.
        """
        super().__init__(samples, radius, background)
        self.config = config
        self.density_scale = density_scale
        self.encoding = HashEncoding(
            config.levels,
            config.features,
            config.log2_entries,
            config.coarsest,
            config.finest,
            rng.child("table").generator(),
        )
        sizes = (self.encoding.width, config.width)
        self.density_net = _network(rng.child("density"), *sizes, 1)
        self.colour_net = _network(rng.child("colour"), *sizes, 3)
        self.background_net: nn.Sequential | None = None
        if config.learn_background:
            self.background_net = _network(rng.child("background"), 9, _BACKGROUND_WIDTH, _BACKGROUND_WIDTH, 3)
            nn.init.zeros_(self.background_net[-1].weight)  # type: ignore[arg-type]
        self.at_step(0)

    def at(self, points: Float[Tensor, "P N 3"]) -> tuple[Float[Tensor, "P N"], Float[Tensor, "3 P N"]]:
        density, colour = self._before_activation(points.flatten(0, 1))
        shape = points.shape[:2]
        return self.density_scale * functional.softplus(density).view(shape), torch.sigmoid(colour.T).view(3, *shape)

    def behind(self, directions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        if self.background_net is None:
            return super().behind(directions)
        return torch.sigmoid(self.background_net(_spherical_harmonics(directions)) + self.background.logit())

    def at_step(self, step: int) -> None:
        """Opens the grids that are in use at a step of training, see `HashGridConfig.levels_at`."""
        self.encoding.open_levels = self.config.levels_at(step)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The grids with the networks on them as "geometry", and the "background"."""
        networks = [*self.density_net.parameters(), *self.colour_net.parameters()]
        groups = {"geometry": [*self.encoding.parameters(), *networks]}
        if self.background_net is not None:
            groups["background"] = list(self.background_net.parameters())
        return groups

    def regulariser(self, smoothness: float, sparsity: float, generator: torch.Generator) -> Float[Tensor, ""]:
        """`smoothness V + sparsity mean softplus(d)`, estimated without bias at points drawn from the cube.

        v = (d, c) are the four numbers that the activations get; V is the mean over points x and over the four, and
        the sum over axes a, of `(v(x + h e_a) - v(x))^2`, h one cell of the finest grid.

        Args:
            smoothness, sparsity: weights.
            generator: of the points.
        """
        shape = (_REGULARISED, 3)
        unit = torch.rand(shape, generator=generator, device=generator.device, dtype=self.background.dtype)
        points = (2 * unit.to(self.background) - 1) * self.radius
        moved = torch.eye(3).to(points) * (2 * self.radius / self.config.finest)
        values = torch.cat([points[None], points + moved[:, None]])
        density, colour = self._before_activation(values.flatten(0, 1))
        both = torch.cat([density[:, None], colour], 1).view(4, _REGULARISED, 4)
        variation = (both[1:] - both[0]).square().sum(0).mean()
        return smoothness * variation + sparsity * functional.softplus(both[0, :, 0]).mean()

    def _before_activation(self, points: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M 3"]]:
        features = self.encoding((points / self.radius + 1) / 2)
        size = _CHUNK if points.device.type == "cpu" else max(1, len(points))
        parts = [(self.density_net(some)[:, 0], self.colour_net(some)) for some in features.split(size)]
        density, colour = (torch.cat(column) for column in zip(*parts, strict=True))
        blob = (-6 * points.norm(dim=-1) / self.radius).clamp(min=-5)
        return density + blob, colour


def _network(rng: Stream, *sizes: int) -> nn.Sequential:
    """Linear layers without biases, ReLUs between them; weights uniform in +-1/sqrt(inputs), torch's habit."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        # Draws nothing from the global generator.
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, before, after, bias=False)  # type: ignore[no-untyped-call]
        uniform = torch.rand(after, before, generator=rng.child(i).generator())
        layer.weight.data = (2 * uniform - 1) / math.sqrt(before)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _spherical_harmonics(directions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 9"]:
    """The real spherical harmonics of degrees 0 to 2, up to constant factors."""
    x, y, z = directions.unbind(-1)
    return torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], -1)
