"""Influence scores are Eq. 11, and their errors, ranks and stop rule are as sure as they say."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from carv.density import ShiftedUniform
from carv.rng import stream
from carv.tasks.attribution.bank import Design, DrawBank
from carv.tasks.attribution.scores import draw_cosines, draw_products, influence, zero_draws
from carv.tasks.attribution.stability import (
    Estimate,
    StopRule,
    budgets,
    estimate,
    order_probability,
    ranking,
    replicated,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed, "test").generator(), dtype=torch.float64)


QUERY, TRAIN, WEIGHT = normal(2, 7, 5), normal(3, 7, 5, seed=1), normal(7, seed=2).abs()


def test_influence_is_a_direct_evaluation_of_equation_11() -> None:
    for q in range(2):
        for n in range(3):
            total = 0.0
            for b in range(7):
                a, c = QUERY[q, b].tolist(), TRAIN[n, b].tolist()
                length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in c))
                total += float(WEIGHT[b]) * sum(x * y for x, y in zip(a, c, strict=True)) / length
            assert float(influence(QUERY, TRAIN, WEIGHT)[q, n]) == pytest.approx(total / 7, abs=1e-14)


def test_products_are_the_same_without_norms() -> None:
    want = torch.einsum("qbk,nbk,b->qn", QUERY, TRAIN, WEIGHT) / 7
    torch.testing.assert_close(influence(QUERY, TRAIN, WEIGHT, normalise=False), want)
    torch.testing.assert_close(draw_products(QUERY, TRAIN).mean(-1) * 7, torch.einsum("qbk,nbk->qn", QUERY, TRAIN))


def test_chunks_of_draws_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw_cosines(QUERY, TRAIN, WEIGHT)
    monkeypatch.setattr("carv.tasks.attribution.scores._AT_ONCE", 1)
    assert torch.equal(draw_cosines(QUERY, TRAIN, WEIGHT), whole)


def test_the_length_of_a_clip_and_any_scale_of_a_draw_change_no_cosine() -> None:
    scale = torch.rand(3, 7, 1, generator=stream(3).generator(), dtype=torch.float64) + 0.1
    torch.testing.assert_close(draw_cosines(QUERY, TRAIN * scale), draw_cosines(QUERY, TRAIN), atol=1e-15, rtol=0)


def test_tiny_and_huge_gradients_of_float32_keep_their_direction() -> None:
    want = draw_cosines(QUERY, TRAIN)
    for scale in (1e-40, 1e30):
        found = draw_cosines((QUERY * scale).float(), TRAIN)
        torch.testing.assert_close(found, want, atol=2e-4 if scale < 1 else 1e-6, rtol=0)


def test_a_gradient_of_length_zero_counts_as_cosine_zero_and_is_counted() -> None:
    train = TRAIN.clone()
    train[1, 4] = 0
    found = draw_cosines(QUERY, train, WEIGHT)
    assert torch.equal(found[:, 1, 4], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(found[:, [0, 2]], draw_cosines(QUERY, TRAIN, WEIGHT)[:, [0, 2]])
    assert zero_draws(train).tolist() == [0, 1, 0]


def test_an_example_has_influence_one_on_itself_and_never_above() -> None:
    assert influence(TRAIN.float(), TRAIN.float()).diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-15)
    assert float(draw_cosines(normal(50, 9, 3), normal(50, 9, 3)).abs().max()) <= 1


@pytest.mark.parametrize(
    ("query", "weight", "says"),
    [
        (normal(2, 6, 5), None, "same B"),
        (normal(2, 7, 4), None, "same B"),
        (QUERY, normal(6), "a weight for each of 7 draws"),
        (QUERY, -WEIGHT, "not negative"),
        (QUERY * math.nan, None, "not finite"),
        (QUERY[:, :0], None, "B >= 1 draws"),
    ],
)
def test_what_does_not_fit_is_one_sentence(query: Tensor, weight: Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw_cosines(query, TRAIN, weight)


# Errors. The terms of eight examples: a mean each, a trend over u whose mean is zero, noise that all examples share
# (larger at large u), and noise of their own.
TRUTH = torch.linspace(0, 0.5, 8, dtype=torch.float64)


def terms(u: Tensor, seed: int, truth: Tensor = TRUTH, own: float = 0.3) -> Tensor:
    phase = 0.5 * torch.arange(len(truth), dtype=torch.float64)
    shared = 0.3 * (0.3 + u) * normal(len(u), seed=2 * seed)
    trend = 0.5 * torch.cos(phase[:, None] + 2 * math.pi * u)
    return truth[:, None] + trend + shared + own * normal(len(truth), len(u), seed=2 * seed + 1)


def uniforms(design: Design, draws: int, seed: int) -> Tensor:
    return DrawBank(seed, design, ShiftedUniform()).uniforms(0, draws)


@pytest.mark.parametrize("design", ["iid", "strata", "systematic"])
def test_95_percent_intervals_of_scores_hold_the_truth(design: Design) -> None:
    """400 banks x 8 scores, correlated as if 400 x 2: s.e. 0.77 %. An error 15 % too small covers 90.5 % and fails."""
    held, errors, scores = 0.0, [], []
    for seed in range(400):
        u = uniforms(design, 16, seed)
        found = estimate(terms(u, seed), design, u)
        low, high = found.intervals()
        held += float(((low <= TRUTH) & (high >= TRUTH)).double().mean()) / 400
        errors.append(found.standard_errors**2)
        scores.append(found.scores)
    assert 0.95 - 3 * 0.0077 < held < 0.985
    ratio = torch.stack(errors).mean(0) / torch.stack(scores).var(0)
    # s.e. of the ratio of variances: sqrt(2/400) = 7 % for each score, about 3.5 % for their mean.
    assert 0.9 < float(ratio.mean()) < 1.25


def test_ignoring_the_strata_would_overstate_the_error() -> None:
    """The mutant: the law of iid draws for a stratified bank, 1.8 times the variance here."""
    u = torch.stack([uniforms("strata", 16, seed) for seed in range(60)])
    right = sum(float((estimate(terms(v, i), "strata", v).standard_errors ** 2).mean()) for i, v in enumerate(u))
    naive = sum(float((estimate(terms(v, i), "iid").standard_errors ** 2).mean()) for i, v in enumerate(u))
    assert naive > 1.4 * right


def test_collapsed_strata_are_pairs_of_neighbours_in_u_whatever_the_order_of_draws() -> None:
    u = torch.tensor([0.9, 0.1, 0.6, 0.3])
    found = estimate(torch.tensor([[4.0, 1.0, 3.5, 2.0]]), "strata", u)
    assert float(found.standard_errors) == pytest.approx(math.sqrt(1 + 0.25) / 4)
    assert found.degrees == 2


def test_the_covariance_of_scores_is_that_of_the_pair_differences() -> None:
    u = uniforms("strata", 8, 0)
    c = terms(u, 0)[:, u.argsort()]
    d = c[:, 1::2] - c[:, ::2]
    torch.testing.assert_close(estimate(terms(u, 0), "strata", u).covariance(), d @ d.T / 64)


def test_errors_of_iid_draws_are_the_textbook_s_squared_over_b() -> None:
    c = terms(uniforms("iid", 9, 0), 0)
    found = estimate(c, "iid")
    torch.testing.assert_close(found.covariance(), torch.cov(c) / 9)
    assert found.degrees == 8


def test_an_odd_draw_joins_the_last_pair_without_bias() -> None:
    """Five strata of unequal means 0: the expected square is the sum of the variances; 4000 banks, s.e. 1.5 %."""
    scale = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    u = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    found = estimate(normal(4000, 5) * scale, "strata", u)
    want = float((scale**2).sum()) / 25
    assert float((found.standard_errors**2).mean()) == pytest.approx(want, rel=0.06)
    assert found.degrees == 3


def test_antithetic_pairs_are_one_unit_each() -> None:
    c = normal(3, 8)
    pairs = (c[:, ::2] + c[:, 1::2]) / 2
    torch.testing.assert_close(estimate(c, "iid", antithetic=True).covariance(), torch.cov(pairs) / 4)
    with pytest.raises(ValueError, match="in pairs, got 7"):
        estimate(c[:, :7], "iid", antithetic=True)


def test_replicated_banks_give_the_error_of_their_mean() -> None:
    banks = normal(6, 3)
    torch.testing.assert_close(replicated(banks).covariance(), torch.cov(banks.T) / 6)
    torch.testing.assert_close(replicated(banks).scores, banks.mean(0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: estimate(normal(3, 1), "iid"), "at least two independent draws"),
        (lambda: estimate(normal(3, 4), "strata"), "needs the position"),
        (lambda: estimate(normal(3, 4), "strata", normal(5)), "positions"),
        (lambda: estimate(normal(3, 4) / 0, "iid"), "finite"),
        (lambda: estimate(normal(3, 4), "iid").intervals(1.0), "level"),
        (lambda: ranking(estimate(normal(3, 4), "iid"), 0, stream(0)), "top_k"),
        (lambda: StopRule(0), "one look"),
        (lambda: budgets(16, 8), "first <= last"),
    ],
)
def test_what_has_no_error_is_one_sentence(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]


# Ranks.


def given(scores: list[float], errors: Tensor, degrees: int = 10_000) -> Estimate:
    return Estimate(torch.tensor(scores, dtype=torch.float64), errors.double(), degrees)


def test_p_top_of_two_examples_is_the_normal_law_of_their_difference() -> None:
    """P = Phi(0.1 / sqrt(0.06^2 + 0.08^2)) = Phi(1) = 0.841; 20 000 resamples, s.e. 0.26 %."""
    found = ranking(given([0.1, 0.0], torch.diag(torch.tensor([0.06, 0.08])), 200), 1, stream(0), count=20_000)
    assert found.p_top == pytest.approx(0.8413, abs=4 * 0.0026)
    assert found.p_error == pytest.approx(0.0026, rel=0.05)


def test_errors_that_examples_share_do_not_blur_their_order() -> None:
    """The mutant: independent errors. Shared noise ten times the gap, and still the order is sure."""
    shared = given([0.1, 0.0], torch.tensor([[1.0, 0.01], [1.0, -0.01]]), 200)
    assert ranking(shared, 1, stream(0)).p_top > 0.999
    assert order_probability(shared, 0, 1, stream(1)) > 0.999
    alone = given([0.1, 0.0], torch.eye(2), 200)
    assert ranking(alone, 1, stream(0)).p_top < 0.6


def test_few_draws_have_the_tails_of_students_law() -> None:
    """P(T_3 < 2.353) = 0.95, where the normal law would say 0.991; s.e. 0.15 %."""
    found = given([2.353, 0.0], torch.tensor([[1.0], [0.0]]), 3)
    assert order_probability(found, 0, 1, stream(0), 20_000) == pytest.approx(0.95, abs=4 * 0.0015)
    low, high = given([0.0], torch.ones(1, 1), 3).intervals()
    assert float(high) == pytest.approx(3.182, rel=0.01) == -float(low)


def test_the_same_clip_twice_ties_and_does_not_unsettle_the_top() -> None:
    c = terms(uniforms("iid", 16, 0), 0)
    both = estimate(torch.cat([c[7:], c[7:], c[:3] - 9]), "iid")
    found = ranking(both, 1, stream(0))
    assert found.p_top == 1
    assert found.top.tolist() == [0]
    assert order_probability(both, 0, 1, stream(0)) == 0.5


def test_ranks_and_their_intervals_come_in_order() -> None:
    u = uniforms("strata", 16, 3)
    found = ranking(estimate(terms(u, 3), "strata", u), 3, stream(0))
    assert found.rank[found.order].tolist() == list(range(1, 9))
    assert bool((found.rank_low <= found.rank).all())
    assert bool((found.rank <= found.rank_high).all())
    assert found.top.tolist() == found.order[:3].tolist()


def test_blocks_of_resamples_need_not_hold_all_examples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given([0.1, 0.0, -0.1], torch.eye(3) * 0.1, 50)
    whole = ranking(found, 1, stream(0), count=4000)
    monkeypatch.setattr("carv.tasks.attribution.stability._BLOCK", 300)
    parts = ranking(found, 1, stream(0), count=4000)
    assert parts.p_top == pytest.approx(whole.p_top, abs=5 * math.sqrt(2) * whole.p_error)
    assert parts.rank_high.tolist() == whole.rank_high.tolist()


def test_95_percent_intervals_of_ranks_hold_the_true_ranks() -> None:
    """150 banks x 8 ranks; they cover more than they say where gaps are small: only too few would be wrong."""
    held = 0.0
    for seed in range(150):
        u = uniforms("strata", 16, seed)
        found = ranking(estimate(terms(u, seed), "strata", u), 3, stream(seed), count=400)
        true = torch.arange(8, 0, -1)
        held += float(((found.rank_low <= true) & (true <= found.rank_high)).double().mean()) / 150
    assert held > 0.95 - 0.01


def test_p_top_is_right_as_often_as_it_says() -> None:
    """300 problems with the gap drawn from a wide flat law: where P says 0.8 on average, 0.8 of the tops are right.

    s.e. of the hits: sqrt(0.8 0.2 / 300) = 2.3 %; errors taken 40 % too small would be off by 7 %.
    """
    said, hit = 0.0, 0.0
    gap = torch.rand(300, generator=stream(9).generator(), dtype=torch.float64) * 0.6 - 0.3
    for seed in range(300):
        u = uniforms("strata", 8, seed)
        truth = torch.tensor([0.0, float(gap[seed])], dtype=torch.float64)
        found = ranking(estimate(terms(u, seed, truth), "strata", u), 1, stream(seed), count=1000)
        said += found.p_top / 300
        hit += (int(found.top[0]) == int(truth.argmax())) / 300
    assert abs(said - hit) < 3 * 0.025
    assert 0.7 < said < 0.95


# The stop rule.


def test_budgets_double_and_end_at_the_last() -> None:
    assert budgets(16, 128) == (16, 32, 64, 128)
    assert budgets(16, 100) == (16, 32, 64, 100)
    assert budgets(8, 8) == (8,)


def stopped_wrong(seed: int, rule: StopRule, gap: float) -> tuple[bool, bool]:
    """Whether the rule stopped at some budget, and whether with the wrong example on top."""
    truth = torch.tensor([gap, 0.0], dtype=torch.float64)
    u = uniforms("strata", 64, seed)
    c = terms(u, seed, truth)
    for draws in budgets(8, 64):
        found = ranking(estimate(c[:, :draws], "strata", u[:draws]), 1, stream(seed), count=800)
        if rule.stable(found):
            return True, int(found.top[0]) != 0
    return False, False


def test_the_stop_rule_errs_at_most_as_often_as_it_says_however_often_it_looks() -> None:
    """The worst case: two examples all but tied, four looks, 200 banks. alpha = 5 %: s.e. 1.5 %.

    At a tie each look of a rule without a guard is wrong with 5 %, and four of them with about 11 %.
    """
    wrong = sum(stopped_wrong(seed, StopRule(4), 1e-9)[1] for seed in range(200)) / 200
    assert wrong < 0.05 + 2 * 0.015


def test_the_stop_rule_stops_where_the_top_is_clear() -> None:
    stops = [stopped_wrong(seed, StopRule(4), 0.6) for seed in range(30)]
    assert all(stopped for stopped, _ in stops)
    assert sum(wrong for _, wrong in stops) <= 1


def test_alpha_is_spent_over_the_looks_and_monte_carlo_error_counts_against_stopping() -> None:
    assert StopRule(5).threshold == pytest.approx(0.99)
    assert StopRule(1).threshold == pytest.approx(0.95)
    found = ranking(given([1.8, 0.0], torch.eye(2), 100), 1, stream(0), count=400)
    assert not StopRule(1).stable(dataclasses.replace(found, p_top=0.955, p_error=0.004))
    assert StopRule(1).stable(dataclasses.replace(found, p_top=0.959, p_error=0.004))
