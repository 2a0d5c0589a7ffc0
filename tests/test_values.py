import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carv.variance.values import Value, ratio


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (2.6312, 0.081, "2.63(8)"),
        (1.00181, 0.0022, "1.0018(22)"),
        (12.31, 1.4, "12.3(1.4)"),
        (2.6e6, 3e5, "2.6(3)e6"),
        (-2.6312, 0.081, "-2.63(8)"),
        (-0.001, 0.3, "0.0(3)"),
        (0.02, 1.4, "0.0(1.4)"),
        (0.0, 0.081, "0.00(8)"),
        (123.4, 14.2, "123(14)"),
        (250.3, 31.0, "250(30)"),
        (12345.0, 140.0, "12340(140)"),
        (1234567.0, 1400.0, "1.2346(14)e6"),
        (2.63e-5, 8.1e-7, "2.63(8)e-5"),
        (0.00263, 0.00008, "0.00263(8)"),
        (1e-9, 3e-7, "0(3)e-7"),
        (1.0, 0.0955, "1.00(10)"),
        (1.0, 0.0296, "1.00(3)"),
        (1.0, 0.0294, "1.000(29)"),
        (99.97, 0.3, "100.0(3)"),
        (999999.7, 0.3, "999999.7(3)"),
        (7.0, 1.0, "7.0(1.0)"),
        (7.0, 30.0, "10(30)"),
        (3.0, 0.0, "3(0)"),
        (2.6312, math.inf, "2.63(inf)"),
        (2.6312, math.nan, "2.63(nan)"),
        (math.nan, 0.1, "nan"),
        (-math.inf, 0.1, "-inf"),
    ],
)
def test_precision_follows_the_error(value, error, text):
    assert str(Value(value, error)) == text


def expanded(text):
    """What a reader takes `1.23(4)e5` to mean."""
    body, _, exponent = text.partition("e")
    value, _, error = body.rstrip(")").partition("(")
    unit = 1.0 if "." in error else 10.0 ** -len(value.partition(".")[2])
    scale = 10.0 ** int(exponent or 0)
    return float(value) * scale, float(error) * unit * scale


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e9))
def test_the_printed_text_says_the_number_within_a_fraction_of_its_error(value, error):
    read, read_error = expanded(str(Value(value, error)))
    assert abs(read - value) <= 0.2 * error + 1e-14 * abs(value)
    assert read_error == pytest.approx(error, rel=0.17)


def test_a_negative_error_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        Value(1.0, -0.1)


def test_numbers_of_numpy_print_as_those_of_python():
    assert str(Value(np.float64(2.6312), np.float64(0.081))) == "2.63(8)"


def test_a_factor_is_printed_with_an_x():
    assert Value(2.6312, 0.081).times() == "2.63(8)x"


def test_the_interval_is_1_96_errors_each_way():
    assert Value(1.0, 0.5).interval() == pytest.approx((1 - 0.98, 1 + 0.98), abs=1e-4)


def test_relative_errors_of_zero_are_zero_or_unknown():
    assert Value(0.0, 0.0).relative_error == 0
    assert Value(0.0, 0.1).relative_error == math.inf
    assert Value(-2.0, 0.1).relative_error == 0.05


def test_a_ratio_follows_the_delta_method():
    found = ratio(Value(6.0, 0.3), Value(2.0, 0.2))
    assert found.value == 3
    assert found.error == pytest.approx(3 * math.hypot(0.05, 0.1))
    assert ratio(Value(0.0, 0.3), Value(2.0, 0.2)).error == pytest.approx(0.15)
    assert ratio(Value(1.0, math.inf), Value(2.0, 0.2)).error == math.inf


def test_errors_that_a_and_b_share_cancel_in_their_ratio():
    assert ratio(Value(6.0, 0.3), Value(2.0, 0.1), correlation=1.0).error == pytest.approx(0, abs=1e-9)
    worse = ratio(Value(6.0, 0.3), Value(2.0, 0.1), correlation=-1.0)
    assert worse.error == pytest.approx(0.3)


def test_a_ratio_to_zero_is_refused():
    with pytest.raises(ValueError, match="not 0"):
        ratio(Value(1.0, 0.1), Value(0.0, 0.1))
    with pytest.raises(ValueError, match="correlation"):
        ratio(Value(1.0, 0.1), Value(1.0, 0.1), correlation=1.1)
