"""The tables from which the variance of every design follows: m2, Gw, Gc, render by render, over bins of t."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from carv.density import Density, DiscreteDensity, LogitNormal, Reweighted, ShiftedUniform
from carv.variance.measure import Counts

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Tables:
    """m2(t), Gw(t, t'), Gc(t, t') over M bins of t, with what each render says (`estimators.md`, section 4).

        m2(t) = E|g(x,t,eps)|^2,   Gw(t,t') = E_x <F_x(t), F_x(t')>,   Gc(t,t') = <F(t), F(t')>

    A bin is an interval of v = CDF_p(t), or an atom of p. The entry of a bin pair is the mean over t and t' drawn
    INDEPENDENTLY under p in the two bins, on the diagonal too, so sums over bins of p p' G are exact for any M.

    Units: gradient squared. Renders are exchangeable; the tables themselves are means over them.

    Attributes:
        base: p.
        edges: `[M + 1]`, the bins' ends in v, from 0 to 1.
        position: `[R0, M, N]`, v of each draw.
        norm_sq: `[R0, M, N]`, |g|^2 of each draw.
        within: `[R0, M, M]`, inner products of different draws of render r: unbiased for Gw.
        across: `[R0, M, M]`, of render r with all others, symmetrised: sum_{s != r} <A_r(t), A_s(t')> / (R0 - 1).
            Its mean over r is the U-statistic for Gc, and from it leave-one-out values are exact.
        antithetic: `[R0, M]`, <g(x,t,eps), g(x,t,-eps)> at the bin's first position; `None` if not measured.
        block_within, block_across: `[J, M, M]`, Gw and Gc from each of J independent projections; `None` when inner
            products are exact.
        counts: what it cost.
    """

    base: Density
    edges: Float[Tensor, " M1"]
    position: Float[Tensor, "R0 M N"]
    norm_sq: Float[Tensor, "R0 M N"]
    within: Float[Tensor, "R0 M M"]
    across: Float[Tensor, "R0 M M"]
    antithetic: Float[Tensor, "R0 M"] | None = None
    block_within: Float[Tensor, "J M M"] | None = None
    block_across: Float[Tensor, "J M M"] | None = None
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0))

    @classmethod
    def exact(
        cls,
        base: DiscreteDensity,
        m2: Float[Tensor, " n"],
        within: Float[Tensor, "n n"],
        across: Float[Tensor, "n n"],
        antithetic: Float[Tensor, " n"] | None = None,
    ) -> Tables:
        """Tables known in closed form, one bin for each atom of p; every interval made from them has width 0.

        Args: as the attributes of the same names, without R0, over the n atoms of base.

        Raises:
            ValueError: a wrong shape.
        """
        n = len(base.pmf)
        for name, table, shape in (("m2", m2, (n,)), ("within", within, (n, n)), ("across", across, (n, n))):
            if table.shape != shape:
                raise ValueError(f"{name} needs shape {list(shape)}, one entry an atom of p, got {list(table.shape)}")
        edges = torch.cat([base.cumulative.new_zeros(1), base.cumulative]).cpu()
        middle = (edges[1:] + edges[:-1]) / 2
        return cls(
            base,
            edges,
            middle[None, :, None],
            m2.to(torch.float64)[None, :, None],
            within.to(torch.float64)[None],
            across.to(torch.float64)[None],
            None if antithetic is None else antithetic.to(torch.float64)[None],
        )

    @property
    def renders(self) -> int:
        """R0, how many renders were measured; 1 for closed forms."""
        return len(self.norm_sq)

    @property
    def is_exact(self) -> bool:
        return self.renders == 1

    @property
    def atoms(self) -> bool:
        """Whether each bin is one atom of p, so that nothing varies within it."""
        if not isinstance(self.base, DiscreteDensity):
            return False
        atoms, bins = (torch.unique(ends[ends > 0]) for ends in (self.base.cumulative.cpu(), self.edges))
        return len(atoms) == len(bins) and bool((atoms - bins).abs().max() < 1e-12)

    @property
    def p(self) -> Float[Tensor, " M"]:
        """The mass of each bin."""
        return self.edges.diff()

    @property
    def t(self) -> Shaped[Tensor, " M"]:
        """The timestep in the middle of each bin's mass."""
        return self.base.icdf(((self.edges[1:] + self.edges[:-1]) / 2).to(self.base.device)).cpu()

    @property
    def m2(self) -> Float[Tensor, " M"]:
        return self.norm_sq.mean((0, 2))

    @property
    def gram_within(self) -> Float[Tensor, "M M"]:
        """Gw."""
        return self.within.mean(0)

    @property
    def gram_across(self) -> Float[Tensor, "M M"]:
        """Gc."""
        return self.across.mean(0)

    @property
    def mean_sq(self) -> float:
        """|mu|^2 = sum p p' Gc. Unbiased, so it can come out negative when mu is small."""
        return float(self.p @ self.gram_across @ self.p)

    @property
    def top_share(self) -> float:
        """The share of sum p |g|^2 that the largest 1 % of draws carry: 0.01 if all are alike, 1 for one outlier.

        Beside every variance: with a heavy tail neither it nor its interval is worth a digit. NaN below 100 draws.
        """
        count = self.norm_sq.numel()
        if self.is_exact or count < 100:
            return float("nan")
        carried = (self.p[:, None] * self.norm_sq).flatten().sort(descending=True).values
        return float(carried[: round(count / 100)].sum() / carried.sum())

    def save(self, path: str | Path) -> None:
        """One safetensors file, with the base and the counts as JSON in its header.

        Raises:
            ValueError: a base that is not one of `carv.density`.
        """
        names = ("edges", "position", "norm_sq", "within", "across", "antithetic", "block_within", "block_across")
        tensors = {name: value.contiguous().clone() for name in names if (value := getattr(self, name)) is not None}
        header = {"format": FORMAT, "base": describe(self.base), "counts": vars(self.counts)}
        save_file(tensors, path, {"carv": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Tables:
        """What `save` has written.

        Raises:
            ValueError: a file that is not one, or of another format.
        """
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("carv", "{}"))
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} does not hold the tables of a pilot in format {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(base=restore(header["base"]), counts=Counts(**header["counts"]), **tensors)


def describe(density: Density) -> dict[str, Any]:
    """A density as JSON; `restore` makes it again.

    Raises:
        ValueError: a kind that is not of `carv.density`.
    """
    name = type(density).__name__
    if isinstance(density, DiscreteDensity):
        return {"kind": name, "first": density.first, "pmf": density.pmf.tolist(), "cdf": density.cumulative.tolist()}
    if isinstance(density, ShiftedUniform):
        return {"kind": name, "low": density.low, "high": density.high, "shift": density.shift}
    if isinstance(density, LogitNormal):
        numbers = {key: getattr(density, key) for key in ("loc", "scale", "shift", "low", "high")}
        return {"kind": name, **numbers}
    if isinstance(density, Reweighted):
        parts = {"edges": density.edges.tolist(), "mass": density.mass.tolist()}
        return {"kind": name, "base": describe(density.base), **parts}
    raise ValueError(f"a {name} cannot be saved; it is not a density of carv.density")


def restore(described: dict[str, Any]) -> Density:
    """The density that `describe` was given."""
    given = dict(described)
    kind = given.pop("kind")
    if kind == "DiscreteDensity":
        pmf, cumulative = (torch.tensor(given[key], dtype=torch.float64) for key in ("pmf", "cdf"))
        discrete = DiscreteDensity(given["first"], pmf)
        # As they were: normalised once more, sums could round otherwise, and bins would not end at the atoms' ends.
        discrete.pmf, discrete.cumulative = pmf, cumulative
        return discrete
    if kind == "ShiftedUniform":
        return ShiftedUniform(**given)
    if kind == "LogitNormal":
        return LogitNormal(**given)
    if kind == "Reweighted":
        edges, mass = (torch.tensor(given[key], dtype=torch.float64) for key in ("edges", "mass"))
        return Reweighted(restore(given["base"]), edges, mass)
    raise ValueError(f"unknown kind of density {kind!r}")
