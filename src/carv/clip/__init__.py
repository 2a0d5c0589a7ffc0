"""CLIP as a judge: cosines of pictures and captions, the CLIP score, and R-precision."""

from carv.clip.measures import Value, average, clip_score, r_precision, share
from carv.clip.model import Clip, image_features, similarities, text_features
from carv.clip.preprocess import Preprocessing

__all__ = [
    "Clip",
    "Preprocessing",
    "Value",
    "average",
    "clip_score",
    "image_features",
    "r_precision",
    "share",
    "similarities",
    "text_features",
]
