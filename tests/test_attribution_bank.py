"""The shared draws of an attribution: their law, their addresses, and how they grow."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import get_args

import pytest
import torch
from torch import Tensor

from carv.density import Density, LogitNormal, ShiftedUniform, uniform_steps
from carv.proposals import defensive, proportional
from carv.schedule import NoiseSchedule
from carv.tasks.attribution import bank as bank_module
from carv.tasks.attribution.bank import Design, DrawBank, base_density

DESIGNS: tuple[Design, ...] = get_args(Design)
GROWING: tuple[Design, ...] = ("iid", "strata", "systematic")
FLOW = ShiftedUniform()
STEPS = uniform_steps(20, 219)
SHAPE = (4, 3, 2, 2)


def size_of(design: str, draws: int) -> int | None:
    return draws if design == "global" else None


def normal_proposal(base: Density) -> Density:
    if base.discrete:
        return proportional(base, lambda t: t.double().square())
    return defensive(base, LogitNormal(0.5, 0.8), 0.2)


# The law of the draws


@pytest.mark.parametrize(
    ("design", "draws", "words"), [("iid", 1, 1), ("strata", 4, 4), ("systematic", 4, 1), ("global", 3, 3)]
)
def test_each_draw_is_exactly_uniform_over_all_random_words(
    design: Design, draws: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With words of 3 bits all of them, and all orders of global strata, can be gone through: no value is favoured."""
    bits = 3
    monkeypatch.setattr(bank_module, "_BITS", bits)
    bank = DrawBank(0, design, FLOW, size=size_of(design, draws))
    orders = itertools.permutations(range(draws)) if design == "global" else [None]
    seen: list[Counter[float]] = [Counter() for _ in range(draws)]
    for order in orders:
        bank._order = None if order is None else list(order)
        for drawn in itertools.product(range(1 << bits), repeat=words):
            bank._words = dict(enumerate(drawn))
            for i, u in enumerate(bank.uniforms(0, draws).tolist()):
                seen[i][u] += 1
    for counts in seen:
        assert len(counts) == 8
        assert len(set(counts.values())) == 1


