"""A sweep: which cells it has, and that stopped anywhere it ends with the records of an unbroken one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest

from carv.density import uniform_steps
from carv.rng import stream
from carv.runs.cell import StopConfig, run_described
from carv.runs.executors import InProcess
from carv.runs.store import RecordStore
from carv.runs.sweep import SweepConfig, cells, sweep
from carv.runs.worker import CellError
from carv.strata import COUPLINGS
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design, canonical
from carv.variance.pilot import pilot
from carv.variance.predict import predict

from toy_cells import TOY, cell, numbers

SMALL = SweepConfig((1, 2), (1, 2), 2, ("uniform",), ("iid",), stop=StopConfig("fixed", cap=4))


def test_the_default_sweep_is_the_papers_grid():
    found = [one.design for one in cells(SweepConfig(), TOY)]
    assert {(one.renders, one.renoise) for one in found} == {
        (r, k) for r in (1, 2, 4, 8) for k in (1, 2, 4, 8, 16, 32) if r * k <= 32
    }
    # 18 (R, K) for 2 proposals, iid; stratified without the 4 of K = 1.
    assert len(found) == 2 * (18 + 14)
    assert len({one.hash for one in cells(SweepConfig(), TOY)}) == len(found)


def test_designs_that_are_the_same_by_definition_are_measured_once():
    def name(coupling, renders, renoise, antithetic=False):
        return canonical(Design(renders, renoise, "weight", coupling, antithetic)).coupling

    assert [name(coupling, 1, 1) for coupling in COUPLINGS] == ["iid"] * 5
    assert [name(coupling, 4, 1) for coupling in COUPLINGS] == ["iid", "iid", "global", "systematic", "global"]
    assert [name(coupling, 1, 4) for coupling in COUPLINGS] == [
        "iid", "per-render", "per-render", "systematic", "per-render",
    ]  # fmt: skip
    assert [name(coupling, 4, 4) for coupling in COUPLINGS] == list(COUPLINGS)
    assert [name(coupling, 4, 2, True) for coupling in COUPLINGS] == ["iid", "iid", "global", "systematic", "global"]
    every = SweepConfig((1, 2), (1, 2), 4, ("uniform",), tuple(COUPLINGS))
    found = [(one.design.renders, one.design.renoise, one.design.coupling) for one in cells(every, TOY)]
    assert found.count((1, 1, "iid")) == 1
    assert len(found) == len(set(found)) == 1 + 3 + 3 + 5
    assert cells(every, TOY) == cells(every, TOY)


def test_designs_with_one_canonical_name_have_one_law():
    """By the exact pair laws: the predicted variance of both names is the same, from tables of a pilot."""

    tables = pilot(GaussianToy(), uniform_steps(20, 980), stream(0), renders=6, bins=16)
    for coupling in ("per-render", "global", "nested"):
        for r, k in [(1, 1), (1, 4), (3, 1), (2, 2)]:
            same = canonical(Design(r, k, "uniform", coupling)).coupling
            a, b = (predict(tables, r, k, None, COUPLINGS[name]).variance.value for name in (coupling, same))
            assert a == pytest.approx(b, rel=1e-9)


def test_antithetic_designs_come_beside_the_others_where_k_is_even():
    config = SweepConfig((1,), (1, 2, 3, 4), 4, ("uniform",), ("per-render",), antithetic=True)
    found = [(one.design.renoise, one.design.coupling, one.design.antithetic) for one in cells(config, TOY)]
    stratified = [(k, "per-render", False) for k in (2, 3, 4)]
    assert found == [(1, "iid", False), *stratified, (2, "iid", True), (4, "per-render", True)]


def test_a_sweep_without_designs_or_of_unknown_couplings_is_refused():
    for wrong, words in [
        ({"renders": (64,)}, "no design has R K <= 32"),
        ({"proposals": ()}, "no design"),
        ({"couplings": ("lattice",)}, "no coupling 'lattice'; known: iid"),
        ({"renoise": (0, 1)}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            cells(SweepConfig(**wrong), TOY)


def note_down(progress, done, note):
    progress.append((done, note))


def elsewhere(function, first, item):
    result = function(item)
    return result | {"provenance": result["provenance"] | {"device": "cpu (a)" if item is first else "cpu (b)"}}


class Breaks:
    """InProcess that is interrupted after some results."""

    def __init__(self, after):
        self.after, self.closed = after, False

    def run(self, function, items):
        try:
            for i, item in enumerate(items):
                if i == self.after:
                    raise KeyboardInterrupt
                yield i, function(item)
        finally:
            self.closed = True


def test_a_sweep_that_is_stopped_anywhere_ends_with_the_records_of_an_unbroken_one(tmp_path):
    """Stopped after each number of cells, and the file cut inside the last record as well."""
    todo = cells(SMALL, TOY)
    assert len(todo) == 3
    with RecordStore(tmp_path / "whole") as store:
        assert sweep(todo, store, InProcess()).done == 3
    whole = [numbers(one) for one in store.records()]
    assert [one["hash"] for one in whole] == [one.hash for one in todo]
    for after in range(3):
        folder = tmp_path / str(after)
        with RecordStore(folder) as store, pytest.raises(KeyboardInterrupt):
            sweep(todo, store, Breaks(after))
        if after:
            os.truncate(store.path, store.path.stat().st_size - 100)
        progress = []
        with RecordStore(folder) as store:
            ended = sweep(todo, store, InProcess(), progress=partial(note_down, progress))
        kept = max(0, after - 1)
        assert (ended.done, ended.skipped, ended.failed) == (3 - kept, kept, ())
        assert [done for done, _ in progress] == list(range(kept, 4))
        assert progress[-1][1].startswith("(2, 1) uniform, iid: ")
        assert [numbers(one) for one in store.records()] == whole
    with RecordStore(folder) as store:
        again = sweep([*todo, *todo], store, None)
        assert (again.done, again.skipped) == (0, 3)


def test_a_failed_cell_is_told_kept_out_of_the_store_and_tried_again(tmp_path):
    bad, good = cell(proposal="oracle"), cell(stop=StopConfig("fixed", cap=4))
    bad = replace(bad, stop=good.stop)
    said = []
    for i in range(2):
        with RecordStore(tmp_path) as store:
            ended = sweep([bad, good], store, InProcess(), said.append)
        assert ended.failed == ((bad, "no proposal 'oracle' here; known: uniform, weight, defensive"),)
        assert (ended.done, ended.skipped) == ((1, 0), (0, 1))[i]
        assert store.hashes() == {good.hash}
    assert said == ["(1, 2) oracle, iid: " + ended.failed[0][1]] * 2


def test_a_sweep_into_a_folder_of_another_seed_is_refused_before_any_work(tmp_path):
    with RecordStore(tmp_path) as store:
        sweep(cells(SMALL, TOY)[:1], store, InProcess())
        other = cells(replace(SMALL, seed=1), TOY)
        with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
            sweep(other, store, None)
        assert sweep(other, store, InProcess(), mix=True).done == 3
        assert len(store.records()) == 4


def test_a_record_of_another_machine_is_refused_when_it_arrives_and_the_rest_is_cancelled(tmp_path):
    class Elsewhere(Breaks):
        def run(self, function, items):
            self.results = super().run(partial(elsewhere, function, items[0]), items)  # so that it is not collected
            return self.results

    executor = Elsewhere(99)
    with RecordStore(tmp_path) as store:
        with pytest.raises(ValueError, match=r"device is 'cpu \(a\)' there and 'cpu \(b\)' here"):
            sweep(cells(SMALL, TOY), store, executor)
        assert len(store.records()) == 1
    assert executor.closed


def test_a_killed_sweep_is_resumed_to_the_records_of_an_unbroken_one(tmp_path):
    """kill -9 of a whole sweep as soon as its first record is there."""
    code = """if True:
        import sys
        from pathlib import Path
        from carv.problems import ProblemConfig
        from carv.runs.cell import StopConfig
        from carv.runs.executors import InProcess
        from carv.runs.store import RecordStore
        from carv.runs.sweep import SweepConfig, cells, sweep
        small = SweepConfig((1, 2), (1, 2), 2, ("uniform",), ("iid",), stop=StopConfig("fixed", cap=4))
        with RecordStore(Path(sys.argv[1])) as store:
            sweep(cells(small, ProblemConfig()), store, InProcess())
            sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not RecordStore(tmp_path).hashes() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    todo = cells(SMALL, TOY)
    with RecordStore(tmp_path) as store:
        ended = sweep(todo, store, InProcess(), mix=True)  # carv's source may be edited while this runs
    assert ended.done + ended.skipped == 3
    assert ended.skipped >= 1
    with closing(InProcess().run(run_described, [one.to_dict() for one in todo])) as results:
        whole = {result["hash"]: result["squares"] | result["variance"] for _, result in results}
    assert {one["hash"]: one["squares"] | one["variance"] for one in store.records()} == whole


def test_an_exception_in_a_cell_is_a_sentence():
    ((_, found),) = InProcess().run(run_described, [{}])
    assert found == CellError("this does not describe a cell: 'problem'")
