import numpy as np
import pytest
import torch

from carv.rng import _MT19937_OFFSET, _MT19937_WORDS, stream


def test_the_same_address_gives_the_same_numbers_in_any_order():
    a, b = stream(1, "step", 3), stream(1, "step", 4)
    first = torch.rand(5, generator=a.generator())
    torch.rand(5, generator=b.generator())
    assert torch.equal(first, torch.rand(5, generator=stream(1).child("step", 3).generator()))


@pytest.mark.parametrize(
    "other", [(2, "a", 1), (1, "b", 1), (1, "a", 2), (1, "a", "1"), (1, "a1"), (1, "a"), (1, "a", 1, 0), (-1, "a", 1)]
)
def test_other_addresses_give_other_numbers(other):
    here = torch.rand(5, generator=stream(1, "a", 1).generator())
    assert not torch.equal(here, torch.rand(5, generator=stream(*other).generator()))


def test_path_parts_cannot_run_into_each_other():
    assert stream(0, "ab", "c").digest(8) != stream(0, "a", "bc").digest(8)
    assert stream(0, 12).digest(8) != stream(0, 1, 2).digest(8)


def test_generator_state_layout_is_that_of_mt19937():
    """The state is written by hand: NumPy's MT19937 with the same 624 words must give the same numbers."""
    address = stream(3, "layout")
    words = np.frombuffer(address.digest(4 * _MT19937_WORDS), np.uint32).copy()
    words[0] = 0x80000000
    reference = np.random.MT19937()
    reference.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = (reference.random_raw(2000) & (2**24 - 1)) / 2**24
    ours = torch.rand(2000, generator=address.generator())
    assert ours.tolist() == expected.tolist()
    assert torch.Generator().get_state().numel() == _MT19937_OFFSET + 8 * _MT19937_WORDS + 40


def test_streams_differ_beyond_the_32_bits_that_torch_keeps_of_a_seed():
    """torch's own CPU seeding maps seeds that differ by 2^32 to one generator; here 10^5 streams all differ."""
    seeds = {stream(0, i).generator().get_state()[24:152].numpy().tobytes() for i in range(2_000)}
    assert len(seeds) == 2_000
    a, b = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7 + 2**32)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b)), "torch now keeps 64 bits: simplify rng"


def test_neighbouring_streams_are_uncorrelated():
    """4000 pairs of neighbours; |r| < 4.5 / sqrt(n) fails by chance in 1 of 10^5."""
    x = torch.stack([torch.randn(2, generator=stream(5, i).generator()) for i in range(4_001)])[:, 0]
    r = (x[1:] * x[:-1]).mean() / x.var()
    assert abs(r) < 4.5 / 4_000**0.5


@pytest.mark.parametrize("bad", [(0, 1.5), (0, None), (0, True), (0.5,)])
def test_an_address_that_is_not_integers_and_strings_is_refused(bad):
    with pytest.raises(TypeError, match="integers and strings only"):
        stream(*bad)
