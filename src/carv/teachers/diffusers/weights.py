"""Which weight files of a component are loaded: safetensors, of the wanted variant; pickles never."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

# diffusers' and transformers' names.
_STEMS = ("diffusion_pytorch_model", "model")
REDIRECTIONS = ("transformers_weights", "quantization_config", "attn_implementation", "_attn_implementation")
"""Where a component's config.json has these, the libraries load something else than the weights beside it."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one component.

    Attributes:
        variant: which of the folder's variants they are, e.g. "fp16"; `None` for the plain ones.
        names: the files, with the index of sharded ones.
    """

    variant: str | None
    names: tuple[str, ...]


def choose_weights(names: Collection[str], variant: str | None, where: str) -> WeightFiles:
    """The files of the variant; where a component has none of it, the plain ones, as diffusers does.

    Args:
        names: the names of the component's files.
        variant: e.g. "fp16", or `None`.
        where: the component, for messages.

    Raises:
        ValueError: there are pickle files only, other variants only, or no weights.
    """
    for wanted in dict.fromkeys((variant, None)):
        if found := _files_of(names, wanted):
            return WeightFiles(wanted, tuple(sorted(found)))
    if others := sorted({variant for name in names if (variant := _variant(name))}):
        raise ValueError(f"{where} has weights of the variant {others[0]!r} only: pass variant={others[0]!r}")
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        raise ValueError(
            f"{where} has no safetensors, only {pickles[0]}, and pickle files can run code when they are opened: "
            "use a copy with safetensors, or convert it where you trust it (pipeline.save_pretrained of diffusers)"
        )
    raise ValueError(f"{where} has no weights: no .safetensors file is there")


def check_shards(folder: Path) -> None:
    """Check that an index of shards names files of the same folder, all of them safetensors.

    The loaders open whatever an index names, pickles too, even where safetensors alone are asked for.

    Raises:
        ValueError: an index that is not a map to such files; a shard that is missing.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of weights: it needs a weight_map from names to files"
            ) from error
        for shard in sorted(shards, key=str):
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise ValueError(f"{index} names {shard!r}; carv loads .safetensors files of the same folder only")
            if not (folder / shard).is_file():
                raise ValueError(f"{folder} lacks {shard}, which {index.name} names: copy or download it again")


def _files_of(names: Collection[str], variant: str | None) -> list[str]:
    infix = f".{variant}" if variant else ""
    return [
        name
        for name in names
        for stem in _STEMS
        if name in (f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json")
        or fnmatch(name, f"{stem}{infix}-?????-of-?????.safetensors")
    ]


def _variant(name: str) -> str | None:
    """The "fp16" of model.fp16.safetensors."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in _STEMS and parts[2] == "safetensors":
        return parts[1].split("-")[0]
    return None
