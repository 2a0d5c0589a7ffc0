"""From a path or a hub id to a folder on disk. Nothing is fetched unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from carv.extras import require


def locate(
    path_or_id: str | Path, download: bool, revision: str | None, wanted: Callable[[str, list[str]], list[str]]
) -> Path:
    """The folder at a path, or of a hub id.

    Args:
        path_or_id: a folder, or "owner/name" on the hub.
        download: fetch what the local cache lacks; otherwise only the cache is looked at.
        revision: the hub's branch, tag or commit.
        wanted: (name, names of all its files) -> those to fetch; called with `download` only.

    Raises:
        ValueError: there is no such folder, and nothing in the cache or on the hub; what `wanted` raises.
        ImportError: a hub id without huggingface_hub.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"{name} is not a folder, nor a hub id of the form owner/name")
    hub = require("huggingface_hub", "diffusers")
    if not download:
        missing = f"{name} is neither a folder nor in the local cache; fetch it first, with download=True"
        return Path(_ask(missing, hub.snapshot_download, name, revision=revision, local_files_only=True))
    failed = _failed(name)
    files = wanted(name, _ask(failed, hub.HfApi().list_repo_files, name, revision=revision))
    return Path(_ask(failed, hub.snapshot_download, name, revision=revision, allow_patterns=files))


def fetch(name: str, file: str, revision: str | None) -> Path:
    """One file of a repository on the hub.

    Raises:
        ValueError: it could not be fetched.
    """
    hub = require("huggingface_hub", "diffusers")
    return Path(_ask(_failed(name), hub.hf_hub_download, name, file, revision=revision))


def _failed(name: str) -> str:
    return f"{name} could not be fetched from the hub"


def _ask(failed: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return request(*arguments, **options)
    except Exception as error:  # no network, no permission, no such name: the hub's errors have no common base
        raise ValueError(f"{failed} ({type(error).__name__})") from error
