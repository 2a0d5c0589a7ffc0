"""Table 3 and Figure 25: variance of DMD's gradient, across and within generator inputs, and what each phase costs.

    python experiments/table_3.py [--quick] [--out DIR] [--teacher small]

Three quantities on the same draws: the teacher's part alone (mu_real - z, weighted as in DMD), the score difference f,
and the parameter gradient f dz/dtheta. For n inputs z, and M estimates of (1, K) for each of them,

    Var(R, K) = (across + within) / R,     across = tr Cov_z(E[g | z]),     within = E_z tr Cov(g | z)

so that the variance at a FIXED z, within / R, can be told from the whole.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import paper
import torch
import tyro
from distill_runs import step_costs, trainer_of, weights_digest
from distill_setting import Coupling, DistillSetting, digest
from nested import Nested, Replicates
from records import figure, publish
from sds_pilots import _alone as alone
from torch import Tensor

from carv.checkpoint import load_checkpoint, save_checkpoint
from carv.console import Report
from carv.estimator import HierarchicalEstimator
from carv.gradient import Renders, TeacherGradient
from carv.report.experiment import Chart, Curve, Experiment, Figure, Table
from carv.rng import Stream, stream
from carv.sampler import TimestepSampler
from carv.strata import COUPLINGS
from carv.tasks.distill.config import DistillConfig, TermEstimator
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Classes, over_draws
from carv.tasks.distill.train import Trainer
from carv.teachers.guidance import Guided
from carv.variance.cost import measure_cost
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.moments import Moments
from carv.variance.values import Value, ratio

RENDERS = 8
QUANTITIES = ("teacher score", "score difference", "parameter gradient")
DESIGNS: Mapping[str, tuple[int, Coupling]] = {
    "(8, 1) iid": (1, "iid"),
    "(8, 16) iid": (16, "iid"),
    "(8, 16) strata": (16, "per-render"),
}
PHASE_RENOISE = (1, 16)
CURVE_RENOISE = (1, 2, 4, 8, 16)
Found: TypeAlias = Mapping[tuple[str, str], Nested]
"""(design, quantity) -> nested variances of (1, K)."""


@dataclass(frozen=True)
class Settings(DistillSetting):
    """Table 3 and Figure 25."""

    checkpoints: tuple[int, ...] = (0, 30, 90, 240)
    """Generator updates after which the variance is measured."""
    inputs: int = 64
    """Generator inputs of each measurement, n."""
    estimates: int = 4
    """Estimates of (1, K) for each input, M."""
    brute_force: int = 48
    """Whole estimates of (8, K), at the last checkpoint."""
    generator_rate: float = 1e-4
    """Learning rate of the generator; smaller than in the other experiments, so that there is a middle of training."""
    fake_rate: float = 1e-4
    """Learning rate of the fake score and the discriminator."""


def main(settings: Settings) -> None:
    settings = settings.sized(checkpoints=(0, 2), inputs=4, estimates=2, brute_force=3)
    trainers = dict(states(settings))
    found = {step: measured(settings, trainer.dmd, step) for step, trainer in trainers.items()}
    last = trainers[settings.checkpoints[-1]]
    checked = brute_force(settings, last)
    phases = phase_costs(settings, last)
    costs = step_costs(settings, {str((r, k)): settings.config(r, k) for r, k in ((8, 1), (8, 8), (8, 16), (48, 1))})
    publish(record(settings, found, checked, phases, costs), settings.folder("table_3"))


def states(settings: Settings) -> list[tuple[int, Trainer]]:
    """The trainer at each checkpoint, of one run at the first seed; made once and kept."""
    config = settings.config(seed=settings.seeds[0], steps=max(1, settings.checkpoints[-1]))
    folder = settings.runs / "distill" / f"steps-{digest(config)}-{weights_digest(settings.teacher)}"
    folders = {step: folder / f"step-{step}" for step in settings.checkpoints}
    with alone(folder):
        kept = {step: load_checkpoint(path, config.to_json()) for step, path in folders.items()}
        if not all(kept.values()):
            trainer = trainer_of(config)
            with Report("training", settings.checkpoints[-1]) as report:
                for step, path in folders.items():
                    while trainer.steps_done < step:
                        trainer.step()
                        report.update(trainer.steps_done)
                    kept[step] = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
                    save_checkpoint(path, kept[step], config.to_json())
    return [(step, _restored(config, tensors)) for step, tensors in kept.items() if tensors is not None]


def measured(settings: Settings, dmd: DMD, step: int) -> Found:
    """The nested variances of every quantity and design at one checkpoint."""
    collected = {(design, quantity): Replicates() for design in DESIGNS for quantity in QUANTITIES}
    with Report(f"variance at step {step}", settings.inputs) as report:
        for r in range(settings.inputs):
            here = stream(0, "table 3", r)
            state = dmd.upstream(Renders((here,), 0, 1))
            for design, (renoise, coupling) in DESIGNS.items():
                at = here.child(design)
                t, noise = draws(dmd, renoise, coupling, settings.estimates, at)
                teacher, difference = signals(dmd, state, t, noise)
                means = [f[0].unflatten(0, (settings.estimates, renoise)).mean(1) for f in (teacher, difference)]
                gradient = [torch.cat([g.flatten() for g in dmd.pull_back(state, f[None], True)]) for f in means[1]]
                for quantity, one in zip(QUANTITIES, (*means, torch.stack(gradient)), strict=True):
                    collected[design, quantity].add(one.flatten(1))
            report.update(r + 1)
    return {key: one.nested() for key, one in collected.items()}


def draws(dmd: DMD, renoise: int, coupling: Coupling, estimates: int, at: Stream) -> tuple[Tensor, Tensor]:
    """t `[1, M K]` of M independent estimates of (1, K), and noise `[1, M K, *latent]`."""
    base = TermEstimator().base(dmd.teacher.schedule)
    drawn = TimestepSampler(base, coupling=COUPLINGS[coupling]).sample(estimates, renoise, at.child("t").generator())
    shape = (1, estimates * renoise, *dmd.latent_shape)
    return drawn.t.reshape(1, -1), torch.randn(shape, generator=at.child("noise").generator())


def signals(dmd: DMD, state: Generated, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """w (z - mu_real) / (C S), and f = w (mu_fake - mu_real) / (C S): `[R, K, *latent]` each."""
    real, fake = dmd.denoised(state, t, noise)
    z = state.z.detach()[:, None]
    weight = 1 / (real - z).abs().flatten(2).mean(-1).view(*t.shape, *[1] * z[0, 0].ndim)
    return weight * (z - real) / real[0, 0].numel(), weight * (fake - real) / real[0, 0].numel()


def brute_force(settings: Settings, trainer: Trainer) -> Mapping[str, Value]:
    """Variances of whole estimates of the parameter gradient, fresh inputs each time."""
    found: dict[str, Value] = {}
    balanced = dataclasses.replace(trainer.dmd.classes, balance=True)
    dmd = with_classes(trainer.dmd, dataclasses.replace(balanced, balance=False))
    cases: dict[str, tuple[TeacherGradient, int, Coupling]] = {
        name: (dmd, renoise, coupling) for name, (renoise, coupling) in DESIGNS.items()
    }
    cases["(8, 16) strata over all 8 inputs"] = (dmd, 16, "global")
    cases["(8, 1) iid, classes balanced"] = (with_classes(trainer.dmd, balanced), 1, "iid")
    if trainer.adversarial is not None:
        cases["GAN term alone, (8, 1) iid, times its weight"] = (trainer.adversarial, 1, "iid")
    for name, (task, renoise, coupling) in cases.items():
        sampler = TimestepSampler(TermEstimator().base(dmd.teacher.schedule), coupling=COUPLINGS[coupling])
        estimator = HierarchicalEstimator(sampler, RENDERS, renoise)
        variance = variance_of(name, settings.brute_force, estimator, task)
        found[name] = variance.scaled(trainer.config.gan_weight**2) if name.startswith("GAN") else variance
    return found


def variance_of(name: str, count: int, estimator: HierarchicalEstimator, task: TeacherGradient) -> Value:
    """tr Cov of an estimator, from `count` estimates and a few more for the centre of its error."""

    def estimate(kind: str, i: int) -> Tensor:
        gradient = estimator.estimate(task, stream(0, "brute force", name, kind, i)).gradient
        return torch.cat([part.flatten() for part in gradient])

    moments = Moments(torch.stack([estimate("centre", i) for i in range(8)]).mean(0))
    with Report(name, count) as report:
        for i in range(count):
            moments.update(estimate("replicate", i))
            report.update(i + 1)
    return moments.variance


def with_classes(dmd: DMD, classes: Classes) -> DMD:
    """The same term with another law of the classes in a step."""
    return DMD(dmd.teacher, dmd.generator, dmd.fake, classes, dmd.guidance_scale, dmd.weight)


def phase_costs(settings: Settings, trainer: Trainer) -> Mapping[str, Value]:
    """Processor seconds of each phase at R = 8, timed side by side."""
    dmd = trainer.dmd
    renders = Renders(tuple(stream(0, "phases", r) for r in range(RENDERS)), 0, RENDERS)
    state = dmd.upstream(renders)
    f = torch.zeros_like(state.z)
    steps: dict[str, Callable[[], object]] = {
        "generator forward": lambda: dmd.upstream(renders),
        "generator backward": lambda: dmd.pull_back(state, f, True),
        "fake-score update": trainer.fake_update,
    }
    for k in PHASE_RENOISE:
        t, noise = draws(dmd, k, "iid", RENDERS, stream(0, "phases", "draws", k))
        t, noise = t.view(RENDERS, k), noise[0].unflatten(0, (RENDERS, k))
        steps[f"teacher, K = {k}"] = lambda t=t, noise=noise: teacher_call(dmd, state, t, noise)
        steps[f"fake score, K = {k}"] = lambda t=t, noise=noise: fake_call(dmd, state, t, noise)
        if (gan := trainer.adversarial) is not None:
            steps[f"discriminator, K = {k}"] = lambda gan=gan, t=t, noise=noise: gan.contribution(state, t, noise)
    steps["AdamW of the generator"] = optimiser_step(trainer)
    timed = measure_cost(steps, stream(0, "order"), repetitions=settings.timings, clock=time.process_time)
    return {name: cost.seconds for name, cost in timed.items()}


def teacher_call(dmd: DMD, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
    """The guided teacher at R x K draws."""
    schedule = dmd.teacher.schedule
    guided = Guided(dmd.teacher, dmd.guidance_scale, state.condition, dmd.classes.null)
    return guided(schedule.add_noise(state.z.detach()[:, None], t, noise), t)


@torch.no_grad()
def fake_call(dmd: DMD, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
    """The fake score at R x K draws."""
    z_t = dmd.teacher.schedule.add_noise(state.z[:, None], t, noise)
    return over_draws(dmd.fake, z_t, t, state.condition)


def optimiser_step(trainer: Trainer) -> Callable[[], object]:
    """AdamW on a copy of the generator's weights: a graph that is pulled back again needs the weights it had."""
    copies = [parameter.detach().clone().requires_grad_() for parameter in trainer.dmd.parameters]
    for one in copies:
        one.grad = torch.zeros_like(one)
    like = trainer.optimisers["generator"].defaults
    return torch.optim.AdamW(copies, like["lr"], weight_decay=like["weight_decay"], fused=like["fused"]).step


