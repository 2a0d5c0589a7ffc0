"""Executors, each for real: a local Ray, submitit's local jobs, and Slurm with stand-ins for its four commands."""

import math
import multiprocessing
import os
import stat
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from carv.problems import ProblemConfig
from carv.runs.cell import Cell, StopConfig, run_described
from carv.runs.executors import InProcess, LocalProcesses, Ray, Slurm
from carv.runs.store import RecordStore
from carv.runs.sweep import SweepConfig, cells, sweep
from carv.runs.worker import CellError
from carv.variance.advice import Design

TODO = cells(
    SweepConfig((1,), (1, 4), 4, ("weight",), ("per-render",), stop=StopConfig("fixed", cap=60)), ProblemConfig()
)
BAD = Cell(ProblemConfig(), Design(1, 1, "nobody", "iid"), 0, TODO[0].stop)


def numbers(record):
    """Without the seconds, and without the digest of carv's source, which may be edited while this runs."""
    known = {name: value for name, value in record["provenance"].items() if name != "source"}
    return {name: value for name, value in record.items() if name != "spent"} | {"provenance": known}


@pytest.fixture(scope="module")
def reference():
    found = dict(InProcess().run(run_described, [cell.to_dict() for cell in TODO]))
    return [numbers(found[i]) for i in range(len(TODO))]


def same_as_in_process(folder, executor, reference, todo=TODO):
    """A sweep with a cell that fails, against InProcess bit for bit."""
    with RecordStore(folder) as store:
        ended = sweep([BAD, *todo], store, executor, mix=True)
    assert (ended.done, ended.skipped) == (len(todo), 0)
    assert ended.failed == ((BAD, "no proposal 'nobody' here; known: uniform, weight, defensive"),)
    found = {record["hash"]: numbers(record) for record in store.records()}
    assert [found[cell.hash] for cell in todo] == reference[-len(todo) :]


# Functions that other processes import by name.


def double(item):
    if item["x"] == "raise":
        raise KeyError("x")
    if item["x"] == "die":
        os._exit(3)
    if item["x"] == "kill":
        os.kill(os.getpid(), 9)
    if item["x"] == "sleep":
        time.sleep(60)
    return {"x": 2 * item["x"], "threads": torch.get_num_threads(), "pid": os.getpid()}


def items(*values):
    return [{"x": value} for value in values]


def test_in_process_goes_in_order_in_its_threads_and_gives_the_callers_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for threads in (1, 2):
            found = []
            for index, result in InProcess(threads).run(double, items(1, "raise", 3)):
                assert torch.get_num_threads() == 3  # between two items too
                found.append((index, result))
            assert [index for index, _ in found] == [0, 1, 2]
            assert [found[i][1]["threads"] for i in (0, 2)] == [threads, threads]
            assert found[1][1].message.startswith("KeyError: 'x' (test_executors.py, line ")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_of_workers_is_refused():
    for make in (
        lambda: LocalProcesses(0),
        lambda: InProcess(0),
        lambda: Ray(workers=0),
        lambda: Slurm("x", threads=0),
    ):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            make()


def test_local_processes_give_the_numbers_of_one_process_in_one_thread(tmp_path, reference):
    same_as_in_process(tmp_path, LocalProcesses(2), reference)
    assert all(one["provenance"]["threads"] == 1 for one in reference)


def test_an_exception_and_two_kinds_of_death_cost_one_item_each():
    found = dict(LocalProcesses(1).run(double, items(1, "raise", 2, "die", 3, "kill", 4)))
    assert [found[i]["x"] for i in (0, 2, 4, 6)] == [2, 4, 6, 8]
    assert [found[i]["threads"] for i in (0, 2, 4, 6)] == [1] * 4
    assert found[1].message.startswith("KeyError: 'x' (")
    assert found[3] == CellError("the worker died (exit status 3); running the sweep again retries it")
    assert "SIGKILL, mostly for lack of memory" in found[5].message
    # One worker serves until it dies.
    assert found[0]["pid"] == found[2]["pid"]
    assert found[2]["pid"] != found[4]["pid"]
    assert os.getpid() not in {found[i]["pid"] for i in (0, 2, 4, 6)}


def test_results_come_as_they_are_made_and_closing_cancels_the_rest():
    with closing(LocalProcesses(2).run(double, items("sleep", 1, 2))) as results:
        assert [(index, result["x"]) for index, result in (next(results), next(results))] == [(1, 2), (2, 4)]
        assert len(multiprocessing.active_children()) == 1
        begin = time.monotonic()
    assert time.monotonic() - begin < 30
    assert multiprocessing.active_children() == []


