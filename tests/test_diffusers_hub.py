"""Teachers by their hub id: from the cache, or downloaded with no more than is needed. No test uses the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.diffusers.hub import needed_files

from pipeline_families import saved_families


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_families(tmp_path_factory.mktemp("pipelines"))


def test_a_hub_id_is_looked_for_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        pytest.fail("something asked for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(ValueError, match="someone/a-pipeline is neither a folder nor in the local cache"):
        DiffusersTeacher.from_pretrained("someone/a-pipeline")
    for wrong in ("/nowhere/at/all", "./here", "one-word", "a/b/c"):
        with pytest.raises(ValueError, match=f"{wrong} is not a folder, nor a hub id of the form owner/name"):
            DiffusersTeacher.from_pretrained(wrong)


def test_a_download_fetches_what_a_teacher_needs_and_no_more(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders("sd")
    there = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    more = ["pipeline.py", "v1.ckpt", "v1.safetensors", "safety_checker/model.safetensors", "vae/x.bin", "unet/code.py"]
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name} | options)
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: [*there, *more])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    DiffusersTeacher.from_pretrained("someone/a-pipeline", download=True, revision="main")
    [request] = asked
    assert (request["name"], request["revision"]) == ("someone/a-pipeline", "main")
    assert sorted(request["allow_patterns"]) == sorted(there)


def test_a_download_takes_one_variant_and_refuses_pickles_beforehand() -> None:
    entries = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    files = [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.bin",
        "scheduler/scheduler_config.json",
    ]
    shared = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    plain = needed_files(files, entries, None, "a/b")
    assert sorted(plain) == sorted([*shared, "unet/diffusion_pytorch_model.safetensors"])
    half = needed_files(files, entries, "fp16", "a/b")
    assert sorted(half) == sorted([*shared, "unet/diffusion_pytorch_model.fp16.safetensors"])
    with pytest.raises(ValueError, match=r"a/b/unet has no safetensors, only .*\.fp16\.bin"):
        needed_files([file for file in files if not file.endswith(".safetensors")], entries, None, "a/b")


def test_a_failed_download_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(ValueError, match=r"someone/a-pipeline could not be fetched from the hub \(RuntimeError\)$"):
        DiffusersTeacher.from_pretrained("someone/a-pipeline", download=True)
