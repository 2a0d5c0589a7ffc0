"""Distances within a set of vectors and between two: how varied pictures are, and whether they are copies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_AT_ONCE = 256


def pairwise_distance(vectors: Float[Tensor, "N d"]) -> float:
    """The mean Euclidean distance over all pairs of different vectors, (2/(N (N - 1))) sum_{i<j} |v_i - v_j|.

    Raises:
        ValueError: fewer than 2 vectors.
    """
    if len(vectors) < 2:
        raise ValueError(f"the mean distance of pairs needs at least 2 vectors, got {len(vectors)}")
    return float(torch.pdist(vectors.double()).mean())


def nearest_distance(queries: Float[Tensor, "M d"], known: Float[Tensor, "N d"]) -> Float[Tensor, "M"]:
    """The Euclidean distance of each query to the nearest known vector, in float64.

    Raises:
        ValueError: no known vectors.
    """
    if len(known) == 0:
        raise ValueError("the nearest of no vectors is asked for")
    known = known.double()
    chunks = torch.split(queries.double(), _AT_ONCE)
    return torch.cat([torch.cdist(chunk, known).amin(dim=1) for chunk in chunks])
