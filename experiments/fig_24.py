"""Figure 24: strata per render against strata over all renders, and both at once (nested).

    python experiments/fig_24.py [--quick] [--out DIR] [--teacher small]

The paper's two, and `carv.strata.nested`: per render, and over all renders within each stratum. Proposals are uniform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import tyro
from multipliers import ratio
from records import BAND, Row, curves, over_pilots, publish, table
from sds_pilots import pilots
from sds_setting import Setting

from carv.report.experiment import Chart, Curve, Experiment
from carv.strata import Coupling, global_strata, iid, nested, per_render
from carv.variance.jackknife import Jackknifed
from carv.variance.predict import PAPER_RENDERS, PAPER_RENOISE, predict
from carv.variance.tables import Tables
from carv.variance.values import Value

COUPLINGS: Mapping[str, Coupling] = {"per render": per_render, "global": global_strata, "nested": nested}
DRAWS = 32
GRID = [(r, k) for r in PAPER_RENDERS for k in PAPER_RENOISE if r * k <= DRAWS]
CHARTED = (1, 2, 4)

Variances: TypeAlias = Mapping[tuple[str, int, int], Jackknifed]


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 24."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    found = [variances(record.tables) for record in pilots(settings).values()]
    gains = {str(cell): [compared(found, "iid", name, cell) for name in COUPLINGS] for cell in GRID}
    versus = {str(cell): [compared(found, "global", "per render", cell)] for cell in GRID}
    experiment = Experiment(
        "Figure 24",
        "Should strata span one render's draws or all of a step's?",
        f"{settings.described(len(found))} Uniform proposal. Per-render strata with K = 1 are iid, and with R = 1 all "
        "three are one.",
        finding(versus),
        (
            table("RE against uniform iid at the same (R, K)", list(COUPLINGS), gains, {}),
            table("Var(global) / Var(per render): above 1 where per-render strata are better", ["ratio"], versus, {}),
        ),
        tuple(
            Chart(
                f"RE against uniform iid, K = {k}",
                "R, renders",
                "RE",
                over_renders(gains, k),
                BAND,
                log_x=True,
            )
            for k in CHARTED
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_24"))


def variances(tables: Tables) -> Variances:
    """(coupling, R, K) -> Var."""
    couplings = {"iid": iid, **COUPLINGS}
    return {
        (n, r, k): predict(tables, r, k, None, coupling).variance for n, coupling in couplings.items() for r, k in GRID
    }


def compared(found: Sequence[Variances], above: str, below: str, cell: tuple[int, int]) -> Value | None:
    """Var / Var of two couplings: the mean over pilots, each compared with itself."""
    return over_pilots([ratio(one[above, *cell], one[below, *cell]) for one in found])


def over_renders(gains: Mapping[str, Row], renoise: int) -> dict[str, Curve]:
    """One for each coupling."""
    cells = [cell for cell in GRID if cell[1] == renoise]
    rows = {name: [gains[str(cell)][i] for cell in cells] for i, name in enumerate(COUPLINGS)}
    return curves([r for r, _ in cells], rows)


def finding(versus: Mapping[str, Row]) -> str:
    several = [row[0] for (r, k), row in zip(GRID, versus.values(), strict=True) if r > 1 and k > 1]
    known = [x for x in several if x is not None]
    better, worse = (sum(sign * (x.value - 1) > 2 * x.error for x in known) for sign in (1, -1))
    return (
        f"Of {len(known)} cells with several renders and draws, strata per render are better than global ones by two "
        f"standard errors in {better} and worse by as much in {worse}; the paper finds them as good or better. With "
        "K = 1 only global strata do anything."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
