"""The figures of the paper that experiments are compared with: arXiv 2605.21489v2, CC BY 4.0, copied from its tables.

Text-to-3D with Stable Diffusion 2.1 on an A100; factors, without errors, since the paper prints none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RENOISE = (1, 2, 4, 8, 16, 32)
"""The K of Tables 1, 2 and 7."""

TABLE_1: Mapping[str, Sequence[float]] = {
    "uniform": (1.00, 1.57, 2.24, 2.63, 2.52, 1.98),
    "iw": (1.24, 1.93, 2.68, 3.01, 2.75, 2.09),
    "strat": (1.00, 1.66, 2.47, 2.96, 2.75, 2.08),
    "iw+strat": (1.24, 2.05, 2.94, 3.29, 2.94, 2.18),
}
"""ECM against uniform K = 1."""

TABLE_2: Mapping[str, Sequence[float]] = {
    "uniform": (1.00, 1.00, 1.00, 1.00, 1.00, 1.00),
    "iw": (1.24, 1.23, 1.20, 1.14, 1.09, 1.05),
    "strat": (1.00, 1.06, 1.11, 1.12, 1.09, 1.05),
    "iw+strat": (1.24, 1.30, 1.31, 1.25, 1.17, 1.10),
}
"""RE against uniform at the same K."""

TABLE_6_RENOISE = (1, 2, 4, 8, 16)

TABLE_6_ECM: Mapping[str, Sequence[float]] = {
    "uniform": (1.00, 1.65, 2.41, 3.00, 3.13),
    "weight": (1.31, 2.12, 2.98, 3.55, 3.54),
    "oracle": (1.39, 2.23, 3.12, 3.66, 3.61),
}
"""ECM against uniform K = 1."""

TABLE_6_RE: Mapping[str, Sequence[float]] = {
    "weight": (1.40, 1.34, 1.31, 1.24, 1.17),
    "oracle": (1.47, 1.43, 1.37, 1.28, 1.21),
}
"""RE against uniform at the same K. (At K = 1 it should equal the ECM above, and does not.)"""

TABLE_7: Mapping[str, Sequence[float]] = {
    "emerald beetle": (1.23, 2.05, 2.99, 3.41, 3.12, 2.40),
    "gold mask": (1.20, 1.95, 2.59, 2.73, 2.33, 1.73),
    "mahogany piano": (1.28, 2.07, 3.12, 3.58, 3.24, 2.32),
    "orchid pot": (1.24, 2.04, 2.98, 3.33, 2.97, 2.15),
    "teddy bear": (1.26, 2.13, 3.01, 3.42, 3.05, 2.31),
}
"""ECM of IW + strata by prompt."""

FIGURE_16: Mapping[str, float] = {"uniform": 3.0, "iw": 3.5, "strat": 3.4, "iw+strat": 3.8}
"""ECM at K = 8 and low guidance (omega = 25 instead of 100)."""

FIGURE_20: Mapping[str, float] = {"iid": 1.00, "strata": 1.04, "iw": 1.22, "iw+strata": 1.29, "sinkhorn": 1.42}
"""Gain of pair designs over pairs without replacement."""

COST_RATIO = 4.0
"""Teacher draws that one render costs, from (4, 1) and (1, 16) costing the same: 4 (r + 1) = r + 16 (App. D.1.1).

The paper never states a ratio. Its worked example (270 ms at (2, 1), 340 ms at (1, 8); C.1.5) gives 3.6, a fit to
Table 1 4.35 (`carv.variance.four_numbers`), the caption of Fig. 3 (65 % of the cost) 9.
"""

SIMULATED_RATIOS = (0.0, 1.0, 100.0)
"""The alpha of Fig. 21."""

TABLE_4_BUDGETS = (4, 16, 64, 256, 768)

TABLE_4: Mapping[str, Sequence[float]] = {
    "rank correlation, iid": (0.065, 0.245, 0.616, 0.813, 0.934),
    "rank correlation, strata": (0.166, 0.407, 0.805, 0.916, 1.000),
    "multiplier from correlation": (2.44, 1.80, 3.82, 2.85, 1.28),
}
"""Attribution with Wan 2.1 and 11 clips: mean rank correlation with the bank of 768, and the budget strata save."""

TABLE_3: Mapping[str, Sequence[float]] = {
    "(8, 1) iid": (3954, 71.3, 982),
    "(8, 16) iid": (1175, 13.3, 59.9),
    "(8, 16) strata": (1169, 12.0, 30.7),
}
"""Variance of DMD's teacher score, score difference and parameter gradient after 20,000 steps."""

DISTILLATION_STEP_SECONDS: Mapping[str, float] = {"(8, 1)": 0.38, "(8, 8)": 0.47, "(8, 16)": 0.59, "(48, 1)": 1.0}
"""Seconds an iteration on an A100 (App. D.2.1), student and fake-score iterations averaged."""

DISTILLATION_COST_RATIO = 27.0
"""Upstream over denoising, from (0.38 s) and (0.59 s) above (App. D.2.3, H4)."""
