"""Running moments of vectors: the mean, the variance with its standard error, and how heavy the tails are."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv.variance.values import Value

_HEAVIEST = 0.01  # the share of the replicates whose share of the sum is looked at
TRUSTED_SHARE = 0.2
"""Of the top 1 %: a chi-squared law of one degree of freedom has 0.085, one whose variance is infinite above 0.2."""
_TRUSTED_ERROR = 0.2  # relative error of a standard error


@dataclass(frozen=True)
class TailCheck:
    """Whether a variance means anything: a few replicates may carry all of it.

    Attributes:
        count: n, replicates.
        kurtosis: E(y - E y)^4 / (Var y)^2 of y = |x - c|^2; 3 for a normal y, at most about n.
        top_share: the share of sum y that the largest 1 % of the replicates carry (at least one replicate);
            0.01 if all were equal, 0.056 for an exponential y, 0.085 for the square of a normal number.
    """

    count: int
    kurtosis: float
    top_share: float

    @property
    def error_of_error(self) -> float:
        """The relative error of the variance's standard error, 1/2 sqrt((kurtosis - 1) / n)."""
        return 0.5 * math.sqrt(max(0.0, self.kurtosis - 1) / self.count)

    @property
    def trusted(self) -> bool:
        """Whether the variance and its interval mean something: both measures are moderate."""
        return self.top_share <= TRUSTED_SHARE and self.error_of_error <= _TRUSTED_ERROR

    @property
    def verdict(self) -> str:
        """One sentence."""
        figures = (
            f"the top 1 % of {self.count} replicates carry {100 * self.top_share:.0f} % of the sum of squares and "
            f"the kurtosis is {self.kurtosis:.3g}"
        )
        if self.trusted:
            return f"The tails are moderate: {figures}."
        return f"The tails are too heavy for this variance or its interval to mean anything: {figures}."


def tail_check(squares: Float[Tensor, "n"]) -> TailCheck:
    """The check of y = |x - c|^2, one number for each replicate, n >= 2."""
    count, total = len(squares), float(squares.sum())
    if count < 2:
        raise ValueError(f"a tail check needs at least 2 replicates, got {count}")
    deviations = squares - squares.mean()
    spread = float(deviations.square().mean())
    heaviest = squares.topk(max(1, math.ceil(_HEAVIEST * count))).values
    # Without any spread all replicates count alike.
    kurtosis = float(deviations.pow(4).mean()) / spread**2 if spread > 0 else 1.0
    return TailCheck(count, kurtosis, float(heaviest.sum()) / total if total > 0 else _HEAVIEST)


