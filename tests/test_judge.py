"""The judge of small pictures: its folder, the Frechet distance of its features, and how varied pictures are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carv.judge import (
    Judge,
    JudgeNetwork,
    Moments,
    frechet_distance,
    frechet_error,
    nearest_distance,
    pairwise_distance,
)
from carv.judge.model import JudgeConfig
from carv.rng import stream

SHAPE = JudgeConfig(size=16, classes=10, width=8, features=12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "judge").generator(), dtype=torch.float64)


def correlated(count: int, width: int, seed: int) -> Tensor:
    return normal(count, width, seed=seed) @ normal(width, width, seed=seed + 100) + normal(width, seed=seed + 200)


# Moments.


def test_moments_are_numpys_mean_and_unbiased_covariance() -> None:
    features = correlated(40, 5, 0)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean, features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12)
    assert moments.count == 40


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(0, 50))
def test_moments_of_batches_add_up_to_those_of_the_whole(lengths: list[int], seed: int) -> None:
    features = correlated(sum(lengths), 3, seed) + 100  # far from 0, where sums of squares would cancel
    first, *rest = (Moments.of(batch) for batch in features.split(lengths))
    total = first
    for batch in rest:
        total = total + batch
    whole = Moments.of(features)
    assert total.count == whole.count
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(total.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


def test_moments_of_float32_features_are_summed_in_float64() -> None:
    features = 1e4 + normal(1000, 2).float()  # float32 squares would lose the variance
    moments = Moments.of(features)
    assert moments.covariance.diagonal().sub(1).abs().max() < 0.2
    torch.testing.assert_close(moments.covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("features", [torch.zeros(1, 3), torch.zeros(5), torch.full((4, 2), math.nan)])
def test_moments_refuse_what_has_none(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 2 feature vectors|not finite"):
        Moments.of(features)


# The Frechet distance.


def by_square_root(a: Moments, b: Moments) -> float:
    """The textbook formula, with scipy's complex square root of the product."""
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    traces = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    return float((a.mean - b.mean).square().sum()) + float(traces)


@pytest.mark.parametrize("width", [1, 4, 32])
def test_the_distance_is_the_one_by_the_matrix_square_root(width: int) -> None:
    a, b = Moments.of(correlated(100, width, 1)), Moments.of(correlated(80, width, 2))
    assert frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_the_distance_is_torchmetrics_on_the_same_features() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(nn.Module):
        num_features = 12

        def forward(self, pictures: Tensor) -> Tensor:
            return pictures.flatten(1)

    a, b = (correlated(60, 12, seed).float().reshape(60, 3, 2, 2) for seed in (3, 4))
    metric = fid.FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.used_custom_model = True
    metric.update(a, real=True)
    metric.update(b, real=False)
    ours = frechet_distance(Moments.of(a.flatten(1)), Moments.of(b.flatten(1)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-4)


def test_the_distance_is_symmetric_and_zero_for_equal_sets_even_where_covariances_are_singular() -> None:
    few, others = correlated(5, 20, 5), correlated(7, 20, 6)  # ranks 4 and 6 of 20
    a, b = Moments.of(few), Moments.of(others)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.covariance.trace()))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    moved = Moments.of(few + 3)
    assert frechet_distance(a, moved) == pytest.approx(20 * 9, rel=1e-6)


def test_the_distance_of_few_vectors_is_biased_upwards_as_its_docstring_says() -> None:
    def mean(count: int) -> float:
        pairs = [(Moments.of(normal(count, 8, seed=s)), Moments.of(normal(count, 8, seed=-s - 1))) for s in range(40)]
        return sum(frechet_distance(a, b) for a, b in pairs) / len(pairs)

    assert mean(20) > 3 * mean(100) > 0.1  # both sets have the same law: the true distance is 0


def test_the_distance_refuses_features_of_two_judges() -> None:
    with pytest.raises(ValueError, match="3 and 4 features: use the same judge"):
        frechet_distance(Moments.of(normal(5, 3)), Moments.of(normal(5, 4)))


def test_the_jackknife_error_is_the_spread_of_repetitions() -> None:
    # 120 repetitions know their spread within 6.5% (1/sqrt(2*119)); the mean jackknife error of 20 groups within 2%.
    # Between 0.75 and 1.35 a right error fails less than once in 10,000 runs; one of a alone, or without G - 1, always.
    values, errors = [], []
    for s in range(120):
        a, b = normal(200, 3, seed=s), 1.5 * normal(200, 3, seed=-s - 1) + 0.5
        values.append(frechet_distance(Moments.of(a), Moments.of(b)))
        errors.append(frechet_error(a, b, groups=20))
    spread = float(torch.tensor(values).std())
    assert 0.75 < sum(errors) / len(errors) / spread < 1.35


