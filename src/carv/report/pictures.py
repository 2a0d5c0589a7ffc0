"""PNGs beside a record, as strangers give them: inside their folder, of bounded size, and really PNGs."""

from __future__ import annotations

import base64
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 5_000_000
MOST_PIXELS = 40_000_000
_HEAD = struct.Struct(">8s4x4sII")  # signature, length and name of the first chunk, width, height
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        caption: what it shows.
        png: the file.
        width, height: pixels.
    """

    caption: str
    png: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """For a page that loads nothing."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def plain_name(name: str) -> str:
    """The name itself, if it is one of a PNG in whatever folder it is looked up in.

    Raises:
        ValueError: a path, a hidden file, a name that some system reads as a path, or another ending.
    """
    odd = any(letter in '/\\:*?"<>|' or unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    if odd or name.startswith(".") or not name.endswith(".png") or len(name.encode("utf-8", "replace")) > 200:
        raise ValueError(f"a picture is the plain name of a .png file beside the record, got {name[:60]!r}")
    return name


def read_picture(folder: Path, name: str, caption: str) -> Picture:
    """A PNG of a record's folder.

    Args:
        folder: of the record.
        name: of the file.
        caption: what it shows.

    Raises:
        ValueError: a name that is no plain one; no such file; a link out of the folder; larger than 5 MB or 40 million
            pixels; no PNG.
    """
    path = folder / plain_name(name)
    if not path.is_file():
        raise ValueError(f"the picture {name} is not there")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"the picture {name} is a link out of the folder")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"the picture {name} is larger than {MOST_BYTES / 1e6:g} MB")
    png = path.read_bytes()
    head = _HEAD.unpack_from(png) if len(png) >= _HEAD.size else (b"", b"", 0, 0)
    if head[:2] != (_SIGNATURE, b"IHDR"):
        raise ValueError(f"the picture {name} is no PNG")
    width, height = head[2:]
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"the picture {name} has {width} x {height} pixels, allowed are {MOST_PIXELS:.0e} at most")
    return Picture(caption, png, width, height)
