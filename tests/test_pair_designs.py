"""Pair-probability designs as couplings: what they draw, that they are unbiased, and their predicted variance."""

import numpy as np
import pytest
import torch

from carv.density import DiscreteDensity, Reweighted, uniform_steps
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.strata import Pairs, iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance import pairs
from carv.variance.pairs import Targets
from carv.variance.predict import pair_proposal, predict
from carv.variance.tables import Tables

from comparisons import z_score
from laws import PRACTICE, RANGE, ramp

CPU = torch.device("cpu")
N = 12
TOY, BASE = GaussianToy(dim=4, gain_std=0.15), uniform_steps(100, 99 + N)
HOLES = DiscreteDensity(100, torch.tensor([1.0, 3.0, 0.0, 2.0, 1.0, 0.5, 1.0, 4.0, 1.0, 1.0, 2.0, 1.0]))
# Far apart noise levels, so that designs differ: bins 0..11 stand for t = 20, 100, 180, ...
C, B = TOY.coefficients(20 + 80 * torch.arange(N))


def exact_tables(base=BASE):
    """The toy's tables at noise levels that are far apart, with the law of `base`."""
    theta, m, var = TOY.theta.detach(), TOY.target, TOY.gain_std**2
    power = ((1 + 6 * var + 3 * var**2) * theta**2 - 2 * (1 + 3 * var) * theta * m + (1 + var) * m**2).sum()
    direction = (1 + var) * theta - m
    noise = B**2 * (1 + var) * len(theta)
    outer = torch.outer(C, C)
    m2 = C**2 * power + noise
    return Tables.exact(base, m2, outer * power, outer * direction.square().sum(), C**2 * power - noise)


TABLES = exact_tables()
TARGETS = Targets.of_tables(TABLES)
W = (BASE.pmf * C).numpy()
DESIGNS = {
    "iid": pairs.iid(N),
    "strata": pairs.index_strata(N),
    "iw": pairs.importance(W),
    "iw+strata": pairs.importance_strata(W),
    "sinkhorn": pairs.sinkhorn(TARGETS, pairs.marginals(TARGETS)),
    "optimal, same marginals": pairs.optimal(TARGETS, pairs.marginals(TARGETS)),
    "optimal": pairs.optimal_free(TARGETS, iterations=200),
}


def toy_estimates(design, count, renders=1, seed=1):
    """Whole estimates of the toy, nothing integrated out."""
    q = pair_proposal(TABLES, design)
    rng = stream(seed, "pairs").generator()
    u = design(count * renders, 2, rng, CPU).view(count, renders, 2)
    draws = TimestepSampler(BASE, q, coupling=design).at(u)
    return gradients(draws.t - BASE.first, draws.weight.double(), rng)


def gradients(index, weight, rng):
    count, renders, _ = index.shape
    gain = 1 + TOY.gain_std * torch.randn((count, renders, 1, 1), generator=rng, dtype=torch.float64)
    eps = torch.randn((count, renders, 2, 4), generator=rng, dtype=torch.float64)
    f = C[index][..., None] * (gain * TOY.theta.detach() - TOY.target) - B[index][..., None] * eps
    return (gain * weight[..., None] * f).mean((1, 2))


def toy_mean():
    return (BASE.pmf @ C) * ((1 + TOY.gain_std**2) * TOY.theta.detach() - TOY.target)


@pytest.mark.parametrize("name", DESIGNS)
def test_the_bins_of_a_render_s_two_draws_follow_the_joint_law_and_each_draw_is_uniform(name):
    """40,000 renders. Chi-squared, limits at a false alarm of 1e-5: mean + 4.8 sd, a little more for few cells."""
    design, count = Pairs(DESIGNS[name]), 40_000
    u = design(count, 2, torch.Generator().manual_seed(1), CPU)
    ends = design.ends
    assert u.dtype == torch.float64
    bins = torch.searchsorted(ends, u, right=True) - 1
    q = torch.as_tensor(design.joint).flatten()
    observed = torch.bincount(bins[:, 0] * N + bins[:, 1], minlength=N * N)
    assert not observed[q == 0].any()
    likely = q * count > 5
    cells = int(likely.sum())
    chi = ((observed - q * count)[likely] ** 2 / (q * count)[likely]).sum()
    assert chi < cells + 5.5 * (2 * cells) ** 0.5
    for draw in u.T:
        tenths = torch.bincount((draw * 40).long(), minlength=40)
        assert ((tenths - count / 40) ** 2 / (count / 40)).sum() < 39 + 5.5 * 78**0.5


def test_renders_are_independent_and_a_seed_gives_the_same_draws():
    design = Pairs(DESIGNS["optimal"])
    u = design(4, 2, torch.Generator().manual_seed(3), CPU)
    assert torch.equal(u, design(4, 2, torch.Generator().manual_seed(3), CPU))
    many = torch.stack([design(2, 2, torch.Generator().manual_seed(s), CPU) for s in range(2000)])
    across = np.corrcoef(many.flatten(1).T.numpy())
    assert np.abs(across[:2, 2:]).max() < 4.5 / 2000**0.5
    assert across[0, 1] < -0.3  # what the design is for


