"""Pair-probability designs on a pilot's tables: how near the optimum each is (App. D.1.6, Fig. 20).

    carv pilot sds --out out/chair && python experiments/pair_designs.py out/chair [--out DIR]

One render and two draws. For each design the variance with its interval over renders, the gain over pairs without
replacement, and the share of the best design's gain. Writes pairs.json and pairs.png. A few seconds.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from carv.extras import require
from carv.runs.pilot_folder import PilotRecord
from carv.strata import Pairs
from carv.variance.jackknife import derived
from carv.variance.pairs import PairDesign, Targets, compare
from carv.variance.predict import pair_proposal, predict


@dataclass(frozen=True)
class Settings:
    """Which pilot."""

    pilot: Annotated[Path, tyro.conf.Positional]
    """A folder of `carv pilot`."""
    out: Path = Path("out/pairs")
    """Where pairs.json and pairs.png go."""
    beta: float = 10.0
    """Of the Sinkhorn design."""
    quick: bool = False
    """For uniformity with the other experiments; this one is quick."""


def main(settings: Settings) -> None:
    record = PilotRecord.load(settings.pilot)
    tables = record.tables
    w = tables.p.numpy() * (1.0 if record.weight is None else record.weight[1])
    designs = compare(Targets.of_tables(tables), w, settings.beta)
    couplings = {one.name: Pairs(one.joint) for one in designs}
    predicted = {
        name: predict(tables, 1, 2, pair_proposal(tables, coupling), coupling).variance
        for name, coupling in couplings.items()
    }
    rows: list[dict[str, object]] = []
    print(f"{'design':26s} {'variance':>12s} {'gain over iid':>14s} {'of the best gain':>17s}")
    for one in designs:
        gain = derived(lambda a, b: a / b, predicted["iid"], predicted[one.name])
        rows.append(
            {"design": one.name, "variance": str(predicted[one.name])}
            | {"gain": gain.measured.times(), "interval": gain.interval()}
            | {
                "interval": gain.interval(),
                "of_best_gain": one.of_best_gain,
                "of_best_reduction": one.of_best_reduction,
            }
        )
        print(f"{one.name:26s} {predicted[one.name]!s:>12s} {gain.measured.times():>14s} {one.of_best_gain:17.0%}")
    print("The last three were fitted to these very tables: their gains are optimistic.")
    settings.out.mkdir(parents=True, exist_ok=True)
    written = {"settings": {k: str(v) for k, v in dataclasses.asdict(settings).items()}, "designs": rows}
    (settings.out / "pairs.json").write_text(json.dumps(written | dict(record.provenance), indent=1) + "\n")
    draw(designs, tables.t.tolist(), settings.out / "pairs.png")


def draw(designs: tuple[PairDesign, ...], t: list[int], path: Path) -> None:
    """The designs as heat maps: how likely each pair of timesteps is, against an even spread."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    figure, panels = pyplot.subplots(2, 4, figsize=(11, 5.8), layout="constrained")
    panels = panels.ravel()
    ends = (t[0], t[-1])
    for axes, one in zip(panels, designs, strict=False):
        even = one.joint * len(one.joint) ** 2
        image = axes.imshow(even, origin="lower", extent=(*ends, *ends), cmap="magma", vmin=0, vmax=4)
        axes.set_title(f"{one.name}: {one.gain:.2f}x", fontsize=10)
        axes.set_xlabel("t")
        axes.set_ylabel("t'")
    for axes in panels[len(designs) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=panels, label="probability of a pair / even spread", shrink=0.8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Settings))
