"""Couplings: how the R x K uniforms of one step depend on each other. Each is one function.

Every coupling gives uniforms that are exactly U(0, 1) each, so an estimate made with any of them is unbiased;
they differ in the joint law. `u[r, k]` belongs to re-noising k of render r. They know no densities: a
proposal is stratified by its own quantiles, because these u go through its inverse CDF (Eq. 16).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

Uniforms = Float[Tensor, "R K"]
Coupling = Callable[[int, int, torch.Generator | None, torch.device], Tensor]
"""(renders R, renoise K, generator, device) -> float64 `[R, K]`, every entry in [0, 1)."""


def iid(renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
    """u[r, k] ~ U(0, 1), all independent.

    Args:
        renders: R, upstream states in a step.
        renoise: K, draws for each state.
        rng: the only source of randomness; `None` is torch's global one.
        device: of the result; that of rng if there is one.
    """
    return _rand((renders, renoise), rng, device)


def per_render(renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
    """u[r, k] = (k + xi[r, k]) / K: for each render one draw in each of K strata (Eq. 15, 16, 17).

    With K = 1 there is one stratum, so it is `iid` then, by definition. Args: as for `iid`.
    """
    return _one_in_each(renoise, _rand((renders, renoise), rng, device))


def global_strata(renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
    """u[r, k] = (pi(r, k) + xi[r, k]) / (R K): one draw in each of R K strata (Eq. 14).

    pi is a uniformly random permutation: otherwise render 0 would only ever see small t. Args: as for `iid`.
    """
    count = renders * renoise
    in_order = _one_in_each(count, _rand((count,), rng, device))
    return in_order[_permutation(count, rng, device)].view(renders, renoise)


def systematic(renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
    """u[r, k] = (pi(r, k) + xi) / (R K) with ONE xi: a randomly shifted lattice, permuted (as in VDM).

    The most even cover of t; unlike the other couplings it can be worse than iid, for integrands that are
    periodic with the lattice. Args: as for `iid`.
    """
    count = renders * renoise
    in_order = _one_in_each(count, _rand((1,), rng, device))
    return in_order[_permutation(count, rng, device)].view(renders, renoise)


def nested(renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
    """u[r, k] = (R k + pi_k(r) + xi[r, k]) / (R K): per-render AND global strata at once.

    Each render has one draw in each of K strata, and the R draws that share a stratum have one in each of its
    R parts, handed out by independent random permutations pi_k. With K = 1 it is `global_strata`, with R = 1
    it is `per_render`. Beyond the paper. Args: as for `iid`.
    """
    count = renders * renoise
    in_order = _one_in_each(count, _rand((count,), rng, device)).view(renoise, renders)
    # Row k holds stratum k of K, its R parts in order; each row is permuted by itself.
    return in_order.gather(1, torch.argsort(_rand((renoise, renders), rng, device), 1)).T


COUPLINGS: dict[str, Coupling] = {
    "iid": iid,
    "per-render": per_render,
    "global": global_strata,
    "systematic": systematic,
    "nested": nested,
}
"""The names that the command line takes. In code, pass the functions."""


def _rand(shape: tuple[int, ...], rng: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=rng, dtype=torch.float64, device=device)


def _permutation(size: int, rng: torch.Generator | None, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.randperm(size, generator=rng)
    # By sorting, which is known to make no host sync; a tie has probability size^2 / 2^54.
    return torch.argsort(_rand((size,), rng, device))


@lru_cache(maxsize=64)
def _ends(strata: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lower end b / B of each stratum, and the largest double below its upper end."""
    ends = torch.arange(strata + 1, dtype=torch.float64, device=device) / strata
    return ends[:-1], torch.nextafter(ends[1:], torch.zeros_like(ends[1:]))


def _one_in_each(strata: int, xi: Tensor) -> Tensor:
    """b / B + xi / B for b = 0..B-1, kept inside stratum b: rounded up it could reach (b + 1) / B, and hence 1."""
    lower, last = _ends(strata, xi.device)
    return torch.minimum(xi / strata + lower, last)
