"""Sweeps of cells: the variance of many designs by brute force, on one machine or a cluster, resumable at any moment.

On a cluster, from the folder that holds `my_task.py`, in `tmux` or in a small job of its own:

    records, problem = Path("records"), ProblemConfig("my_task:make")
    executor = Slurm(Path("jobs"), slurm_partition="gpu", gpus_per_node=1, timeout_min=120, slurm_array_parallelism=16)
    with RecordStore(records, say=print) as store:
        print(sweep(cells(SweepConfig(), problem), store, executor, say=print))

`Ray("auto", gpus=0.5)` or `LocalProcesses(8)` in its place give the same numbers. One task of the array is one cell,
whose record is in `records/records.jsonl` as soon as it is made. Stop it when you like (what is left is cancelled) and
run the same lines again: only cells without a record are measured. Records of another version, device, problem, seed
or stop rule are refused, so take a new folder for those. The folder is text: copy it to a laptop to report on it.
"""