def test_scrambled_points_of_different_branches_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all words of 3 bits, draws 0 and 1 take every pair of values in opposite halves equally often.

    A mutant that flips whole digits (one word for all points) ties the second draw to the first.
    """
    monkeypatch.setattr(bank_module, "_BITS", 3)
    bank = DrawBank(0, "strata", FLOW)
    pairs: Counter[tuple[float, ...]] = Counter()
    for drawn in itertools.product(range(8), repeat=2):
        bank._words = dict(enumerate(drawn))
        pairs[tuple(bank.uniforms(0, 2).tolist())] += 1
    assert len(pairs) == 2 * 4 * 4
    assert len(set(pairs.values())) == 1
    assert all((a < 0.5) != (b < 0.5) for a, b in pairs)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("base", [FLOW, STEPS], ids=["flow", "steps"])
@pytest.mark.parametrize("proposed", [False, True], ids=["base", "proposal"])
def test_estimates_are_unbiased_at_any_budget(design: Design, base: Density, proposed: bool) -> None:
    """E 1/B sum weight h(t) = E_p h over 500 banks of B = 6 draws; false alarms 6 in 10^5 for each of the 16 cases.

    h weighs both ends: a bias of 5 standard errors, at most 30 % of E h, is found with probability 0.84. Dropping
    p/q moves it by more than 60 %.
    """

    def h(t: Tensor) -> Tensor:
        s = (t.double() - base.low) / (base.high - base.low)
        return s**3 + 0.3 * torch.cos(5 * s)

    at = base.icdf((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    truth = h(at).mean()
    proposal = normal_proposal(base) if proposed else None
    estimates = []
    for seed in range(500):
        t, weight = DrawBank(seed, design, base, proposal, size=size_of(design, 6)).timesteps(0, 6)
        estimates.append((weight * h(t)).mean())
    found = torch.stack(estimates)
    assert (found.mean() - truth).abs() < 4 * found.std() / len(found) ** 0.5
    assert found.std() / len(found) ** 0.5 < 0.06 * truth


def test_without_a_proposal_the_weights_are_exactly_one() -> None:
    for base in (FLOW, STEPS):
        for noise in ("fresh", "fixed"):
            weight = DrawBank(3, "strata", base, noise=noise, cells=48).timesteps(0, 32)[1]
            torch.testing.assert_close(weight, torch.ones(32, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("design", ["strata", "systematic"])
def test_every_power_of_two_prefix_has_one_draw_in_each_stratum(design: Design) -> None:
    u = DrawBank(7, design, FLOW).uniforms(0, 512)
    for m in range(10):
        n = 1 << m
        for first in range(0, 512, n):  # and so has every aligned block
            if design == "strata":
                assert sorted((u[first : first + n] * n).long().tolist()) == list(range(n))
            else:
                gaps = u[first : first + n].sort().values.diff()
                torch.testing.assert_close(gaps, torch.full((n - 1,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-15)


def test_stratified_draws_move_inside_their_strata() -> None:
    """Strata without jitter (snapped to the grid) would be biased; here the positions inside are uniform.

    The mean of 2048 uniforms is within 4 s.e. of 1/2, and they differ between draws.
    """
    inside = torch.cat([DrawBank(seed, "strata", FLOW).uniforms(0, 256) * 256 % 1 for seed in range(8)])
    assert abs(inside.mean() - 0.5) < 4 * (1 / 12 / 2048) ** 0.5
    assert len(inside.unique()) == 2048


def test_global_strata_have_one_draw_each_in_random_order() -> None:
    bank = DrawBank(1, "global", FLOW, size=13)
    strata = (bank.uniforms(0, 13) * 13).long().tolist()
    assert sorted(strata) == list(range(13))
    assert strata != sorted(strata)


# Addresses


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_a_draw_is_the_same_whatever_the_order_or_the_budget(design: Design, noise: bank_module.NoiseMode) -> None:
    whole = DrawBank(5, design, FLOW, noise=noise, cells=24, size=size_of(design, 24))
    other = DrawBank(5, design, FLOW, noise=noise, cells=24, size=size_of(design, 24))
    t, weight = whole.timesteps(0, 24)
    eps = whole.noises(0, 24, SHAPE)
    for first, last in ((17, 24), (3, 4), (0, 16)):
        again = other.timesteps(first, last)
        assert torch.equal(again[0], t[first:last])
        assert torch.equal(again[1], weight[first:last])
        assert torch.equal(other.noises(first, last, SHAPE), eps[first:last])
    assert torch.equal(other.noise(9, SHAPE), eps[9])


def test_clips_of_different_length_share_the_noise_of_the_frames_that_both_have() -> None:
    bank = DrawBank(2, "iid", FLOW)
    long, short, picture = bank.noise(4, (4, 5, 2, 2)), bank.noise(4, (4, 2, 2, 2)), bank.noise(4, (4, 2, 2))
    assert torch.equal(long[:, :2], short)
    assert torch.equal(long[:, 0], picture)
    assert not torch.equal(long[:, 0], long[:, 1])


def test_the_noise_is_standard_normal_and_differs_between_draws_seeds_and_replicates() -> None:
    eps = DrawBank(0, "iid", FLOW).noises(0, 64, (4, 4, 4, 4))
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5
    assert abs(eps.square().mean() - 1) < 4 * (2 / n) ** 0.5
    gram = eps.flatten(1) @ eps.flatten(1).T / eps[0].numel()
    off = gram - gram.diag().diag()
    assert off.abs().max() < 5.5 / eps[0].numel() ** 0.5
    others = [DrawBank(1, "iid", FLOW), DrawBank(0, "iid", FLOW, replicate=1)]
    for other in others:
        assert not torch.equal(other.noise(0, (4, 4, 4, 4)), eps[0])
        assert not torch.equal(other.timesteps(0, 4)[0], DrawBank(0, "iid", FLOW).timesteps(0, 4)[0])


def test_antithetic_draws_come_in_pairs_at_one_timestep() -> None:
    bank = DrawBank(0, "strata", STEPS, antithetic=True)
    t, _ = bank.timesteps(0, 8)
    assert torch.equal(t[::2], t[1::2])
    assert len(bank.uniforms(0, 8).unique()) == 4
    eps = bank.noises(0, 8, SHAPE)
    assert torch.equal(eps[::2], -eps[1::2])
    assert not torch.equal(eps[0], eps[2])


# Fixed banks


def test_a_fixed_bank_of_as_many_global_strata_as_cells_is_the_whole_bank() -> None:
    """This is why the paper's strata agree with the reference exactly at 768 draws."""
    bank = DrawBank(0, "global", FLOW, noise="fixed", cells=48, size=48)
    cells = bank.cell(0, 48)
    assert sorted(cells.tolist()) == list(range(48))
    assert torch.equal(bank.timesteps(0, 48)[0], bank.grid()[cells])


