"""The public functions on NumPy arrays against the oracle: names, orders, layouts, options, outputs, and the import."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash.dtypes import DTYPES
from cuflash.plan.choose import Explanation

DTYPE = {name: dtype.numpy for name, dtype in DTYPES.items()}
B, H, HK, SQ, SK, D, DV = 2, 4, 2, 19, 27, 16, 24
STARTS_Q, STARTS_K = np.array([0, 8, 8, 15], np.int32), np.array([0, 3, 12, 22], np.int32)
USED_Q, USED = np.array([5, 0, 7], np.int32), np.array([3, 0, 6], np.int32)


def random(*shape: int, dtype: np.dtype | str = "fp32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPE.get(dtype, dtype))


def inputs(dtype: str = "fp32", packed: bool = False) -> list[np.ndarray]:
    """q, k, v."""
    rows_q, rows_kv = ((SQ,), (SK,)) if packed else ((B, SQ), (B, SK))
    return [
        random(*rows_q, H, D, dtype=dtype),
        random(*rows_kv, HK, D, dtype=dtype, seed=1),
        random(*rows_kv, HK, DV, dtype=dtype, seed=2),
    ]


def assert_matches(actual: tuple, arrays: list[np.ndarray], **options) -> None:
    """Compare (out, lse, dq, dk, dv), or the first of them, with the oracle."""
    extra = arrays[3:]
    exact = oracle.attention(*arrays[:3], *extra, **options)
    naive = oracle.naive_in_dtype(*arrays[:3], *extra, **options)
    padded = oracle.Attention(*actual, *[None] * (5 - len(actual)))
    oracle.assert_all_close(padded, exact, naive)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal-top-left": {"causal": True, "alignment": "top-left"},
    "window": {"window_size": (5, 3)},
    "window-left": {"window_size": (4, -1)},
    "window-causal-wins": {"window_size": (6, 5), "causal": True},
    "window-beyond": {"window_size": (2**31 - 1, 27)},
    "window-diagonal": {"window_size": (0, 0), "alignment": "top-left"},
    "softcap": {"softcap": 1.5},
    "scale": {"softmax_scale": 0.7},
    "scale-negative": {"softmax_scale": -0.4, "causal": True},
    "scale-zero": {"softmax_scale": 0.0},
}


def oracles(options: dict) -> dict:
    """The oracle's names for the options."""
    names = {
        "softmax_scale": "scale", "window_size": "window", "attn_mask": "mask", "attn_bias": "bias",
        "unbiased_dropout": "dropout_unbiased", "generator": "rng_state",
    }  # fmt: skip
    return {names.get(name, name): value for name, value in options.items()}


