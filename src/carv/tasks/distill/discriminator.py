"""The adversarial term: a head on a denoiser's hidden states tells real latents from generated ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from carv.gradient import Gradient, Renders
from carv.rng import Stream
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Denoiser, over_draws
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

_WIDTH = 128


class _Reached(Exception):
    """The layer that is read has given its output; what follows it is not needed."""


class HiddenStates:
    """h(z_t, t, c): what a layer of a denoiser gives, `[N, positions, width]`, differentiable.

    The network stops there.

    Args:
        source: the fake score, or the frozen teacher.
        layer: the module's name in the network; "" is the middle block.

    Raises:
        ValueError: no module of that name; a network whose middle carv does not know.
    """

    def __init__(self, source: Denoiser | DiffusersTeacher, layer: str = "") -> None:
        self._source = source
        network: nn.Module = source.network
        name = layer or _middle(network)
        modules = dict(network.named_modules())
        if name not in modules:
            some = ", ".join(list(modules)[1:4])
            raise ValueError(f"this network has no layer {name!r}; it has, for example, {some}")
        self._module = modules[name]

    def __call__(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, given: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append(output[-1] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self._module.register_forward_hook(stop)
        try:
            if isinstance(self._source, DiffusersTeacher):
                self._source.predict_noise_with_graph(z_t, t, [condition])
            else:
                self._source(z_t, t, condition)
        except _Reached:
            pass
        finally:
            handle.remove()
        hidden = found[0].float()
        return hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)


def _middle(network: nn.Module) -> str:
    """The bottleneck of a UNet, the middle block of a transformer."""
    if getattr(network, "mid_block", None) is not None:
        return "mid_block"
    for name in ("transformer_blocks", "blocks"):
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList):
            return f"{name}.{len(blocks) // 2}"
    raise ValueError(f"carv does not know the middle block of a {type(network).__name__}: set layer")


class Discriminator(nn.Module):
    """D(z_t, t, c) = a + b . mean_positions SiLU(A norm(h) + d): one logit a draw, high for real latents.

    The hidden states are not a part of it: its parameters are the head's.

    Args:
        hidden: h.
        width: of h's last dimension.
        stream: of the first values.
    """

    def __init__(self, hidden: HiddenStates, width: int, stream: Stream, device: torch.device) -> None:
        super().__init__()
        self._hidden = hidden
        self.inner, self.outer = nn.Linear(width, _WIDTH, device=device), nn.Linear(_WIDTH, 1, device=device)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # Made on the CPU, so that they are the same on every device.
                bound = 1 / math.sqrt(width if name.startswith("inner") else _WIDTH)
                rng = stream.child(name).generator()
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))

    @classmethod
    def of(cls, source: Denoiser | DiffusersTeacher, condition: Condition, stream: Stream, layer: str) -> Discriminator:
        """The head that fits a source's hidden states, which one row of condition is used to look at."""
        hidden = HiddenStates(source, layer)
        with torch.no_grad():
            z_t = torch.zeros((1, *source.latent_shape), device=source.device)
            t = torch.zeros(1, dtype=torch.long, device=source.device)
            width = hidden(z_t, t, condition).shape[-1]
        return cls(hidden, width, stream, source.device)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits `[N]` of z_t `[N, *latent]` at t `[N]` under N rows of condition."""
        hidden = self._hidden(z_t, t, condition)
        inner = functional.silu(self.inner(functional.layer_norm(hidden, hidden.shape[-1:])))
        logits: Tensor = self.outer(inner.mean(1)).squeeze(-1)
        return logits

    def losses(self, z_t: Tensor, t: Tensor, condition: Condition, real: bool) -> Tensor:
        """`[R, K]`: softplus(-D) of real latents, softplus(D) of generated ones, each at its draw."""
        logits = over_draws(self, z_t, t, condition)
        return functional.softplus(-logits if real else logits)


class Adversarial:
    """u_GAN(theta) = E_{eps,c} E_t E_eps'[ grad_z softplus(-D(z_t, t, c)) . dG(eps, c)/dtheta ]

    The generator's non-saturating adversarial loss, mean over draws. A `TeacherGradient` on the upstream state of the
    distribution-matching term, so that one backward pass through G serves both.

    Args:
        dmd: whose generator it is.
        discriminator: D; nothing of it gets a gradient here.
    """

    def __init__(self, dmd: DMD, discriminator: Discriminator) -> None:
        self.dmd, self.discriminator = dmd, discriminator
        self.latent_shape, self.device, self.dtype = dmd.latent_shape, dmd.device, dmd.dtype
        self.parameters = dmd.parameters

    def upstream(self, renders: Renders) -> Generated:
        return self.dmd.upstream(renders)

    def contribution(self, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad():
            z = state.z.detach()[:, None].expand_as(noise).clone().requires_grad_()
            z_t = self.dmd.teacher.schedule.add_noise(z, t, noise)
            loss = self.discriminator.losses(z_t, t, state.condition, real=True)
            return torch.autograd.grad(loss.sum(), z)[0]

    def pull_back(self, state: Generated, f: Tensor, retain: bool = False) -> Gradient:
        return self.dmd.pull_back(state, f, retain)
