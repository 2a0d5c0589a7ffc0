"""Does a better ranking matter? Retrieval, linear datamodelling score, and fine-tuning on the top clips (App. D.3.2).

    python experiments/attribution_value.py [--quick] [--out DIR] [--teacher small]

The paper leaves it open. Here every clip's motion and digit are known, and the teacher is small enough to be fine-tuned
many times: on random halves of the candidates (LDS), and on the clips that a ranking puts first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from attribution_finetune import Encoded
from attribution_gradients import BankSettings, gradients
from attribution_racing import racing_table
from attribution_retraining import datamodelling, retrained, tuned_table
from attribution_retrieval import retrieval_tables
from attribution_setting import VALUE_SEED, ValueSetting
from records import publish

from carv.report.experiment import Experiment, Figure, Table
from carv.variance.values import Value
from carv.world.clips import make_clips

SMALL = {
    "sets": 2, "clips": 14, "queries": 4, "cells": 16, "trials": 5, "budgets_shown": (2, 4), "top": 3, "subsets": 4,
    "steps": 2, "batch": 4, "loss_draws": 4, "tuned_queries": 2, "tuned_top": 3,
    "race_trials": 2, "race_starts": (1, 2), "lds_trials": 2, "resamples": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Settings(ValueSetting):
    """What a ranking is worth."""


def main(settings: Settings) -> None:
    settings = settings.sized(**SMALL)
    teacher, clips = settings.load_teacher(), make_clips(settings.clips, VALUE_SEED, lengths=(9,))
    bank = gradients(settings, teacher, clips, BankSettings())
    masked = gradients(settings, teacher, clips, BankSettings(masked=True))
    encoded = Encoded.of(teacher, clips)
    outcomes, subsets = retrained(settings, teacher, encoded)
    scored = datamodelling(settings, bank, masked, subsets, outcomes)
    retrieval = retrieval_tables(settings, clips, {"": bank.cosines(), "with motion masks": masked.cosines()})
    race = racing_table(settings, bank.cosines())
    tuned = tuned_table(settings, teacher, encoded, bank)
    experiment = Experiment(
        "Attribution value",
        "Does the better ranking of strata find better clips?",
        f"Teacher {settings.teacher!r}; {settings.clips} clips of 9 frames that it was not trained on; gradients "
        f"projected to {settings.dimensions} dimensions, a bank of {settings.cells} timesteps with one noise each, "
        f"{settings.trials} samplings for each budget. Retrieval: each clip in turn is the query, errors over queries. "
        f"LDS: {settings.subsets} random halves of {settings.candidates} candidates, each fine-tuned on for "
        f"{settings.steps} steps of {settings.batch} clips, {settings.queries} queries; errors from a bootstrap over "
        "halves and queries, the same resamples for all rows. Fine-tuning: on the top clips of a query, errors over "
        "queries.",
        finding(scored, retrieval, race, tuned),
        (*retrieval, race, *scored, tuned),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("attribution_value"))


def finding(scored: Sequence[Table], retrieval: Sequence[Table], race: Table, tuned: Table) -> str:
    chance, whole = (retrieval[0].rows[name][0] for name in ("chance", "whole bank"))
    saved = max((row[-1] for row in race.rows.values()), key=lambda one: one.value or 0.0)
    return (
        f"The top clips have their query's motion in {percent(whole)} (chance {percent(chance)}); the LDS of Eq. 11 is "
        f"{shown(scored[1].rows['Eq. 11'][0])}. What strata add to iid draws at equal budgets: "
        f"{gains(scored[0].rows['gain of strata'])} in LDS, {gains(retrieval[1].rows['of the motion, gain'])} in the "
        f"share of the query's motion; after fine-tuning on the top clips the query's loss is "
        f"{shown(tuned.rows['strata against iid'][0])} percent lower. Successive halving finds the top clips with "
        f"{shown(saved)} times fewer gradients than strata for all."
    )


def shown(one: Figure) -> str:
    return "not measured" if one.value is None else str(Value(one.value, one.error or 0.0))


def percent(one: Figure) -> str:
    return "an unknown share" if one.value is None else f"{Value(one.value, one.error or 0.0).scaled(100)} %"


def gains(row: Sequence[Figure]) -> str:
    return ", ".join(shown(one) for one in row)


if __name__ == "__main__":
    main(tyro.cli(Settings))
