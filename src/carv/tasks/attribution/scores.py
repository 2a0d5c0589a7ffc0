"""Influence scores from the gradients of shared draws: one number a draw, so that errors can be told from them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_AT_ONCE = 2**24
"""Entries of a gradient block in float64 at once: 128 MB."""


def draw_cosines(
    query: Float[Tensor, "Q B k"],
    train: Float[Tensor, "N B k"],
    weight: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "Q N B"]:
    """The terms of Eq. 11 (59), whose mean over draws is the influence:

        c[q, n, b] = omega_b < g_q, g_n > / (|g_q| |g_n|)     at (t_b, eps_b),     omega = p/q

    The norms are those of the gradients as given. For projected ones that is what the paper does, and the better
    choice: the error of a cosine is then (1 - c^2)/sqrt(k), that with the true norms sqrt((1 + c^2)/k).

    A gradient of length zero has no direction: its draws count as cosine 0, neither for nor against, and stay in
    the mean. `zero_draws` counts them. Scaling a gradient by a positive number changes nothing, so the 1/F of
    Eq. 60 does not matter here.

    Args:
        query: gradients of the queries, of any float type; computed in float64.
        train: gradients of the training examples at the same draws.
        weight: omega of each draw; 1 by default.

    Returns:
        float64.

    Raises:
        ValueError: shapes that do not fit, no draws, or a number that is not finite.
    """
    return _terms(query, train, weight, normalise=True)


def draw_products(
    query: Float[Tensor, "Q B k"],
    train: Float[Tensor, "N B k"],
    weight: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, "Q N B"]:
    """The same without norms: omega_b < g_q, g_n >, TracIn's term at one checkpoint (Pruthi et al. 2020)."""
    return _terms(query, train, weight, normalise=False)


def influence(
    query: Float[Tensor, "Q B k"],
    train: Float[Tensor, "N B k"],
    weight: Float[Tensor, "B"] | None = None,
    *,
    normalise: bool = True,
) -> Float[Tensor, "Q N"]:
    """I(q, n) of Eq. 11: the mean over draws of `draw_cosines`, or of `draw_products` without `normalise`.

    It has no error with it: see `carv.tasks.attribution.stability`.
    """
    return _terms(query, train, weight, normalise).mean(-1)


def zero_draws(gradients: Float[Tensor, "N B k"]) -> Int[Tensor, "N"]:
    """How many draws of each example have a gradient of length zero."""
    return (gradients == 0).all(-1).sum(-1)


def _terms(query: Tensor, train: Tensor, weight: Tensor | None, normalise: bool) -> Tensor:
    _check(query, train, weight)
    draws, width = query.shape[1:]
    found = torch.empty(len(query), len(train), draws, dtype=torch.float64)
    step = max(1, _AT_ONCE // max(1, width * (len(query) + len(train))))
    for first in range(0, draws, step):
        part = slice(first, first + step)
        a, b = (_rows(x[:, part], normalise) for x in (query, train))
        found[:, :, part] = torch.einsum("qbk,nbk->qnb", a, b)
    if normalise:  # rounding may carry a cosine of 1 past it
        found.clamp_(-1, 1)
    return found if weight is None else found * weight.to("cpu", torch.float64)


def _rows(gradients: Tensor, normalise: bool) -> Tensor:
    rows = gradients.detach().to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        raise ValueError("a gradient holds a number that is not finite: the teacher or its data type overflowed")
    if not normalise:
        return rows
    # By the largest entry first: squares of very small entries would vanish.
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp_min(torch.finfo(torch.float64).tiny)


def _check(query: Tensor, train: Tensor, weight: Tensor | None) -> None:
    if query.ndim != 3 or train.ndim != 3 or query.shape[1:] != train.shape[1:] or 0 in query.shape[1:]:
        raise ValueError(
            "scores need gradients [Q, B, k] and [N, B, k] of the same B >= 1 draws and k numbers, "
            f"got {list(query.shape)} and {list(train.shape)}"
        )
    if weight is None:
        return
    if weight.shape != query.shape[1:2]:
        raise ValueError(f"a weight for each of {query.shape[1]} draws is needed, got {list(weight.shape)}")
    if not torch.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("the weights p/q must be finite and not negative")
