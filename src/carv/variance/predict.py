"""The variance of any design from one pilot: every (R, K), proposal, coupling, with and without antithetic noise.

    E|g_hat|^2 = 1/(RK)^2 { RK sum q omega^2 m2  +  R K (K-1) <Qw omega omega', Gw>
                                                 +  R (R-1) K^2 <Qc omega omega', Gc> }
    Var        = E|g_hat|^2 - |mu|^2,      |mu|^2 = <p p', Gc>          (`estimators.md`, section 4; ours)

which is linear in the tables, so leave-one-render-out values cost nothing.

Discretisation: the first term uses each draw's own weight, and for independent draws `Qw omega omega'` is p p' for
every q, so iid predictions are unbiased for ANY number of bins. So are strata that are unions of bins. Strata that cut
bins rest on F being linear within them (`carv.variance.designs`): an error of fourth order in their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from carv import proposals
from carv.density import Density, DiscreteDensity, Reweighted
from carv.strata import Coupling, Pairs, iid, per_render
from carv.variance.designs import PairLaw, pair_law
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.lines import Line, line
from carv.variance.tables import Tables


@dataclass(frozen=True)
class Split:
    """Where a variance comes from, by the law of total variance: x first, then t given x, then eps given both.

    Attributes:
        render: Var of E[g_hat | x] = sigma_b^2 / R, for every unbiased design.
        timestep: what the draw of t adds; what strata reduce. sigma_t^2 / (R K) for iid draws from p.
        noise: what eps adds; what antithetic noise changes. sigma_eps^2 / (R K) for q = p.

    Timestep and noise are told apart by F being linear within a bin; their sum does not rest on it.
    """

    render: Jackknifed
    timestep: Jackknifed
    noise: Jackknifed


@dataclass(frozen=True)
class Prediction:
    """Var(g_hat) of one design, in units of the gradient squared.

    Attributes:
        renders, renoise: R and K.
        variance: the prediction with its error and interval.
        split: its three parts, which add up to it.
    """

    renders: int
    renoise: int
    variance: Jackknifed
    split: Split

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the variance: over renders, and over projections if there were any."""
        return self.variance.interval()

    def __str__(self) -> str:
        parts = (self.split.render, self.split.timestep, self.split.noise)
        shares = ", ".join(f"{part.value / self.variance.value:.0%}" for part in parts)
        return f"{self.variance} (render, timestep, noise: {shares})"


def predict(
    tables: Tables,
    renders: int,
    renoise: int,
    proposal: Density | None = None,
    coupling: Coupling = per_render,
    antithetic: bool = False,
) -> Prediction:
    """The variance of one design.

    Args:
        tables: of a pilot, or exact ones.
        renders, renoise: R and K of the design, >= 1.
        proposal: q; `None` is p. Of an adaptive proposal pass its `law`.
        coupling: a function of `carv.strata`, or one of its `Pairs`, mostly with the proposal of `pair_proposal`.
        antithetic: draws 2j and 2j + 1 of a render share t and have noise of opposite signs; the coupling spreads
            the K/2 pairs.

    Raises:
        ValueError: a count below 1, an odd K with antithetic noise or tables without it, a coupling without a
            known pair law, `Pairs` with other than two draws (two pairs with antithetic noise) a render, a proposal
            that is zero where a contribution was measured.
    """
    if antithetic and renoise % 2:
        raise ValueError(f"antithetic noise needs an even number of re-noisings, got renoise = {renoise}")
    joined = line(tables.base, proposal)
    distinct = renoise // 2 if antithetic else renoise
    law = pair_law(joined, _array(tables.edges), renders, distinct, coupling, tables.atoms)
    return _predict(tables, joined, law, renders, renoise, antithetic)


def _predict(tables: Tables, joined: Line, law: PairLaw, renders: int, renoise: int, antithetic: bool) -> Prediction:
    p, count = _array(tables.edges.diff()), renders * renoise
    both = np.outer(p, p)
    one = (_single(tables, joined, p) + (_partner(tables, joined, p) if antithetic else 0.0)) / count
    together = 2 if antithetic else 1  # draws that share t and so are no pair of the coupling
    pairs = (renoise - together) / count * law.within
    others = (1 - 1 / renders) * law.across - both
    variance = _linear(tables, one, pairs, others)
    render = _linear(tables, np.zeros(len(one)), both / renders, -both / renders)
    noise = _linear(tables, one, -law.same_t * (together / count), np.zeros_like(both))
    timestep = derived(lambda total, a, b: total - a - b, variance, render, noise)
    return Prediction(renders, renoise, variance, Split(render, timestep, noise))


