"""Networks fine-tuned on parts of the clips: the linear datamodelling score, and what the top clips do for a query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from attribution_finetune import Encoded, Tuning, fine_tune, kept, mean_losses
from attribution_gradients import Bank, teacher_digest
from attribution_retrieval import over_queries
from attribution_setting import ValueSetting
from attribution_trials import Design, shares
from jaxtyping import Bool
from records import Row, table
from torch import Tensor

from carv.checkpoint import load_or_make
from carv.console import Report
from carv.report.experiment import Table
from carv.rng import stream
from carv.tasks.attribution.baselines import mean_gradients, tracin, trak
from carv.tasks.attribution.lds import LDS, lds
from carv.tasks.attribution.scores import influence
from carv.teachers.diffusers import DiffusersTeacher
from carv.variance.values import Value

ARMS = ("whole bank", "strata", "iid", "random")
REPEATS = 2
"""Rankings of few draws, and random choices, for each query."""


def halves(settings: ValueSetting) -> Bool[Tensor, "M N"]:
    """Random halves of the candidates."""
    at = stream(settings.seed, "subsets")
    count = settings.candidates
    subsets = torch.zeros(settings.subsets, count, dtype=torch.bool)
    for m in range(settings.subsets):
        subsets[m, torch.randperm(count, generator=at.child(m).generator())[: count // 2]] = True
    return subsets


def retrained(settings: ValueSetting, teacher: DiffusersTeacher, clips: Encoded) -> tuple[Tensor, Tensor]:
    """(outcomes `[M, Q]`, subsets `[M, N]`): minus the queries' losses of networks fine-tuned on halves; made once."""
    asked = range(settings.candidates, settings.clips)
    start, subsets = teacher_digest(teacher), halves(settings)
    rows = []
    with Report("fine-tuning on halves", settings.subsets) as report:
        for m, subset in enumerate(subsets):
            chosen = subset.nonzero()[:, 0]
            rows.append(
                kept_losses(
                    settings, start, f"half-{m}", partial(_losses_after, settings, teacher, clips, chosen, asked)
                )
            )
            report.update(m + 1)
    return -torch.stack(rows), subsets


def _losses_after(
    settings: ValueSetting, teacher: DiffusersTeacher, clips: Encoded, chosen: Tensor, asked: Sequence[int]
) -> Tensor:
    """Losses of the clips asked for, after fine-tuning on the chosen ones; order and noise are the same for all."""
    tuning = Tuning(settings.steps, settings.batch, settings.rate, settings.shift)
    with kept(teacher):
        fine_tune(teacher, clips, chosen, tuning, stream(settings.seed, "fine-tune"))
        return mean_losses(teacher, clips, asked, settings.loss_draws, settings.seed, settings.shift)


_NOT_OF_RETRAINING = (
    "runs", "out", "teacher", "quick", "sets", "trials", "budgets_shown", "top", "subsets", "tuned_queries",
    "lds_trials", "race_starts", "race_trials", "resamples",
)  # fmt: skip


def kept_losses(settings: ValueSetting, start: str, name: str, make: Callable[[], Tensor]) -> Tensor:
    """Losses after one training or a few, made once for a start, a digest of what they began with."""
    own = {key: value for key, value in settings.to_dict().items() if key not in _NOT_OF_RETRAINING}
    config = json.dumps({"name": name, "teacher": start, **own}, sort_keys=True)
    folder = settings.runs / "attribution" / f"{name}-{hashlib.sha256(config.encode()).hexdigest()[:12]}"
    return load_or_make(folder, config, lambda: {"losses": make()})["losses"]


