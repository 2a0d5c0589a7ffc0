"""Records as a sweep of the toy would leave them, exact or with noise of a known size."""

import json
import random

from carv.density import uniform_steps
from carv.problems import ProblemConfig
from carv.proposals import defensive, proportional
from carv.report import findings
from carv.rng import stream
from carv.runs.cell import Cell, StopConfig
from carv.runs.pilot_folder import PilotRecord
from carv.strata import COUPLINGS
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design
from carv.variance.cost import CostModel, StepCost
from carv.variance.pilot import pilot
from carv.variance.predict import predict
from carv.variance.tables import Tables
from carv.variance.values import Value

TOY = GaussianToy(dim=4, gain_std=0.15)
BASE = uniform_steps(20, 79)
WEIGHT = proportional(BASE, TOY.weight)
SCRIPT = "<script>document.title='run'</script>\"'$x$"
PROVENANCE = {"carv": "0", "source": "a" * 16, "torch": "2", "python": "3.11", "device": "cpu (x)", "threads": 1}


def exact_tables():
    closed = TOY.exact(BASE)
    return Tables.exact(BASE, closed.m2, closed.within, closed.across)


def cost_model(upstream=0.02, denoise=0.001, c0=0.0, error=0.0):
    terms = [Value(c, error * c) for c in (c0, upstream, denoise)]
    covariance = tuple(tuple((terms[i].error ** 2 if i == j else 0.0) for j in range(3)) for i in range(3))
    return CostModel(*terms, covariance, 1.0)


def pilot_record(tables, problem=None, model=None, proposals=None, fingerprint=None):
    step = StepCost(0.02, 0.019, 0.021, (0.02,) * 6, None)
    known = {"uniform": None, "weight": WEIGHT, "defensive": defensive(BASE, WEIGHT), **(proposals or {})}
    weight = ("1 - acp", tuple(TOY.weight(tables.t).tolist()))
    problem = problem or ProblemConfig("toy", t_min=20, t_max=79)
    model = model or cost_model()
    return PilotRecord(
        problem, tables, known, weight, {(1, 1): step}, model, 0, {"renders": 12}, fingerprint or {}, PROVENANCE
    )


def cell_record(design, value, problem=None, error=0.02, seed=0, means=None, **changed):
    problem = problem or ProblemConfig("toy", t_min=20, t_max=79)
    cell = Cell(problem, design, seed, StopConfig("fixed", cap=1500))
    figure = {"value": value, "error": error * value, "interval": [value * (1 - 2 * error), value * (1 + 2 * error)]}
    known = {"kind": "cell", "format": 1, "hash": cell.hash, "cell": cell.to_dict(), "fingerprint": {}}
    return known | {
        "provenance": PROVENANCE,
        "variance": figure,
        "latent_variance": None,
        "mean_norm_squared": figure,
        "tails": {"trusted": True, "kurtosis": 3.0, "top_share": 0.05, "verdict": "The tails are moderate."},
        "replicates": 1500,
        "converged": True,
        "stopped": "1500 replicates, as asked",
        "counts": None,
        "not_finite": 0,
        "clipped": 0,
        "policy": "",
        "squares": {"block": 50, "means": means or []},
        "spent": {"seconds": 1.0},
        **changed,
    }


def designs(renders=(1, 2, 4), renoise=(1, 2, 4, 8)):
    for proposal in ("uniform", "weight"):
        for coupling in ("iid", "per-render"):
            for r in renders:
                for k in renoise:
                    if not (coupling == "per-render" and k == 1):
                        yield Design(r, k, proposal, coupling)


def exact_variance(design):
    proposal = None if design.proposal == "uniform" else WEIGHT
    return predict(exact_tables(), design.renders, design.renoise, proposal, COUPLINGS[design.coupling]).variance.value


def cells(factor=1.0, problem=None, noise=0.02, **changed):
    rng = random.Random(1)
    return [cell_record(d, exact_variance(d) * factor * rng.gauss(1, noise), problem, **changed) for d in designs()]


def write_records(folder, records, tail=""):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def pilot_tables():
    return pilot(TOY, BASE, stream(5, "report"), renders=24, bins=12)


def hostile_findings(here):
    """A pilot and its cells, with a prompt, a proposal and a folder that would do harm if they were not escaped."""
    problem = ProblemConfig("sds", prompt=SCRIPT, t_min=20, t_max=79)
    folder = here / "<img src=x onerror=alert(1)>"
    pilot_record(pilot_tables(), problem, cost_model(error=0.05), {SCRIPT: WEIGHT}).save(folder)
    write_records(folder, cells(problem=problem))
    return findings.load([folder])


def exact_pilot(folder, **changed):
    pilot_record(exact_tables(), **changed).save(folder)
    return folder
