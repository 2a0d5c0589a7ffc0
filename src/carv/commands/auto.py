"""`carv sds --auto`: a short warm-up and a pilot choose the estimator, then the run starts with it.

A run has a fixed number of steps, so what it wants of each step is the least variance at a price that it pays anyway:
that of the standard estimator, (R, K) = (4, 1) uniform iid, as in the paper's comparisons at equal cost per iteration.
The largest ECM alone would often name a cheaper and noisier step, which pays only if the steps saved on are made up
for. So the rule is that of `carv advise --budget`.

The run then starts at step 0, not at the warm-up's end: one estimator makes all of it, it is the run that the same
estimator's options give bit for bit, and at most 100 steps are spent twice.

The pilot sees one state of the field, after the warm-up, and independent renders: a run that spreads its cameras over
a step (`stratify_azimuth`) has less variance at R > 1 than is predicted here, so the choice leans towards small R.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from carv.checkpoint import CHECKPOINT, RunFolderError, load_checkpoint, other_settings, save_checkpoint, write_whole
from carv.commands import advise as advise_command
from carv.commands.pilot import PilotConfig, run_pilot
from carv.console import Report
from carv.problems import ProblemConfig
from carv.runs.pilot_folder import PILOT, TABLES, PilotRecord
from carv.strict_json import dumps, plain
from carv.tasks.sds.config import STANDARD, EstimatorConfig, SDSConfig
from carv.tasks.sds.train import Trainer, load_teacher
from carv.variance.advice import Advice, Candidate, Design
from carv.variance.moments import TRUSTED_SHARE
from carv.variance.values import Value

FOLDER, CHOICE = "auto", "choice.json"
FORMAT = 1

_KEPT = ("t_min", "t_max", "micro_batch")  # of the estimator's settings: they change no design


@dataclass(frozen=True)
class AutoConfig:
    """What --auto may spend on its choice."""

    warm_up: Annotated[int | None, tyro.conf.arg(name="auto-warm-up")] = None
    """Training steps before the pilot; by default a tenth of the run's, at least 20 and at most 100."""
    renders: Annotated[int, tyro.conf.arg(name="auto-renders")] = 16
    """R0: renders of the pilot."""
    bins: Annotated[int, tyro.conf.arg(name="auto-bins")] = 8
    """M: bins of t in the pilot."""
    noises: Annotated[int, tyro.conf.arg(name="auto-noises")] = 2
    """N: draws in each bin, and one more for antithetic pairs."""
    repetitions: Annotated[int, tyro.conf.arg(name="auto-repetitions")] = 9
    """Of each timing."""
    budget: Annotated[float | None, tyro.conf.arg(name="auto-budget")] = None
    """The most that the estimate of one step may cost, in seconds; by default what (4, 1) uniform iid costs."""

    def __post_init__(self) -> None:
        for name, least in (("warm_up", 1), ("renders", 4), ("bins", 1), ("noises", 2), ("repetitions", 6)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--auto-{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"--auto-budget must be positive, got {self.budget}")

    def warm_up_steps(self, steps: int) -> int:
        """Of a run of so many steps, never more than these."""
        return min(steps, max(20, min(100, steps // 10)) if self.warm_up is None else self.warm_up)


@dataclass(frozen=True)
class Choice:
    """The estimator that a pilot chose, and why.

    Attributes:
        estimator: of the run.
        record: what `choice.json` holds.
    """

    estimator: EstimatorConfig
    record: dict[str, Any]


def choose(
    config: SDSConfig,
    auto: AutoConfig,
    out: Path,
    checkpoint_every: int = 50,
    overwrite: bool = False,
    quiet: bool = False,
) -> Choice:
    """The estimator of least variance at the budget, from a pilot at the run's own state after a warm-up.

    Leaves in OUT/auto the warm-up's checkpoint, a pilot's folder (for `carv advise` and `carv report`) and choice.json.
    After a stop at any time the same call goes on: a choice that is there is read, never measured again; else the
    warm-up goes on from its checkpoint and the pilot is made anew.

    Args:
        config: the run's settings; the estimator's are the defaults, but for t_min, t_max and micro_batch.
        auto: what the choice may cost.
        out: the run's folder.
        checkpoint_every: steps between checkpoints of the warm-up.
        overwrite: start again where the folder holds another run.
        quiet: say nothing but errors.

    Raises:
        RunFolderError: the folder holds another run, or damaged files.
        ValueError: estimator options beside --auto; a budget that no design meets; what the pilot refuses.
    """
    _refuse_options(config.estimator)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    folder = out / FOLDER
    settings = plain({"run": dataclasses.asdict(config), "auto": dataclasses.asdict(auto)})
    if overwrite:
        for name in (CHOICE, PILOT, TABLES, CHECKPOINT):  # the choice first: it must not outlive what it rests on
            (folder / name).unlink(missing_ok=True)
    elif (folder / CHOICE).exists():
        return _read(folder, settings)
    elif (out / CHECKPOINT).exists():  # the run itself starts after its choice
        raise other_settings(out)
    steps, started = auto.warm_up_steps(config.steps), time.perf_counter()
    done = _warm_up(config, steps, folder, checkpoint_every, quiet)
    warm = time.perf_counter()
    record = _pilot(config, auto, folder, quiet)
    seconds = {"warm_up": warm - started, "warm_up_steps": done, "pilot": time.perf_counter() - warm}
    budget = record.cost.predict(STANDARD.renders, STANDARD.renoise).value if auto.budget is None else auto.budget
    advice = advise_command.advise_from(folder, advise_command.AdviseConfig(budget=budget))[1]
    chosen = settle(advice)
    estimator = dataclasses.replace(config.estimator, **vars(chosen.design))
    found = {
        "kind": "choice",
        "format": FORMAT,
        "settings": settings,
        "estimator": dataclasses.asdict(estimator),
        "gain_is_shown": chosen is advice.best,
        "budget": {"seconds": budget, "is": f"the cost of {STANDARD}" if auto.budget is None else "given"},
        "advice": _advice(record, advice),
        "tails": {"top_share": record.tables.top_share, "trusted": record.tables.top_share <= TRUSTED_SHARE},
        "seconds": seconds,
        "expected_run_seconds": vars(chosen.cost.scaled(config.steps)),
        "warm_up_steps": steps,
        "provenance": dict(record.provenance),
    }
    write_whole(folder / CHOICE, (dumps(found, indent=1) + "\n").encode())
    return Choice(estimator, plain(found))


def settle(advice: Advice) -> Candidate:
    """The best cell, if its gain is shown: the 95 % interval of its ECM lies above 1.

    Otherwise, of the best and those that cannot be told apart from it, the simplest: fewest of a proposal, strata and
    antithetic pairs, and of those the cheapest. The best of many looks a little better than it is; that can cost
    simplicity but not correctness, for every cell is unbiased and within the budget.
    """
    if advice.gain.interval[0] > 1:
        return advice.best

    def order(cell: Candidate) -> tuple[float, ...]:
        design = cell.design
        parts = (design.proposal != "uniform") + (design.coupling != "iid") + design.antithetic
        return parts, cell.cost.value, cell.prediction.variance.value

    return min((advice.best, *advice.tied), key=order)


def _refuse_options(given: EstimatorConfig) -> None:
    names = [part.name for part in dataclasses.fields(given) if part.name not in _KEPT]
    changed = [name for name in names if getattr(given, name) != getattr(EstimatorConfig(), name)]
    if changed:
        options = ", ".join(f"--{name}" for name in changed)
        raise ValueError(f"--auto chooses the estimator: leave out {options}, or leave out --auto")


def _read(folder: Path, settings: dict[str, Any]) -> Choice:
    """The choice that is there.

    Raises:
        RunFolderError: it was made with other settings, or it is damaged.
    """
    path = folder / CHOICE
    try:
        record = json.loads(path.read_text())
        if record["kind"] != "choice" or record["format"] != FORMAT:
            raise ValueError(f"not a choice of format {FORMAT}")
        made_with, estimator = record["settings"], EstimatorConfig(**record["estimator"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); remove it to choose again") from error
    if made_with != settings:
        raise other_settings(folder.parent)
    return Choice(estimator, record)


def _warm_up(config: SDSConfig, steps: int, folder: Path, checkpoint_every: int, quiet: bool) -> int:
    """Train to the state that the pilot measures, and leave it as a checkpoint; how many steps were still to be done.

    The settings stay those of the whole run: its learning rates at these steps depend on how many there will be.
    """
    saved = load_checkpoint(folder, config.to_json())
    if saved is not None and int(saved["steps_done"]) == steps:
        return 0
    if saved is not None and int(saved["steps_done"]) > steps:
        raise other_settings(folder.parent)
    with Report(f"carv sds --auto, warm-up: {config.prompt}", steps, quiet) as report:
        trainer = Trainer(config, load_teacher(config, report.say))
        if saved is not None:
            trainer.load_state_dict(saved)
            report.say(f"going on with the warm-up from step {trainer.steps_done} in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        first = trainer.steps_done
        try:
            while trainer.steps_done < steps:
                trainer.step()
                report.update(trainer.steps_done)
                if trainer.steps_done % checkpoint_every == 0 and trainer.steps_done < steps:
                    save_checkpoint(folder, trainer.state_dict(), config.to_json())
        finally:  # also on Ctrl-C
            if trainer.steps_done > first:
                save_checkpoint(folder, trainer.state_dict(), config.to_json())
    return steps - first


def _pilot(config: SDSConfig, auto: AutoConfig, folder: Path, quiet: bool) -> PilotRecord:
    estimator = config.estimator
    problem = ProblemConfig("sds", run=folder, t_min=estimator.t_min, t_max=estimator.t_max)
    settings = PilotConfig(
        auto.renders,
        auto.bins,
        auto.noises,
        micro_batch=estimator.micro_batch or PilotConfig.micro_batch,
        repetitions=auto.repetitions,
        seed=config.seed,
    )
    return run_pilot(problem, settings, folder, quiet)


def _advice(record: PilotRecord, advice: Advice) -> dict[str, Any]:
    """As `carv advise --json`, without the provenance that the choice has itself."""
    found = advise_command.to_json(record, advice)
    return {name: value for name, value in found.items() if name not in record.provenance}


def summary(choice: Choice) -> str:
    """What was chosen, what it gains, what binds, and what the choice cost, in a few lines."""
    record, advice = choice.record, choice.record["advice"]
    gain, seconds = advice["ecm"], record["seconds"]
    low, high = (math.inf if end is None else end for end in gain["interval"])
    interval = f"95 % interval {low:.4g} to {high:.4g}"
    factor = f"ECM {_saved(gain).times()} against {gain['baseline']}, {interval}"
    if record["gain_is_shown"]:
        first = f"chosen: {choice.estimator}; {factor}"
    else:
        first = (
            f"chosen: {choice.estimator}, the simplest that this pilot cannot tell apart from the best, "
            f"{Design(**advice['design'])}, of which it shows no gain: {factor}"
        )
    first += f"; the {advice['binds']} binds" + ("" if advice["binds_clearly"] else ", though not clearly")
    top = record["tails"]["top_share"]
    if top is None:
        first += "; fewer than 100 draws: too few to check the tails"
    elif not record["tails"]["trusted"]:
        first += f"; the top 1 % of draws carry {top:.0%} of the squares: too heavy a tail to trust these figures"
    spent, expected = seconds["warm_up"] + seconds["pilot"], _saved(record["expected_run_seconds"])
    steps, earlier = seconds["warm_up_steps"], record["warm_up_steps"] - seconds["warm_up_steps"]
    parts = f"{steps} steps of warm-up {seconds['warm_up']:.1f} s, pilot {seconds['pilot']:.1f} s"
    parts += f"; {earlier} steps before a stop not counted" if earlier else ""
    return (
        f"{first}\nthe choice took {spent:.1f} s ({parts}): {spent / expected.value:.0%} of the {expected} s that the "
        "run's gradient estimates are expected to take"
    )


def _saved(given: Mapping[str, Any]) -> Value:
    """A number of the record; JSON has no infinite errors."""
    return Value(given["value"], math.inf if given["error"] is None else given["error"])