@pytest.mark.parametrize("base", [BASE, HOLES], ids=["uniform", "holes"])
@pytest.mark.parametrize("name", DESIGNS)
def test_the_expectation_over_all_pairs_of_bins_is_exact_and_the_weights_are_horvitz_thompson_s(name, base):
    joint = DESIGNS[name] * np.outer(base.pmf > 0, base.pmf > 0)
    design = Pairs(joint / joint.sum())
    q = pair_proposal(exact_tables(base), design)
    pi, ends = design.marginals, design.ends
    drawn = (pi > 0).nonzero().flatten()
    # Both ends and the middle of each bin: every u in it has to give the bin's own timestep.
    for share in (0.0, 0.5, 1 - 1e-9):
        u = (ends[:-1] + share * ends.diff())[drawn]
        i, j = torch.meshgrid(torch.arange(len(u)), torch.arange(len(u)), indexing="ij")
        draws = TimestepSampler(base, q, coupling=design).at(torch.stack([u[i], u[j]], -1))
        assert torch.equal(draws.t[..., 0] - base.first, drawn[i])
        assert torch.allclose(draws.weight[0, :, 1].double(), (base.pmf / pi)[drawn], rtol=1e-6)
        y = torch.stack([C, B, torch.ones(N)], -1)
        each = (draws.weight[..., None] * y[draws.t - base.first]).mean(-2)
        mean = (torch.as_tensor(design.joint)[drawn][:, drawn][..., None] * each).sum((0, 1))
        assert torch.allclose(mean, base.pmf @ y, rtol=1e-6)


@pytest.mark.parametrize("name", DESIGNS)
def test_the_prediction_is_eq_66_and_falls_with_the_number_of_renders(name):
    design = Pairs(DESIGNS[name])
    q = pair_proposal(TABLES, design)
    found = predict(TABLES, 1, 2, q, design)
    assert found.variance.value == pytest.approx(pairs.variance(DESIGNS[name], TARGETS), rel=1e-10)
    parts = (found.split.render, found.split.timestep, found.split.noise)
    assert sum(part.value for part in parts) == pytest.approx(found.variance.value, rel=1e-10)
    assert min(part.value for part in parts) >= 0
    assert found.split.render.value == pytest.approx(predict(TABLES, 1, 2, None, iid).split.render.value, rel=1e-10)
    assert predict(TABLES, 3, 2, q, design).variance.value == pytest.approx(found.variance.value / 3, rel=1e-10)


@pytest.mark.parametrize("proposal", [None, "weighted", "own"])
def test_any_proposal_can_go_with_a_pair_design_and_strata_are_one_of_them(proposal):
    halves = Pairs(np.array([[0.0, 0.5], [0.5, 0.0]]))
    weighted = proportional(BASE, lambda t: 1.0 + (t - 100).double())
    q = {None: None, "weighted": weighted, "own": DiscreteDensity(BASE.first, torch.from_numpy(W))}[proposal]
    for renders in (1, 3):
        a, b = (predict(TABLES, renders, 2, q, coupling) for coupling in (halves, per_render))
        assert a.variance.value == pytest.approx(b.variance.value, rel=1e-10)
        assert a.split.timestep.value == pytest.approx(b.split.timestep.value, rel=1e-8)
        a, b = (predict(TABLES, renders, 4, q, coupling, antithetic=True) for coupling in (halves, per_render))
        assert a.variance.value == pytest.approx(b.variance.value, rel=1e-10)


@pytest.mark.parametrize(("name", "renders"), [("iid", 1), ("iw+strata", 1), ("sinkhorn", 2), ("optimal", 1)])
def test_predictions_equal_the_variance_of_whole_estimates(name, renders):
    """40,000 estimates: a standard error of about 1 %; 4 of them a case, false alarm 2.5e-4 over all four."""
    design = Pairs(DESIGNS[name])
    predicted = predict(TABLES, renders, 2, pair_proposal(TABLES, design), design).variance.value
    found = toy_estimates(design, 40_000, renders)
    squares = (found - toy_mean()).square().sum(1).numpy()
    assert abs(z_score(squares, predicted)) < 4
    assert squares.std() / len(squares) ** 0.5 < 0.02 * predicted
    for i in range(4):
        assert abs(z_score(found[:, i].numpy(), toy_mean()[i].item())) < 4.5


@pytest.mark.parametrize("mutant", ["no weight", "one index twice"])
def test_a_design_without_its_weights_or_with_one_index_twice_is_caught(mutant):
    design = Pairs(DESIGNS["optimal"])
    q = pair_proposal(TABLES, design)
    predicted = predict(TABLES, 1, 2, q, design).variance.value
    rng = stream(1, "pairs").generator()
    index = q.icdf(design(40_000, 2, rng, CPU)) - BASE.first
    weight = (BASE.pmf / q.pmf)[index]
    if mutant == "no weight":
        found = gradients(index[:, None], torch.ones_like(weight)[:, None], rng)
        assert max(abs(z_score(found[:, i].numpy(), toy_mean()[i].item())) for i in range(4)) > 10
    else:
        index[:, 1], weight[:, 1] = index[:, 0], weight[:, 0]
        found = gradients(index[:, None], weight[:, None], rng)
        assert abs(z_score((found - toy_mean()).square().sum(1).numpy(), predicted)) > 10


