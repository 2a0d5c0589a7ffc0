"""Random projections of gradients: unbiased, within the stated error, the same whatever the order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carv.tasks.attribution.projector import Projector, ProjectorKind, jl_error

from comparisons import cosines, flat

KINDS: tuple[ProjectorKind, ...] = ("sparse", "rademacher", "gaussian")


def random_gradients(n: int, seed: int = 0, names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Tensor]:
    """Correlated rows, heavy-tailed over coordinates as gradients are; longer than a chunk."""
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(zip(names, ((300, 70), (45,), (3, 5, 7)), strict=True))
    common = {name: torch.randn(1, *shape, generator=rng) for name, shape in shapes.items()}
    scales = {name: torch.randn(shape, generator=rng).exp() for name, shape in shapes.items()}
    return {
        name: scales[name] * (common[name] + 1.5 * torch.randn(n, *shape, generator=rng))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_projected_inner_products_are_unbiased(kind: ProjectorKind) -> None:
    """Over 200 projections to 16 dimensions: within 4 s.e. of the exact ones; a scale of sqrt(k) would be 16 off.

    The standard deviation is what is said, sqrt((|a|^2 |b|^2 + <a, b>^2) / k), or (sparse) below it.
    """
    gradients = {name: part[..., :40] for name, part in random_gradients(3).items()}
    exact = flat(gradients) @ flat(gradients).T
    stack = [Projector(16, kind, seed)(gradients) for seed in range(200)]
    found = torch.stack([vectors @ vectors.T for vectors in stack]).double()
    error = found.mean(0) - exact
    assert bool((error.abs() < 4 * found.std(0) / 200**0.5).all())
    squares = exact.diag()
    said = ((squares[:, None] * squares + exact**2) / 16).sqrt()
    assert bool((found.std(0) < 1.25 * said).all())  # the s.d. of an s.d. of 200 is 5 % or, of heavy tails, 8 %


@pytest.mark.parametrize("kind", KINDS)
def test_projected_cosines_are_within_the_stated_error(kind: ProjectorKind) -> None:
    gradients = random_gradients(12)
    exact, found = cosines(flat(gradients)), cosines(Projector(512, kind)(gradients))
    above = torch.triu_indices(12, 12, 1)
    error = (found - exact)[above[0], above[1]]
    said = torch.tensor([jl_error(512, float(c)) for c in exact[above[0], above[1]]])
    assert 0.1 < exact[above[0], above[1]].mean() < 0.6
    # 66 errors of one projection, correlated: their r.m.s. is within 50 % of what is said, and none beyond 4.5 of it.
    assert 0.5 < (error / said).square().mean().sqrt() < 1.5
    assert (error / said).abs().max() < 4.5
    assert jl_error(512) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_the_same_for_rows_alone_and_for_any_order_of_names(kind: ProjectorKind) -> None:
    gradients = random_gradients(4)
    project = Projector(64, kind, seed=3)
    whole = project(gradients)
    alone = torch.cat([Projector(64, kind, seed=3)({n: p[i : i + 1] for n, p in gradients.items()}) for i in range(4)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(project(dict(reversed(gradients.items()))), whole, rtol=1e-5, atol=1e-3)
    assert torch.equal(project(gradients), whole)
    assert not torch.allclose(Projector(64, kind, seed=4)(gradients), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_and_each_chunk_has_its_own_signs(kind: ProjectorKind) -> None:
    """Equal streams would make equal tensors add up; a bias of the names, not of the values."""
    same = torch.ones(1, 1 << 15)
    project = Projector(64, kind)
    assert not torch.allclose(project({"a": same}), project({"b": same}))
    first, second = same.clone(), same.clone()
    first[:, 1 << 14 :], second[:, : 1 << 14] = 0, 0
    assert not torch.allclose(project({"a": first}), project({"a": second}))


def test_the_identity_keeps_inner_products_exactly_and_says_when_it_cannot() -> None:
    gradients = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 5)}
    vectors = Projector(20, "identity")(gradients)
    assert vectors.shape == (3, 20)
    assert torch.equal(vectors @ vectors.T, torch.nn.functional.pad(flat(gradients), (0, 7)) @ vectors.T)
    with pytest.raises(ValueError, match="keeps 12 numbers and there are 13"):
        Projector(12, "identity")(gradients)


def test_sparse_columns_have_one_entry_in_each_block() -> None:
    eye = torch.eye(50)
    columns = Projector(32, "sparse", nonzeros=4)({"a": eye})
    blocks = columns.view(50, 4, 8)
    assert bool(((blocks != 0).sum(2) == 1).all())
    assert bool((blocks[blocks != 0].abs() == 0.5).all())
    assert int((blocks != 0).sum(0).max()) == 7  # shared out: a row of 8 has at most 7 of 50 columns


def test_the_sparse_tables_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from carv.tasks.attribution import projector as module

    monkeypatch.setattr(module, "_KEPT_BYTES", 1)
    bounded, free = Projector(64), Projector(64)
    gradients = random_gradients(2)
    assert torch.equal(bounded(gradients), free(gradients))
    assert len(vars(bounded)["_kept"]) == 1


def test_projectors_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown projector 'fjlt'"):
        Projector(512, "fjlt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonzeros must divide the 10 dimensions"):
        Projector(10, nonzeros=4)
    with pytest.raises(ValueError, match=">= 1"):
        Projector(0)
    with pytest.raises(ValueError, match="at least one parameter"):
        Projector(8)({})
    with pytest.raises(ValueError, match=r"cosine in \[-1, 1\]"):
        jl_error(512, 1.5)
