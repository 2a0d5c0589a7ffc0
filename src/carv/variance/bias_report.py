"""What a comparison with the naive estimator found, see `carv.variance.bias`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from carv.variance.values import Value

Verdict = Literal["pass", "small bias", "fail", "cannot tell"]


@dataclass(frozen=True)
class BiasReport:
    """What a comparison with the naive estimator found.

    Attributes:
        verdict: "pass": no bias detected, and any is below the tolerance with the stated confidence. "small bias": one
            IS detected, and it is below the tolerance with that confidence. "fail": one is detected, and it is not
            known to be below the tolerance. "cannot tell": neither detected nor bounded, or seen by the last look only.
        bias: |E ours - mu| / |mu|. Its square is unbiased, so that it is 0 about half the time where there is none.
        upper: the upper bound of that at the stated confidence; infinite where |mu| cannot be told from 0.
        scale: <E ours, mu> / |mu|^2, 1 without a bias: what a lost weight or a forgotten 1/K changes.
        along: the share of |bias|^2 that this factor explains; the rest is across mu. NaN unless detected.
        replicates: n, how many times each estimator was called.
        needed: about how many more replicates would bound the bias below the tolerance, if there is none, or confirm
            the one that is suspected; None where nothing is missing, or where it cannot be said.
        suspected: whether the last look saw a bias that no look before it saw.
        p_value: of the last look, that sign flips give a T as large; not smaller than their number allows.
        mean_known: whether |mu| can be told from 0.
        tolerance, confidence, false_alarm: as they were given.
    """

    verdict: Verdict
    bias: Value
    upper: float
    scale: Value
    along: float
    replicates: int
    needed: int | None
    suspected: bool
    p_value: float
    mean_known: bool
    tolerance: float
    confidence: float
    false_alarm: float

    @property
    def detected(self) -> bool:
        return self.verdict in ("small bias", "fail")

    def describe(self) -> str:
        """Two to four plain lines."""
        lines = [self._headline()]
        if not self.mean_known:
            lines.append("The mean |mu| of the naive estimator cannot be told from 0, so no relative size is known.")
        else:
            explained = f", which explains {self.along:.0%} of the bias squared" if self.detected else ""
            lines.append(f"Along mu ours is {self.scale.times()} the naive one{explained}.")
        if self.needed is not None and self.suspected:
            lines.append(f"About {_rounded(self.needed)} more replicates would confirm it, or not.")
        elif self.needed is not None:
            lines.append(
                f"About {_rounded(self.needed)} more replicates would show it below the tolerance, if there is none: "
                "an extrapolation of the errors so far, good to a factor of about 2."
            )
        lines.append(f"An estimator without bias is called biased in {100 * self.false_alarm:g} % of such tests.")
        return "\n".join(lines)

    def _headline(self) -> str:
        count = f"({self.replicates} replicates)"
        size = f", by {self.bias.scaled(100)} % of |mu|" if self.mean_known else ""
        bound = (
            f"at most {100 * self.upper:.2g} % of |mu| at {self.confidence:.0%} confidence" if self.mean_known else ""
        )
        tolerance = f"the tolerance of {100 * self.tolerance:g} %"
        if self.verdict == "pass":
            return f"Pass: no bias was detected, and it is {bound or 'exactly 0'}, below {tolerance} {count}."
        if self.verdict == "small bias":
            return f"A bias was detected: the means differ{size}. It is {bound}, below {tolerance} {count}."
        if self.verdict == "fail":
            return f"Fail: the means differ{size}, and that is no chance {count}."
        if self.suspected:
            return f"Cannot tell yet: the means seem to differ{size}, but only the last look says so {count}."
        but = f", but {bound} is not below {tolerance}" if self.mean_known else ""
        return f"Cannot tell yet: no bias was detected{but} {count}."


def _rounded(count: int) -> str:
    """To two digits: it is an extrapolation."""
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}"
