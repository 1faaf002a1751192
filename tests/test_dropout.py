"""Dropout's random numbers: published answers, torch's masks, the kernels' own code, and the generator's state."""

from __future__ import annotations

import copy
import ctypes
import pickle
import threading

import numpy as np
import oracle
import pytest
from host.build import build, why_not
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash.dropout import Dropout
from cuflash.errors import InvalidArgument
from cuflash.generator import PhiloxGenerator, default_generator
from cuflash.reference.dropout import KeepMask, philox, random_bytes, uniforms

SEED, OFFSET, HEADS, B, H = 0x123456789ABCDEF0, 64, 3, 1, 2
PLANE = np.array([B * HEADS + H], np.uint64)
FULL = 2**32 - 1


def words(row: np.ndarray) -> str:
    return " ".join(f"{int(word):08x}" for word in row)


@pytest.mark.parametrize(
    ("rounds", "fill", "expected"),
    [
        (7, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, FULL, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, FULL, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_known_answers(rounds: int, fill: int, expected: str) -> None:
    assert words(philox((fill,) * 4, fill << 32 | fill, rounds)) == expected
    independent = oracle.philox((fill,) * 4, (fill, fill), rounds)
    assert words(np.array(independent)) == expected


def test_philox_known_answer_with_the_digits_of_pi() -> None:
    counter = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
    assert words(philox(counter, 0x299F31D0A4093822, 10)) == "d16cfe09 94fdcceb 5001e420 24126ea1"


def test_byte_scheme_worked_cell() -> None:
    call = philox((0xF6, 0, 1, 1), SEED, 7)
    assert words(call) == "c1511dca d8ab5114 21826d23 7806599b"
    cell = random_bytes(SEED, OFFSET, PLANE, slice(21, 22), slice(45, 46))
    assert cell.shape == (1, 1, 1) and int(cell[0, 0, 0]) == 0x51


# Kept keys of row i at p = 0.2, measured on torch's flash kernel; the lowest bit is the lowest key.
BYTE_ROWS = {
    0: (0xF8F7EFBF, 0xF7FEF7FF),
    1: (0xCFBFBDEF, 0xCC2FFF7B),
    7: (0x2FFFBFFF, 0xEF54FFFF),
    8: (0xFD79DEF7, 0xEFFF672F),
    15: (0xE7FFBFFF, 0xFFFFFF7F),
    16: (0x7BEEEFE7, 0xD77BFBDF),
    31: (0xFCF7F5F5, 0x7EBFE7BA),
}


def test_byte_scheme_is_the_mask_of_the_flash_kernels() -> None:
    kept = KeepMask(Dropout(0.2), SEED, OFFSET, PLANE, 64, 0).tile((slice(None),), slice(0, 32), slice(0, 64))[0]
    assert kept.sum() == 1664
    for row, expected in BYTE_ROWS.items():
        assert tuple(np.packbits(kept[row], bitorder="little").view("<u4")) == expected, row


def test_word_scheme_is_the_mask_of_the_memory_efficient_kernels() -> None:
    u = uniforms(SEED, OFFSET, PLANE, slice(0, 5), slice(0, 7), len_kv=7, plane=35)[0]
    # Eight digits are as many as the published numbers have; fp32 has no more.
    row_0 = np.float32([0.17791343, 0.9469773, 0.7739484, 0.41121, 0.53694564, 0.57834846, 0.99782306])
    row_4 = np.float32([0.3319141, 0.85920924, 0.78666097, 0.972232, 0.16038729, 0.2677669, 0.71530527])
    np.testing.assert_array_equal(u[0], row_0)
    np.testing.assert_array_equal(u[4], row_4)
    kept = KeepMask(Dropout(0.5, "word"), SEED, OFFSET, PLANE, 7, 35).tile((slice(None),), slice(0, 5), slice(0, 7))
    np.testing.assert_array_equal(kept[0], u > 0.5)


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.05, 242), (0.1, 229), (0.2, 204), (0.25, 191), (0.3, 178), (0.5, 127), (0.75, 63), (0.9, 25), (0.99, 2)],
)
def test_byte_thresholds(p: float, threshold: int) -> None:
    dropout = Dropout(p)
    assert dropout.threshold == threshold
    assert dropout.keep_scale == 1 / (1 - p)
    assert Dropout(p, unbiased=True).keep_scale == 256 / (threshold + 1)
    assert Dropout(p, "word", unbiased=True).keep_scale == 1 / (1 - p)


