"""A task whose every expectation is known: SDS onto a Gaussian, through a random gain.

Upstream, `z = a * theta` with one gain a ~ N(1, gain_std^2) for each render ("camera"). The teacher is the exact
denoiser of N(m, s^2 I), whose residual is linear in z and eps. With v = alpha^2 s^2 + sigma^2,

    f = w(t) (eps_hat - eps) = c(t) (z - m) - b(t) eps,    c = w alpha sigma / v,    b = w alpha^2 s^2 / v
    g = a f

so that mu and the tables of the variance formula have closed forms. It is what measurements are checked with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carv.density import DiscreteDensity
from carv.gradient import Gradient, Renders
from carv.schedule import NoiseSchedule
from carv.weights import Weight, sds


class GaussianToy:
    """The task described above; a `TeacherGradient`.

    Args:
        dim: the number of parameters, hence the latent's length.
        gain_std: standard deviation of the gain a: the part of the variance that re-noising cannot reduce.
        data_std: s of the teacher's Gaussian.
        schedule: a discrete noise schedule.
        weight: w(t); `None` is `carv.weights.sds`.
        distance: |theta_i - m_i|, how far the parameters are from the optimum.
        dtype: of everything.
    """

    def __init__(
        self,
        dim: int = 8,
        gain_std: float = 0.3,
        data_std: float = 0.5,
        schedule: NoiseSchedule | None = None,
        weight: Weight | None = None,
        distance: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.schedule = schedule or NoiseSchedule.scaled_linear()
        self.weight = weight or sds(self.schedule)
        self.gain_std, self.data_std = gain_std, data_std
        self.latent_shape: tuple[int, ...] = (dim,)
        self.device, self.dtype = torch.device("cpu"), dtype
        self.target = torch.linspace(-1, 1, dim, dtype=dtype)
        self.theta = (self.target + distance).requires_grad_()

    def upstream(self, renders: Renders) -> Tensor:
        gain = torch.stack([1 + self.gain_std * self._normal(stream.child("gain").generator()) for stream in renders])
        return gain[:, None] * self.theta

    def _normal(self, rng: torch.Generator) -> Tensor:
        return torch.randn((), generator=rng, dtype=self.dtype)

    def contribution(self, state: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        c, b = (table.to(self.dtype)[..., None] for table in self.coefficients(t))
        return c * (state[:, None] - self.target) - b * noise

    def pull_back(self, state: Tensor, f: Tensor, retain: bool = False) -> Gradient:
        return torch.autograd.grad(state, [self.theta], f, retain_graph=retain)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c(t) and b(t), float64."""
        alpha, sigma = self.schedule.alpha(t, torch.float64), self.schedule.sigma(t, torch.float64)
        v = (alpha * self.data_std) ** 2 + sigma**2
        w = self.weight.unchecked(t)
        return w * alpha * sigma / v, w * (alpha * self.data_std) ** 2 / v

    def exact(self, base: DiscreteDensity) -> ExactTables:
        """mu, m2, Gw and Gc under p, in closed form."""
        c, b = self.coefficients(base.support)
        theta, m, var = self.theta.detach().to(torch.float64), self.target.to(torch.float64), self.gain_std**2
        second, third, fourth = 1 + var, 1 + 3 * var, 1 + 6 * var + 3 * var**2  # E a^2, E a^3, E a^4
        direction = second * theta - m  # E[a (a theta - m)]
        power = (fourth * theta**2 - 2 * third * theta * m + second * m**2).sum()  # E|a (a theta - m)|^2
        return ExactTables(
            mean=(base.pmf @ c) * direction,
            m2=c**2 * power + b**2 * second * len(theta),
            within=torch.outer(c, c) * power,
            across=torch.outer(c, c) * direction.square().sum(),
        )


@dataclass(frozen=True)
class ExactTables:
    """The tables from which the variance of every design follows.

    Attributes:
        mean: `[D]`, mu.
        m2: `[n]`, E[|g|^2 | t].
        within: `[n, n]`, Gw(t, t') = E_x <F_x(t), F_x(t')>.
        across: `[n, n]`, Gc(t, t') = <F(t), F(t')>.
    """

    mean: Tensor
    m2: Tensor
    within: Tensor
    across: Tensor