def datamodelling(
    settings: ValueSetting, bank: Bank, masked: Bank | None, subsets: Tensor, outcomes: Tensor
) -> list[Table]:
    """The linear datamodelling score of rankings: of few draws, and of other scores from the whole bank."""
    at = stream(settings.seed, "lds")
    n = settings.candidates

    def judged(scores: Tensor) -> LDS:
        return lds(scores, subsets, outcomes, stream=at, resamples=settings.resamples)

    cosines = torch.from_numpy(bank.cosines())[:, n:, :n]
    found: dict[str, list[Tensor]] = {}
    for design in ("iid", "strata"):
        for budget in settings.budgets_shown:
            weights = shares(design, budget, settings.lds_trials, settings.cells, at.child(design, budget))
            scores = torch.einsum("tm,mqn->tqn", torch.from_numpy(weights), cosines)
            some = [judged(one) for one in scores]
            found.setdefault(design, []).append(
                torch.cat(
                    [
                        torch.tensor([np.mean([one.value for one in some])]),
                        torch.stack([one.resampled for one in some]).mean(0),
                    ]
                )
            )
    rows: dict[str, Row] = {design: [_with_error(one) for one in parts] for design, parts in found.items()}
    rows["gain of strata"] = [_with_error(b - a) for a, b in zip(found["iid"], found["strata"], strict=True)]
    weight = torch.ones(settings.cells, dtype=torch.float64)
    means = mean_gradients(bank.vectors, weight)
    others = {
        "Eq. 11": cosines.mean(0),
        "Eq. 11, not normalised": influence(bank.vectors[n:], bank.vectors[:n], normalise=False),
        "TracIn": tracin([means[n:]], [means[:n]], [1.0]),
        "cosine of mean gradients": _unit(means[n:]) @ _unit(means[:n]).T,
        "TRAK": trak(means[n:], means[:n], ridge=1.0),
    }
    if masked is not None:
        others["Eq. 11 with motion masks"] = torch.from_numpy(masked.cosines())[:, n:, :n].mean(0)
    judgements = {name: judged(scores) for name, scores in others.items()}
    first = judgements["Eq. 11"]
    whole: dict[str, Row] = {
        name: [
            Value(one.value, one.error),
            None if one is first else Value(one.value - first.value, float((one.resampled - first.resampled).std())),
        ]
        for name, one in judgements.items()
    }
    return [
        table("Linear datamodelling score from few draws", [f"{b} draws" for b in settings.budgets_shown], rows, {}),
        table("Linear datamodelling score from the whole bank", ["score", "beyond Eq. 11"], whole, {}),
    ]


def _with_error(values: Tensor) -> Value:
    """A value and its resamples."""
    return Value(float(values[0]), float(values[1:].std()))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def tuned_table(settings: ValueSetting, teacher: DiffusersTeacher, clips: Encoded, bank: Bank) -> Table:
    """By how much fine-tuning on the clips that a ranking puts first lowers the query's loss, in percent."""
    n = settings.candidates
    asked = range(n, n + settings.tuned_queries)

    rows_by_query = []
    start = teacher_digest(teacher)
    with Report("fine-tuning on top clips", len(asked)) as report:
        for i, query in enumerate(asked):
            one = partial(_gains, settings, teacher, clips, bank, query)
            rows_by_query.append(kept_losses(settings, start, f"top-{query}", one))
            report.update(i + 1)
    each = torch.stack(rows_by_query).numpy()
    place = {arm: i for i, arm in enumerate(ARMS)}
    rows = {
        arm: [over_queries(each[:, i]), over_queries(each[:, i] - each[:, place["random"]])] for arm, i in place.items()
    }
    rows["random"][1] = None  # type: ignore[index]
    rows["strata against iid"] = [over_queries(each[:, place["strata"]] - each[:, place["iid"]]), None]
    title = (
        f"Loss of the query after fine-tuning on {settings.tuned_top} clips, percent lower than before; rankings of "
        f"{settings.tuned_budget} draws"
    )
    return table(title, ["lower by", "more than random"], rows, {})


def _gains(settings: ValueSetting, teacher: DiffusersTeacher, clips: Encoded, bank: Bank, query: int) -> Tensor:
    """For each of `ARMS` by how many percent the query's loss falls; the mean over its choices."""
    (before,) = mean_losses(teacher, clips, [query], settings.loss_draws, settings.seed, settings.shift)
    chosen = choices(settings, bank, query)
    after = {arm: [_losses_after(settings, teacher, clips, one, [query]) for one in chosen[arm]] for arm in ARMS}
    return torch.stack([100 * (1 - torch.cat(after[arm]).mean() / before) for arm in ARMS])


def choices(settings: ValueSetting, bank: Bank, query: int) -> dict[str, list[Tensor]]:
    """Arm -> sets of clips to fine-tune on for a query."""
    n = settings.candidates
    unit = bank.directions
    terms = torch.einsum("nmk,mk->mn", unit[:n], unit[query]).double()
    at = stream(settings.seed, "tops", query)

    def top(scores: Tensor) -> Tensor:
        return torch.topk(scores, settings.tuned_top).indices

    def few(design: Design) -> list[Tensor]:
        weights = shares(design, settings.tuned_budget, REPEATS, settings.cells, at.child(design))  # type: ignore[arg-type]
        return [top(torch.from_numpy(row) @ terms) for row in weights]

    random = [
        torch.randperm(n, generator=at.child("random", i).generator())[: settings.tuned_top] for i in range(REPEATS)
    ]
    return {"whole bank": [top(terms.mean(0))], "strata": few("strata"), "iid": few("iid"), "random": random}
