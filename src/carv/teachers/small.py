"""Where carv's own small teachers and their judges lie: in the package, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path


def small_pipeline() -> Path:
    """The folder of the Stable Diffusion, in diffusers' format; its README.md says how it was made and how good it is.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return _packaged("small_stable_diffusion", "world")


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
    return _packaged("small_dit", "digits")


def small_wan() -> Path:
    """The folder of the Wan on clips of moving digits, in diffusers' format; its judge is in its folder judge.

    Its README.md says how it was made and how good it is.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    return _packaged("small_wan", "clips")


def _packaged(name: str, command: str) -> Path:
    folder = Path(__file__).parent / name
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: install carv with its data, or train one with "
            f"`carv teachers train {command} --out DIR` and name that folder"
        )
    return folder
