import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carv.rng import Stream
from carv.variance.cost import fit_cost
from carv.variance.efficiency import Point, comparable, ecm, pareto_front, relative_efficiency
from carv.variance.jackknife import Jackknifed
from carv.variance.values import Value

POSITIVE = st.floats(0.01, 100)


def point(variance, cost, error=0.0, name="x"):
    figure = variance if isinstance(variance, Jackknifed) else Value(variance, error)
    return Point(name, figure, Value(cost, 0.0))


def pilot(*means, renders=60, shared=0.3, own=0.01):
    """Variances whose renders move together: each uncertain, their ratios not."""
    rng = np.random.default_rng(3)
    common = rng.normal(0, shared, renders)
    figures = []
    for mean in means:
        x = mean * np.exp(common + rng.normal(0, own, renders))
        figures.append(Jackknifed(float(x.mean()), (x.sum() - x) / (renders - 1)))
    return figures


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_both_anchors_equal_vb_cb_over_vm_cm_where_variance_is_1_over_r_and_cost_is_r(v_b, c_b, v_m, c_m):
    curve = [point(v_b / r, c_b * r) for r in (1, 2, 4, 8)]
    other = [point(v_m / r, c_m * r) for r in (1, 2, 4, 8)]
    for anchor in ("method", "baseline"):
        found = ecm(curve[0], other[1], anchor=anchor, baseline_curve=curve, method_curve=other)
        assert found.value.value == pytest.approx(v_b * c_b / (v_m * c_m), rel=1e-9)


def test_anchors_differ_where_the_baseline_does_not_scale():
    # The baseline's cost has an offset of 6, so that it is relatively cheaper at the method's small variance.
    curve = [point(8.0 / r, 6 + 2 * r) for r in (1, 2, 4, 8)]
    method = point(2.0, 4.0)
    at_method = ecm(curve[0], method, anchor="method", baseline_curve=curve)
    at_baseline = ecm(curve[0], method, anchor="baseline", baseline_curve=curve)
    assert at_method.value.value == pytest.approx(14 / 4)
    assert at_baseline.value.value == pytest.approx(8 / (4 * 2 / 8))
    assert (at_method.extrapolated, at_baseline.extrapolated) == (False, True)


def test_interpolation_is_straight_in_the_logarithms():
    curve = [point(4.0, 1.0), point(1.0, 9.0)]
    found = ecm(curve[0], point(2.0, 1.0), anchor="method", baseline_curve=curve)
    assert found.value.value == pytest.approx(3.0)


@pytest.mark.parametrize(("variance", "cost"), [(0.5, 18.0), (8.0, 0.5)])
def test_beyond_its_ends_a_curve_has_slope_minus_one_and_it_is_said(variance, cost):
    curve = [point(4.0, 1.0), point(1.0, 9.0)]
    found = ecm(curve[0], point(variance, 1.0), anchor="method", baseline_curve=curve)
    assert found.value.value == pytest.approx(cost)
    assert found.extrapolated
    assert "extrapolated" in found.describe()


def test_an_ecm_names_what_it_means_and_prints_as_a_factor():
    found = ecm(point(2.63, 1.0, 0.08, "uniform"), point(1.0, 1.0, 0, "ours"), cost="teacher calls")
    assert str(found) == "2.63(8)x"
    assert found.describe().startswith("2.63(8)x: ours against uniform, teacher calls at the baseline's variance")


def test_errors_of_independent_variances_and_costs_add_in_quadrature():
    baseline = Point("b", Value(6.0, 0.6), Value(1.0, 0.05))
    method = Point("m", Value(2.0, 0.1), Value(1.0, 0.02))
    found = ecm(baseline, method)
    assert found.value.error == pytest.approx(3 * math.sqrt(0.1**2 + 0.05**2 + 0.05**2 + 0.02**2), rel=1e-6)
    low, high = found.interval
    assert low * high == pytest.approx(9.0)  # symmetric about 3 on the scale of the logarithm, or nearly
    assert low < 3 < high


def test_an_error_at_a_point_of_the_curve_counts_by_its_weight_in_the_interpolation():
    curve = [point(4.0, 1.0), point(1.0, 4.0, 0.1)]
    found = ecm(curve[0], point(2.0, 1.0), anchor="method", baseline_curve=curve)
    # log C = log 4 * (log 4 - log V) / (log 4 - log v2), so d log C / d log v2 = 1/2 at V = 2.
    assert found.value.relative_error == pytest.approx(0.1 / 2, rel=1e-4)


