"""Does an estimator have the same expectation as the naive one? A test that can fail, pass, or say what it lacks.

Both estimators are called with the SAME stream for each replicate, so that they may share upstream randomness; then
d_i = ours_i - naive_i are independent vectors, and E d = 0 is what is tested.

    T = sum_{i != j} <d_i, d_j> / (n (n - 1)),        E T = |bias|^2        relative to |mu|^2, the same of naive_i

A bias is detected where T is too large for its law under random signs, s_i d_i (Wu 1986; Mammen 1993): a few
directions or replicates that carry most of the variance are in that law too. Signs are exact for symmetric d, and
optimistic for skewed ones while n is small, so a bias counts only when two looks in a row see it. Replicates are kept
as at most 256 means of consecutive groups, which loses less than 1 % of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from carv.rng import Stream
from carv.variance.bias_report import BiasReport, Verdict
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.measure import Estimator, replicate_of
from carv.variance.null_law import Spread, exceeds, spread_of
from carv.variance.projection import Projection
from carv.variance.values import Value

__all__ = ["BiasReport", "bias_test"]

_FIRST_LOOK = 64
_GROUPS = 256
_LONGEST = 1 << 18  # longer vectors are projected: 256 of them, twice, would take more than 1 GiB
_SKETCH = 1 << 16
_ROUNDING = 1e-6  # of the estimates' size; float32 sums in another order differ by about 1e-7
_RAREST = 1e-5  # its sign flips take about 20 s at each look that sees a bias
_FURTHEST = 1e6  # how many times the replicates so far an extrapolation goes


def bias_test(
    ours: Estimator,
    naive: Estimator,
    stream: Stream,
    *,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    false_alarm: float = 0.001,
    cap: int = 4096,
) -> BiasReport:
    """Whether E ours = E naive, from replicates until there is a verdict.

    Looks are at n = 64, 128, 256, ... replicates. `false_alarm` and 1 - `confidence` are spread evenly over all looks
    up to the cap, so that they hold for the test as a whole. It ends with the first look that has a verdict; a bias
    that is detected but seems smaller than the tolerance is measured on, to know on which side it is. What no
    replicate shows, no test sees: where the mean of d rests on events rarer than a few in n, it is not tested.

    The bound takes the bias to lie where d varies most, the worst case. Vectors longer than 262,144 are replaced by
    an unbiased random projection to 65,536 numbers: an error of 0.6 % in |bias|^2 and |mu|^2 that is not in the
    intervals, and nothing in false alarms.

    Args:
        ours, naive: callables of a stream, a tensor or a tuple of tensors, as for `measure`; both get
            `stream.child("replicate", i)`. The more of its randomness they use alike, the fewer replicates are needed.
        stream: of the test.
        tolerance: of |bias| / |mu|, > 0.
        confidence: of the upper bound.
        false_alarm: the probability that an estimator without bias is called biased, in all; at least 1e-5.
        cap: no more than so many replicates, >= 128; the last look is at the largest 64, 128, ... that it allows.

    Raises:
        ValueError: an option out of range; a pipeline instead of a callable; estimates of different lengths, or one
            that is not finite.
    """
    for name, value, least in (("confidence", confidence, 0.0), ("false_alarm", false_alarm, _RAREST)):
        if not least <= value < 1 or value == 0:
            raise ValueError(f"{name} must be in ({least:g}, 1), got {value:g}")
    if not tolerance > 0:
        raise ValueError(f"the tolerance of a bias, relative to |mu|, must be positive, got {tolerance}")
    if cap < 2 * _FIRST_LOOK:
        raise ValueError(f"a bias test needs a cap of at least {2 * _FIRST_LOOK} replicates, got {cap}")
    looks = [_FIRST_LOOK << k for k in range(int(math.log2(cap / _FIRST_LOOK)) + 1)]
    groups, rows = _Groups(), _rows(ours, naive, stream)
    seen, detected, suspected = False, False, False
    for n in looks:
        while groups.count < n:
            groups.add(next(rows))
        found = _Look(groups.means(), n, 1 - (1 - confidence) / len(looks))
        p_value, larger = exceeds(found.gram, false_alarm / len(looks), stream.child("signs", n))
        seen, before = larger and not found.is_rounding, seen
        detected = detected or (seen and before)
        suspected = seen and not detected
        verdict = _verdict(found, detected, suspected, tolerance, last=n == looks[-1])
        if verdict is not None:
            break
    assert verdict is not None  # the last look has one
    open_question = found.needed(tolerance) if verdict == "cannot tell" else None
    return BiasReport(
        verdict,
        found.bias,
        found.upper,
        found.scale,
        found.along if detected else math.nan,
        n,
        n if suspected else open_question,
        suspected,
        p_value,
        found.mean_known,
        tolerance,
        confidence,
        false_alarm,
    )


def _verdict(found: _Look, detected: bool, suspected: bool, tolerance: float, last: bool) -> Verdict | None:
    if found.upper < tolerance and not suspected:
        return "small bias" if detected else "pass"
    if detected and (last or (found.mean_known and found.bias.value >= tolerance)):
        return "fail"
    return "cannot tell" if last else None


def _rows(ours: Estimator, naive: Estimator, stream: Stream) -> Iterator[Tensor]:
    """(d_i, naive_i) `[2, D]` for i = 0, 1, ..., projected if they are long."""
    first, second = replicate_of(ours, None), replicate_of(naive, None)
    keep: Callable[[Tensor], Tensor] | None = None
    i = 0
    while True:
        at = stream.child("replicate", i)
        a, b = first(at).gradient, second(at).gradient
        if a.shape != b.shape:
            raise ValueError(f"the two estimators give {len(a)} and {len(b)} numbers; their means cannot be equal")
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"an estimate of replicate {i} of {stream} holds a NaN or an infinity")
        if keep is None:
            keep = _sketch(stream) if len(a) > _LONGEST else torch.clone
        yield keep(torch.stack([a - b, b])).cpu()
        i += 1


def _sketch(stream: Stream) -> Callable[[Tensor], Tensor]:
    projection = Projection(_SKETCH, 2, stream.child("projection"))
    return lambda vectors: projection(vectors).flatten(1) / math.sqrt(projection.blocks)


class _Groups:
    """Means of consecutive groups of equally many replicates; two groups become one when there are too many."""

    def __init__(self) -> None:
        self.count, self._size = 0, 1
        self._means: list[Tensor] = []
        self._open: list[Tensor] = []

    def add(self, row: Tensor) -> None:
        if len(self._means) == _GROUPS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2
        self.count += 1
        self._open = [self._open[0] + row] if self._open else [row]
        if self.count % self._size == 0:
            self._means.append(self._open.pop() / self._size)

    def means(self) -> tuple[Tensor, Tensor]:
        """Of d and of naive, `[m, D]` each."""
        both = torch.stack(self._means)
        return both[:, 0], both[:, 1]


class _Look:
    """All that is known after n replicates; z is the one-sided normal quantile of the confidence."""

    def __init__(self, means: tuple[Tensor, Tensor], n: int, confidence: float) -> None:
        d, naive = means
        self.replicates = n
        self.gram = d @ d.T
        self.square = _distinct(self.gram)  # T
        self.mean_square = _distinct(naive @ naive.T)  # of |mu|^2
        self.product = _distinct(d @ naive.T)  # of <bias, mu>
        self.spread: Spread = spread_of(self.gram, confidence)
        self.is_rounding = float(d.square().sum()) <= _ROUNDING**2 * float(naive.square().sum())

    @property
    def mean_known(self) -> bool:
        return self.mean_square.value > self.spread.z * self.mean_square.error

    @property
    def bias(self) -> Value:
        square, error, mean = max(self.square.value, 0.0), self.square.error, self.mean_square.value
        if mean <= 0:
            return Value(math.inf if square > 0 else math.nan, math.inf)
        # Half the distance of the roots: sqrt(error) where the square is about 0, to first order elsewhere.
        half = (math.sqrt(square + error) - math.sqrt(max(square - error, 0.0))) / 2
        value = math.sqrt(square / mean)
        return Value(value, math.hypot(half / math.sqrt(mean), value * self.mean_square.error / (2 * mean)))

    @property
    def upper(self) -> float:
        # A T below 0 is chance: it must not promise more than T = 0 would.
        return self._bound(1.0, max(self.square.value, 0.0))

    def _bound(self, factor: float, square: float) -> float:
        """Of |bias| / |mu|, with `factor` times the replicates; both parts at their worst at once."""
        bias = self.spread.upper(square, factor)
        mean = self.mean_square.value - self.spread.z * self.mean_square.error / math.sqrt(factor)
        return 0.0 if bias == 0 else math.inf if mean <= 0 else bias / math.sqrt(mean)

    @property
    def scale(self) -> Value:
        if self.mean_square.value == 0:
            return Value(math.nan, math.inf)
        return derived(lambda product, mean: 1 + product / mean, self.product, self.mean_square).measured

    @property
    def along(self) -> float:
        if self.mean_square.value <= 0 or self.square.value <= 0:
            return math.nan
        return min(1.0, self.product.value**2 / (self.mean_square.value * self.square.value))

    def needed(self, tolerance: float) -> int | None:
        """How many more replicates bring the bound below the tolerance, if T was 0."""
        low, high = 1.0, _FURTHEST
        if self.mean_square.value <= 0 or self._bound(high, 0.0) >= tolerance:
            return None
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self._bound(middle, 0.0) < tolerance else (middle, high)
        return max(1, math.ceil(self.replicates * (high - 1)))


def _distinct(gram: Tensor) -> Jackknifed:
    """The mean over i != j of a matrix of products, and what it is without each i."""
    m, off = len(gram), gram - gram.diagonal().diag()
    total, own = off.sum(), off.sum(0) + off.sum(1)
    return Jackknifed(float(total / (m * (m - 1))), ((total - own) / ((m - 1) * (m - 2))).numpy())
