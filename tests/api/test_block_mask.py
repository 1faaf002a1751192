"""Attention by lists of blocks through the public functions: beside boolean tensors of the same pairs, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from inputs import FP32, FP64

import cuflash
from cuflash import BlockMask, InvalidArgument, Mask, create_block_mask, mods

RNG = np.random.default_rng(3)
IDS = np.sort(RNG.integers(0, 4, 60))


def tensors(b: int, len_q: int, len_kv: int, dtype: Any = FP64) -> list[np.ndarray]:
    """q, k, v and dout."""
    shapes = (b, len_q, 4, 8), (b, len_kv, 2, 8), (b, len_kv, 2, 6), (b, len_q, 4, 6)
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


def document(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (IDS[q] == IDS[k]) & (k - q < 3 * h + b)


def made(len_q: int, len_kv: int, size: Any = 16) -> BlockMask:
    return create_block_mask(document, batch=2, heads=4, len_q=len_q, len_kv=len_kv, block_size=size)


@pytest.mark.parametrize("size", [8, (16, 4), 100])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_outputs_and_gradients_are_those_of_the_pairs(size: Any, dtype: Any) -> None:
    q, k, v, dout = tensors(2, 45, 53, dtype)
    mask = made(45, 53, size)
    dlse = RNG.standard_normal((2, 4, 45)).astype(FP64 if dtype == FP64 else FP32)
    bias, sink = RNG.standard_normal((1, 4, 45, 53)).astype(dtype), RNG.standard_normal(4).astype(FP32)
    features = {"causal": True, "attn_bias": bias, "sink": sink}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, block_mask=mask, **features, bias_grad=True, return_lse=True)
    gradients = pullback(dout, dlse)
    again = cuflash.flash_attn_backward(dout, q, k, v, out, lse, block_mask=mask, **features, bias_grad=True, dlse=dlse)
    words = {"causal": True, "bias": bias, "sink": sink, "mask": mask.to_dense()}
    exact, naive = (f(q, k, v, dout, dlse, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    for computed in (gradients, again):
        oracle.assert_all_close(oracle.Attention(out, lse, *computed[:5]), exact, naive, str(mask))
    np.testing.assert_array_equal(cuflash.flash_attn_func(q, k, v, block_mask=mask, **features), out)


def test_other_masks_hide_as_well() -> None:
    q, k, v, _ = tensors(2, 45, 53)
    blocks = RNG.random((3, 4)) < 0.6
    mask = create_block_mask(blocks=blocks, len_q=45, len_kv=53, block_size=(16, 16))
    pairs = np.array(mask.to_dense() & made(45, 53).to_dense())
    tensor = RNG.random((45, 53)) < 0.8
    computed = cuflash.flash_attn_func(
        q, k, v, block_mask=mask, mask_mod=document, attn_mask=tensor, window_size=(20, 9), return_lse=True
    )
    exact = oracle.attention(q, k, v, mask=pairs & tensor, window=(20, 9))
    for x, y in zip(computed, exact[:2], strict=True):
        np.testing.assert_allclose(x, y, 1e-12, 1e-12)
    together = cuflash.flash_attn_func(q, k, v, block_mask=made(45, 53) & mask, attn_mask=tensor, window_size=(20, 9))
    np.testing.assert_allclose(together, computed[0], 1e-12, 1e-12)


def test_packed_sequences_have_the_first_blocks() -> None:
    starts_q, starts_k = np.array([0, 13, 40], np.int32), np.array([0, 31, 64], np.int32)
    q, k, v, dout = (x[0] for x in tensors(1, 40, 64))
    mask = made(27, 33, size=8)
    features = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "causal": True}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, block_mask=mask, return_lse=True, **features)
    exact, naive = (
        f(q, k, v, dout, np.zeros_like(lse), mask=mask.to_dense(), **features)
        for f in (oracle.attention, oracle.naive_in_dtype)
    )
    oracle.assert_all_close(oracle.Attention(out, lse, *pullback(dout)), exact, naive, "packed")
    packed = cuflash.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 27, 33, causal=True, block_mask=mask)
    np.testing.assert_array_equal(packed, out)


def test_other_functions_visit_the_same() -> None:
    q, k, v, _ = tensors(2, 45, 53)
    mask = made(45, 53)
    out, lse = cuflash.flash_attn_func(q, k, v, block_mask=mask, return_lse=True)
    computed = cuflash.flex_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), lambda s, b, h, q, k: s, mask, enable_gqa=True, return_lse=True
    )
    np.testing.assert_array_equal(computed[0].swapaxes(1, 2), out)
    np.testing.assert_array_equal(computed[1], lse)
    for x, y in zip(cuflash.flash_attn_prepare(q, k, v, block_mask=mask)(q, k, v), (out, lse), strict=True):
        np.testing.assert_array_equal(x, y)
    packed = cuflash.flash_attn_kvpacked_func(q, np.stack([k, k], axis=2), block_mask=mask)
    np.testing.assert_array_equal(packed, cuflash.flash_attn_func(q, k, k, block_mask=mask))
    with pytest.raises(InvalidArgument, match=r"^block_mask is given and there is a cache"):
        cuflash.flash_attn_prepare(q, None, None, cache=(k, v), cache_seqlens=3, block_mask=mask)


def test_tangents_are_those_of_the_pairs() -> None:
    q, k, v, _ = tensors(2, 45, 53)
    mask, (dq, dk, dv, _) = made(45, 53), tensors(2, 45, 53)
    computed = cuflash.flash_attn_jvp(q, k, v, dq, dk, dv, block_mask=mask, causal=True)
    expected = cuflash.flash_attn_jvp(q, k, v, dq, dk, dv, attn_mask=mask.to_dense(), causal=True)
    for x, y in zip(computed, expected, strict=True):
        np.testing.assert_allclose(x, y, 1e-12, 1e-12)


def test_probabilities_are_of_listed_blocks() -> None:
    q, k, v, _ = tensors(2, 45, 53)
    mask = made(45, 53)
    *_, shares = cuflash.flash_attn_func(q, k, v, block_mask=mask, return_attn_probs=True)
    assert not shares[:, :, :45, :53][~mask.to_dense()].any() and shares.any()


def test_explain_says_what_is_visited() -> None:
    q, k, v, _ = tensors(2, 256, 256, FP32)
    mask = create_block_mask(mods.prefix_lm(5), len_q=256, len_kv=256, block_size=(64, 128))
    computed = cuflash.explain(q, k, v, block_mask=mask, device="h100")
    assert computed.plan is not None and computed.problem.block_mask.size == (64, 128)
    assert ("blocks", "75.0% are visited: 2 full, 4 partial, 2 empty") in computed.lines()
    assert "blocks64x128" in str(computed.problem) and "blocks of 64 x 128 where " in str(computed.problem.sheet())


def test_a_band_is_asked_for_as_one() -> None:
    """By kernels that know bands, not by lists; beside another band it is one of two masks."""
    q, k, v, _ = tensors(2, 256, 400, FP32)
    mask = create_block_mask(mods.sliding_window(70, 9), len_q=256, len_kv=400)
    alone = cuflash.explain(q, k, v, block_mask=mask, device="h100")
    assert (alone.problem.mask, alone.problem.block_mask) == (Mask(70, 9, "top-left"), None)
    assert "blocks" not in dict(alone.lines())
    both = cuflash.explain(q, k, v, block_mask=mask, causal=True, device="h100")
    assert (both.problem.mask, both.problem.block_mask.size) == (Mask(right=0), (128, 128))


def test_a_block_mask_is_not_kept() -> None:
    """Options that are kept for the next call must not hold the lists of this one."""
    import gc
    import weakref

    q, k, v, _ = tensors(2, 45, 53)
    mask = made(45, 53)
    cuflash.flash_attn_func(q, k, v, block_mask=mask)
    gone = weakref.ref(mask.kv.indices)
    del mask
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((45, 53), bool), r"^block_mask is .*; expected a BlockMask. Make one of it by cuflash"),
        (create_block_mask(Mask(), len_q=45, len_kv=52), r"^block_mask is of 45 queries and 52 keys but the call has"),
        (create_block_mask(lambda b, h, q, k: b == 0, batch=3, len_q=45, len_kv=53), r"^block_mask .* of 3 batch"),
        (create_block_mask(lambda b, h, q, k: h == 0, heads=2, len_q=45, len_kv=53), r"^block_mask .* of 2 query"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(mask: Any, message: str) -> None:
    q, k, v, _ = tensors(2, 45, 53)
    with pytest.raises(InvalidArgument, match=message):
        cuflash.flash_attn_func(q, k, v, block_mask=mask)
