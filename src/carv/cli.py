"""The command line, made from the typed configurations.

Exit codes: 0 done; 1 the answer is no (a bias was found, cells of a sweep failed); 2 bad input, with one sentence on
standard error; 3 cannot tell yet; 130 interrupted, with what to do next.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import OmitArgPrefixes as Flat  # --renders, not --config.estimator.renders

from carv.commands import advise as advise_command
from carv.commands import auto as auto_command
from carv.commands import check as check_command
from carv.commands import measure as measure_command
from carv.commands import pilot as pilot_command
from carv.commands import sweep as sweep_command
from carv.commands.teachers import Teacher
from carv.console import fail
from carv.problems import ProblemConfig
from carv.runs.sweep import SweepConfig
from carv.strict_json import dumps
from carv.tasks.attribution.config import AttributionConfig
from carv.tasks.distill.config import DistillConfig
from carv.tasks.sds import run as sds_run
from carv.tasks.sds.compare import CompareConfig, compare, summary
from carv.tasks.sds.config import SDSConfig

Threads = Annotated[int, tyro.conf.arg(help="CPU threads; 0 leaves torch's choice.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the results as JSON and nothing else.")]


def sds(
    config: Flat[SDSConfig],
    auto_config: Flat[auto_command.AutoConfig],
    out: Path,
    auto: bool = False,
    checkpoint_every: int = 50,
    overwrite: bool = False,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Optimise a 3D object towards a prompt, e.g. carv sds "a red chair" --auto --out chair

    Writes turntable.gif, contact_sheet.png, mesh.glb, metrics.json and a checkpoint; the same command goes on
    from the checkpoint if it was stopped.

    Args:
        config: Settings.
        auto_config: What --auto may spend.
        out: The run's folder.
        auto: Let a short pilot choose R, K, the proposal, the coupling and antithetic noise for this prompt and
            machine; it leaves itself in OUT/auto.
        checkpoint_every: Steps between checkpoints.
        overwrite: Start again where the folder holds another run.
    """
    _set_threads(threads)
    if not auto and auto_config != auto_command.AutoConfig():
        raise ValueError("options of --auto were given without it: add --auto, or leave them out")
    choice = None
    if auto:
        choice = auto_command.choose(config, auto_config, out, checkpoint_every, overwrite, quiet=json_only)
        config = dataclasses.replace(config, estimator=choice.estimator)
        if not json_only:
            print(auto_command.summary(choice), flush=True)
    metrics = sds_run.run(config, out, checkpoint_every, overwrite, quiet=json_only)
    if choice is not None:
        metrics = metrics | {"auto": choice.record}
    if json_only:
        print(json.dumps(metrics))
        return
    print(sds_run.summary(metrics, out))


def compare_sds(config: Flat[CompareConfig], out: Path, json_only: Json = False, threads: Threads = 0) -> None:
    """Standard SDS against carv at the same wall-clock time, on one prompt.

    Args:
        config: Settings.
        out: Where the figure, the renders and comparison.json go.
    """
    _set_threads(threads)
    result = compare(config, out, quiet=json_only)
    _print(json_only, lambda: result, lambda: summary(result, out))


