import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from carv.density import uniform_steps
from carv.problems import ProblemConfig, load_problem
from carv.rng import stream
from carv.runs.cell import Cell, StopConfig, block_means, run_cell, run_described
from carv.runs.executors import InProcess
from carv.runs.store import RecordStore
from carv.runs.sweep import SweepConfig, cells, sweep
from carv.runs.worker import CellError
from carv.strata import COUPLINGS
from carv.tasks.toy import GaussianToy
from carv.variance import measure as measuring
from carv.variance.advice import Design, canonical
from carv.variance.pilot import pilot
from carv.variance.predict import predict
from carv.variance.stopping import fixed_count, paper_rule, target_error

TOY = ProblemConfig()
FEW = StopConfig("fixed", cap=120)
SMALL = SweepConfig((1, 2), (1, 2), 2, ("uniform",), ("iid",), stop=StopConfig("fixed", cap=4))


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


# Cells


def test_a_cell_survives_json_and_keeps_its_hash():
    for one in (cell(), cell(stop=StopConfig()), cell(stop=StopConfig("paper"), seed=2**70)):
        again = Cell.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again == one
        assert again.hash == one.hash
    # Written down, so that stores of today can be resumed tomorrow.
    assert Cell(TOY, Design(1, 8, "weight", "per-render"), 0).hash == "39f76a776a6901ee"


def test_every_setting_changes_the_hash():
    others = [
        replace(cell(), problem=ProblemConfig(t_min=21)),
        cell(renders=2),
        cell(renoise=4),
        cell(proposal="weight"),
        cell(coupling="global"),
        cell(seed=1),
        cell(stop=StopConfig("fixed", cap=121)),
        cell(stop=StopConfig("target")),
        replace(cell(), design=Design(1, 2, "uniform", "iid", True)),
    ]
    assert len({cell().hash, *(one.hash for one in others)}) == len(others) + 1


def test_what_is_not_a_cell_is_refused_with_a_sentence():
    good = cell().to_dict()
    for wrong in ({}, good | {"design": {"renders": 1}}, good | {"stop": {"rule": "fixed", "often": 1}}):
        with pytest.raises(ValueError, match="does not describe a cell"):
            Cell.from_dict(wrong)


def test_stop_settings_make_the_rules_they_name_and_refuse_what_a_rule_does_not_have():
    assert StopConfig().build() == target_error()
    assert StopConfig("target", 0.1, 50, 10, 500).build() == target_error(0.1, 50, 10, 500)
    assert StopConfig("paper").build() == paper_rule()
    assert StopConfig("fixed", cap=7).build() == fixed_count(7)
    for wrong, words in [
        ({"rule": "luck"}, "unknown stop rule"),
        ({"rule": "paper", "cap": 100}, "'paper' has no setting 'cap'"),
        ({"rule": "fixed", "relative": 0.1}, "'fixed' has no setting 'relative'"),
        ({"relative": -0.1}, "positive"),
    ]:
        with pytest.raises(ValueError, match=words):
            StopConfig(**wrong)


