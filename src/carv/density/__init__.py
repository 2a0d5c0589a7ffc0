"""Timestep densities p and q: exact to sample, exact to divide by.

Two kinds share one interface. `DiscreteDensity` is a pmf over consecutive integers (DDPM). The continuous
ones are `ShiftedUniform` and `LogitNormal` (flow matching practice), in closed form, and `Reweighted`, any of
these times a piecewise-constant factor. `carv.proposals` makes proposals of both kinds from a base.

All tables are float64. What is sampled is what is divided by: no density here is rounded, snapped or
interpolated after the draw, which would bias every estimate made with it.
"""

from carv.density.base import Density
from carv.density.continuous import LogitNormal, ShiftedUniform
from carv.density.discrete import DiscreteDensity, uniform_steps
from carv.density.reweighted import Reweighted

__all__ = ["Density", "DiscreteDensity", "LogitNormal", "Reweighted", "ShiftedUniform", "uniform_steps"]