RNG = np.random.default_rng(6)
SLOPES, SINK = RNG.uniform(0.05, 0.5, (B, H)).astype(np.float32), RNG.standard_normal(H).astype(np.float32)
BIAS = RNG.standard_normal((B, H, SQ, SK)).astype(np.float32)
DROPOUT = {"dropout_p": 0.3, "generator": (2**64 - 7, 2**33 + 4)}
FEATURES = {
    "alibi": {"alibi_slopes": SLOPES[0], "causal": True},
    "alibi-batch": {"alibi_slopes": SLOPES, "alignment": "top-left"},
    "bias": {"attn_bias": BIAS, "softcap": 2.0},
    "bias-heads": {"attn_bias": BIAS[0, :, :1]},
    "bias-rows": {"attn_bias": BIAS[0, 0], "softmax_scale": -0.3},
    "bias-strided": {"attn_bias": BIAS.transpose(1, 0, 3, 2)[:, :, ::-1].transpose(1, 0, 3, 2)},
    "sink": {"sink": SINK, "causal": True},
    "dropout": DROPOUT,
    "dropout-word": DROPOUT | {"dropout_scheme": "word"},
    "dropout-unbiased": DROPOUT | {"unbiased_dropout": True, "softcap": 1.5},
    "mask-and-band": {"attn_mask": RNG.random((B, 1, SQ, SK)) < 0.6, "causal": True, "window_size": (9, 0)},
    "all": DROPOUT | {"alibi_slopes": SLOPES, "attn_bias": BIAS[:, :1], "sink": SINK, "softcap": 2.0, "causal": True,
                      "attn_mask": RNG.random((SQ, SK)) < 0.8},
}  # fmt: skip


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_score_features(options: dict) -> None:
    q, k, v = inputs("fp32")
    out, lse = cuflash.flash_attn_func(q, k, v, **options, return_lse=True)
    assert_matches((out, lse), [q, k, v], **oracles(options))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_gradients_of_score_features(options: dict, packed: bool) -> None:
    q, k, v = inputs("fp64", packed)
    lengths = {}
    if packed:
        lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_q": USED_Q, "seqused_k": USED}
        cut = {"attn_bias": lambda x: x[..., : min(8, x.shape[-2]), :10], "attn_mask": lambda x: x[..., :8, :10]}
        options = {name: cut[name](x) if name in cut else x for name, x in options.items()}
        # Three sequences, where the dense tensors have two.
        options = {n: x[[0, 1, 0]] if getattr(x, "shape", (0,))[0] == B else x for n, x in options.items()}
    wanted = {"bias_grad": "attn_bias" in options}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **options, **lengths, **wanted, return_lse=True)
    dout, dlse = random(*out.shape, dtype="fp64", seed=3), random(*lse.shape, dtype="fp64", seed=4)
    gradients = pullback(dout, dlse)
    extra = wanted["bias_grad"] or "sink" in options
    assert isinstance(gradients, cuflash.Gradients) is extra
    exact = oracle.attention(q, k, v, dout, dlse, **lengths, **oracles(options))
    naive = oracle.naive_in_dtype(q, k, v, dout, dlse, **lengths, **oracles(options))
    oracle.assert_all_close(oracle.Attention(out, lse, *gradients, *[None] * (5 - len(gradients))), exact, naive)
    assert extra or len(gradients) == 3
    if "sink" in options:
        assert gradients.dsink.dtype == np.float32
    if wanted["bias_grad"]:
        assert gradients.dbias.dtype == np.float64 and gradients.dbias.shape == options["attn_bias"].shape

    state = {}
    if "dropout_p" in options:
        state["rng_state"] = np.array(options["generator"], np.uint64)
        options = {name: x for name, x in options.items() if name != "generator"}
    again = cuflash.flash_attn_backward(dout, q, k, v, out, lse, dlse=dlse, **options, **lengths, **wanted, **state)
    for one, other in zip(gradients, again, strict=True):  # lse alone says a little less
        assert (one is other is None) or np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-12) is None


def test_gradients_are_extra_only_where_they_are_asked_for() -> None:
    q, k, v = inputs()
    for keywords, fields in (
        ({"attn_bias": BIAS}, ()),
        ({"attn_bias": BIAS, "bias_grad": True}, ("dbias",)),
        ({"attn_bias": BIAS, "sink": SINK}, ("dsink",)),
    ):
        out, pullback = cuflash.flash_attn_vjp(q, k, v, **keywords)
        gradients = pullback(out)
        assert len(gradients) == (5 if fields else 3)
        assert tuple(name for name in ("dbias", "dsink") if getattr(gradients, name, None) is not None) == fields


