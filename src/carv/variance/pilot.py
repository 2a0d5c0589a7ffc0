"""One pilot run that measures the tables from which `carv.variance.predict` has the variance of every design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density import Density, DiscreteDensity
from carv.gradient import Renders, TeacherGradient
from carv.rng import Stream
from carv.variance.measure import Counts, encoder_calls
from carv.variance.projection import Projection
from carv.variance.tables import Tables

PerDraw = Callable[[Any, Tensor], Tensor]
"""(state of ONE render, f `[n, *latent]`) -> `[n, D]`, J^T f_i for each i, all parameters in one vector."""

MEMORY_LIMIT = 2 << 30
"""Bytes of gradients that a pilot keeps at most, unless told otherwise."""

_MIN_RENDERS = 4
_COLUMNS = 1 << 17  # parameters that are turned to float64 at a time


def pilot(
    task: TeacherGradient,
    base: Density,
    stream: Stream,
    *,
    renders: int = 40,
    bins: int = 32,
    noises: int = 2,
    antithetic: bool = False,
    projection_dim: int | None = None,
    projection_blocks: int = 16,
    per_draw: PerDraw | None = None,
    micro_batch: int | None = None,
    vjp_batch: int = 16,
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Tables:
    """Measure m2, Gw and Gc, and with `antithetic` E<g(x,t,eps), g(x,t,-eps)>, with what each render says.

    For each of R0 renders and M bins of v = CDF_p(t), N draws, each with a t of its OWN, uniform in its bin under p,
    and a noise of its own. With A_r(i) the mean of the N gradients of render r in bin i,

        Gw(i, j) = mean_r <A_r(i), A_r(j)>, i != j;    Gw(i, i) = mean_r of <g, g'> over different draws of the bin
        Gc(i, j) = 1/(R0 (R0-1)) sum_{r != s} <A_r(i), A_s(j)>

    Nothing is subtracted as noise. Two draws of a bin at ONE t would give E|F_x(t)|^2 on the diagonal, which is
    too large by the variance of F within the bin and would bias every iid prediction by it; with a t each, iid
    predictions have no discretisation error at all (see `carv.variance.predict` for strata).

    Renders are independent here. A task that stratifies its upstream condition over a step has less variance
    between renders than is predicted for R > 1.

    Cost: R0 upstream evaluations, and R0 M N teacher calls and backward passes (R0 M (N + 1) with antithetic).
    Memory: without a projection R0 M gradients, else R0 M d numbers. |g|^2 and the antithetic products are of the
    whole gradients in both cases.

    Args:
        task: the pipeline.
        base: p. Discrete with at most `bins` atoms: each atom is a bin.
        stream: all randomness; render r has stream.child("render", r) for its upstream part.
        renders: R0 >= 4, the independent units of every interval.
        bins: M, equal in p-mass.
        noises: N >= 2 draws a bin.
        antithetic: a partner with noise -eps for the first draw of each bin.
        projection_dim: d, the length of the random projection that is kept of each gradient; `None` keeps it all.
            Its error is in all intervals, through `projection_blocks` independent projections of d / blocks each.
        per_draw: gradients of many draws of one state at once; `None` calls pull_back for one at a time. Batched:
            `lambda state, f: batched_task_pull_back(task, state, f[:, None]).matrix()` of `carv.variance.vjp`.
        micro_batch: at most how many draws one call of `contribution` gets; `None`: all of a render.
        vjp_batch: about how many gradients are alive at once.
        memory_limit: in bytes, for the gradients that are kept.
        progress: told how many renders are done, of how many.

    Raises:
        ValueError: counts out of range; a contribution of a wrong shape or a gradient that is not finite; more to
            keep than the memory limit, with the projection that would fit.
    """
    for name, value, least in (
        ("renders", renders, _MIN_RENDERS),
        ("bins", bins, 1),
        ("noises", noises, 2),
        ("vjp_batch", vjp_batch, 1),
    ):
        if value < least:
            raise ValueError(f"a pilot needs {name} >= {least}, got {value}")
    edges = _edges(base, bins)
    projection = None
    if projection_dim is not None:
        projection = Projection(projection_dim, projection_blocks, stream.child("projection"))
    differentiate = per_draw or (lambda state, f: _one_by_one(task, state, f))
    run = _Run(task, base, edges, noises, antithetic, projection, differentiate, micro_batch, vjp_batch)
    found: list[_Render] = []
    for r in range(renders):
        found.append(run.render(stream, r))
        kept = renders * found[0].mean.numel() * found[0].mean.element_size()
        if r == 0 and kept > memory_limit:
            bins, most = len(edges) - 1, memory_limit // (renders * (len(edges) - 1) * found[0].mean.element_size())
            raise ValueError(
                f"{renders} renders x {bins} bins of gradients take {kept / 2**30:.1f} GiB, more than the limit of "
                f"{memory_limit / 2**30:.1f}; pass projection_dim={1 << max(5, most.bit_length() - 1)} or less"
            )
        if progress is not None:
            progress(r + 1, renders)
    within = torch.stack([one.within for one in found], 1)  # [J, R0, M, M]
    across = _across([one.mean for one in found])
    draws = renders * (len(edges) - 1) * (noises + antithetic)
    return Tables(
        base,
        edges,
        torch.stack([one.position for one in found]),
        torch.stack([one.norm_sq for one in found]),
        within.mean(0),
        across.mean(0),
        torch.stack([one.antithetic for one in found]) if antithetic else None,
        None if projection is None else within.mean(1),
        None if projection is None else across.mean(1),
        Counts(renders, draws, draws, renders * encoder_calls(task)),
    )


@dataclass(frozen=True)
class _Render:
    """What one render leaves: positions and |g|^2 `[M, N]`, within `[J, M, M]`, A_r `[M, J, d]`, antithetic `[M]`."""

    position: Tensor
    norm_sq: Tensor
    within: Tensor
    mean: Tensor
    antithetic: Tensor


@dataclass(frozen=True)
class _Run:
    task: TeacherGradient
    base: Density
    edges: Tensor
    noises: int
    antithetic: bool
    projection: Projection | None
    differentiate: PerDraw
    micro_batch: int | None
    vjp_batch: int

    def render(self, stream: Stream, r: int) -> _Render:
        own = stream.child("render", r)
        position, t = self.timesteps(own)
        state = self.task.upstream(Renders((own,), 0, 1))
        f, t_each = self.contributions(own, state, t)
        bins = len(t)
        per_bin = len(f) // bins
        norms, partners, means, squares = [], [], [], []
        step = max(1, self.vjp_batch // per_bin)
        for first in range(0, bins, step):
            rows = slice(first * per_bin, (first + step) * per_bin)
            g = self.differentiate(state, f[rows]).detach()
            norm_sq = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64).square()
            self.check_finite(norm_sq, t_each[rows], r)
            norm_sq, g = norm_sq.view(-1, per_bin), g.view(-1, per_bin, g.shape[1])
            if self.antithetic:  # the pair's mean is the draw: both are unbiased for F_x(t), and it has less noise
                partners.append((g[:, 0] * g[:, 1]).sum(1, dtype=torch.float64))
                g = torch.cat([(g[:, :1] + g[:, 1:2]) / 2, g[:, 2:]], 1)
                norm_sq = torch.cat([norm_sq[:, :2].mean(1, keepdim=True), norm_sq[:, 2:]], 1)
            kept = self.project(g)
            norms.append(norm_sq)
            squares.append(kept.to(torch.float64).square().sum((1, 3)))
            means.append(kept.mean(1))
        mean = torch.cat(means)
        none = torch.empty(0)
        return _Render(
            position,
            torch.cat(norms).cpu(),
            _within(mean, torch.cat(squares), self.noises).cpu(),
            mean,
            torch.cat(partners).cpu() if partners else none,
        )

    def timesteps(self, own: Stream) -> tuple[Float[Tensor, "M N"], Shaped[Tensor, "M N"]]:
        """Positions v, uniform in their bins, and t there; a continuous t in float32, as samplers give it."""
        rng = own.child("timesteps").generator()
        xi = torch.rand((len(self.edges) - 1, self.noises), generator=rng, dtype=torch.float64)
        v = torch.lerp(self.edges[:-1, None], self.edges[1:, None], xi)
        v = torch.minimum(v, torch.nextafter(self.edges[1:, None], self.edges[:-1, None]))
        t = self.base.icdf(v.to(self.base.device))
        return v, t.to(self.task.device) if self.base.discrete else t.to(self.task.device, torch.float32)

    @torch.no_grad()
    def contributions(
        self, own: Stream, state: Any, t: Shaped[Tensor, "M N"]
    ) -> tuple[Shaped[Tensor, "n *latent"], Shaped[Tensor, " n"]]:
        """f and t of all draws, bin by bin; within a bin eps_1, (-eps_1), eps_2, ..."""
        task = self.task
        rng = own.child("pilot noise").generator(task.device)
        shape = (*t.shape, *task.latent_shape)
        noise = torch.randn(shape, generator=rng, dtype=task.dtype, device=task.device)
        if self.antithetic:
            noise = torch.cat([noise[:, :1], -noise[:, :1], noise[:, 1:]], 1)
            t = torch.cat([t[:, :1], t], 1)
        noise, t = noise.flatten(0, 1), t.flatten()
        step = self.micro_batch or len(t)
        parts = []
        for first in range(0, len(t), step):
            eps = noise[None, first : first + step]
            f = task.contribution(state, t[None, first : first + step], eps)
            if f.shape != eps.shape:
                raise ValueError(
                    f"{type(task).__name__}.contribution returned shape {list(f.shape)}, expected {list(eps.shape)}: "
                    "[renders, re-noisings, *latent_shape]"
                )
            parts.append(f[0])
        return torch.cat(parts), t

    def project(self, g: Float[Tensor, "m N D"]) -> Float[Tensor, "m N J d"]:
        if self.projection is None:
            return g[:, :, None]
        kept = self.projection(g.flatten(0, 1))
        return kept.view(*g.shape[:2], *kept.shape[1:])

    def check_finite(self, norm_sq: Tensor, t: Tensor, r: int) -> None:
        bad = ~torch.isfinite(norm_sq)
        if bool(bad.any()):
            raise ValueError(
                f"the gradient of {type(self.task).__name__} is not finite at t = {t[bad][0].item():g} (render {r} of "
                "the pilot); check the teacher there, e.g. its precision"
            )


def _edges(base: Density, bins: int) -> Tensor:
    if isinstance(base, DiscreteDensity) and int((base.pmf > 0).sum()) <= bins:
        cumulative = base.cumulative.cpu()
        return torch.cat([cumulative.new_zeros(1), torch.unique(cumulative[cumulative > 0])])
    return torch.arange(bins + 1, dtype=torch.float64) / bins


def _one_by_one(task: TeacherGradient, state: Any, f: Tensor) -> Tensor:
    gradients = (task.pull_back(state, f[i : i + 1], retain=True) for i in range(len(f)))
    return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])


def _within(mean: Tensor, squares: Tensor, noises: int) -> Tensor:
    """`[J, M, M]`: <A(i), A(j)>, and on the diagonal |N A|^2 - sum |g_n|^2 over N (N - 1) pairs of different draws."""
    gram = _gram(mean, mean)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.copy_((noises**2 * diagonal - squares.T) / (noises * (noises - 1)))
    return gram


def _across(means: list[Tensor]) -> Tensor:
    """`[J, R0, M, M]`: of each render's A_r with the sum over the others, symmetrised, over R0 - 1."""
    total = torch.zeros_like(means[0], dtype=torch.float64)
    for mean in means:
        total += mean
    rows = []
    for mean in means:
        gram = _gram(mean, total - mean) / (len(means) - 1)
        rows.append(((gram + gram.mT) / 2).cpu())
    return torch.stack(rows, 1)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """`[J, M, M]`: sum over the last axis of a `[M, J, d]` and b `[M, J, d]`, in float64."""
    total = torch.zeros((a.shape[1], len(a), len(b)), dtype=torch.float64, device=a.device)
    for first in range(0, a.shape[2], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        x, y = (part[:, :, columns].to(torch.float64).transpose(0, 1) for part in (a, b))
        total += x @ y.mT
    return total