def test_a_record_holds_what_measure_found_and_how_it_was_made():
    one = cell(2, 4, "weight", "per-render")
    found = run_cell(one)

    problem = load_problem(TOY)
    truth = measuring.measure(
        problem.task, problem.estimator(one.design), stream(0, "measure"), stop=fixed_count(FEW.cap)
    )
    low, high = truth.variance.interval()
    assert found["variance"] == {"value": truth.variance.value, "error": truth.variance.error, "interval": [low, high]}
    assert found["latent_variance"]["value"] == truth.latent_variance.value
    assert found["mean_norm_squared"]["error"] == truth.mean_norm_squared.error
    assert found["counts"] == asdict(truth.counts) == {"upstream": 240, "teacher": 960, "backward": 240, "encoder": 0}
    assert (found["replicates"], found["converged"], found["stopped"]) == (120, True, "120 replicates, as asked")
    assert found["tails"]["verdict"] == truth.tails.verdict
    assert found["tails"]["trusted"] == truth.tails.trusted
    assert (found["kind"], found["format"], found["hash"], found["cell"]) == ("cell", 1, one.hash, one.to_dict())
    assert {"carv", "source", "torch", "device"} <= found["provenance"].keys()
    assert found["fingerprint"] == {}
    assert found["spent"]["seconds"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_cell_gives_the_same_numbers_again_and_cells_share_their_renders_and_noise():
    """With almost the same proposal the means of |g - c|^2 over 10 blocks are almost the same: a correlation above 0.9,
    which 10 independent pairs reach twice in 10 000.
    """
    long = StopConfig("fixed", cap=500)
    first = run_cell(cell(1, 4, "weight", stop=long))
    other = run_cell(cell(1, 4, "defensive", stop=long))
    a, b = (torch.tensor(found["squares"]["means"], dtype=torch.float64) for found in (first, other))
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9
    assert numbers(run_cell(cell())) == numbers(run_cell(cell()))
    assert run_cell(cell(seed=1))["variance"] != run_cell(cell())["variance"]


def test_blocks_of_squares_are_in_order_of_replicate_and_only_whole_ones_are_kept():
    squares = torch.arange(120, dtype=torch.float64)
    assert block_means(squares) == [24.5, 74.5]
    assert block_means(squares[:49]) == []

    problem, at = load_problem(TOY), stream(0, "measure")
    estimator = problem.estimator(cell().design)
    centre = measuring.pilot_centre(problem.task, estimator, at)
    draw = measuring.replicate_of(problem.task, estimator)
    by_hand = [float((draw(at.child("replicate", i)).gradient - centre.gradient).square().sum()) for i in range(100)]
    found = run_cell(cell())["squares"]
    assert found["block"] == 50
    assert found["means"] == pytest.approx([sum(by_hand[:50]) / 50, sum(by_hand[50:]) / 50], rel=1e-12)


def test_squares_are_in_order_of_replicate_in_whatever_order_parts_were_merged():
    def draw(at):
        return torch.randn(3, generator=at.generator(), dtype=torch.float64)

    at = stream(5)
    centre = measuring.pilot_centre(draw, None, at)
    a, b, c = (measuring.collect(draw, None, at, first, 4, centre=centre) for first in (0, 4, 8))
    whole = measuring.conclude(a.merge(b).merge(c), "").squares
    assert torch.equal(measuring.conclude(c.merge(a).merge(b), "").squares, whole)
    assert float(whole[9]) == pytest.approx(float((draw(at.child("replicate", 9)) - centre.gradient).square().sum()))


def test_what_is_not_finite_is_null_in_a_record(monkeypatch):
    broken = measuring.measure(lambda at: torch.ones(2), None, stream(0), stop=fixed_count(4))
    broken = replace(broken, tails=replace(broken.tails, kurtosis=float("nan"), top_share=float("inf")))
    monkeypatch.setattr("carv.runs.cell.measure", lambda *args, **options: broken)
    found = run_cell(cell())
    assert (found["tails"]["kurtosis"], found["tails"]["top_share"]) == (None, None)
    assert (found["latent_variance"], found["counts"]) == (None, None)
    json.dumps(found, allow_nan=False)


# The store


def test_records_come_back_as_they_went_in_and_kinds_are_told_apart(tmp_path):
    given = [record("a", x=0.1 + 0.2), record("b", y="\u2028 \n"), {"kind": "cost", "hash": "a", "seconds": 1e-300}]
    store = fill(tmp_path / "new" / "folder", *given)
    assert store.records() == given
    assert store.hashes() == {"a", "b"}
    assert store.hashes("cost") == {"a"}
    with RecordStore(store.path.parent) as again:
        again.append(record("c"))
        assert again.hashes() == {"a", "b", "c"}
    assert store.records()[:3] == given
    assert RecordStore(tmp_path / "none").records() == []
    assert not (tmp_path / "none").exists()


def test_a_file_cut_at_any_byte_keeps_exactly_the_whole_records_and_can_be_completed(tmp_path):
    """Exhaustive over the bytes, with a line break and a non-ASCII letter inside a record."""
    given = [record("a", x=1.5), record("b", text="\n\u00e9"), record("c", nested={"y": [1, None]})]
    whole = fill(tmp_path / "whole", *given).path.read_bytes()
    path = tmp_path / "cut" / "records.jsonl"
    path.parent.mkdir()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept, said = whole[:size].count(b"\n"), []
        assert RecordStore(path.parent).records() == given[:kept]
        assert path.stat().st_size == size  # reading changes nothing
        with RecordStore(path.parent, said.append) as store:
            assert store.records() == given[:kept]
            assert len(said) == (size > 0 and whole[size - 1 : size] != b"\n")
            for one in given:
                if one["hash"] not in store.hashes():
                    store.append(one)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("end", [b"\x00\x00\x00", b"\x00\x00\n", b'{"kind": "ce\n', b"\xff\xfe\n"])
def test_a_last_line_that_is_no_json_is_torn_too_and_is_told_once(tmp_path, end):
    path = fill(tmp_path, record("a")).path
    before = path.read_bytes()
    path.write_bytes(before + end)
    said = []
    assert [one["hash"] for one in RecordStore(tmp_path).records()] == ["a"]
    with RecordStore(tmp_path, said.append):
        pass
    with RecordStore(tmp_path, said.append):
        pass
    assert path.read_bytes() == before
    assert len(said) == 1
    assert f"{len(end)} bytes" in said[0]


@pytest.mark.parametrize(
    "line", [b'{"kind": "cell"', b"", b"[1]", b'{"kind": "cell"}', b'{"kind":"c","hash":"h","x":NaN}']
)
def test_a_damaged_line_before_the_last_is_an_error_with_its_number(tmp_path, line):
    path = fill(tmp_path, record("a"), record("b")).path
    first, second = path.read_bytes().splitlines()
    damaged = b"\n".join([first, line, second, b""])
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2, is damaged"):
        RecordStore(tmp_path).records()
    with pytest.raises(ValueError, match="line 2"), RecordStore(tmp_path):
        pass
    assert path.read_bytes() == damaged
    path.write_bytes(first + b"\n" + line + b"\n{")  # one write cannot tear two lines
    with pytest.raises(ValueError, match="line 2"):
        RecordStore(tmp_path).records()
    path.write_bytes(first + b"\n")
    with RecordStore(tmp_path) as store:  # the error has given the lock back
        assert store.hashes() == {"a"}


def test_a_last_line_that_is_json_but_no_record_is_not_thrown_away(tmp_path):
    path = fill(tmp_path, record("a")).path
    path.write_bytes(path.read_bytes() + b'{"somebody": "else"}\n')
    with pytest.raises(ValueError, match="line 2"), RecordStore(tmp_path):
        pass


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    with RecordStore(tmp_path) as first:
        first.append(record("a"))
        # Also after the file was read and closed in this process, which would end a lock of the other kind.
        assert RecordStore(tmp_path).hashes() == {"a"}
        with pytest.raises(ValueError, match="another process is writing to"), RecordStore(tmp_path):
            pass
        code = "import sys; from pathlib import Path; from carv.runs.store import RecordStore\n"
        code += "with RecordStore(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process is writing to" in done.stderr
        with pytest.raises(ValueError, match="already open"), first:
            pass
    with RecordStore(tmp_path) as second:
        assert second.hashes() == {"a"}


def test_a_store_that_is_not_open_or_a_thing_that_is_no_record_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not open for writing"):
        RecordStore(tmp_path).append(record("a"))
    with RecordStore(tmp_path) as store:
        for wrong in ({"kind": "cell"}, {"hash": "a"}, record("a", x=float("nan")), record("a", x={1, 2})):
            with pytest.raises(ValueError, match="this is no record"):
                store.append(wrong)
    assert store.path.read_bytes() == b""


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = fill(tmp_path, record("a"))
    before, write = store.path.read_bytes(), os.write

    def half(file, line):
        if len(line) < 20:
            raise OSError(28, "No space left on device")
        return write(file, line[: len(line) // 2])

    with RecordStore(tmp_path) as store:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            store.append(record("b" * 40))
        monkeypatch.undo()
        assert store.path.read_bytes() == before
        assert store.hashes() == {"a"}
        store.append(record("c"))
    assert store.hashes() == {"a", "c"}


def test_a_record_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    with RecordStore(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
        store.append(record("a"))
        assert synced == [store.path.stat().st_size]


def test_a_writer_that_is_killed_leaves_whole_records_and_no_lock(tmp_path):
    """kill -9 in the middle of writing, twice into one file."""
    code = """if True:
        import sys
        from pathlib import Path
        from carv.runs.store import RecordStore
        with RecordStore(Path(sys.argv[1])) as store:
            for i in range(len(store.records()), 10**9):
                store.append({"kind": "cell", "hash": str(i), "ballast": "x" * 20000})
                print(i, flush=True)"""
    last = -1
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(20):
                last = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
            last = max([last, *(int(line) for line in process.stdout if line.endswith("\n"))])
        with RecordStore(tmp_path) as store:
            found = [int(one["hash"]) for one in store.records()]
            assert found == list(range(len(found)))
            assert len(found) in (last + 1, last + 2)  # what was announced is there, and at most one more


def compatible(tmp_path, **changes):
    """A store with one toy record, against a planned one with changes at dotted names."""
    stored = {
        "cell": cell().to_dict(),
        "fingerprint": {"module": "abc"},
        "provenance": {"carv": "1", "source": "s", "torch": "2", "device": "cpu (x)", "threads": 1},
    }
    planned = json.loads(json.dumps(stored))
    for name, value in changes.items():
        *path, last = name.split("__")
        part = planned
        for key in path:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return fill(tmp_path, record("a", **stored)), planned


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("provenance__source", "t", "source is 's' there and 't' here"),
        ("provenance__carv", "2", "carv is '1' there and '2' here"),
        ("provenance__torch", "3", "torch is '2' there and '3' here"),
        ("provenance__device", "cuda (y)", r"device is 'cpu \(x\)' there and 'cuda \(y\)' here"),
        ("cell__problem__t_min", 5, r"problem\.t_min is 20 there and 5 here"),
        ("cell__problem__steps", 5, r"problem\.steps is None there and 5 here"),
        ("cell__problem__t_max", None, r"problem\.t_max is 980 there and None here"),
        ("fingerprint__module", "abd", r"fingerprint\.module is 'abc' there and 'abd' here"),
        ("fingerprint__module", None, r"fingerprint\.module is 'abc' there and None here"),
        ("cell__seed", 3, "seed is 0 there and 3 here"),
        ("cell__stop__cap", 200, r"stop\.cap is 120 there and 200 here"),
    ],
)
def test_records_that_were_made_differently_are_refused_by_name(tmp_path, name, value, words):
    store, planned = compatible(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=words + r"\. Use another folder.*mix=True.*--mix"):
        store.check_compatible([planned])
    with pytest.raises(ValueError, match=words):
        store.check_compatible([compatible(tmp_path / "other")[1], planned])
    store.check_compatible([planned], mix=True)
    with pytest.raises(ValueError, match="made differently"):
        RecordStore(tmp_path / "empty").check_compatible([compatible(tmp_path / "third")[1], planned])


def test_what_does_not_matter_or_is_not_known_yet_is_no_difference(tmp_path):
    for i, changes in enumerate(
        [
            {},
            {"provenance__threads": 8},
            {"cell__design__renders": 4},
            {"provenance__device": None},
            {"fingerprint": None},
        ]
    ):
        store, planned = compatible(tmp_path / str(i), **changes)
        store.check_compatible([planned])
        store.check_compatible([{"kind": "cost", "hash": "h"}])


# Sweeps


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
