import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from carv.density import LogitNormal, uniform_steps
from carv.proposals import defensive, oracle, proportional
from carv.rng import stream
from carv.strata import global_strata, iid, nested, per_render, systematic
from carv.tasks.toy import GaussianToy
from carv.variance import designs
from carv.variance.designs import line, pair_law
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.predict import gain, grid, oracle_proposal, paper_methods, predict
from carv.variance.tables import Tables

from comparisons import z_score
from laws import COUPLINGS, RANGE, ramp

TOY = GaussianToy(dim=4, gain_std=0.15)
BASE = uniform_steps(20, 980)
CLOSED = TOY.exact(BASE)
C, B = TOY.coefficients(BASE.support)
# <g(eps), g(-eps)>: the noise part of m2 changes its sign.
ANTI = 2 * CLOSED.within.diagonal() - CLOSED.m2
EXACT = Tables.exact(BASE, CLOSED.m2, CLOSED.within, CLOSED.across, ANTI)
IW = proportional(BASE, TOY.weight)
PROPOSALS = {"uniform": None, "weighted": IW}
# A range short enough to simulate quickly; w(t) varies fivefold over it.
SHORT = uniform_steps(20, 119)
P, M2, GW, GC = BASE.pmf, CLOSED.m2, CLOSED.within, CLOSED.across
MU_SQ = CLOSED.mean.square().sum().item()
REPETITIONS = 1000


@cache
def short():
    closed = TOY.exact(SHORT)
    anti = 2 * closed.within.diagonal() - closed.m2
    return closed, anti, Tables.exact(SHORT, closed.m2, closed.within, closed.across, anti)


@cache
def uniforms(coupling, renders, renoise):
    rng = stream(5, coupling, renders, renoise).generator()
    return torch.stack([COUPLINGS[coupling](renders, renoise, rng, torch.device("cpu")) for _ in range(REPETITIONS)])


