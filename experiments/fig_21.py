"""Figure 21: how the gain depends on what a render costs (App. D.1.7).

    python experiments/fig_21.py [--quick] [--out DIR] [--teacher small]

The variances are those of the pilots, the cost is simulated: alpha R + R K teacher calls, against alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paper
import tyro
from multipliers import BASELINE, COLUMNS, METHODS, Cells, cells, means, measured, multipliers, simulated
from records import BAND, Row, beside, curves, over_pilots, publish, table
from sds_pilots import Pilots, pilots
from sds_setting import Setting

from carv.report.experiment import Chart, Curve, Experiment
from carv.runs.pilot_folder import PilotRecord
from carv.variance.predict import PAPER_RENOISE
from carv.variance.values import Value

RATIOS = tuple(2.0**i for i in range(-3, 8))


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 21."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    records = pilots(settings)
    found = cells(records)
    here = over_pilots([measured_ratio(record) for record in records.values()])
    named = {f"alpha = {alpha:g}": simulated(alpha) for alpha in paper.SIMULATED_RATIOS} | {"measured": measured}
    rows = {name: means(multipliers(records, found, cost)) for name, cost in named.items()}
    experiment = Experiment(
        "Figure 21",
        "How does the gain depend on what a render costs?",
        f"{settings.described(len(records))} Measured in seconds, an estimate with R = 1 costs as many draws besides "
        f"its K as alpha = {here}. The K of a curve is the best for the mean over pilots, which flatters it slightly.",
        "IW + strata at its best K: "
        + ", ".join(f"{best_text(row['IW + strata'])} with {name}" for name, row in rows.items())
        + ". The paper finds a best K of at most 2 for alpha = 0, and a larger one for dearer renders.",
        tuple(
            table(
                f"{method}: ECM against {BASELINE}, by simulated cost alpha R + R K",
                COLUMNS,
                {name: row[method] for name, row in rows.items()},
                {},
            )
            for method in METHODS.values()
        ),
        (
            Chart(
                "The best ECM against the cost of a render",
                "alpha, teacher draws that a render costs",
                "ECM at the best K",
                lines(records, found, here, rows["measured"]["IW + strata"]),
                BAND,
                log_x=True,
            ),
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_21"))


def measured_ratio(record: PilotRecord) -> Value | None:
    """alpha with alpha + K in proportion to the measured seconds of (1, K): (c0 + c_upstream) / c_denoise."""
    one, draw = record.cost.predict(1, 1), record.cost.c_denoise
    if draw.value <= 0:
        return None
    # The two errors are nearly independent, as the costs of a render and of a draw are told apart by different cells.
    total = one.value / draw.value
    return Value(total - 1, total * (one.relative_error**2 + draw.relative_error**2) ** 0.5)


def lines(records: Pilots, found: Sequence[Cells], here: Value | None, measured_row: Row) -> dict[str, Curve]:
    """Each method's best over K at every ratio, and IW + strata at the measured cost as a point."""
    by_ratio = [means(multipliers(records, found, simulated(alpha))) for alpha in RATIOS]
    drawn = curves(RATIOS, {name: [best(row[name])[0] for row in by_ratio] for name in METHODS.values()})
    point = {} if here is None else curves([here.value], {"IW + strata, measured cost": [best(measured_row)[0]]})
    return drawn | point


def best(row: Row) -> tuple[Value | None, int]:
    """The largest ECM, and its K."""
    known = [(value, k) for value, k in zip(row, PAPER_RENOISE, strict=True) if value is not None]
    return max(known, key=lambda pair: pair[0].value) if known else (None, 0)


def best_text(row: Row) -> str:
    value, k = best(row)
    return f"{beside(value)} (K = {k})"


if __name__ == "__main__":
    main(tyro.cli(Settings))
