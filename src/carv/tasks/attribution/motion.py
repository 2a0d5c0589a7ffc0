"""Where a clip moves: masks that turn attribution from what is seen to how it moves (MOTIVE, Eq. 60)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from carv.extras import require

_PERCENTILE = 0.99
_STILL = 0.1
"""Pixels a frame: what moves less is codec noise, and must not be scaled up to 1."""
_SMALLEST_SIDE = 128
"""Pixels: DIS matches patches of 8. A square that moves by 2 in 64 is 8 % too slow there, 2 % when enlarged to 128."""
_CHANGE = 4  # of 255 grey levels
_ENDINGS = (".safetensors", ".gif", ".png")


@dataclass(frozen=True, eq=False)
class MotionMask:
    """A mask on the latent grid.

    Attributes:
        mask: `[F', h, w]` in [0, 1], float32.
        still: the clip does not move, and the mask is 1 everywhere instead.
    """

    mask: Float[Tensor, "f h w"]
    still: bool = False


def motion_mask(pictures: Float[Tensor, "3 F H W"], latent_shape: tuple[int, ...]) -> MotionMask:
    """M of Eq. 60 by optical flow: M = min(1, |flow| / p99(|flow|)), averaged over each cell of the latent grid.

    p99 is the 99th percentile over the whole clip, so slow clips count as much as fast ones, and one wrong vector does
    not dim the rest. A clip that hardly moves (p99 below 0.1 pixels a frame) gets 1 everywhere: with a mask of zeros
    its loss and gradient would be zero and its influence undefined, and its noise scaled up to 1 would be a made-up
    motion. MOTIVE drops such clips; here they are kept, ranked by all of their content, and named as still.

    Args:
        pictures: of a clip, in [0, 1], at the size that the teacher sees.
        latent_shape: `(C, F', h, w)` of its latent, F - 1 a multiple of F' - 1.

    Raises:
        ValueError: a picture, or a clip of one frame, has no motion; frames that do not fit the latent's.
        ImportError: OpenCV is not installed.
    """
    magnitude = motion_magnitude(pictures)
    scale = float(torch.quantile(magnitude.flatten()[:: max(1, magnitude.numel() // 2**23)], _PERCENTILE))
    if scale < _STILL:
        return MotionMask(torch.ones(latent_shape[1:]), still=True)
    return MotionMask(to_latent_grid((magnitude / scale).clamp(max=1), latent_shape))


def motion_magnitude(pictures: Float[Tensor, "3 F H W"]) -> Float[Tensor, "F H W"]:
    """|flow| at each pixel of each frame, in pixels a frame: to the next frame, and of the last one to that before.

    By OpenCV's dense inverse search, preset medium (Kroeger et al. 2016), on grey levels; small clips are enlarged.
    It carries the flow of an object far into a flat ground beside it, where there is nothing to see; so the flow is 0
    where no grey level within two pixels changes by more than 4/255.

    Raises:
        ValueError: no clip of two frames or more.
        ImportError: OpenCV is not installed.
    """
    if pictures.ndim != 4 or pictures.shape[1] < 2:
        raise ValueError(
            f"motion needs a clip [3, F, H, W] of at least two frames, got {list(pictures.shape)}; use --masks none"
        )
    cv2 = require("cv2", "attribution")
    grey = (pictures.detach().cpu().float().mean(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    frames, height, width = grey.shape
    enlarge = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    size = (enlarge * width, enlarge * height)
    large = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in grey]
    found = []
    for i in range(frames):
        other = i + 1 if i + 1 < frames else i - 1
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # anew: it remembers its last flow
        flow = search.calc(large[i], large[other], None) / enlarge
        length = cv2.resize(np.hypot(flow[..., 0], flow[..., 1]), (width, height), interpolation=cv2.INTER_AREA)
        changed = (cv2.absdiff(grey[i], grey[other]) > _CHANGE).astype(np.uint8)
        found.append(length * cv2.dilate(changed, np.ones((5, 5), np.uint8)))
    return torch.from_numpy(np.stack(found)).float()


def to_latent_grid(mask: Float[Tensor, "F H W"], latent_shape: tuple[int, ...]) -> Float[Tensor, "f h w"]:
    """A mask of frames averaged over what each latent entry covers.

    Latent frame 0 covers frame 0 alone, and each later one the next (F - 1)/(F' - 1) frames, as causal video
    autoencoders have it (4 for Wan).

    Raises:
        ValueError: F - 1 is no multiple of F' - 1.
    """
    frames, (latent_frames, *grid) = mask.shape[0], latent_shape[1:]
    together = (frames - 1) // max(1, latent_frames - 1)
    if frames != 1 + together * (latent_frames - 1):
        raise ValueError(
            f"a mask of {frames} frames does not fit {latent_frames} latent frames, the first of one frame"
        )
    small = interpolate(mask[:, None].float(), size=tuple(grid), mode="area")[:, 0]
    later = small[1:].reshape(latent_frames - 1, together, *grid).mean(1)
    return torch.cat([small[:1], later])


def read_mask(folder: Path, name: str, frames: int, latent_shape: tuple[int, ...]) -> Float[Tensor, "f h w"]:
    """A user's own mask of an example: FOLDER/STEM.safetensors with a tensor "mask", or STEM.gif, or STEM.png.

    Args:
        folder: of masks.
        name: of the example, e.g. "cats/one.mp4": its mask is FOLDER/cats/one.safetensors, .gif or .png.
        frames: of the clip as the teacher sees it.
        latent_shape: of its latent, `(C, F', h, w)`, or `(C, h, w)` of a picture.

    Returns:
        `[F', h, w]`, or `[h, w]` of a picture. A mask has the latent's frames, or the clip's (those beyond the
        clip's are left out, as the clip's own were), or one frame, which then holds for all; any size, over the same
        field of view as the frames that the teacher sees.

    Raises:
        ValueError: no mask, one that cannot be read, outside [0, 1], zero everywhere, or of other frames.
    """
    video = len(latent_shape) == 4
    shape = latent_shape if video else (latent_shape[0], 1, *latent_shape[1:])
    path = mask_file(folder, name)
    mask = _read(path)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"the mask {path} has shape {list(mask.shape)}; expected [F, H, W] or [H, W]")
    if not bool((torch.isfinite(mask) & (mask >= 0) & (mask <= 1)).all()):
        raise ValueError(f"the mask {path} must be within [0, 1]")
    if len(mask) == 1:
        mask = mask.expand(shape[1], -1, -1)
    elif len(mask) != shape[1]:
        if len(mask) < frames:
            raise ValueError(f"the mask {path} has {len(mask)} frames, its clip {frames} (or {shape[1]} in the latent)")
        mask = mask[:frames]
    small = _resized(mask, shape) if len(mask) == shape[1] else to_latent_grid(mask, shape)
    if not bool(small.any()):
        raise ValueError(f"the mask {path} is zero everywhere, which leaves no gradient; give some part a weight")
    return small if video else small[0]


def mask_file(folder: Path, name: str) -> Path:
    """The file of a user's own mask of an example.

    Raises:
        ValueError: there is none.
    """
    for ending in _ENDINGS:
        # An absolute name would lead out of the folder, to the clip itself.
        path = (folder / (Path(name).name if Path(name).is_absolute() else name)).with_suffix(ending)
        if path.is_file():
            return path
    raise ValueError(
        f"{folder} holds no mask for {name}: expected {Path(name).with_suffix('')} with one of {', '.join(_ENDINGS)}"
    )


def _resized(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    return interpolate(mask[:, None].float(), size=tuple(shape[2:]), mode="area")[:, 0]


def _read(path: Path) -> Tensor:
    if path.suffix != ".safetensors":
        return _read_picture(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the mask {path} cannot be read ({error})") from error
    if "mask" not in tensors:
        raise ValueError(f'the mask {path} holds no tensor "mask" but {", ".join(sorted(tensors)) or "nothing"}')
    return tensors["mask"].float()


def _read_picture(path: Path) -> Tensor:
    image = require("PIL.Image", "attribution")
    sequence = require("PIL.ImageSequence", "attribution")
    try:
        with image.open(path) as opened:
            frames = [np.array(frame.convert("L")) for frame in sequence.Iterator(opened)]
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"the mask {path} cannot be read ({error})") from error
    return torch.from_numpy(np.stack(frames)).float() / 255
