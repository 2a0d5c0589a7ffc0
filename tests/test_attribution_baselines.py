"""TracIn, TRAK and the linear datamodelling score, against their formulas and against other people's code."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from carv.rng import stream
from carv.tasks.attribution.baselines import mean_gradients, tracin, trak
from carv.tasks.attribution.lds import lds, subset_scores
from carv.tasks.attribution.ranks import average_ranks, spearman


def normal(seed, *shape):
    return torch.randn(*shape, generator=stream(seed, "test").generator(), dtype=torch.float64)


def halves(seed, count, examples):
    rng = stream(seed, "subsets").generator()
    mask = torch.zeros(count, examples, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(examples, generator=rng)[: examples // 2]] = True
    return mask


def test_ranks_with_ties_are_scipy_s():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, math.inf, -math.inf]])
    assert average_ranks(values).tolist() == [stats.rankdata(row).tolist() for row in values]


def test_rank_correlations_with_ties_are_scipy_s_also_of_columns():
    a, b = normal(0, 7, 30).round(), normal(1, 7, 30).round()
    found = spearman(a, b)
    assert found.tolist() == pytest.approx([stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert spearman(a.T.contiguous().T, b).tolist() == found.tolist()


def test_a_row_of_equal_values_correlates_with_nothing():
    assert spearman(torch.ones(4), torch.arange(4.0)).item() == 0


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [(torch.tensor([1.0, math.nan]), torch.ones(2), "NaN"), (torch.ones(1), torch.ones(1), "N >= 2")],
)
def test_what_has_no_ranks_is_refused(a, b, match):
    with pytest.raises(ValueError, match=match):
        spearman(a, b)


def test_the_linear_datamodelling_score_is_dattri_s():
    metric = pytest.importorskip("dattri.metric")
    scores, subsets, outcomes = normal(0, 5, 20), halves(0, 12, 20), normal(1, 12, 5)
    indices = torch.stack([row.nonzero()[:, 0] for row in subsets])
    theirs, _ = metric.lds(scores.T, (outcomes, indices))
    ours = lds(scores, subsets, outcomes, stream=stream(0), resamples=2)
    assert ours.each.tolist() == pytest.approx(theirs.tolist(), abs=1e-12)
    assert ours.value == pytest.approx(theirs.mean().item(), abs=1e-12)


def test_scores_that_are_right_up_to_a_query_s_scale_and_constant_have_an_lds_of_1():
    scores, subsets = normal(0, 4, 16), halves(0, 10, 16)
    outcomes = subset_scores(scores, subsets).T
    right = lds(torch.tensor([[2.0], [0.1], [1.0], [7.0]]) * scores + 3, subsets, outcomes, stream=stream(0))
    wrong = lds(-scores, subsets, outcomes, stream=stream(0))
    assert right.each.tolist() == pytest.approx([1] * 4)
    assert (wrong.value, wrong.low) == pytest.approx((-1, -1))


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_the_interval_of_an_lds_covers_the_correlation_in_the_population(alike):
    """Gaussian outcomes with correlation 0.6, whose Spearman correlation is 6/pi asin(0.3) = 0.582.

    Queries are independent, or all alike, so that subsets are all that varies. 100 data sets of 30 subsets and 12
    queries; at 95 % coverage fewer than 88 of 100 has a chance of 1 in 500, and an interval of half the width, which
    covers 68 %, would pass with one in 10^5.
    """
    truth, covered = 6 / math.pi * math.asin(0.3), 0
    for i in range(100):
        subsets = halves(i, 30, 24)
        scores, noise = (normal(k + i, 12, n) for k, n in ((0, 24), (1000, 30)))
        scores, noise = (alike * x[:1] + (1 - alike) * x for x in (scores, noise))
        predicted = subset_scores(scores, subsets)
        # Halves without replacement: the exact deviation of a sum of 12 of 24 scores.
        spread = (scores.var(1, keepdim=True) * 12 * 12 / 24).sqrt()
        signal = (predicted - 12 * scores.mean(1, keepdim=True)) / spread
        outcomes = 0.6 * signal + 0.8 * noise
        found = lds(scores, subsets, outcomes.T, stream=stream(i), resamples=100)
        covered += found.low <= truth <= found.high
    assert covered >= 88


def test_a_difference_of_two_scores_on_the_same_subsets_is_sharper_than_either():
    scores, subsets = normal(0, 12, 24), halves(0, 30, 24)
    outcomes = subset_scores(scores, subsets).T + 2 * normal(1, 30, 12)
    a, b = (
        lds(s, subsets, outcomes, stream=stream(0), resamples=200) for s in (scores, scores + 0.1 * normal(2, 12, 24))
    )
    assert (a.resampled - b.resampled).std() < 0.5 * a.error
    assert a.error == pytest.approx((a.high - a.low) / (2 * 1.96), rel=0.25)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"outcomes": torch.zeros(4, 10)}, r"\[subsets, queries\] = \[10, 4\]"),
        ({"outcomes": torch.full((10, 4), math.nan)}, "diverge"),
        ({"subsets": torch.ones(10, 15, dtype=torch.bool)}, "a mask"),
        ({"subsets": torch.ones(10, 16)}, "a mask"),
        ({"scores": torch.full((4, 16), math.inf)}, "not finite"),
        ({"subsets": torch.ones(2, 16, dtype=torch.bool), "outcomes": torch.zeros(2, 4)}, "at least 3 subsets"),
    ],
)
def test_an_lds_of_what_does_not_fit_is_refused(change, match):
    given = {"scores": normal(0, 4, 16), "subsets": halves(0, 10, 16), "outcomes": normal(1, 10, 4)} | change
    with pytest.raises(ValueError, match=match):
        lds(**given, stream=stream(0))


def test_mean_gradients_weigh_each_draw_by_p_over_q():
    gradients, weight = normal(0, 3, 5, 4).float(), normal(1, 5).abs()
    by_hand = [sum(w * g for w, g in zip(weight, rows.double(), strict=True)) / 5 for rows in gradients]
    assert torch.allclose(mean_gradients(gradients, weight), torch.stack(by_hand))
    with pytest.raises(ValueError, match="weights"):
        mean_gradients(gradients, weight[:4])


def test_tracin_predicts_what_a_small_step_does_to_the_query_s_loss():
    """For quadratic losses |A w - b|^2 / 2: a step on n lowers q's loss by rate <g_q, g_n>, up to O(rate^2)."""
    a, b, w, rate = normal(0, 6, 3, 4), normal(1, 6, 3), normal(2, 4), 1e-6

    def loss(i, at):
        return (a[i] @ at - b[i]).square().sum() / 2

    g = torch.stack([a[i].T @ (a[i] @ w - b[i]) for i in range(6)])
    found = tracin([g[4:]], [g[:4]], [rate])
    lowered = [[float(loss(q, w) - loss(q, w - rate * g[n])) for n in range(4)] for q in (4, 5)]
    assert found.tolist() == [pytest.approx(row, rel=1e-3) for row in lowered]


