"""Where a pipeline lies, and which of its files a teacher needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carv import hub
from carv.teachers.diffusers.weights import choose_weights

INDEX = "model_index.json"

# Every class that is ever instantiated from a folder, with the library that it comes from.
LIBRARIES = {
    "UNet2DConditionModel": "diffusers",
    "DiTTransformer2DModel": "diffusers",
    "Transformer2DModel": "diffusers",  # the name of DiTTransformer2DModel in old folders
    "SD3Transformer2DModel": "diffusers",
    "FluxTransformer2DModel": "diffusers",
    "WanTransformer3DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderKLWan": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
    "UMT5EncoderModel": "transformers",
    "CLIPTokenizer": "transformers",
    "CLIPTokenizerFast": "transformers",
    "T5Tokenizer": "transformers",
    "T5TokenizerFast": "transformers",
}


def locate(path_or_id: str | Path, download: bool, revision: str | None, variant: str | None) -> Path:
    """The folder of a pipeline.

    Args:
        path_or_id: a folder, or "owner/name" on the hub.
        download: fetch what the local cache lacks; otherwise only the cache is looked at.
        revision: the hub's branch, tag or commit.
        variant: which weights to fetch.

    Raises:
        ValueError: there is no such folder, and nothing in the cache or on the hub.
    """

    def wanted(name: str, files: list[str]) -> list[str]:
        if INDEX not in files:
            raise ValueError(f"{name} on the hub is not a diffusers pipeline: it has no {INDEX}")
        index = json.loads(hub.fetch(name, INDEX, revision).read_text(encoding="utf-8"))
        return needed_files(files, index, variant, name)

    return hub.locate(path_or_id, download, revision, wanted)


def needed_files(files: list[str], index: dict[str, Any], variant: str | None, name: str) -> list[str]:
    """The files of a repository that a teacher needs: no second format, no safety checker, no code.

    Args:
        files: all its files.
        index: its `model_index.json`.
        variant: which weights.
        name: of the repository, for messages.
    """
    wanted = [INDEX]
    for component, entry in index.items():
        if not isinstance(entry, list) or (component != "scheduler" and LIBRARIES.get(str(entry[-1])) is None):
            continue
        inside = [file.removeprefix(f"{component}/") for file in files if file.startswith(f"{component}/")]
        data = [file for file in inside if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
        if component != "scheduler" and not component.startswith("tokenizer"):
            data += choose_weights(inside, variant, f"{name}/{component}").names
        wanted += [f"{component}/{file}" for file in data]
    return wanted
