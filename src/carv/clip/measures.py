"""What cosines of pictures and captions say: CLIP score, R-precision, and how far either can be trusted."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_NORMAL_95 = 1.959964

Value = dict[str, float | int]
"""A number with its uncertainty: value, then low and high (95%) or standard_error, and the count behind it."""


def clip_score(cosines: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The CLIP score of each pair of a picture and a caption:

        s = 100 max(cos, 0)

    CLIPScore (Hessel et al. 2021) is 2.5 max(cos, 0) for each pair. torchmetrics has the factor 100, and takes the
    maximum of 0 and the mean over pairs: the same number unless some cosine is negative, which a trained CLIP hardly
    ever gives for a picture and its own caption.

    Args:
        cosines: of unit embeddings.

    Example:
        >>> clip_score(torch.tensor([0.3125, -0.1]))
        tensor([31.2500,  0.0000])
    """
    return 100 * cosines.clamp(min=0)


def r_precision(cosines: Float[Tensor, "M C"], own: Int[Tensor, "M"]) -> Bool[Tensor, "M"]:
    """Which pictures have their own caption alone in the first place among the candidates; ties are no hit.

    The share of hits is CLIP R-precision, DreamFusion's measure of text-to-3D (Park et al. 2021; Poole et al. 2022,
    arXiv 2209.14988). It depends on the candidates: without their number it means nothing.

    Args:
        cosines: of each picture and each candidate caption.
        own: the place of each picture's caption among the candidates.

    Example:
        >>> r_precision(torch.tensor([[0.3, 0.2], [0.3, 0.2]]), torch.tensor([0, 1]))
        tensor([ True, False])
    """
    return (cosines >= cosines.gather(1, own[:, None])).sum(dim=1) == 1


def share(hits: Bool[Tensor, "M"]) -> Value:
    """The share of hits with Wilson's 95% interval. The hits must be independent: views of one object are not.

    Example:
        >>> share(torch.tensor([True, True, False, True]))
        {'value': 0.75, 'low': 0.300..., 'high': 0.954..., 'count': 4}
    """
    n, p, z = len(hits), float(hits.double().mean()), _NORMAL_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"value": p, "low": centre - half, "high": centre + half, "count": n}


def average(values: Float[Tensor, "M"], clusters: Int[Tensor, "M"]) -> Value:
    """The mean with its standard error over clusters: pictures of one object are not independent.

    Args:
        values: of single pictures; hits as 0 and 1.
        clusters: the number of each one's object, or of its run. Each cluster counts once, whatever its size.
    """
    means = torch.stack([values[clusters == one].mean() for one in torch.unique(clusters)]).double()
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return {"value": float(means.mean()), "standard_error": error, "count": len(means)}
