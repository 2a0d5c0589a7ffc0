"""What an estimate costs: steps timed side by side, and a model of the time in R and K."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carv.rng import Stream
from carv.variance.memory import PeakMemory
from carv.variance.values import NORMAL_95, Value, ratio

_FEWEST = 6  # with fewer repetitions even the whole range covers the median with less than 95 %


@dataclass(frozen=True)
class StepCost:
    """The wall-clock of one step, in seconds.

    Attributes:
        median: of the repetitions.
        low, high: a 95 % interval of the median, two order statistics: true for any law of the times.
        times: of the repetitions, in the order of the rounds, so that those of two steps pair up.
        peak_bytes: the most memory of any repetition, see `carv.variance.memory.PeakMemory`; None where unknown.
    """

    median: float
    low: float
    high: float
    times: tuple[float, ...]
    peak_bytes: int | None

    @property
    def repetitions(self) -> int:
        """How many there were."""
        return len(self.times)

    @property
    def seconds(self) -> Value:
        """The median with a standard error: the interval's width over 2 x 1.96."""
        return Value(self.median, (self.high - self.low) / (2 * NORMAL_95))


def measure_cost(
    steps: Mapping[str, Callable[[], object]],
    stream: Stream,
    *,
    repetitions: int = 31,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, StepCost]:
    """Times some steps side by side.

    Each repetition runs every step once, in a random order, so that a machine that drifts (clock rates, neighbours,
    heat) slows all steps alike and none is always second. On an accelerator each is timed from an idle device to
    an idle device.

    Args:
        steps: name -> the step, without arguments.
        stream: of the order.
        repetitions: of each step, at least 6.
        warmup: runs of each step beforehand, not timed: kernels are chosen and caches filled in the first ones.
        device: where the steps run.
        clock: seconds.

    Raises:
        ValueError: no steps; too few repetitions.
    """
    if not steps or repetitions < _FEWEST or warmup < 0:
        raise ValueError(
            f"timing needs at least one step, {_FEWEST} repetitions and warmup >= 0, got {len(steps)}, "
            f"{repetitions} and {warmup}"
        )
    device, names = torch.device(device), list(steps)
    rng = stream.generator()
    for name in names:
        for _ in range(warmup):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    peak: dict[str, int | None] = dict.fromkeys(names)
    for _ in range(repetitions):
        for i in torch.randperm(len(names), generator=rng).tolist():
            seconds, held = _timed(steps[names[i]], device, clock)
            times[names[i]].append(seconds)
            if held is not None:
                peak[names[i]] = max(peak[names[i]] or 0, held)
    return {name: _summary(times[name], peak[name]) for name in names}


