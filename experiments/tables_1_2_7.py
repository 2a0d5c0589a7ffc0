"""Tables 1, 2 and 7: what importance weighting, strata and re-noising gain in text-to-3D (Sec. 4.1, D.1.1, D.1.9).

    python experiments/tables_1_2_7.py [--quick] [--out DIR] [--teacher small]

Trains a field for each prompt and seed, measures a pilot of each, and predicts the paper's 18 x 4 cells from it.
Stopped, it goes on where it was; two of them at once share the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import paper
import tyro
from multipliers import BASELINE, COLUMNS, METHODS, cells, efficiencies, means, measured, multipliers, named, simulated
from records import Row, beside, curves, ecm_chart, of_these_pilots, over_pilots, plain_curves, publish, table
from sds_pilots import Pilots, pilots
from sds_setting import Setting

from carv.report.experiment import Experiment, Table
from carv.variance.predict import PAPER_DRAWS, PAPER_RENDERS, PAPER_RENOISE
from carv.variance.values import Value

GRID = [(r, k) for r in PAPER_RENDERS for k in PAPER_RENOISE if r * k <= PAPER_DRAWS]


@dataclass(frozen=True)
class Settings(Setting):
    """Tables 1, 2 and 7."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    records = pilots(settings)
    found = cells(records)
    each = multipliers(records, found)
    seconds, gains = means(each), means(efficiencies(found))
    matched = means(multipliers(records, found, simulated(paper.COST_RATIO)))
    tables = (
        table(f"Table 1: ECM against {BASELINE}, measured seconds, R = 1", COLUMNS, seconds, named(paper.TABLE_1)),
        table(
            f"Table 1 at a simulated cost of {paper.COST_RATIO:g} R + R K, near the paper's: ECM against {BASELINE}",
            COLUMNS,
            matched,
            named(paper.TABLE_1),
        ),
        table("Table 2: RE against uniform iid at the same K, R = 1", COLUMNS, gains, named(paper.TABLE_2)),
        by_prompt(records, each["iw+strat"]),
        table(
            "All 18 x 4 cells: ECM against uniform iid (R, 1), R = 1..32, at the method's variance, measured seconds",
            list(METHODS.values()),
            by_cell(means(multipliers(records, found, measured, GRID, "method"))),
            {},
        ),
    )
    experiment = Experiment(
        "Tables 1, 2 and 7",
        "How much compute do re-noising, importance weighting and strata save in text-to-3D?",
        f"{settings.described(len(records))} {costs(records)} The paper's baseline is uniform with K = 1 too; where it "
        "is (2, 1), the ECM is the same as far as variance goes as 1/R and cost as R. Neither RE nor variance times R "
        "depends on R for these methods, so Table 2 holds for every R.",
        finding(seconds, gains),
        tables,
        tuple(
            ecm_chart(
                f"ECM over K, {cost}",
                curves(PAPER_RENOISE, rows) | plain_curves(PAPER_RENOISE, named(paper.TABLE_1, "paper: ")),
            )
            for cost, rows in (
                ("measured seconds", seconds),
                (f"simulated cost {paper.COST_RATIO:g} R + R K", matched),
            )
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("tables_1_2_7"))


def by_prompt(records: Pilots, each: Sequence[Row]) -> Table:
    """Table 7a: rows of prompts, ours and then the paper's, which are other objects."""
    subjects = list(records)
    rows: dict[str, Row] = {
        prompt: [of_these_pilots([cell[i] for i, own in enumerate(subjects) if own[0] == prompt]) for cell in each]
        for prompt in dict.fromkeys(prompt for prompt, _ in subjects)
    }
    rows["mean"] = [over_pilots(cell) for cell in each]
    theirs: dict[str, Sequence[float | None]] = {"mean": paper.TABLE_1["iw+strat"]}
    theirs |= {f"paper: {prompt}": row for prompt, row in paper.TABLE_7.items()}
    title = f"Table 7: ECM of IW + strata against {BASELINE}, measured seconds; a prompt's errors are over renders"
    return table(title, COLUMNS, rows, theirs)


def by_cell(rows: Mapping[str, Row]) -> dict[str, Row]:
    """(R, K) -> the four methods."""
    return {str(cell): [row[i] for row in rows.values()] for i, cell in enumerate(GRID)}


def costs(records: Pilots) -> str:
    """What a render costs and whether tails are heavy, over all pilots."""
    tops = [one.tables.top_share for one in records.values()]
    ratios = [one.cost.ratio for one in records.values() if one.cost.c_denoise.value > 0]
    ratio = over_pilots(ratios)
    heavy = (
        "" if math.isnan(max(tops)) else f" The top 1 % of a pilot's draws carry at most {max(tops):.0%} of the sum."
    )
    return f"One render costs {'an unknown number of' if ratio is None else ratio} draws.{heavy}"


def finding(seconds: Mapping[str, Row], gains: Mapping[str, Row]) -> str:
    both, plain = seconds["IW + strata"], seconds["uniform"]
    known: list[tuple[Value, int]] = [(v, k) for v, k in zip(both, PAPER_RENOISE, strict=True) if v is not None]
    if not known:
        return "The pilots are too small for any ECM."
    best, k = max(known, key=lambda pair: pair[0].value)
    at = PAPER_RENOISE.index(k)
    return (
        f"IW + strata peaks at K = {k} with {beside(best, paper.TABLE_1['iw+strat'][at])}, where re-use alone gives "
        f"{beside(plain[at], paper.TABLE_1['uniform'][at])}; the paper's peak is at K = 8. Against uniform, importance "
        f"weighting gives {beside(gains['IW'][0], paper.TABLE_2['iw'][0])} at K = 1, and strata "
        f"{beside(gains['strata'][3], paper.TABLE_2['strat'][3])} at K = 8."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
