"""Unbiasedness of every density x coupling x antithetic, and that the usual mistakes are caught."""

import itertools
import math

import pytest
import torch

from carv import strata, weights
from carv.adaptive import AdaptiveProposal
from carv.density import DiscreteDensity, ShiftedUniform, uniform_steps
from carv.proposals import defensive, proportional
from carv.sampler import Draws, TimestepSampler
from carv.schedule import NoiseSchedule

from laws import COUPLINGS, LAWS, PRACTICE, RANGE, STEPS, ramp

REPEATS = 2_000
THRESHOLD = 5.0
"""Each test looks at 7 means; |z| > 5 in any of them by chance: 4e-6 a case, about 1e-3 over all cases."""


def integrands(t, base):
    """What is averaged: both end points (or outer tenths), 1, t, t^2, a wave and a step; `[..., 7]`."""
    t = t.double()
    low, high = base.low, base.high
    if base.discrete:
        first, last = (t == low).double(), (t == high).double()
    else:
        first, last = (base.cdf(t) < 0.1).double(), (base.cdf(t) > 0.9).double()
    x = (t - low) / max(high - low, 1e-9)
    return torch.stack([first, last, torch.ones_like(x), x, x**2, torch.cos(7 * x), (x > 0.6).double()], -1)


def truth(base):
    if base.discrete:
        return base.pmf @ integrands(base.support, base)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    return integrands(base.icdf(u), base).mean(0)


