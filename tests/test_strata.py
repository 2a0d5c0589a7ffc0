import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carv.strata import COUPLINGS, _one_in_each, global_strata, iid, nested, per_render, systematic

CPU = torch.device("cpu")
sizes = st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 3, 5, 8, 13, 64]), st.integers(0, 10**6))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def counts(u, strata):
    return torch.bincount((u.flatten() * strata).floor().long(), minlength=strata)


@pytest.mark.parametrize("coupling", COUPLINGS.values())
@given(sizes)
def test_every_uniform_is_in_zero_one_and_float64(coupling, size):
    u = coupling(size[0], size[1], rng(size[2]), CPU)
    assert u.shape == size[:2]
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())


@given(sizes)
def test_per_render_puts_one_draw_in_each_of_k_strata_of_each_render(size):
    u = per_render(size[0], size[1], rng(size[2]), CPU)
    for row in u:
        assert counts(row, size[1]).tolist() == [1] * size[1]


@pytest.mark.parametrize("coupling", [global_strata, systematic, nested])
@given(sizes)
def test_global_couplings_put_one_draw_in_each_of_rk_strata(coupling, size):
    u = coupling(size[0], size[1], rng(size[2]), CPU)
    assert counts(u, size[0] * size[1]).tolist() == [1] * (size[0] * size[1])


@given(sizes)
def test_nested_is_stratified_within_each_render_too(size):
    for row in nested(size[0], size[1], rng(size[2]), CPU):
        assert counts(row, size[1]).tolist() == [1] * size[1]


@given(sizes)
def test_systematic_is_a_shifted_lattice(size):
    u = systematic(size[0], size[1], rng(size[2]), CPU).flatten().sort().values
    torch.testing.assert_close(u.diff(), torch.full_like(u.diff(), 1 / u.numel()), rtol=0, atol=1e-12)


def test_per_render_with_one_draw_is_iid():
    assert torch.equal(per_render(5, 1, rng(3), CPU), iid(5, 1, rng(3), CPU))


@pytest.mark.parametrize("strata", [1, 2, 3, 7, 10, 1024, 99_991])
def test_the_largest_jitter_stays_inside_its_stratum(strata):
    """(B - 1 + xi) / B rounds up to 1 for xi just below 1; float32 codes reach 1.0 that way."""
    stratum = torch.arange(strata)
    xi = torch.full((strata,), 1 - 2**-53, dtype=torch.float64)
    u = _one_in_each(strata, xi)
    assert bool((u < (stratum + 1).double() / strata).all())
    assert bool((u >= stratum.double() / strata).all())


@pytest.mark.parametrize("name", [name for name in COUPLINGS if name != "per-render"])
@pytest.mark.parametrize("slot", [(0, 0), (2, 3), (1, 2)])
def test_each_slot_is_uniform_on_its_own_range(name, slot):
    """Chi-squared over 24 cells, 6,000 repetitions: a cell 15 % off is caught; false alarm 1e-5 (68.6 at 23 df).

    Slots of `nested` and `per_render` are uniform over their stratum k; all others over [0, 1).
    """
    r, k = slot
    generator = rng(11)
    u = torch.stack([COUPLINGS[name](3, 4, generator, CPU)[r, k] for _ in range(6_000)])
    if name == "nested":
        u = u * 4 - k
    observed = counts(u, 24).double()
    assert ((observed - 250) ** 2 / 250).sum() < 68.6


def test_global_strata_hand_every_stratum_to_every_render_equally_often():
    """Exchangeable renders (trap 5). 6,000 repetitions of 3 x 2: each (render, stratum) 2000 +- 4.5 sd (36.5)."""
    generator = rng(12)
    table = torch.zeros(3, 6)
    for _ in range(6_000):
        stratum = (global_strata(3, 2, generator, CPU) * 6).floor().long()
        table.scatter_add_(1, stratum, torch.ones(3, 2))
    assert (table - 2000).abs().max() < 4.5 * (6000 * (1 / 3) * (2 / 3)) ** 0.5


@pytest.mark.parametrize("coupling", COUPLINGS.values())
def test_the_same_generator_state_gives_the_same_draws(coupling):
    assert torch.equal(coupling(3, 5, rng(4), CPU), coupling(3, 5, rng(4), CPU))
    assert not torch.equal(coupling(3, 5, rng(4), CPU), coupling(3, 5, rng(5), CPU))
