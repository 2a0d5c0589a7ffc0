"""Gradient norms over t, with their parts, and the proposals beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from carv.density import Density, DiscreteDensity
from carv.runs.pilot_folder import PilotRecord
from carv.strata import iid
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.predict import gain, oracle_proposal, predict
from carv.variance.tables import Tables

_POINTS = 400


@dataclass(frozen=True, eq=False)
class Norms:
    """Roots of the parts of m2(t), one figure a bin.

        m2(t) = |F(t)|^2 + (Gw(t, t) - Gc(t, t)) + (m2(t) - Gw(t, t))

    Attributes:
        t: `[M]`, the middle of each bin.
        total: sqrt(m2).
        mean: sqrt(Gc(t, t)), the norm of the mean gradient.
        render: sqrt(Gw(t, t) - Gc(t, t)).
        noise: sqrt(m2 - Gw(t, t)); with what t does inside a bin.
    """

    t: tuple[float, ...]
    total: tuple[Jackknifed, ...]
    mean: tuple[Jackknifed, ...]
    render: tuple[Jackknifed, ...]
    noise: tuple[Jackknifed, ...]


def norms(tables: Tables) -> Norms:
    """The norms and their parts; a part that is estimated as negative is 0."""
    total = _mean(tables.norm_sq.mean(2))
    within = _mean(tables.within.diagonal(dim1=1, dim2=2))
    across = _pairs(tables.across.diagonal(dim1=1, dim2=2))

    def root(*parts: Jackknifed) -> Jackknifed:
        first, *rest = parts
        return derived(lambda a, *b: np.sqrt(np.maximum(a - sum(b), 0)), first, *rest)

    return Norms(
        tuple(tables.t.tolist()),
        tuple(root(a) for a in total),
        tuple(root(a) for a in across),
        tuple(root(a, b) for a, b in zip(within, across, strict=True)),
        tuple(root(a, b) for a, b in zip(total, within, strict=True)),
    )


def _mean(rows: torch.Tensor) -> list[Jackknifed]:
    """Column means of `[R0, M]` over renders."""
    n, columns = len(rows), np.asarray(rows, dtype=np.float64).T
    if n == 1:
        return [Jackknifed(float(column[0])) for column in columns]
    return [Jackknifed(float(c.mean()), (n * c.mean() - c) / (n - 1)) for c in columns]


def _pairs(rows: torch.Tensor) -> list[Jackknifed]:
    """The same for U-statistics over pairs of renders, which lose row and column i."""
    n, columns = len(rows), np.asarray(rows, dtype=np.float64).T
    if n == 1:
        return [Jackknifed(float(column[0])) for column in columns]
    return [Jackknifed(float(c.mean()), (n * c.mean() - 2 * c) / (n - 2)) for c in columns]


@dataclass(frozen=True, eq=False)
class Ratios:
    """q(t)/p(t) of the proposals.

    Attributes:
        t: where.
        curves: name -> q/p at t.
    """

    t: np.ndarray
    curves: Mapping[str, np.ndarray]


def proposal_ratios(pilot: PilotRecord) -> Ratios:
    """The pilot's proposals, and the oracle that its tables ask for (without a share of p)."""
    tables = pilot.tables
    base = tables.base
    proposals: dict[str, Density | None] = {"uniform": None, **pilot.proposals}
    proposals["oracle"] = oracle_proposal(tables, share=0)
    t = _points(base)
    p = base.prob(t).double()
    curves = {}
    for name, proposal in proposals.items():
        q = p if proposal is None else proposal.prob(t.to(proposal.device)).double().to(p.device)
        curves[name] = np.asarray((q / p).cpu())
    return Ratios(np.asarray(t.cpu(), dtype=np.float64), curves)


def proposal_gains(pilot: PilotRecord) -> dict[str, Jackknifed]:
    """RE at (1, 1) of each proposal, and of the oracle with a hundredth of p, against p itself."""
    tables = pilot.tables
    one = predict(tables, 1, 1, None, iid)
    proposals = {name: proposal for name, proposal in pilot.proposals.items() if proposal is not None}
    proposals["oracle"] = oracle_proposal(tables, share=0.01)
    return {name: gain(one, predict(tables, 1, 1, proposal, iid)) for name, proposal in proposals.items()}


def _points(base: Density) -> torch.Tensor:
    """Up to 400 timesteps at which p is positive."""
    if isinstance(base, DiscreteDensity):
        support = base.support[base.pmf > 0]
        return support[:: max(1, len(support) // _POINTS)]
    v = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    return base.icdf(v.to(base.device))
