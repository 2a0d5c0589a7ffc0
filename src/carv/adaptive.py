"""A proposal that learns where contributions are large while an estimator runs, and cannot lose much."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density import Density, DiscreteDensity, Reweighted


class AdaptiveProposal:
    """q = (1 - a) q_learned + a p, with q_learned ~ p sqrt(m2) from running second moments m2 in B bins.

        m2[b]  <-  decayed mean of |f|^2 over all draws with t in bin b
        q(t)    =  p(t) ( a + (1 - a) sqrt(m2[b(t)]) / sum_b' P(b') sqrt(m2[b']) )

    The bins have equal probability under p. Weights p/q are at most 1/a whatever was learned. An estimate is
    unbiased given the past, because q never depends on the draws that it weighs: sample first, `update` after.
    At a constant rate the second-moment bound of a defensive mixture holds: the variance is at most 1/a times
    that of sampling from p.

    Args:
        base: p, discrete or continuous in closed form.
        bins: B; a discrete base has at most one bin for each t.
        alpha: a in (0, 1].
        decay: of the running sums, for each update; 1 keeps everything.
        warmup: draws to see before the law first leaves p.

    Raises:
        ValueError: alpha, decay, bins or warmup out of range.

    Example:
        >>> from carv.density import uniform_steps
        >>> proposal = AdaptiveProposal(uniform_steps(0, 99), bins=10, warmup=1)
        >>> t = torch.arange(100)
        >>> proposal.update(t, (t >= 50).double())
        >>> [round(x, 4) for x in proposal.law.prob(torch.tensor([0, 99])).tolist()]
        [0.0042, 0.0158]
    """

    def __init__(
        self, base: Density, bins: int = 32, alpha: float = 0.1, decay: float = 0.999, warmup: int = 64
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha, the share of the base, must be in (0, 1], got {alpha}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if bins < 1 or warmup < 0:
            raise ValueError(f"bins must be at least 1 and warmup not negative, got {bins} and {warmup}")
        if isinstance(base, Reweighted):
            raise ValueError("an adaptive proposal takes a discrete base or a continuous one in closed form")
        self.base, self.alpha, self.decay, self.warmup = base, alpha, decay, warmup
        self._bin_of: Tensor
        device = base.device
        if isinstance(base, DiscreteDensity):
            self.bins = min(bins, len(base.pmf))
            middle = base.cumulative - base.pmf / 2
            # Consecutive numbers from 0, whatever the pmf: an empty bin would never be learned.
            crowded = (middle * self.bins).long().clamp(max=self.bins - 1)
            self._bin_of = torch.unique(crowded, return_inverse=True)[1]
            self.bins = int(self._bin_of.max().item()) + 1
            self._share = base.pmf.new_zeros(self.bins).index_add_(0, self._bin_of, base.pmf)
        else:
            self.bins = bins
            self._edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=device)
            self._share = torch.full((bins,), 1 / bins, dtype=torch.float64, device=device)
        self._sum = torch.zeros(self.bins, dtype=torch.float64, device=device)
        self._count = torch.zeros(self.bins, dtype=torch.float64, device=device)
        self._seen = 0
        self._law: Density = base

    @property
    def law(self) -> Density:
        """q as it is now."""
        return self._law

    def update(self, t: Shaped[Tensor, "..."], second_moment: Float[Tensor, "..."]) -> None:
        """Learn from draws that have been used. No device sync.

        Args:
            t: timesteps of any shape, drawn from `law` or not.
            second_moment: of the same shape, |f|^2 of each draw's contribution, WITHOUT the factor p/q.
                Entries that are not finite are ignored.
        """
        if t.shape != second_moment.shape:
            raise ValueError(f"t and second_moment need one shape, got {list(t.shape)} and {list(second_moment.shape)}")
        value = second_moment.detach().to(self._sum).flatten()
        good = torch.isfinite(value).to(value)
        where = self._bins_of(t.flatten().to(self._sum.device))
        self._sum.mul_(self.decay).index_add_(0, where, torch.where(good > 0, value, 0.0))
        self._count.mul_(self.decay).index_add_(0, where, good)
        self._seen += value.numel()
        self._rebuild()

    def _bins_of(self, t: Tensor) -> Tensor:
        if isinstance(self.base, DiscreteDensity):
            return self._bin_of[(t.long() - self.base.first).clamp(0, len(self._bin_of) - 1)]
        return (self.base.cdf(t) * self.bins).long().clamp(0, self.bins - 1)

    def _rebuild(self) -> None:
        if self._seen < self.warmup:
            return
        # A bin without draws so far takes the overall mean: one pseudo-count of it keeps all bins defined.
        overall = self._sum.sum() / self._count.sum().clamp(min=1e-300)
        root = ((self._sum + overall) / (self._count + 1)).sqrt()
        level = (self._share * root).sum()
        # All contributions zero so far: nothing to learn from, stay at p.
        relative = torch.where(level > 0, root / level, torch.ones_like(root))
        factor = self.alpha + (1 - self.alpha) * relative
        if isinstance(self.base, DiscreteDensity):
            self._law = DiscreteDensity._trusted(self.base.first, self.base.pmf * factor[self._bin_of])
        else:
            self._law = Reweighted._trusted(self.base, self._edges, self._share * factor)

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned, as tensors that safetensors can hold."""
        return {"sum": self._sum.clone(), "count": self._count.clone(), "seen": torch.tensor(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, for the same base and number of bins.

        Raises:
            ValueError: another number of bins, or a state that is not finite.
        """
        for name in ("sum", "count", "seen"):
            if name not in state:
                raise ValueError(f"the state of an adaptive proposal lacks {name!r}")
        if state["sum"].shape != self._sum.shape or state["count"].shape != self._count.shape:
            raise ValueError(f"this proposal has {self.bins} bins, the saved state {list(state['sum'].shape)}")
        for name in ("sum", "count"):
            if not bool((torch.isfinite(state[name]) & (state[name] >= 0)).all()):
                raise ValueError(f"the saved {name!r} of an adaptive proposal is negative or not finite")
        self._sum = state["sum"].to(self._sum).clone()
        self._count = state["count"].to(self._count).clone()
        self._seen = int(state["seen"])
        self._law = self.base
        self._rebuild()

    def restrict(self, low: float, high: float) -> AdaptiveProposal:
        """The proposal for the base on low <= t <= high, with what was learned carried over bin by bin."""
        narrow = AdaptiveProposal(self.base.restrict(low, high), self.bins, self.alpha, self.decay, self.warmup)
        if isinstance(narrow.base, DiscreteDensity):
            atoms = narrow.base.support
            old = self._bins_of(atoms)
            new = narrow._bin_of
            atoms_in_new = torch.zeros_like(narrow._sum).index_add_(0, new, torch.ones_like(narrow.base.pmf))
            for target, source in ((narrow._sum, self._sum), (narrow._count, self._count)):
                target.index_add_(0, new, source[old]).div_(atoms_in_new)
        else:
            middles = (narrow._edges[1:] + narrow._edges[:-1]) / 2
            old = self._bins_of(narrow.base.icdf(middles))
            narrow._sum, narrow._count = self._sum[old].clone(), self._count[old].clone()
        narrow._seen = self._seen
        narrow._rebuild()
        return narrow

    def to(self, device: torch.device | str) -> AdaptiveProposal:
        """A copy with its tables on a device."""
        moved = AdaptiveProposal(self.base.to(device), self.bins, self.alpha, self.decay, self.warmup)
        moved.load_state_dict(self.state_dict())
        return moved
