"""What the sampler costs a step, next to `torch.randint`: python benchmarks/sampler_overhead.py

Prints the median time of one `sample` call for R K = 32 with the interval of the median, and its ratio to the call
that it replaces, measured in turns in one run. On a GPU it also checks that a call makes no host sync.
"""

from __future__ import annotations

import statistics
import time

import torch

from carv import AdaptiveProposal, NoiseSchedule, ShiftedUniform, TimestepSampler, proportional, strata, uniform_steps
from carv.weights import sds

ROUNDS, CALLS = 41, 200


def seconds(call, device: torch.device) -> float:
    """Mean over some calls, synchronised at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = torch.Generator(device).manual_seed(0)
    base, flow, weight = uniform_steps(20, 980), ShiftedUniform(0.02, 0.98), sds(NoiseSchedule.scaled_linear())
    samplers = {
        "uniform, iid": TimestepSampler(base, coupling=strata.iid),
        "p w, per-render strata (default)": TimestepSampler(base, proportional(base, weight), w=weight),
        "p w, global strata": TimestepSampler(base, proportional(base, weight), coupling=strata.global_strata),
        "p w, nested strata": TimestepSampler(base, proportional(base, weight), coupling=strata.nested),
        "adaptive, per-render strata": TimestepSampler(base, AdaptiveProposal(base)),
        "flow matching, tabulated": TimestepSampler(flow, proportional(flow, lambda t: t)),
    }
    calls = {"torch.randint": lambda: torch.randint(20, 981, (4, 8), generator=rng, device=device)}
    for name, sampler in samplers.items():
        moved = sampler.to(device)
        calls[name] = lambda moved=moved: moved.sample(4, 8, rng)
    for call in calls.values():
        call()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # any host sync in a call raises
        for call in calls.values():
            call()
        torch.cuda.set_sync_debug_mode("default")
        print("no call makes a host sync")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    plain = statistics.median(times["torch.randint"])
    print(f"R K = 32 on {device}, one thread; median of {ROUNDS} rounds of {CALLS} calls, with its 95 % interval")
    for name, values in times.items():
        ordered = sorted(values)
        low, high = ordered[13], ordered[27]  # ranks of the 95 % interval of a median of 41
        middle = statistics.median(values)
        print(
            f"{name:34s} {1e6 * middle:6.1f} us  [{1e6 * low:5.1f}, {1e6 * high:5.1f}]  {middle / plain:5.1f}x randint"
        )


if __name__ == "__main__":
    main()
