"""When a measurement of a variance has seen enough replicates. Each rule looks at the checks so far, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

from carv.variance.values import Value


@dataclass(frozen=True)
class Check:
    """One look at the running variance: after `count` replicates it was `variance`."""

    count: int
    variance: Value


@runtime_checkable
class StopRule(Protocol):
    """A rule. It is asked after `minimum` replicates and then after every `every` more, `cap` at the latest."""

    @property
    def minimum(self) -> int:
        """Replicates before the first check, >= 2."""
        ...

    @property
    def every(self) -> int:
        """Replicates between checks, >= 1."""
        ...

    @property
    def cap(self) -> int:
        """The most replicates, >= minimum."""
        ...

    def reason(self, checks: Sequence[Check]) -> str | None:
        """Why to stop now, as a sentence; None to go on. `checks` holds at least one, the last is now."""
        ...

    def unmet(self, checks: Sequence[Check]) -> str | None:
        """What was not reached, as a sentence, when the cap ends a measurement; None if the cap was the aim."""
        ...


@dataclass(frozen=True)
class TargetError:
    """se(Var) <= relative * Var, see `target_error`."""

    relative: float
    minimum: int
    every: int
    cap: int

    def __post_init__(self) -> None:
        if not self.relative > 0:
            raise ValueError(f"a target error must be positive, got {self.relative}")
        _check_counts(self.minimum, self.every, self.cap)

    def reason(self, checks: Sequence[Check]) -> str | None:
        last = checks[-1]
        # Not relative_error, which is infinite where the variance is 0 and the centre's rounding is not.
        if last.variance.error > self.relative * last.variance.value:
            return None
        error = 100 * last.variance.relative_error
        return f"the variance's standard error is {error:.2g} % after {last.count} replicates (aim {self._aim})"

    def unmet(self, checks: Sequence[Check]) -> str | None:
        error = 100 * checks[-1].variance.relative_error
        return f"the cap of {self.cap} replicates was reached with a standard error of {error:.2g} % (aim {self._aim})"

    @property
    def _aim(self) -> str:
        return f"{100 * self.relative:.3g} %"


@dataclass(frozen=True)
class PaperRule:
    """The paper's rule (Sec. D.1.1), see `paper_rule`."""

    minimum: int
    every: int
    cap: int
    change: float
    times: int

    def __post_init__(self) -> None:
        _check_counts(self.minimum, self.every, self.cap)

    def reason(self, checks: Sequence[Check]) -> str | None:
        recent = [check.variance.value for check in checks[-self.times - 1 :]]
        if len(recent) <= self.times or not all(
            # `<=` where nothing varies at all: 0 does not change by less than 0.1 % of 0.
            abs(after - before) < self.change * abs(before) or after == before == 0
            for before, after in pairwise(recent)
        ):
            return None
        return (
            f"the variance changed by less than {100 * self.change:g} % in {self.times} consecutive checks, "
            f"after {checks[-1].count} replicates (the paper's rule, which can stop early by luck)"
        )

    def unmet(self, checks: Sequence[Check]) -> str | None:
        return f"the cap of {self.cap} replicates was reached before the paper's rule stopped"


@dataclass(frozen=True)
class FixedCount:
    """A number of replicates that was chosen beforehand, see `fixed_count`."""

    cap: int
    every: int = 1_000_000_000

    def __post_init__(self) -> None:
        _check_counts(self.cap, self.every, self.cap)

    @property
    def minimum(self) -> int:
        return self.cap

    def reason(self, checks: Sequence[Check]) -> str | None:
        return f"{self.cap} replicates, as asked"

    def unmet(self, checks: Sequence[Check]) -> str | None:
        return None


def target_error(relative: float = 0.02, minimum: int = 100, every: int = 50, cap: int = 20_000) -> TargetError:
    """Stop when the standard error of the variance is at most `relative` times the variance.

    Stopping when an ESTIMATED error is small favours low estimates; over the thousands of replicates that 2 %
    takes for moderate tails the bias is far below the error, and `minimum` keeps it so when few would do.

    Args:
        relative: the aim, > 0.
        minimum, every, cap: replicates before the first check, between checks, and at most.
    """
    return TargetError(relative, minimum, every, cap)


def paper_rule() -> PaperRule:
    """After 1000 replicates check every 50; stop when Var changed by less than 0.1 % in 3 consecutive checks; at
    most 20 000 (Sec. D.1.1). It bounds the last changes, not the error.
    """
    return PaperRule(minimum=1000, every=50, cap=20_000, change=0.001, times=3)


def fixed_count(count: int) -> FixedCount:
    """Exactly `count` replicates, >= 2."""
    return FixedCount(count)


def _check_counts(minimum: int, every: int, cap: int) -> None:
    if minimum < 2 or every < 1 or cap < minimum:
        raise ValueError(f"a rule needs cap >= minimum >= 2 and every >= 1, got {cap}, {minimum} and {every}")
