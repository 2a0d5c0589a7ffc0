import math

import numpy as np
import pytest

from carv.density import uniform_steps
from carv.rng import stream
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.bootstrap import _resample, bootstrap
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.pilot import pilot
from carv.variance.predict import predict


def figure(samples):
    """The mean of what each render says, with its leave-one-out values."""
    n = len(samples)
    return Jackknifed(float(samples.mean()), (samples.sum() - samples) / (n - 1))


def ratio(a, b):
    return a / b


def simulated(rng, n=25):
    """Two figures of one pilot: means of skewed numbers that share a part, truth 3 and 1."""
    shared, own, other = (rng.exponential(size=n) for _ in range(3))
    return figure(2 * shared + own), figure((shared + other) / 2)


def covered(interval, truth):
    return interval[0] <= truth <= interval[1]


@pytest.mark.parametrize(
    ("function", "truth"),
    [(lambda a, b: a, 3.0), (ratio, 3.0), (lambda a, b: b - a, -2.0)],
    ids=["mean", "ratio", "difference"],
)
def test_intervals_cover_the_truth_as_often_as_they_say(function, truth):
    """600 pilots of 25 renders: coverage is known to 0.9 %; limits are 95 % -4 and +4 standard errors."""
    rng = np.random.default_rng(0)
    hits = [covered(bootstrap(function, *simulated(rng), stream=stream(i), resamples=500), truth) for i in range(600)]
    assert 0.914 < np.mean(hits) < 0.986


