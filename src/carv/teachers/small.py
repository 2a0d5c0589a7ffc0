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
            "`carv teachers train world --out DIR` and name that folder"
        )
    return _FOLDER


def small_clip() -> Path:
    """The folder of the CLIP trained on the same captions, in transformers' format.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return small_pipeline() / "clip"


def small_dit() -> Path:
    """The folder of the DiT on real digits, in diffusers' format; its judge is in its folder judge.

    Its README.md says how it was made and how good it is.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    folder = Path(__file__).parent / "small_dit"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: install carv with its data, or train one with "
            "`carv teachers train digits --out DIR` and name that folder"
        )
    return folder


def small_wan() -> Path:
    """The folder of the Wan on clips of moving digits, in diffusers' format; its judge is in its folder judge.

    Its README.md says how it was made and how good it is.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    folder = Path(__file__).parent / "small_wan"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: install carv with its data, or train one with "
            "`carv teachers train clips --out DIR` and name that folder"
        )
    return folder
