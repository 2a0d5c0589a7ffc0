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

from carv.commands import advise as advise_command
from carv.commands import auto as auto_command
from carv.commands import check as check_command
from carv.commands import measure as measure_command
from carv.commands import pilot as pilot_command
from carv.commands import sweep as sweep_command
from carv.console import fail
from carv.problems import ProblemConfig
from carv.runs.sweep import SweepConfig
from carv.strict_json import dumps
from carv.tasks.sds import run as sds_run
from carv.tasks.sds.compare import CompareConfig, compare, summary
from carv.tasks.sds.config import SDSConfig
from carv.training.config import TrainConfig

Threads = Annotated[int, tyro.conf.arg(help="CPU threads; 0 leaves torch's choice.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the results as JSON and nothing else.")]


def sds(
    config: SDSConfig,
    auto_config: auto_command.AutoConfig,
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


def compare_sds(config: CompareConfig, out: Path, json_only: Json = False, threads: Threads = 0) -> None:
    """Standard SDS against carv at the same wall-clock time, on one prompt.

    Args:
        config: Settings.
        out: Where the figure, the renders and comparison.json go.
    """
    _set_threads(threads)
    result = compare(config, out, quiet=json_only)
    _print(json_only, lambda: result, lambda: summary(result, out))


def pilot(
    problem: ProblemConfig,
    config: pilot_command.PilotConfig,
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
    folder: Annotated[Path, tyro.conf.Positional], config: advise_command.AdviseConfig, json_only: Json = False
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
    problem: ProblemConfig,
    design: measure_command.DesignConfig,
    config: measure_command.MeasureConfig,
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
    problem: ProblemConfig,
    config: SweepConfig,
    where: sweep_command.ExecutorConfig,
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
    problem: ProblemConfig,
    design: measure_command.DesignConfig,
    config: check_command.CheckConfig,
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


def teachers(
    action: Annotated[Literal["train"], tyro.conf.Positional],
    config: TrainConfig,
    out: Path,
    overwrite: bool = False,
    threads: Threads = 0,
) -> None:
    """Train a small Stable Diffusion on carv's own captioned 3D world: carv teachers train --out DIR

    About an hour on a free CPU core. The same command goes on from the checkpoints if it was stopped. Leaves a
    diffusers pipeline with a model card, a small CLIP, sample sheets, and quality.json.

    Args:
        action: What to do.
        config: Settings.
        out: The pipeline's folder.
        overwrite: Start again where the folder holds another run.
    """
    from carv.training.train import train  # heavy, and an extra

    _set_threads(threads)
    train(config, out, overwrite)
    print(f'wrote {out}; its README.md says how good it is. Next: carv sds "a red chair" --teacher {out} --out chair')


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
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (ValueError, ImportError, OSError) as error:
        fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from the last checkpoint")
        sys.exit(130)


if __name__ == "__main__":
    main()