def test_each_side_misses_about_as_often_for_a_skewed_figure():
    """600 pilots: 2.5 % a side is known to 0.65 %; below 5.5 % on both. Symmetric intervals miss 8 % above."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(600):
        squares = rng.normal(size=25) ** 2
        found.append((*bootstrap(lambda a: a, figure(squares), stream=stream(i), resamples=500), squares))
    assert np.mean([high < 1 for _, high, _ in found]) < 0.055
    assert np.mean([low > 1 for low, _, _ in found]) < 0.055
    plain = [squares.mean() + 1.96 * squares.std(ddof=1) / 5 for _, _, squares in found]
    assert np.mean([high < 1 for high in plain]) > 0.07


def test_few_renders_have_the_wide_intervals_of_student_s_law():
    """400 pilots of 8 renders: coverage is known to 1.1 %. Without studentising it is about 88 %."""
    rng = np.random.default_rng(3)
    found = [bootstrap(lambda a: a, figure(rng.normal(size=8)), stream=stream(i), resamples=400) for i in range(400)]
    assert 0.915 < np.mean([covered(interval, 0.0) for interval in found]) < 0.99


def test_the_longer_side_is_the_one_of_the_longer_tail():
    rng = np.random.default_rng(4)
    sides = []
    for i in range(50):
        samples = rng.exponential(size=30) - 3  # negative, so that no logarithm is taken
        low, high = bootstrap(lambda a: a, figure(samples), stream=stream(i))
        sides.append(math.log((high - samples.mean()) / (samples.mean() - low)))
    assert 0.2 < np.mean(sides) < 1


def test_the_error_within_a_resample_is_the_standard_error_of_its_mean():
    pseudo = np.random.default_rng(5).normal(size=(1, 5))
    theta, error = _resample(lambda a: a, pseudo, 4000, np.random.default_rng(6))
    # Over resamples E se*^2 = (1 - 1/n) s^2 / n and Var theta* is the same.
    assert np.square(error).mean() == pytest.approx(pseudo.var() / 5, rel=0.05)
    assert theta.var() == pytest.approx(pseudo.var() / 5, rel=0.08)


def test_a_near_linear_figure_has_the_jackknife_s_interval():
    rng = np.random.default_rng(2)
    for i in range(5):
        a, b = figure(rng.normal(5, 1, 40)), figure(rng.normal(4, 1, 40))
        low, high = bootstrap(ratio, a, b, stream=stream(i))
        first, last = derived(ratio, a, b).interval()
        assert (high - low) / (last - first) == pytest.approx(1, abs=0.15)
        assert (low + high) / 2 == pytest.approx((first + last) / 2, abs=0.1 * (last - first))


def test_figures_of_a_pilot_get_the_same_renders_and_an_interval_like_the_jackknife_s():
    toy = GaussianToy(dim=4, gain_std=0.2)
    tables = pilot(toy, uniform_steps(20, 980), stream(3), renders=30, bins=8, vjp_batch=64)
    cells = [predict(tables, 1, k, None, coupling).variance for k, coupling in ((1, iid), (8, iid), (8, per_render))]

    def ecm(one, many):
        return one * 21.0 / (many * 28.0)

    low, high = bootstrap(ecm, cells[0], cells[2], stream=stream(4))
    paired = derived(ecm, cells[0], cells[2])
    assert low < paired.value < high
    assert math.log(high / low) / math.log(paired.interval()[1] / paired.interval()[0]) == pytest.approx(1, abs=0.3)
    # With renders of its own for each figure the ratio of two that nearly agree would be far less certain.
    alone = bootstrap(lambda a: a, cells[1], stream=stream(4))
    both = bootstrap(ratio, cells[1], cells[2], stream=stream(4))
    assert math.log(both[1] / both[0]) < 0.4 * math.log(alone[1] / alone[0])


def test_one_stream_gives_one_interval_and_blocks_of_memory_change_nothing(monkeypatch):
    a, b = simulated(np.random.default_rng(5))
    found = bootstrap(ratio, a, b, stream=stream(1))
    assert found == bootstrap(ratio, a, b, stream=stream(1))
    assert found != bootstrap(ratio, a, b, stream=stream(2))
    monkeypatch.setattr("carv.variance.bootstrap._AT_ONCE", 1000)
    assert bootstrap(ratio, a, b, stream=stream(1)) == found


def test_a_higher_level_gives_a_wider_interval_and_exact_figures_take_part():
    a, b = simulated(np.random.default_rng(6))
    narrow, wide = (bootstrap(ratio, a, b, stream=stream(1), level=level) for level in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    low, high = bootstrap(lambda x, c: c * x, a, Jackknifed(2.0), stream=stream(1))
    assert (low, high) == pytest.approx(tuple(2 * x for x in bootstrap(lambda x: x, a, stream=stream(1))))
    assert bootstrap(ratio, Jackknifed(4.0), Jackknifed(2.0), stream=stream(1)) == (2.0, 2.0)
    assert bootstrap(lambda x, y: x - y, a, a, stream=stream(1)) == (0.0, 0.0)


def test_a_figure_whose_resamples_leave_the_logarithm_has_an_interval_on_its_own_scale():
    samples = np.array([4.0, 1.0, -1.0, 3.0, 0.5, -0.5, 2.0, 2.5])
    low, high = bootstrap(lambda a: a, figure(samples), stream=stream(1))
    assert -math.inf < low < samples.mean() < high < math.inf


def test_what_cannot_be_resampled_is_refused():
    a = figure(np.arange(10.0))
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 1.5"):
        bootstrap(ratio, a, a, stream=stream(0), level=1.5)
    with pytest.raises(ValueError, match="needs at least 400 resamples"):
        bootstrap(ratio, a, a, stream=stream(0), resamples=100)
    with pytest.raises(ValueError, match="at least 4 renders, got 3"):
        bootstrap(lambda x: x, figure(np.arange(3.0)), stream=stream(0))
    with pytest.raises(ValueError, match="random projection"):
        bootstrap(lambda x: x, Jackknifed(1.0, np.arange(5.0), np.arange(4.0)), stream=stream(0))
    with pytest.raises(ValueError, match="number of renders"):
        bootstrap(ratio, a, figure(np.arange(5.0)), stream=stream(0))
    with pytest.raises(ValueError, match="not finite"), np.errstate(divide="ignore"):
        bootstrap(lambda x: x / np.float64(0.0), a, stream=stream(0))
