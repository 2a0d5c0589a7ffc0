import math

import pytest
import torch

from carv.adaptive import AdaptiveProposal
from carv.density import uniform_steps
from carv.estimator import Clip, HierarchicalEstimator
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.tasks.toy import GaussianToy
from carv.variance.measure import collect, conclude, measure, pilot_centre
from carv.variance.reference import cosine_similarity, mse_to_reference, reference
from carv.variance.stopping import Check, fixed_count, paper_rule, target_error
from carv.variance.values import Value

from laws import COUPLINGS

BASE = uniform_steps(20, 980)
# Many dimensions that the noise fills, so that few replicates tell the variance well.
TOY = GaussianToy(dim=32, distance=0.5, gain_std=0.1)
IW = proportional(BASE, TOY.weight)


def estimator(renders=1, renoise=2, coupling="iid", proposal=None, **options):
    return HierarchicalEstimator(
        TimestepSampler(BASE, proposal, coupling=COUPLINGS[coupling]), renders, renoise, **options
    )


def exact_variance(renders, renoise, coupling="iid", proposal=None):
    """The formula of docs: tables and the law of a pair of draws, here iid or strata within each render."""
    tables = TOY.exact(BASE)
    p, q = BASE.pmf, (proposal or BASE).pmf
    omega = torch.where(q > 0, p / q, 0.0)
    within = torch.outer(q, q)
    if coupling == "per-render":
        # Mass of each t in each of K strata of the quantiles; a pair of draws is in two different strata.
        edges = torch.linspace(0, 1, renoise + 1, dtype=torch.float64)
        upper = q.cumsum(0)
        strata = (torch.minimum(upper, edges[1:, None]) - torch.maximum(upper - q, edges[:-1, None])).clamp(min=0)
        law = strata * renoise
        within = (renoise**2 * within - law.T @ law) / (renoise * (renoise - 1))
    both = torch.outer(omega, omega)
    draws = renders * renoise
    second = draws * (q * omega**2 * tables.m2).sum()
    second += draws * (renoise - 1) * (within * both * tables.within).sum()
    second += renders * (renders - 1) * renoise**2 * (torch.outer(p, p) * tables.across).sum()
    return float(second / draws**2 - tables.mean.square().sum())


def exact_latent_variance(renders, renoise):
    """Var of 1/R sum_r f_bar_r for iid uniform t: f = c (a theta - m) - b eps, by hand."""
    c, b = TOY.coefficients(BASE.support)
    p, theta, m = BASE.pmf, TOY.theta.detach(), TOY.target
    power = float(((1 + TOY.gain_std**2) * theta**2 - 2 * theta * m + m**2).sum())
    mean = float((theta - m).square().sum()) * float(p @ c) ** 2
    between = power * float(p @ c) ** 2 - mean
    within = float(p @ (c**2 * power + b**2 * len(theta))) - power * float(p @ c) ** 2
    return between / renders + within / (renders * renoise)


def close(found, truth, errors=4.5):
    """Within 4.5 standard errors (false alarm 7e-6), of 7 % at most and mostly 5 %: a bias of 30 % is found."""
    assert found.relative_error < 0.07
    assert abs(found.value - truth) < errors * found.error


@pytest.mark.parametrize(
    ("renders", "renoise", "coupling", "proposal"),
    [(2, 2, "iid", None), (1, 4, "iid", IW), (1, 4, "per-render", IW), (2, 2, "per-render", None)],
)
def test_the_variances_of_the_toy_are_the_closed_forms(renders, renoise, coupling, proposal):
    found = measure(
        TOY,
        estimator(renders, renoise, coupling, proposal),
        stream(1, renders, renoise, coupling),
        stop=target_error(0.05),
    )
    close(found.variance, exact_variance(renders, renoise, coupling, proposal))
    if coupling == "iid" and proposal is None:
        close(found.latent_variance, exact_latent_variance(renders, renoise))
    assert found.converged
    assert found.tails.trusted
    assert found.latent_tails.trusted
    mu = TOY.exact(BASE).mean
    noise = math.sqrt(found.variance.value / found.replicates)
    assert float((found.mean - mu).norm()) < 4 * noise
    assert abs(found.mean_norm_squared.value - float(mu.square().sum())) < 4.5 * found.mean_norm_squared.error


def test_a_stratified_design_is_measured_by_whole_estimates_not_by_its_draws():
    """s^2/K of the K = 8 draws, as if they were independent, overstates the variance of their stratified mean 1.5 times
    or more, even for renders that are all alike; measured per whole estimate it is right.
    """
    design = estimator(1, 8, "per-render")
    close(measure(TOY, design, stream(2), stop=target_error(0.05)).variance, exact_variance(1, 8, "per-render"))
    naive = 0.0
    for i in range(200):
        rng = stream(2, "naive", i).generator()
        draws = design.sampler.sample(1, 8, rng)
        noise = torch.randn(1, 8, 32, generator=rng, dtype=torch.float64)
        g = TOY.contribution(TOY.theta.detach()[None], draws.t, noise)[0]
        naive += float(g.var(0).sum()) / 8 / 200
    assert naive > 1.5 * exact_within(8)


