"""A number with its standard error, printed as physicists do: `2.63(8)`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

NORMAL_95 = 1.959963984540054
"""The 97.5 % point of the standard normal law."""

# Errors whose first two digits are below this keep both: rounding 0.014 to 0.01 would change it by 40 %.
_TWO_DIGITS_BELOW = 30
_FIXED_FROM, _FIXED_TO = -4, 6  # powers of ten that are printed without an exponent


@dataclass(frozen=True)
class Value:
    """A measured number and its standard error.

    Printed with as many digits as the error allows: value(error in units of the last digit), with two digits of
    the error when they are below 30 and one otherwise, and a decimal point where the error has one.

    Attributes:
        value: the number, in any unit.
        error: one standard error in the same unit, >= 0. 0: exact. Infinite or NaN: not known.

    Raises:
        ValueError: a negative error.

    Example:
        >>> print(Value(2.6312, 0.081), Value(12.31, 1.4), Value(2.6e6, 3e5), Value(1.00181, 0.0022))
        2.63(8) 12.3(1.4) 2.6(3)e6 1.0018(22)
    """

    value: float
    error: float

    def __post_init__(self) -> None:
        # numpy's floats print as "np.float64(...)", which is no number to `Decimal`.
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "error", float(self.error))
        if self.error < 0:
            raise ValueError(f"a standard error is at least 0, got {self.error}")

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.value}"
        if not math.isfinite(self.error):
            return f"{self.value:.3g}({self.error})"
        if self.error == 0:
            return f"{self.value:.6g}(0)"
        last = _last_digit(self.error)
        value, error = _round(self.value, last), _round(self.error, last)
        top = max(part.adjusted() for part in (value, error) if part)
        if _FIXED_FROM <= top < _FIXED_TO:
            return _digits(value, error, last)
        return f"{_digits(value.scaleb(-top), error.scaleb(-top), last - top)}e{top}"

    def times(self) -> str:
        """Printed as a factor: `2.63(8)x`."""
        return f"{self}x"

    @property
    def relative_error(self) -> float:
        """error / |value|; 0 for an exact zero, infinite for a zero that is not exact."""
        if self.value == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / abs(self.value)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a normal law, value -+ 1.96 error."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error

    def scaled(self, factor: float) -> Value:
        """The value in another unit: both numbers times the factor."""
        return Value(self.value * factor, self.error * abs(factor))


def ratio(numerator: Value, denominator: Value, correlation: float = 0.0) -> Value:
    """a / b, with its error to first order (the delta method):

        Var(a/b) = (Var a - 2 (a/b) Cov(a, b) + (a/b)^2 Var b) / b^2

    Good while b's relative error is small, below about 0.2; beyond it the law of a ratio is skewed.

    Args:
        numerator, denominator: a and b.
        correlation: between the errors of a and b, from -1 to 1; 0 for independent measurements.

    Raises:
        ValueError: b = 0; a correlation out of range.
    """
    if denominator.value == 0:
        raise ValueError("a ratio needs a denominator that is not 0")
    if not -1 <= correlation <= 1:
        raise ValueError(f"a correlation lies between -1 and 1, got {correlation}")
    quotient = numerator.value / denominator.value
    scaled = quotient * denominator.error
    if not (math.isfinite(scaled) and math.isfinite(numerator.error)):
        return Value(quotient, numerator.error + abs(scaled))  # infinite, or NaN if one of them is
    # Rounding can leave less than zero where the errors cancel: correlation 1 and equal relative errors.
    variance = max(0.0, numerator.error**2 - 2 * correlation * numerator.error * scaled + scaled**2)
    return Value(quotient, math.sqrt(variance) / abs(denominator.value))


def _last_digit(error: float) -> int:
    """The power of ten of the last digit that is printed."""
    leading = Decimal(error).adjusted()
    two = int(_round(error, leading - 1).scaleb(1 - leading))
    # From 95 the error rounds up to the next power of ten, of which two digits are kept: 0.097 -> 0.10.
    return leading if _TWO_DIGITS_BELOW <= two < 95 else leading + (two >= 95) - 1


def _round(number: float, last: int) -> Decimal:
    # Of the shortest text that means the number, so that 0.25 +- 0.3 follows what the reader sees.
    unit = Decimal(1).scaleb(last)
    return (Decimal(repr(number)) / unit).quantize(Decimal(1), rounding=ROUND_HALF_EVEN) * unit


def _digits(value: Decimal, error: Decimal, last: int) -> str:
    decimals = max(0, -last)
    text = f"{value:.{decimals}f}" if value else f"{0:.{decimals}f}"  # no "-0.0"
    if decimals == 0 or error >= 1:
        return f"{text}({error:.{decimals}f})"
    return f"{text}({int(error.scaleb(decimals))})"
