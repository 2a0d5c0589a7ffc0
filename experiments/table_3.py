"""Table 3 and Figure 25: variance of DMD's gradient, across and within generator inputs, and what each phase costs.

    python experiments/table_3.py [--quick] [--out DIR] [--teacher small]

Three quantities on the same draws: the teacher's part alone (mu_real - z, weighted as in DMD), the score difference f,
and the parameter gradient f dz/dtheta. For n inputs z, and M estimates of (1, K) for each of them,

    Var(R, K) = (across + within) / R,     across = tr Cov_z(E[g | z]),     within = E_z tr Cov(g | z)

so that the variance at a FIXED z, within / R, can be told from the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import tyro
from distill_phases import RENDERS, draws, phase_costs
from distill_runs import step_costs, trainer_of, weights_digest
from distill_setting import Coupling, digest
from locks import alone
from nested import Replicates
from records import publish
from table_3_record import DESIGNS, QUANTITIES, Found, Settings, record
from torch import Tensor

from carv.checkpoint import load_checkpoint, save_checkpoint
from carv.console import Report
from carv.estimator import HierarchicalEstimator
from carv.gradient import Renders, TeacherGradient
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.strata import COUPLINGS
from carv.tasks.distill.config import DistillConfig, TermEstimator
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Classes
from carv.tasks.distill.train import Trainer
from carv.variance.moments import Moments
from carv.variance.values import Value


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
