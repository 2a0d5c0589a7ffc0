"""A pipeline whose gradient is its latent residual: what many codes measure, as no backward pass is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carv.gradient import Gradient, Renders, TeacherGradient


class LatentResidual:
    """g(x, t, eps) = f(x, t, eps): the weighted residual w(t) (eps_hat - eps) without the renderer's Jacobian (D.1.3).

    Renders have different cameras, so an estimate with R > 1 is the mean of residuals of DIFFERENT pictures: mu is the
    residual of the average view, and the variance between renders is how much views differ, which is no noise of any
    parameter. The parts within a render are what says something about the gradient.

    Args:
        task: the pipeline itself.
    """

    def __init__(self, task: TeacherGradient) -> None:
        self.task = task
        self.latent_shape, self.device, self.dtype = task.latent_shape, task.device, task.dtype

    @torch.no_grad()
    def upstream(self, renders: Renders) -> Any:
        return self.task.upstream(renders)

    def contribution(self, state: Any, t: Tensor, noise: Tensor) -> Tensor:
        return self.task.contribution(state, t, noise)

    def pull_back(self, state: Any, f: Tensor, retain: bool = False) -> Gradient:
        return (f.sum(0),)