def test_submitit_gives_the_numbers_of_one_process(tmp_path, reference):
    same_as_in_process(tmp_path / "records", Slurm(tmp_path / "jobs", cluster="local", poll=0.1), reference, TODO[1:])
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o700


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
folder = {folder!r}
open(folder + "/sbatch.sh", "w").write(script)
first, last = map(int, re.search("--array=([0-9]+)-([0-9]+)", script).groups())
for i in range(first, last + 1):
    env = dict(os.environ, SLURM_JOB_ID=str(50 + i), SLURM_ARRAY_JOB_ID="{array}", SLURM_ARRAY_TASK_ID=str(i))
    env |= dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1")
    env |= dict(SLURM_NODELIST="here", SLURM_JOB_NODELIST="here")
    null = subprocess.DEVNULL  # a pipe that stays open would keep submitit waiting for the tasks
    process = subprocess.Popen(["bash", sys.argv[1]], env=env, start_new_session=True, stdout=null, stderr=null)
    open(folder + f"/pid_{{i}}", "w").write(str(process.pid))
print("Submitted batch job {array}")
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do
    [[ "$1" == --output || "$1" == --error ]] && shift
    shift
done
exec "$@" > /dev/null 2>&1
"""
SACCT = """#!{python}
import os
folder = {folder!r}
print("JobID|State|NodeList")
for i in range(9):
    if os.path.exists(folder + f"/pid_{{i}}"):
        pid = open(folder + f"/pid_{{i}}").read()
        try:
            done = open(f"/proc/{{pid}}/stat").read().split()[2] == "Z"
        except OSError:
            done = True
        print(f"{array}_{{i}}|" + ("FAILED" if done else "RUNNING") + "|here")
"""
SCANCEL = "#!/bin/bash\necho $1 >> {folder}/cancelled\nkill -9 -- -$(cat {folder}/pid_${{1#*_}})\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins: sbatch starts the tasks of an array, sacct looks whether they live, scancel ends them."""
    folder, array = tmp_path / "bin", time.monotonic_ns() // 1000  # submitit remembers the states of earlier arrays
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL}.items():
        given = text if name == "srun" else text.format(python=sys.executable, folder=str(folder), array=array)
        (folder / name).write_text(given)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return folder, array


def test_a_slurm_array_gives_the_numbers_of_one_process(tmp_path, slurm, reference):
    executor = Slurm(tmp_path / "jobs", poll=0.1, slurm_partition="gpu", gpus_per_node=1, slurm_array_parallelism=2)
    same_as_in_process(tmp_path / "records", executor, reference, TODO[1:])
    script = (slurm[0] / "sbatch.sh").read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--time=60", "--cpus-per-task=1"):
        assert f"#SBATCH {line}\n" in script
    assert "--job-name=carv" in script


def test_a_slurm_task_that_dies_is_a_sentence_and_closing_cancels_the_rest(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)  # for slow file systems, 15 s
    with closing(Slurm(tmp_path / "jobs", poll=0.1).run(double, items("sleep", 1, "die"))) as results:
        found = dict([next(results), next(results)])
    assert found[1]["x"] == 2
    folder, array = slurm
    log = tmp_path / "jobs" / f"{array}_2_0_log.err"
    assert found[2] == CellError(f"job {array}_2 ended without a result (failed); its log is {log}")
    assert (folder / "cancelled").read_text().split() == [f"{array}_0"]


def test_a_machine_without_slurm_and_unknown_parameters_are_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for executor, words in [
        (Slurm(tmp_path), "could not be handed to slurm: Could not detect"),
        (Slurm(tmp_path, cluster="local", flavour=1), "could not be handed to local: .*flavour"),
    ]:
        with pytest.raises(ValueError, match=words):
            next(executor.run(double, items(1)))
    assert list(Slurm(tmp_path).run(double, [])) == []


def test_ray_gives_the_numbers_of_one_process_and_says_nothing(tmp_path, reference, monkeypatch, capfd):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    same_as_in_process(tmp_path, Ray(workers=2), reference)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert capfd.readouterr() == ("", "")
    import ray

    assert not ray.is_initialized()
    assert list(Ray().run(double, [])) == []
    assert not ray.is_initialized()
    assert math.isfinite(reference[0]["variance"]["value"])
