"""Other influence scores from the same projected gradients: TracIn over checkpoints, and TRAK.

Both compare expected gradients, `mean_gradients`, and give `[queries, examples]` in float64, larger for examples that
help the query. Eq. 11 without its normalisation is `scores.influence(..., normalise=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_SINGULAR = 1e-12  # the share of the largest eigenvalue from which the smallest counts as not zero


def mean_gradients(gradients: Float[Tensor, "N n k"], weight: Float[Tensor, " n"]) -> Float[Tensor, "N k"]:
    """Estimates of each example's expected gradient, float64.

        g_bar = 1/n sum_i (p/q)_i g(t_i, eps_i)   ->   E_{t, eps} g(t, eps)

    Args:
        gradients: `[N, n, k]`, one for each example and draw; not normalised.
        weight: `[n]`, p/q of each draw.

    Raises:
        ValueError: other shapes.
    """
    if gradients.ndim != 3 or weight.shape != gradients.shape[1:2] or len(weight) == 0:
        raise ValueError(
            f"gradients are [examples, draws, k] and weights [draws], got {list(gradients.shape)} and "
            f"{list(weight.shape)}"
        )
    # One example at a time: in float64 all of them may not fit.
    return torch.stack([weight.double() @ rows.double() / len(weight) for rows in gradients])


def tracin(
    query: Sequence[Float[Tensor, "Q k"]], train: Sequence[Float[Tensor, "N k"]], rates: Sequence[float]
) -> Float[Tensor, "Q N"]:
    """TracIn over checkpoints (Pruthi et al. 2020, Eq. 2): how much steps on n lowered q's loss, to first order.

        I(q, n) = sum_c rate_c <g_bar_q(c), g_bar_n(c)>

    Args:
        query: for each checkpoint `[Q, k]`, from `mean_gradients`.
        train: for each checkpoint `[N, k]`.
        rates: the learning rate at each, above 0; for one checkpoint it changes no ranking.

    Raises:
        ValueError: no checkpoints, or not as many of each; a rate that is not positive; gradients of different size.
    """
    if not rates or len(query) != len(rates) or len(train) != len(rates):
        raise ValueError(
            f"TracIn needs gradients of queries and examples and a rate for each checkpoint, got {len(query)}, "
            f"{len(train)} and {len(rates)}"
        )
    if min(rates) <= 0:
        raise ValueError(f"learning rates are positive, got {min(rates)}")
    if any(a.shape[1] != b.shape[1] for a, b in zip(query, train, strict=True)):
        raise ValueError("gradients of queries and examples must have the same number of dimensions")
    parts = [rate * (a.double() @ b.double().T) for rate, a, b in zip(rates, query, train, strict=True)]
    return torch.stack(parts).sum(0)


def trak(query: Float[Tensor, "Q k"], train: Float[Tensor, "N k"], ridge: float = 0.0) -> Float[Tensor, "Q N"]:
    """TRAK's scores from projected gradients (Park et al. 2023, Eq. 13, with Q = 1).

        I(q, n) = phi_q^T (Phi^T Phi + lambda I)^-1 phi_n,      lambda = ridge tr(Phi^T Phi) / k

    phi are expected gradients of the diffusion loss, as D-TRAK's without its change of the loss (Zheng et al. 2024).
    For scores of several models take the mean of their scores.

    Args:
        query: `[Q, k]`, from `mean_gradients`.
        train: `[N, k]`: Phi.
        ridge: lambda as a share of the mean eigenvalue; 0 is TRAK's own, which needs N >= k.

    Raises:
        ValueError: gradients of different size; a negative ridge; a Phi^T Phi that cannot be inverted.
    """
    if query.shape[1] != train.shape[1]:
        raise ValueError(f"gradients of {query.shape[1]} and of {train.shape[1]} dimensions have no products")
    if ridge < 0:
        raise ValueError(f"a ridge is at least 0, got {ridge}")
    count, k = train.shape
    phi = train.double()
    kernel = phi.T @ phi
    kernel += ridge * kernel.trace() / k * torch.eye(k, dtype=torch.float64, device=kernel.device)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    if not eigenvalues[0] > _SINGULAR * eigenvalues[-1]:
        raise ValueError(
            f"TRAK cannot invert the products of {count} examples' gradients in {k} dimensions: give a ridge, project "
            "to fewer dimensions, or take more examples whose gradients are not zero"
        )
    features: Tensor = torch.linalg.solve(kernel, phi.T)
    return query.double() @ features
