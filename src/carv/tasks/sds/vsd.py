"""Variational score distillation: the teacher against a score that has learned the renders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carv.extras import require
from carv.gradient import Gradient, Renders
from carv.rng import Stream
from carv.sampler import TimestepSampler
from carv.tasks.sds.task import SDS, RenderState
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

# The attention's projections: the layers that ProlificDreamer adapts.
_ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]


class VSD:
    """u_VSD(theta; phi) = E_camera E_t E_eps[ w(t) (eps_hat(z_t, t, c) - eps_phi(z_t, t, c)) dz/dtheta ]

    eps_phi is the score of what the scene renders now. It is asked without guidance, at the z_t that the teacher sees,
    and it is learned beside the scene:

        min_phi  E_render E_t E_eps | eps_phi(z_t, t, c) - eps |^2

    A `TeacherGradient`: `HierarchicalEstimator` wraps it unchanged and is unbiased for u_VSD at the phi that it is
    asked at. Whether phi has learned its score by then is another matter, and K re-noisings do not help there.

    Call `fit` after the estimate of each step. A phi that was fitted to a step's renders before their own gradient is
    no longer independent of them.

    Attributes:
        seen: the last upstream states, without their graph: what `fit` takes, at no further render. With a
            `render_batch` these are the last group's.
        optimiser: of phi.

    Source:
        ProlificDreamer (Wang et al. 2023, arXiv 2305.16213), one particle. It also conditions eps_phi on the camera;
        here the view word of the prompt is all that it knows of it.

    Example:
        >>> score = LoRAScore(teacher, rank=4, stream=stream(0, "lora"))                        # doctest: +SKIP
        >>> task = VSD(SDS(teacher, field, prompt, weight, 7.5, cameras), score, sampler)       # doctest: +SKIP
        >>> estimate = estimator.estimate(task, here)                                           # doctest: +SKIP
        >>> loss = task.fit(task.seen, here.child("fit"))                                       # doctest: +SKIP
    """

    def __init__(
        self, sds: SDS, score: nn.Module, sampler: TimestepSampler, rate: float = 1e-4, renoise: int = 1
    ) -> None:
        """
        Args:
            sds: the teacher, with its guidance, and the renders.
            score: eps_phi, called with z_t `[N, *latent]`, t `[N]` and a condition of N rows: a `LoRAScore` of the
                teacher, or any differentiable module of your own.
            sampler: draws the t that phi is fitted at; ProlificDreamer's is `TimestepSampler(uniform_steps(0, 999))`.
            rate: of phi's AdamW.
            renoise: draws for each render in one step of phi.

        Raises:
            ValueError: a rate that is not positive; no draws; a score without parameters to learn.
        """
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"the learning rate of phi must be a positive number, got {rate}")
        if renoise < 1:
            raise ValueError(f"phi needs at least one draw for each render, got renoise = {renoise}")
        learned = [parameter for parameter in score.parameters() if parameter.requires_grad]
        if not learned:
            raise ValueError(
                f"{type(score).__name__} has no parameters that require gradients: VSD needs a score to fit"
            )
        self.sds, self.score, self.sampler, self.renoise = sds, score, sampler, renoise
        self.teacher, self.weight, self.parameters = sds.teacher, sds.weight, sds.parameters
        self.latent_shape, self.device, self.dtype = sds.latent_shape, sds.device, sds.dtype
        self.encoder_calls = sds.encoder_calls
        self.optimiser = torch.optim.AdamW(learned, rate)
        self.seen: RenderState | None = None

    def upstream(self, renders: Renders) -> RenderState:
        state = self.sds.upstream(renders)
        self.seen = dataclasses.replace(state, rgb=state.rgb.detach(), z=state.z.detach())
        return state

    def contribution(self, state: RenderState, t: Tensor, noise: Tensor) -> Tensor:
        z_t = self.teacher.schedule.add_noise(state.z[:, None], t, noise)
        w = self.weight.unchecked(t).to(noise.dtype)
        with torch.no_grad():
            difference = state.guided(z_t, t) - self._learned(state, z_t, t)
        return w.view(*t.shape, *[1] * len(self.latent_shape)) * difference

    def pull_back(self, state: RenderState, f: Tensor, retain: bool = False) -> Gradient:
        return self.sds.pull_back(state, f, retain)

    def fit(self, state: RenderState, stream: Stream) -> Tensor:
        """One optimiser step of phi on some renders, at (t, eps) of its own.

        Args:
            state: the renders, e.g. `seen`. They get no gradient.
            stream: of this step of phi, and of nothing else.

        Returns:
            The loss before the step, a scalar: the mean over renders, draws and entries. One noisy draw of it.
        """
        draws = self.sampler.sample(len(state.z), self.renoise, stream.child("t").generator(self.sampler.device))
        t = draws.t.to(self.device)
        shape = (*t.shape, *self.latent_shape)
        rng = stream.child("noise").generator(self.device)
        noise = torch.randn(shape, generator=rng, dtype=self.dtype, device=self.device)
        z_t = self.teacher.schedule.add_noise(state.z.detach()[:, None], t, noise)
        with torch.enable_grad():
            error = (self._learned(state, z_t, t) - noise).square().flatten(2).mean(-1)
            loss = (draws.weight.to(error) * error).mean()
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        self.optimiser.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """phi and its optimiser's moments, as named tensors for a checkpoint."""
        tensors = {f"score.{name}": value for name, value in self.score.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adamw.{i}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in tensors.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.score.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("score.")})
        moments: dict[int, Any] = {}
        for name, value in tensors.items():
            if name.startswith("adamw."):
                _, i, moment = name.split(".")
                moments.setdefault(int(i), {})[moment] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def _learned(self, state: RenderState, z_t: Tensor, t: Tensor) -> Tensor:
        """eps_phi `[R, K, *latent]`: render r's condition stands K times in a row, as in `Guided`."""
        condition = state.guided.condition.repeat_rows(t.shape[1])
        found: Tensor = self.score(z_t.flatten(0, 1), t.flatten(), condition)
        if found.shape != z_t.flatten(0, 1).shape:
            raise ValueError(
                f"{type(self.score).__name__} returned shape {list(found.shape)}, "
                f"expected that of z_t, {list(z_t.flatten(0, 1).shape)}"
            )
        return found.view(z_t.shape)


