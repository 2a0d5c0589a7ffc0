"""The exact denoiser of a data set: the teacher in closed form, with no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.teachers.base import Condition

# Posterior weights below this become 0. They change no digit of the mean, but as float32 subnormals they make the
# product with the images four times slower.
_NEGLIGIBLE = 1e-30


class ExactTeacher:
    """eps_hat of a data set of M images, exactly.

    A prompt selects images. Its data law is the mixture of N(x_i, h^2 I) over them, with equal weights, so

        z_t | i ~ N(alpha x_i, v I),          v = alpha^2 h^2 + sigma^2
        w_i     = softmax_i( -|z_t - alpha x_i|^2 / 2v )
        eps_hat = E[eps | z_t] = -sigma grad log p(z_t) = (sigma / v) (z_t - alpha sum_i w_i x_i)

    Nothing divides by sigma: with h > 0 the formula holds for all t, also for sigma = 0, and for straight
    flows as well as for DDPM tables.

    Precision. The logits are `(alpha <z_t, x_i> - alpha^2 |x_i|^2 / 2) / v`, the square without its term
    |z_t|^2, which all images share. Their rounding error is about `u |z_t| |x_i| / v` with u the unit
    roundoff. For 3x32x32 pixels at DDPM's t = 0 (v = 1e-4) that is 0.5 in float32, and near t = 0 of a flow
    it has no bound: float32 would mix up near-duplicates. In float64 it is 1e-9 there, and about 1e-4 at
    v = 1e-9, where the rounding of a float32 z_t is already larger. Hence the logits are always made in
    float64, at no more than twice the time of float32 (both wait for memory). The mean of the images, a
    convex combination, loses nothing in float32; `precision` sets its type.

    Memory: the images twice, in float64 and in `precision`, and per call at most about `memory` bytes
    for the N x M logits and weights (the draws are worked through in chunks).

    Attributes:
        schedule: its noise schedule. The network's `prediction` plays no part.
        latent_shape: the shape of one image.
        bandwidth: h, in the units of the images; 0 for the empirical law itself.

    Raises:
        ValueError: images that are not finite floating-point numbers `[M, *latent]`; h negative or not finite.

    Source:
        The closed form is that of e.g. Karras et al. (2022), App. B.3, with alpha and h added.
    """

    def __init__(
        self,
        images: Tensor,
        schedule: NoiseSchedule,
        select: Callable[[str], Tensor],
        bandwidth: float = 0.0,
        precision: torch.dtype = torch.float32,
        memory: int = 2**26,
    ) -> None:
        """The exact teacher of some images.

        Args:
            images: `[M, *latent]`; the teacher lives on their device.
            schedule: the noise schedule.
            select: prompt -> bool `[M]`, the images that the prompt means. The empty prompt usually means
                all. It raises ValueError for a prompt that it cannot understand.
            bandwidth: h.
            precision: float32 or float64, the type of the posterior mean and of `predict_noise`.
            memory: bytes for the temporaries of one call, at least one draw's worth.
        """
        if images.ndim < 2 or len(images) == 0 or not images.is_floating_point() or not bool(images.isfinite().all()):
            raise ValueError(
                f"images must be finite floating-point numbers [M, *latent] with M >= 1, "
                f"got {images.dtype} {list(images.shape)}"
            )
        if not (math.isfinite(bandwidth) and bandwidth >= 0):
            raise ValueError(f"bandwidth must be a number >= 0, got {bandwidth}")
        self.schedule = schedule.to(images.device)
        self.latent_shape = tuple(images.shape[1:])
        self.bandwidth = float(bandwidth)
        self._select = select
        self._memory = memory
        flat = images.detach().flatten(1)
        self._images = flat.to(precision)  # [M, D]
        self._exact = flat.to(torch.float64)  # [M, D]
        self._half_norms = self._exact.square().sum(1) / 2  # [M], |x_i|^2 / 2

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """`selected`, bool `[N, M]`: the images that each prompt means.

        Raises:
            ValueError: a prompt that selects no image; whatever `select` raises.
        """
        return Condition({"selected": torch.stack([self._selected(prompt) for prompt in prompts])})

    def predict_noise(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """eps_hat(z_t, t, c) for each condition c; the distances to the images are computed once for all.

        Args:
            z_t: `[N, *latent]`, in the units of the images.
            t: `[N]`, in the units of the schedule.
            conditions: each with N rows, from `encode_prompts`.

        Returns:
            One `[N, *latent]` tensor for each condition, in the type of z_t.

        Raises:
            ValueError: shapes that do not fit; v = 0, i.e. sigma(t) = 0 with bandwidth 0. The latter is
                checked where t is on the CPU only: elsewhere, where a check would have to wait for the
                device, the result is NaN.
        """
        self._check(z_t, t, conditions)
        # Bytes per draw and image: 24 while the logits are made; for each condition the masked logits, their
        # softmax, its threshold and the weights in `precision`.
        per_draw = len(self._exact) * (24 + 32 * len(conditions))
        size = max(1, self._memory // per_draw)
        parts: list[list[Tensor]] = [[] for _ in conditions]
        with torch.no_grad():
            for start in range(0, len(z_t), size):
                rows = slice(start, start + size)
                masks = [condition.tensors["selected"][rows] for condition in conditions]
                for part, noise in zip(parts, self._predict(z_t[rows], t[rows], masks), strict=True):
                    part.append(noise)
        return [torch.cat(part) if part else torch.empty_like(z_t) for part in parts]

    def log_density(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p(z_t) under the condition at t, in nats and float64; differentiable in z_t.

        Args:
            z_t, t: as in `predict_noise`.
            condition: N rows.
        """
        self._check(z_t, t, [condition])
        flat = z_t.flatten(1).to(torch.float64)
        alpha, _, v = self._coefficients(t)
        selected = condition.tensors["selected"]
        logits = self._logits(flat, alpha, v).masked_fill(~selected, -math.inf)
        shared = -flat.square().sum(1) / (2 * v) - flat.shape[1] / 2 * (2 * math.pi * v).log()
        return logits.logsumexp(1) - selected.sum(1).log() + shared

    def _predict(self, z_t: Tensor, t: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
        """eps_hat for the draws of one chunk, one tensor for each mask."""
        flat = z_t.flatten(1).to(self._images.dtype)
        alpha, sigma, v = self._coefficients(t)
        logits = self._logits(z_t.flatten(1).to(torch.float64), alpha, v)
        weights = torch.cat([logits.masked_fill(~mask, -math.inf).softmax(1) for mask in masks])
        weights = torch.threshold(weights, _NEGLIGIBLE, 0.0).to(flat.dtype)
        means = (weights @ self._images).view(len(masks), *flat.shape)
        alpha, factor = alpha.to(flat.dtype)[:, None], (sigma / v).to(flat.dtype)[:, None]
        noise = factor * (flat - alpha * means)
        return [part.view(z_t.shape).to(z_t.dtype) for part in noise]

    def _logits(self, flat: Tensor, alpha: Tensor, v: Tensor) -> Tensor:
        """`-|z_t - alpha x_i|^2 / 2v + |z_t|^2 / 2v`, float64 `[N, M]`."""
        # Images times draws: BLAS is twice as fast with the large factor on the left.
        products = (self._exact @ flat.T.contiguous()).T
        return (alpha[:, None] * products - alpha[:, None].square() * self._half_norms) / v[:, None]

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and v = alpha^2 h^2 + sigma^2, float64 `[N]`."""
        alpha, sigma = self.schedule.alpha(t, torch.float64), self.schedule.sigma(t, torch.float64)
        v = (alpha * self.bandwidth).square() + sigma.square()
        if v.device.type == "cpu" and bool((v == 0).any()):
            raise ValueError(
                f"at t = {t[v == 0][0].item():g} there is no noise, and with bandwidth 0 the law has no density: "
                "give ExactTeacher a bandwidth above 0, or draw larger t"
            )
        return alpha, sigma, v

    def _selected(self, prompt: str) -> Tensor:
        selected = self._select(prompt)
        if selected.dtype != torch.bool or selected.shape != (len(self._exact),):
            raise ValueError(
                f"select({prompt!r}) must return a bool tensor [{len(self._exact)}], one entry an image, "
                f"got {selected.dtype} {list(selected.shape)}"
            )
        if not bool(selected.any()):
            raise ValueError(f"the prompt {prompt!r} selects none of the teacher's {len(self._exact)} images")
        return selected.to(self._exact.device)

    def _check(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> None:
        if z_t.shape[1:] != self.latent_shape or t.shape != z_t.shape[:1]:
            raise ValueError(
                f"the exact teacher takes z_t [N, {', '.join(map(str, self.latent_shape))}] and t [N], "
                f"got {list(z_t.shape)} and {list(t.shape)}"
            )
        for condition in conditions:
            if len(condition) != len(z_t):
                raise ValueError(f"a condition has {len(condition)} rows for {len(z_t)} draws; give one row a draw")
