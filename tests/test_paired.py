import math

import pytest
import torch

from carv.density import uniform_steps
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.paired import paired_ratio
from carv.variance.predict import predict
from carv.variance.tables import Tables
from carv.variance.values import NORMAL_95, Value, ratio

TOY, BASE, BLOCK = GaussianToy(dim=2, gain_std=0.4), uniform_steps(20, 980), 50
CLOSED = TOY.exact(BASE)
EXACT = Tables.exact(BASE, CLOSED.m2, CLOSED.within, CLOSED.across)
DESIGNS = ((4, iid), (8, per_render))


def squares(design, count, seed, shared=True):
    """y_i = |g_hat_i - mu|^2 of whole estimates; designs of one seed share the gains of their renders."""
    renoise, coupling = design
    gain = stream(seed, "gain", *([] if shared else [renoise])).generator()
    rng = stream(seed, "own", renoise).generator()
    a = 1 + TOY.gain_std * torch.randn((count, 1, 1), generator=gain, dtype=torch.float64)
    t = TimestepSampler(BASE).at(coupling(count, renoise, rng, torch.device("cpu"))).t
    c, b = (x[..., None] for x in TOY.coefficients(t))
    eps = torch.randn((count, renoise, 2), generator=rng, dtype=torch.float64)
    estimate = (a * (c * (a * TOY.theta.detach() - TOY.target) - b * eps)).mean(1)
    return (estimate - CLOSED.mean).square().sum(1)


def measured(y):
    return Value(float(y.mean()), float(y.std()) / math.sqrt(len(y)))


def blocks(y, size=BLOCK):
    return {"block": size, "means": y[: len(y) // size * size].view(-1, size).mean(1).tolist()}


def compare(seed, counts=(1000, 1000), shared=True):
    a, b = (squares(design, n, seed, shared) for design, n in zip(DESIGNS, counts, strict=True))
    found = paired_ratio(measured(a), measured(b), blocks(a), blocks(b))
    return found, ratio(measured(a), measured(b))


def test_sharing_renders_makes_the_ratio_tighter_and_it_covers_the_truth_as_often_as_it_says():
    """300 pairs of 20 blocks: the coverage is known to 1.3 %; limits are 95 % -4 and +4 standard errors."""
    first, second = (predict(EXACT, 1, k, None, coupling).variance.value for k, coupling in DESIGNS)
    found = [compare(seed) for seed in range(300)]
    assert all(pair.paired for pair, _ in found)
    share = sum(pair.value.error / alone.error for pair, alone in found) / len(found)
    assert share < 0.6  # measured: 0.5
    covered = sum(pair.value.interval()[0] <= first / second <= pair.value.interval()[1] for pair, _ in found)
    assert 0.9 < covered / 300 <= 1
    # Not by being too wide: the actual errors are those that are stated.
    errors = torch.tensor([pair.value.value - first / second for pair, _ in found])
    stated = torch.tensor([pair.value.error for pair, _ in found])
    assert 0.85 < errors.std() / stated.square().mean().sqrt() < 1.15


@pytest.mark.parametrize("counts", [(1000, 4000), (4000, 1000)])
def test_replicates_that_only_one_measurement_has_count_as_independent(counts):
    first, second = (predict(EXACT, 1, k, None, coupling).variance.value for k, coupling in DESIGNS)
    found = [compare(seed, counts)[0] for seed in range(150)]
    errors = torch.tensor([pair.value.value - first / second for pair in found])
    stated = torch.tensor([pair.value.error for pair in found])
    assert max(pair.correlation for pair in found) < 0.5  # sqrt(1000 / 4000)
    # 150 repetitions: the spread is known to 6 %. Without the factor sqrt(m / M) it would be 1.4 times what is stated.
    assert 0.8 < errors.std() / stated.square().mean().sqrt() < 1.2


def test_measurements_that_share_nothing_are_compared_as_independent_ones():
    found = [compare(seed, shared=False) for seed in range(100)]
    share = torch.tensor([pair.value.error / alone.error for pair, alone in found])
    assert 0.95 < share.mean() < 1.08
    assert abs(sum(pair.correlation for pair, _ in found) / 100) < 0.1


def test_the_error_is_that_of_the_correlation_moved_half_a_standard_error_towards_zero():
    y = torch.tensor([1.0, 2.0, 1.5, 3.0, 2.5, 1.0, 2.0, 2.2, 1.9]).double()
    z = y + torch.tensor([0.1, -0.2, 0.3, 0.0, -0.1, 0.2, -0.3, 0.1, 0.0]).double()
    rho = float(torch.corrcoef(torch.stack([y, z]))[0, 1])
    wanted = math.tanh(math.atanh(rho) - 0.5 / math.sqrt(6))
    a, b = Value(2.0, 0.1), Value(1.0, 0.06)
    found = paired_ratio(a, b, blocks(y, 1), blocks(z, 1))
    assert found.correlation == pytest.approx(wanted)
    assert found.value == ratio(a, b, found.correlation)
    assert found.value.interval()[1] - found.value.value == pytest.approx(NORMAL_95 * found.value.error)
    negative = paired_ratio(a, b, blocks(y, 1), blocks(-z, 1))
    assert negative.correlation == pytest.approx(-rho)
    assert negative.value.error > ratio(a, b).error
    same = paired_ratio(a, b, blocks(y, 1), blocks(y, 1))
    assert 0.99 < same.correlation < 1
    assert "paired with a correlation of" in found.describe()


@pytest.mark.parametrize("common", [0, 1, 7])
def test_with_few_common_blocks_or_none_with_spread_the_ratio_is_unpaired_and_says_so(common):
    a, b = Value(2.0, 0.1), Value(1.0, 0.05)
    many = {"block": 50, "means": [float(i) for i in range(20)]}
    few = {"block": 50, "means": many["means"][:common]}
    still = {"block": 50, "means": [3.0] * 20}
    for found in (paired_ratio(a, b, few, many), paired_ratio(a, b, many, few), paired_ratio(a, b, many, still)):
        assert (found.value, found.correlation, found.paired) == (ratio(a, b), 0.0, False)
        assert found.describe() == "2.00(14)x, unpaired"


def test_blocks_that_do_not_fit_together_are_refused():
    a, b = Value(2.0, 0.1), Value(1.0, 0.05)
    with pytest.raises(ValueError, match="blocks of 50 and of 100 replicates cannot be paired"):
        paired_ratio(a, b, {"block": 50, "means": [1.0]}, {"block": 100, "means": [1.0]})
    with pytest.raises(ValueError, match="finite numbers"):
        paired_ratio(a, b, {"block": 50, "means": [math.nan]}, {"block": 50, "means": [1.0]})
    with pytest.raises(ValueError, match="denominator that is not 0"):
        paired_ratio(a, Value(0.0, 0.1), {"block": 50, "means": []}, {"block": 50, "means": []})