class LoRAScore(nn.Module):
    """eps_phi: the teacher's own network with low-rank updates W + B A of its attention's projections.

    The frozen weights are shared, not copied. The updates take part only while this score is asked: for anyone else
    the network gives what it gave before, bit for bit. B starts at 0, so that eps_phi starts as the teacher without
    guidance.

    Args:
        teacher: one that nothing has adapted yet; it gets the layers of `peft` in place.
        rank: of the updates.
        stream: of A's first values, uniform within +-1/sqrt(width).

    Raises:
        ValueError: another kind of teacher; one that is adapted already; a rank below 1.
        ImportError: peft is not installed.

    Source:
        LoRA (Hu et al. 2021, arXiv 2106.09685); for distillation, ProlificDreamer (arXiv 2305.16213).
    """

    def __init__(self, teacher: DiffusersTeacher, rank: int, stream: Stream) -> None:
        super().__init__()
        if not isinstance(teacher, DiffusersTeacher):
            raise ValueError(
                f"LoRAScore adapts a DiffusersTeacher's network, and {type(teacher).__name__} is none: "
                "give VSD a module of your own as score"
            )
        if rank < 1:
            raise ValueError(f"the rank of a LoRAScore must be at least 1, got {rank}")
        peft = require("peft", "diffusers")
        network = teacher.network
        self._teacher = teacher
        if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in network.modules()):
            raise ValueError("this teacher is adapted already: load another one, or reset its LoRAScore")
        # On "meta", nothing is drawn from torch's global generator; `reset` makes the values.
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_ADAPTED)
        peft.inject_adapter_in_model(config, network, "phi", low_cpu_mem_usage=True)
        self._layers: list[Any] = [
            module for module in network.modules() if isinstance(module, peft.tuners.lora.Linear)
        ]
        for layer in self._layers:
            for part in (layer.lora_A["phi"], layer.lora_B["phi"]):
                part.weight = nn.Parameter(torch.empty(part.weight.shape, device=teacher.device))
            layer.enable_adapters(False)
        self.downs = nn.ParameterList([layer.lora_A["phi"].weight for layer in self._layers])
        self.ups = nn.ParameterList([layer.lora_B["phi"].weight for layer in self._layers])
        self.requires_grad_(True)
        self.reset(stream)

    @torch.no_grad()
    def reset(self, stream: Stream) -> None:
        """Start again as the teacher, for another scene."""
        for i, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            # Made on the CPU, so that they are the same on every device.
            bound = 1 / math.sqrt(down.shape[1])
            rng = stream.child(i).generator()
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=rng))
            up.zero_()

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps_phi(z_t, t, c), differentiable in phi.

        Args:
            z_t: `[N, *latent_shape]`.
            t: `[N]`, in the units of the teacher's schedule.
            condition: N rows, from the teacher's `encode_prompts`.

        Returns:
            `[N, *latent_shape]` in float32, or in float64 where z_t is.
        """
        with self._adapted():
            return self._teacher.predict_noise_with_graph(z_t, t, [condition])[0]

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        """Within it the updates take part. Only flags change: no device is waited for."""
        for layer in self._layers:
            layer.enable_adapters(True)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(False)
            self.requires_grad_(True)  # which peft turns off with the adapters, before the backward pass
