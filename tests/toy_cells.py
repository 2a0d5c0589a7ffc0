"""Cells of the toy problem, cheap to run."""

from carv.problems import ProblemConfig
from carv.runs.cell import Cell, StopConfig
from carv.runs.store import RecordStore
from carv.variance.advice import Design

TOY = ProblemConfig()
FEW = StopConfig("fixed", cap=120)


def cell(renders=1, renoise=2, proposal="uniform", coupling="iid", seed=0, stop=FEW):
    return Cell(TOY, Design(renders, renoise, proposal, coupling), seed, stop)


def numbers(record):
    return {name: value for name, value in record.items() if name != "spent"}


def record(name, **more):
    return {"kind": "cell", "hash": name} | more


def fill(folder, *records):
    with RecordStore(folder) as store:
        for one in records:
            store.append(one)
    return store