@pytest.mark.parametrize("p", [0.1, 0.9, 0.99])
def test_kept_probabilities_have_mean_one_when_unbiased(p: float) -> None:
    heads = np.arange(64, dtype=np.uint64)
    for dropout in Dropout(p, unbiased=True), Dropout(p, "word"):
        keep = KeepMask(dropout, 5, 0, heads, 512, 512 * 512)
        kept = sum(keep.tile((slice(h, h + 8),), slice(0, 512), slice(0, 512)).mean() / 8 for h in range(0, 64, 8))
        chance = 1 / dropout.keep_scale
        spread = dropout.keep_scale * np.sqrt(chance * (1 - chance) / (64 * 512 * 512))
        assert abs(kept * dropout.keep_scale - 1) < 4 * spread
    # The scheme as PyTorch scales it is off by more than such a sum can be by chance.
    byte = (Dropout(p).threshold + 1) / 256 * Dropout(p).keep_scale
    assert abs(byte - 1) > 4 * spread


slices = st.tuples(st.integers(0, 70), st.integers(1, 70)).map(lambda x: slice(x[0], sum(x)))
states = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**62 - 1).map(lambda x: 4 * x))


@given(state=states, rows=slices, keys=slices, heads=st.integers(1, 5), b=st.integers(0, 3), p=st.floats(0.01, 0.99))
def test_any_tile_agrees_with_the_oracle(
    state: tuple[int, int], rows: slice, keys: slice, heads: int, b: int, p: float
) -> None:
    numbers = (b * heads + np.arange(heads, dtype=np.uint64)).reshape(1, heads, 1)
    i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(keys.start, keys.stop)[None, :]
    byte = KeepMask(Dropout(p), *state, numbers, 150, 20000).tile((slice(None),), rows, keys)
    word = KeepMask(Dropout(p, "word"), *state, numbers, 150, 20000).tile((slice(None),), rows, keys)
    assert byte.shape == word.shape == (1, heads, 1, i.size, j.size)
    for h in range(heads):
        np.testing.assert_array_equal(byte[0, h, 0], oracle.flash_keep(*state, p, b, h, heads, i, j))
        u = oracle.word_uniform(*state, b, h, heads, i, j, 150, 20000)
        np.testing.assert_array_equal(word[0, h, 0], u > np.float32(p))


