import math
from functools import lru_cache

import pytest
import torch

from carv.density import uniform_steps
from carv.estimator import Clip, HierarchicalEstimator
from carv.proposals import proportional
from carv.rng import Stream, stream
from carv.sampler import TimestepSampler
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance import bias
from carv.variance.bias import BiasReport, bias_test
from carv.variance.null_law import exceeds, spread_of
from carv.variance.values import Value

from laws import COUPLINGS

# Six noise levels that are far apart, so that wrong laws of t show.
BASE, TOY = uniform_steps(0, 5), GaussianToy(dim=3, gain_std=0.3)
LEVELS = 20 + 160 * torch.arange(6)
C, B = TOY.coefficients(LEVELS)
IW = proportional(BASE, lambda t: C[t])
RENDERS = 4


def estimator(coupling=iid, proposal=None, renoise=1, antithetic=False, mutant=""):
    """Stream -> one whole estimate of the toy, in closed form; estimators share the gains of their renders."""
    sampler = TimestepSampler(BASE, proposal, coupling=coupling, antithetic=antithetic)

    def estimate(at: Stream):
        gain = 1 + TOY.gain_std * torch.randn((RENDERS, 1, 1), generator=at.child("gain").generator()).double()
        rng = at.child("own", renoise).generator()
        draws = sampler.sample(RENDERS, renoise, rng)
        eps, t = draws.noise((3,), rng, torch.float64), draws.t
        if mutant == "snapped end points":
            t = (5 * torch.rand(t.shape, generator=rng)).round().long()
        c, b = C[t][..., None], B[t][..., None]
        if mutant == "coarser schedule":
            c = C[t // 3 * 3][..., None]
        f = c * (gain * TOY.theta.detach() - TOY.target) - b * eps
        if mutant == "sign of a pair":
            f = f * torch.tensor([1.0, -1.0]).repeat(renoise // 2)[:, None]
        if mutant == "scale":
            f = 1.01 * f
        weight = torch.ones_like(draws.weight) if mutant == "no p/q" else draws.weight
        each = gain * weight[..., None].double() * f
        return (each.sum(1) if mutant == "no 1/K" else each.mean(1)).mean(0)

    return estimate


NAIVE = estimator()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_every_coupling_with_and_without_weights_and_antithetic_noise_passes(coupling, antithetic):
    """10 tests of false-alarm rate 0.1 %. A bias of 40 % would be told from a pass with 95 % confidence."""
    ours = estimator(COUPLINGS[coupling], IW if antithetic else None, 4, antithetic)
    found = bias_test(ours, NAIVE, stream(0, coupling), tolerance=0.4, cap=1024)
    assert found.verdict == "pass", found.describe()
    assert 0 <= found.bias.value <= found.upper < 0.4
    assert abs(found.scale.value - 1) < 4.5 * found.scale.error
    assert found.needed is None
    assert not found.detected


MUTANTS = {
    "no p/q": {"proposal": IW},
    "no 1/K": {},
    "sign of a pair": {"antithetic": True},
    "snapped end points": {},
    "coarser schedule": {},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_usual_mistakes_fail_or_are_not_passed(mutant):
    ours = estimator(per_render, renoise=4, mutant=mutant, **MUTANTS[mutant])
    found = bias_test(ours, NAIVE, stream(1), tolerance=0.05, cap=1024)
    if mutant == "snapped end points":  # 4 % of the mean: found to be there, or not called absent
        assert found.verdict in ("fail", "cannot tell"), found.describe()
        return
    assert found.verdict == "fail", found.describe()
    assert found.bias.value - 4 * found.bias.error > 0
    factor = {"no 1/K": 4.0, "sign of a pair": 0.0}.get(mutant)
    if factor is not None:
        assert abs(found.scale.value - factor) < 4.5 * found.scale.error
        assert f"ours is {found.scale.times()} the naive one" in found.describe()


def test_a_clip_fails_and_the_estimator_without_it_passes():
    toy, base = GaussianToy(dim=3, gain_std=0.1), uniform_steps(20, 980)

    def whole(clip, renoise):
        found = HierarchicalEstimator(TimestepSampler(base), 2, renoise, clip=clip)
        return lambda at: found.estimate(toy, at).gradient

    naive = whole(None, 2)
    assert bias_test(whole(Clip(0.3), 4), naive, stream(2), cap=256).verdict == "fail"
    assert bias_test(whole(None, 4), naive, stream(2), cap=256, tolerance=0.4).verdict == "pass"


@lru_cache(maxsize=4)
def table(seed, length, rows=1 << 13):
    """The numbers of all replicates of a test at once: a generator for each would take most of its time."""
    return torch.randn((rows, 2, length), generator=stream(seed, "table").generator(), dtype=torch.float64)


def vectors(length, bias_size, spread=1.0, skew=False, mean=1.0):
    """(ours, naive): a mean along the last axis, a bias along the first, noise in all."""

    def naive(at):
        x = 0.1 * table(at.seed, length)[at.path[-1], 0]
        x[-1] += mean
        return x

    def ours(at):
        noise = table(at.seed, length)[at.path[-1], 1]
        x = naive(at) + spread * (noise.square() - 1 if skew else noise)
        x[0] += bias_size
        return x

    return ours, naive


@pytest.mark.parametrize("skew", [False, True])
def test_false_alarms_are_no_more_frequent_than_stated(skew):
    """120 seeds at 5 %: at most 6 + 4 sd = 15. Measured: 1 to 3 %."""
    found = [
        bias_test(*vectors(1, 0.0, skew=skew), stream(seed), false_alarm=0.05, cap=128, tolerance=1e-9)
        for seed in range(120)
    ]
    assert sum(report.detected for report in found) <= 15
    assert all(report.replicates == 128 for report in found)
    # |bias|^2 is unbiased: in one dimension it is below 0, so that 0 is stated, with probability P(chi^2_1 < 1) = 0.68.
    assert 0.5 < sum(report.bias.value == 0 for report in found) / 120 < 0.86


@pytest.mark.parametrize("level", [0.05, 0.3])
@pytest.mark.parametrize("scale", [[3.0, 1.0, 0.5, 0.2, 0.1], [1.0] * 5])
def test_random_signs_have_the_level_that_they_state(level, scale):
    """500 Gram matrices of 40 vectors, with one strong direction or none: within 4 binomial standard errors."""
    rng = torch.Generator().manual_seed(3)
    hits = 0
    for i in range(500):
        d = torch.tensor(scale).double() * torch.randn((40, 5), generator=rng, dtype=torch.float64)
        p_value, larger = exceeds(d @ d.T, level, stream(i))
        assert larger == (p_value <= level)
        hits += larger
    assert abs(hits - 500 * level) < 4 * math.sqrt(500 * level * (1 - level))


def test_a_bias_at_the_tolerance_is_passed_no_more_often_than_the_confidence_allows():
    """75 seeds at 90 % confidence: at most 7.5 + 4 sd = 18, over all looks. The bounds are worst cases: fewer."""
    options = {"tolerance": 0.25, "confidence": 0.9, "false_alarm": 0.2, "cap": 128}
    for length in (1, 3):
        found = [bias_test(*vectors(length, 0.25), stream(seed), **options) for seed in range(75)]
        assert sum(report.upper < 0.25 for report in found) <= 7 + 11


def test_the_bound_is_exact_for_one_direction_and_falls_as_it_says():
    rng = torch.Generator().manual_seed(4)
    d = torch.randn((200, 1), generator=rng, dtype=torch.float64)
    spread = spread_of(d @ d.T, 0.975)
    sd = float(d.std()) / math.sqrt(200)
    assert spread.top == pytest.approx(sd)
    assert spread.rest < 0.2 * spread.top**2
    # (b - 1.96 sd)^2 - sd^2 = T
    assert spread.upper(3 * sd**2) == pytest.approx((1.96 + 2) * sd, rel=1e-2)
    assert spread.upper(0.0, factor=4.0) == pytest.approx(spread.upper(0.0) / 2, rel=1e-6)
    many = torch.randn((200, 1000), generator=rng, dtype=torch.float64)
    wide = spread_of(many @ many.T, 0.975)
    assert wide.rest == pytest.approx(math.sqrt(2 * 1000 * 199 / 200) / 200, rel=0.1)
    assert wide.upper(0.0, factor=4.0) == pytest.approx(wide.upper(0.0) / 2, rel=1e-6)
    assert spread_of(torch.zeros(8, 8, dtype=torch.float64), 0.9).upper(0.0) == 0


def test_the_size_of_a_bias_and_its_direction_come_out_with_honest_errors():
    """60 seeds: the mean of the sizes is known to about 1 %, the mean z-score to 0.13."""
    sizes, scales = [], []
    for seed in range(60):
        ours, naive = vectors(4, 0.6, 0.5)
        found = bias_test(ours, naive, stream(seed), cap=128)
        assert found.verdict == "fail"
        sizes.append((found.bias.value - 0.6) / found.bias.error)
        scales.append((found.scale.value - 1) / found.scale.error)
        assert found.along < 0.2
    for z in (torch.tensor(sizes), torch.tensor(scales)):
        assert abs(z.mean()) < 0.6
        assert 0.7 < z.std() < 1.4


def test_a_detected_bias_below_the_tolerance_is_a_verdict_of_its_own():
    found = bias_test(*vectors(2, 0.03, 0.02), stream(5), tolerance=0.033, cap=1024)
    assert found.verdict == "small bias"
    assert found.detected
    assert abs(found.bias.value - 0.03) < 4 * found.bias.error
    assert "A bias was detected" in found.describe()
    assert "below the tolerance of 3.3 %" in found.describe()


def test_without_enough_replicates_it_says_so_and_the_number_it_asks_for_suffices():
    ours, naive = vectors(3, 0.0, 1.0)
    found = bias_test(ours, naive, stream(6), tolerance=0.2, cap=128)
    assert found.verdict == "cannot tell"
    assert 128 < found.needed < 10_000
    assert "Cannot tell yet: no bias was detected, but at most" in found.describe()
    assert "more replicates would show it below the tolerance, if there is none" in found.describe()
    enough = bias_test(ours, naive, stream(6), tolerance=0.2, cap=4 * (128 + found.needed))
    assert enough.verdict == "pass"
    assert enough.replicates < 4 * (128 + found.needed)


def test_a_mean_of_zero_has_no_relative_bias():
    found = bias_test(*vectors(2, 0.0, mean=0.0), stream(7), cap=128)
    assert found.verdict == "cannot tell"
    assert not found.mean_known
    assert found.upper == math.inf
    assert "cannot be told from 0" in found.describe()
    biased = bias_test(*vectors(2, 3.0, mean=0.0), stream(7), cap=128)
    assert biased.verdict == "fail"
    assert "Fail: the means differ, and" in biased.describe()


def test_equal_estimators_pass_at_once_and_rounding_is_no_bias():
    naive = vectors(3, 0.0)[1]
    same = bias_test(naive, naive, stream(8))
    assert (same.verdict, same.replicates, same.bias, same.upper) == ("pass", 64, Value(0.0, 0.0), 0.0)
    rounded = bias_test(lambda at: naive(at).float().double() * (1 + 1e-8), naive, stream(8))
    assert rounded.verdict == "pass"
    assert rounded.upper < 1e-6


def test_a_bias_that_only_the_last_look_sees_is_to_be_confirmed(monkeypatch):
    monkeypatch.setattr(bias, "exceeds", lambda gram, level, at: (1e-6, at.path[-1] == 128))
    found = bias_test(*vectors(2, 0.2), stream(9), cap=128)
    assert (found.verdict, found.suspected, found.needed) == ("cannot tell", True, 128)
    assert "only the last look says so" in found.describe()
    assert "About 130 more replicates would confirm it, or not." in found.describe()


def test_groups_are_means_of_consecutive_replicates_and_lose_none_when_they_merge():
    groups, rows = bias._Groups(), torch.arange(1024).double()[:, None, None].expand(1024, 2, 1)
    for row in rows:
        groups.add(row)
    d, naive = groups.means()
    assert len(d) == 256
    assert torch.equal(d, naive)
    assert torch.equal(d[:, 0], torch.arange(256).double() * 4 + 1.5)


def test_groups_and_projections_change_little_and_the_same_stream_gives_the_same_report(monkeypatch):
    ours, naive = vectors(6, 0.8, 1.0)
    plain = bias_test(ours, naive, stream(10), cap=512, tolerance=0.01)
    assert plain == bias_test(ours, naive, stream(10), cap=512, tolerance=0.01)
    monkeypatch.setattr(bias, "_GROUPS", 32)
    grouped = bias_test(ours, naive, stream(10), cap=512, tolerance=0.01)
    assert grouped.replicates == plain.replicates
    assert grouped.bias.value == pytest.approx(plain.bias.value, rel=0.1)
    assert grouped.scale.value == pytest.approx(plain.scale.value, rel=1e-2)
    monkeypatch.setattr(bias, "_LONGEST", 5)
    sketched = bias_test(ours, naive, stream(10), cap=512, tolerance=0.01)
    assert sketched.verdict == plain.verdict == "fail"
    assert sketched.bias.value == pytest.approx(plain.bias.value, rel=0.1)


def test_tuples_of_tensors_are_taken_and_nonsense_is_refused():
    ours, naive = vectors(4, 0.0)
    split = bias_test(lambda at: tuple(ours(at).split(2)), naive, stream(11), cap=128)
    assert isinstance(split, BiasReport)
    assert 2 <= len(split.describe().splitlines()) <= 4
    with pytest.raises(ValueError, match="give 3 and 4 numbers"):
        bias_test(lambda at: naive(at)[1:], naive, stream(0))
    with pytest.raises(ValueError, match=r"estimate of replicate 0 .* NaN"):
        bias_test(lambda at: naive(at) / 0, naive, stream(0))
    for options, match in (
        ({"tolerance": 0.0}, "tolerance"),
        ({"confidence": 1.0}, "confidence"),
        ({"false_alarm": 1e-6}, "false_alarm"),
        ({"cap": 100}, "cap of at least 128"),
    ):
        with pytest.raises(ValueError, match=match):
            bias_test(ours, naive, stream(0), **options)
    with pytest.raises(ValueError, match="with which estimator"):
        bias_test(TOY, naive, stream(0))


def test_a_square_below_zero_promises_no_more_than_zero_would():
    apart = torch.eye(64, dtype=torch.float64)
    apart = apart - apart.mean(0)  # the sum is 0, so that all products of different rows are negative together
    look = bias._Look((apart, torch.ones_like(apart)), 64, 0.95)
    assert look.square.value < 0
    assert look.upper == look._bound(1.0, 0.0) > 0
