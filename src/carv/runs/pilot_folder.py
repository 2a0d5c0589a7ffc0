"""A pilot's folder: the tables, and beside them what they were measured on and what the work costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from carv.checkpoint import write_whole
from carv.density import Density
from carv.problems import ProblemConfig
from carv.variance.cost import CostModel, StepCost
from carv.variance.tables import Tables, describe, restore
from carv.variance.values import Value

TABLES, PILOT = "tables.safetensors", "pilot.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class PilotRecord:
    """What `carv pilot` leaves, and `carv advise` and `carv report` read.

    Attributes:
        problem: the pipeline.
        tables: of the pilot.
        proposals: name -> q, `None` for p itself.
        weight: the formula of w(t) and its values at `tables.t`; `None` if the pipeline has none.
        timed: (R, K) -> seconds of one uniform iid estimate, timed side by side.
        cost: the model fitted to them.
        seed: of the pilot.
        settings: of the pilot, as JSON.
        fingerprint: as of `carv.problems.Problem`.
        provenance: as of `carv.provenance.provenance`.
    """

    problem: ProblemConfig
    tables: Tables
    proposals: Mapping[str, Density | None]
    weight: tuple[str, tuple[float, ...]] | None
    timed: Mapping[tuple[int, int], StepCost]
    cost: CostModel
    seed: int
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    provenance: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Both files, whole or not at all, the tables first."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{TABLES}"
        self.tables.save(unfinished)
        unfinished.replace(folder / TABLES)
        record = {
            "kind": "pilot",
            "format": FORMAT,
            "problem": self.problem.to_dict(),
            "proposals": {name: None if q is None else describe(q) for name, q in self.proposals.items()},
            "weight": None if self.weight is None else {"formula": self.weight[0], "values": self.weight[1]},
            "timed": [
                {"renders": r, "renoise": k, "times": step.times, "median": step.median, "low": step.low}
                | {"high": step.high, "peak_bytes": step.peak_bytes}
                for (r, k), step in self.timed.items()
            ],
            "cost": cost_to_dict(self.cost),
            "seed": self.seed,
            "settings": dict(self.settings),
            "fingerprint": dict(self.fingerprint),
            "provenance": dict(self.provenance),
        }
        write_whole(folder / PILOT, (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> PilotRecord:
        """What `save` has written.

        Raises:
            ValueError: a folder without a pilot; files that are damaged or of another format.
        """
        if not (folder / PILOT).exists():
            raise ValueError(f"{folder} holds no {PILOT}: make one with `carv pilot TASK --out {folder}`")
        try:
            given = json.loads((folder / PILOT).read_text())
            if given.get("kind") != "pilot" or given.get("format") != FORMAT:
                raise ValueError(f"not a pilot's record of format {FORMAT}")
            weight = given["weight"]
            return cls(
                ProblemConfig.from_dict(given["problem"]),
                Tables.load(folder / TABLES),
                {name: None if q is None else restore(q) for name, q in given["proposals"].items()},
                None if weight is None else (weight["formula"], tuple(weight["values"])),
                {(one["renders"], one["renoise"]): _step(one) for one in given["timed"]},
                cost_from_dict(given["cost"]),
                given["seed"],
                given["settings"],
                given["fingerprint"],
                given["provenance"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, OSError) as error:
            raise ValueError(f"the pilot in {folder} cannot be read ({error}); run `carv pilot` again") from error


def cost_to_dict(model: CostModel) -> dict[str, Any]:
    """A cost model as JSON."""
    return {name: vars(getattr(model, name)) for name in ("c0", "c_upstream", "c_denoise")} | {
        "covariance": model.covariance,
        "misfit": None if model.misfit != model.misfit else model.misfit,
    }


def cost_from_dict(given: Mapping[str, Any]) -> CostModel:
    """What `cost_to_dict` gave."""
    c0, c_upstream, c_denoise = (Value(**given[name]) for name in ("c0", "c_upstream", "c_denoise"))
    misfit = given["misfit"]
    covariance = tuple(tuple(row) for row in given["covariance"])
    return CostModel(c0, c_upstream, c_denoise, covariance, float("nan") if misfit is None else misfit)


def _step(given: Mapping[str, Any]) -> StepCost:
    return StepCost(given["median"], given["low"], given["high"], tuple(given["times"]), given["peak_bytes"])