class Moments:
    """Mean vector and scalar M2 of replicates x_1 .. x_n (Welford 1962), in float64:

        mean_n = mean_{n-1} + (x_n - mean_{n-1})/n,    M2_n = M2_{n-1} + (1 - 1/n) |x_n - mean_{n-1}|^2
        Var = M2 / (n - 1)                                                 an unbiased tr Cov of ONE replicate (Eq. 3)

    Parts merge with Chan, Golub and LeVeque's formula (1983), exactly but for rounding, however the replicates
    were split and in any order.

    The standard error of Var comes from y_i = |x_i - c|^2, where c is a fixed centre:  se^2 = Var(y)/n. The scalars
    y_i are kept, 8 bytes a replicate, so nothing is assumed of x: neither normality nor how many of its dimensions
    matter. With c = E x this is the exact leading term. With c a mean of m further replicates it is too large on
    average, by 4 tr(Cov^2)/(n m): for normal x the error is overstated by a factor sqrt(1 + 2/m), 3 % at m = 32.
    All parts that will be merged need the same c.

    Also kept is x_i . c, one more scalar, for the error of |mean|^2.

    Args:
        centre: `[D]`, c; any fixed vector near the mean, such as the mean of the first few replicates.
    """

    def __init__(self, centre: Tensor) -> None:
        if centre.ndim != 1:
            raise ValueError(f"the centre must be a vector, got shape {list(centre.shape)}")
        self.centre = centre.detach().to(torch.float64)
        self.count = 0
        self.mean = torch.zeros_like(self.centre)
        self.m2 = 0.0
        self._squares = array("d")
        self._projections = array("d")

    def update(self, x: Float[Tensor, "*n D"]) -> None:
        """Adds one replicate `[D]`, or n of them `[n, D]`.

        Raises:
            ValueError: a wrong shape; a NaN or an infinity, which would spoil all that came before.
        """
        if x.ndim not in (1, 2) or x.shape[-1:] != self.centre.shape:
            raise ValueError(
                f"replicates must have shape [D] or [n, D] with D = {len(self.centre)}, got {list(x.shape)}"
            )
        x = x.detach().to(self.centre)
        if x.ndim == 2:
            self._update_many(x)
            return
        from_centre = x - self.centre
        square, projection = float(from_centre.dot(from_centre)), float(x.dot(self.centre))
        _refuse_not_finite(square, self.count)
        self.count += 1
        delta = x - self.mean
        self.mean += delta / self.count
        self.m2 += float(delta.dot(delta)) * (1 - 1 / self.count)
        self._squares.append(square)
        self._projections.append(projection)

    def _update_many(self, x: Float[Tensor, "n D"]) -> None:
        if len(x) == 0:
            return
        squares = (x - self.centre).square().sum(1)
        _refuse_not_finite(float(squares.sum()), self.count)
        part = Moments(self.centre)
        part.count, part.mean = len(x), x.mean(0)
        part.m2 = float((x - part.mean).square().sum())
        part._squares.extend(squares.tolist())
        part._projections.extend((x @ self.centre).tolist())
        merged = self.merge(part)
        self.count, self.mean, self.m2 = merged.count, merged.mean, merged.m2
        self._squares, self._projections = merged._squares, merged._projections

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of replicates together; neither is changed.

            M2 = M2_a + M2_b + |mean_b - mean_a|^2 n_a n_b/(n_a + n_b)

        Raises:
            ValueError: parts about different centres.
        """
        if not torch.equal(self.centre, other.centre):
            raise ValueError("moments about different centres cannot be merged; give all parts the centre of the first")
        merged = Moments(self.centre)
        merged.count = self.count + other.count
        if merged.count:
            delta, share = other.mean - self.mean, other.count / merged.count
            merged.mean = self.mean + delta * share
            merged.m2 = self.m2 + other.m2 + float(delta.dot(delta)) * self.count * share
        merged._squares = self._squares + other._squares
        merged._projections = self._projections + other._projections
        return merged

    @property
    def variance(self) -> Value:
        """tr Cov of one replicate, unbiased, with its standard error.

        Raises:
            ValueError: fewer than two replicates.
        """
        self._need_two()
        return Value(self.m2 / (self.count - 1), _error_of_mean(self.squares))

    @property
    def mean_norm_squared(self) -> Value:
        """|E x|^2 without the noise of the mean: |mean|^2 - Var/n, unbiased (so it may be negative).

        Its standard error is 2 sd(x . c)/sqrt(n), whose c carries noise of its own: that covers what is left at
        |E x| = 0.
        """
        value = float(self.mean.dot(self.mean)) - self.variance.value / self.count
        return Value(value, 2 * _error_of_mean(_sorted(self._projections)))

    @property
    def squares(self) -> Float[Tensor, "n"]:
        """|x_i - c|^2, sorted: the same numbers in the same order, however the replicates were split."""
        return _sorted(self._squares)

    @property
    def in_order(self) -> Float[Tensor, "n"]:
        """|x_i - c|^2 in the order in which the replicates came, merged parts one after the other."""
        return torch.tensor(self._squares, dtype=torch.float64)

    @property
    def tails(self) -> TailCheck:
        """How heavy the tails of |x - c|^2 are: to be shown beside every variance."""
        return tail_check(self.squares)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int | float]]:
        """All of it, as tensors for safetensors and numbers for JSON; `Moments.restore` takes them."""
        tensors = {
            "mean": self.mean.clone(),
            "centre": self.centre.clone(),
            "squares": torch.tensor(self._squares, dtype=torch.float64),
            "projections": torch.tensor(self._projections, dtype=torch.float64),
        }
        return tensors, {"count": self.count, "m2": self.m2}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, int | float]) -> Moments:
        """What `state` gave, bit for bit.

        Raises:
            ValueError: the parts do not belong together.
        """
        moments = cls(tensors["centre"])
        moments.mean, moments.count, moments.m2 = tensors["mean"].clone(), int(numbers["count"]), float(numbers["m2"])
        moments._squares = array("d", tensors["squares"].tolist())
        moments._projections = array("d", tensors["projections"].tolist())
        if not moments.count == len(moments._squares) == len(moments._projections):
            raise ValueError(
                f"saved moments say {moments.count} replicates and hold {len(moments._squares)} squares and "
                f"{len(moments._projections)} projections"
            )
        return moments

    def _need_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 replicates, got {self.count}")


def _error_of_mean(numbers: Float[Tensor, "n"]) -> float:
    return float(numbers.std()) / math.sqrt(len(numbers))


def _sorted(numbers: array[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).sort().values


def _refuse_not_finite(square: float, before: int) -> None:
    if not math.isfinite(square):
        raise ValueError(f"a replicate after the first {before} holds a NaN or an infinity, or overflows when squared")
