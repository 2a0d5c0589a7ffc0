"""What a pipeline implements to get its gradient estimated: three methods, no choice of t, no backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.rng import Stream

Gradient: TypeAlias = tuple[Tensor, ...]
"""One tensor for each parameter, as `torch.autograd.grad` returns them."""


@dataclass(frozen=True)
class Renders:
    """Which upstream states a step asks for: a stream of randomness for each, and its place among all.

    Attributes:
        streams: one for each state; all randomness of the state comes from it.
        first: the place of the first of them among all renders of the step, over all ranks.
        total: how many renders the step has in all. A task that stratifies its upstream condition
            (a camera's azimuth) puts state i into stratum `first + i` of `total`.
    """

    streams: tuple[Stream, ...]
    first: int
    total: int

    def __len__(self) -> int:
        return len(self.streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self.streams)


@runtime_checkable
class TeacherGradient(Protocol):
    """The expectation `mu = E_x E_t E_eps [ J_x^T f(x, t, eps) ]` of one pipeline (Eq. 8, 10, 11).

    Attributes:
        latent_shape: the shape of eps and of f for one draw.
        device, dtype: where and in what precision eps is made for `contribution`.
    """

    latent_shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def upstream(self, renders: Renders) -> Any:
        """The expensive part for R = len(renders) states x_r: render and encode, generate, ...; keeps the graph."""
        ...

    def contribution(
        self, state: Any, t: Shaped[Tensor, "R K"], noise: Float[Tensor, "R K *latent"]
    ) -> Float[Tensor, "R K *latent"]:
        """The cheap part, `f(x_r, t_rk, eps_rk)` with the weight w(t) in it; called under `no_grad`."""
        ...

    def pull_back(self, state: Any, f: Float[Tensor, "R *latent"], retain: bool = False) -> Gradient:
        """`sum_r J_r^T f_r`: one backward pass through the upstream part.

        Training calls it once for each state. With `retain` the state's graph is kept for another call
        (`retain_graph` of `torch.autograd.grad`), which measurements of single draws need.
        """
        ...
