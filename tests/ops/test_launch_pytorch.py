"""What PyTorch's functions ask of the kernels instead of passing over results: the lse of nothing, and delta."""

from __future__ import annotations

from typing import Any

import flash_words
import numpy as np
import pytest
from backends import LEFT_BY_HOPPER, PLACES, Backend
from doubles.arrays import as_torch, to_numpy
from doubles.launch import Launches, needs_compiler
from inputs import random

import cuflash
from cuflash import ops
from cuflash.dtypes import DTYPES

STARTS_Q, NO_KEYS = np.array([0, 30, 30, 75], np.int32), np.zeros(4, np.int32)
STARTS_K, USED_Q = np.array([0, 10, 40, 60], np.int32), np.array([21, 0, 45], np.int32)
PACKED = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 45, "max_seqlen_k": 30}
USED = {"seqused_q": USED_Q, "seqused_k": np.array([10, 30, 0], np.int32)}
WITHOUT_KEYS = PACKED | {"cu_seqlens_k": NO_KEYS, "max_seqlen_k": 0}
MASK = np.arange(70)[:, None] % 3 + np.zeros((1, 40)) > 0


def check_lse_of_nothing(backend: Backend, rows_kv: int, **given: Any) -> None:
    """Ask for other numbers than -inf, and compare with a call that asks for none."""
    packed = "cu_seqlens_q" in given
    q = random(*((80,) if packed else (2, 70)), 4, 64)
    k, v = (random(*((rows_kv,) if packed else (2, rows_kv)), 2, 64, seed=seed) for seed in (1, 2))
    options = flash_words.options({"num_splits": 1} | given, family=backend.family)
    arrays = flash_words.arrays(given, backend.put, q=q, k=k, v=v)

    def lse(**values: float) -> np.ndarray:
        return backend.get(ops.forward(options.replace(**values), arrays)[1])

    plain = lse()
    tail = np.zeros(plain.shape[-1], bool)
    if packed:
        starts, used = given["cu_seqlens_q"], given.get("seqused_q", np.diff(given["cu_seqlens_q"]))
        tail[:] = True
        for start, length in zip(starts, used, strict=False):
            tail[start : start + length] = False
    nothing = np.isneginf(plain)
    assert nothing.any() and nothing[..., tail].all() and np.isfinite(plain[~nothing]).all()
    np.testing.assert_array_equal(
        lse(empty_lse=np.inf, tail_lse=-7.5), np.where(nothing, np.where(tail, -7.5, np.inf), plain)
    )
    np.testing.assert_array_equal(lse(empty_lse=3.0, tail_lse=3.0), np.where(nothing, 3, plain))


LSE_CASES: dict[str, dict[str, Any]] = {
    "dense": {"causal": True},
    "masked": {"attn_mask": MASK},
    "packed": PACKED | {"causal": True},
    "packed-used": PACKED | USED,
    "packed-no-keys": WITHOUT_KEYS,
}


@pytest.mark.parametrize("name", LSE_CASES)
def test_the_caller_says_what_the_lse_of_nothing_is(backend: Backend, name: str) -> None:
    rows_kv = 0 if "no-keys" in name else 62 if "packed" in name else 40
    check_lse_of_nothing(backend, rows_kv, **LSE_CASES[name])


@pytest.mark.parametrize("backend", LEFT_BY_HOPPER, indirect=True)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_the_lse_of_nothing_where_keys_are_split(backend: Backend, packed: bool) -> None:
    check_lse_of_nothing(backend, 62 if packed else 40, causal=True, num_splits=3, **PACKED if packed else {})


NO_SEQUENCES = PACKED | {"cu_seqlens_q": NO_KEYS[:1], "cu_seqlens_k": NO_KEYS[:1]}


@pytest.mark.parametrize(("given", "rows_kv"), [({}, 0), (NO_SEQUENCES, 62)], ids=["no-keys", "no-sequences"])
def test_the_lse_of_nothing_without_a_launch(launches: Launches, given: dict, rows_kv: int) -> None:
    check_lse_of_nothing(Backend(None, as_torch, to_numpy), rows_kv, **given)
    check_lse_of_nothing(Backend(None, lambda x: x, lambda x: x), rows_kv, **given)
    assert launches.loaded == []