def pilot(
    problem: Flat[ProblemConfig],
    config: Flat[pilot_command.PilotConfig],
    out: Path,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Measure where a gradient's variance comes from, once, for every (R, K) and sampler: carv pilot toy --out DIR

    Writes tables.safetensors and pilot.json, which `carv advise DIR` and `carv report DIR` read.

    Args:
        problem: What to measure.
        config: How much.
        out: The pilot's folder.
    """
    _set_threads(threads)
    record = pilot_command.run_pilot(problem, config, out, quiet=json_only)
    _print(json_only, lambda: pilot_command.to_json(record, out), lambda: pilot_command.summary(record, out))


def advise(
    folder: Annotated[Path, tyro.conf.Positional], config: Flat[advise_command.AdviseConfig], json_only: Json = False
) -> None:
    """Say what to run, what it gains and what limits it, from a pilot: carv advise DIR

    Args:
        folder: Of `carv pilot`.
        config: What for.
    """
    record, advice = advise_command.advise_from(folder, config)
    _print(json_only, lambda: advise_command.to_json(record, advice), lambda: advise_command.summary(record, advice))


def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    markdown: Path | None = None,
    json_only: Json = False,
) -> None:
    """Make one HTML page of pilots, sweeps and experiments: carv report DIR

    Args:
        folders: Of `carv pilot`, `carv sweep`, an experiment, or several in one.
        out: The page; by default report.html in the first folder.
        markdown: A file for the experiments as sections of Markdown, too.
    """
    from carv.report import findings, page, summary  # matplotlib is an extra
    from carv.report import markdown as sections

    found = findings.load(folders)
    path = out or folders[0] / "report.html"
    if markdown is not None:
        sections.write([one.experiment for one in found.experiments], markdown)
    page.write(found, path)
    wrote = f"wrote {path}" + (f" and {markdown}" if markdown else "")
    _print(json_only, lambda: {"out": str(path), **summary.summary(found)}, lambda: wrote)


def measure(
    problem: Flat[ProblemConfig],
    design: Flat[measure_command.DesignConfig],
    config: Flat[measure_command.MeasureConfig],
    out: Path | None = None,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Measure one estimator's variance by brute force: carv measure toy --renders 1 --renoise 8

    Args:
        problem: What to measure; module:object may also be a function of a stream that returns one estimate.
        design: The estimator, of a pipeline.
        config: How long.
        out: A folder to keep the records in.
    """
    _set_threads(threads)
    found = measure_command.run_measure(problem, design, config, out, quiet=json_only)
    _print(json_only, lambda: measure_command.to_json(found), lambda: measure_command.summary(found))


def sweep(
    problem: Flat[ProblemConfig],
    config: Flat[SweepConfig],
    where: Flat[sweep_command.ExecutorConfig],
    out: Path,
    mix: bool = False,
    json_only: Json = False,
) -> None:
    """Measure many designs by brute force, one record each, resumable: carv sweep toy --out DIR

    Args:
        problem: What to measure.
        config: Which designs.
        where: Where they run.
        out: The folder of the records.
        mix: Allow records that were made with other code, settings or devices in one folder.
    """
    found = sweep_command.run_sweep(problem, config, where, out, mix, quiet=json_only)
    _print(json_only, lambda: sweep_command.to_json(found, out), lambda: sweep_command.summary(found, out))
    if found.failed:
        sys.exit(1)


def check(
    problem: Flat[ProblemConfig],
    design: Flat[measure_command.DesignConfig],
    config: Flat[check_command.CheckConfig],
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Test an estimator for bias against the naive one: carv check mine:estimate --naive mine:one_uniform_draw

    Exits with 0 if it passes, 1 if it fails, 3 if it cannot tell yet.

    Args:
        problem: A function of a stream that returns one estimate, or a pipeline.
        design: The estimator, of a pipeline.
        config: How sure to be.
    """
    _set_threads(threads)
    found = check_command.run_check(problem, design, config, quiet=json_only)
    _print(json_only, lambda: check_command.to_json(found), found.describe)
    sys.exit({"pass": 0, "small bias": 0, "fail": 1, "cannot tell": 3}[found.verdict])


def distill(
    config: Annotated[DistillConfig, tyro.conf.arg(name="")],
    out: Path,
    checkpoint_every: int = 200,
    overwrite: bool = False,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Distil a diffusion teacher into a generator of one step (DMD2): carv distill --out generator

    Writes the generator as diffusers saves a network, sample sheets, history.jsonl, metrics.json and a checkpoint; the
    same command goes on from the checkpoint if it was stopped. Under torchrun every process adds its renders.

    Args:
        config: Settings.
        out: The run's folder.
        checkpoint_every: Generator updates between checkpoints.
        overwrite: Start again where the folder holds another run.
    """
    from carv.tasks.distill import run as distill_run  # diffusers is an extra

    _set_threads(threads)
    metrics = distill_run.run(config, out, checkpoint_every, overwrite, quiet=json_only, evaluate=True)
    if metrics:  # only the first of several processes has them
        _print(json_only, lambda: metrics, lambda: distill_run.summary(metrics, out))


def attribute(
    config: Flat[AttributionConfig],
    out: Path,
    overwrite: bool = False,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Rank training clips or pictures by their influence on a query: carv attribute --train DIR --query FILE --out DIR

    Writes index.html, results.json and scores.csv, and keeps all gradients: a larger budget re-uses them, and the same
    command goes on if it was stopped.

    Args:
        config: Settings.
        out: The folder of results and gradients.
        overwrite: Start again where the folder holds another run.
    """
    from carv.report import attribution as page  # jinja2 is an extra
    from carv.tasks.attribution import run as attribution_run  # diffusers is an extra

    _set_threads(threads)
    results = attribution_run.run(config, out, overwrite, quiet=json_only)
    page.write(out)
    shown = f"\nopen {out / 'index.html'} to see them"
    _print(json_only, lambda: results, lambda: attribution_run.summary(results, out) + shown)


def teachers(
    action: Annotated[Literal["train"], tyro.conf.Positional], teacher: tyro.conf.OmitSubcommandPrefixes[Flat[Teacher]]
) -> None:
    """Train a small teacher of carv's own, in diffusers' format: carv teachers train world --out DIR

    The same command goes on from the checkpoints if it was stopped. Leaves a diffusers pipeline with a model card,
    sample sheets, and quality.json.

    Args:
        action: What to do.
        teacher: Which.
    """
    _set_threads(teacher.into.threads)
    proposed = teacher.train()
    out = teacher.into.out
    print(f"wrote {out}; its README.md says how good it is. Next: {proposed}")


def _print(json_only: bool, as_json: Callable[[], dict[str, Any]], as_text: Callable[[], str]) -> None:
    print(dumps(as_json()) if json_only else as_text())


def _set_threads(threads: int) -> None:
    if threads < 0:
        raise ValueError(f"threads must not be negative, got {threads}")
    if threads:
        torch.set_num_threads(threads)


COMMANDS: dict[str, Any] = {
    "sds": sds,
    "compare": compare_sds,
    "pilot": pilot,
    "advise": advise,
    "measure": measure,
    "report": report,
    "sweep": sweep,
    "check": check,
    "distill": distill,
    "attribute": attribute,
    "teachers": teachers,
}


def main(args: list[str] | None = None) -> None:
    """Entry point of the `carv` command."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="carv",
            description="Cheap, unbiased gradients from frozen diffusion teachers.",
            args=args,
        )
    except (ValueError, ImportError, OSError) as error:
        fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from the last checkpoint")
        sys.exit(130)


if __name__ == "__main__":
    main()
