"""What PyTorch's functions ask of the kernels instead of passing over results: the lse of nothing, and delta."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from doubles.arrays import as_torch, to_numpy
from doubles.launch import Launches, needs_compiler
from host import run
from inputs import random

from cuflash import device, jit, ops
from cuflash.dtypes import DTYPES

STARTS_Q, NO_KEYS = np.array([0, 30, 30, 75], np.int32), np.zeros(4, np.int32)
STARTS_K, USED_Q = np.array([0, 10, 40, 60], np.int32), np.array([21, 0, 45], np.int32)
PACKED = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "max_seqlen_q": 45, "max_seqlen_k": 30}
LSE_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "dense": ({"causal": True}, 40),
    "split": ({"causal": True, "num_splits": 3}, 40),
    "no-keys": ({}, 0),
    "masked": ({"attn_mask": np.arange(70)[:, None] % 3 + np.zeros((1, 40)) > 0}, 40),
    "packed": (PACKED | {"causal": True}, 62),
    "packed-used": (PACKED | {"seqused_q": USED_Q, "seqused_k": np.array([10, 30, 0], np.int32)}, 62),
    "packed-no-keys": (PACKED | {"cu_seqlens_k": NO_KEYS, "max_seqlen_k": 0}, 0),
    "packed-split": (PACKED | {"causal": True, "num_splits": 2}, 62),
    "no-sequences": (PACKED | {"cu_seqlens_q": NO_KEYS[:1], "cu_seqlens_k": NO_KEYS[:1]}, 62),
}


@pytest.fixture
def families(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that runs the kernels of every family."""
    monkeypatch.setattr(device, "current", lambda ordinal: device.named("h100"))
    monkeypatch.setattr(jit.tensormap, "encoder", run.encoder)


@needs_compiler
@pytest.mark.parametrize("family", ["numpy", "sm90", "sm80", "simt"])
@pytest.mark.parametrize("name", LSE_CASES)
def test_the_caller_says_what_the_lse_of_nothing_is(families: None, name: str, family: str) -> None:
    given, rows_kv = LSE_CASES[name]
    packed = "cu_seqlens_q" in given
    q = random(*((80,) if packed else (2, 70)), 4, 64)
    k, v = (random(*((rows_kv,) if packed else (2, rows_kv)), 2, 64, seed=seed) for seed in (1, 2))
    wrap, unwrap = ((lambda x: x),) * 2 if family == "numpy" else (as_torch, to_numpy)
    options = {n: x for n, x in given.items() if n in ops.Options._fields}
    arrays = {n: wrap(x) for n, x in given.items() if n not in options}
    if family != "numpy":
        options["family"] = family
    if family == "sm90":
        options["num_splits"] = 1

    def lse(**values: float) -> np.ndarray:
        return unwrap(ops.forward(ops.Options(**options, **values), wrap(q), wrap(k), wrap(v), **arrays)[1])

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


DELTA_CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "dense": ({}, "fp16", False),
    "fp64": ({"causal": True}, "fp64", True),
    "dropout": ({"dropout_p": 0.3}, "bf16", False),
    "bias": ({"causal": True, "attn_bias": random(4, 70, 40), "bias_grad": True}, "fp16", False),
    "sink": ({"sink": random(4, dtype=np.float32)}, "fp16", True),
    "packed": (PACKED | {"causal": True}, "fp16", True),
    "packed-used": (PACKED | {"seqused_q": USED_Q, "seqused_k": np.array([10, 30, 0], np.int32)}, "bf16", False),
    "packed-no-keys": (PACKED | {"cu_seqlens_k": NO_KEYS, "max_seqlen_k": 0}, "fp16", False),
}


@needs_compiler
@pytest.mark.parametrize("family", ["numpy", "sm80", "simt"])
@pytest.mark.parametrize("name", DELTA_CASES)
def test_delta_is_returned_where_it_is_asked_for(launches: Launches, name: str, family: str) -> None:
    given, dtype, with_dlse = DELTA_CASES[name]
    if family == "sm80" and dtype == "fp64":
        pytest.skip("sm80 has no fp64")
    element, real = DTYPES[dtype].numpy, DTYPES[dtype].accumulator
    packed, rows_kv = "cu_seqlens_q" in given, 0 if "no-keys" in name else 60 if "packed" in name else 40
    rows = (80,) if packed else (2, 70)
    q, dout, out = (random(*rows, 4, d, dtype=element, seed=seed) for d, seed in ((32, 0), (24, 1), (24, 2)))
    k, v = (random(*((rows_kv,) if packed else (2, rows_kv)), 2, d, dtype=element, seed=3) for d in (32, 24))
    dlse = random(*rows[:-1], 4, rows[-1], dtype=real, seed=4) if with_dlse else None
    wrap, unwrap = ((lambda x: x),) * 2 if family == "numpy" else (as_torch, to_numpy)
    options = {n: x for n, x in given.items() if n in ops.Options._fields}
    arrays = {n: wrap(x) for n, x in given.items() if n not in options}
    if family != "numpy":
        options["family"] = family
    _, lse, *drawn = ops.forward(ops.Options(**options), wrap(q), wrap(k), wrap(v), **arrays, generator=(7, 8))
    arrays |= {"dout": wrap(dout), "lse": lse, "rng_state": drawn[0] if drawn else None}
    arrays |= {"q": wrap(q), "k": wrap(k), "v": wrap(v), "dlse": None if dlse is None else wrap(dlse)}

    def backward(**flags: bool) -> Any:
        # An output that is not the forward's: of empty rows it is no zero, and delta is one all the same.
        return ops.backward(ops.Options(**options, **flags), **arrays, out=wrap(out))

    gradients, delta = backward(keep_delta=True)
    plain = backward()
    assert type(gradients) is type(plain) and len(gradients) == len(plain)
    for one, other in zip(gradients, plain, strict=True):
        assert (one is None) is (other is None)
        if one is not None and family != "sm80":  # which adds in any order
            np.testing.assert_array_equal(unwrap(one), unwrap(other))
    products = dout.astype(np.float64) * out.astype(np.float64)
    expected = products.sum(-1).swapaxes(-1, -2) - (0 if dlse is None else dlse)
    empty = np.isneginf(unwrap(lse))
    assert empty.any() == (packed or "causal" in given)
    assert unwrap(delta).dtype == real and unwrap(delta).shape == unwrap(lse).shape
    tolerance = 24 * np.finfo(real).eps * np.abs(products).sum(-1).max()
    np.testing.assert_allclose(unwrap(delta), np.where(empty, 0, expected), rtol=0, atol=tolerance)