def exact_within(renoise):
    """Var of the mean over K stratified draws of one render, of gain 1."""
    c, b = TOY.coefficients(BASE.support)
    length = float((TOY.theta.detach() - TOY.target).square().sum())
    p = BASE.pmf
    upper, edges = p.cumsum(0), torch.linspace(0, 1, renoise + 1, dtype=torch.float64)
    law = renoise * (torch.minimum(upper, edges[1:, None]) - torch.maximum(upper - p, edges[:-1, None])).clamp(min=0)
    spread = float((law @ c**2 - (law @ c) ** 2).mean()) * length
    return (spread + len(TOY.theta) * float(p @ b**2)) / renoise


def gaussian(dim, scale=1.0, offset=0.0):
    """A callable whose variance is scale^2 dim, fast: one draw from a tiny generator."""

    def estimate(at):
        rng = torch.Generator().manual_seed(int.from_bytes(at.digest(7), "little"))
        return offset + scale * torch.randn(dim, generator=rng, dtype=torch.float64)

    return estimate


def test_intervals_cover_the_variance_in_95_percent_of_measurements():
    """100 measurements to 8 % of a normal law of 5 dimensions, at least 89 of them covered. A right interval fails with
    probability 0.4 %; one that is 30 % too short (coverage 83 %) with 93 %, a halved one with more than 99.99 %.
    """
    covered = 0
    for run in range(100):
        found = measure(gaussian(5), None, stream(4, run), stop=target_error(0.08, minimum=60, every=20))
        low, high = found.variance.interval()
        covered += low <= 5 <= high
    assert covered >= 89


def test_a_callable_may_return_a_tuple_of_tensors():
    def two(at):
        x = gaussian(6)(at)
        return x[:2].view(1, 2), x[2:].float()

    found = measure(two, None, stream(5), stop=fixed_count(200))
    assert found.mean.shape == (6,)
    assert found.latent_variance is None
    assert found.latent_tails is None
    assert found.counts is None
    close(found.variance, 6)


def test_the_result_does_not_depend_on_how_replicates_are_split_over_workers():
    design = estimator(1, 2)
    whole = measure(TOY, design, stream(6), stop=fixed_count(60))
    centre = pilot_centre(TOY, design, stream(6))
    parts = [collect(TOY, design, stream(6), first, count, centre=centre) for first, count in [(41, 19), (0, 7)]]
    parts.append(collect(TOY, design, stream(6), 7, 34))  # a worker that makes the centre itself
    merged = conclude(parts[0].merge(parts[2]).merge(parts[1]), "60 replicates, as asked")
    assert merged.replicates == 60
    assert merged.variance.value == pytest.approx(whole.variance.value, rel=1e-12)
    assert merged.variance.error == whole.variance.error
    assert merged.latent_variance.error == whole.latent_variance.error
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-14)
    assert merged.counts == whole.counts
    with pytest.raises(ValueError, match="replicates 7 to 40 are in both"):
        parts[2].merge(parts[2])


def test_work_is_counted():
    found = measure(TOY, estimator(3, 2), stream(7), stop=fixed_count(10))
    assert (found.counts.upstream, found.counts.teacher, found.counts.backward) == (30, 60, 30)
    assert found.seconds > 0
    assert found.replicates == 10


def test_a_clip_is_said_beside_the_variance():
    found = measure(TOY, estimator(1, 2, clip=Clip(0.1)), stream(8), stop=fixed_count(20))
    assert "biases" in found.policy
    assert found.clipped > 0


def test_a_cap_that_is_reached_is_said():
    found = measure(gaussian(1), None, stream(9), stop=target_error(0.001, minimum=50, every=40, cap=120))
    assert found.replicates == 120
    assert not found.converged
    assert "cap of 120" in found.stopped
    assert "aim 0.1 %" in found.stopped


def test_the_target_error_is_reached_and_said():
    found = measure(gaussian(40), None, stream(10))
    assert found.variance.relative_error <= 0.02
    assert "aim 2 %" in found.stopped
    # 2/(40 n) = 0.02^2 at n = 125; the error is itself known within 10 %, and checks come every 50.
    assert found.replicates in (100, 150, 200)


def test_the_papers_rule_needs_three_small_changes_after_1000_replicates():
    rule = paper_rule()
    assert (rule.minimum, rule.every, rule.cap) == (1000, 50, 20_000)

    def checks(*values):
        return [Check(1000 + 50 * i, Value(v, 0.1)) for i, v in enumerate(values)]

    assert rule.reason(checks(1.0, 1.0, 1.0)) is None
    assert "1150 replicates" in rule.reason(checks(1.0, 1.0009, 1.0, 1.0009))
    assert rule.reason(checks(1.0, 1.0009, 1.002, 1.0029)) is None
    assert rule.reason(checks(1.0, 1.5, 1.5, 1.5)) is None
    assert rule.reason(checks(1.0, 1.5, 1.5, 1.5, 1.5)) is not None
    assert rule.reason(checks(0.0, 0.0, 0.0, 0.0)) is not None
    assert "20000" in rule.unmet(checks(1.0))