def gain(baseline: Prediction, method: Prediction) -> Jackknifed:
    """RE = Var_baseline / Var_method, compared render by render: mostly far more certain than either variance.

    Args:
        baseline, method: predictions from the SAME tables.
    """
    return derived(lambda a, b: a / b, baseline.variance, method.variance)


def oracle_proposal(tables: Tables, given_strata: bool = False, share: float = 0.1) -> Density:
    """The proposal that the tables ask for, mixed with a share of p so that its weights stay bounded.

        q* ~ p sqrt(m2(t))                    least sum p^2/q m2: best for K = 1, and for iid draws (Eq. 24)
        q* ~ p sqrt(m2(t) - Gw(t, t))         best for many strata, which already remove the variance of F_x(t)   (ours)

    A gain that is predicted for it from the same tables is optimistic, as for every fit; with a pilot of its own it
    is not.

    Args:
        tables: where the moments are from.
        given_strata: which of the two.
        share: a of `carv.proposals.defensive`, in [0, 1]; 0 leaves the oracle as it is.
    """
    moment = tables.m2
    if given_strata:
        # A difference of estimates can be negative; a hundredth of m2 keeps q from being blind there.
        moment = (moment - tables.gram_within.diagonal()).maximum(0.01 * moment)
    first = np.unique(_array(tables.t), return_index=True)[1]  # with narrow bins some share their middle atom
    base, at = tables.base, tables.t[first]
    best = proposals.oracle(base, at.to(base.device), moment[first].to(base.device))
    return best if share == 0 else proposals.defensive(base, best, share)


def pair_proposal(tables: Tables, coupling: Pairs) -> Density:
    """The proposal whose bins have the marginals pi of a pair design: with it p/q is Horvitz-Thompson's p_i / pi_i.

        q(t) = p(t) pi_i / p_i   for t in bin i                                                      (Eq. 65)

    An atom of p that several bins share has the sum of its parts. `predict(tables, R, 2, pair_proposal(tables, design),
    design)` is Eq. 66 for R = 1; the sampler of the design is `TimestepSampler(base, q, coupling=design)`.

    Args:
        tables: whose bins the design is over.
        coupling: the design.

    Raises:
        ValueError: a design over another number of bins.

    Example:
        >>> design = Pairs(pairs.optimal(targets, pairs.marginals(targets)))            # doctest: +SKIP
        >>> predict(tables, 1, 2, pair_proposal(tables, design), design).variance       # doctest: +SKIP
    """
    pi, base, edges = coupling.marginals, tables.base, _array(tables.edges)
    if len(pi) != len(edges) - 1:
        raise ValueError(f"the pair design is over {len(pi)} bins, the tables have {len(edges) - 1}")
    if isinstance(base, DiscreteDensity):
        if tables.atoms and len(pi) == len(base.pmf):
            mass = pi  # as it is: the atoms then end in u exactly where the design's bins do
        else:
            ends = np.interp(_array(base.cumulative.cpu()), edges, _array(coupling.ends))
            mass = torch.from_numpy(np.diff(ends, prepend=0.0))
        return DiscreteDensity(base.first, mass).to(base.device)
    if isinstance(base, Reweighted):
        return _finer(base, edges, _array(coupling.ends))
    return Reweighted(base, tables.edges, pi).to(base.device)


def _finer(base: Reweighted, edges: np.ndarray, ends: np.ndarray) -> Reweighted:
    """Over a base that is piecewise itself: cells of the closed form below it, cut where p/q or the bin changes."""
    below, cumulative = _array(base.edges.cpu()), _array(base.cumulative.cpu())
    cells = np.union1d(below, np.interp(edges, cumulative, below))
    mass = np.diff(np.interp(np.interp(cells, below, cumulative), edges, ends))
    return Reweighted(base.base, torch.from_numpy(cells), torch.from_numpy(mass)).to(base.device)


