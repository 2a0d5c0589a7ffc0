"""The command line, made from the typed configurations.

Exit codes: 0 done; 2 bad input, with one sentence on standard error; 130 interrupted, with what to do next.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from carv.console import fail
from carv.tasks.sds.compare import CompareConfig, compare, summary
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.run import run

Threads = Annotated[int, tyro.conf.arg(help="CPU threads; 0 leaves torch's choice.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the results as JSON and nothing else.")]


def sds(
    config: SDSConfig,
    out: Path,
    checkpoint_every: int = 50,
    overwrite: bool = False,
    json_only: Json = False,
    threads: Threads = 0,
) -> None:
    """Optimise a 3D object towards a prompt, e.g. carv sds "a red chair" --out chair

    Writes turntable.gif, contact_sheet.png, mesh.glb, metrics.json and a checkpoint; the same command goes on
    from the checkpoint if it was stopped.

    Args:
        config: Settings.
        out: The run's folder.
        checkpoint_every: Steps between checkpoints.
        overwrite: Start again where the folder holds another run.
    """
    _set_threads(threads)
    metrics = run(config, out, checkpoint_every, overwrite, quiet=json_only)
    if json_only:
        print(json.dumps(metrics))
        return
    agreement = metrics["agreement_with_true_object"]
    if agreement is not None:
        psnr, ssim = agreement["psnr"], agreement["ssim"]
        print(
            f"agreement with the true object over 8 held-out views, mean and standard deviation: "
            f"PSNR {psnr['mean']:.1f} +- {psnr['std_over_views']:.1f} dB, "
            f"SSIM {ssim['mean']:.2f} +- {ssim['std_over_views']:.2f}"
        )
    print(f"wrote {out}/turntable.gif, contact_sheet.png, mesh.glb and metrics.json")


def compare_sds(config: CompareConfig, out: Path, json_only: Json = False, threads: Threads = 0) -> None:
    """Standard SDS against carv at the same wall-clock time, on one prompt.

    Args:
        config: Settings.
        out: Where the figure, the renders and comparison.json go.
    """
    _set_threads(threads)
    result = compare(config, out, quiet=json_only)
    print(json.dumps(result) if json_only else summary(result, out))


def _set_threads(threads: int) -> None:
    if threads < 0:
        raise ValueError(f"threads must not be negative, got {threads}")
    if threads:
        torch.set_num_threads(threads)


COMMANDS: dict[str, Any] = {"sds": sds, "compare": compare_sds}


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
