import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carv.adaptive import AdaptiveProposal
from carv.density import DiscreteDensity, LogitNormal, Reweighted, ShiftedUniform, uniform_steps
from carv.proposals import defensive, oracle, proportional

from laws import LAWS, PEAKED, PRACTICE, RANGE, STEPS, ramp

BELOW_ONE = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
masses = st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=1, max_size=60).filter(lambda m: max(m) > 1e-3)


def laws():
    for base, proposal in LAWS.values():
        yield base
        if isinstance(proposal, AdaptiveProposal):
            yield proposal.law
        elif proposal is not None:
            yield proposal


@given(masses, st.integers(0, 900))
def test_inverse_cdf_gives_each_atom_exactly_its_mass(mass, first):
    """Exact: the preimage of atom t under icdf is [cdf(t - 1), cdf(t)), so its length is pmf(t)."""
    law = DiscreteDensity(first, torch.tensor(mass, dtype=torch.float64))
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), law.cumulative])
    assert ends[-1] == 1
    for i in range(len(mass)):
        left, right = ends[i], ends[i + 1]
        if left < right:
            assert law.icdf(left) == first + i
            assert law.icdf(torch.nextafter(right, left)) == first + i
        else:
            assert mass[i] <= 1e-12 * sum(mass)


@given(masses)
def test_no_uniform_below_one_selects_an_atom_of_mass_zero(mass):
    law = DiscreteDensity(0, torch.tensor(mass, dtype=torch.float64))
    u = torch.cat([law.cumulative[law.cumulative < 1], torch.tensor([0.0]).double(), BELOW_ONE[None]])
    assert bool((law.prob(law.icdf(u)) > 0).all())


def test_both_end_points_have_their_full_mass():
    """Rounding a continuous draw would halve them. 961 timesteps, each with u-length 1/961 up to rounding."""
    p = uniform_steps(20, 980)
    u = (torch.arange(961 * 1000, dtype=torch.float64) + 0.5) / (961 * 1000)
    counts = torch.bincount(p.icdf(u))
    assert counts[20] == counts[980] == 1000
    assert counts.sum() == 961 * 1000


@pytest.mark.parametrize("law", laws())
def test_cdf_and_inverse_agree(law):
    u = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], BELOW_ONE[None]])
    t = law.icdf(u)
    assert bool((t[1:] >= t[:-1]).all())
    assert bool(((t >= law.low) & (t <= law.high)).all())
    if law.discrete:
        assert bool((law.cdf(t) > u).all())
        assert bool((law.cdf(t - 1) <= u).all())
    else:
        torch.testing.assert_close(law.cdf(t), u, rtol=0, atol=1e-9)


@pytest.mark.parametrize("law", laws())
def test_density_is_the_derivative_of_the_cdf(law):
    if law.discrete:
        t = torch.arange(int(law.low), int(law.high) + 1)
        torch.testing.assert_close(law.prob(t), law.cdf(t) - law.cdf(t - 1), rtol=0, atol=1e-14)
        assert law.prob(t).sum().item() == pytest.approx(1)
        assert law.prob(torch.tensor([int(law.low) - 1, int(law.high) + 1])).tolist() == [0, 0]
        return
    t = torch.linspace(law.low, law.high, 200_001, dtype=torch.float64)
    middle = (t[1:] + t[:-1]) / 2
    integral = (law.prob(middle) * (t[1] - t[0])).cumsum(0)
    torch.testing.assert_close(integral, law.cdf(t[1:]), rtol=0, atol=5e-4)
    assert law.prob(torch.tensor([-0.1, 1.1], dtype=torch.float64)).tolist() == [0, 0]


