"""Gradients of a teacher's own training loss in its parameters, one for each draw, projected as they are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from carv.tasks.attribution.loss import chosen_parameters, location_weight, training_target
from carv.tasks.attribution.projector import Projector
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

Gradients = dict[str, Tensor]

_MICRO_BATCH = 16
_BYTES = 2**30


@dataclass(frozen=True)
class Projected:
    """Projected gradients of n draws.

    Attributes:
        vectors: `[n, k]` float32 on the CPU, P g_i.
        norms: `[n]` float32 on the CPU, |g_i| of the whole gradient, before the projection.
    """

    vectors: Float[Tensor, "n k"]
    norms: Float[Tensor, " n"]


class ExampleGradients:
    """g_i = grad_phi l(phi; z, c, t_i, eps_i) of the native training loss (Eq. 58, 60), projected.

        l = 1/F mean_{f,h,w} [ M_{f,h,w} mean_c (output(z_t, t, c) - target)^2 ],    z_t = alpha z + sigma eps

    with the target that the network was trained on: eps - z (flow), eps, alpha eps - sigma z (v), or z. F counts
    latent frames, 1 for a picture; M is 1 without a mask. No guidance. At most a micro-batch of gradients is held.

    Args:
        teacher: its network stays frozen and in evaluation mode; adapters in it are used as they are.
        projector: to k dimensions.
        parameters: a pattern of names (fnmatch; `*` matches dots too), several separated by commas. Otherwise all
            floating-point parameters, or the LoRA adapters alone if the network has some.
        micro_batch: how many gradients are held at a time; unless given, at most 16 and about 1 GiB. With 1 they are
            made by plain autograd, with the fused kernels of attention; otherwise several at a time by
            `torch.func.vmap`, or one by one where a network's operations cannot be batched.

    Attributes:
        names: of the chosen parameters, in the network's order.
        size: how many numbers they are.

    Raises:
        ValueError: a pattern that matches nothing, or a micro-batch below 1.
    """

    def __init__(
        self,
        teacher: DiffusersTeacher,
        projector: Projector,
        parameters: str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"a micro-batch holds at least 1 gradient, got {micro_batch}")
        self.teacher, self.projector = teacher, projector
        chosen = chosen_parameters(teacher.network, parameters)
        self.names = tuple(chosen)
        self.size = sum(parameter.numel() for parameter in chosen.values())
        self._parameters = {f"network.{name}": parameter.detach() for name, parameter in chosen.items()}
        held = sum(2 * parameter.numel() * parameter.element_size() for parameter in chosen.values())
        self.micro_batch = micro_batch or max(1, min(_MICRO_BATCH, _BYTES // held))
        self._call = _Call(teacher)
        self._batched = True

    def __call__(
        self, latent: Tensor, condition: Condition, t: Tensor, noise: Tensor, mask: Tensor | None = None
    ) -> Projected:
        """The projected gradients of n draws: of one example, or of n examples, one draw each.

        Args:
            latent: z, `[*latent]` of one example (of any number of frames), or `[n, *latent]`.
            condition: one row, or n rows.
            t: `[n]` in the units of the teacher's schedule.
            noise: eps, `[n, *latent]`.
            mask: M in [0, 1], `[F, h, w]` of one example (`[h, w]` of a picture), or n of them.

        Raises:
            ValueError: shapes that do not fit, or a gradient that is not finite, naming its t.
        """
        batch = self._prepared(latent, condition, t, noise, mask)
        parts = [
            self._some({name: part[i : i + self.micro_batch] for name, part in batch.items()})
            for i in range(0, len(t), self.micro_batch)
        ]
        found = Projected(torch.cat([part.vectors for part in parts]), torch.cat([part.norms for part in parts]))
        bad = ~(torch.isfinite(found.norms) & torch.isfinite(found.vectors).all(1))
        if bool(bad.any()):
            raise ValueError(
                f"the gradient of the training loss is not finite at t = {t[bad.to(t.device)][0].item():g}: a smaller "
                "range of t, or float32 in place of half precision, may mend it"
            )
        return found

    def exact(
        self, latent: Tensor, condition: Condition, t: Tensor, noise: Tensor, mask: Tensor | None = None
    ) -> Gradients:
        """The gradients themselves, `[n, *parameter]` for each name, all at once: for checks and small networks.

        Args: as for a call.
        """
        found = self._gradients(self._prepared(latent, condition, t, noise, mask))
        return {name.removeprefix("network."): part for name, part in found.items()}

    @property
    def settings(self) -> dict[str, object]:
        """What the vectors depend on beside the teacher's weights and the draws, for a cache's fingerprint."""
        return {"parameters": list(self.names), "size": self.size, "projector": self.projector.settings}

    def _prepared(
        self, latent: Tensor, condition: Condition, t: Tensor, noise: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """All that a draw's loss needs, with n rows each."""
        n, device = len(t), self.teacher.device
        if t.ndim != 1 or n == 0 or noise.ndim not in (4, 5) or len(noise) != n:
            raise ValueError(f"give t [n] and noise [n, C, (F,) h, w], got {list(t.shape)} and {list(noise.shape)}")
        if latent.shape not in (noise.shape, noise.shape[1:]):
            raise ValueError(f"noise {list(noise.shape)} needs a latent of its shape, got {list(latent.shape)}")
        if len(condition) not in (1, n):
            raise ValueError(f"give a condition of one row or of {n}, got {len(condition)}")
        schedule = self.teacher.schedule
        t, noise = t.to(device), noise.to(device)
        z = latent.to(device, noise.dtype).expand(noise.shape)
        batch = {"t": t, "z_t": schedule.add_noise(z, t, noise), "target": training_target(schedule, z, t, noise)}
        batch["weight"] = location_weight(mask, noise).to(device, noise.dtype)
        rows = {name: part.to(device).expand(n, *part.shape[1:]) for name, part in condition.tensors.items()}
        return batch | {f"condition.{name}": part for name, part in rows.items()}

    def _some(self, batch: dict[str, Tensor]) -> Projected:
        gradients = self._gradients(batch)
        # Of each tensor in float32 and then together: as exact as float64, without a copy in it.
        each = [torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float32) for part in gradients.values()]
        norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
        named = {name.removeprefix("network."): part for name, part in gradients.items()}
        return Projected(self.projector(named).cpu(), norms.cpu())

    def _gradients(self, batch: dict[str, Tensor]) -> Gradients:
        if self._batched and len(batch["t"]) > 1:
            try:
                return _batched(self._loss, self._parameters, batch)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                # Not a reason to fail: if the loop below fails too, its message is the one that helps.
                self._batched = False
        return _looped(self._loss, self._parameters, batch)

    def _loss(self, parameters: Gradients, draw: dict[str, Tensor]) -> Tensor:
        """The training loss of one draw, all tensors without a batch."""
        condition = {
            name.removeprefix("condition."): part[None] for name, part in draw.items() if name.startswith("condition.")
        }
        output = functional_call(self._call, parameters, (draw["z_t"][None], draw["t"][None], condition))[0]
        error: Tensor = (output.to(draw["target"].dtype) - draw["target"]).square().mean(0)
        return (draw["weight"] * error).mean()


class _Call(nn.Module):
    """One call of a teacher's network as a module, so that `functional_call` can exchange its parameters."""

    def __init__(self, teacher: DiffusersTeacher) -> None:
        super().__init__()
        self.network = teacher.network
        self._teacher = teacher

    def forward(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self._teacher.network_output(z_t, t, Condition(condition))


def _batched(loss: Callable[..., Tensor], parameters: Gradients, batch: dict[str, Tensor]) -> Gradients:
    # The fused kernels of attention have no batching rule. Operations that have none are looped over by torch: slower,
    # and as right.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*", category=UserWarning)
        found: Gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    return found


def _looped(loss: Callable[..., Tensor], parameters: Gradients, batch: dict[str, Tensor]) -> Gradients:
    held = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    rows = []
    for i in range(len(batch["t"])):
        value = loss(held, {name: part[i] for name, part in batch.items()})
        rows.append(torch.autograd.grad(value, tuple(held.values()), allow_unused=True, materialize_grads=True))
    if len(rows) == 1:
        return {name: part[None] for name, part in zip(held, rows[0], strict=True)}
    return {name: torch.stack(column) for name, column in zip(held, zip(*rows, strict=True), strict=True)}