def test_the_papers_rule_runs():
    found = measure(gaussian(200), None, stream(11), stop=paper_rule())
    assert 1150 <= found.replicates <= 5000
    assert found.converged
    assert "paper's rule" in found.stopped
    close(found.variance, 200)


def test_rules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="positive"):
        target_error(0.0)
    with pytest.raises(ValueError, match="minimum"):
        target_error(minimum=1)
    with pytest.raises(ValueError, match="cap"):
        target_error(minimum=100, cap=50)
    with pytest.raises(ValueError, match="minimum"):
        fixed_count(1)


def test_a_constant_estimate_has_variance_zero():
    found = measure(lambda at: torch.tensor([3.0, 4.0]), None, stream(12))
    assert found.replicates == 100
    assert found.variance == Value(0.0, 0.0)
    assert found.mean_norm_squared.value == 25


def test_what_cannot_be_measured_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="say with which estimator"):
        measure(TOY, None, stream(0))
    with pytest.raises(ValueError, match="its own estimator"):
        measure(gaussian(1), estimator(), stream(0))
    with pytest.raises(ValueError, match="freeze"):
        measure(TOY, estimator(proposal=AdaptiveProposal(BASE)), stream(0))
    with pytest.raises(ValueError, match="first >= 0"):
        collect(gaussian(1), None, stream(0), 0, 0)

    def fails_late(at):
        return torch.full((2,), math.nan if at.path == ("replicate", 17) else 1.0)

    with pytest.raises(ValueError, match="replicate 17"):
        measure(fails_late, None, stream(0))
    with pytest.raises(ValueError, match="first 32"):
        measure(lambda at: torch.full((2,), math.nan), None, stream(0))


def test_the_mse_to_a_reference_is_the_variance_without_that_of_the_reference():
    """A reference of only 20 estimates has 5 % of the variance, 0.15. Over 40 runs the mean is known within 0.026: were
    the 0.15 not removed, a test at 3 standard errors (false alarm 0.3 %) would say so with 99 %. Intervals are wide
    on purpose: at least 37 of 40 cover.
    """
    found = []
    for run in range(40):
        at = stream(13, run)
        target = reference(gaussian(3, offset=1.0), None, at, replicates=20)
        found.append(mse_to_reference(gaussian(3, offset=1.0), None, at, target, replicates=500))
    values = torch.tensor([v.value for v in found])
    assert abs(float(values.mean()) - 3) < 3 * float(values.std()) / math.sqrt(40)
    assert float(values.std()) / math.sqrt(40) < 0.03
    assert sum(v.interval()[0] <= 3 <= v.interval()[1] for v in found) >= 37


def test_the_mse_shows_a_bias_that_the_variance_does_not():
    at = stream(14)
    target = reference(gaussian(3, offset=1.0), None, at, replicates=2000)
    biased = gaussian(3, offset=2.0)
    found = mse_to_reference(biased, None, at, target, replicates=1000)
    close(found, 3 + 3)
    close(measure(biased, None, at, stop=fixed_count(1000)).variance, 3)


def test_reference_and_replicates_share_no_numbers():
    at = stream(15)
    target = reference(gaussian(2), None, at, replicates=32)
    replicates = torch.stack([gaussian(2)(at.child("replicate", i)) for i in range(32)])
    assert not torch.allclose(target.mean, replicates.mean(0))


def test_the_mean_cosine_is_free_of_the_references_noise():
    """x = e_1 + n in 3 dimensions. 40 references of 200 estimates have |noise|^2/|mu|^2 = 1.5 %; half of that lengthens
    |mu_GT|, so that not corrected the mean would be 0.75 % too low. Asked: within 4 errors, and 34 of the 40
    intervals cover (a right interval fails with 1 %, one that is 40 % too short with 96 %).
    """
    direction = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    noisy = gaussian(3, offset=direction)
    x = direction + torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = float((x[:, 0] / x.norm(dim=1)).mean())
    found = []
    for run in range(40):
        at = stream(16, run)
        found.append(cosine_similarity(noisy, None, at, reference(noisy, None, at, replicates=200), replicates=100))
    mean = sum(v.value for v in found) / 40
    assert abs(mean - truth) < 4 * math.sqrt(sum(v.error**2 for v in found)) / 40
    assert sum(v.interval()[0] <= truth <= v.interval()[1] for v in found) >= 34


def test_a_direction_that_is_not_known_is_refused():
    at = stream(17)
    with pytest.raises(ValueError, match="direction is not known"):
        cosine_similarity(gaussian(3), None, at, reference(gaussian(3), None, at, replicates=50))
    target = reference(gaussian(3, offset=5.0), None, at, replicates=50)
    with pytest.raises(ValueError, match="exactly zero"):
        cosine_similarity(lambda at: torch.zeros(3), None, at, target, replicates=2)
    with pytest.raises(ValueError, match="at least 2"):
        mse_to_reference(gaussian(3), None, at, target, replicates=1)
