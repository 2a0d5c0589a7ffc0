"""Couplings: how the R x K uniforms of one step depend on each other. Each is one function.

Every coupling gives uniforms that are exactly U(0, 1) each, so an estimate made with any of them is unbiased;
they differ in the joint law. `u[r, k]` belongs to re-noising k of render r. They know no densities: a
proposal is stratified by its own quantiles, because these u go through its inverse CDF (Eq. 16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64
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


@dataclass(frozen=True, eq=False)
class Pairs:
    """u[r, :] from a joint law Q of two bins: a pair-probability design of App. D.1.6, for K = 2.

        (i, j) ~ Q for each render,   u[r, 0] ~ U[c_{i-1}, c_i),   u[r, 1] ~ U[c_{j-1}, c_j),   c = cumsum(pi)

    with pi the marginals of Q: bin i is an interval of length pi_i, so each u is exactly U(0, 1). With the proposal
    whose bins have mass pi (`carv.variance.predict.pair_proposal`) the weights p/q are Horvitz-Thompson's p/pi
    (Eq. 65). Renders are independent. It is called like the other couplings, with renoise = 2; with antithetic noise
    that is two pairs.

    Attributes:
        joint: `[N, N]`, Q: a symmetric law of ORDERED pairs of bins, sum 1. It is copied.

    Raises:
        ValueError: a law that is not symmetric, negative somewhere, or not of sum 1; a call with renoise other than 2.

    Example:
        >>> halves = Pairs(torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64))
        >>> (halves(3, 2, torch.Generator().manual_seed(0), torch.device("cpu")) < 0.5).sum(1).tolist()
        [1, 1, 1]
    """

    joint: Float[Tensor, "N N"] | Float64[np.ndarray, "N N"]
    _tables: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        q = torch.as_tensor(self.joint).to("cpu", torch.float64, copy=True)
        if not (torch.allclose(q, q.T, rtol=0, atol=1e-12) and abs(q.sum() - 1) < 1e-8 and q.min() >= -1e-12):
            raise ValueError("a pair design is a symmetric law of ordered pairs: not negative, with sum 1")
        q = ((q + q.T) / 2).clamp(min=0)
        object.__setattr__(self, "joint", q / q.sum())

    @property
    def marginals(self) -> Float[Tensor, " N"]:
        """pi, float64: how likely either draw is to lie in each bin."""
        return torch.as_tensor(self.joint).sum(1)

    @property
    def ends(self) -> Float[Tensor, " N1"]:
        """c, `[N + 1]`: the ends of the bins in u, from 0 to exactly 1."""
        total = self.marginals.cumsum(0)
        return torch.cat([total.new_zeros(1), total / total[-1]])

    def __call__(self, renders: int, renoise: int, rng: torch.Generator | None, device: torch.device) -> Uniforms:
        if renoise != 2:
            raise ValueError(f"a pair design draws two timesteps for each render, got renoise = {renoise}")
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._lookup())
        cumulative, lower, width, last = self._tables[device]
        drawn = _rand((renders, 3), rng, device)
        pair = torch.searchsorted(cumulative, drawn[:, :1].contiguous(), right=True)
        bins = torch.cat([pair // len(lower), pair % len(lower)], 1)
        return torch.minimum(lower[bins] + drawn[:, 1:] * width[bins], last[bins])

    def _lookup(self) -> tuple[Tensor, ...]:
        """The CDF of the flattened pairs; of each bin the lower end, the length, and the last number inside."""
        # Divided by its own last entry it ends at exactly 1, and pairs of mass zero are never found.
        total, ends = torch.as_tensor(self.joint).flatten().cumsum(0), self.ends
        return total / total[-1], ends[:-1], ends.diff(), torch.nextafter(ends[1:], torch.zeros_like(ends[1:]))


COUPLINGS: dict[str, Coupling] = {
    "iid": iid,
    "per-render": per_render,
    "global": global_strata,
    "systematic": systematic,
    "nested": nested,
}
"""The names that the command line takes. In code, pass the functions; `Pairs` needs its law, and has no name."""


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
