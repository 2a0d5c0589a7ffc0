"""Two draws of t: pair-probability designs, their exact variance, and how near the optimum they are (App. D.1.6).

A design is a symmetric joint law Q `[N, N]` of the ORDERED pair (i, j) over N timesteps, sum 1, with marginals pi. For

    mu_hat = 1/2 (y_i / pi_i + y_j / pi_j),       y_i = p_i f_i                    (Horvitz-Thompson, Eq. 65)
    Var    = sum_ij Q_ij |mu_hat_ij - mu|^2                                        (Eq. 66)
           = 1/2 sum_i |y_i|^2 / pi_i + 1/2 sum_ij Q_ij <y_i, y_j> / (pi_i pi_j) - |mu|^2

The weights are those of the design's own marginals, so every design is unbiased. (The paper writes Q~ over unordered
pairs, whose pi would sum to 2 and halve Eq. 65; ordered pairs are what makes Eq. 65 and 66 agree.) Only inner products
of the y are needed. For random y (over renders and noise) the first term takes E|y_i|^2 and the second
E<y_i, y_j> of independent noise: p^2 m2 and p p' Gw of `Tables`, so this is R = 1, K = 2 of `carv.variance.predict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from carv.extras import require
from carv.variance.tables import Tables


@dataclass(frozen=True, eq=False)
class Targets:
    """The y_i as far as variances need them.

    Attributes:
        gram: `[N, N]`, <y_i, y_j>, or E<y_i, y_j> for independent noise.
        second_moment: `[N]`, E|y_i|^2; the diagonal of gram if y is not random.
        mean_sq: |mu|^2.
    """

    gram: np.ndarray
    second_moment: np.ndarray
    mean_sq: float

    @classmethod
    def snapshot(cls, y: np.ndarray) -> Targets:
        """Fixed vectors y `[N, D]`, as in the paper: what a design does about t alone."""
        gram = np.asarray(y, np.float64) @ np.asarray(y, np.float64).T
        return cls(gram, gram.diagonal().copy(), float(gram.sum()))

    @classmethod
    def of_tables(cls, tables: Tables) -> Targets:
        """Random y, with one index a bin: the variance is that of one render and two draws."""
        p = tables.p.numpy()
        both = np.outer(p, p)
        return cls(both * tables.gram_within.numpy(), p**2 * tables.m2.numpy(), tables.mean_sq)


def iid(size: int) -> np.ndarray:
    """Q ~ 1 for i != j: the paper's baseline, drawn without replacement."""
    return _normalised(1 - np.eye(size))


def index_strata(size: int) -> np.ndarray:
    """One index from each half: Q ~ 1 between the halves."""
    half = np.arange(size) < size // 2
    return _normalised(np.not_equal.outer(half, half).astype(np.float64))


def importance(w: np.ndarray) -> np.ndarray:
    """Q ~ w_i w_j for i != j.

    Args:
        w: `[N]`, p times the timestep weight, or any other importance; positive.
    """
    w = _positive(w)
    return _normalised(np.outer(w, w) * (1 - np.eye(len(w))))


def importance_strata(w: np.ndarray) -> np.ndarray:
    """One draw from each half of the CDF of q ~ w: what `carv.strata.per_render` does at K = 2.

    The atom that straddles the median belongs to both halves in part, so it can be drawn twice. Args: as `importance`.
    """
    cdf = np.concatenate([[0.0], np.cumsum(_positive(w))])
    cdf /= cdf[-1]
    low = np.diff(cdf.clip(max=0.5))
    high = np.diff(cdf) - low
    return 2 * (np.outer(low, high) + np.outer(high, low))


def marginals(targets: Targets) -> np.ndarray:
    """The paper's target, pi ~ sqrt(E|y_i|^2): |y_i| for fixed y.

    One of two different indices is i with probability 2 pi_i, so a larger one is capped at pi_i = 1/2.
    """
    root = np.sqrt(targets.second_moment.clip(min=0))
    pi = root / root.sum()
    top = int(pi.argmax())
    if pi[top] > 0.5:
        pi *= 0.5 / (1 - pi[top])
        pi[top] = 0.5
    return np.asarray(pi)


