"""How gradients of single draws in a video teacher's parameters are had fastest, and what projecting them costs.

    OMP_NUM_THREADS=1 python benchmarks/example_gradients.py

A random WanTransformer3DModel of about 0.45 M parameters on clips of three latent frames, 16 draws of one clip. Routes
to the same gradients are timed side by side in random order, per draw; a ratio is the median over rounds. The hooks
cover the weights and biases of linear layers only, 97 % of the parameters here: a bound on what hooks can save.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from carv.rng import stream
from carv.schedule import NoiseSchedule
from carv.tasks.attribution.bank import DrawBank, base_density
from carv.tasks.attribution.gradients import ExampleGradients
from carv.tasks.attribution.projector import Projector
from carv.teachers.base import Condition
from carv.variance.cost import measure_cost, speedup

DRAWS = 16
REPETITIONS = 9
SHAPE = (4, 3, 8, 8)


class RandomWan:
    """As much of a teacher as the gradients need."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=4,
            text_dim=64, freq_dim=64, ffn_dim=192, num_layers=3, rope_max_seq_len=32,
        ).requires_grad_(False).eval()  # fmt: skip
        self.schedule, self.device = NoiseSchedule.flow(), torch.device("cpu")

    def network_output(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One call."""
        text, time = condition.tensors["embeddings"], self.schedule.teacher_time(t).float()
        output: Tensor = self.network(z_t, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
        return output


class LinearHooks:
    """Per-example gradients of linear layers from one batched backward pass: sum over tokens of b a^T."""

    def __init__(self, network: nn.Module) -> None:
        self.on = False
        self.found: dict[str, Tensor] = {}
        self.layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self.on:
                return
            a = inputs[0].detach()

            def collect(b: Tensor) -> None:
                tokens_in, tokens_out = a.reshape(DRAWS, -1, a.shape[-1]), b.reshape(DRAWS, -1, b.shape[-1])
                self.found[f"{name}.weight"] = torch.bmm(tokens_out.mT, tokens_in)
                self.found[f"{name}.bias"] = tokens_out.sum(1)

            output.register_hook(collect)

        return keep


def main() -> None:
    """Prints two tables."""
    teacher = RandomWan()
    bank = DrawBank(0, "strata", base_density(teacher.schedule))
    z = torch.randn(SHAPE, generator=stream(0, "z").generator())
    condition = Condition({"embeddings": torch.randn(1, 16, 64, generator=stream(0, "text").generator())})
    t, noise = bank.timesteps(0, DRAWS)[0], bank.noises(0, DRAWS, SHAPE)
    batched = ExampleGradients(teacher, Projector(512))  # type: ignore[arg-type]
    looped = ExampleGradients(teacher, Projector(512), micro_batch=1)  # type: ignore[arg-type]
    looped._batched = False
    hooks = LinearHooks(teacher.network)
    biases = [layer.bias for layer in hooks.layers.values()]
    rows = Condition({"embeddings": condition.tensors["embeddings"].expand(DRAWS, -1, -1)})
    z_t, target = teacher.schedule.add_noise(z, t, noise), noise - z

    def summed(parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """The gradient of the sum of the losses, by one backward pass."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            error = (teacher.network_output(z_t, t, rows) - target).square()
            return torch.autograd.grad(error.flatten(1).mean(1).sum() / SHAPE[1], parameters)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def by_hooks() -> dict[str, Tensor]:
        hooks.on = True
        try:
            summed(biases)  # of the biases only: so all hooks are reached, and no weight's sum is formed
        finally:
            hooks.on = False
        return hooks.found

    exact = batched.exact(z, condition, t, noise)
    missing = [name for name in exact if name not in by_hooks()]
    worst = max(
        float((hooks.found[name] - part).norm() / part.norm().clamp(min=1e-6))
        for name, part in exact.items()
        if name in hooks.found
    )
    covered = sum(part.numel() for name, part in exact.items() if name in hooks.found) / sum(
        part.numel() for part in exact.values()
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {REPETITIONS} rounds of {DRAWS} draws")
    print(
        f"D = {batched.size}; hooks cover {covered:.1%} of it ({len(missing)} tensors not), and differ by {worst:.1e}"
    )
    table(
        {
            "loop of single backward passes": lambda: looped.exact(z, condition, t, noise),
            "vmap(grad)": lambda: batched.exact(z, condition, t, noise),
            "hooks on linear layers": by_hooks,
            "(one backward pass, sum only)": lambda: summed(list(teacher.network.parameters())),
        }
    )
    print(f"\nprojecting {DRAWS} gradients of D = {batched.size} to 512")
    kinds = {
        "gaussian": Projector(512, "gaussian"),
        "rademacher": Projector(512, "rademacher"),
        "sparse, 4 nonzeros, tables anew": Projector(512),
        "sparse, 4 nonzeros": Projector(512),
        "sparse, 8 nonzeros": Projector(512, nonzeros=8),
    }

    def anew() -> Tensor:
        return Projector(512)(exact)

    steps: dict[str, Callable[[], object]] = {name: (lambda p=p: p(exact)) for name, p in kinds.items()}
    table(steps | {"sparse, 4 nonzeros, tables anew": anew})


def table(steps: dict[str, Callable[[], object]]) -> None:
    """Times per draw, and ratios to the first."""
    costs = measure_cost(steps, stream(0, *steps), repetitions=REPETITIONS)
    slowest = next(iter(costs.values()))
    for name, cost in costs.items():
        gain = speedup(slowest, cost)
        print(f"  {name:34s} {cost.seconds.scaled(1e3 / DRAWS)!s:>14} ms a draw   {gain.times():>12}")


if __name__ == "__main__":
    main()