@dataclass(frozen=True)
class Costs:
    """What the phases add up to, in seconds of one core at R = 8.

    Attributes:
        upstream: of one generator input: forward and backward of the generator.
        draw: of one (t, eps'): guided teacher and fake score, the slope between K = 1 and K = 16.
        fixed: of a step, whatever K: everything but draws and fake-score updates.
        fake: of the fake-score updates of a step.
    """

    upstream: Value
    draw: Value
    fixed: Value
    fake: Value

    @classmethod
    def of(cls, phases: Mapping[str, Value], fake_steps: int) -> Costs:
        """From the phases."""
        low, high = PHASE_RENOISE
        upstream = total([phases["generator forward"], phases["generator backward"]])
        slope = [
            total([phases[f"{network}, K = {high}"], phases[f"{network}, K = {low}"].scaled(-1)])
            for network in ("teacher", "fake score")
        ]
        draw = total(slope).scaled(1 / (RENDERS * (high - low)))
        at_one = [
            phases[f"{network}, K = {low}"]
            for network in ("teacher", "fake score", "discriminator")
            if f"{network}, K = {low}" in phases
        ]
        fixed = total([upstream, phases["AdamW of the generator"], *at_one, draw.scaled(-RENDERS * low)])
        return cls(upstream.scaled(1 / RENDERS), draw, fixed, phases["fake-score update"].scaled(fake_steps))

    def step(self, renoise: int) -> Value:
        """Of a whole step (8, K), with its fake-score updates."""
        return total([self.fixed, self.fake, self.draw.scaled(RENDERS * renoise)])

    @property
    def ratio(self) -> Value:
        """Upstream over draw, the generator alone."""
        return ratio(self.upstream, self.draw)

    @property
    def ratio_with_fake(self) -> Value:
        """(A step's time that K does not touch, fake-score updates included, per input) over draw."""
        return ratio(total([self.fixed, self.fake]).scaled(1 / RENDERS), self.draw)


