"""A diffusers pipeline folder, read as data: JSON and safetensors, of classes that carv knows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carv.extras import require, without_progress_bars
from carv.teachers.diffusers.hub import INDEX, LIBRARIES, locate
from carv.teachers.diffusers.weights import REDIRECTIONS, check_shards, choose_weights

_RENAMED = {"Transformer2DModel": "DiTTransformer2DModel"}
# Without one of these, a tokenizer would be made with an empty vocabulary and no complaint.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class PipelineFolder:
    """What `model_index.json` and the folders beside it say.

    Code in the folder is never run: classes are looked up in a list of known ones, by the name that the
    index gives, and anything else is refused.

    Attributes:
        path: the folder.
        index: its `model_index.json`.
        variant: which weights to load where there are several.
    """

    path: Path
    index: Mapping[str, Any]
    variant: str | None = None

    @classmethod
    def open(
        cls, path_or_id: str | Path, download: bool = False, revision: str | None = None, variant: str | None = None
    ) -> PipelineFolder:
        """The folder at a path, or of a hub id.

        Raises:
            ValueError: it is not there (see `hub.locate`), or it is not a pipeline.
        """
        path = locate(path_or_id, download, revision, variant)
        if not (path / INDEX).is_file():
            raise ValueError(f"{path} is not a diffusers pipeline: it has no {INDEX}")
        return cls(path, _read(path / INDEX), variant)

    @property
    def pipeline(self) -> str:
        """The pipeline's class name; custom ones name a module too."""
        return str(self.index.get("_class_name"))

    def has(self, component: str) -> bool:
        """Whether the pipeline has the component; the index writes `[null, null]` for one left out."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's JSON file."""
        path = self.path / component / file
        if not path.is_file():
            raise ValueError(f"{self.path} lacks {component}/{file}, which a {self.pipeline} needs")
        return _read(path)

    def model(self, component: str, known: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """A network of the folder: in evaluation mode, frozen, on the device.

        Args:
            component: its name in the index.
            known: the classes that it may have.
            dtype: of its weights, but for those that the class keeps in float32.
            device: where to.

        Raises:
            ValueError: the component is missing, of an unknown class, without safetensors, or incomplete.
        """
        name = self._class_name(component, known)
        where = self.path / component
        self._refuse_redirections(component)
        files = choose_weights([file.name for file in where.iterdir()], self.variant, str(where))
        check_shards(where)
        dtype_name = "torch_dtype" if LIBRARIES[name] == "diffusers" else "dtype"
        options = {dtype_name: dtype, "variant": files.variant, "use_safetensors": True, "output_loading_info": True}
        model, report = self._load(component, name, options)
        if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
            # Both libraries fill the gap with random numbers, and go on.
            raise ValueError(
                f"the weights in {where} are not those of its config.json: {len(absent)} tensors of "
                f"{name} are missing or of another shape, first {absent[0]}"
            )
        return model.eval().requires_grad_(False).to(device)

    def tokenizer(self, component: str, known: tuple[str, ...]) -> Any:
        """A tokenizer of the folder."""
        name, where = self._class_name(component, known), self.path / component
        if not any((where / file).is_file() for file in _VOCABULARIES):
            raise ValueError(f"{where} has no vocabulary: one of {', '.join(_VOCABULARIES)} must be there")
        return self._load(component, name, {})

    def _class_name(self, component: str, known: tuple[str, ...]) -> str:
        if not self.has(component) or not (self.path / component).is_dir():
            raise ValueError(f"{self.path} lacks the component {component!r}, which a {self.pipeline} needs")
        library, name = self.index[component]
        if name not in known or LIBRARIES[name] != library:
            raise ValueError(
                f"the {component} of {self.path} is a {library}.{name}; in a {self.pipeline} carv reads "
                f"{' or '.join(known)} and runs no code of a folder"
            )
        return str(name)

    def _refuse_redirections(self, component: str) -> None:
        config = self.config(component)
        where = self.path / component
        if (where / "adapter_config.json").is_file():
            raise ValueError(f"{where} is an adapter to another model: merge it into the model's own weights")
        for key in REDIRECTIONS:
            if config.get(key) is not None:
                raise ValueError(f"{where}/config.json sets {key}; carv reads plain, unquantised weights")

    def _load(self, component: str, name: str, options: dict[str, Any]) -> Any:
        require(LIBRARIES[name], "diffusers")
        cls = getattr(importlib.import_module(LIBRARIES[name]), _RENAMED.get(name, name))
        try:
            with without_progress_bars():
                return cls.from_pretrained(str(self.path / component), local_files_only=True, **options)
        except Exception as error:  # a damaged file fails anywhere in the two libraries, in many ways
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = lines[0].split(". ")[0].rstrip(".")  # what follows is advice on options that carv does not have
            raise ValueError(f"{self.path / component} cannot be loaded as a {name}: {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(content).__name__}")
    return content
