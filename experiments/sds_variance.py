"""Where the variance of the text-to-3D gradient comes from, and what each lever is worth (Tables 1 and 2).

    python experiments/sds_variance.py [--quick] [--out DIR]

Trains a chair for a while, measures the cost of steps side by side, and predicts from ONE pilot the ECM of uniform, IW,
strata and IW + strata at R = 1, and what to run. Writes variance.json. About 4 minutes on one core.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from carv import defensive, proportional, stream
from carv.provenance import provenance
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.train import Trainer, world_teacher
from carv.variance.advice import advise
from carv.variance.cost import fit_cost, measure_cost
from carv.variance.efficiency import Point, ecm
from carv.variance.pilot import pilot
from carv.variance.predict import grid, paper_methods, predict

KS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Settings:
    """One checkpoint of the demo's scene."""

    out: Path = Path("out/sds_variance")
    prompt: str = "a red chair"
    steps: int = 150
    """Training steps before the measurement."""
    renders: int = 40
    """R0 of the pilot."""
    bins: int = 16
    """M of the pilot, with two noises in each."""
    resolution: int = 32
    """Voxels along each side; smaller than the demo's, so that the pilot fits in memory without a projection."""
    quick: bool = False
    """A few renders, to see that it runs; the figures mean nothing then."""


def main(settings: Settings) -> None:
    renders, bins, steps = (5, 4, 3) if settings.quick else (settings.renders, settings.bins, settings.steps)
    config = SDSConfig(settings.prompt, resolution=settings.resolution, final_rate=1.0, stratify_azimuth=False)
    teacher = world_teacher(config, print)
    trainer = Trainer(config, teacher)
    for _ in range(steps):
        trainer.step()
    task, weight = trainer.task, trainer.task.weight

    cells = [(1, 1), (1, 4), (1, 16), (2, 1), (2, 8), (4, 1)]
    estimators = {cell: EstimatorConfig(cell[0], cell[1]).build(weight) for cell in cells}
    steps_by_name = {
        str(cell): lambda estimator=estimator: estimator.estimate(task, stream(1, "cost"))
        for cell, estimator in estimators.items()
    }
    timed = measure_cost(steps_by_name, stream(0, "cost"), repetitions=6 if settings.quick else 15)
    cost = fit_cost({cell: timed[str(cell)].seconds for cell in cells})
    print(f"cost: upstream {cost.c_upstream} s, teacher draw {cost.c_denoise} s, ratio {cost.ratio}")

    base = trainer.estimator.sampler.base
    tables = pilot(task, base, stream(0, "pilot"), renders=renders, bins=bins, micro_batch=32)
    importance = proportional(base, weight)
    predictions = grid(tables, paper_methods(importance), renders=(1,), renoise=KS)
    baseline = Point("uniform (1, 1)", predictions["uniform", 1, 1].variance, cost.predict(1, 1))
    record: dict[str, object] = {"settings": {k: str(v) for k, v in vars(settings).items()}, **provenance()}
    print(f"share of the sum of squares in the top 1 % of draws: {tables.top_share:.0%}")
    split = predict(tables, 1, 1).split
    print(f"split at (1, 1): render {split.render.measured}, timestep {split.timestep.measured}, ", end="")
    print(f"noise {split.noise.measured}")
    print("ECM against uniform (1, 1), at the baseline's variance, by measured seconds; (error)")
    print("K       " + "".join(f"{name:>14s}" for name in ("uniform", "iw", "strat", "iw+strat")))
    for k in KS:
        row = []
        for name in ("uniform", "iw", "strat", "iw+strat"):
            point = Point(f"{name} (1, {k})", predictions[name, 1, k].variance, cost.predict(1, k))
            row.append(str(ecm(baseline, point)))
        print(f"{k:<8d}" + "".join(f"{cell:>14s}" for cell in row))
        record[f"ecm K={k}"] = row
    advice = advise(
        tables, cost, proposals={"uniform": None, "iw": importance, "defensive iw": defensive(base, importance, 0.3)}
    )
    print(f"advice: {advice}")
    print(f"cells that cannot be told apart from it: {', '.join(str(cell.design) for cell in advice.tied[:6])}")
    record |= {
        "advice": str(advice),
        "split": {part: str(getattr(split, part).measured) for part in ("render", "timestep", "noise")},
        "cost": {"upstream": str(cost.c_upstream), "denoise": str(cost.c_denoise), "ratio": str(cost.ratio)},
        "top_share": tables.top_share,
        "torch_threads": torch.get_num_threads(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "variance.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
