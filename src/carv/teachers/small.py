"""Where carv's own small Stable Diffusion and its CLIP lie: in the package, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "small_stable_diffusion"


def small_pipeline() -> Path:
    """The folder of the pipeline, in diffusers' format; its README.md says how it was made and how good it is.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    if not (_FOLDER / "model_index.json").exists():
        raise FileNotFoundError(
            f"{_FOLDER} holds no pipeline: install carv with its data, or train one with "
            "`carv teachers train --out DIR` and name that folder"
        )
    return _FOLDER


def small_clip() -> Path:
    """The folder of the CLIP trained on the same captions, in transformers' format.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return small_pipeline() / "clip"