def total(parts: Sequence[Value]) -> Value:
    """A sum of independent numbers."""
    return Value(sum(part.value for part in parts), math.hypot(*(part.error for part in parts)))


def record(
    settings: Settings,
    found: Mapping[int, Found],
    checked: Mapping[str, Value],
    phases: Mapping[str, Value],
    steps: Mapping[str, Value],
) -> Experiment:
    """Table 3 at every checkpoint, what it leaves at a fixed z, the check, and Figure 25."""
    last = settings.checkpoints[-1]
    costs = Costs.of(phases, settings.config().fake_steps)
    tables = [table_at(step, one) for step, one in found.items()]
    tables += [
        Table(
            "Gain of (8, 16) iid and (8, 16) strata over (8, 1) iid: all variance, and at a fixed z",
            [f"{design}, {what}" for design in list(DESIGNS)[1:] for what in ("z fresh", "z fixed")],
            {f"step {step}, {quantity}": gains(one, quantity) for step, one in found.items() for quantity in QUANTITIES}
            | {f"paper, {quantity}": paper_gains(quantity) for quantity in QUANTITIES},
        ),
        Table(
            f"Parameter gradient at step {last}: nested estimates beside {settings.brute_force} whole ones",
            ["nested", "brute force"],
            {
                name: (
                    figure(whole(found[last][name, QUANTITIES[2]]).measured) if name in DESIGNS else Figure(None),
                    figure(value),
                )
                for name, value in checked.items()
            },
        ),
        Table(
            "Seconds of one core at R = 8, by phase",
            ["seconds"],
            {name: (figure(value),) for name, value in phases.items()}
            | {f"a step {name}, timed whole": (figure(value),) for name, value in steps.items()},
        ),
        Table(
            "Cost of one generator input over that of one draw (teacher and fake score)",
            ["ratio"],
            {
                "generator alone": (figure(costs.ratio),),
                f"a whole step, its {settings.config().fake_steps} fake-score updates included": (
                    figure(costs.ratio_with_fake, paper.DISTILLATION_COST_RATIO),
                ),
            },
        ),
    ]
    return Experiment(
        "Table 3 and Figure 25",
        "How much variance of DMD's gradient do re-noising and strata remove, across and within generator inputs?",
        f"{settings.described()} One run at seed {settings.seeds[0]}, measured with {settings.inputs} inputs of "
        f"independent classes and {settings.estimates} estimates of (1, K) for each; variances are of (8, K): those of "
        "(1, K) over 8. Teacher score: w (z - mu_real) / (C S), the part of f that the frozen teacher gives. Errors "
        "are of a jackknife over inputs. The paper's columns are of DiT-XL/2 after 20,000 steps, in its own units: "
        "only ratios compare. Its three figures imply, by V(K) = across + within / K, -0.2 % of the parameter "
        "gradient's variance across inputs: none, as if z had been fixed.",
        finding(found, costs, last),
        tuple(tables),
        (variance_over_time(found[last], costs, steps), gains_over_steps(found)),
        config=settings.to_dict(),
    )


