"""Bases, proposals and couplings that several tests run over."""

import torch

from carv.adaptive import AdaptiveProposal
from carv.density import DiscreteDensity, LogitNormal, Reweighted, ShiftedUniform, uniform_steps
from carv.proposals import defensive, oracle, proportional
from carv.strata import COUPLINGS

STEPS = uniform_steps(3, 22)
PEAKED = DiscreteDensity(0, torch.tensor([0.0, 1.0, 5.0, 0.0, 2.0, 0.0]))
RANGE = ShiftedUniform(0.02, 0.98)
PRACTICE = LogitNormal(0.2, 1.1, shift=3.0)


def ramp(t):
    return 0.1 + t.double()


def trained(base, alpha=0.1):
    """An adaptive proposal that has seen contributions growing with t."""
    proposal = AdaptiveProposal(base, bins=6, alpha=alpha, warmup=0)
    t = base.icdf(torch.linspace(0, 0.999, 200, dtype=torch.float64))
    proposal.update(t, ramp(t) ** 4)
    return proposal


LAWS = {
    "discrete uniform": (STEPS, None),
    "discrete weight": (STEPS, proportional(STEPS, ramp)),
    "discrete oracle": (STEPS, oracle(STEPS, torch.tensor([3, 10, 22]), torch.tensor([1.0, 9.0, 4.0]))),
    "discrete defensive": (STEPS, defensive(STEPS, DiscreteDensity(10, torch.tensor([1.0, 4.0])), 0.2)),
    "discrete adaptive": (STEPS, trained(STEPS)),
    "discrete base with holes": (PEAKED, defensive(PEAKED, proportional(PEAKED, ramp), 0.3)),
    "discrete single t": (uniform_steps(7, 7), None),
    "continuous uniform": (RANGE, None),
    "continuous weight": (RANGE, proportional(RANGE, ramp, cells=37)),
    "continuous oracle": (RANGE, oracle(RANGE, torch.tensor([0.1, 0.5]), torch.tensor([1.0, 9.0]), cells=11)),
    "continuous shifted": (RANGE, ShiftedUniform(0.02, 0.98, shift=3.0)),
    "continuous adaptive": (RANGE, trained(RANGE)),
    "logit-normal base": (PRACTICE, None),
    "logit-normal base, weight": (PRACTICE, proportional(PRACTICE, ramp, cells=13)),
    "logit-normal base, adaptive": (PRACTICE, trained(PRACTICE)),
    "uniform base, logit-normal defensive": (RANGE, defensive(RANGE, LogitNormal(0.0, 0.7), 0.3, cells=19)),
    "cells with mass zero": (
        Reweighted(RANGE, torch.tensor([0, 0.2, 0.3, 1.0]), torch.tensor([1.0, 0.0, 3.0])),
        Reweighted(RANGE, torch.tensor([0, 0.2, 0.3, 1.0]), torch.tensor([2.0, 0.0, 3.0])),
    ),
}

__all__ = ["COUPLINGS", "LAWS", "PEAKED", "PRACTICE", "RANGE", "STEPS", "ramp", "trained"]
