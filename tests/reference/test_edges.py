"""Every edge of the NumPy backend: nothing to see, nothing there, and values that must not be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32, FP64, arrays
from numpy_backend import check, in_head_order, run

from cuflash import reference
from cuflash.masks import Mask, band

BASE = {"b": 2, "h": 4, "hk": 2, "sq": 10, "sk": 14, "d": 8, "dv": 6}
NAN = np.nan


@pytest.fixture(autouse=True)
def floating_point_errors_raise() -> Iterator[None]:
    """A caller who turned every NumPy warning into an error gets results all the same."""
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield


NOTHING_SEEN = {
    "causal-more-queries": {"causal": True},
    "window-before-the-keys": {"window": (-1, 2), "alignment": "bottom-right"},
    "window-after-the-keys": {"window": (3, -1), "alignment": "top-left"},
    "mask-rows": {"mask": (np.arange(14) % 3 > 0)[:, None]},
    "mask-nothing": {"mask": np.zeros((1, 1, 1, 1), bool)},
}


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("options", NOTHING_SEEN.values(), ids=NOTHING_SEEN)
def test_rows_that_see_nothing_are_zero_with_lse_minus_inf(options: dict, dtype: type) -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sq": 14, "sk": 6}, dtype)
    out, lse, dq, *_ = check([q, k, v, dout, dlse], **options)
    empty = np.isneginf(lse)
    assert empty.any() and np.isfinite(lse[~empty]).all()
    for name, x in ("out", out), ("dq", dq):
        assert not in_head_order(x)[empty].any(), name


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_rows_that_see_nothing_add_nothing_to_dk_and_dv(dtype: type) -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sq": 14, "sk": 6}, dtype)
    _, lse, _, dk, dv, *_ = run(q, k, v, dout, dlse, causal=True)
    empty = np.isneginf(lse)
    loud, loud_dlse = dout.copy(), dlse.copy()
    in_head_order(loud)[empty] = 1000
    loud_dlse[empty] = np.inf
    _, _, _, dk_loud, dv_loud, *_ = run(q, k, v, loud, loud_dlse, causal=True)
    np.testing.assert_array_equal(dk_loud, dk)
    np.testing.assert_array_equal(dv_loud, dv)


def test_backward_takes_plus_inf_for_minus_inf_and_ignores_dlse_there() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sq": 14, "sk": 6}, FP32)
    options = {"band": band(True, (-1, -1)), "softmax_scale": 0.3}
    out, lse = reference.forward(q, k, v, **options)
    expected = reference.backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    empty = np.isneginf(lse)
    assert empty.any()
    for value in (NAN, np.inf, -np.inf):
        dlse[empty] = value
        actual = reference.backward(dout, q, k, v, out, np.where(empty, np.inf, lse), dlse=dlse, **options)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("dtype", [BF16, FP64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("missing", ["b", "sq", "sk"])
def test_dimensions_of_size_zero(missing: str, masked: bool, dtype: type) -> None:
    shape = BASE | {missing: 0}
    mask = np.ones((1, 1, shape["sq"], shape["sk"]), bool) if masked else None
    q, k, v, dout, dlse = arrays(shape, dtype)
    out, lse, dq, dk, dv, *_ = run(q, k, v, dout, dlse, mask=mask)
    assert (out.shape, out.dtype, lse.shape) == (dout.shape, q.dtype, dlse.shape)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert not any(x.any() for x in (out, dq, dk, dv))
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("sk", [1, 2, 600])
def test_a_single_query_sees_every_key_when_causal_and_the_first_when_top_left(sk: int) -> None:
    inputs = arrays(BASE | {"sq": 1, "sk": sk}, FP32)
    for a, b in zip(run(*inputs, causal=True), run(*inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    out, *_ = check(inputs, causal=True, alignment="top-left")
    np.testing.assert_allclose(out, inputs[2][:, :1].repeat(2, axis=2), rtol=1e-6)


def test_window_of_the_diagonal_alone_copies_values() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sk": 10, "hk": 4}, FP32)
    out, lse, dq, dk, dv, *_ = run(q, k, v, dout, dlse * 0, window=(0, 0), scale=0.5)
    np.testing.assert_array_equal(out, v)
    np.testing.assert_array_equal(dv, dout)
    np.testing.assert_allclose(lse, 0.5 * np.einsum("bshd,bshd->bhs", q, k), rtol=1e-5, atol=1e-6)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-5


def test_a_side_beyond_64_bits_is_an_unbounded_one() -> None:
    inputs = arrays(BASE, FP32)
    for a, b in zip(run(*inputs, window=(2**70, 1)), run(*inputs, window=(-1, 1)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [(14, 14), (13, 13), (10**12, 2**70)])
def test_sides_that_reach_every_key_hide_nothing(window: tuple[int, int]) -> None:
    inputs = arrays(BASE, FP32)
    for a, b in zip(run(*inputs, window=window), run(*inputs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_causal_wins_over_a_right_side() -> None:
    inputs = arrays(BASE, FP32)
    for a, b in zip(run(*inputs, causal=True, window=(-1, 5)), run(*inputs, causal=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_zero_scale_averages_what_is_visible() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"sq": 14, "hk": 4}, FP64)
    out, lse, dq, dk, *_ = check([q, k, v, dout, dlse], causal=True, scale=0.0)
    count = np.arange(1, 15)
    np.testing.assert_allclose(out, v.cumsum(axis=1) / count[:, None, None], rtol=1e-13)
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(count), lse.shape), rtol=1e-15)
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("shift", [-2.0e4, 2.0e4])
def test_huge_logits_of_one_sign_neither_vanish_nor_overflow(shift: float) -> None:
    q, k, v, dout, dlse = arrays(BASE, FP32)
    q[..., 0], k[..., 0] = 1, shift
    out, lse, *_ = run(q, k, v, dout, dlse, scale=1.0)
    np.testing.assert_allclose(lse, oracle.attention(q, k, v, scale=1.0).lse, rtol=1e-6)
    # Adding 2e4 in fp32 leaves 2e-3 of the logits.
    np.testing.assert_allclose(out, oracle.attention(q, k, v, scale=1.0).out, atol=2e-2)


def test_fp16_products_beyond_fp16_are_kept_in_fp32() -> None:
    q, k, v, dout, dlse = arrays(BASE, FP16)
    q, k = q * FP16(300), k * FP16(300)
    out, lse, *_ = run(q, k, v, dout, dlse, scale=1e-5)
    exact = oracle.attention(q, k, v, scale=1e-5)
    np.testing.assert_allclose(out.astype(FP64), exact.out, atol=2e-3)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5)


def test_gradients_beyond_fp16_become_inf_without_a_warning() -> None:
    q, k, v, dout, dlse = (x[0] for x in arrays(BASE | {"b": 1, "h": 2}, FP16))
    dout[...] = 6e4
    dense = run(*(x[None] for x in (q, k, v, dout, dlse)))
    flat = run(q, k, v, dout, dlse, cu_seqlens_q=cu(10), cu_seqlens_k=cu(14))
    for dv in (dense.dv, flat.dv):
        dv = dv.astype(FP32)
        assert np.isposinf(dv).any() and not np.isnan(dv).any()


def test_a_numpy_scale_does_not_widen_the_computation() -> None:
    inputs = arrays(BASE, FP32)
    for a, b in zip(
        run(*inputs, scale=np.float64(0.3), softcap=np.float64(2)), run(*inputs, scale=0.3, softcap=2), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_nan_in_a_query_row_spoils_that_row_alone(softcap: float) -> None:
    inputs = arrays(BASE | {"sq": 300, "sk": 600}, FP32)
    clean = run(*inputs, causal=True, softcap=softcap)
    row = (1, 123, 2)
    inputs[0][(*row, 5)] = NAN
    spoiled = run(*inputs, causal=True, softcap=softcap)
    for name in ("out", "lse", "dq"):
        before, after = getattr(clean, name), getattr(spoiled, name)
        at = (1, 2, 123) if name == "lse" else row
        assert np.isnan(after[at]).all(), name
        after[at] = before[at]
        np.testing.assert_array_equal(after, before, err_msg=name)
    for name in ("dk", "dv"):
        before, after = getattr(clean, name), getattr(spoiled, name)
        touched = np.zeros(before.shape, bool)
        touched[1, :, 1] = True  # the key head of query head 2
        np.testing.assert_array_equal(after[~touched], before[~touched], err_msg=name)


def test_nan_in_a_visible_key_reaches_exactly_its_readers() -> None:
    q, k, v, *_ = arrays(BASE | {"sq": 14}, FP32)
    k[0, 9, 1, 0] = NAN
    out, lse = reference.forward(q, k, v, band=Mask(right=0), softmax_scale=0.3)
    expected = np.zeros(lse.shape, bool)
    expected[0, 2:, 9:] = True
    np.testing.assert_array_equal(np.isnan(lse), expected)
    np.testing.assert_array_equal(np.isnan(in_head_order(out)).all(axis=-1), expected)


POISONED_KEYS = {
    "beyond-the-last-query": ({"causal": True, "alignment": "top-left"}, 20, 300, slice(20, None)),
    "left-of-every-window": ({"window": (7, -1)}, 5, 700, slice(None, 700 - 5 - 7)),
    "around-the-windows": ({"window": (3, 2), "alignment": "top-left"}, 11, 40, slice(13, None)),
}


@pytest.mark.parametrize(("options", "sq", "sk", "hidden"), POISONED_KEYS.values(), ids=POISONED_KEYS)
def test_keys_that_no_query_sees_are_not_read(options: dict, sq: int, sk: int, hidden: slice) -> None:
    inputs = arrays(BASE | {"sq": sq, "sk": sk}, FP32)
    clean = check(inputs, **options)
    for x in inputs[1:3]:
        x[:, hidden] = NAN
    for a, b in zip(run(*inputs, **options), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def varlen_inputs(total_q: int, total_k: int, dtype: type = FP32) -> list[np.ndarray]:
    return [x[0] for x in arrays(BASE | {"b": 1, "sq": total_q, "sk": total_k}, dtype)]


def cu(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def poison(x: np.ndarray, keep: np.ndarray, axis: int = 0) -> None:
    """NaN wherever `keep` is False along an axis."""
    np.moveaxis(x, axis, 0)[~keep] = NAN


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_packed_tails_and_unused_keys_are_not_read_and_get_zeros(dtype: type) -> None:
    inputs = varlen_inputs(20, 34, dtype)
    options = {
        "cu_seqlens_q": cu(6, 0, 9),
        "cu_seqlens_k": cu(10, 5, 12),
        "seqused_k": np.array([7, 5, 0], np.int32),
        "causal": True,
    }
    clean = check(inputs, **options)
    used_q, used_k = np.arange(20) < 15, np.arange(34) < 7
    q, k, v, dout, dlse = inputs
    for x in (q, dout):
        poison(x, used_q)
    poison(dlse, used_q, axis=1)
    for x in (k, v):
        poison(x, used_k)
    poisoned = run(*inputs, **options)
    for a, b in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    out, lse, dq, dk, dv, *_ = poisoned
    assert not out[6:].any() and not dq[6:].any() and np.isneginf(lse[:, 6:]).all()
    assert out[:6].any() and np.isfinite(lse[:, :6]).all()
    assert not dk[7:].any() and not dv[7:].any()


def test_seqused_beyond_a_sequence_stops_at_its_end() -> None:
    inputs = varlen_inputs(8, 20)
    options = {"cu_seqlens_q": cu(3, 5), "cu_seqlens_k": cu(9, 11), "causal": True}
    for a, b in zip(run(*inputs, seqused_k=np.array([50, 99]), **options), run(*inputs, **options), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_sequences_at_all() -> None:
    out, lse, *grads = run(*varlen_inputs(4, 5), cu_seqlens_q=cu(), cu_seqlens_k=cu())[:5]
    assert not out.any() and np.isneginf(lse).all() and not any(g.any() for g in grads)


def test_varlen_out_is_filled_in_place_tail_included() -> None:
    q, k, v, *_ = varlen_inputs(9, 9)
    memory = np.full((9, 6, 8), NAN, FP32)
    target = memory[:, ::-1][:, 1:5, 1:7]
    out, _ = reference.forward_varlen(q, k, v, cu(4, 3), cu(5, 4), band=Mask(), softmax_scale=1.0, out=target)
    assert out is target and not out[7:].any() and out[:7].all()
    expected, _ = reference.forward_varlen(q, k, v, cu(4, 3), cu(5, 4), band=Mask(), softmax_scale=1.0)
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(memory).sum() == memory.size - target.size


def test_grouped_heads_are_repeated_heads() -> None:
    q, k, v, dout, dlse = arrays(BASE | {"h": 6}, FP64)
    grouped = run(q, k, v, dout, dlse, causal=True)
    repeated = run(q, k.repeat(3, axis=2), v.repeat(3, axis=2), dout, dlse, causal=True)
    for name in ("out", "lse", "dq"):
        np.testing.assert_allclose(getattr(grouped, name), getattr(repeated, name), rtol=1e-12, atol=1e-14)
    for name in ("dk", "dv"):
        summed = getattr(repeated, name).reshape(2, 14, 2, 3, -1).sum(axis=3)
        np.testing.assert_allclose(getattr(grouped, name), summed, rtol=1e-12, atol=1e-14)


def test_gradients_of_a_group_are_summed_in_fp32() -> None:
    """256 query heads add 1 each to every value: 16-bit sums would stop at 256 (bf16) or drift."""
    q, k, v = (np.zeros((1, 1, heads, 2), BF16) for heads in (259, 1, 1))
    dout = np.ones((1, 1, 259, 2), BF16)
    dout[:, :, 256:] = 0.5
    out, lse = reference.forward(q, k, v, band=Mask(), softmax_scale=1.0)
    _, _, dv, *_ = reference.backward(dout, q, k, v, out, lse, band=Mask(), softmax_scale=1.0)
    np.testing.assert_array_equal(dv.astype(FP32), np.full((1, 1, 1, 2), BF16(257.5), FP32))


def test_inputs_are_left_alone() -> None:
    inputs = arrays(BASE, FP32)
    copies = [x.copy() for x in inputs]
    run(*inputs, causal=True, softcap=2.0)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_read_only_and_broadcast_inputs_are_taken() -> None:
    q, k, v, dout, dlse = arrays(BASE, FP32)
    k, v = (np.broadcast_to(x[:1, :, :1], x.shape) for x in (k, v))
    check([q, k, v, np.broadcast_to(dout[:, :1], dout.shape), dlse], causal=True)