def table_at(step: int, found: Found) -> Table:
    """Rows: designs; columns: each quantity's variance, and its across- and within-input parts."""
    columns = [f"{quantity}{part}" for quantity in QUANTITIES for part in ("", ", across", ", within")]
    rows = {}
    for design in DESIGNS:
        row: list[Figure] = []
        for quantity in QUANTITIES:
            one = found[design, quantity]
            parts = (whole(one), over_renders(one.across), over_renders(one.within))
            theirs = (paper.TABLE_3[design][QUANTITIES.index(quantity)], None, None)
            row += [figure(part.measured, other) for part, other in zip(parts, theirs, strict=True)]
        rows[design] = tuple(row)
    return Table(f"Variance (trace of the covariance) at step {step}", tuple(columns), rows)


def whole(one: Nested) -> Jackknifed:
    """Of (8, K)."""
    return over_renders(one.variance)


def over_renders(part: Jackknifed) -> Jackknifed:
    return derived(lambda x: x / RENDERS, part)


def gain(found: Found, design: str, quantity: str, fixed: bool) -> Value:
    """Var of (8, 1) iid over Var of a design, on the same inputs."""

    def part(name: str) -> Jackknifed:
        return found[name, quantity].within if fixed else found[name, quantity].variance

    return derived(lambda a, b: a / b, part(next(iter(DESIGNS))), part(design)).measured


