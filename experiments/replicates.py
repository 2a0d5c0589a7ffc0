"""Whole estimates by brute force, kept as inner products: enough for their cosine with a long average."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from carv.checkpoint import load_or_make
from carv.console import Report
from carv.problems import Problem
from carv.rng import Stream
from carv.variance.advice import Design


@dataclass(frozen=True)
class Reference:
    """Independent averages of many estimates each; their mean is the reference.

    Attributes:
        blocks: `[B, D]`, unbiased for mu, independent.
    """

    blocks: Float[Tensor, "B D"]

    @property
    def gram(self) -> Float[Tensor, "B B"]:
        """Inner products of the blocks, float64."""
        return _products(self.blocks, self.blocks)


@dataclass(frozen=True)
class Products:
    """What n estimates leave, float64.

    Attributes:
        gram: `[n, n]`, <g_i, g_j>.
        cross: `[n, B]`, <g_i, block_b> with the blocks of a reference.
    """

    gram: Float[Tensor, "n n"]
    cross: Float[Tensor, "n B"]

    def averaged(self, renders: int) -> tuple[Float[Tensor, "m B"], Float[Tensor, " m"]]:
        """Of means of R estimates with one render each: their products with the blocks, and their norms.

        With independent renders, and iid draws or strata per render, such a mean IS an estimate with R renders.
        """
        groups = len(self.gram) // renders
        kept = groups * renders
        cross = self.cross[:kept].view(groups, renders, -1).mean(1)
        square = self.gram[:kept, :kept].view(groups, renders, groups, renders).mean((1, 3)).diagonal()
        return cross, square.sqrt()


def reference(problem: Problem, design: Design, at: Stream, count: int, blocks: int, folder: Path) -> Reference:
    """The mean of `count` estimates, in blocks; kept in the folder.

    Raises:
        RunFolderError: the folder holds another one.
    """

    def make() -> dict[str, Tensor]:
        each = count // blocks
        means = [_estimates(problem, design, at.child("block", b), each, folder.name).mean(0) for b in range(blocks)]
        return {"blocks": torch.stack(means)}

    settings = json.dumps({"design": str(design), "stream": [at.seed, *at.path], "count": count, "blocks": blocks})
    return Reference(load_or_make(folder, settings, make)["blocks"])


def replicates(problem: Problem, design: Design, at: Stream, count: int, other: Reference, folder: Path) -> Products:
    """The products of `count` estimates; kept in the folder.

    Args:
        problem, design: what is estimated, and how.
        at: estimate i has at.child("replicate", i).
        count: n.
        other: the reference, independent of them.
        folder: of the file.

    Raises:
        RunFolderError: the folder holds others.
    """

    def make() -> dict[str, Tensor]:
        g = _estimates(problem, design, at, count, folder.name)
        return {"gram": _products(g, g), "cross": _products(g, other.blocks)}

    total = float(other.gram.sum())  # another reference has other products
    settings = json.dumps({"design": str(design), "stream": [at.seed, *at.path], "count": count, "reference": total})
    found = load_or_make(folder, settings, make)
    return Products(found["gram"], found["cross"])


def _estimates(problem: Problem, design: Design, at: Stream, count: int, name: str) -> Float[Tensor, "n D"]:
    estimator, rows = problem.estimator(design), []
    with Report(f"{name}: {design}", count) as report:
        for i in range(count):
            gradient = estimator.estimate(problem.task, at.child("replicate", i)).gradient
            rows.append(torch.cat([part.flatten() for part in gradient]).cpu())
            report.update(i + 1)
    return torch.stack(rows)


def _products(a: Float[Tensor, "n D"], b: Float[Tensor, "m D"]) -> Float[Tensor, "n m"]:
    """a b^T in float64, some columns at a time."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(torch.split(a, 1 << 16, 1), torch.split(b, 1 << 16, 1), strict=True):
        total += x.double() @ y.double().T
    return total
