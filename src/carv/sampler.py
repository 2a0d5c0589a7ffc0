"""Density + coupling -> timesteps with their weights: the two-line drop-in for `torch.randint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.adaptive import AdaptiveProposal
from carv.density import Density, DiscreteDensity, Reweighted
from carv.proposals import Factor
from carv.strata import Coupling, per_render
from carv.weights import Weight

_SUPPORT_CHECK_POINTS = 4096


@dataclass(frozen=True)
class Draws:
    """The timesteps of one step.

    Attributes:
        t: `[R, K]`; int64 for a discrete base, float32 for a continuous one.
        weight: `[R, K]` float32, omega = p(t) / q(t): multiply each draw's contribution by it.
        weighted: `[R, K]` float32, p(t) w(t) / q(t), formed in float64, if the sampler was given w: multiply the
            contribution WITHOUT its w(t) by it. For q ~ p w it is the same constant everywhere.
        antithetic: whether draws 2j and 2j + 1 of a render share t and take noise eps and -eps.
    """

    t: Shaped[Tensor, "*batch R K"]
    weight: Float[Tensor, "*batch R K"]
    weighted: Float[Tensor, "*batch R K"] | None = None
    antithetic: bool = False

    def noise(
        self, latent_shape: Sequence[int], rng: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "R K *latent"]:
        """eps ~ N(0, I) for these draws, `[R, K, *latent_shape]`, in pairs of opposite signs if antithetic.

        Args:
            latent_shape: of one latent.
            rng: on the device of t; `None` is torch's global generator.
            dtype: of the result.
        """
        renders, renoise = self.t.shape
        step = 2 if self.antithetic else 1
        eps = torch.randn((renders, renoise // step, *latent_shape), generator=rng, dtype=dtype, device=self.t.device)
        return torch.stack([eps, -eps], 2).flatten(1, 2) if self.antithetic else eps


class TimestepSampler:
    """Draws t ~ q for R renders x K re-noisings, coupled, with the weights p/q that keep estimates unbiased.

        E[ 1/(R K) sum_rk  p(t_rk)/q(t_rk)  f(t_rk) ] = E_{t ~ p}[ f(t) ]          (Eq. 5, 17)

    Args:
        base: p, the law of t in the objective.
        proposal: q, the law to draw from; `None` is p itself. An `AdaptiveProposal` is asked for its current
            law at every call.
        coupling: how the R K draws depend on each other, a function of `carv.strata`.
        antithetic: give draws 2j and 2j + 1 of each render the same t, for noise of opposite signs; K is even.
        w: the weight w(t) of the contribution, if it is known. It is needed to allow q(t) = 0 where w(t) = 0,
            and it fills `Draws.weighted`.

    Raises:
        ValueError: q(t) = 0 where p(t) w(t) > 0 (the message says at which t); a discrete and a continuous
            law together.

    Example:
        >>> from carv.density import uniform_steps
        >>> sampler = TimestepSampler(uniform_steps(20, 980))
        >>> draws = sampler.sample(renders=1, renoise=4, rng=torch.Generator().manual_seed(0))
        >>> draws.t.shape, bool((draws.t[0].diff() > 0).all()), draws.weight.tolist()
        (torch.Size([1, 4]), True, [[1.0, 1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        base: Density,
        proposal: Density | AdaptiveProposal | None = None,
        *,
        coupling: Coupling = per_render,
        antithetic: bool = False,
        w: Factor | None = None,
    ) -> None:
        self.base = base
        self.proposal = base if proposal is None else proposal
        self.coupling = coupling
        self.antithetic = antithetic
        self.w = w
        law = self.law()
        if base.discrete != law.discrete:
            raise ValueError("the base and the proposal must be both discrete or both continuous")
        _check_support(base, law, w)
        self._ratio_of: Density | None = None
        self._weight: Tensor
        self._weighted: Tensor | None = None

    def law(self) -> Density:
        """q as it is now."""
        return self.proposal.law if isinstance(self.proposal, AdaptiveProposal) else self.proposal

    @property
    def device(self) -> torch.device:
        """Where draws are made: where the tables are."""
        return self.law().device

    def sample(
        self, renders: int, renoise: int, rng: torch.Generator | None = None, *, rank: int = 0, world: int = 1
    ) -> Draws:
        """The timesteps and weights of one step.

        Args:
            renders: R >= 1, upstream states on this rank.
            renoise: K >= 1, draws for each state.
            rng: the source of randomness, on the sampler's device; `None` is torch's global generator. With
                world > 1 all ranks pass generators in EQUAL states: each makes the draws of all and keeps
                its own rows, so strata are global, no two ranks share a draw, and the union over ranks is
                bit for bit what one process with world * R renders would have drawn.
            rank, world: of this process among the data-parallel ones.

        Raises:
            ValueError: R, K, rank or world out of range; an odd K with antithetic noise; an rng elsewhere.
        """
        _check_counts(renders, renoise, rank, world)
        if world > 1 and rng is None:
            raise ValueError("with world > 1 pass an rng, in the same state on all ranks; global generators differ")
        distinct = renoise
        if self.antithetic:
            if renoise % 2:
                raise ValueError(f"antithetic noise needs an even number of re-noisings, got renoise = {renoise}")
            distinct = renoise // 2
        device = self.device
        if rng is not None and rng.device != device:
            raise ValueError(f"the rng is on {rng.device}, the sampler on {device}; move it with sampler.to(device)")
        u = self.coupling(world * renders, distinct, rng, device)
        if world > 1:
            u = u[rank * renders : (rank + 1) * renders]
        return self.at(u.repeat_interleave(2, 1) if self.antithetic else u)

    def at(self, u: Float[Tensor, "*batch R K"]) -> Draws:
        """The draws at given uniforms: for a coupling of one's own, such as Sobol points.

        Args:
            u: float64 in [0, 1), on the sampler's device; leading dimensions are kept. The estimate is unbiased
                when each entry (or, over all entries of a step, their mixture) is uniform.
        """
        law, u = self.law(), u.contiguous()
        if isinstance(law, DiscreteDensity):
            if self._ratio_of is not law:
                self._tabulate(law)
            index = torch.searchsorted(law.cumulative, u, right=True)
            weighted = None if self._weighted is None else self._weighted[index]
            return Draws(index + law.first, self._weight[index], weighted, self.antithetic)
        if isinstance(law, Reweighted) and law.base == self.base:
            t, ratio = law.draw_with_ratio(u)
        else:
            t, q = law.draw(u)
            ratio = self.base.prob(t) / q
        weighted = None if self.w is None else (ratio * _unchecked(self.w)(t)).to(torch.float32)
        return Draws(t.to(torch.float32), ratio.to(torch.float32), weighted, self.antithetic)

    def _tabulate(self, law: DiscreteDensity) -> None:
        """p/q and p w/q at each t of q. Where q = 0 nothing is drawn; the entry is 0 so that no 0/0 arises."""
        p = self.base.prob(law.support)
        ratio = torch.where(law.pmf > 0, p / law.pmf, 0.0)
        self._weight = ratio.to(torch.float32)
        self._weighted = None
        if self.w is not None:
            product = p * _unchecked(self.w)(law.support)
            self._weighted = torch.where(law.pmf > 0, product / law.pmf, 0.0).to(torch.float32)
        self._ratio_of = law

    def restrict(self, low: float, high: float) -> TimestepSampler:
        """The sampler of the objective restricted to low <= t <= high: for a range annealed over training.

        Both p and q are conditioned on the range; low = high gives that t with weight 1.

        Raises:
            ValueError: a reversed range, or one without mass.
        """
        return TimestepSampler(
            self.base.restrict(low, high),
            self.proposal.restrict(low, high),
            coupling=self.coupling,
            antithetic=self.antithetic,
            w=self.w,
        )

    def to(self, device: torch.device | str) -> TimestepSampler:
        """The same sampler with its tables on a device; draws are then made there, without a sync."""
        return TimestepSampler(
            self.base.to(device),
            self.proposal.to(device),
            coupling=self.coupling,
            antithetic=self.antithetic,
            w=self.w,
        )


def _unchecked(w: Factor) -> Factor:
    """A `Weight` checks its values, which needs a device sync; the sampler checked it once, when it was made."""
    return w.unchecked if isinstance(w, Weight) else w


def _check_counts(renders: int, renoise: int, rank: int, world: int) -> None:
    for name, value in (("renders", renders), ("renoise", renoise), ("world", world)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0..world-1, got rank {rank} of world {world}")


def _checked(w: Factor, t: Tensor) -> Tensor:
    value = w(t)
    bad = ~(torch.isfinite(value) & (value >= 0))
    if bool(bad.any()):
        raise ValueError(f"w must be finite and not negative, but it is {value[bad][0]:g} at t = {t[bad][0]:g}")
    return value


def _check_support(base: Density, law: Density, w: Factor | None) -> None:
    """q > 0 wherever p w > 0, or the estimate would miss that part of the objective."""
    if isinstance(base, DiscreteDensity):
        t = base.support
    else:
        inner = (torch.arange(_SUPPORT_CHECK_POINTS, dtype=torch.float64) + 0.5) / _SUPPORT_CHECK_POINTS
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        t = base.icdf(torch.cat([ends[:1], inner, ends[1:]]).to(base.device))
        if isinstance(law, Reweighted):  # whose cells may be narrower than the grid
            t = torch.cat([t, law.base.icdf((law.edges[1:] + law.edges[:-1]) / 2)])
        t = t[(t > 0) & (t < 1)]  # a closed form may have density 0 at t = 0 and 1, a set without mass
    needed = base.prob(t)
    if w is not None:
        needed = needed * _checked(w, t)
    missing = (needed > 0) & ~(law.prob(t) > 0)
    if bool(missing.any()):
        hint = "" if w is not None else " (if the contribution has a weight that is zero there, pass it as w=)"
        raise ValueError(
            f"the proposal is zero at t = {t[missing][0].item():g}, where the objective is not{hint}; "
            "mix it with the base: carv.density.defensive(base, proposal)"
        )
