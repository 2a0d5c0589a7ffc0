"""Ranks with ties, and Spearman's correlation of many rankings at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def average_ranks(values: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows N"]:
    """The ranks 1..N along the last dimension, float64; equal values share the mean of their ranks.

        rank_i = #{j: x_j < x_i} + (1 + #{j: x_j = x_i}) / 2

    Args:
        values: `[..., N]`, finite.

    Raises:
        ValueError: a value that is not a number; infinite ones have ranks.
    """
    if torch.isnan(values).any():
        raise ValueError("ranks need numbers, got NaN")
    values = values.contiguous()  # searchsorted warns where it has to copy
    ordered = torch.sort(values).values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).to(torch.float64) / 2


def spearman(a: Float[Tensor, "*rows N"], b: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows"]:
    """Spearman's rank correlation along the last dimension: Pearson's correlation of the average ranks.

    A row whose values are all equal says nothing of an order: its correlation is 0.

    Args:
        a, b: `[..., N]`, of shapes that broadcast, N >= 2.

    Raises:
        ValueError: fewer than two values; NaN.
    """
    if a.shape[-1] < 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a rank correlation needs two rows of the same N >= 2 values, got {a.shape} and {b.shape}")
    centred = [ranks - (ranks.shape[-1] + 1) / 2 for ranks in (average_ranks(a), average_ranks(b))]
    lengths = centred[0].square().sum(-1).sqrt() * centred[1].square().sum(-1).sqrt()
    products = (centred[0] * centred[1]).sum(-1)
    return torch.where(lengths > 0, products / lengths.clamp(min=1e-12), torch.zeros_like(products))
