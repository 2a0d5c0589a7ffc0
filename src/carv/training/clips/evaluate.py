"""What the finished pipeline can do: measured on the saved folder, as its users load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from carv.clip import Value as Value  # the card names it here
from carv.clip import average, share
from carv.extras import require, without_progress_bars
from carv.rng import Stream
from carv.teachers.diffusers.folder import PipelineFolder
from carv.training.clips.autoencoder import SPATIAL, TEMPORAL, decode_encoded
from carv.training.clips.judge import ClipJudge, judge_clips
from carv.training.clips.text import LENGTH
from carv.world.clips import BACKGROUNDS, LENGTHS, MOTIONS, SIZE, Clips, caption, grey_gif

_AT_ONCE = 80


@dataclass(frozen=True)
class Wanted:
    """A clip to be drawn.

    Attributes:
        digit: 0 to 9.
        motion: place in `MOTIONS`.
        background: place in `BACKGROUNDS`.
        frames: 9, 13 or 17.
    """

    digit: int
    motion: int
    background: int
    frames: int

    @property
    def caption(self) -> str:
        """Its prompt."""
        return caption(self.digit, MOTIONS[self.motion], BACKGROUNDS[self.background])


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        steps: of the scheduler.
        guidance_scale: s of v_u + s (v_c - v_u).
        rng: sample i starts from the noise at its child i.
    """

    steps: int
    guidance_scale: float
    rng: Stream


def every_caption(each: int = 1) -> list[Wanted]:
    """`each` clips of each of the 240 captions; lengths take turns, so that each has a third of every motion."""
    return [
        Wanted(digit, motion, background, LENGTHS[(digit + motion + background + i) % len(LENGTHS)])
        for i in range(each)
        for background in range(len(BACKGROUNDS))
        for motion in range(len(MOTIONS))
        for digit in range(10)
    ]


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """The saved pipeline in float32, without its progress bar."""
    parts = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel", "transformer": "WanTransformer3DModel"}
    saved = PipelineFolder.open(folder)
    loaded = {part: saved.model(part, (name,), torch.float32, device) for part, name in parts.items()}
    with without_progress_bars():
        pipeline = require("diffusers", "diffusers").WanPipeline.from_pretrained(
            folder, local_files_only=True, **loaded
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, wanted: list[Wanted], how: Sampling) -> list[Float[Tensor, "F 32 32"]]:
    """A grey clip in [0, 1] for each, on the CPU."""
    drawn: dict[int, Tensor] = {}
    channels, side = pipeline.transformer.config.in_channels, SIZE // SPATIAL
    for frames in sorted({clip.frames for clip in wanted}):
        places = [i for i, clip in enumerate(wanted) if clip.frames == frames]
        shape = (channels, (frames - 1) // TEMPORAL + 1, side, side)
        for first in range(0, len(places), _AT_ONCE):
            chunk = places[first : first + _AT_ONCE]
            noise = torch.stack([torch.randn(shape, generator=how.rng.child(i).generator()) for i in chunk])
            videos = pipeline(
                prompt=[wanted[i].caption for i in chunk],
                height=SIZE,
                width=SIZE,
                num_frames=frames,
                num_inference_steps=how.steps,
                guidance_scale=how.guidance_scale,
                latents=noise.to(pipeline.device),
                max_sequence_length=LENGTH,
                output_type="pt",
            ).frames
            drawn |= dict(zip(chunk, videos.float().cpu().mean(dim=2), strict=True))
    return [drawn[i] for i in range(len(wanted))]


def judged(judge: ClipJudge, clips: list[Float[Tensor, "F 32 32"]], wanted: list[Wanted]) -> dict[str, Value]:
    """The shares of clips with the right digit, the right motion, and both."""
    verdicts = judge_clips(judge, clips)
    digit = verdicts.digit == torch.tensor([clip.digit for clip in wanted])
    motion = verdicts.motion == torch.tensor([clip.motion for clip in wanted])
    return {"digit": share(digit), "motion": share(motion), "both": share(digit & motion)}


def reconstruction(decoded: list[Float[Tensor, "3 F 32 32"]], clips: Clips) -> Value:
    """PSNR in dB of clips through the autoencoder; its standard error is over the digits' pictures."""
    errors = torch.stack([(video - clips.video(i)).square().mean() for i, video in enumerate(decoded)])
    return average(-10 * errors.clamp(min=1e-12).log10(), clips.source)


def measure(
    pipeline: Any, judge: ClipJudge, unseen: Clips, how: Sampling, each: int
) -> tuple[dict[str, Any], list[Float[Tensor, "F 32 32"]]]:
    """The pipeline's quality, and the samples it was measured on, in the order of `every_caption(each)`.

    Args:
        pipeline: from `load_pipeline`.
        judge: trained on true clips.
        unseen: true clips of digits that nothing was trained on: what the judge makes of them bounds what samples
            can reach, and what it makes of them after the autoencoder bounds what the transformer can.
        how: samples are drawn.
        each: samples of each caption.
    """
    wanted = every_caption(each)
    drawn = sample(pipeline, wanted, how)
    decoded = decode_encoded(pipeline.vae, unseen)
    shown = [
        Wanted(int(unseen.digit[i]), int(unseen.motion[i]), int(unseen.background[i]), len(unseen.pictures[i]))
        for i in range(len(unseen))
    ]
    quality = {
        "samples": judged(judge, drawn, wanted),
        "decoded": judged(judge, [video[0] for video in decoded], shown),
        "unseen": judged(judge, [unseen.video(i)[0] for i in range(len(unseen))], shown),
    }
    return {"quality": quality, "autoencoder_psnr": reconstruction(decoded, unseen)}, drawn


def write_sheet(folder: Path, pipeline: Any, how: Sampling) -> None:
    """motions.gif: digits down, motions across, 9 frames; strips.png: a motion a row, a frame a column."""
    wanted = [Wanted(digit, motion, 0, LENGTHS[0]) for digit in range(10) for motion in range(len(MOTIONS))]
    clips = torch.stack(sample(pipeline, wanted, how)).view(10, len(MOTIONS), LENGTHS[0], SIZE, SIZE)
    grey = (255 * clips.clamp(0, 1)).round().to(torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    grid = grey.permute(2, 0, 3, 1, 4).reshape(LENGTHS[0], 10 * SIZE, len(MOTIONS) * SIZE)
    (folder / "motions.gif").write_bytes(grey_gif(grid))
    rows = torch.stack([grey[(motion + 2) % 10, motion] for motion in range(len(MOTIONS))])
    strips = rows.permute(0, 2, 1, 3).reshape(len(MOTIONS) * SIZE, LENGTHS[0] * SIZE)
    require("PIL.Image", "diffusers").fromarray(strips.numpy()).save(folder / "strips.png")