SHAPES = {
    "bins that cut atoms": uniform_steps(20, 60),
    "continuous": RANGE,
    "logit-normal": PRACTICE,
    "piecewise": Reweighted(RANGE, torch.tensor([0, 0.2, 0.3, 1.0]), torch.tensor([2.0, 0.0, 3.0])),
    "piecewise, weighted": proportional(RANGE, ramp, cells=37),
}


def linear_tables(base, bins=6):
    """Tables of an F that is linear in v = CDF_p(t), without noise, in equal bins."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    f = linear(middle)
    gram = f @ f.T
    return Tables(base, edges, middle[None, :, None], f.square().sum(1)[None, :, None], gram[None], gram[None])


def linear(v):
    start, slope = torch.tensor([1.0, -0.3, 0.2]).double(), torch.tensor([-1.2, 0.8, 1.0]).double()
    return start + v[..., None] * slope


@pytest.mark.parametrize("shape", SHAPES)
def test_the_proposal_of_a_design_over_bins_has_their_marginals_and_its_prediction_is_right(shape):
    """40,000 pairs: 4.5 standard errors a case, false alarm 1e-4 over all."""
    base, tables = SHAPES[shape], linear_tables(SHAPES[shape])
    joint = pairs.optimal(Targets.of_tables(tables), np.array([0.3, 0.1, 0.05, 0.2, 0.15, 0.2]))
    design = Pairs(joint)
    q = pair_proposal(tables, design)
    pi = design.marginals
    assert pi.tolist() == pytest.approx([0.3, 0.1, 0.05, 0.2, 0.15, 0.2])
    u = design(40_000, 2, torch.Generator().manual_seed(4), CPU)
    t, density = q.draw(u)
    omega = base.prob(t) / density
    if base.discrete:
        v = base.cdf(t) - base.prob(t) / 2  # within an atom F is constant
        whole = (base.cumulative - 1e-9).mul(6).floor() == (base.cumulative - base.pmf + 1e-9).mul(6).floor()
        inside = whole[t - base.first]
    else:
        v, inside = base.cdf(t), torch.ones_like(u, dtype=torch.bool)
    bins = torch.searchsorted(tables.edges, v, right=True).clamp(1, 6) - 1
    assert torch.equal((torch.searchsorted(design.ends, u, right=True) - 1)[inside], bins[inside])
    assert torch.allclose(omega[inside], (1 / 6 / pi)[bins[inside]], rtol=1e-6)
    each = omega[..., None] * linear(v)
    mean = each.mean(1)
    assert max(abs(z_score(mean[:, i].numpy(), linear(torch.tensor(0.5))[i].item())) for i in range(3)) < 4.5
    # The first term is the same for all couplings, so the difference to iid is all there is to check.
    found = predict(tables, 1, 2, q, design).variance.value - predict(tables, 1, 2, q, iid).variance.value
    product = (each[:, 0] * each[:, 1]).sum(-1) / 2 - linear(torch.tensor(0.5)).square().sum() / 2
    assert abs(z_score(product.numpy(), found)) < 4.5


def test_a_pilot_s_figure_has_an_interval_and_misfits_are_refused():
    design = Pairs(DESIGNS["optimal"])
    spread = torch.linspace(0.8, 1.2, 5)[:, None, None]
    position = TABLES.position.repeat(5, 1, 1)
    noisy = Tables(BASE, TABLES.edges, position, *(spread * x for x in (TABLES.norm_sq, TABLES.within, TABLES.across)))
    low, high = predict(noisy, 1, 2, None, design).interval
    assert low < predict(noisy, 1, 2, None, design).variance.value < high
    with pytest.raises(ValueError, match="over 12 bins, the tables have 6"):
        pair_proposal(linear_tables(RANGE), design)
    for renoise in (1, 3, 4):
        with pytest.raises(ValueError, match=f"two timesteps for each render, got renoise = {renoise}"):
            predict(TABLES, 1, renoise, None, design)
        with pytest.raises(ValueError, match=f"two timesteps for each render, got renoise = {renoise}"):
            design(1, renoise, None, CPU)
    skew = np.array([[0.0, 0.6], [0.4, 0.0]])
    for joint in (skew, np.full((2, 2), 0.5), np.array([[1.5, -0.25], [-0.25, 0.0]]), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="symmetric law of ordered pairs"):
            Pairs(joint)
    never = np.zeros((N, N))
    never[0, 1] = never[1, 0] = 0.5
    with pytest.raises(ValueError, match="the proposal is zero at t = 102"):
        predict(TABLES, 1, 2, pair_proposal(TABLES, Pairs(never)), Pairs(never))


def test_a_design_keeps_its_own_copy_of_the_law():
    joint = np.array([[0.0, 0.5], [0.5, 0.0]])
    design = Pairs(joint)
    joint[:] = np.nan
    assert torch.as_tensor(design.joint).tolist() == [[0.0, 0.5], [0.5, 0.0]]