def _timed(step: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> tuple[float, int | None]:
    accelerated = device.type != "cpu"
    memory = PeakMemory(device)
    memory.start()
    if accelerated:
        torch.accelerator.synchronize(device)
    begin = clock()
    step()
    if accelerated:
        torch.accelerator.synchronize(device)
    seconds = clock() - begin
    return seconds, memory.bytes()


def _summary(times: list[float], peak_bytes: int | None) -> StepCost:
    middle, low, high = _median(times)
    return StepCost(middle, low, high, tuple(times), peak_bytes)


def speedup(slow: StepCost, fast: StepCost) -> Value:
    """How many times faster one step is than another: the median over rounds of slow/fast.

    Within a round both met the same machine, so this is tighter than a ratio of medians. Its standard error is the
    width of the 95 % interval over 2 x 1.96.

    Args:
        slow, fast: of one call of `measure_cost`.

    Raises:
        ValueError: different numbers of rounds.
    """
    if slow.repetitions != fast.repetitions:
        raise ValueError(f"the steps were not timed together: {slow.repetitions} and {fast.repetitions} rounds")
    middle, low, high = _median([a / b for a, b in zip(slow.times, fast.times, strict=True)])
    return Value(middle, (high - low) / (2 * NORMAL_95))


def _median(numbers: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval."""
    ordered, count = sorted(numbers), len(numbers)
    below = median_interval_rank(count)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2, ordered[below], ordered[count - 1 - below]


def median_interval_rank(count: int) -> int:
    """The largest j for which [x_(j), x_(n-1-j)] of n sorted numbers (from 0) covers the median with >= 95 %.

        P(median < x_(j)) = P(Bin(n, 1/2) <= j) <= 2.5 %

    Args:
        count: n >= 6.
    """
    if count < _FEWEST:
        raise ValueError(f"a 95 % interval of a median needs at least {_FEWEST} numbers, got {count}")
    tail, rank = 0, -1
    while (tail := tail + math.comb(count, rank + 1)) <= 0.025 * 2**count:
        rank += 1
    return rank


@dataclass(frozen=True)
class ModelledCost(Value):
    """A cost that a model predicts: costs of one model err together, so a ratio of two is better known than either.

    Attributes:
        value, error: as of `Value`.
        terms: what multiplies the model's coefficients.
        covariance: of these coefficients; costs with equal ones are of one model.
    """

    terms: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CostModel:
    """seconds(R, K) = c0 + c_upstream R + c_denoise R K.

    Attributes:
        c0, c_upstream, c_denoise: seconds, >= 0, each with its standard error.
        covariance: of the three, a nested tuple `[3][3]`.
        misfit: chi^2 per degree of freedom of the fit, relative to the errors it was given; far above 1, the model
            does not describe the times (batching, caches). NaN with as many cells as terms.
    """

    c0: Value
    c_upstream: Value
    c_denoise: Value
    covariance: tuple[tuple[float, ...], ...]
    misfit: float

    def predict(self, renders: int, renoise: int) -> ModelledCost:
        """Seconds of one estimate with R = renders and K = renoise."""
        terms = (1.0, float(renders), float(renders * renoise))
        row = torch.tensor(terms, dtype=torch.float64)
        coefficients = torch.tensor([self.c0.value, self.c_upstream.value, self.c_denoise.value], dtype=torch.float64)
        spread = float(row @ torch.tensor(self.covariance, dtype=torch.float64) @ row)
        return ModelledCost(float(row @ coefficients), math.sqrt(max(0.0, spread)), terms, self.covariance)

    @property
    def ratio(self) -> Value:
        """c_upstream / c_denoise: how many teacher calls one render costs.

        Raises:
            ValueError: c_denoise = 0.
        """
        scale = self.c_upstream.error * self.c_denoise.error
        correlation = self.covariance[1][2] / scale if scale > 0 else 0.0
        return ratio(self.c_upstream, self.c_denoise, min(1.0, max(-1.0, correlation)))


@dataclass(frozen=True)
class SimulatedCost:
    """cost(R, K) = alpha R + R K, in teacher calls (Sec. D.1.7).

    Attributes:
        alpha: how many teacher calls one render costs, > 0.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def predict(self, renders: int, renoise: int) -> Value:
        """Teacher calls of one estimate, without an error."""
        return Value(self.alpha * renders + renders * renoise, 0.0)


def fit_cost(seconds: Mapping[tuple[int, int], Value]) -> CostModel:
    """The model that fits measured times best: least squares weighted by 1/error^2, no coefficient negative.

    Where no error is known (0, NaN or infinite) in some cell, all cells are weighted by 1/seconds^2: equal relative
    errors, estimated from the misfit. Errors given are enlarged by sqrt(misfit) when the misfit is above 1. A
    coefficient held at 0 keeps the error that it has in the free fit: it is how far from 0 it may be.

    Args:
        seconds: (R, K) -> seconds of one estimate.

    Raises:
        ValueError: too few cells, or cells that do not tell the three terms apart (R and R K must both vary, and
            not in proportion).
    """
    cells = list(seconds)
    rows = torch.tensor([[1.0, r, r * k] for r, k in cells], dtype=torch.float64)
    y = torch.tensor([seconds[cell].value for cell in cells], dtype=torch.float64)
    errors = torch.tensor([seconds[cell].error for cell in cells], dtype=torch.float64)
    known = bool((errors.isfinite() & (errors > 0)).all())
    scale = errors if known else y.abs()
    if len(cells) < 3 or int(torch.linalg.matrix_rank(rows)) < 3:
        raise ValueError("the cells do not tell c0, c_upstream and c_denoise apart: measure more (R, K)")
    design, target = rows / scale[:, None], y / scale
    solution, free, cost = _non_negative(design, target)
    freedom = len(cells) - int(free.sum())
    misfit = cost / freedom if freedom else math.nan
    enlarge = 1.0 if math.isnan(misfit) else (max(1.0, misfit) if known else misfit)
    covariance = torch.linalg.inv(design.T @ design)
    held = ~free
    if bool(held.any()):
        inner = torch.zeros_like(covariance)
        inner[held, held] = covariance[held, held]
        inner[free.nonzero(), free.nonzero().T] = torch.linalg.inv(design[:, free].T @ design[:, free])
        covariance = inner
    covariance = covariance * enlarge
    c0, c_upstream, c_denoise = (
        Value(float(c), math.sqrt(float(v))) for c, v in zip(solution, covariance.diagonal(), strict=True)
    )
    return CostModel(c0, c_upstream, c_denoise, tuple(map(tuple, covariance.tolist())), misfit)


def _non_negative(design: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """min |design c - target|^2 over c >= 0, by trying all sets of coefficients that are free (exact, 2^3 of them)."""
    width = design.shape[1]
    best = (torch.zeros(width, dtype=design.dtype), torch.zeros(width, dtype=torch.bool), float(target.square().sum()))
    for chosen in itertools.product([False, True], repeat=width):
        free = torch.tensor(chosen)
        if not bool(free.any()):
            continue
        solution = torch.zeros(width, dtype=design.dtype)
        solution[free] = torch.linalg.lstsq(design[:, free], target[:, None]).solution[:, 0]
        cost = float((design @ solution - target).square().sum())
        if bool((solution >= 0).all()) and cost < best[2]:
            best = (solution, free, cost)
    return best
