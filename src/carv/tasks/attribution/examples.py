"""Videos and pictures as examples: found, captioned, checked, and fitted to a teacher."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from carv.tasks.attribution.decode import PICTURES, VIDEOS, decode
from carv.teachers.diffusers import DiffusersTeacher

_CAPTIONS = "captions.json"


@dataclass(frozen=True)
class Example:
    """A video or a picture with its caption.

    Attributes:
        name: unique among those read together: the path below the folder that was named, or the file's name.
        path: of the file.
        caption: what the teacher is conditioned on.
        content: SHA-256 of the file's bytes, hex: the same file under another caption has the same.
        digest: SHA-256 of content and caption, hex: the name of the example in a cache.
    """

    name: str
    path: Path
    caption: str
    content: str
    digest: str

    @classmethod
    def of(cls, path: Path, caption: str, name: str | None = None) -> Example:
        """The example of a file."""
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{content} {caption}".encode()).hexdigest()
        return cls(name or path.name, path, caption, content, digest)

    def pictures(self, max_frames: int | None = None) -> Tensor:
        """The frames, float32 RGB in [0, 1]: `[3, F, H, W]` of a video or an animation, else `[3, H, W]`.

        Args:
            max_frames: decode only so many from the start.

        Raises:
            ValueError: a file that cannot be decoded, without frames, or with frames of several sizes.
            ImportError: the package that decodes it is not installed.
        """
        frames = decode(self.path, max_frames).to(torch.float32).movedim(-1, 0) / 255
        return frames[:, 0] if frames.shape[1] == 1 and self.path.suffix.lower() not in VIDEOS else frames


def read_examples(paths: str | Path | Sequence[str | Path], prompt: str | None = None) -> list[Example]:
    """The videos and pictures in folders or files, sorted by name; nothing is decoded yet.

    A caption is what captions.json in the folder says (path below the folder, or file name -> caption), else the text
    of NAME.txt beside the file, else `prompt`. Hidden files, and other kinds of files in folders, are passed over.
    Of files with the same bytes and caption the first is kept, and a warning names the others.

    Args:
        paths: one or several folders (searched with all folders in them) or files.
        prompt: for all without a caption of their own; "" is the unconditional row.

    Raises:
        ValueError: a path that is not there, a folder without videos or pictures, a file of another kind, an empty
            file, a captions.json that cannot be read, or examples without a caption.
    """
    found = [pair for path in _listed(paths) for pair in _files(Path(path))]
    files = list(dict.fromkeys(file for file, _ in found))
    roots = dict(reversed(found))  # a file that was named twice keeps its first root
    names = {file: file.relative_to(roots[file]).as_posix() for file in files}
    repeated = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {file: file.as_posix() if name in repeated else name for file, name in names.items()}
    captions = _captions(roots, prompt)
    files.sort(key=lambda file: names[file])
    return _distinct([Example.of(file, captions[file], names[file]) for file in files])


def fit(pictures: Tensor, picture_shape: tuple[int, ...], max_frames: int | None = None, per_latent: int = 4) -> Tensor:
    """Pictures brought to a teacher's size: cropped at the centre to its aspect, then resized; frames are trimmed.

    The frames kept are the first 1 + per_latent n, the most that there are and at most `max_frames`: what is cut off
    is the end. Resizing is bilinear and antialiased, enlarging too.

    Args:
        pictures: `[3, F, H, W]` or `[3, H, W]` in [0, 1].
        picture_shape: the teacher's: `(3, h, w)`, or `(3, f, h, w)`.
        max_frames: of a video; f unless given.
        per_latent: frames to a latent frame.

    Returns:
        `[3, h, w]`, or `[3, F', h, w]` for a video teacher, for which a picture is a video of one frame.

    Raises:
        ValueError: a video for a teacher of pictures, or max_frames < 1.
    """
    video = len(picture_shape) == 4
    if pictures.ndim == 4 and not video:
        raise ValueError(f"this teacher takes pictures, got a video of {pictures.shape[1]} frames")
    if video:
        pictures = pictures if pictures.ndim == 4 else pictures[:, None]
        most = picture_shape[1] if max_frames is None else max_frames
        if most < 1:
            raise ValueError(f"max_frames must be at least 1, got {most}")
        pictures = pictures[:, : (min(pictures.shape[1], most) - 1) // per_latent * per_latent + 1]
    (height, width), (h, w) = pictures.shape[-2:], picture_shape[-2:]
    if (height, width) == (h, w):
        return pictures
    scale = min(height / h, width / w)
    tall, wide = min(height, round(scale * h)), min(width, round(scale * w))
    top, left = (height - tall) // 2, (width - wide) // 2
    cropped = pictures[..., top : top + tall, left : left + wide]
    frames = cropped.movedim(0, -3).reshape(-1, 3, tall, wide)  # interpolate knows pictures only
    small = functional.interpolate(frames, size=(h, w), mode="bilinear", antialias=True).clamp(0, 1)
    return small.movedim(1, 0) if video else small[0]


@torch.no_grad()
def encode(teacher: DiffusersTeacher, example: Example, max_frames: int | None = None) -> Tensor:
    """The latent of an example, `[*latent]`, on the teacher's device: of its own number of frames.

    Args:
        teacher: of pictures or of videos.
        example: decoded and fitted here.
        max_frames: of a video; those of the teacher's `picture_shape` unless given.

    Raises:
        ValueError: as `Example.pictures` and `fit`; the message names the file.
    """
    video = len(teacher.picture_shape) == 4
    most = (max_frames or teacher.picture_shape[1]) if video else 2
    try:
        pictures = fit(example.pictures(most), teacher.picture_shape, max_frames, teacher.frames_per_latent)
    except ValueError as error:
        message = str(error)
        raise error if example.name in message else ValueError(f"{example.path}: {message}") from error
    fitted = teacher.with_frames(pictures.shape[1]) if video else teacher
    return fitted.encode(pictures[None].to(teacher.device))[0]


def _listed(paths: str | Path | Sequence[str | Path]) -> list[str | Path]:
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed:
        raise ValueError("name at least one folder, video or picture")
    return listed


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    """(file, the folder that it was found through)."""
    known = VIDEOS | PICTURES
    if path.is_file():
        if path.suffix.lower() not in known:
            raise ValueError(f"{path} is neither a video nor a picture; carv reads {', '.join(sorted(known))}")
        yield path, path.parent
        return
    if not path.is_dir():
        raise ValueError(f"{path} is not there")
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
    shown = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not shown:
        raise ValueError(f"{path} holds no videos or pictures; carv reads {', '.join(sorted(known))}")
    yield from ((file, path) for file in shown)


def _captions(roots: dict[Path, Path], prompt: str | None) -> dict[Path, str]:
    """The caption of each file."""
    tables = {folder: _table(folder) for folder in {*roots.values(), *(file.parent for file in roots)}}
    captions: dict[Path, str] = {}
    for file, root in roots.items():
        beside = file.with_suffix(".txt")
        for table, key in ((root, file.relative_to(root).as_posix()), (file.parent, file.name)):
            if key in tables[table]:
                captions[file] = tables[table][key]
                break
        else:
            if beside.exists():
                captions[file] = beside.read_text(encoding="utf-8").strip()
            elif prompt is not None:
                captions[file] = prompt
    without = [file for file in roots if file not in captions]
    if without:
        raise ValueError(
            f"{len(without)} of {len(roots)} files have no caption, {without[0]} among them: give them in {_CAPTIONS} "
            f"({{file name: caption}}), in {without[0].stem}.txt, or one prompt for all"
        )
    return captions


def _table(folder: Path) -> dict[str, str]:
    path = folder / _CAPTIONS
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(caption, str) for caption in table.values()):
        raise ValueError(f"{path} must be a JSON object of file names and captions, both strings")
    return table


def _distinct(examples: list[Example]) -> list[Example]:
    kept: dict[str, Example] = {}
    for example in examples:
        kept.setdefault(example.digest, example)
    copies = [f"{e.name} (as {kept[e.digest].name})" for e in examples if kept[e.digest] is not e]
    if copies:
        warnings.warn(f"passed over, since they are the same file and caption: {', '.join(copies)}", stacklevel=3)
    return list(kept.values())
