"""Philox4x32-10 against the known answers of Random123, and the uniform numbers made from it."""

import pytest
import torch

from mxlab.numerics.philox import philox, uniform

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter, key):
    return tuple(int(word) for word in philox(tuple(torch.tensor(c) for c in counter), key))


def in_python(counter, key):
    """The same in unlimited integers, from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & ONES, (a >> 32) ^ c3 ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    assert words(counter, key) == expected
    assert in_python(counter, key) == expected


def test_many_counters_at_once():
    counters = torch.randint(0, 2**32, (4, 300), generator=torch.Generator().manual_seed(0))
    counters[:, 0] = ONES
    key = (0xDEADBEEF, 0x12345678)
    result = torch.stack(philox(tuple(counters), key), -1).tolist()
    assert result == [list(in_python(tuple(c), key)) for c in counters.T.tolist()]


def test_uniform_takes_word_i_mod_4_of_counter_i_over_4():
    seed = 0x299F31D0A4093822
    key = (0xA4093822, 0x299F31D0)
    expected = [word >> 8 for index in range(3) for word in in_python((index, 0, 0, 0), key)]
    assert (uniform((11,), seed, CPU).double() * 2**24).tolist() == expected[:11]


def test_uniform_numbers_lie_in_0_to_1_and_are_multiples_of_two_to_the_minus_24():
    u = uniform((100_000,), 5, CPU)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).floor())
    assert abs(u.double().mean().item() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert abs(u.double().var().item() - 1 / 12) < 0.002
    assert ((ONES >> 8) * 2.0**-24) < 1  # the largest word there is


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (2, 3, 7), (0,), (4, 0)])
def test_uniform_depends_on_the_flat_index_alone(shape):
    flat = uniform((60,), 7, CPU)
    u = uniform(shape, 7, CPU)
    assert u.shape == shape
    assert torch.equal(u.flatten(), flat[: u.numel()])


def test_every_bit_of_the_seed_counts():
    seen = {tuple(uniform((4,), seed, CPU).tolist()) for seed in [0, *(1 << bit for bit in range(64))]}
    assert len(seen) == 65
