"""carv: cheap, unbiased gradients from frozen diffusion teachers."""

from carv.adaptive import AdaptiveProposal
from carv.density import DiscreteDensity, LogitNormal, Reweighted, ShiftedUniform, uniform_steps
from carv.estimator import Clip, Estimate, HierarchicalEstimator
from carv.gradient import Gradient, Renders, TeacherGradient
from carv.proposals import defensive, oracle, proportional
from carv.rng import Stream, stream
from carv.sampler import Draws, TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import global_strata, iid, nested, per_render, systematic

__all__ = [
    "AdaptiveProposal",
    "Clip",
    "DiscreteDensity",
    "Draws",
    "Estimate",
    "Gradient",
    "HierarchicalEstimator",
    "LogitNormal",
    "NoiseSchedule",
    "Renders",
    "Reweighted",
    "ShiftedUniform",
    "Stream",
    "TeacherGradient",
    "TimestepSampler",
    "defensive",
    "global_strata",
    "iid",
    "nested",
    "oracle",
    "per_render",
    "proportional",
    "stream",
    "systematic",
    "uniform_steps",
]