def test_tracin_adds_its_checkpoints_by_their_rates():
    q, n = [normal(i, 2, 4) for i in range(3)], [normal(9 + i, 5, 4) for i in range(3)]
    by_hand = sum(rate * a @ b.T for rate, a, b in zip((1.0, 0.5, 0.1), q, n, strict=True))
    assert torch.allclose(tracin(q, n, (1.0, 0.5, 0.1)), by_hand)


@pytest.mark.parametrize(
    ("rates", "train", "match"),
    [
        ((), [], "each checkpoint"),
        ((0.0,), [torch.ones(3, 4)], "positive"),
        ((1.0,), [torch.ones(3, 5)], "same number"),
    ],
)
def test_tracin_of_what_does_not_fit_is_refused(rates, train, match):
    with pytest.raises(ValueError, match=match):
        tracin([torch.ones(2, 4)] * len(rates), train, rates)


def test_trak_s_scores_are_traker_s_on_the_same_features_up_to_its_scale():
    computers = pytest.importorskip("trak.score_computers")
    query, train = normal(0, 3, 8).float(), normal(1, 40, 8).float()
    theirs = computers.BasicScoreComputer(dtype=torch.float32, device=torch.device("cpu"))
    features = theirs.get_x_xtx_inv(train, theirs.get_xtx(train))  # divided by the mean of the inverse's entries
    scores = torch.zeros(40, 3)
    theirs.get_scores(features, query, scores)
    scale = torch.linalg.inv(train.double().T @ train.double()).abs().mean()
    assert torch.allclose(trak(query, train).float(), scores.T * scale, rtol=1e-3, atol=1e-6)


def test_trak_of_the_examples_themselves_is_a_projection():
    """Phi (Phi^T Phi)^-1 Phi^T: symmetric, idempotent, of trace k."""
    train = normal(0, 30, 6)
    hat = trak(train, train)
    assert torch.allclose(hat @ hat, hat)
    assert hat.trace().item() == pytest.approx(6)


def test_trak_with_a_large_ridge_ranks_as_tracin_does():
    query, train = normal(0, 3, 8), normal(1, 5, 8)
    assert spearman(trak(query, train, ridge=1e6), tracin([query], [train], [1.0])).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize(
    ("train", "ridge", "match"),
    [
        (torch.ones(4, 8), 0.0, "give a ridge"),
        (torch.zeros(9, 8), 1.0, "not zero"),
        (torch.ones(9, 8), -1.0, "at least 0"),
        (torch.ones(9, 7), 0.0, "no products"),
    ],
)
def test_trak_refuses_what_it_cannot_invert(train, ridge, match):
    with pytest.raises(ValueError, match=match):
        trak(torch.ones(2, 8), train, ridge)


def test_singular_products_are_refused_rather_than_inverted():
    with pytest.raises(ValueError, match="give a ridge"):
        trak(torch.ones(2, 3), torch.ones(9, 3))


def test_weights_of_one_leave_the_mean():
    gradients = normal(0, 2, 6, 3)
    assert torch.allclose(mean_gradients(gradients, torch.ones(6)), gradients.mean(1))
    assert np.isfinite(mean_gradients(gradients, torch.ones(6)).numpy()).all()