def simulate(coupling, law, renders, renoise, antithetic):
    """E[|g_hat|^2 | t] - |mu|^2 for real draws of t: x and eps are integrated in closed form, so it is precise."""
    closed, anti, _ = short()
    index = law.icdf(uniforms(coupling, renders, renoise // 2 if antithetic else renoise)) - SHORT.first
    omega = SHORT.pmf[index] / law.pmf[index]
    c = TOY.coefficients(SHORT.support)[0]
    within_power, across_power = (g[0, 0] / c[0] ** 2 for g in (closed.within, closed.across))  # both are ~ c c'
    copies = 2 if antithetic else 1
    f = copies * omega * c[index]
    own = copies * omega**2 * (closed.m2[index] + (anti[index] if antithetic else 0.0)) - within_power * f**2
    by_render = f.sum(2)
    total = own.sum((1, 2)) + within_power * by_render.square().sum(1)
    total += across_power * (by_render.sum(1) ** 2 - by_render.square().sum(1))
    total = total / (renders * renoise) ** 2
    # Control variate with mean 0: most of the spread is that of |mu|^2 times the mean weight of the draws.
    mean = (SHORT.pmf @ c).item()
    total -= 2 * across_power * mean * (by_render.sum(1) / (renders * renoise) - mean)
    return total.numpy() - closed.mean.square().sum().item()


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(("renders", "renoise"), [(1, 1), (1, 7), (3, 1), (4, 5)])
def test_iid_predictions_from_exact_tables_equal_theory(proposal, renders, renoise):
    q = PROPOSALS[proposal]
    prediction = predict(EXACT, renders, renoise, q, iid)
    power = (P @ GW @ P).item()
    second = (P**2 / (q or BASE).pmf * M2).sum().item()
    theory = (power - MU_SQ) / renders + (second - power) / (renders * renoise)
    assert prediction.variance.value == pytest.approx(theory, rel=1e-12)
    assert prediction.interval == (prediction.variance.value, prediction.variance.value)
    assert prediction.split.render.value == pytest.approx((power - MU_SQ) / renders, rel=1e-12)


def test_the_split_of_uniform_iid_is_that_of_the_law_of_total_variance_and_parts_add_up():
    split = predict(EXACT, 2, 3, None, iid).split
    assert split.timestep.value == pytest.approx(((P @ GW.diagonal()) - P @ GW @ P).item() / 6, rel=1e-10)
    assert split.noise.value == pytest.approx((P @ (M2 - GW.diagonal())).item() / 6, rel=1e-10)
    for name, coupling in COUPLINGS.items():
        prediction = predict(EXACT, 2, 4, IW, coupling, antithetic=name == "nested")
        parts = (prediction.split.render, prediction.split.timestep, prediction.split.noise)
        assert sum(part.value for part in parts) == pytest.approx(prediction.variance.value, rel=1e-10)
        assert prediction.split.timestep.value >= -1e-12


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_predictions_equal_simulation_with_and_without_antithetic_noise(coupling, proposal):
    # 11 cells x 10 cases: |z| < 4.5 fails falsely once in 1000 runs. x and eps are integrated out.
    law = proportional(SHORT, TOY.weight) if proposal == "weighted" else SHORT
    tables = short()[2]
    for renders, renoise, antithetic in [
        (1, 1, False),
        (1, 2, False),
        (1, 8, False),
        (2, 3, False),
        (5, 1, False),
        (3, 7, False),
        (4, 4, False),
        (1, 2, True),
        (2, 2, True),
        (1, 6, True),
        (3, 10, True),
    ]:
        found = predict(tables, renders, renoise, law, COUPLINGS[coupling], antithetic).variance.value
        samples = simulate(coupling, law, renders, renoise, antithetic)
        assert abs(z_score(samples, found)) < 4.5, (renders, renoise, antithetic, found, samples.mean())
        assert samples.std() / len(samples) ** 0.5 < 0.04 * found


def test_a_prediction_equals_the_variance_of_whole_estimates():
    # Nothing integrated out: gains, noises and timesteps are drawn. 30 000 estimates: 1 % standard error.
    renders, renoise, n = 2, 3, 30_000
    rng = torch.Generator().manual_seed(1)
    u = (torch.arange(renoise) + torch.rand((n, renders, renoise), generator=rng, dtype=torch.float64)) / renoise
    t = IW.icdf(u)
    c, b = TOY.coefficients(t)
    gain_x = 1 + TOY.gain_std * torch.randn((n, renders, 1, 1), generator=rng, dtype=torch.float64)
    eps = torch.randn((n, renders, renoise, 4), generator=rng, dtype=torch.float64)
    f = c[..., None] * (gain_x * TOY.theta.detach() - TOY.target) - b[..., None] * eps
    omega = (BASE.prob(t) / IW.prob(t))[..., None]
    estimates = (gain_x * omega * f).mean((1, 2))
    samples = (estimates - CLOSED.mean).square().sum(1).numpy()
    assert abs(z_score(samples, predict(EXACT, renders, renoise, IW, per_render).variance.value)) < 4


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_pair_laws_are_those_of_the_coupling_functions_themselves(coupling):
    # <Qw omega omega', G> for matrices G that are no products.
    base = uniform_steps(0, 19)
    proposal = proportional(base, lambda t: 1.0 + t.double())
    rng = torch.Generator().manual_seed(3)
    for renders, renoise in [(1, 3), (2, 2), (3, 4), (5, 1)]:
        table = torch.randn((4, 20, 20), generator=rng, dtype=torch.float64)
        edges = np.linspace(0, 1, 21)
        law = pair_law(line(base, proposal), edges, renders, renoise, COUPLINGS[coupling], atoms=True)
        u = torch.stack([COUPLINGS[coupling](renders, renoise, rng, torch.device("cpu")) for _ in range(1000)])
        index = proposal.icdf(u)
        omega = base.pmf[index] / proposal.pmf[index]
        hot = torch.nn.functional.one_hot(index, 20) * omega[..., None]
        render, total, square = hot.sum(2), hot.sum((1, 2)), torch.einsum("srki,srkj->sij", hot, hot)
        within = torch.einsum("sri,srj->sij", render, render)
        across = torch.einsum("si,sj->sij", total, total) - within
        pairs = ((within - square, law.within, renders * renoise * (renoise - 1)),)
        pairs += ((across, law.across, renders * (renders - 1) * renoise**2),)
        for measured, predicted, count in pairs:
            for g in table:
                samples = (measured * g).sum((1, 2)) / max(1, count)
                if count:
                    assert abs(z_score(samples, (predicted * g.numpy()).sum())) < 4.5
                else:
                    assert not predicted.any()


@pytest.mark.parametrize("coupling", [per_render, global_strata, systematic, nested])
@pytest.mark.parametrize("law", ["uniform", "piecewise", "smooth"])
def test_strata_that_cut_bins_are_exact_for_continuous_t_where_f_is_linear_in_the_quantile(coupling, law):
    start, slope = torch.tensor([1.0, -0.3, 0.2]).double(), torch.tensor([-1.2, 0.8, 1.0]).double()
    proposal = {
        "uniform": None,
        "piecewise": proportional(RANGE, ramp, cells=37),
        "smooth": defensive(RANGE, LogitNormal(0.3, 0.8), 0.3, cells=19),
    }[law]
    bins = 6
    middle = (torch.arange(bins).double() + 0.5) / bins
    f = start + middle[:, None] * slope
    gram = f @ f.T
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    tables = Tables(RANGE, edges, middle[None, :, None], torch.zeros(1, bins, 1).double(), gram[None], gram[None])
    rng = torch.Generator().manual_seed(2)
    for renders, renoise in [(1, 2), (2, 5), (3, 4)]:
        # The first term is the same for all couplings, so the difference to iid is all there is to check.
        found = predict(tables, renders, renoise, proposal, coupling).variance.value
        found -= predict(tables, renders, renoise, proposal, iid).variance.value
        u = torch.stack([coupling(renders, renoise, rng, torch.device("cpu")) for _ in range(1000)])
        t = (proposal or RANGE).icdf(u)
        omega = RANGE.prob(t) / (proposal or RANGE).prob(t)
        each = omega[..., None] * (start + RANGE.cdf(t)[..., None] * slope)
        count = renders * renoise
        mean_sq = (start + slope / 2).square().sum() * (1 - 1 / count)
        pairs = each.sum((1, 2)).square().sum(1) - each.square().sum((1, 2, 3))
        assert abs(z_score(pairs.numpy() / count**2 - mean_sq.item(), found)) < 4.5


def coarse(bins):
    """The toy's exact tables averaged over quantile bins, with enough positions for the first term."""
    fine = (torch.arange(bins * 480).double() + 0.5) / (bins * 480)
    index = BASE.icdf(fine) - BASE.first
    mean = torch.zeros(bins, 961, dtype=torch.float64)
    mean.index_put_((torch.arange(bins).repeat_interleave(480), index), torch.tensor(1 / 480).double(), True)
    within, across = (mean @ g @ mean.T for g in (GW, GC))
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return Tables(BASE, edges, fine.view(1, bins, 480), M2[index].view(1, bins, 480), within[None], across[None])


def test_the_discretisation_error_falls_at_least_eightfold_with_each_doubling_of_the_bins():
    # Strata that cut bins: 32 and 24 strata, and those of a weighted proposal.
    errors = {}
    for bins in (16, 32, 64):
        tables = coarse(bins)
        for name, proposal, coupling, renders, renoise in (
            ("fine", None, per_render, 1, 32),
            ("cut", None, per_render, 1, 12),
            ("weighted", IW, per_render, 2, 8),
            ("nested", IW, nested, 4, 4),
            ("systematic", None, systematic, 2, 5),
        ):
            exact = predict(EXACT, renders, renoise, proposal, coupling)
            first = predict(EXACT, renders, renoise, proposal, iid).variance.value
            found = predict(tables, renders, renoise, proposal, coupling).variance.value
            found -= predict(tables, renders, renoise, proposal, iid).variance.value
            saved = exact.variance.value - first
            errors[name, bins] = abs(found - saved) / exact.variance.value
    # Measured: 2e-4, 2e-5 and 2e-6 of the variance at the worst of the five.
    for name, bins in errors:
        assert errors[name, bins] < {16: 8e-4, 32: 1e-4, 64: 1.25e-5}[bins], (name, bins, errors[name, bins])


@pytest.mark.parametrize("factor", ["strata", "draws"])
def test_a_prediction_without_the_factor_of_distinct_pairs_is_caught_by_simulation(factor, monkeypatch):
    samples = simulate("per-render", SHORT, 1, 2, False)
    closed, _, tables = short()
    honest = predict(tables, 1, 2, None, per_render).variance.value
    if factor == "strata":
        monkeypatch.setattr(designs, "_different", lambda pairs, same, count: pairs - same)
        mutant = predict(tables, 1, 2, None, per_render).variance.value
    else:  # K^2 pairs instead of K (K - 1)
        law = pair_law(line(SHORT, None), tables.edges.numpy(), 1, 2, per_render, atoms=True)
        mutant = honest + (law.within * closed.within.numpy()).sum() / 2
    assert abs(z_score(samples, honest)) < 4
    assert abs(z_score(samples, mutant)) > 8


def test_the_grid_has_the_paper_s_72_cells_each_equal_to_its_own_prediction():
    tables = coarse(16)
    cells = grid(tables, paper_methods(IW))
    assert len(cells) == 72
    assert len({(r, k) for _, r, k in cells}) == 18
    for (name, r, k), coupling in ((("iw+strat", 2, 4), per_render), (("iw", 8, 4), iid)):
        assert cells[name, r, k].variance.value == predict(tables, r, k, IW, coupling).variance.value
    assert cells["strat", 4, 1].variance.value == pytest.approx(cells["uniform", 4, 1].variance.value, rel=1e-9)


def test_each_oracle_is_best_where_it_should_be():
    plain, stratified = (oracle_proposal(EXACT, given, share=0.0) for given in (False, True))
    assert torch.allclose(plain.prob(BASE.support), oracle(BASE, BASE.support, M2).prob(BASE.support))
    single = {
        name: predict(EXACT, 1, 1, q, iid).variance.value
        for name, q in {"p": None, "iw": IW, "plain": plain, "stratified": stratified}.items()
    }
    assert min(single, key=single.get) == "plain"
    many = {
        name: predict(EXACT, 1, 32, q, per_render).split
        for name, q in {"p": None, "iw": IW, "plain": plain, "stratified": stratified}.items()
    }
    reducible = {name: split.timestep.value + split.noise.value for name, split in many.items()}
    assert min(reducible, key=reducible.get) == "stratified"


def test_gains_of_one_pilot_are_compared_render_by_render():
    a = Jackknifed(2.0, np.array([1.8, 2.0, 2.2]))
    b = Jackknifed(1.0, np.array([0.9, 1.0, 1.1]))
    ratio = derived(lambda x, y: x / y, a, b)
    assert (ratio.value, ratio.error) == pytest.approx((2.0, 0.0))
    assert a.error == pytest.approx((2 / 3 * 0.08) ** 0.5)
    with pytest.raises(ValueError, match="number of renders"):
        derived(lambda x, y: x / y, a, Jackknifed(1.0, np.array([1.0, 2.0])))
    exact = gain(predict(EXACT, 1, 8, None, iid), predict(EXACT, 1, 8, None, per_render))
    assert exact.value > 1
    assert exact.error == 0


def test_intervals_are_student_s_and_of_the_logarithm_for_clearly_positive_figures():
    figure = Jackknifed(0.0, np.array([-1.0, -1.0, 1.0, 1.0]))
    assert figure.interval()[1] == pytest.approx(3.182 * figure.error, rel=2e-3)  # 3 degrees of freedom
    low, high = Jackknifed(4.0, np.array([3.9, 4.0, 4.1, 4.0])).interval()
    assert low * high == pytest.approx(16.0)
    assert figure.largest_influence == pytest.approx(0.25)
    even, heavy = (Jackknifed(0.0, np.array([*[-1.0, 1.0] * 9, -x, x])) for x in (1.0, 6.0))
    assert even.degrees == pytest.approx(19.0)
    assert heavy.degrees < 6
    two = Jackknifed(1.0, np.array([0.9, 1.1, 1.0, 1.0]), np.array([0.99, 1.01]))
    assert 1 < two.degrees < 4
    with pytest.raises(ValueError, match="level"):
        figure.interval(1.0)


def test_predictions_refuse_what_they_cannot_answer():
    with pytest.raises(ValueError, match="even number of re-noisings, got renoise = 3"):
        predict(EXACT, 1, 3, antithetic=True)
    with pytest.raises(ValueError, match="run the pilot with antithetic=True"):
        predict(dataclasses.replace(EXACT, antithetic=None), 1, 2, antithetic=True)
    with pytest.raises(ValueError, match="no pair law is known"):
        predict(EXACT, 1, 2, coupling=lambda *_: torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least one render"):
        predict(EXACT, 0, 2)
    with pytest.raises(ValueError, match="proposal is zero at t = 20"):
        predict(EXACT, 1, 2, uniform_steps(30, 980))
    with pytest.raises(ValueError, match="both discrete"):
        predict(EXACT, 1, 2, RANGE)
    with pytest.raises(ValueError, match="one entry an atom"):
        Tables.exact(BASE, M2[1:], GW, GC)


def test_a_proposal_may_skip_timesteps_that_contribute_nothing_and_draw_some_outside_the_base():
    alive = (BASE.support >= 100).double()
    tables = Tables.exact(BASE, M2 * alive, GW * torch.outer(alive, alive), GC * torch.outer(alive, alive))
    skipping = uniform_steps(100, 990)
    found = predict(tables, 1, 4, skipping, iid).variance.value
    p, q = P, skipping.prob(BASE.support)
    second = (p**2 / q * M2)[alive > 0].sum().item()
    power, mean_sq = (((p * alive) @ g @ (p * alive)).item() for g in (GW, GC))
    assert found == pytest.approx(power - mean_sq + (second - power) / 4, rel=1e-10)
