"""Control variates for score distillation from Stein's identity: less noise in eps, the same expectation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from carv.gradient import Gradient, Renders
from carv.tasks.sds.task import SDS, RenderState
from carv.tasks.sds.vsd import VSD

Baseline = Callable[[Tensor, Tensor], Tensor]
"""h(z_t `[N, *latent]`, t `[N]`) -> `[N]`, each entry a differentiable function of its own row of z_t."""

_MEMORY = 0.98  # of a step, at the next: about the last 50 steps count
_PRIOR = 4.0  # draws' worth of evidence for a coefficient of 0


class Stein:
    """f'(x, t, eps) = f(x, t, eps) - w(t) sum_j b_j(t) s_j,      s_j = eps h_j(z_t) - sigma(t) grad h_j(z_t)

    A `TeacherGradient` around SDS or VSD with the same expectation, render by render and t by t:

    1. integration by parts against N(0, I), at fixed x and t with z_t = alpha z + sigma eps, gives Stein's identity
       `E_eps[ eps h(z_t) ] = sigma E_eps[ grad h(z_t) ]`;
    2. so E_eps[s_j] = 0 for every continuous h_j, with kinks at most (a ReLU network), whose gradient has a mean;
    3. so E[f'] = E[f] for all b_j that do not depend on this step's draws: they come from past steps only;
    4. E|f'|^2 is least where G b = c, with G_ij = E<w s_i, w s_j> and c_j = E<f, w s_j>.

    The simplest member is h = 1, s = eps. SDS is itself one use of it: E[w eps_hat] is the same expectation, and
    subtracting w eps, b = 1, is what makes f = w (eps_hat - eps). That b is too large wherever eps_hat follows the
    noise only in part. h = 1 is always taken, so that b is fitted for each t, at no teacher call.

    What it can do. h = 1 removes noise that is the same multiple of eps in all entries, the most of it at small t.
    Antithetic noise removes all that is odd in eps, so that h = 1 does nothing there, while an h that is linear in z_t
    has an even part, which antithetic noise leaves. The share of the variance that comes from t and from the render
    stays, and so does most of the noise where guidance is strong. What it can cost: the error of b_j adds about
    |f|^2 / (n d) to the variance of a draw, for n draws a bin and d entries.

    Call `learn` after the estimate of each step. Without it all b_j stay 0 and f' is f.

    Source:
        SteinDreamer (Wang et al. 2024, arXiv 2401.00604). There h comes from a frozen depth or normal estimator, which
        carv does not ship: pass it as a baseline. There each entry of s has a factor of its own that is learned along
        with the scene; here each h_j has one for each bin of t, which is solved for.

    Example:
        >>> task = Stein(SDS(teacher, field, prompt, weight, 7.5, cameras))                     # doctest: +SKIP
        >>> estimate = estimator.estimate(task, here)                                           # doctest: +SKIP
        >>> task.learn()                                                                        # doctest: +SKIP
    """

    def __init__(
        self, task: SDS | VSD, baselines: Sequence[Baseline] = (), bins: int = 20, bound: float = 10.0
    ) -> None:
        """
        Args:
            task: what gives f.
            baselines: the h_j beside h = 1.
            bins: of equal width in t, each with its own b.
            bound: on the size of each b_j s_j over that of eps, root mean squares over past draws.

        Raises:
            ValueError: no bins; a bound that is not positive. From `contribution`: a baseline of another shape, or one
                through which no gradient flows to z_t.
        """
        if bins < 1:
            raise ValueError(f"the coefficients of control variates need at least 1 bin over t, got {bins}")
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"the bound on control variates must be a positive number, got {bound}")
        self.task, self.baselines, self.bins, self.bound = task, tuple(baselines), bins, bound
        self.teacher, self.weight, self.parameters = task.teacher, task.weight, task.parameters
        self.latent_shape, self.device, self.dtype = task.latent_shape, task.device, task.dtype
        self.encoder_calls = task.encoder_calls
        members = 1 + len(self.baselines)
        # For each bin the sums over past draws of 1, c and G, side by side; then those since the last `learn`.
        self._past = torch.zeros(bins, 1 + members + members**2, dtype=torch.float64, device=self.device)
        self._new = torch.zeros_like(self._past)
        self._b = self._solve()

    @property
    def coefficients(self) -> Tensor:
        """b_j(t), float64 `[bins, 1 + baselines]`, from past steps; the first is that of h = 1."""
        return self._b.clone()

    def upstream(self, renders: Renders) -> RenderState:
        return self.task.upstream(renders)

    def contribution(self, state: RenderState, t: Tensor, noise: Tensor) -> Tensor:
        f = self.task.contribution(state, t, noise)
        members = self._members(state.z.detach(), t, noise)
        of_bin = self._bin(t)
        self._record(f, members, of_bin)
        return f - torch.einsum("rkj,jrk...->rk...", self._b[of_bin].to(f.dtype), members)

    def pull_back(self, state: RenderState, f: Tensor, retain: bool = False) -> Gradient:
        return self.task.pull_back(state, f, retain)

    def learn(self) -> None:
        """Take in the draws since the last call, for the coefficients of the next step."""
        self._past = _MEMORY * self._past + self._new
        self._new = torch.zeros_like(self._past)
        self._b = self._solve()

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned, as tensors for a checkpoint."""
        return {"past": self._past.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, for as many bins and baselines.

        Raises:
            ValueError: another number of them, or a state that is not finite.
        """
        past = state["past"]
        if past.shape != self._past.shape:
            raise ValueError(
                f"{self.bins} bins and {len(self.baselines)} baselines have a state {list(self._past.shape)}, "
                f"the saved one is {list(past.shape)}"
            )
        if not bool(past.isfinite().all()):
            raise ValueError("the saved state of these control variates is not finite")
        self._past = past.to(self._past).clone()
        self._new = torch.zeros_like(self._past)
        self._b = self._solve()

    def _members(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """w s_j, `[1 + baselines, R, K, *latent]`."""
        shape = (*t.shape, *[1] * len(self.latent_shape))
        schedule = self.teacher.schedule
        z_t, sigma = schedule.add_noise(z[:, None], t, noise), schedule.sigma(t, noise.dtype).view(shape)
        members = [noise]
        for baseline in self.baselines:
            h, gradient = _with_gradient(baseline, z_t.flatten(0, 1), t.flatten())
            members.append(h.view(shape) * noise - sigma * gradient.view(noise.shape))
        w: Tensor = self.weight.unchecked(t).to(noise.dtype).view(shape)
        return w * torch.stack(members)

    def _bin(self, t: Tensor) -> Tensor:
        end = 1 if self.teacher.schedule.continuous else self.teacher.schedule.num_steps
        return (t * self.bins / end).long().clamp(0, self.bins - 1)

    def _record(self, f: Tensor, members: Tensor, of_bin: Tensor) -> None:
        f, members = f.detach().flatten(0, 1).flatten(1), members.flatten(1, 2).flatten(2)
        c = torch.einsum("nd,jnd->nj", f, members)
        gram = torch.einsum("ind,jnd->nij", members, members)
        rows = torch.cat([torch.ones_like(c[:, :1]), c, gram.flatten(1)], 1).to(torch.float64)
        finite = rows.isfinite().all(1, keepdim=True)  # what a draw that is not finite does is for the estimator to say
        # A product, not index_add, whose order of summation is not fixed on accelerators.
        bins = torch.nn.functional.one_hot(of_bin.flatten(), self.bins).to(torch.float64)
        self._new += bins.T @ torch.where(finite, rows, 0.0)

    def _solve(self) -> Tensor:
        members = 1 + len(self.baselines)
        count, c = self._past[:, :1], self._past[:, 1 : 1 + members]
        gram = self._past[:, 1 + members :].view(-1, members, members)
        power = gram.diagonal(dim1=1, dim2=2)
        # Where nothing was seen, or w = 0, all sums are 0, and so is b.
        ridge = _PRIOR * power / count.clamp(min=1) + (power == 0)
        b: Tensor = torch.linalg.solve_ex(gram + ridge.diag_embed(), c)[0]
        most = self.bound * (power[:, :1] / power.clamp(min=1e-300)).sqrt()
        return b.clamp(-most, most)


def _with_gradient(baseline: Baseline, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """h `[N]` and its gradient in z_t `[N, *latent]`."""
    with torch.enable_grad():
        at = z_t.detach().requires_grad_()
        h = baseline(at, t)
        if h.shape != t.shape:
            raise ValueError(f"a baseline gives one number a draw, [{len(t)}], this one gave {list(h.shape)}")
        gradient = torch.autograd.grad(h.sum(), at, allow_unused=True)[0] if h.requires_grad else None
    if gradient is None:
        raise ValueError(
            "no gradient flows from this baseline to z_t, and without it the control variate would be biased: "
            "take out no_grad or detach (h = 1 is there already)"
        )
    return h.detach(), gradient
