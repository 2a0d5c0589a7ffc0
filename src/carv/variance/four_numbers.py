"""ECM(K) from four numbers: what a table of ECMs says about variance and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FourNumberModel:
    """ECM(K) = (1 + r) (g + 1) / ((1 + a s(K) r/K) (g + K)): four numbers for all columns of Table 1.

    It follows from Var = (sigma_b^2 + a s(K) sigma_w^2 / K) / R and cost = R (c_upstream + K c_denoise), against
    uniform iid K = 1. Strata leave s(K) of the variance within a render:

        s(K) = s + (1 - s) / K^decay,        s(1) = 1

    s is the share that strata cannot touch (the noise's); the rest, the timestep's, falls within strata of width 1/K
    as K^-2 where F(t) is smooth and as K^-1 where it jumps or is rough. One stratum does nothing. On Table 1 decay = 1
    fits better than 2 (worst cell 3.7 % and 5.0 %), which is why it is the default: chosen on those 24 figures, of
    decays 0.5, 1, 2 (0.5: 2.7 %, without such a reason), it is no evidence about the paper's F.

    Without a and s, r and g can be swapped: (1 + r/K)(g + K) = (1 + g/K)(r + K). One uniform column cannot tell a
    large variance ratio from a large cost ratio; a weighted or stratified one, or a timing, can.
    On Table 1 only just: besides r = 20.9, g = 4.3 there is a second minimum at r = 4.9, g = 19.2 (worst cell 5.6 %).

    Attributes:
        r: sigma_w^2 / sigma_b^2, >= 0.
        g: c_upstream / c_denoise, >= 0.
        a: what the proposal leaves of sigma_w^2, > 0; above 1 it does harm.
        s: what infinitely many strata leave of it, in [0, 1].
        decay: of the timestep's part.
    """

    r: float
    g: float
    a: float = 1.0
    s: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not (self.r >= 0 and self.g >= 0 and self.a > 0 and 0 <= self.s <= 1 and self.decay > 0):
            raise ValueError(f"r, g >= 0, a > 0, 0 <= s <= 1 and decay > 0 are needed, got {self}")

    def left(self, renoise: int) -> float:
        """s(K), what K strata leave of the variance within a render."""
        return self.s + (1 - self.s) / float(renoise**self.decay)

    def ecm(self, renoise: int, weighted: bool = False, stratified: bool = False) -> float:
        """ECM(K) of uniform, IW, strata, or both."""
        inner = (self.a if weighted else 1.0) * (self.left(renoise) if stratified else 1.0) * self.r / renoise
        return (1 + self.r) * (self.g + 1) / ((1 + inner) * (self.g + renoise))

    def best_renoise(self, weighted: bool = False) -> float:
        """K* = sqrt(g a r), for iid draws."""
        return math.sqrt(self.g * self.r * (self.a if weighted else 1.0))

    def column(self, name: str, renoise: Iterable[int]) -> list[float]:
        """ECM(K) of one of the methods of `carv.variance.predict.paper_methods`.

        Raises:
            ValueError: another name.
        """
        weighted, stratified = _flags(name)
        return [self.ecm(k, weighted, stratified) for k in renoise]

    @classmethod
    def fit(
        cls,
        renoise: Sequence[int],
        columns: Mapping[str, Sequence[float]],
        *,
        cost_ratio: float | None = None,
        decay: float = 1.0,
    ) -> FourNumberModel:
        """The model with the least sum of squares of log(model / given), from several starts.

        Numbers that no column depends on stay at 1. Without a weighted or stratified column r <= g is returned of the
        two solutions (see above).

        Args:
            renoise: the K.
            columns: the ECM at these K, under the names of `carv.variance.predict.paper_methods`.
            cost_ratio: g, where it was timed; `None` fits it.
            decay: of s(K).

        Raises:
            ValueError: an unknown name; columns of another length; fewer figures than numbers to fit; an ECM <= 0.
        """
        flags = [_flags(name) for name in columns]
        given = np.array(list(columns.values()), dtype=np.float64)
        weighted, stratified = (any(flag[i] for flag in flags) for i in (0, 1))
        free = np.array([True, cost_ratio is None, weighted, stratified])
        if given.ndim != 2 or given.shape[1] != len(renoise) or given.size < free.sum() or not (given > 0).all():
            raise ValueError("the fit needs a positive ECM for each K in each column, and no fewer than free numbers")

        def build(x: np.ndarray) -> FourNumberModel:
            r, g, a = (float(y) for y in np.exp(np.clip(x[:3], -20, 20)))
            share = 1 / (1 + math.exp(-max(-40.0, min(40.0, float(x[3]))))) if stratified else 1.0
            return cls(r, g if cost_ratio is None else cost_ratio, a if weighted else 1.0, share, decay)

        def misfit(x: np.ndarray) -> np.ndarray:
            model = build(x)
            found = [[model.ecm(k, *flag) for k in renoise] for flag in flags]
            return np.asarray(np.log(np.array(found) / given).ravel())

        starts = [np.array([math.log(r), math.log(g), 0.0, 1.0]) for r, g in ((5, 20), (20, 5), (1, 1), (50, 50))]
        best = build(min((_least_squares(misfit, x, free) for x in starts), key=lambda x: float(misfit(x) @ misfit(x))))
        if not (weighted or stratified) and cost_ratio is None and best.r > best.g:
            return cls(best.g, best.r, decay=decay)
        return best


_METHODS = {"uniform": (False, False), "iw": (True, False), "strat": (False, True), "iw+strat": (True, True)}


def _flags(name: str) -> tuple[bool, bool]:
    if name not in _METHODS:
        raise ValueError(f"the methods are {', '.join(_METHODS)}, got {name!r}")
    return _METHODS[name]


def _least_squares(misfit: Callable[[np.ndarray], np.ndarray], start: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt over the free numbers, with derivatives by differences."""
    x, damping = start.astype(np.float64), 1e-2
    left = misfit(x)
    steps = np.eye(len(x))[free] * 1e-6
    for _ in range(300):
        slopes = np.stack([(misfit(x + step) - misfit(x - step)) / 2e-6 for step in steps], axis=1)
        normal = slopes.T @ slopes
        normal[np.diag_indices_from(normal)] *= 1 + damping
        normal[np.diag_indices_from(normal)] += 1e-12
        trial = x.copy()
        trial[free] -= np.linalg.solve(normal, slopes.T @ left)
        new = misfit(trial)
        if new @ new < left @ left:
            done = left @ left - new @ new < 1e-14 * (left @ left)
            x, left, damping = trial, new, damping / 5
            if done:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return x