def sinkhorn(targets: Targets, pi: np.ndarray, beta: float = 10.0, max_iterations: int = 100_000) -> np.ndarray:
    """The paper's "optimal": entropic transport between pi and itself, without the diagonal.

        C_ij = <y_i, y_j> / (pi_i pi_j),     Q = diag(a) exp(-beta C / scale) diag(a),     Q 1 = pi

    `scale` is the 95th percentile of |C| off the diagonal. The larger beta, the nearer to `optimal` with the same pi.
    Needs POT (Flamary et al. 2021).

    Args:
        targets: the y.
        pi: `[N]`, the marginals, positive, none above 1/2.
        beta: inverse temperature, > 0; the paper does not state its own.
        max_iterations: of Sinkhorn's algorithm. Where it stops early the design is still unbiased: its own marginals
            are used.

    Raises:
        ValueError: marginals that no pair of different indices can have, or beta not positive.
        ImportError: POT is not installed.
    """
    ot = require("ot", "pairs")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    pi = _marginals(pi)
    cost = targets.gram / np.outer(pi, pi)
    off = ~np.eye(len(pi), dtype=bool)
    scaled = cost / np.percentile(np.abs(cost[off]), 95)
    # exp of it is 0 in double precision: no index is paired with itself.
    scaled[~off] = scaled[off].max() + 800 / beta
    plan = ot.bregman.sinkhorn_log(pi, pi, scaled, reg=1 / beta, numItermax=max_iterations, stopThr=1e-12, warn=False)
    plan = np.where(off, plan, 0.0)
    return _normalised(plan + plan.T)


def optimal(targets: Targets, pi: np.ndarray) -> np.ndarray:
    """The design of least variance with given marginals and i != j: a linear program, solved exactly (HiGHS).

        min sum_ij Q_ij C_ij   over symmetric Q >= 0 with Q 1 = pi and Q_ii = 0

    What `sinkhorn` approximates. N (N - 1)/2 unknowns: seconds up to N of about 150. Args, raises: as `sinkhorn`.
    """
    optimize = require("scipy.optimize", "pairs")
    sparse = require("scipy.sparse", "pairs")
    pi = _marginals(pi)
    i, j = np.triu_indices(len(pi), 1)
    columns = np.tile(np.arange(len(i)), 2)
    rows = sparse.csr_matrix((np.ones(2 * len(i)), (np.concatenate([i, j]), columns)), (len(pi), len(i)))
    cost = (targets.gram / np.outer(pi, pi))[i, j]
    scale = np.abs(cost).max() or 1.0
    found = optimize.linprog(cost / scale, A_eq=rows, b_eq=pi, bounds=(0, None), method="highs")
    if not found.success:
        raise ValueError(f"the linear program of the optimal pair design has no solution: {found.message}")
    return _from_pairs(np.asarray(found.x), len(pi))


def optimal_free(targets: Targets, starts: tuple[np.ndarray, ...] = (), iterations: int = 2000) -> np.ndarray:
    """The design of least variance over ALL symmetric Q with i != j, marginals included: the best of local searches.

    With Horvitz-Thompson weights the variance is not convex in Q, so this is an upper bound on the optimum (L-BFGS on
    the logits of the pairs, from each start). It is never worse than a start that has i != j.

    Args:
        targets: the y.
        starts: designs to start from; one that is iid and one that is `optimal` at `marginals` are always added.
        iterations: of each search.
    """
    optimize = require("scipy.optimize", "pairs")
    size = len(targets.gram)
    i, j = np.triu_indices(size, 1)
    floor = 1e-6 * iid(size)
    candidates = [iid(size), optimal(targets, marginals(targets)), *starts]
    gram, second, left, right = (torch.from_numpy(x) for x in (targets.gram, targets.second_moment, i, j))
    unit = variance(candidates[0], targets) + abs(targets.mean_sq)

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(logits).requires_grad_()
        half = torch.softmax(x, 0) / 2
        pi = torch.zeros(size, dtype=torch.float64).index_add(0, left, half).index_add(0, right, half)
        pairs = (half * gram[left, right] / (pi[left] * pi[right])).sum()
        value = ((second / pi).sum() / 2 + pairs) / unit
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    found = []
    for start in candidates:
        logits = np.log((start + floor)[i, j])
        best = optimize.minimize(loss, logits, jac=True, method="L-BFGS-B", options={"maxiter": iterations}).x
        x = np.exp(best - best.max())
        found.append(_from_pairs(x / (2 * x.sum()), size))
    return min(found + [q for q in candidates if not q.diagonal().any()], key=lambda q: variance(q, targets))