Method = tuple[Density | None, Coupling]
"""A proposal (`None`: p) and a coupling."""

PAPER_RENDERS = (1, 2, 4, 8)
PAPER_RENOISE = (1, 2, 4, 8, 16, 32)
PAPER_DRAWS = 32


def paper_methods(importance: Density) -> dict[str, Method]:
    """The four methods of App. D.1.1, with `importance` as the proposal of IW."""
    return {
        "uniform": (None, iid),
        "iw": (importance, iid),
        "strat": (None, per_render),
        "iw+strat": (importance, per_render),
    }


def grid(
    tables: Tables,
    methods: Mapping[str, Method],
    renders: Iterable[int] = PAPER_RENDERS,
    renoise: Iterable[int] = PAPER_RENOISE,
    max_draws: int = PAPER_DRAWS,
) -> dict[tuple[str, int, int], Prediction]:
    """Every cell (method, R, K) with R K <= max_draws: by default the 18 x 4 of App. D.1.1, from one pilot.

    Args:
        tables: of the pilot.
        methods: named proposals and couplings, e.g. `paper_methods(q)`.
        renders, renoise: the R and K.
        max_draws: the largest R K.
    """
    renoise = tuple(renoise)
    edges = _array(tables.edges)
    cells = {}
    for name, (proposal, coupling) in methods.items():
        joined = line(tables.base, proposal)
        for r in renders:
            for k in (k for k in renoise if r * k <= max_draws):
                law = pair_law(joined, edges, r, k, coupling, tables.atoms)
                cells[name, r, k] = _predict(tables, joined, law, r, k, False)
    return cells


def _single(tables: Tables, joined: Line, p: np.ndarray) -> np.ndarray:
    """`[R0]`, sum q omega^2 m2 = E_{t ~ p}[omega |g|^2] by render, each draw with its own omega."""
    return np.asarray(_weighted(tables, joined, _array(tables.position), _array(tables.norm_sq)).mean(-1) @ p)


def _partner(tables: Tables, joined: Line, p: np.ndarray) -> np.ndarray:
    """`[R0]`, sum q omega^2 E<g(eps), g(-eps)>."""
    if tables.antithetic is None:
        raise ValueError("these tables have no antithetic pairs; run the pilot with antithetic=True")
    return np.asarray(_weighted(tables, joined, _array(tables.position[..., 0]), _array(tables.antithetic)) @ p)


def _weighted(tables: Tables, joined: Line, position: np.ndarray, value: np.ndarray) -> np.ndarray:
    omega = joined.weight(position)
    lost = np.isinf(omega) & (value != 0)
    if lost.any():
        t = float(tables.base.icdf(tables.edges.new_tensor(position[lost].min()).to(tables.base.device)))
        raise ValueError(
            f"the proposal is zero at t = {t:g}, where the pilot measured a contribution; mix it with the base: "
            "carv.proposals.defensive(base, proposal)"
        )
    return np.asarray(np.where(np.isinf(omega), 0.0, omega) * value)


def _linear(tables: Tables, one: np.ndarray, pairs: np.ndarray, others: np.ndarray) -> Jackknifed:
    """mean_r one_r + <pairs, Gw> + <others, Gc>, with its leave-one-out values.

    Without render i the U-statistic for Gc is (n Gc - 2 across_i) / (n - 2): it loses row and column i.
    """
    own = one + _contract(tables.within, pairs)
    shared = _contract(tables.across, others)
    value = float(own.mean() + shared.mean())
    n = tables.renders
    if tables.is_exact:
        return Jackknifed(value)
    without = (n * own.mean() - own) / (n - 1) + (n * shared.mean() - 2 * shared) / (n - 2)
    if tables.block_within is None or tables.block_across is None:
        return Jackknifed(value, without)
    blocks = _contract(tables.block_within, pairs) + _contract(tables.block_across, others)
    j = len(blocks)
    return Jackknifed(value, without, value + (blocks.mean() - blocks) / (j - 1))


def _contract(table: object, weights: np.ndarray) -> np.ndarray:
    table = _array(table)
    return np.asarray(table.reshape(len(table), -1) @ weights.ravel())


def _array(tensor: object) -> np.ndarray:
    return np.asarray(tensor, dtype=np.float64)