def largest_z(sampler, renders, renoise, seed, sample=None):
    """The largest |z| of the estimate's mean against the truth, over the integrands; a replicate is one estimate."""
    rng = torch.Generator().manual_seed(seed)
    if sample is None:
        pairs = 2 if sampler.antithetic else 1
        u = [sampler.coupling(renders, renoise // pairs, rng, sampler.device) for _ in range(REPEATS)]
        draws = sampler.at(torch.stack(u).repeat_interleave(pairs, 2))
        t, weight = draws.t, draws.weight.double()
    else:
        draws = [sample(renders, renoise, rng) for _ in range(REPEATS)]
        t, weight = torch.stack([d.t for d in draws]), torch.stack([d.weight for d in draws]).double()
    estimates = (weight[..., None] * integrands(t, sampler.base)).mean((1, 2))
    error = estimates.mean(0) - truth(sampler.base)
    # Where strata leave no randomness at all (the integrand 1 under q = p), only rounding remains.
    scale = estimates.std(0) / math.sqrt(REPEATS) + 1e-6
    return (error / scale).abs().max().item()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("law", LAWS)
def test_estimate_is_unbiased_for_every_proposal_and_coupling(law, coupling):
    base, proposal = LAWS[law]
    sampler = TimestepSampler(base, proposal, coupling=COUPLINGS[coupling])
    assert largest_z(sampler, 2, 3, seed=1) < THRESHOLD


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("law", ["discrete weight", "continuous weight"])
@pytest.mark.parametrize(("renders", "renoise"), [(1, 1), (4, 1), (1, 2), (1, 5), (3, 7), (1, 13), (2, 64)])
def test_estimate_is_unbiased_for_any_number_of_renders_and_renoisings(law, coupling, renders, renoise):
    base, proposal = LAWS[law]
    sampler = TimestepSampler(base, proposal, coupling=COUPLINGS[coupling])
    assert largest_z(sampler, renders, renoise, seed=2) < THRESHOLD


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("law", LAWS)
def test_antithetic_estimates_are_unbiased(law, coupling):
    base, proposal = LAWS[law]
    sampler = TimestepSampler(base, proposal, coupling=COUPLINGS[coupling], antithetic=True)
    assert largest_z(sampler, 2, 4, seed=3) < THRESHOLD
    draws = sampler.sample(2, 4, torch.Generator().manual_seed(0))
    assert torch.equal(draws.t[:, 0::2], draws.t[:, 1::2])


class Mutants:
    """Mistakes that others have made; each must make the very check above fail."""

    @staticmethod
    def snapped_end_points(sampler):
        def sample(renders, renoise, rng):
            u = sampler.coupling(renders, renoise, rng, sampler.device)
            t = (sampler.base.low + u * (sampler.base.high - sampler.base.low)).round().long()
            return Draws(t, torch.ones_like(u, dtype=torch.float32))

        return sample

    @staticmethod
    def dropped_ratio(sampler):
        def sample(renders, renoise, rng):
            draws = sampler.sample(renders, renoise, rng)
            return Draws(draws.t, torch.ones_like(draws.weight))

        return sample

    @staticmethod
    def inverted_ratio(sampler):
        def sample(renders, renoise, rng):
            draws = sampler.sample(renders, renoise, rng)
            return Draws(draws.t, 1 / draws.weight)

        return sample

    @staticmethod
    def strata_over_indices(sampler):
        """Equal-index segments, then a draw from q within each: SimpleTuner's; it cancels the proposal."""

        def sample(renders, renoise, rng):
            law, rows = sampler.law(), []
            ends = torch.linspace(0, len(law.pmf), renoise + 1).long()
            for a, b in itertools.pairwise(ends.tolist()):
                rows.append(a + torch.multinomial(law.pmf[a:b], renders, True, generator=rng) + law.first)
            t = torch.stack(rows, 1)
            return Draws(t, (sampler.base.prob(t) / law.prob(t)).float())

        return sample

    @staticmethod
    def strata_without_jitter(sampler):
        def sample(renders, renoise, rng):
            u = (torch.arange(renoise, dtype=torch.float64).expand(renders, renoise) + 0.5) / renoise
            return sampler.at(u)

        return sample

    @staticmethod
    def left_end_grid(sampler):
        """D-TRAK's range(0, T, T // K)."""

        def sample(renders, renoise, rng):
            return sampler.at((torch.arange(renoise, dtype=torch.float64) / renoise).expand(renders, renoise))

        return sample

    @staticmethod
    def unnormalised_proposal(sampler):
        def sample(renders, renoise, rng):
            draws = sampler.sample(renders, renoise, rng)
            return Draws(draws.t, draws.weight * 1.02)

        return sample


@pytest.mark.parametrize("mutant", [name for name in vars(Mutants) if not name.startswith("_")])
def test_the_unbiasedness_check_catches(mutant):
    base = uniform_steps(3, 22)
    sampler = TimestepSampler(base, proportional(base, ramp))
    assert largest_z(sampler, 2, 3, seed=1) < THRESHOLD
    assert largest_z(sampler, 2, 3, seed=1, sample=getattr(Mutants, mutant)(sampler)) > 2 * THRESHOLD


def test_the_same_t_everywhere_is_caught_as_lost_strata():
    """Unbiased, but not what was asked: one t for all slots has the variance of a single draw."""
    base = uniform_steps(0, 999)
    sampler = TimestepSampler(base)
    rng = torch.Generator().manual_seed(0)
    t = torch.stack([sampler.sample(2, 8, rng).t for _ in range(500)]).double().mean((1, 2))
    assert t.var() < base.support.double().var() / 16 / 20


def test_strata_reduce_the_variance_and_nested_strata_the_most():
    """Var of the mean of t over 800 replicates of (4, 4); a ratio's standard error is about 7 %."""
    base = uniform_steps(0, 999)
    var = {}
    for name, coupling in COUPLINGS.items():
        sampler, rng = TimestepSampler(base, coupling=coupling), torch.Generator().manual_seed(0)
        var[name] = torch.stack([sampler.sample(4, 4, rng).t.double().mean() for _ in range(800)]).var().item()
    assert var["iid"] / var["per-render"] == pytest.approx(16, rel=0.3)  # K^2 for a linear integrand
    assert var["iid"] / var["global"] == pytest.approx(256, rel=0.3)  # (R K)^2
    assert var["iid"] / var["nested"] == pytest.approx(256, rel=0.3)


# Exactness of the weights


def test_p_w_over_q_is_one_constant_for_q_proportional_to_p_w_even_where_w_is_zero():
    """Trap 4: formed in float64, no 0/0 where w = 0, no loss where w is tiny."""
    base = uniform_steps(0, 99)

    def w(t):
        return torch.where(t < 50, 0.0, 1e-12 * (t - 49.0).double() ** 8)

    sampler = TimestepSampler(base, proportional(base, w), w=w)
    draws = sampler.sample(64, 64, torch.Generator().manual_seed(0))
    assert draws.weighted is not None
    expected = (base.pmf @ w(base.support)).item()
    assert draws.weighted.unique().numel() <= 2  # one constant, up to the last bit of float32
    torch.testing.assert_close(draws.weighted, torch.full_like(draws.weighted, expected), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(draws.weight).all())
    assert draws.t.min() >= 50


@pytest.mark.parametrize("law", LAWS)
def test_weights_are_p_over_q_at_the_drawn_t(law):
    base, proposal = LAWS[law]
    sampler = TimestepSampler(base, proposal, w=ramp)
    draws = sampler.sample(8, 16, torch.Generator().manual_seed(0))
    q = sampler.law()
    t = draws.t if base.discrete else draws.t.double()
    near_edge = 1e-3 if not base.discrete else 0  # float32 t may look up the neighbouring cell
    ratio = base.prob(t) / q.prob(t)
    agree = (draws.weight.double() - ratio).abs() <= 1e-4 * ratio
    assert (~agree).double().mean() <= 20 * near_edge
    torch.testing.assert_close(draws.weighted.double(), draws.weight.double() * ramp(t), rtol=1e-4, atol=0)


def test_flow_matching_draws_are_float_and_discrete_ones_are_integers():
    rng = torch.Generator().manual_seed(0)
    assert TimestepSampler(RANGE).sample(2, 3, rng).t.dtype == torch.float32
    assert TimestepSampler(STEPS).sample(2, 3, rng).t.dtype == torch.int64


# Ranks and windows


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("law", ["discrete weight", "continuous weight"])
def test_the_union_over_ranks_is_bit_for_bit_one_process(law, coupling):
    sampler = TimestepSampler(*LAWS[law], coupling=COUPLINGS[coupling])
    whole = sampler.sample(6, 4, torch.Generator().manual_seed(9))
    for world in (2, 3, 6):
        parts = [
            sampler.sample(6 // world, 4, torch.Generator().manual_seed(9), rank=rank, world=world)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part.t for part in parts]), whole.t)
        assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)


def test_strata_are_global_over_ranks_and_no_two_ranks_share_a_draw():
    base = uniform_steps(0, 63)
    sampler = TimestepSampler(base, coupling=strata.global_strata)
    t = [sampler.sample(2, 8, torch.Generator().manual_seed(1), rank=rank, world=4).t for rank in range(4)]
    assert torch.cat(t).flatten().sort().values.tolist() == list(range(64))


def test_a_window_of_steps_is_stratified_by_counting_steps_as_ranks():
    base = uniform_steps(0, 63)
    sampler = TimestepSampler(base, coupling=strata.nested)
    t = [sampler.sample(1, 8, torch.Generator().manual_seed(1), rank=step, world=8).t for step in range(8)]
    assert torch.cat(t).flatten().sort().values.tolist() == list(range(64))
    for row in t:
        assert (row // 8).sort().values.flatten().tolist() == list(range(8))


# Ranges


def test_an_annealed_range_rebuilds_both_tables():
    schedule = NoiseSchedule.scaled_linear()
    w = weights.sds(schedule)
    base = uniform_steps(20, 980)
    narrow = TimestepSampler(base, proportional(base, w), w=w).restrict(20, 500)
    direct = TimestepSampler(uniform_steps(20, 500), proportional(uniform_steps(20, 500), w), w=w)
    a, b = (s.sample(2, 50, torch.Generator().manual_seed(0)) for s in (narrow, direct))
    assert torch.equal(a.t, b.t)
    torch.testing.assert_close(a.weight, b.weight)


@pytest.mark.parametrize(
    ("base", "proposal"), [LAWS["discrete weight"], LAWS["discrete adaptive"], LAWS["continuous weight"]]
)
def test_a_range_of_one_timestep_is_a_clean_no_op(base, proposal):
    at = 7 if base.discrete else 0.5
    draws = TimestepSampler(base, proposal).restrict(at, at).sample(2, 3, torch.Generator().manual_seed(0))
    assert bool((draws.t == at).all())
    assert bool((draws.weight == 1).all())


# Noise


def test_antithetic_noise_comes_in_pairs_of_opposite_sign():
    draws = TimestepSampler(STEPS, antithetic=True).sample(3, 4, torch.Generator().manual_seed(0))
    eps = draws.noise((2, 5), torch.Generator().manual_seed(0))
    assert eps.shape == (3, 4, 2, 5)
    assert torch.equal(eps[:, 0::2], -eps[:, 1::2])
    assert TimestepSampler(STEPS).sample(3, 4).noise((2, 5)).shape == (3, 4, 2, 5)


# Bad input


def zero_at_20(t):
    return torch.where(t == 20, 0.0, 1.0).double()


SAMPLER = TimestepSampler(STEPS)
BAD = [
    (lambda: TimestepSampler(STEPS, uniform_steps(4, 22)), "zero at t = 3, where the objective is not"),
    (lambda: TimestepSampler(STEPS, proportional(STEPS, zero_at_20)), "zero at t = 20.*pass it as w="),
    (lambda: TimestepSampler(RANGE, ShiftedUniform(0.02, 0.9)), "zero at t = 0.9"),
    (lambda: TimestepSampler(PRACTICE, RANGE), "the proposal is zero at t = "),
    (lambda: TimestepSampler(STEPS, RANGE), "both discrete or both continuous"),
    (lambda: SAMPLER.sample(0, 4), "renders must be at least 1, got 0"),
    (lambda: SAMPLER.sample(1, 0), "renoise must be at least 1, got 0"),
    (lambda: SAMPLER.sample(1, 1, rank=2, world=2), r"rank must be in 0..world-1, got rank 2 of world 2"),
    (lambda: SAMPLER.sample(1, 1, rank=1, world=2), "pass an rng, in the same state on all ranks"),
    (lambda: SAMPLER.sample(1, 1, world=0), "world must be at least 1"),
    (lambda: TimestepSampler(STEPS, antithetic=True).sample(1, 3), "even number of re-noisings"),
    (lambda: SAMPLER.restrict(9, 8), "low <= high"),
    (lambda: TimestepSampler(STEPS, w=lambda t: -t.double()), "must be finite and not negative, but it is -3 at t = 3"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_zero_of_q_is_allowed_where_the_weight_is_zero():
    sampler = TimestepSampler(STEPS, proportional(STEPS, zero_at_20), w=zero_at_20)
    assert 20 not in sampler.sample(4, 500).t


# The adaptive proposal


def test_adaptive_learns_where_contributions_are_large_and_lowers_the_variance():
    base = uniform_steps(0, 99)
    proposal = AdaptiveProposal(base, bins=20, alpha=0.1, warmup=64)

    def f(t):
        return torch.exp(-((t.double() - 70) ** 2) / 50)

    sampler, rng = TimestepSampler(base, proposal, coupling=strata.iid), torch.Generator().manual_seed(0)
    assert sampler.law() is base
    for _ in range(100):
        t = sampler.sample(1, 32, rng).t
        proposal.update(t, f(t) ** 2)
    t = base.support
    second_moment = {q: (base.pmf**2 / law.pmf * f(t) ** 2).sum() for q, law in (("p", base), ("q", sampler.law()))}
    assert second_moment["q"] < 0.4 * second_moment["p"]
    assert (base.pmf / sampler.law().prob(t)).max() <= 10 * (1 + 1e-12)


@pytest.mark.parametrize("base", [STEPS, RANGE, PRACTICE, DiscreteDensity(0, torch.tensor([1e-9, 1.0, 0.0, 5.0]))])
def test_adaptive_state_is_saved_and_restored(base):
    first, second = (AdaptiveProposal(base, bins=5, warmup=10) for _ in range(2))
    t = base.icdf(torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    first.update(t, t.double() ** 2)
    second.load_state_dict(first.state_dict())
    u = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.law.draw(u)[1], second.law.draw(u)[1])


def test_adaptive_ignores_what_is_not_finite_and_survives_zeros():
    proposal = AdaptiveProposal(STEPS, bins=4, warmup=0)
    proposal.update(torch.tensor([3, 4]), torch.zeros(2))
    torch.testing.assert_close(proposal.law.prob(STEPS.support), STEPS.pmf)
    proposal.update(torch.tensor([3, 22]), torch.tensor([float("nan"), 1.0]))
    assert bool(torch.isfinite(proposal.law.prob(STEPS.support)).all())


def test_adaptive_keeps_what_it_learned_when_the_range_is_annealed():
    proposal = AdaptiveProposal(uniform_steps(0, 99), bins=10, warmup=0)
    t = torch.arange(100)
    proposal.update(t, (t > 40).double())
    narrow = proposal.restrict(20, 60)
    assert narrow.law.prob(torch.tensor([60])) > 3 * narrow.law.prob(torch.tensor([20]))


ADAPTIVE_BAD = [
    (lambda: AdaptiveProposal(STEPS, alpha=0.0), r"in \(0, 1\]"),
    (lambda: AdaptiveProposal(STEPS, decay=1.5), r"decay must be in \(0, 1\]"),
    (lambda: AdaptiveProposal(STEPS, bins=0), "bins must be at least 1"),
    (lambda: AdaptiveProposal(proportional(RANGE, ramp)), "closed form"),
    (lambda: AdaptiveProposal(STEPS).update(torch.tensor([3]), torch.ones(2)), "one shape"),
    (lambda: AdaptiveProposal(STEPS).load_state_dict({}), "lacks 'sum'"),
    (lambda: AdaptiveProposal(STEPS, bins=3).load_state_dict(AdaptiveProposal(STEPS, bins=4).state_dict()), "3 bins"),
]


@pytest.mark.parametrize(("make", "message"), ADAPTIVE_BAD)
def test_a_bad_adaptive_proposal_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_defensive_fallback_named_in_the_support_error_works():
    mixed = defensive(STEPS, uniform_steps(10, 12))
    assert largest_z(TimestepSampler(STEPS, mixed), 1, 4, seed=7) < THRESHOLD
