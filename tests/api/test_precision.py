"""``precision="tf32"``: products of fp32 tensors by 11 bits of every number."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

import cuflash
from cuflash.dtypes import TF32
from cuflash.errors import InvalidArgument

RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


Q, K, V, DOUT = normal(2, 9, 4, 24), normal(2, 13, 2, 24), normal(2, 13, 2, 8), normal(2, 9, 4, 8)


def test_numbers_are_rounded_to_eleven_bits() -> None:
    wide = np.ldexp(normal(20_000).astype(np.float64), RNG.integers(-100, 120, 20_000)).astype(np.float32)
    ties = np.ldexp(np.arange(2048, 4096) + 0.5, -11).astype(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 65504, np.finfo(np.float32).tiny], np.float32)
    for x in (wide, ties, -ties, special, wide.reshape(100, 200)[::2, ::-3]):
        np.testing.assert_array_equal(TF32.rounded(x), oracle.to_tf32(x))
    rounded = TF32.rounded(wide)
    assert np.abs(rounded / wide - 1).max() <= 2**-11
    assert (rounded.view(np.uint32) % 2**13 == 0).all()


def test_the_forward_is_that_of_rounded_tensors() -> None:
    rounded = (TF32.rounded(x) for x in (Q, K, V))
    out, lse = cuflash.flash_attn_func(Q, K, V, causal=True, precision="tf32", return_lse=True)
    expected, expected_lse = cuflash.flash_attn_func(*rounded, causal=True, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    full = cuflash.flash_attn_func(Q, K, V, causal=True)
    assert 1e-5 < np.abs(out - full).max() < 5e-3
    np.testing.assert_array_equal(cuflash.flash_attn_func(Q, K, V, causal=True, precision="full"), full)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_rounded_tensors(packed: bool) -> None:
    q, k, v, dout = (x[0] if packed else x for x in (Q, K, V, DOUT))
    options = (
        {"cu_seqlens_q": np.array([0, 4, 9], np.int32), "cu_seqlens_k": np.array([0, 7, 13], np.int32)}
        if packed
        else {}
    )
    out, pullback = cuflash.flash_attn_vjp(q, k, v, precision="tf32", **options)
    rounded = [TF32.rounded(x) for x in (q, k, v)]
    expected_out, expected = cuflash.flash_attn_vjp(*rounded, **options)
    np.testing.assert_array_equal(out, expected_out)
    for mine, other in zip(pullback(dout), expected(TF32.rounded(dout)), strict=True):
        np.testing.assert_array_equal(mine, other)
    exact = oracle.attention(q, k, v, dout, None, **options)
    naive = oracle.naive_in_tf32(q, k, v, dout, None, **options)
    for name, mine in zip(("dq", "dk", "dv"), pullback(dout), strict=True):
        oracle.assert_close(mine, getattr(exact, name), getattr(naive, name), name)
        assert np.abs(mine - getattr(exact, name)).max() > 1e-5  # 2^-22 would be less


def test_packed_tensors_of_one_array_have_it_too() -> None:
    qkv = normal(1, 8, 3, 2, 16)
    out = cuflash.flash_attn_qkvpacked_func(qkv, precision="tf32")
    np.testing.assert_array_equal(out, cuflash.flash_attn_func(*np.moveaxis(qkv, 2, 0), precision="tf32"))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_it_is_for_fp32_alone(dtype: type) -> None:
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    with pytest.raises(InvalidArgument, match=f'precision is "tf32" but q is {np.dtype(dtype)}; it is for float32'):
        cuflash.flash_attn_func(q, k, v, precision="tf32")


@pytest.mark.parametrize("wrong", ["TF32", "", None, 32])
def test_other_words_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidArgument, match=r'precision is .*; expected "full" or "tf32"\.$'):
        cuflash.flash_attn_func(Q, K, V, precision=wrong)


def test_explain_says_what_it_costs() -> None:
    text = str(cuflash.explain(Q, K, V, precision="tf32", device="a100"))
    assert text.startswith("forward tf32 b2")
    assert "multiplied as TF32 has them: errors up to 2^-11 of each, not 2^-24" in text
    assert "TF32" not in str(cuflash.explain(Q, K, V, device="a100"))
    plan = cuflash.explain(Q, K, V, precision="tf32", device="h100", backward=True).plan
    assert {getattr(step.config, "halves", 1) for step in plan.steps} == {1}
    assert {step.config.halves for step in cuflash.explain(Q, K, V, device="h100").plan.steps} == {2}
    assert "no tf32" in str(cuflash.explain(Q, K, V, precision="tf32", device="t4"))