def test_masks_do_not_repeat_beyond_32_bits() -> None:
    """Heads whose numbers start 2**32 pairs apart, and counters that cross 2**32 or 2**64, get masks of their own."""
    rows, keys = slice(0, 16), slice(0, 64)
    heads = np.array([0, 1], np.uint64)
    a, b = uniforms(1, 0, heads, rows, keys, len_kv=2**16, plane=2**32)
    assert (a != b).mean() > 0.99
    for offset in (2**34 - 64, 2**64 - 64):
        u = uniforms(1, offset, heads[:1], rows, keys, len_kv=64, plane=0)[0].ravel()
        assert len(np.unique(u)) > 1020
        byte = random_bytes(1, offset // 4, heads, rows, keys)
        assert (byte[0] != byte[1]).mean() > 0.9


UNIT = r"""
#include "attention/dropout.cuh"
using namespace cuflash;
struct Lengths { int len_q, len_kv; int64 batch; };

template <class Dropout>
void draw(const Attention& a, const Lengths& lengths, int head, bool* keep) {
  const Dropout dropout(a, lengths, head);
  for (int q = 0; q < lengths.len_q; ++q) {
    for (int kv = 0; kv < lengths.len_kv; ++kv) keep[q * lengths.len_kv + kv] = dropout.keep(q, kv);
  }
}

extern "C" __attribute__((visibility("default")))
void keep(int word, const uint64* rng_state, double p, int heads, int batch, int head, int len_q, int len_kv, int max_q,
          int max_kv, bool* out) {
  Attention a{};
  a.rng_state = const_cast<uint64*>(rng_state);
  a.dropout_p = p;
  a.heads_q = heads;
  a.len_q = max_q;
  a.len_kv = max_kv;
  (word ? draw<WordDropout> : draw<ByteDropout>)(a, Lengths{len_q, len_kv, batch}, head, out);
}
"""


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.parametrize("scheme", ["byte", "word"])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("offset", [0, 2**33 + 12, 2**64 - 4])
def test_the_kernels_draw_the_same_mask(scheme: str, p: float, offset: int) -> None:
    len_q, len_kv, max_q, max_kv, heads, b = 37, 71, 50, 90, 3, 2
    state = np.array([SEED, offset], np.uint64)
    numbers = b * heads + np.arange(heads, dtype=np.uint64)
    expected = KeepMask(Dropout(p, scheme), SEED, offset, numbers, len_kv, max_q * max_kv).tile(
        (slice(None),), slice(0, len_q), slice(0, len_kv)
    )
    actual = np.zeros((len_q, len_kv), bool)
    function = build(UNIT).keep
    for h in range(heads):
        at_state, at_actual = (ctypes.c_void_p(x.ctypes.data) for x in (state, actual))
        function(scheme == "word", at_state, ctypes.c_double(p), heads, b, h, len_q, len_kv, max_q, max_kv, at_actual)
        np.testing.assert_array_equal(actual, expected[h])


def test_generator_hands_out_the_old_state_and_moves_on_by_fours() -> None:
    generator = PhiloxGenerator(7, 8)
    assert generator.next(6 * 32) == (7, 8)
    assert generator.next(35) == (7, 200)
    assert generator.next(0) == (7, 236)
    assert generator.next(np.int64(1)) == (7, 236)
    assert generator.state == (7, 240)
    assert generator.manual_seed(9) is generator and generator.state == (9, 0)


def test_offset_wraps_at_64_bits() -> None:
    generator = PhiloxGenerator(1, 2**64 - 4)
    assert generator.next(8) == (1, 2**64 - 4)
    assert generator.state == (1, 4)


def test_generators_without_a_seed_differ() -> None:
    seeds = {PhiloxGenerator().state[0] for _ in range(8)}
    assert len(seeds) == 8 and max(seeds) > 2**48


def test_torch_state_is_little_endian_seed_and_offset() -> None:
    raw = bytes.fromhex("f0debc9a78563412" + "4000000000000000")
    for state in raw, bytearray(raw), memoryview(raw), np.frombuffer(raw, np.uint8):
        generator = PhiloxGenerator.from_torch_state(state)
        assert generator.state == (SEED, OFFSET)
    assert generator.torch_state() == raw
    generator.next(5)
    other = PhiloxGenerator(0)
    other.set_torch_state(generator.torch_state())
    assert other.state == (SEED, 72)


def test_a_tensor_is_taken_by_its_array_interface() -> None:
    class Tensor:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return np.array([1, *[0] * 15], np.uint8)

    assert PhiloxGenerator.from_torch_state(Tensor()).state == (1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PhiloxGenerator(-1), "seed is -1; expected an integer from 0 to 2**64 - 1, or None for any."),
        (lambda: PhiloxGenerator(2**64), f"seed is {2**64}; expected an integer from 0"),
        (lambda: PhiloxGenerator(1.0), "seed is 1.0; expected an integer from 0"),
        (lambda: cuflash.manual_seed(True), "seed is True; expected an integer from 0"),
        (lambda: PhiloxGenerator(0, 6), "offset is 6; expected a multiple of 4 from 0 to 2**64 - 4. Round it up"),
        (lambda: PhiloxGenerator(0).next(-1), "increment is -1; expected an integer from 0 to 2**64 - 1. Pass how"),
        (lambda: PhiloxGenerator.from_torch_state(b"1234"), "state is uint8 of shape (4,); expected 16 bytes, seed"),
        (lambda: PhiloxGenerator.from_torch_state(np.zeros(16)), "state is float64 of shape (16,); expected 16 bytes"),
    ],
)
def test_what_a_generator_refuses(call, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        call()
    assert str(error.value).startswith(message)


def test_a_refused_state_leaves_the_generator_alone() -> None:
    generator = PhiloxGenerator(3, 4)
    with pytest.raises(InvalidArgument):
        generator.set_torch_state(bytes.fromhex("0000000000000000" + "0300000000000000"))
    assert generator.state == (3, 4)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    generator = PhiloxGenerator(3, 4)
    for twin in copy.deepcopy(generator), pickle.loads(pickle.dumps(generator)):
        assert twin.next(4) == (3, 4) and generator.state == (3, 4)
    assert repr(generator) == "PhiloxGenerator(seed=3, offset=4)"


def test_manual_seed_seeds_the_default_generator() -> None:
    before = default_generator.torch_state()
    try:
        assert cuflash.manual_seed(11) is default_generator
        assert default_generator.state == (11, 0)
    finally:
        default_generator.set_torch_state(before)


def test_threads_never_share_an_offset() -> None:
    generator, drawn = PhiloxGenerator(1), [[] for _ in range(8)]

    def draw(mine: list[int]) -> None:
        mine.extend(generator.next(5)[1] for _ in range(2000))

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offset for mine in drawn for offset in mine) == list(range(0, 8 * 2000 * 8, 8))
