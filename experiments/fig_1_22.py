"""Figures 1 and 22: does the weight w(t) follow the norm of the gradient over t (App. D.1.8)?

    python experiments/fig_1_22.py [--quick] [--out DIR] [--teacher small]

As in Fig. 22, once for the latent residual and once for the parameter gradient. Everything is shown over its mean under
p, so that curves are proposals q/p: sqrt(E|g|^2) is the oracle, w the heuristic, 1 uniform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from records import BAND, Row, curves, over_pilots, plain_curves, publish, table
from sds_pilots import pilots, residual_pilots
from sds_setting import Setting

from carv.report.experiment import Chart, Experiment
from carv.runs.pilot_folder import PilotRecord
from carv.variance.jackknife import Jackknifed
from carv.variance.values import Value


@dataclass(frozen=True)
class Settings(Setting):
    """Figures 1 and 22."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    records = list(pilots(settings).values())
    residuals = list(residual_pilots(settings).values())
    first = records[0]
    t = [float(x) for x in first.tables.t]
    weight = weights(first)
    rows: dict[str, Row] = {
        "gradient norm": mean_norms(records),
        "latent residual norm": mean_norms(residuals),
        "weight w(t)": [Value(x, 0) for x in weight],
        "gradient norm / weight": mean_norms(records, weight),
        "residual norm / weight": mean_norms(residuals, weight),
    }
    experiment = Experiment(
        "Figures 1 and 22",
        "Does w(t) follow the norm of the gradient over t, so that it can stand for the oracle proposal?",
        f"{settings.described(len(records))} Norms are sqrt(E|g|^2 | t) in bins of t, over their mean under p.",
        finding(t, rows),
        (table("sqrt(E|g|^2 | t) and w(t), over their means", [f"t = {x:g}" for x in t], rows, {}),),
        tuple(chart(name, t, rows[name], weight) for name in ("gradient norm", "latent residual norm")),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_1_22"))


def norms(record: PilotRecord) -> list[Jackknifed]:
    """sqrt(E|g|^2 | t) of each bin over its mean under p, with what it would be without each render."""
    by_render = record.tables.norm_sq.mean(-1).numpy()  # [R0, M]
    p, n = record.tables.p.numpy(), len(by_render)
    without = np.sqrt((by_render.sum(0) - by_render) / (n - 1))
    whole = np.sqrt(by_render.mean(0))
    shape, shapes = whole / (whole @ p), without / (without @ p)[:, None]
    return [Jackknifed(float(shape[i]), shapes[:, i]) for i in range(len(p))]


def mean_norms(records: Sequence[PilotRecord], over: Sequence[float] | None = None) -> list[Value | None]:
    """The mean over pilots in each bin, if asked for over another curve."""
    each = [norms(record) for record in records]
    divisor = over or [1.0] * len(each[0])
    return [over_pilots([own[i].measured.scaled(1 / x) for own in each]) for i, x in enumerate(divisor)]


def weights(record: PilotRecord) -> list[float]:
    """w in the middle of each bin, over its mean under p."""
    assert record.weight is not None
    w = np.array(record.weight[1])
    return [float(x) for x in w / (w @ record.tables.p.numpy())]


def chart(name: str, t: Sequence[float], row: Row, weight: Sequence[float]) -> Chart:
    return Chart(
        f"{name} over t",
        "t",
        "over its mean",
        curves(t, {f"{name} (oracle)": row}) | plain_curves(t, {"weight w(t)": weight, "uniform": [1.0] * len(t)}),
        BAND,
    )


def finding(t: Sequence[float], rows: Mapping[str, Row]) -> str:
    known = [(x, at) for x, at in zip(rows["gradient norm / weight"], t, strict=True) if x is not None]
    low, high = min(known, key=lambda pair: pair[0].value), max(known, key=lambda pair: pair[0].value)
    return (
        f"The gradient's norm over the weight runs from {low[0]} at t = {low[1]:g} to {high[0]} at t = {high[1]:g}; if "
        "the weight followed the norm, as it does in the paper's figure, it would be 1 everywhere."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
