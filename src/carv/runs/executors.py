"""Where cells run: this process, local processes, Slurm or Ray. All give the same numbers.

Each runs a function of one JSON-able item, in a fixed number of torch threads, and yields results as they come.
Executors differ in nothing that a function can see, so that a pure function has the same results in all of them.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from carv.extras import require
from carv.runs.worker import CellError, Function, Item, Result, Worker, attempt, one_line

Results: TypeAlias = Generator[tuple[int, Result], None, None]


class Executor(Protocol):
    """Runs a function on items."""

    def run(self, function: Function, items: Sequence[Item]) -> Results:
        """Yields (index of the item, its result) in order of completion.

        An exception, or the death of a worker, is a `CellError` for its item and does not stop the others. Closing
        the generator cancels what is left.

        Args:
            function: importable by its name.
            items: JSON-able.
        """
        ...


class InProcess:
    """One item after the other, here.

    Args:
        threads: of torch, while an item runs.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = _positive("threads", threads)

    def run(self, function: Function, items: Sequence[Item]) -> Results:
        for index, item in enumerate(items):
            yield index, attempt(function, item, self.threads)


class LocalProcesses:
    """Several processes of this machine, each a fresh interpreter (spawn).

    A script that uses it needs the usual `if __name__ == "__main__":`.

    Args:
        workers: how many.
        threads: of torch in each.
    """

    def __init__(self, workers: int, threads: int = 1) -> None:
        self.workers, self.threads = _positive("workers", workers), _positive("threads", threads)

    def run(self, function: Function, items: Sequence[Item]) -> Results:
        waiting = deque(enumerate(items))
        busy: dict[Any, Worker] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = Worker(function, self.threads)
                    busy[worker.connection] = worker
                    worker.give(*waiting.popleft())
                for ready in multiprocessing.connection.wait(list(busy)):
                    worker = busy[ready]
                    index, result = worker.index, worker.take()
                    if waiting and not worker.died:
                        worker.give(*waiting.popleft())
                    else:
                        busy.pop(ready).stop()
                    yield index, result
        finally:
            for worker in busy.values():
                worker.stop()


class Slurm:
    """One job array on a Slurm cluster, through submitit: one task for each item.

    The process that waits for the array has to live as long as it, in `tmux` or in a small job of its own. Tasks run
    in the folder that this is called from.

    Args:
        folder: for submitit's job files and logs, seen by all nodes. submitit passes functions and results through it
            as pickles, so it is made for the owner alone.
        cluster: "slurm", or "local" for processes of this machine.
        threads: of torch in each task, and CPUs unless `cpus_per_task` is given.
        poll: seconds between two looks at the array.
        **parameters: of `submitit.AutoExecutor.update_parameters`, such as timeout_min (default 60), mem_gb,
            gpus_per_node, slurm_partition, slurm_array_parallelism.

    Raises:
        ImportError: without submitit.
        ValueError: from `run`, a machine without Slurm; parameters that submitit or Slurm refuse.
    """

    def __init__(
        self, folder: Path, *, cluster: str = "slurm", threads: int = 1, poll: float = 2.0, **parameters: Any
    ) -> None:
        self.folder, self.cluster, self.poll = Path(folder), cluster, poll
        self.threads = _positive("threads", threads)
        self.parameters = {"name": "carv", "timeout_min": 60, "cpus_per_task": threads} | parameters

    def run(self, function: Function, items: Sequence[Item]) -> Results:
        jobs = dict(enumerate(self._submit(function, items))) if items else {}
        try:
            while jobs:
                with _quiet("submitit"):
                    done = [index for index, job in jobs.items() if job.done()]
                for index in done:
                    yield index, _slurm_result(jobs.pop(index))
                if jobs:
                    time.sleep(self.poll)
        finally:
            for job in jobs.values():
                job.cancel(check=False)

    def _submit(self, function: Function, items: Sequence[Item]) -> list[Any]:
        with _quiet("submitit"):
            submitit = require("submitit", "slurm")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
                executor.update_parameters(**self.parameters)
                count = len(items)
                jobs: list[Any] = executor.map_array(attempt, [function] * count, items, [self.threads] * count)
            except (RuntimeError, NameError, AssertionError, submitit.core.utils.FailedJobError) as error:
                raise ValueError(f"the jobs could not be handed to {self.cluster}: {one_line(error)}") from error
            return jobs


class Ray:
    """Tasks of a Ray cluster, or of a Ray that is started here and stopped afterwards.

    Ray's usage reports are switched off, unless RAY_USAGE_STATS_ENABLED is set already.

    Args:
        address: of the cluster, e.g. "auto"; None starts Ray on this machine.
        workers: at most how many items run at once; None leaves it to Ray.
        threads: of torch in each task, and the CPUs that it reserves.
        gpus: that each task reserves, e.g. 0.5 for two tasks on each GPU.

    Raises:
        ImportError: without ray.
        ValueError: from `run`, no cluster at the address.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, threads: int = 1, gpus: float = 0
    ) -> None:
        self.address, self.gpus, self.threads = address, gpus, _positive("threads", threads)
        self.workers = None if workers is None else _positive("workers", workers)

    def run(self, function: Function, items: Sequence[Item]) -> Results:
        if not items:
            return
        ray, started = self._start()
        # No retries: a cell that kills its worker would kill the next one, and a sweep that is run again redoes it.
        task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(attempt)
        waiting, running = deque(enumerate(items)), dict[Any, int]()
        try:
            while waiting or running:
                while waiting and len(running) < (self.workers or len(items)):
                    index, item = waiting.popleft()
                    running[task.remote(function, item, self.threads)] = index
                for ready in ray.wait(list(running))[0]:
                    yield running.pop(ready), _ray_result(ray, ready)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if started:
                with _quiet("ray"):
                    ray.shutdown()

    def _start(self) -> tuple[Any, bool]:
        """The module, connected, and whether it was connected here."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Otherwise it warns on every machine without a GPU.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with _quiet("ray"):
            ray = require("ray", "ray")
            if ray.is_initialized():
                return ray, False
            local: dict[str, Any] = {"include_dashboard": False}
            if self.workers is not None:
                local["num_cpus"] = self.workers * self.threads
            options = local if self.address is None else {"address": self.address}
            try:
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError) as error:
                raise ValueError(f"Ray at {self.address or 'this machine'} did not start: {one_line(error)}") from error
            return ray, True


def _slurm_result(job: Any) -> Result:
    with _quiet("submitit"):
        error = job.exception()
        if error is not None:
            state = str(job.state).lower()
            return CellError(f"job {job.job_id} ended without a result ({state}); its log is {job.paths.stderr}")
        result: Result = job.result()
        return result


def _ray_result(ray: Any, reference: Any) -> Result:
    try:
        result: Result = ray.get(reference)
        return result
    except ray.exceptions.RayError as error:
        return CellError(f"the worker died: {one_line(error)}; running the sweep again retries it")


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without the warnings of a package, and without what it logs below errors."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _positive(name: str, count: int) -> int:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count
