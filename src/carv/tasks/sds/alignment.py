"""How well views of a field match the prompt, by CLIP: the CLIP score and R-precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from carv.clip import Clip, clip_score, r_precision
from carv.tasks.sds.config import CameraName
from carv.tasks.sds.export import render_all
from carv.tasks.sds.field import Field
from carv.teachers.small import small_clip
from carv.world.cameras import PAPER_RANGE, Cameras, held_out_cameras
from carv.world.captions import object_captions, parse_object

_VIEWS = 8
_PAPER_VIEWS, _PAPER_ELEVATION, _PAPER_FOV = 10, 12.5, 40.0


def load_clip(name: str, teacher: str, device: torch.device | str, say: Callable[[str], None]) -> Clip | None:
    """The CLIP that the settings name; None for "none", and where carv's own is not installed and not needed.

    Args:
        name: small, none, a folder, or a cached hub id.
        teacher: of the run. With the exact one, which needs no extra, carv's own CLIP may be missing.
        device: where the networks go.
        say: told why there is none.

    Raises:
        ValueError: not a CLIP that carv reads.
        ImportError: transformers is not installed, and another CLIP or teacher was asked for.
    """
    if name == "none":
        return None
    if name != "small":
        return Clip.from_pretrained(name, device)
    try:
        return Clip.from_pretrained(small_clip(), device)
    except (ImportError, FileNotFoundError) as error:
        if teacher != "world":
            raise
        say(f"no CLIP score: {error}")
        return None


def scoring_cameras(name: CameraName) -> Cameras:
    """The views that are scored, evenly around the object.

    For the paper's cameras those of its CLIP scores (App. D.1.1): 10 views at 12.5 degrees of elevation, distance 2
    and a field of view of 40 degrees. For the world's, 8 views that its pictures do not contain.
    """
    if name == "world":
        return held_out_cameras(_VIEWS)
    same = torch.ones(_PAPER_VIEWS)
    return Cameras(
        torch.arange(_PAPER_VIEWS) * (360 / _PAPER_VIEWS),
        _PAPER_ELEVATION * same,
        PAPER_RANGE.distance * same,
        _PAPER_FOV * same,
    )


@dataclass(frozen=True)
class Alignment:
    """What CLIP makes of the views of one object. They are not independent: a run is one observation of any mean.

    Attributes:
        score: the CLIP score of each view and the prompt.
        hits: whether each view's best caption is the prompt's; None for a prompt that is not among the candidates.
        captions: how many candidates there were.
        chosen: the candidate that fits the views best, on average; None without candidates.
    """

    score: Float[Tensor, "views"]
    hits: Bool[Tensor, "views"] | None
    captions: int
    chosen: str | None

    def to_dict(self) -> dict[str, Any]:
        """Means and standard deviations over the views, for records."""
        hits = None if self.hits is None else {**_over_views(self.hits.float()), "hits": int(self.hits.sum())}
        return {
            "views": len(self.score),
            "score": _over_views(self.score),
            "r_precision": hits,
            "captions": self.captions,
            "chosen": self.chosen,
        }


class PromptAlignment:
    """Scores fields against one prompt.

    Views are rendered at CLIP's own size, and compared with the prompt without a view word, as in DreamFusion. For a
    prompt that describes an object of the world, R-precision is among the captions of all 128 objects.

    Args:
        clip: the judge.
        prompt: what was asked for.
        cameras: which views, see `scoring_cameras`.
    """

    def __init__(self, clip: Clip, prompt: str, cameras: CameraName = "world") -> None:
        self.clip, self.cameras = clip, scoring_cameras(cameras)
        described = parse_object(prompt)
        self.caption = prompt if described is None else str(described)
        self.candidates = [] if described is None else object_captions()
        self._own = clip.text_features([self.caption])
        self._all = clip.text_features(self.candidates) if self.candidates else None

    def of(self, field: Field) -> Alignment:
        """The alignment of a field's views.

        Raises:
            ValueError: the field renders something that is not a picture, such as NaN.
        """
        return self.score(render_all(field, self.cameras, self.clip.size))

    def score(self, pictures: Float[Tensor, "views 3 H W"]) -> Alignment:
        """The alignment of pictures in [0, 1]."""
        seen = self.clip.image_features(pictures)
        score = clip_score(seen @ self._own.T)[:, 0]
        if self._all is None:
            return Alignment(score, None, 0, None)
        cosines = seen @ self._all.T
        own = torch.full((len(pictures),), self.candidates.index(self.caption))
        best = self.candidates[int(cosines.mean(dim=0).argmax())]
        return Alignment(score, r_precision(cosines, own), len(self.candidates), best)


def _over_views(values: Float[Tensor, "views"]) -> dict[str, float]:
    return {"mean": float(values.mean()), "std_over_views": float(values.std())}
