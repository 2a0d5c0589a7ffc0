"""The variance of a fitted proposal, judged by renders that it was not fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce

import numpy as np

from carv.density import Density
from carv.strata import Coupling, per_render
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.predict import predict
from carv.variance.tables import Tables


def cross_fitted(
    tables: Tables, fit: Callable[[Tables], Density], renoise: int, coupling: Coupling = per_render, folds: int = 4
) -> Jackknifed:
    """The variance of (1, K) with q from `fit`: of each fold of renders, with q fitted to all others.

        Var = Var_uniform + mean over folds of (Var(q_f) - Var_uniform), both from the renders of fold f

    A proposal that was judged by the tables it was fitted to would look better than it is. The difference does not
    contain |mu|^2, so it is a mean over renders, and its jackknife needs only them. That q_f would change without a
    render of its own fit is left out of the error.

    Args:
        tables: of a pilot without a projection.
        fit: tables -> q; `Tables.across` of what it gets is of other renders, too.
        renoise: K.
        coupling: of the K draws.
        folds: how many, each of at least 3 renders.

    Raises:
        ValueError: fewer than 2 folds, or too small ones; tables with a projection.
    """
    n = tables.renders
    if folds < 2 or n // folds < 3:
        raise ValueError(f"cross-fitting needs at least 2 folds of at least 3 renders, got {folds} of {n} renders")
    if tables.block_within is not None:
        raise ValueError("cross-fitting needs a pilot without a projection")
    fold = np.arange(n) % folds
    each = np.empty(n)
    for f in range(folds):
        own, others = _part(tables, fold == f), _part(tables, fold != f)
        each[fold == f] = _by_render(own, fit(others), renoise, coupling)
    difference = Jackknifed(float(each.mean()), (each.sum() - each) / (n - 1))
    return derived(np.add, predict(tables, 1, renoise, None, coupling).variance, difference)


def _by_render(own: Tables, proposal: Density, renoise: int, coupling: Coupling) -> np.ndarray:
    """What each render says of Var(q) - Var_uniform: n theta - (n - 1) theta_(-i), exact for a mean."""
    pair = (predict(own, 1, renoise, q, coupling).variance for q in (None, proposal))
    found = reduce(lambda uniform, fitted: derived(np.subtract, fitted, uniform), pair)
    return own.renders * found.value - (own.renders - 1) * found.without


def _part(tables: Tables, rows: np.ndarray) -> Tables:
    """The tables of some of the renders."""
    return dataclasses.replace(
        tables,
        position=tables.position[rows],
        norm_sq=tables.norm_sq[rows],
        within=tables.within[rows],
        across=tables.across[rows],
        antithetic=None,
    )