def variance(joint: np.ndarray, targets: Targets) -> float:
    """Eq. 66 for a design.

    Args:
        joint: `[N, N]`, Q.
        targets: the y.

    Raises:
        ValueError: a law that is not symmetric or not of sum 1, or that never draws an index whose y is not 0.
    """
    if not (np.allclose(joint, joint.T, atol=1e-12) and np.isclose(joint.sum(), 1) and joint.min() >= -1e-12):
        raise ValueError("a pair design is a symmetric law of ordered pairs: not negative, with sum 1")
    pi = joint.sum(1)
    missing = (pi <= 0) & (targets.second_moment > 0)
    if missing.any():
        raise ValueError(f"the design never draws index {int(missing.argmax())}, whose contribution is not 0")
    inverse = np.divide(1.0, pi, out=np.zeros_like(pi), where=pi > 0)
    pairs = (joint * targets.gram * np.outer(inverse, inverse)).sum()
    return float(0.5 * (targets.second_moment @ inverse) + 0.5 * pairs - targets.mean_sq)


@dataclass(frozen=True, eq=False)
class PairDesign:
    """One line of the comparison of App. D.1.6; `joint` is what Fig. 20 shows.

    Attributes:
        name: of the design.
        joint: `[N, N]`, Q.
        variance: Eq. 66.
        gain: Var(iid) / Var, the paper's effective compute multiplier.
        of_best_gain: gain / gain of the best design of the list: the paper's "91 %" is 1.29/1.42.
        of_best_reduction: (Var(iid) - Var) / (Var(iid) - Var(best)), which for the paper's numbers is 76 %.
    """

    name: str
    joint: np.ndarray
    variance: float
    gain: float
    of_best_gain: float
    of_best_reduction: float


def compare(targets: Targets, w: np.ndarray, beta: float = 10.0, entropic: bool = True) -> tuple[PairDesign, ...]:
    """The paper's five designs, and the two true optima: with the paper's marginals, and with any.

    From estimated tables the optima also fit the tables' errors: their gains are optimistic.

    Args:
        targets: the y.
        w: `[N]`, for the two weighted designs: p times the timestep weight.
        beta: of `sinkhorn`.
        entropic: whether to include `sinkhorn`, which needs POT.
    """
    size, pi = len(targets.gram), marginals(targets)
    designs = {
        "iid": iid(size),
        "strata": index_strata(size),
        "iw": importance(w),
        "iw+strata": importance_strata(w),
    }
    if entropic:
        designs["sinkhorn"] = sinkhorn(targets, pi, beta)
    designs["optimal, same marginals"] = optimal(targets, pi)
    designs["optimal"] = optimal_free(targets, tuple(designs.values()))
    found = {name: variance(joint, targets) for name, joint in designs.items()}
    base, best = found["iid"], min(found.values())
    return tuple(
        PairDesign(name, designs[name], value, _over(base, value), _over(best, value), _over(base - value, base - best))
        for name, value in found.items()
    )


def _over(a: float, b: float) -> float:
    """a / b, 1 for 0/0: where nothing can be gained, everything is."""
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b


def _from_pairs(x: np.ndarray, size: int) -> np.ndarray:
    joint = np.zeros((size, size))
    joint[np.triu_indices(size, 1)] = x.clip(min=0)
    return _normalised(joint + joint.T)


def _normalised(joint: np.ndarray) -> np.ndarray:
    return np.asarray(joint / joint.sum())


def _positive(w: np.ndarray) -> np.ndarray:
    w = np.asarray(w, np.float64)
    if w.ndim != 1 or len(w) < 2 or not (np.isfinite(w) & (w > 0)).all():
        raise ValueError("the weights of a pair design are at least two numbers, finite and positive")
    return w


def _marginals(pi: np.ndarray) -> np.ndarray:
    pi = _positive(pi)
    pi = pi / pi.sum()
    if pi.max() > 0.5 + 1e-12:
        raise ValueError(
            f"no pair of different indices has index {int(pi.argmax())} with marginal {pi.max():.3g}; at most 1/2 is "
            "possible"
        )
    return pi
