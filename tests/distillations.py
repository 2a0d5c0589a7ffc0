"""Distillation of a tiny random DiT of four classes, and of Gaussians with closed forms."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.sampler import TimestepSampler
from carv.strata import per_render
from carv.tasks.distill.gradient import DMD
from carv.tasks.distill.networks import Classes, Denoiser, OneStepGenerator
from carv.teachers.base import Condition
from carv.teachers.prediction import to_epsilon

from tiny_pipelines import dit_nowhere_zero

CLASSES = 4


def tiny_dit(folder: Path, prediction: str = "v_prediction") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit_nowhere_zero(CLASSES, prediction=prediction).save_pretrained(folder)
    return folder


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """The module with its weights moved, so that student, fake score and teacher differ."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=rng)
    return module


def pipeline(teacher, scale=2.0, weight="dmd"):
    generator = OneStepGenerator(shaken(Denoiser(teacher), 1))
    fake = shaken(Denoiser(teacher), 2)
    return DMD(teacher, generator, fake, Classes.of(teacher), scale, weight)


def estimator(renders=2, renoise=3, coupling=per_render, proposal=None):
    base = uniform_steps(20, 980)
    return HierarchicalEstimator(TimestepSampler(base, proposal, coupling=coupling), renders, renoise)


def raw(network, z_t, t, label):
    return network(z_t, timestep=t, class_labels=label, return_dict=False)[0]


def x0(network, z_t, t, label, schedule):
    alpha, sigma = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
    return alpha * z_t - sigma * raw(network, z_t, t, label)


class Gaussians:
    """E[z | z_t] for z ~ N(m, s^2) in each of 12 entries, as a `Teacher` and as a module that predicts x0."""

    def __init__(self, mean, spread, schedule):
        self.mean, self.spread = mean, spread
        self.schedule, self.latent_shape = schedule, (3, 2, 2)

    def encode_prompts(self, prompts):
        return Condition({"label": torch.zeros(len(prompts), dtype=torch.long)})

    def x0(self, z_t, t):
        shape = (-1,) + (1,) * (z_t.ndim - 1)
        alpha, sigma = (c(t, z_t.dtype).view(shape) for c in (self.schedule.alpha, self.schedule.sigma))
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        return self.mean + gain * (z_t - alpha * self.mean)

    def predict_noise(self, z_t, t, conditions):
        return [to_epsilon(self.x0(z_t, t), z_t, t, self.schedule, "sample") for _ in conditions]
