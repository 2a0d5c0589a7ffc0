"""Figure 14: the variance of the latent residual instead of the parameter gradient's (App. D.1.3).

    python experiments/fig_14.py [--quick] [--out DIR] [--teacher small]

Both from the same cameras, timesteps and noise. See `latent_residual.py` for what renders of different cameras mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import paper
import tyro
from multipliers import BASELINE, COLUMNS, cells, efficiencies, means, multipliers
from records import Row, beside, curves, ecm_chart, over_pilots, publish, table
from sds_pilots import Pilots, pilots, residual_pilots
from sds_setting import Setting

from carv.report.experiment import Experiment
from carv.strata import iid
from carv.variance.jackknife import derived
from carv.variance.predict import PAPER_RENOISE, predict

PARTS = ("render", "timestep", "noise")


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 14."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    records = {"latent residual": residual_pilots(settings), "parameter gradient": pilots(settings)}
    found = {name: cells(own) for name, own in records.items()}
    seconds = {name: means(multipliers(own, found[name])) for name, own in records.items()}
    gains = {name: means(efficiencies(own)) for name, own in found.items()}
    ours, gradient = seconds["latent residual"], seconds["parameter gradient"]
    experiment = Experiment(
        "Figure 14",
        "Does the variance of the latent residual say what the gradient's does?",
        f"{settings.described(len(records['latent residual']))} Both are measured with the same draws, and costs are "
        "those of a step of the parameter gradient. Renders have different cameras: the residual's variance between "
        "renders is how much views differ, and counts as much as noise here.",
        f"At K = 8 IW + strata gives {beside(ours['IW + strata'][3])} for the residual and "
        f"{beside(gradient['IW + strata'][3], paper.TABLE_1['iw+strat'][3])} for the gradient, re-use alone "
        f"{beside(ours['uniform'][3])} and {beside(gradient['uniform'][3], paper.TABLE_1['uniform'][3])}.",
        (
            *(table(f"{n}: ECM against {BASELINE}, measured seconds", COLUMNS, r, {}) for n, r in seconds.items()),
            *(table(f"{n}: RE against uniform iid at the same K", COLUMNS, r, {}) for n, r in gains.items()),
            table(
                "Where the variance at (1, 1) comes from: shares",
                PARTS,
                {name: shares(own) for name, own in records.items()},
                {},
            ),
        ),
        tuple(ecm_chart(f"ECM of the {name}", curves(PAPER_RENOISE, rows)) for name, rows in seconds.items()),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_14"))


def shares(records: Pilots) -> Row:
    """Of render, timestep and noise in the variance of uniform iid (1, 1)."""
    one = [predict(record.tables, 1, 1, None, iid) for record in records.values()]
    return [
        over_pilots([derived(lambda a, b: a / b, getattr(own.split, part), own.variance).measured for own in one])
        for part in PARTS
    ]


if __name__ == "__main__":
    main(tyro.cli(Settings))