@pytest.mark.parametrize("base", [FLOW, STEPS], ids=["flow", "steps"])
def test_a_fixed_bank_estimates_the_mean_over_its_cells_exactly_with_any_proposal(base: Density) -> None:
    """Exactly: sum over cells of P(cell) weight = 1/cells for each cell."""
    bank = DrawBank(0, "iid", base, normal_proposal(base), noise="fixed", cells=30)
    assert bank._grid is not None
    mass = bank._grid.law.pmf
    cells = bank.cell(0, 400)
    weight = bank.timesteps(0, 400)[1]
    torch.testing.assert_close(mass[cells] * weight, torch.full((400,), 1 / 30, dtype=torch.float64))
    assert mass.max() > 2 * mass.min()
    assert len(cells.unique()) > 20


def test_the_cells_of_a_fixed_bank_keep_their_noise_in_every_sampling_of_it() -> None:
    banks = [DrawBank(0, design, FLOW, noise="fixed", cells=8, replicate=r) for design in GROWING for r in (0, 1)]
    reference = torch.stack([banks[0].cell_noise(cell, SHAPE) for cell in range(8)])
    assert len(reference.flatten(1).unique(dim=0)) == 8
    for bank in banks:
        assert torch.equal(bank.noises(0, 16, SHAPE), reference[bank.cell(0, 16)])
    assert not torch.equal(banks[0].cell(0, 16), banks[1].cell(0, 16))


# Settings and mistakes


def test_settings_tell_banks_apart_and_do_not_depend_on_where_they_are_made() -> None:
    bank = DrawBank(0, "strata", FLOW)
    assert bank.settings == DrawBank(0, "strata", ShiftedUniform()).settings
    others = [
        DrawBank(1, "strata", FLOW),
        DrawBank(0, "iid", FLOW),
        DrawBank(0, "strata", ShiftedUniform(shift=3.0)),
        DrawBank(0, "strata", FLOW, normal_proposal(FLOW)),
        DrawBank(0, "strata", FLOW, noise="fixed"),
        DrawBank(0, "strata", FLOW, noise="fixed", cells=10),
        DrawBank(0, "strata", FLOW, antithetic=True),
        DrawBank(0, "strata", FLOW, replicate=1),
    ]
    assert len({str(bank.settings) for bank in [bank, *others]}) == 9


def test_the_base_follows_the_schedule() -> None:
    assert base_density(NoiseSchedule.flow(shift=3.0)) == ShiftedUniform()
    assert base_density(NoiseSchedule.flow(), shift=5.0) == ShiftedUniform(shift=5.0)
    steps = base_density(NoiseSchedule.linear(1000))
    assert (steps.low, steps.high) == (0, 999)
    with pytest.raises(ValueError, match="discrete schedule"):
        base_density(NoiseSchedule.linear(1000), shift=2.0)


@pytest.mark.parametrize(
    ("design", "options", "message"),
    [
        ("sobol", {}, "unknown design 'sobol'"),
        ("iid", {"noise": "cold"}, 'noise is "fresh" or "fixed"'),
        ("iid", {"size": 4}, "a size goes with"),
        ("global", {}, "a size goes with"),
        ("global", {"size": 0}, "at least one"),
        ("iid", {"noise": "fixed", "antithetic": True}, "antithetic draws come in pairs"),
        ("global", {"size": 5, "antithetic": True}, "antithetic draws come in pairs"),
        ("iid", {"proposal": STEPS}, "both discrete or both continuous"),
    ],
)
def test_a_bank_that_cannot_be_is_refused_in_one_sentence(design: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawBank(0, design, FLOW, **options)


def test_draws_that_are_not_there_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match='bank of 8 global strata ends before draw 9; only "iid"'):
        DrawBank(0, "global", FLOW, size=8).timesteps(0, 9)
    with pytest.raises(ValueError, match="counted from 0"):
        DrawBank(0, "iid", FLOW).timesteps(3, 3)
    with pytest.raises(ValueError, match="hence no cells"):
        DrawBank(0, "iid", FLOW).grid()
    with pytest.raises(ValueError, match=r"cells are 0\.\.7, got 8"):
        DrawBank(0, "iid", FLOW, noise="fixed", cells=8).cell_noise(8, SHAPE)
    with pytest.raises(ValueError, match="mix in some of the base"):
        DrawBank(0, "iid", FLOW, ShiftedUniform(0.5, 1.0), noise="fixed")
    with pytest.raises(ValueError, match=r"shape \(C, h, w\)"):
        DrawBank(0, "iid", FLOW).noise(0, (4, 4))
