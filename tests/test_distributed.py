"""Two real processes over gloo: the union of their work is that of one process."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from carv.adaptive import AdaptiveProposal
from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.strata import nested
from carv.tasks.toy import GaussianToy

BASE = uniform_steps(20, 980)
STEPS = 4


def gradients(renders, rank, world):
    """Estimates of some steps with a proposal that learns on the way, averaged over ranks as DDP does."""
    torch.set_num_threads(1)
    estimator = HierarchicalEstimator(
        TimestepSampler(BASE, AdaptiveProposal(BASE, warmup=8), coupling=nested), renders, 4
    )
    found = []
    for i in range(STEPS):
        gradient = estimator.estimate(GaussianToy(), stream(0, i), rank=rank, world=world).gradient[0]
        if world > 1:
            dist.all_reduce(gradient)
            gradient /= world
        found.append(gradient)
    return torch.stack(found)


def worker(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results[rank] = gradients(2, rank, 2).tolist()
    dist.destroy_process_group()


def test_two_processes_with_a_learning_proposal_make_the_steps_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, results), nprocs=2)
        both = [torch.tensor(results[rank], dtype=torch.float64) for rank in range(2)]
    alone = gradients(4, 0, 1)
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[0], alone, rtol=1e-10, atol=1e-12)
