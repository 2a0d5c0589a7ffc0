"""Table 6: the weight as a proposal against the oracle q* ~ p sqrt(E[|g|^2 | t]) (App. D.1.8, Fig. 23).

    python experiments/table_6.py [--quick] [--out DIR] [--teacher small]

The oracle is fitted to some renders of a pilot and judged by the others: fitted to all, it would flatter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import paper
import tyro
from cross_fit import cross_fitted
from multipliers import BASELINE, measured, multiplier, ratio, weight_proposal
from records import Row, beside, curves, ecm_chart, over_pilots, plain_curves, publish, table
from sds_pilots import pilots
from sds_setting import Setting

from carv.density import Density
from carv.report.experiment import Experiment
from carv.runs.pilot_folder import PilotRecord
from carv.strata import iid, per_render
from carv.variance.jackknife import Jackknifed
from carv.variance.predict import oracle_proposal, predict
from carv.variance.tables import Tables
from carv.variance.values import Value

RENOISE = paper.TABLE_6_RENOISE
COLUMNS = [f"K = {k}" for k in RENOISE]
Variances: TypeAlias = Mapping[str, Jackknifed]
"""Proposal -> Var."""


@dataclass(frozen=True)
class Settings(Setting):
    """Table 6."""

    folds: int = 4
    """Of a pilot's renders, for the oracle."""


def main(settings: Settings) -> None:
    settings = settings.sized(folds=2)
    records = list(pilots(settings).values())
    found = {(i, k): variances(one, k, settings.folds) for i, one in enumerate(records) for k in RENOISE}
    multipliers = {
        name: [
            over_pilots(
                [
                    multiplier(found[i, 1]["uniform"], (1, k), found[i, k][name], measured(one))
                    for i, one in enumerate(records)
                ]
            )
            for k in RENOISE
        ]
        for name in ("uniform", "weight", "oracle")
    }
    efficiencies = {name: ratios(found, "uniform", name) for name in ("weight", "oracle")}
    of_oracle = ratios(found, "oracle", "weight")
    theirs = [a / b for a, b in zip(paper.TABLE_6_ECM["weight"], paper.TABLE_6_ECM["oracle"], strict=True)]
    experiment = Experiment(
        "Table 6",
        "How much of the oracle proposal's gain does the weight get, at no cost?",
        f"{settings.described(len(records))} All three proposals are drawn in strata per render, as App. D.1.1 says of "
        f"the oracle's runs. The renders are in {settings.folds} folds, each judging the oracle of the others. "
        "The paper's own RE and ECM at K = 1, which should be equal, differ.",
        f"The weight reaches {percent(of_oracle[0])} of the oracle's multiplier at K = 1, {percent(of_oracle[3])} at "
        f"K = 8 (paper: 94 to 97 %). Against uniform the oracle gives {beside(efficiencies['oracle'][0])} at K = 1.",
        (
            table(f"Table 6a: ECM against {BASELINE}, measured seconds", COLUMNS, multipliers, paper.TABLE_6_ECM),
            table(
                "Table 6b: RE against uniform at the same K, both in strata", COLUMNS, efficiencies, paper.TABLE_6_RE
            ),
            table("Var(oracle) / Var(weight)", COLUMNS, {"ours": of_oracle}, {"ours": theirs}),
        ),
        (
            ecm_chart(
                "ECM over K",
                curves(RENOISE, multipliers)
                | plain_curves(RENOISE, {f"paper: {name}": row for name, row in paper.TABLE_6_ECM.items()}),
            ),
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("table_6"))


def variances(record: PilotRecord, renoise: int, folds: int) -> Variances:
    """Var of (1, K) in strata by proposal."""
    coupling = iid if renoise == 1 else per_render
    known = {"uniform": None, "weight": weight_proposal(record)}
    return {name: predict(record.tables, 1, renoise, q, coupling).variance for name, q in known.items()} | {
        "oracle": cross_fitted(record.tables, oracle, renoise, coupling, folds)
    }


def ratios(found: Mapping[tuple[int, int], Variances], above: str, below: str) -> Row:
    """Var / Var by K: the mean over pilots, each compared with itself."""
    return [over_pilots([ratio(one[above], one[below]) for (_, k), one in found.items() if k == at]) for at in RENOISE]


def oracle(tables: Tables) -> Density:
    """Eq. 24, without a share of p."""
    return oracle_proposal(tables, share=0)


def percent(value: Value | None) -> str:
    return "an unknown share" if value is None else f"{value.scaled(100)} %"


if __name__ == "__main__":
    main(tyro.cli(Settings))