def gains(found: Found, quantity: str) -> tuple[Figure, ...]:
    """Of both designs, with z fresh and z fixed."""
    return tuple(
        figure(gain(found, design, quantity, fixed)) for design in list(DESIGNS)[1:] for fixed in (False, True)
    )


def paper_gains(quantity: str) -> tuple[Figure, ...]:
    """The paper's, which does not say whether z was fixed: shown in both places."""
    place = QUANTITIES.index(quantity)
    one, *others = (paper.TABLE_3[design][place] for design in DESIGNS)
    return tuple(Figure(None, None, one / other) for other in others for _ in range(2))


def variance_over_time(found: Found, costs: Costs, steps: Mapping[str, Value]) -> Chart:
    """Figure 25: the parameter gradient's variance over the seconds of a step."""
    quantity = QUANTITIES[2]
    one, strata = found["(8, 1) iid", quantity], whole(found["(8, 16) strata", quantity]).measured
    iid = [derived(lambda a, w, k=k: (a + w / k) / RENDERS, one.across, one.within).measured for k in CURVE_RENOISE]
    wide = derived(lambda v: v / 48, one.variance).measured
    lines = {
        "(8, K) iid, K = 1 to 16": ([costs.step(k).value for k in CURVE_RENOISE], iid),
        "(8, 16) strata": ([costs.step(16).value], [strata]),
        "(8, 1) and (48, 1) iid": ([steps["(8, 1)"].value, steps["(48, 1)"].value], [iid[0], wide]),
    }
    return Chart(
        "Variance of the parameter gradient against the time of a step (Fig. 25)",
        "seconds of one core for a generator update with its fake-score updates",
        "trace of the covariance",
        {
            name: Curve(tuple(x), *(tuple(v.value + s * v.error for v in y) for s in (0, -1, 1)))
            for name, (x, y) in lines.items()
        },
        "one standard error over inputs",
        log_x=True,
        log_y=True,
    )


def gains_over_steps(found: Mapping[int, Found]) -> Chart:
    """What the paper left open: the gain in the middle of training."""
    steps = tuple(float(step) for step in found)
    lines = {}
    for quantity in QUANTITIES:
        values = [gain(one, "(8, 16) strata", quantity, False) for one in found.values()]
        lines[quantity] = Curve(steps, *(tuple(v.value + s * v.error for v in values) for s in (0, -1, 1)))
    return Chart(
        "Gain of (8, 16) strata over (8, 1) iid during training",
        "generator updates",
        "variance of (8, 1) iid over that of (8, 16) strata",
        lines,
        "one standard error over inputs",
    )


def finding(found: Mapping[int, Found], costs: Costs, last: int) -> str:
    """One sentence with the numbers that matter."""
    quantity, (iid, strata) = QUANTITIES[2], list(DESIGNS)[1:]
    fresh, fixed = (
        " and by ".join(f"{gain(found[last], design, quantity, z)}" for design in (iid, strata)) for z in (False, True)
    )
    one = found[last]["(8, 1) iid", quantity]
    share = derived(lambda a, v: a / v, one.across, one.variance).measured
    return (
        f"At step {last}, {iid} and {strata} divide the variance of the parameter gradient by {fresh}; at a fixed z by "
        f"{fixed}, as the paper's 16.4 and 32: {share.scaled(100)} % of the variance of (8, 1) is across inputs, which "
        f"no re-noising touches. One input costs {costs.ratio} draws, {costs.ratio_with_fake} with its share of the "
        "fake-score updates (paper: 27, of both kinds of iteration averaged)."
    )


def _restored(config: DistillConfig, tensors: Mapping[str, Tensor]) -> Trainer:
    trainer = trainer_of(config)
    trainer.load_state_dict(dict(tensors))
    independent = dataclasses.replace(trainer.dmd.classes, balance=False)
    trainer.dmd = with_classes(trainer.dmd, independent)
    if trainer.adversarial is not None:
        trainer.adversarial.dmd = trainer.dmd
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings))