@pytest.mark.parametrize("law", laws())
def test_what_is_divided_by_is_what_was_drawn(law):
    u = torch.rand(5_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, q = law.draw(u)
    assert bool((q > 0).all())
    assert torch.equal(t, law.icdf(u))
    off = (q - law.prob(t)).abs() > 1e-9 * q
    assert off.double().mean() < 1e-3, "only draws at a cell's very edge may look up a neighbouring cell"


def test_shift_moves_the_law_as_flow_matching_does():
    """t' = s t / (1 + (s - 1) t), for both closed forms."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for plain, shifted in (
        (ShiftedUniform(), ShiftedUniform(shift=3.0)),
        (LogitNormal(0.3, 0.8), LogitNormal(0.3, 0.8, shift=3.0)),
    ):
        t = plain.icdf(u)
        torch.testing.assert_close(shifted.icdf(u), 3 * t / (1 + 2 * t))


def test_proportional_is_p_times_w_normalised():
    q = proportional(STEPS, ramp)
    torch.testing.assert_close(q.prob(STEPS.support), ramp(STEPS.support) / ramp(STEPS.support).sum())
    q = proportional(RANGE, lambda t: t)
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    torch.testing.assert_close(q.prob(t), t / (0.5 * (0.98**2 - 0.02**2)), rtol=0, atol=2e-3)


def test_oracle_interpolates_the_root_of_the_second_moment():
    q = oracle(uniform_steps(0, 4), torch.tensor([1, 3]), torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(q.pmf, torch.tensor([1.0, 1, 2, 3, 3], dtype=torch.float64) / 10)
    single = oracle(uniform_steps(0, 4), torch.tensor([1]), torch.tensor([5.0]))
    torch.testing.assert_close(single.pmf, torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    ("base", "q"),
    [
        (STEPS, DiscreteDensity(10, torch.tensor([1.0]))),
        (RANGE, LogitNormal(0, 0.2)),
        (RANGE, Reweighted(RANGE, torch.tensor([0, 0.5, 1.0]), torch.tensor([0.0, 1.0]))),
        (PRACTICE, proportional(PRACTICE, ramp, cells=7)),
    ],
)
def test_defensive_weights_are_bounded_by_one_over_alpha(base, q, alpha):
    mixed = defensive(base, q, alpha)
    t, density = mixed.draw(torch.rand(4_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert (base.prob(t) / density).max() <= 1 / alpha * (1 + 1e-9)


def test_defensive_mixes_the_two_laws():
    mixed = defensive(RANGE, LogitNormal(0.0, 0.7, low=0.02, high=0.98), 0.25, cells=500)
    t = torch.linspace(0.05, 0.95, 31, dtype=torch.float64)
    expected = 0.25 * RANGE.cdf(t) + 0.75 * LogitNormal(0.0, 0.7, low=0.02, high=0.98).cdf(t)
    torch.testing.assert_close(mixed.cdf(t), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("law", [law for law in laws() if law.low < law.high])
def test_restriction_conditions_on_the_range(law):
    low, high = (law.low + 1, law.high - 1) if law.discrete else (0.3, 0.7)
    cut = law.restrict(low, high)
    t = law.icdf(torch.linspace(0, 0.999, 301, dtype=torch.float64))
    t = t[(t >= low) & (t <= high)]
    inside = law.cdf(torch.tensor([high])) - law.cdf(torch.tensor([low - 1 if law.discrete else low]))
    torch.testing.assert_close(cut.prob(t), law.prob(t) / inside, rtol=1e-6, atol=1e-12)
    assert cut.prob(torch.tensor([law.low, law.high])).sum() == 0


@pytest.mark.parametrize("law", [STEPS, RANGE, PRACTICE, proportional(RANGE, ramp)])
def test_a_range_of_one_point_is_that_point(law):
    at = 7 if law.discrete else 0.5
    point = law.restrict(at, at)
    t, q = point.draw(torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64))
    assert t.tolist() == [at] * 3
    assert q.tolist() == [1] * 3


def test_tables_keep_their_values_on_a_device():
    for law in laws():
        moved = law.to("cpu")
        u = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        assert torch.equal(law.icdf(u), moved.icdf(u))


BAD = [
    (lambda: uniform_steps(30, 20), r"low <= high, got \[30, 20\]"),
    (lambda: uniform_steps(-1, 20), "t_min must not be negative"),
    (lambda: DiscreteDensity(5, torch.tensor([1.0, float("nan")])), "nan at t = 6"),
    (lambda: DiscreteDensity(5, torch.tensor([1.0, -1.0])), "-1 at t = 6"),
    (lambda: DiscreteDensity(5, torch.tensor([float("inf")])), "inf at t = 5"),
    (lambda: DiscreteDensity(5, torch.zeros(3)), "zero at every t"),
    (lambda: DiscreteDensity(5, torch.zeros(0)), "n >= 1"),
    (lambda: ShiftedUniform(0.5, 0.2), "low <= high"),
    (lambda: ShiftedUniform(0, 1.5), r"lies in \[0, 1\]"),
    (lambda: ShiftedUniform(float("nan"), 1), "low <= high"),
    (lambda: ShiftedUniform(shift=0.0), "shift must be a positive number"),
    (lambda: LogitNormal(scale=-1.0), "scale must be a positive number"),
    (lambda: LogitNormal(loc=float("inf")), "loc must be finite"),
    (lambda: Reweighted(RANGE, torch.tensor([0, 0.5, 0.5, 1]), torch.ones(3)), "increase from 0 to 1"),
    (lambda: Reweighted(RANGE, torch.tensor([0, 0.5, 1]), torch.ones(3)), "3 edges need 2 masses"),
    (lambda: Reweighted(RANGE, torch.tensor([0, 0.5, 1]), torch.tensor([1.0, -1.0])), "-1 at t = 0.74"),
    (lambda: Reweighted(STEPS, torch.tensor([0, 1.0]), torch.ones(1)), "continuous base"),
    (lambda: proportional(STEPS, lambda t: t - 10.0), "-0.35 at t = 3"),
    (lambda: proportional(STEPS, lambda t: t * float("nan")), "nan at t = 3"),
    (lambda: oracle(STEPS, torch.tensor([2, 1]), torch.ones(2)), "must increase"),
    (lambda: oracle(STEPS, torch.tensor([1, 2]), torch.tensor([1.0, -1.0])), "not negative, got -1"),
    (lambda: oracle(STEPS, torch.tensor([1, 2]), torch.tensor([1.0, float("nan")])), "got nan"),
    (lambda: defensive(STEPS, STEPS, 0.0), r"in \(0, 1\], got 0"),
    (lambda: defensive(STEPS, RANGE), "both discrete or both continuous"),
    (lambda: STEPS.restrict(30, 40), "no mass"),
    (lambda: PEAKED.restrict(3, 3), "no mass"),
    (lambda: STEPS.restrict(9, 8), "low <= high"),
    (lambda: RANGE.restrict(0.99, 1.0), "no mass"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
