"""A CLIPModel's folder, read as data: JSON and safetensors. Nothing is fetched unless asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from carv import hub
from carv.extras import require, without_progress_bars
from carv.teachers.diffusers.weights import REDIRECTIONS, check_shards, choose_weights

# Without one of these, a tokenizer would be made with an empty vocabulary and no complaint.
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def locate(path_or_id: str | Path, download: bool, revision: str | None) -> Path:
    """The folder at a path, or of a hub id.

    Args:
        path_or_id: a folder, or "owner/name" on the hub.
        download: fetch what the local cache lacks; otherwise only the cache is looked at.
        revision: the hub's branch, tag or commit.

    Raises:
        ValueError: there is no such folder, and nothing in the cache or on the hub; no safetensors on the hub.
    """

    def wanted(name: str, files: list[str]) -> list[str]:
        kinds = (".json", ".txt")
        data = [file for file in files if "/" not in file and file.endswith(kinds) and ".index." not in file]
        return [*data, *choose_weights(files, None, name).names]

    return hub.locate(path_or_id, download, revision, wanted)


def load_model(folder: Path) -> Any:
    """The `CLIPModel` of a folder in float32, in evaluation mode, frozen, on the CPU.

    Raises:
        ValueError: no CLIP is there; pickles only; weights that are damaged, incomplete, or not its config.json's.
    """
    config = _read_config(folder)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in REDIRECTIONS:
            if isinstance(part, dict) and part.get(key) is not None:
                raise ValueError(f"{folder}/config.json sets {key}; carv reads plain, unquantised weights")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter to another model: merge it into the model's own weights")
    choose_weights([file.name for file in folder.iterdir()], None, str(folder))
    check_shards(folder)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, report = _load("CLIPModel", folder, options)
    if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        # transformers fills the gap with random numbers, and goes on.
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {len(absent)} tensors of the CLIPModel "
            f"are missing or of another shape, first {absent[0]}"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The `CLIPTokenizer` of a folder.

    Raises:
        ValueError: it has no vocabulary, or a damaged one.
    """
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise ValueError(f"{folder} has no vocabulary: {' or '.join(_VOCABULARIES)} must be there")
    return _load("CLIPTokenizer", folder, {})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inside = f"; there is one in {folder / 'clip'}" if (folder / "clip" / "config.json").is_file() else ""
        raise ValueError(f"{folder} is not a CLIP: it has no config.json{inside}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} is not a CLIP: the model_type of its config.json is {kind!r}, not 'clip'")
    return config


def _load(name: str, folder: Path, options: dict[str, Any]) -> Any:
    cls = getattr(require("transformers", "diffusers"), name)
    try:
        with without_progress_bars():
            return cls.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # a damaged file fails anywhere in the library, in many ways
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0].rstrip(".")
        raise ValueError(f"{folder} cannot be loaded as a {name}: {reason}") from error
