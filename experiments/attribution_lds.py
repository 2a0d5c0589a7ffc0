"""Do scores predict what training without a clip does? LDS with networks trained from scratch on halves (App. D.3.2).

    python experiments/attribution_lds.py [--quick] [--out DIR] [--teacher small]

attribution_value fine-tunes the teacher on halves of the candidates; here each network begins with random weights and
sees nothing but its half, on the teacher's latents and under its text encoder. The scores are from gradients of one
more network, trained in the same way on all candidates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import tyro
from attribution_finetune import Encoded, mean_losses
from attribution_gradients import BankSettings, gradients
from attribution_retraining import datamodelling, halves, kept_losses
from attribution_setting import VALUE_SEED, ValueSetting
from attribution_value import SMALL, gains, shown
from records import publish
from torch import Tensor, stack

from carv.console import Report
from carv.report.experiment import Experiment, Table
from carv.teachers.small import small_wan
from carv.training.clips.retrain import FrozenParts, train_denoiser_on
from carv.world.clips import make_clips


@dataclass(frozen=True)
class Settings(ValueSetting):
    """Networks trained from scratch."""

    steps: int = 1000
    """Of each training."""
    batch: int = 8
    """Latents in a step."""
    rate: float = 2e-3
    """The highest of learning."""
    parameters: str | None = None
    """All: no part of these networks is known to suffice."""


def main(settings: Settings) -> None:
    settings = settings.sized(**SMALL)
    teacher, clips = settings.load_teacher(), make_clips(settings.clips, VALUE_SEED, lengths=(9,))
    folder = small_wan() if settings.teacher == "small" else settings.teacher
    parts = FrozenParts.load(folder, clips)
    train = partial(
        train_denoiser_on,
        parts=parts,
        steps=settings.steps,
        seed=settings.seed,
        rate=settings.rate,
        batch=settings.batch,
    )
    encoded = Encoded.of(teacher, clips)
    asked = range(settings.candidates, settings.clips)

    def losses_of(places: list[int]) -> Tensor:
        return mean_losses(
            teacher.with_network(train(places)), encoded, asked, settings.loss_draws, settings.seed, settings.shift
        )

    start, subsets = digest(parts), halves(settings)
    losses = []
    with Report("training on halves", settings.subsets) as report:
        for m, subset in enumerate(subsets):
            chosen = subset.nonzero()[:, 0].tolist()
            losses.append(kept_losses(settings, start, f"scratch-{m}", partial(losses_of, chosen)))
            report.update(m + 1)
    whole = teacher.with_network(train(list(range(settings.candidates))))
    bank = gradients(settings, whole, clips, BankSettings())
    scored = datamodelling(settings, bank, None, subsets, -stack(losses))
    experiment = Experiment(
        "Attribution LDS",
        "Do scores predict what training from scratch without a clip does?",
        f"Teacher {settings.teacher!r} gives latents and text; {settings.subsets} transformers of its size from random "
        f"weights, each trained for {settings.steps} steps of {settings.batch} on a random half of "
        f"{settings.candidates} clips of 9 frames, all with the same initial weights; outcomes are minus the losses of "
        f"{settings.queries} other clips at {settings.loss_draws} draws. Gradients, of all parameters, are those of a "
        f"transformer trained on all {settings.candidates}, projected to {settings.dimensions} dimensions; a bank of "
        f"{settings.cells} timesteps with one noise each. Errors from a bootstrap over halves and queries.",
        finding(scored),
        tuple(scored),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("attribution_lds"))


def finding(scored: list[Table]) -> str:
    rows = scored[1].rows
    others = ", ".join(f"{name} {shown(row[0])}" for name, row in rows.items() if name != "Eq. 11")
    return (
        f"The LDS of Eq. 11 is {shown(rows['Eq. 11'][0])}; of other scores from the same gradients: {others}. What "
        f"strata add to iid draws at equal budgets: {gains(scored[0].rows['gain of strata'])}."
    )


def digest(parts: FrozenParts) -> str:
    """Of the latents and the texts that trainings begin with."""
    found = hashlib.sha256(parts.states.numpy().tobytes())
    for latent in parts.data.latents:
        found.update(latent.numpy().tobytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    main(tyro.cli(Settings))
