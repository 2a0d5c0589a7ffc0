"""Classifier-free guidance over R renders x K re-noisings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carv.teachers.base import Condition, Teacher


@dataclass(frozen=True)
class Guided:
    """A teacher's eps_hat under classifier-free guidance, `e_u + s (e_c - e_u)`.

    `s` is diffusers' and threestudio's `guidance_scale`. The paper (Eq. 19) writes the same as
    `(1 + omega) e_c - omega e_u`, so that `omega = s - 1`: its omega of 99 is an s of 100 here.

    Attributes:
        teacher: the frozen teacher.
        scale: s. At s = 1 the teacher is asked for the condition only, at s = 0 for `negative` only.
        condition: e_c's condition, R rows (one a render) or one row that all renders share.
        negative: e_u's condition, R rows or one: the empty prompt, or a negative prompt in its place.
            `None` is allowed where s = 1.

    Raises:
        ValueError: s is not finite, or `negative` is missing where it is needed.

    Source:
        Ho & Salimans (2022); Eq. 19 of the paper.
    """

    teacher: Teacher
    scale: float
    condition: Condition
    negative: Condition | None = None

    def __post_init__(self) -> None:
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"the guidance scale must be a finite number, got {self.scale}")
        if self.negative is None and self.scale != 1:
            raise ValueError(
                f"guidance with scale {self.scale:g} needs an unconditional or negative condition: "
                "pass negative=teacher.encode_prompts(['']), or scale=1 for none"
            )

    @classmethod
    def from_prompts(
        cls, teacher: Teacher, prompts: Sequence[str], scale: float, negative: str | Sequence[str] = ""
    ) -> Guided:
        """Guidance towards prompts.

        Args:
            teacher: the frozen teacher.
            prompts: R prompts, one a render, or one for all renders.
            scale: s, see `Guided`.
            negative: one negative prompt for all renders, or R of them; the empty prompt is unconditional.
        """
        against = [negative] if isinstance(negative, str) else negative
        return cls(teacher, scale, teacher.encode_prompts(prompts), teacher.encode_prompts(against))

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Guided eps_hat(z_t, t), without gradients.

        Both axes are flattened row-major to N = R K: re-noising k of render r is row r K + k, so that
        every render's condition stands K times in a row.

        Args:
            z_t: `[R, K, *latent]`.
            t: `[R, K]`, in the units of the teacher's schedule.

        Returns:
            `[R, K, *latent]`.

        Raises:
            ValueError: z_t, t or the number of rows of a condition do not fit together.
        """
        if z_t.shape[2:] != self.teacher.latent_shape or z_t.shape[:2] != t.shape or t.ndim != 2:
            raise ValueError(
                f"guidance takes z_t [R, K, {', '.join(map(str, self.teacher.latent_shape))}] and t [R, K], "
                f"got {list(z_t.shape)} and {list(t.shape)}"
            )
        renders, draws = t.shape
        wanted = [
            _rows(condition, role, renders, draws)
            for condition, role, unused_at in ((self.negative, "negative", 1), (self.condition, "condition", 0))
            if condition is not None and self.scale != unused_at
        ]
        with torch.no_grad():
            outputs = self.teacher.predict_noise(z_t.flatten(0, 1), t.flatten(), wanted)
            if len(outputs) == 1:
                return outputs[0].view(z_t.shape)
            unconditional, conditional = outputs
            return (unconditional + self.scale * (conditional - unconditional)).view(z_t.shape)


def _rows(condition: Condition, role: str, renders: int, draws: int) -> Condition:
    """The condition of each of R K draws, from one row per render or one row for all."""
    if len(condition) == renders:
        return condition.repeat_rows(draws)
    if len(condition) == 1:
        return condition.repeat_rows(renders * draws)
    raise ValueError(
        f"{role} has {len(condition)} rows for {renders} renders: give one row a render, or one row for all of them"
    )