def check_delta(backend: Backend, dtype: str, with_dlse: bool, **given: Any) -> None:
    """Compare delta with float64 sums, and the gradients beside it with those of a call that does not keep it."""
    element, real = DTYPES[dtype].numpy, DTYPES[dtype].accumulator
    packed = "cu_seqlens_q" in given
    rows = (80,) if packed else (2, 70)
    rows_kv = (int(given["cu_seqlens_k"][-1]),) if packed else (2, 40)
    q, dout, out = (random(*rows, 4, d, dtype=element, seed=seed) for d, seed in ((32, 0), (24, 1), (24, 2)))
    k, v = (random(*rows_kv, 2, d, dtype=element, seed=3) for d in (32, 24))
    dlse = random(*rows[:-1], 4, rows[-1], dtype=real, seed=4) if with_dlse else None
    arrays = flash_words.arrays(given, backend.put, q=q, k=k, v=v)
    options = flash_words.options(given, family=backend.family, deterministic=True)
    _, lse, *drawn = ops.forward(options.replace(num_splits=1), arrays, (7, 8))
    # An output that is not the forward's: of empty rows it is no zero, and delta is one all the same.
    state = {"out": backend.put(out), "lse": lse, "rng_state": drawn[0] if drawn else None}
    arrays = arrays._replace(**state, dout=backend.put(dout), dlse=None if dlse is None else backend.put(dlse))

    gradients, delta = ops.backward(options.replace(keep_delta=True), arrays)
    plain = ops.backward(options, arrays)
    assert type(gradients) is type(plain) and len(gradients) == len(plain)
    for one, other in zip(gradients, plain, strict=True):
        assert (one is None) is (other is None)
        if one is not None:
            np.testing.assert_array_equal(backend.get(one), backend.get(other))
    products = dout.astype(np.float64) * out.astype(np.float64)
    expected = products.sum(-1).swapaxes(-1, -2) - (0 if dlse is None else dlse)
    empty = np.isneginf(backend.get(lse))
    assert empty.any() == (packed or "causal" in given)
    delta = backend.get(delta)
    assert delta.dtype == real and delta.shape == empty.shape
    tolerance = 24 * np.finfo(real).eps * np.abs(products).sum(-1).max()
    np.testing.assert_allclose(delta, np.where(empty, 0, expected), rtol=0, atol=tolerance)


DELTA_CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "dense": ({}, "fp16", False),
    "dropout": ({"dropout_p": 0.3}, "bf16", False),
    "bias": ({"causal": True, "attn_bias": random(4, 70, 40), "bias_grad": True}, "fp16", False),
    "sink": ({"sink": random(4, dtype=np.float32)}, "fp16", True),
    "packed": (PACKED | {"causal": True}, "fp16", True),
    "packed-used": (PACKED | USED, "bf16", False),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", DELTA_CASES)
def test_delta_is_returned_where_it_is_kept(backend: Backend, name: str) -> None:
    given, dtype, with_dlse = DELTA_CASES[name]
    check_delta(backend, dtype, with_dlse, **given)


@pytest.mark.parametrize("backend", [x for x in PLACES if "numpy" in str(x) or "simt" in str(x)], indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_delta_of_wide_types(backend: Backend, dtype: str) -> None:
    check_delta(backend, dtype, True, causal=True)


def test_delta_without_a_launch(launches: Launches) -> None:
    check_delta(Backend(None, as_torch, to_numpy), "fp16", False, **WITHOUT_KEYS)
    assert launches.loaded == []


@needs_compiler
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_results_are_what_kernels_leave(launches: Launches, packed: bool) -> None:
    """The tensors here have no arithmetic, so nothing is computed from what the kernels wrote."""
    rows_q, rows_kv = ((128,), (96,)) if packed else ((1, 128), (1, 96))
    q, k, v = (random(*rows, heads, 32, seed=i) for i, (rows, heads) in enumerate([(rows_q, 4), *[(rows_kv, 2)] * 2]))
    tensors = [as_torch(x) for x in (q, k, v)]

    def same(results: tuple, expected: tuple) -> None:
        assert len(results) == len(expected)
        for result, other in zip(results, expected, strict=True):
            result = to_numpy(result) if hasattr(result, "data_ptr") else result
            assert np.shape(result) == np.shape(other)
            np.testing.assert_allclose(np.asarray(result, np.float64), np.asarray(other, np.float64), atol=4e-3)

    if packed:
        starts = np.array([0, 50, 120], np.int32), np.array([0, 40, 96], np.int32)
        head, tail = (None, *map(as_torch, starts)), {"max_seqlen_q": 70, "max_seqlen_k": 56, "is_causal": True}
        for zero_tensors in (False, True):
            results = cuflash.mha_varlen_fwd(*tensors, *head, **tail, zero_tensors=zero_tensors)
            same(results, cuflash.mha_varlen_fwd(q, k, v, None, *starts, **tail, zero_tensors=zero_tensors))
            lse = to_numpy(results[4])
            assert np.isposinf(lse[:, :10]).all() and (lse[:, 120:] == (-np.inf if zero_tensors else np.inf)).all()
        assert launches.take() == ["fwd_sm80"] * 2
        return
    same(cuflash.mha_fwd_ck(*tensors, is_causal=True), cuflash.mha_fwd_ck(q, k, v, is_causal=True))
    same(cuflash.mem_eff_forward(*tensors, is_causal=True), cuflash.mem_eff_forward(q, k, v, is_causal=True))
    names = {"custom_mask_type": 2, "compute_log_sumexp": True}
    same(cuflash.efficient_attention_forward(*tensors, **names), cuflash.efficient_attention_forward(q, k, v, **names))
    results, expected = cuflash.mha_fwd(*tensors, is_causal=True), cuflash.mha_fwd(q, k, v, is_causal=True)
    same(results, expected)
    assert np.isposinf(to_numpy(results[4])[..., :32]).all() and np.isfinite(to_numpy(results[4])[..., 32:]).all()
    assert set(launches.take()) == {"fwd_sm80"}
    dout = random(*rows_q, 4, 32, seed=5)
    gradients = cuflash.mha_bwd(as_torch(dout), *tensors, results[0], results[4], is_causal=True)
    same(gradients, cuflash.mha_bwd(dout, q, k, v, expected[0], expected[4], is_causal=True))
    assert launches.take() == ["bwd_delta", "bwd_sm80", "bwd_convert"]
