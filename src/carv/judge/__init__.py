"""A small classifier as a judge of small pictures: what they show, how far they are from real ones, how they vary."""

from carv.judge.diversity import nearest_distance, pairwise_distance
from carv.judge.frechet import Moments, frechet_distance, frechet_error
from carv.judge.model import Judge, JudgeNetwork

__all__ = [
    "Judge",
    "JudgeNetwork",
    "Moments",
    "frechet_distance",
    "frechet_error",
    "nearest_distance",
    "pairwise_distance",
]