def test_the_jackknife_error_does_not_grow_when_vectors_come_class_by_class() -> None:
    means = 10 * normal(10, 3, seed=1)
    a, b = (means.repeat(20, 1) + normal(200, 3, seed=seed) for seed in (2, 3))  # a stride of 10 is one class
    order = torch.randperm(200, generator=stream(0, "order").generator())
    assert frechet_error(a, b, groups=10) < 2 * frechet_error(a[order], b[order], groups=10)


@pytest.mark.parametrize(("count", "groups"), [(29, 10), (30, 1)])
def test_the_jackknife_refuses_too_few_vectors(count: int, groups: int) -> None:
    with pytest.raises(ValueError, match="2 groups and 3 vectors in each"):
        frechet_error(normal(100, 2), normal(count, 2), groups)


# Distances of pictures.


def test_the_mean_pairwise_distance_counts_each_pair_once() -> None:
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert pairwise_distance(triangle) == pytest.approx((3 + 4 + 5) / 3)
    with pytest.raises(ValueError, match="at least 2"):
        pairwise_distance(triangle[:1])


def test_the_nearest_distance_is_the_least_of_all_and_zero_for_copies() -> None:
    known, queries = normal(300, 4), normal(600, 4, seed=1)
    queries[17] = known[5]
    nearest = nearest_distance(queries, known)
    expected = (queries[:, None] - known[None]).square().sum(dim=2).sqrt().amin(dim=1)
    torch.testing.assert_close(nearest, expected, atol=1e-6, rtol=1e-6)
    assert nearest[17] < 1e-6
    with pytest.raises(ValueError, match="no vectors"):
        nearest_distance(queries, known[:0])


# The judge's folder.


@pytest.fixture
def judge() -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Judge(JudgeNetwork(SHAPE), SHAPE)


@pytest.fixture
def folder(judge: Judge, tmp_path: Path) -> Path:
    judge.save(tmp_path / "judge")
    return tmp_path / "judge"


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=stream(0, "pictures").generator())


def test_a_saved_judge_reads_back_frozen_and_says_the_same(judge: Judge, folder: Path) -> None:
    state = torch.get_rng_state()
    read = Judge.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn on the way
    assert (read.classes, read.size) == (10, 16)
    assert not read.network.training
    assert not any(parameter.requires_grad for parameter in read.network.parameters())
    assert read.features(pictures()).shape == (4, 12)
    assert read.features(pictures()).dtype == torch.float32
    torch.testing.assert_close(read.probabilities(pictures()), judge.probabilities(pictures()), atol=1e-3, rtol=1e-2)


def test_probabilities_sum_to_one_and_do_not_depend_on_the_other_pictures(judge: Judge) -> None:
    together = judge.probabilities(pictures())
    torch.testing.assert_close(together.sum(dim=1), torch.ones(4))
    alone = torch.cat([judge.probabilities(picture[None]) for picture in pictures()])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_features_are_what_the_last_layer_sees_and_have_gradients(judge: Judge) -> None:
    shown = pictures().requires_grad_()
    features = judge.features(shown)
    torch.testing.assert_close(judge.network.head(features).softmax(dim=1), judge.probabilities(shown))
    [gradient] = torch.autograd.grad(features.sum(), [shown])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "shown", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]
)
def test_the_judge_refuses_pictures_it_was_not_made_for(judge: Judge, shown: Tensor) -> None:
    with pytest.raises(ValueError, match=r"pictures \[N, 3, 16, 16\] of floats in \[0, 1\], got"):
        judge.probabilities(shown)


def damaged(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "config.json").unlink(), "holds no judge: it has no config.json"),
        (lambda at: (at / "model.safetensors").unlink(), "holds no judge: it has no model.safetensors"),
        (lambda at: (at / "config.json").write_text("{"), "is not valid JSON"),
        (lambda at: (at / "config.json").write_text("[]"), "does not describe a judge"),
        (lambda at: damaged(at, kind="clip"), "its kind is not 'carv-judge'"),
        (lambda at: damaged(at, depth=3), "does not describe a judge"),
        (lambda at: damaged(at, size="16"), "size is a whole number"),
        (lambda at: damaged(at, width=10**9), "between 1 and 4096"),
        (lambda at: damaged(at, size=18), "multiple of 4"),
        (lambda at: damaged(at, features=13), "not those of its config.json"),
        (lambda at: (at / "model.safetensors").write_bytes(b"\0" * 99), "is damaged"),
    ],
)
def test_a_damaged_judge_is_refused_in_one_sentence(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Judge.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused(judge: Judge, tmp_path: Path) -> None:
    judge.network.head.bias[0] = math.inf
    judge.save(tmp_path)
    with pytest.raises(ValueError, match="not all finite"):
        Judge.from_pretrained(tmp_path)
