"""Small animations beside a record, put into the page itself, as strangers give them."""

from __future__ import annotations

import base64
from pathlib import Path

_SIGNATURES = {".gif": (b"GIF8", "gif"), ".png": (b"\x89PNG", "png")}
_MOST_BYTES = 3_000_000
_CRISP = 64  # pixels across, up to which each is shown as a square


class EmbeddedPictures:
    """Pictures of a folder as data URIs; what is absent, too large, no picture or outside the folder is not shown.

    Args:
        folder: that they lie in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._uris: dict[str, str] = {}
        self._widths: dict[str, int] = {}

    def uri(self, name: str | None) -> str:
        """Of a path below the folder; "" if there is nothing to show."""
        if name is None:
            return ""
        if name not in self._uris:
            self._uris[name] = self._read(name)
        return self._uris[name]

    def small(self, name: str | None) -> bool:
        """Whether it has so few pixels that they are shown as squares."""
        return 0 < self._widths.get(name or "", 0) <= _CRISP

    def _read(self, name: str) -> str:
        path = (self._folder / name).resolve()
        signature, kind = _SIGNATURES.get(path.suffix, (b"", ""))
        if not path.is_relative_to(self._folder) or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ""
        content = path.read_bytes()
        if not kind or not content.startswith(signature):
            return ""
        width = content[16:20][::-1] if kind == "png" else content[6:8]
        self._widths[name] = int.from_bytes(width, "little")
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