def test_figures_of_one_pilot_are_paired():
    a, b = pilot(4.0, 1.0)
    paired = ecm(point(a, 1.0), point(b, 2.0))
    apart = ecm(Point("a", a.measured, Value(1.0, 0.0)), Point("b", b.measured, Value(2.0, 0.0)))
    assert paired.value.value == pytest.approx(apart.value.value)
    assert paired.value.error < apart.value.error / 10
    gain = relative_efficiency(a, b)
    assert paired.value.error == pytest.approx(gain.error / 2)
    assert relative_efficiency(a.measured, b.measured).error > 10 * gain.error


def test_an_error_that_is_not_known_stays_so():
    found = ecm(point(3.0, 1.0, math.inf), point(1.0, 1.0))
    assert found.value.error == math.inf
    assert found.interval == (0.0, math.inf)
    unsure = Jackknifed(1.0, np.array([2.0, 1.0, -1.0]))
    assert ecm(point(3.0, 1.0), point(unsure, 1.0)).value.error == math.inf


def test_a_variance_or_a_cost_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive"):
        ecm(point(-1.0, 1.0), point(1.0, 1.0))
    with pytest.raises(ValueError, match="positive"):
        ecm(point(1.0, 1.0), point(1.0, 0.0))
    with pytest.raises(ValueError, match="not 0"):
        relative_efficiency(Value(1.0, 0.1), Value(0.0, 0.1))


def test_overlapping_figures_are_not_ranked_unless_pairing_tells_them_apart():
    assert not comparable(Value(1.0, 0.1), Value(1.2, 0.1))
    assert comparable(Value(1.0, 0.05), Value(1.2, 0.05))
    a, b = pilot(1.0, 1.05)
    assert not comparable(a.measured, b.measured)
    assert comparable(a, b)
    assert not comparable(a, a)


def test_exact_figures_are_ranked_unless_equal_and_unknown_ones_never():
    assert comparable(Jackknifed(1.0), Jackknifed(1.001))
    assert not comparable(Jackknifed(1.0), Jackknifed(1.0 + 1e-13))
    assert not comparable(Value(1.0, math.nan), Value(5.0, 0.0))
    assert not comparable(Value(math.inf, 0.0), Value(1.0, 0.0))


def test_the_front_has_what_no_other_point_beats():
    points = [point(4.0, 1.0), point(2.0, 2.0), point(3.0, 2.0), point(2.0, 3.0), point(1.0, 4.0)]
    assert pareto_front(points) == [points[0], points[1], points[4]]


def test_a_point_that_may_be_on_the_front_is_left_out_only_by_a_clearly_better_one():
    points = [point(2.0, 1.0, 0.2), point(2.1, 2.0, 0.2), point(4.0, 3.0, 0.2)]
    assert pareto_front(points) == points[:1]
    assert pareto_front(points, clearly=True) == points[:2]


def test_costs_of_one_model_err_together():
    model = fit_cost(
        {cell: Value(1 + 5 * cell[0] + cell[0] * cell[1], 0.5) for cell in ((1, 1), (1, 8), (2, 1), (4, 4))}
    )
    one = Point("one", Value(4.0, 0.0), model.predict(1, 1))
    same = ecm(one, Point("same", Value(2.0, 0.0), model.predict(1, 1)))
    assert same.value.value == pytest.approx(2.0)
    assert same.value.error == pytest.approx(0.0, abs=1e-9)
    # Against costs drawn from the model's own law: the spread of their ratio.
    rng = np.random.default_rng(0)
    covariance = np.array(model.covariance)
    drawn = rng.multivariate_normal([1, 5, 1], covariance, 20_000)
    ratios = (drawn @ [1, 1, 1]) / (drawn @ [1, 1, 8])
    found = ecm(one, Point("other", Value(4.0, 0.0), model.predict(1, 8)))
    assert found.value.error == pytest.approx(ratios.std(), rel=0.05)
    apart = ecm(one, Point("other", Value(4.0, 0.0), Value(model.predict(1, 8).value, model.predict(1, 8).error)))
    assert apart.value.error > 1.2 * found.value.error


def test_the_interval_can_be_bootstrapped_and_agrees_with_the_jackknifes():
    one, other = (Point("x", figure, Value(1.0, 0.0)) for figure in pilot(4.0, 1.0))
    plain, resampled = ecm(one, other), ecm(one, other, resample=Stream(0))
    assert resampled.value == plain.value
    assert resampled.interval != plain.interval
    assert resampled.interval == ecm(one, other, resample=Stream(0)).interval
    for a, b in zip(plain.interval, resampled.interval, strict=True):
        assert a - plain.value.value == pytest.approx(b - plain.value.value, rel=0.3)
    exact = ecm(point(4.0, 1.0), point(1.0, 2.0), resample=Stream(0))
    assert exact.interval == pytest.approx((exact.value.value, exact.value.value))
