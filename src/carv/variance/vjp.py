"""Gradients of single draws without a loop of backward passes of one: batched, sketched, or as inner products.

With z = z(theta) fixed and f_1 .. f_M detached, the gradients of the draws are g_m = J^T f_m, J = dz/dtheta.

- `batched_pull_back`, `batched_task_pull_back`: all g_m, several at a time. Each still costs a backward pass's
  arithmetic; what is saved is its overhead, and matrix-vector products become matrix-matrix products.
- `draw_gram`: only <g_m, g_n> = f_m^T (J J^T) f_n; J is formed once when the latent is smaller than M.
- `jacobian_sketch`: J P^T for p random directions, after which a projected gradient P g_m is a row of F (J P^T). The
  cost does not depend on M: this is the route for many draws of one render.
- `per_example_gradients`: gradients of a loss in a network's own parameters, one for each example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from carv.gradient import Gradient, TeacherGradient

PullBack: TypeAlias = Callable[[Tensor], Gradient]

_BUDGET = 256 * 2**20


@dataclass(frozen=True)
class PerDraw:
    """Gradients of M draws.

    Attributes:
        gradient: a tensor `[M, *parameter]` for each parameter.
        looped: True where an operation cannot be batched, so that the passes ran one by one.
    """

    gradient: Gradient
    looped: bool

    def matrix(self) -> Float[Tensor, "M D"]:
        """All of it as M rows."""
        rows = [part.flatten(1) for part in self.gradient]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def batched_pull_back(
    z: Tensor,
    parameters: tuple[Tensor, ...],
    cotangents: Float[Tensor, "M *z"],
    memory_budget_bytes: int = _BUDGET,
) -> PerDraw:
    """g_m = J^T f_m for M cotangents, in chunks.

    Args:
        z: the upstream state, with its graph; any shape. The graph is kept.
        parameters: of theta; one that z does not depend on gets zeros.
        cotangents: f_m, each of z's shape.
        memory_budget_bytes: bounds the work space, by the estimate that one draw of a chunk takes twice the
            gradient and four times the latent. The M gradients that are returned come on top.

    Raises:
        ValueError: cotangents of another shape; a budget that is not positive.
    """
    if cotangents.shape[1:] != z.shape:
        raise ValueError(f"cotangents must have shape [M, *{list(z.shape)}], got {list(cotangents.shape)}")

    def pull_back(f: Tensor) -> Gradient:
        return torch.autograd.grad(z, parameters, f, retain_graph=True, allow_unused=True, materialize_grads=True)

    draw = sum(_bytes(p) for p in parameters) * 2 + _bytes(z) * 4
    return _in_chunks(pull_back, cotangents, _chunk(draw, memory_budget_bytes))


def batched_task_pull_back(
    task: TeacherGradient,
    state: Any,
    f: Float[Tensor, "M R *latent"],
    memory_budget_bytes: int = _BUDGET,
) -> PerDraw:
    """The same through a pipeline's own `pull_back`, for which z and the parameters are private: M calls as one.

    It works where `pull_back` is `torch.autograd.grad` (and anything else that `torch.func.vmap` can batch); one
    that calls `.backward()` or leaves torch is looped over, which `looped` says.

    Args:
        task, state: a pipeline and one of its upstream states of R renders; the state's graph is kept.
        f: M cotangents for it; for the gradient of a single draw all rows but its render's are zero, so use
            states of one render.
        memory_budget_bytes: as for `batched_pull_back`.
    """
    first = task.pull_back(state, f[0], retain=True)
    draw = sum(_bytes(part) for part in first) * 2 + _bytes(f[0]) * 4
    chunk = _chunk(draw, memory_budget_bytes)
    return _in_chunks(lambda one: task.pull_back(state, one, retain=True), f, chunk)


def latent_gram(z: Tensor, parameters: tuple[Tensor, ...], memory_budget_bytes: int = _BUDGET) -> Float[Tensor, "z z"]:
    """J J^T of the flattened latent, from which <J^T f, J^T f'> = f^T (J J^T) f' for any number of draws.

    J is formed by d_z batched passes, whatever the number of draws.

    Args:
        z, parameters: as for `batched_pull_back`.
        memory_budget_bytes: for J too, which must fit.

    Raises:
        ValueError: a J of d_z x D numbers does not fit into the budget.
    """
    needed = z.numel() * sum(_bytes(p) for p in parameters)
    if needed > memory_budget_bytes:
        raise ValueError(
            f"the Jacobian of {z.numel()} latent numbers takes {needed / 2**20:.0f} MiB, the budget is "
            f"{memory_budget_bytes / 2**20:.0f} MiB; use jacobian_sketch"
        )
    basis = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
    jacobian = batched_pull_back(z, parameters, basis, memory_budget_bytes).matrix()
    return jacobian @ jacobian.T


def draw_gram(
    z: Tensor,
    parameters: tuple[Tensor, ...],
    cotangents: Float[Tensor, "M *z"],
    memory_budget_bytes: int = _BUDGET,
) -> Float[Tensor, "M M"]:
    """<g_m, g_n> for all pairs of draws of one upstream state, the cheaper way: through J if M exceeds d_z.

    Args: as for `batched_pull_back`.
    """
    jacobian_bytes = z.numel() * sum(_bytes(p) for p in parameters)
    if len(cotangents) > z.numel() and jacobian_bytes <= memory_budget_bytes:
        f = cotangents.flatten(1)
        return f @ latent_gram(z, parameters, memory_budget_bytes) @ f.T
    g = batched_pull_back(z, parameters, cotangents, memory_budget_bytes).matrix()
    return g @ g.T


def jacobian_sketch(
    z: Tensor, parameters: tuple[Tensor, ...], probes: tuple[Tensor, ...], memory_budget_bytes: int = _BUDGET
) -> Float[Tensor, "p *z"]:
    """J v for p directions v: P g = P J^T f is then a product with f, for any number of draws.

        <v_j, J^T f> = <J v_j, f>

    With v_j of independent N(0, 1) or +-1 entries, E 1/p sum_j <J v_j, f> <J v_j, f'> = <J^T f, J^T f'>; the relative
    error of a trace so formed is about sqrt(2 / (p r)), r the number of directions that matter in its covariance.
    J v is the derivative of u -> <v, J^T u>, linear in u, so backward passes suffice (Griewank's "double backward"):
    many operations of renderers have no forward mode, such as `grid_sample` in 3D.

    Args:
        z, parameters: as for `batched_pull_back`.
        probes: for each parameter a tensor `[p, *parameter]`.
        memory_budget_bytes: as for `batched_pull_back`, but for the p x d_z result.

    Raises:
        RuntimeError: from torch, an upstream operation whose backward pass cannot be differentiated.
    """
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, parameters, u, create_graph=True, retain_graph=True, allow_unused=True)
    used = [i for i, part in enumerate(pulled) if part is not None]  # where z does not depend on theta, J = 0
    if not used:
        return torch.zeros((len(probes[0]), *z.shape), dtype=z.dtype, device=z.device)
    outputs = [pulled[i] for i in used]
    widths = [parameters[i].numel() for i in used]
    joined = torch.cat([probes[i].flatten(1) for i in used], 1)

    def push_forward(v: Tensor) -> Gradient:
        parts = [part.view_as(parameters[i]) for i, part in zip(used, torch.split(v, widths), strict=True)]
        return torch.autograd.grad(outputs, u, parts, retain_graph=True)

    draw = sum(_bytes(p) for p in parameters) * 2 + _bytes(z) * 4
    return _in_chunks(push_forward, joined, _chunk(draw, memory_budget_bytes)).gradient[0]


def per_example_gradients(
    loss: Callable[..., Tensor],
    parameters: Mapping[str, Tensor],
    *examples: Tensor,
    memory_budget_bytes: int = _BUDGET,
) -> dict[str, Tensor]:
    """The gradient of each example's loss in a network's parameters, `[n, *parameter]` for each name.

    Args:
        loss: (parameters, one example's tensors) -> a scalar, made with `torch.func.functional_call`. No
            randomness and no running statistics inside.
        parameters: name -> tensor.
        examples: tensors whose first dimension counts the n examples.
        memory_budget_bytes: bounds a chunk's work space, by the estimate that an example takes twice its
            gradient and 64 times its own size (activations).

    Raises:
        ValueError: examples of different number; a budget that is not positive.
    """
    counts = {len(part) for part in examples}
    if len(counts) != 1:
        raise ValueError(f"all tensors must hold the same number of examples, got {sorted(counts)}")
    size = sum(_bytes(p) for p in parameters.values()) * 2 + sum(_bytes(part[0]) for part in examples) * 64
    held = {name: p.detach() for name, p in parameters.items()}
    each = vmap(
        grad(loss),
        in_dims=(None, *(0 for _ in examples)),
        chunk_size=_chunk(size, memory_budget_bytes),
    )
    found: dict[str, Tensor] = each(held, *examples)
    return found


def _in_chunks(pull_back: PullBack, cotangents: Tensor, chunk: int) -> PerDraw:
    parts, looped = [], False
    for some in torch.split(cotangents, chunk):
        if not looped and len(some) > 1:
            try:
                parts.append(_batched(pull_back, some))
                continue
            except (RuntimeError, UserWarning):
                # Not a reason to fail: if the loop below fails too, its message is the one that helps.
                looped = True
        one_by_one = [pull_back(f) for f in some]
        parts.append(tuple(torch.stack(column) for column in zip(*one_by_one, strict=True)))
    if len(parts) == 1:
        return PerDraw(parts[0], looped)
    return PerDraw(tuple(torch.cat(column) for column in zip(*parts, strict=True)), looped)


def _batched(pull_back: PullBack, cotangents: Tensor) -> Gradient:
    """Like `is_grads_batched`, but through any function; torch's silent slow fallback counts as unsupported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*", category=UserWarning)
        found: Gradient = vmap(pull_back)(cotangents)
    return found


def _chunk(bytes_each: int, budget: int) -> int:
    if budget <= 0:
        raise ValueError(f"a memory budget must be positive, got {budget}")
    return max(1, budget // max(1, bytes_each))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