def test_dropout_draws_from_a_generator_that_moves_on() -> None:
    q, k, v = inputs()
    generator = cuflash.PhiloxGenerator(5, 8)
    out, lse, state = cuflash.flash_attn_func(q, k, v, 0.5, generator=generator, return_lse=True, return_rng_state=True)
    assert state.dtype == np.uint64 and state.tolist() == [5, 8]
    assert generator.state == (5, 8 + B * H * 32)
    other, state = cuflash.flash_attn_func(q, k, v, 0.5, generator=generator, return_rng_state=True)
    assert state.tolist() == [5, 8 + B * H * 32] and (other != out).any()
    same = cuflash.flash_attn_func(q, k, v, 0.5, generator=(5, 8))
    np.testing.assert_array_equal(same, out)
    np.testing.assert_array_equal(lse, cuflash.flash_attn_func(q, k, v, return_lse=True)[1])

    generator.manual_seed(5)
    cuflash.flash_attn_func(q, k, v, 0.5, generator=generator, dropout_scheme="word")
    assert generator.state == (5, -(-B * H * SQ * SK // 4) * 4)
    before = generator.state
    assert cuflash.flash_attn_func(q, k, v, generator=generator, return_rng_state=True)[1] is None
    assert generator.state == before


def test_dropout_draws_from_the_default_generator() -> None:
    q, k, v = inputs()
    generator = cuflash.manual_seed(11)
    first = cuflash.flash_attn_func(q, k, v, 0.5)
    assert generator.state == (11, B * H * 32)
    assert (cuflash.flash_attn_func(q, k, v, 0.5) != first).any()
    cuflash.manual_seed(11)
    np.testing.assert_array_equal(cuflash.flash_attn_func(q, k, v, 0.5), first)


def test_the_pullback_drops_what_the_forward_dropped() -> None:
    q, k, v = inputs("fp64")
    generator = cuflash.PhiloxGenerator(3)
    out, pullback = cuflash.flash_attn_vjp(q, k, v, dropout_p=0.4, generator=generator)
    dout = random(*out.shape, dtype="fp64", seed=3)
    moved = generator.state
    _, _, dv = pullback(dout)
    assert generator.state == moved
    # Attention is linear in v: <dv, v> = <dout, out> for the very mask of the forward.
    np.testing.assert_allclose((dv * v).sum(), (dout * out).sum(), rtol=1e-12)


@pytest.mark.parametrize("state", [np.array([7, 12], np.int64), np.array([7, 0, 12, 0], np.uint32)], ids=str)
def test_other_forms_of_the_same_rng_state(state: np.ndarray) -> None:
    q, k, v = inputs()
    out, lse = cuflash.flash_attn_func(q, k, v, 0.4, generator=(7, 12), return_lse=True)
    expected = cuflash.flash_attn_backward(
        out, q, k, v, out, lse, dropout_p=0.4, rng_state=np.array([7, 12], np.uint64)
    )
    gradients = cuflash.flash_attn_backward(out, q, k, v, out, lse, dropout_p=0.4, rng_state=state)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sink_alone_decides_lse_where_there_are_no_keys() -> None:
    q, k, v = random(B, SQ, H, D), random(B, 0, HK, D), random(B, 0, HK, DV)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, sink=SINK, return_lse=True)
    assert not out.any() and (lse == SINK[:, None]).all()
    dlse = random(B, H, SQ)
    np.testing.assert_allclose(pullback(out, dlse).dsink, dlse.sum((0, 2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flash_attn_func(options: dict, dtype: str) -> None:
    q, k, v = inputs(dtype)
    out, lse = cuflash.flash_attn_func(q, k, v, **options, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == DTYPES[dtype].accumulator
    assert_matches((out, lse), [q, k, v], **oracles(options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flash_attn_varlen_func(options: dict) -> None:
    q, k, v = inputs(packed=True)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED}
    out, lse = cuflash.flash_attn_varlen_func(q, k, v, **lengths, **options, return_lse=True)
    assert_matches((out, lse), [q, k, v], **lengths, **oracles(options))
    assert not out[STARTS_Q[-1] :].any() and np.isneginf(lse[:, STARTS_Q[-1] :]).all()


PROBABILITIES = {
    "plain": {},
    "causal": {"causal": True, "window_size": (6, -1)},
    "byte": DROPOUT | {"causal": True, "alibi_slopes": SLOPES[0]},
    "word": DROPOUT | {"dropout_scheme": "word", "sink": SINK, "attn_bias": BIAS[0, :, :1, :1]},
}


def kept_pairs(options: dict, b: int, rows: int, keys: int, plane: int) -> np.ndarray:
    """(h, rows, keys), True where dropout keeps."""
    state, p = options["generator"], options["dropout_p"]
    grids = [(b, h, H, np.arange(rows)[:, None], np.arange(keys)[None, :]) for h in range(H)]
    if options.get("dropout_scheme") == "word":
        return np.array([oracle.word_uniform(*state, *grid, keys, plane) > np.float32(p) for grid in grids])
    return np.array([oracle.flash_keep(*state, p, *grid) for grid in grids])


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", PROBABILITIES.values(), ids=PROBABILITIES)
def test_returned_probabilities(options: dict, packed: bool, dtype: str) -> None:
    q, k, v = inputs(dtype, packed)
    lengths = {}
    if packed:
        lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_q": USED_Q, "seqused_k": USED}
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    out, lse, signed, state = function(q, k, v, **lengths, **options, return_attn_probs=True, return_rng_state=True)
    plain = function(q, k, v, **lengths, **options, return_lse=True)
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(lse, plain[1])
    assert state is None if "generator" not in options else tuple(state.tolist()) == options["generator"]

    batch, len_q, len_kv = (3, 8, 10) if packed else (B, SQ, SK)
    assert signed.dtype == q.dtype and signed.shape == (batch, H, 128, 128)
    inside = signed[:, :, :len_q, :len_kv].astype(np.float64)
    assert np.count_nonzero(signed) == np.count_nonzero(inside)
    without = {name: x for name, x in oracles(options).items() if not name.startswith(("dropout", "rng"))}
    spans = zip(STARTS_Q, STARTS_K, USED_Q, USED, strict=False) if packed else [(0, 0, SQ, SK)] * B
    for b, (row, key, rows, keys) in enumerate(spans):
        at = (slice(row, row + rows), slice(key, key + keys)) if packed else (b, b)
        eye = np.broadcast_to(np.eye(keys)[:, None], (keys, HK, keys))[None]
        here = [
            x[i].astype(np.float64).reshape(1, n, *x.shape[-2:]) for x, i, n in ((q, at[0], rows), (k, at[1], keys))
        ]
        exact = oracle.attention(*here, eye, **without).out[0].swapaxes(0, 1) if rows and keys else 0
        tolerance = 1e-12 if dtype == "fp64" else 2**-10
        np.testing.assert_allclose(np.abs(inside[b, :, :rows, :keys]), exact, atol=tolerance)
        assert not inside[b, :, rows:].any() and not inside[b, :, :, keys:].any()
        if "generator" in options:
            kept = kept_pairs(options, b, rows, keys, len_q * len_kv)
            np.testing.assert_array_equal(np.signbit(inside[b, :, :rows, :keys]), ~kept)
        else:
            assert not np.signbit(inside[b]).any()


def in_pages(x: np.ndarray, table: np.ndarray, num_pages: int, page_size: int) -> np.ndarray:
    """The packed keys of STARTS_K in the pages of a table; NaN in every other row."""
    pages = np.full((num_pages, page_size, *x.shape[1:]), np.nan, x.dtype)
    for b, (start, end) in enumerate(pairwise(STARTS_K.tolist())):
        for j in range(end - start):
            pages[table[b, j // page_size], j % page_size] = x[start + j]
    return pages


PAGED = {
    "plain": {},
    "window": {"window_size": (4, 1), "softcap": 1.5},
    "mask": {"attn_mask": RNG.random((3, H, 8, 10)) < 0.7, "sink": SINK},
    "word": DROPOUT | {"dropout_scheme": "word", "attn_bias": BIAS[0, :, :8, :10], "alignment": "top-left"},
    "byte": DROPOUT | {"causal": True, "alibi_slopes": SLOPES[0]},
}


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("used", [False, True], ids=["whole", "used"])
@pytest.mark.parametrize("options", PAGED.values(), ids=PAGED)
def test_keys_in_pages_are_those_of_packed_sequences(options: dict, used: bool, page_size: int) -> None:
    q, k, v = inputs(packed=True)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    room = STARTS_K if not used else np.array([0, 10, 20, 30], np.int32)  # the differences bound seqused_k
    lengths |= {"seqused_q": USED_Q, "seqused_k": USED} if used else {}
    most = -(-10 // page_size)
    num_pages = 3 * most + 2
    table = np.random.default_rng(0).permutation(num_pages)[: 3 * most].reshape(3, most).astype(np.int32)
    pages = [in_pages(x, table, num_pages, page_size) for x in (k, v)]
    for b, n in enumerate(USED if used else np.diff(STARTS_K)):
        table[b, -(-n // page_size) :] = -1  # never read
    paged = cuflash.flash_attn_varlen_func(
        q, *pages, **lengths | {"cu_seqlens_k": room}, **options, block_table=table, return_lse=True
    )
    assert_matches(paged, [q, k, v], **lengths, **oracles(options))


def test_pages_may_be_shared_and_out_is_written_in_place() -> None:
    q, pages = random(5, H, D), random(2, 3, HK, D)
    starts, table = np.array([0, 2, 5], np.int32), np.array([[1, 0], [1, 0]], np.int32)
    lengths = starts, np.array([0, 6, 12], np.int32)
    out = np.empty_like(q)
    assert cuflash.flash_attn_varlen_func(q, pages, pages, *lengths, block_table=table, out=out) is out
    rows = pages[[1, 0]].reshape(6, HK, D)
    twice = np.concatenate([rows, rows])
    np.testing.assert_array_equal(out, cuflash.flash_attn_varlen_func(q, twice, twice, *lengths))
    with pytest.raises(cuflash.InvalidArgument, match="out shares memory with k"):
        big = random(2, 3, H, D)
        cuflash.flash_attn_varlen_func(q, big, big.copy(), *lengths, block_table=table, out=big.reshape(6, H, D)[:5])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vjp_and_backward(options: dict, deterministic: bool, packed: bool) -> None:
    q, k, v = inputs("fp64", packed)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED} if packed else {}
    (out, lse), pullback = cuflash.flash_attn_vjp(
        q, k, v, **options, **lengths, deterministic=deterministic, return_lse=True
    )
    dout, dlse = random(*out.shape, dtype="fp64", seed=3), random(*lse.shape, dtype="fp64", seed=4)
    gradients = pullback(dout, dlse)
    assert_matches((out, lse, *gradients), [q, k, v, dout, dlse], **lengths, **oracles(options))
    again = cuflash.flash_attn_backward(
        dout, q, k, v, out, lse, dlse=dlse, **options, **lengths, deterministic=deterministic
    )
    for one, other in zip(gradients, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)  # lse alone says a little less


def test_pullback_without_dlse() -> None:
    q, k, v = inputs()
    out, pullback = cuflash.flash_attn_vjp(q, k, v, causal=True)
    dout = random(*out.shape, seed=3)
    lse = cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True)[1]
    assert_matches((out, lse, *pullback(dout)), [q, k, v, dout], causal=True)


def test_gradients_accept_either_infinity_for_rows_that_see_nothing() -> None:
    q, k, v = inputs()
    k, v = k[:, :5], v[:, :5]
    out, lse = cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True)
    dout = random(*out.shape, seed=3)
    assert np.isneginf(lse).any()
    minus = cuflash.flash_attn_backward(dout, q, k, v, out, lse, causal=True)
    plus = cuflash.flash_attn_backward(dout, q, k, v, out, np.where(np.isneginf(lse), np.inf, lse), causal=True)
    for one, other in zip(minus, plus, strict=True):
        np.testing.assert_array_equal(one, other)


def test_packed_forms_are_views_of_the_plain_ones() -> None:
    qkv, kv, q = random(B, SQ, 3, H, D), random(B, SK, 2, HK, D), random(B, SQ, H, D)
    options = (0.0, 0.3, True)
    for packed, plain in (
        (cuflash.flash_attn_qkvpacked_func(qkv, *options), (*np.moveaxis(qkv, 2, 0), *options)),
        (cuflash.flash_attn_kvpacked_func(q, kv, *options), (q, *np.moveaxis(kv, 2, 0), *options)),
    ):
        np.testing.assert_array_equal(packed, cuflash.flash_attn_func(*plain))

    qkv, kv, q = qkv[0], kv[0], q[0]
    one, both = (STARTS_Q, 8), (STARTS_Q, STARTS_K, 8, 10)
    used = {"seqused_k": USED}
    for packed, plain in (
        (cuflash.flash_attn_varlen_qkvpacked_func(qkv, *one, *options),
         (*np.moveaxis(qkv, 1, 0), STARTS_Q, STARTS_Q, 8, 8, *options)),
        (cuflash.flash_attn_varlen_kvpacked_func(q, kv, *both, *options), (q, *np.moveaxis(kv, 1, 0), *both, *options)),
    ):  # fmt: skip
        np.testing.assert_array_equal(packed, cuflash.flash_attn_varlen_func(*plain))
    np.testing.assert_array_equal(
        cuflash.flash_attn_varlen_kvpacked_func(q, kv, *both, *options, **used),
        cuflash.flash_attn_varlen_func(q, *np.moveaxis(kv, 1, 0), *both, *options, **used),
    )


def test_packed_forms_hand_every_option_on() -> None:
    qkv = random(B, SQ, 3, H, D)
    options = {"window_size": (3, 1), "softcap": 2.0, "alignment": "top-left", "deterministic": True}
    out = np.empty((B, SQ, H, D), np.float32)
    got, lse = cuflash.flash_attn_qkvpacked_func(qkv, **options, return_lse=True, out=out)
    expected = cuflash.flash_attn_func(*np.moveaxis(qkv, 2, 0), **options, return_lse=True)
    assert got is out
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


HEAD = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
        "return_attn_probs"]  # fmt: skip
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
POSITIONAL = {
    "flash_attn_func": ["q", "k", "v", *HEAD],
    "flash_attn_kvpacked_func": ["q", "kv", *HEAD],
    "flash_attn_qkvpacked_func": ["qkv", *HEAD],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *HEAD, "block_table"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *HEAD],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *HEAD],
    "scaled_dot_product_attention": [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ],
}  # fmt: skip
DEFAULTS = {"dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
            "alibi_slopes": None, "deterministic": False, "return_attn_probs": False, "block_table": None,
            "is_causal": False, "attn_mask": None, "scale": None, "enable_gqa": False}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_order_and_defaults_are_those_of_the_original(name: str) -> None:
    parameters = inspect.signature(getattr(cuflash, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == POSITIONAL[name]
    assert {p.name: p.default for p in positional if p.name in DEFAULTS} == {
        n: DEFAULTS[n] for n in POSITIONAL[name] if n in DEFAULTS
    }


SDPA = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask": {"attn_mask": np.random.default_rng(5).random((B, H, SQ, SK)) < 0.5},
    "mask-keys": {"attn_mask": np.arange(SK) % 3 > 0},
    "mask-queries": {"attn_mask": (np.arange(SQ) % 2 > 0)[:, None]},
    "mask-batch": {"attn_mask": np.array([True, False])[:, None, None, None]},
    "mask-heads": {"attn_mask": np.random.default_rng(5).random((1, H, 1, SK)) < 0.5},
    "mask-causal": {"attn_mask": np.arange(SK) % 3 > 0, "is_causal": True},
    "bias": {"attn_mask": np.random.default_rng(5).standard_normal((B, H, SQ, SK)).astype(np.float32)},
    "bias-hides": {"attn_mask": np.where(np.arange(SK) % 3 > 0, np.float32(0), -np.inf), "is_causal": True},
    "dropout": {"dropout_p": 0.25, "generator": (1, 4)},
}


@pytest.mark.parametrize("options", SDPA.values(), ids=SDPA)
@pytest.mark.parametrize("gqa", [False, True], ids=["mha", "gqa"])
def test_scaled_dot_product_attention(options: dict, gqa: bool) -> None:
    heads_kv = HK if gqa else H
    q, k, v = random(B, H, SQ, D), random(B, heads_kv, SK, D, seed=1), random(B, heads_kv, SK, DV, seed=2)
    out, lse = cuflash.scaled_dot_product_attention(q, k, v, **options, enable_gqa=gqa, return_lse=True)
    assert out.flags.c_contiguous
    names = {"is_causal": "causal", "scale": "scale", "dropout_p": "dropout_p", "generator": "rng_state"}
    named = {names[name]: x for name, x in options.items() if name in names}
    if "attn_mask" in options:
        named["mask" if options["attn_mask"].dtype == bool else "bias"] = options["attn_mask"]
    in_order = [x.swapaxes(1, 2) for x in (q, k, v)]
    assert_matches((out.swapaxes(1, 2), lse), in_order, **named, alignment="top-left")


@pytest.mark.parametrize("mask", [SDPA["mask"], SDPA["mask-keys"]], ids=["full", "keys"])
def test_gradients_through_a_boolean_mask(mask: dict) -> None:
    q, k, v = inputs("fp64")
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **mask, return_lse=True)
    dout = random(*out.shape, dtype="fp64", seed=3)
    assert_matches((out, lse, *pullback(dout)), [q, k, v, dout], mask=mask["attn_mask"])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_out_is_written_in_place_at_any_strides(packed: bool) -> None:
    q, k, v = inputs(packed=packed)
    lengths = (STARTS_Q, STARTS_K) if packed else ()
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    expected = function(q, k, v, *lengths)
    buffer = np.full((H, *expected.shape[:-2], DV + 3), 7, np.float32)
    out = np.moveaxis(buffer, 0, -2)[..., :DV]
    assert function(q, k, v, *lengths, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert (buffer[..., DV:] == 7).all()


def test_sdpa_out_is_written_in_place() -> None:
    q, k, v = random(B, H, SQ, D), random(B, H, SK, D), random(B, H, SK, DV)
    out = np.empty((B, SQ, H, DV), np.float32).swapaxes(1, 2)
    assert cuflash.scaled_dot_product_attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, cuflash.scaled_dot_product_attention(q, k, v))


def test_gradients_are_written_in_place_into_one_packed_array() -> None:
    qkv = random(B, SQ, 3, H, D)
    q, k, v = np.moveaxis(qkv, 2, 0)
    out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
    dout = random(*out.shape, seed=3)
    dqkv = np.empty_like(qkv)
    places = dict(zip(("dq", "dk", "dv"), np.moveaxis(dqkv, 2, 0), strict=True))
    got = cuflash.flash_attn_backward(dout, q, k, v, out, lse, **places)
    assert all(x is place for x, place in zip(got, places.values(), strict=True))
    np.testing.assert_array_equal(dqkv, np.stack(cuflash.flash_attn_backward(dout, q, k, v, out, lse), axis=2))


def test_negative_and_zero_strides() -> None:
    q, k, v = inputs()
    backwards = [x[:, ::-1, ::-1] for x in (q, k, v)]
    out = cuflash.flash_attn_func(*backwards, causal=True)
    np.testing.assert_array_equal(out, cuflash.flash_attn_func(*map(np.ascontiguousarray, backwards), causal=True))
    broadcast = [np.broadcast_to(x[:1, :1], x.shape) for x in (q, k, v)]
    out = cuflash.flash_attn_func(*broadcast)
    np.testing.assert_array_equal(out, cuflash.flash_attn_func(*map(np.ascontiguousarray, broadcast)))


@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty_tensors(b: int, sq: int, sk: int) -> None:
    q, k, v = random(b, sq, H, D), random(b, sk, HK, D), random(b, sk, HK, DV)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, return_lse=True)
    assert out.shape == (b, sq, H, DV) and lse.shape == (b, H, sq)
    assert not out.any() and np.isneginf(lse).all()
    for gradient, x in zip(pullback(np.ones_like(out)), (q, k, v), strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("starts", [np.zeros(1, np.int32), np.zeros(4, np.int32)], ids=["no-sequence", "all-empty"])
def test_packed_tensors_without_rows_in_sequences(starts: np.ndarray) -> None:
    q, k, v = inputs(packed=True)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)
    assert not out.any() and np.isneginf(lse).all()
    assert not any(gradient.any() for gradient in pullback(np.ones_like(out)))


@given(causal=st.booleans(), left=st.integers(-1, 30), right=st.integers(-1, 30), top_left=st.booleans())
def test_any_band_equals_the_boolean_mask_that_draws_it(causal: bool, left: int, right: int, top_left: bool) -> None:
    q, k, v = inputs()
    offset = 0 if top_left else SK - SQ
    distance = np.arange(SK)[None, :] - np.arange(SQ)[:, None] - offset
    drawn = np.ones((SQ, SK), bool)
    drawn &= (distance >= -left) | (left < 0)
    drawn &= (distance <= (0 if causal else right)) | (right < 0 and not causal)
    alignment = "top-left" if top_left else "bottom-right"
    band = cuflash.flash_attn_func(q, k, v, causal=causal, window_size=(left, right), alignment=alignment)
    mask = cuflash.flash_attn_vjp(q, k, v, attn_mask=drawn)[0]
    np.testing.assert_allclose(band, mask, rtol=0, atol=1e-5)


def test_max_seqlens_do_not_change_the_result() -> None:
    q, k, v = inputs(packed=True)
    lengths = (STARTS_Q, STARTS_K)
    expected = cuflash.flash_attn_varlen_func(q, k, v, *lengths, causal=True)
    for longest in ((8, 10), (100, 100), (np.int32(8), np.int64(10)), (None, 10)):
        np.testing.assert_array_equal(
            cuflash.flash_attn_varlen_func(q, k, v, *lengths, *longest, causal=True), expected
        )


def test_numpy_scalars_are_numbers() -> None:
    q, k, v = inputs()
    out = cuflash.flash_attn_func(q, k, v, softmax_scale=np.float32(0.5), causal=np.True_, window_size=(np.int8(3), -1))
    np.testing.assert_array_equal(
        out, cuflash.flash_attn_func(q, k, v, softmax_scale=0.5, causal=1, window_size=(3, -1))
    )


def test_explain_says_what_would_run() -> None:
    few, k, v = (x.astype(np.float16) for x in inputs())
    q = random(B, 100, H, D, dtype="fp16")
    report = cuflash.explain(q, k, v, causal=True, device="h100")
    assert isinstance(report, Explanation)
    assert report.plan.family == "sm90" and report.problem.mask.kind == "causal"
    assert "fwd_sm90" in str(report) and "not sm80   sm90 comes first" in str(report)
    report = cuflash.explain(q, k[:, :, ::-1], v, device="h100")
    assert report.plan.family == "sm80" and "not sm90   no zero or negative strides" in str(report)
    expanded = np.broadcast_to(k[:, :, :1], k.shape)
    assert "not sm90   no zero or negative strides" in str(cuflash.explain(q, expanded, v, device="h100"))
    report = cuflash.explain(q, k, v, causal=True, device="h100")
    assert cuflash.explain(report.problem, device="h100") == report
    assert "not sm90   sm80 serves few queries better" in str(cuflash.explain(few[:, :1], k, v, device="h100"))
    packed = [x[0] for x in (few, k, v)]
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    report = cuflash.explain(
        few, k, v, attn_bias=BIAS, sink=SINK, dropout_p=0.1, device="h100", backward=True, bias_grad=True
    )
    problem = report.problem
    assert (problem.bias.name, problem.bias_grad, problem.sink, problem.dropout) == ("fp32", True, True, "byte")
    assert problem.bias_broadcast == (False,) * 4 and "bwd_sm90:" in str(report) and "bwd_bias" not in str(report)
    report = cuflash.explain(*packed, **lengths, device="sm_86", backward=True, deterministic=True)
    problem = report.problem
    assert (problem.direction, problem.layout, problem.deterministic) == ("backward", "varlen", True)
    assert (problem.len_q, problem.len_kv, problem.total_q, problem.total_kv) == (8, 10, SQ, SK)
    assert cuflash.explain(*inputs("fp64"), device="h100").plan.family == "sm80"


def test_explain_of_a_forward_does_not_depend_on_deterministic() -> None:
    q, k, v = inputs("fp16")
    assert not cuflash.explain(q, k, v, deterministic=True, device="h100").problem.deterministic


@pytest.mark.parametrize(
    "module",
    [f"cuflash.api.{name}" for name in ("flash", "gradients", "sdpa", "explain", "pytorch.mha", "pytorch.backend")],
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0


def test_every_public_function_documents_every_argument() -> None:
    for name in cuflash.__all__:
        function = getattr(cuflash, name)
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters:
                assert parameter in function.__doc__, f"{name} does not document {parameter}"


def test_import_is_quick(tmp_path: Path) -> None:
    code = """
from time import process_time
start = process_time()
import ml_dtypes, numpy
needed = process_time()
import cuflash
print(needed - start, process_time() - needed)
"""
    # Where Python may not write bytecode, all of it would be compiled again each time.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def is_quick() -> bool:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        needed, own = map(float, run.stdout.split())
        # Where what it needs alone takes most of 0.3 s: on such machines its own part is 0.4 to 0.8 times that.
        return needed + own < 0.3 or own < needed

    assert any(is_quick() for _ in range(10)), "other tests on the same cores may slow down some runs, not all"


def test_bfloat16_arrays_stay_bfloat16() -> None:
    x = random(1, 4, 2, 8, dtype="bf16")
    out = cuflash.flash_attn_func(x, x, x)
    assert out.dtype == ml_dtypes.bfloat16
