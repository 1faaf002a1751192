"""Merging parts of attention: by the formula in float64, by attention over all keys at once, and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from backends import on_gpu
from doubles.arrays import as_torch, to_numpy
from doubles.launch import Launches, needs_compiler
from inputs import BF16, FP16, random

import cuflash
from cuflash.errors import InvalidArgument
from cuflash.ops import merge as ops

PLACES = [
    "numpy",
    pytest.param("twin", marks=needs_compiler),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
CASES = {
    "two": (2, (2, 9, 3, 32), FP16),
    "one": (1, (1, 5, 2, 16), BF16),
    "many": (70, (1, 3, 2, 8), FP16),
    "packed": (5, (11, 4, 24), BF16),
    "odd": (3, (2, 4, 1, 33), FP16),
    "wide": (3, (1, 2, 2, 700), FP16),
    "fp32": (33, (2, 5, 2, 12), np.float32),
    "fp64": (4, (7, 2, 5), np.float64),
    "no rows": (3, (2, 0, 3, 8), FP16),
    "no batch": (2, (0, 4, 3, 8), np.float32),
}


class Parts:
    """Parts full of edges: NaN in what saw no key, by both infinities, rows that nobody saw, axes in another order."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: Any) -> None:
        real = np.float64 if dtype is np.float64 else np.float32
        *batch, rows, heads, dim = shape
        self.outs, self.lses = [], []
        rng = np.random.default_rng(1)
        for i in range(count):
            out = random(*batch, heads, rows, dim + 8, dtype=dtype, seed=i)[..., :dim].swapaxes(-2, -3)
            lse = (3 * rng.standard_normal((*batch, rows, heads)) + 40 * (i % 3 == 1)).astype(real).swapaxes(-1, -2)
            empty = rng.random(lse.shape) < 0.3
            if rows > 1:
                empty[..., 1] = True
            lse[empty] = np.where(rng.random(lse.shape) < 0.5, np.inf, -np.inf)[empty]
            out[empty.swapaxes(-1, -2)] = np.nan
            self.outs.append(out)
            self.lses.append(lse)
        self.dout = random(*batch, rows, heads, dim, dtype=dtype, seed=500)
        self.dlse = random(*batch, heads, rows, dtype=real, seed=501)

    def exact(self) -> tuple[list[np.ndarray], ...]:
        """out, lse, douts and dlses in float64, in (..., rows, heads) order of weights."""
        lses = np.array([x.astype(np.float64) for x in self.lses])
        lses[np.isinf(lses)] = -np.inf
        seen = np.isfinite(lses).swapaxes(-1, -2)[..., None]
        outs = [np.where(sees, x.astype(np.float64), 0) for sees, x in zip(seen, self.outs, strict=True)]
        with np.errstate(divide="ignore", invalid="ignore"):
            total = np.exp(lses).sum(axis=0)
            weights = [np.nan_to_num(np.exp(x) / total).swapaxes(-1, -2)[..., None] for x in lses]
            lse = np.log(total)
        out = sum(w * x for w, x in zip(weights, outs, strict=True))
        dout = self.dout.astype(np.float64)
        douts = [w * dout for w in weights]
        dots = [(dout * (x - out)).sum(axis=-1).swapaxes(-1, -2) + self.dlse for x in outs]
        dlses = [w[..., 0].swapaxes(-1, -2) * dot for w, dot in zip(weights, dots, strict=True)]
        return [out], [lse], douts, dlses


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_parts_are_merged(request: pytest.FixtureRequest, place: str, name: str) -> None:
    count, shape, dtype = CASES[name]
    parts = Parts(*CASES[name])
    put, get = lambda x: x, lambda x: x
    if place == "twin":
        request.getfixturevalue("launches")
        put, get = as_torch, to_numpy
    elif place == "gpu":
        put, get = on_gpu, lambda x: x.get()
    outs, lses = [*map(put, parts.outs)], [*map(put, parts.lses)]
    out, lse = cuflash.merge_attention(outs, lses)
    merged = ops.merge(outs, lses, exact=True)
    douts, dlses = ops.merge_backward(merged, put(parts.dout), put(parts.dlse))
    results = [get(out)], [get(lse)], [get(x) for x in douts], [get(x) for x in dlses]
    assert results[0][0].dtype == dtype and results[0][0].shape == shape
    assert len(douts) == len(dlses) == count
    for of, got, exact in zip(("out", "lse", "dout", "dlse"), results, parts.exact(), strict=True):
        for i, (x, y) in enumerate(zip(got, exact, strict=True)):
            rounded = y.astype(dtype if of in ("out", "dout") else x.dtype).astype(np.float64)
            oracle.assert_close(x, y, rounded, f"{of} {i}")
    assert not any(np.isnan(x).any() for x in (*results[0], *results[2], *results[3]))


@pytest.mark.parametrize("dtype", [FP16, np.float64])
def test_parts_are_those_of_attention(dtype: Any) -> None:
    q, k, v, dout = (random(2, n, 4, 16, dtype=dtype, seed=n) for n in (7, 30, 31, 7))
    v = v[:, :30]
    dlse = random(2, 4, 7, dtype=np.float64 if dtype is np.float64 else np.float32)
    cuts = slice(0, 4), slice(4, 4), slice(4, 29), slice(29, 30)
    forwards = [cuflash.flash_attn_vjp(q, k[:, cut], v[:, cut], return_lse=True) for cut in cuts]
    outs, lses = zip(*(results for results, _ in forwards), strict=True)
    (out, lse), pull = cuflash.merge_attention_vjp(outs, lses)
    douts, dlses = pull(dout, dlse)
    grads = [pullback(*given) for (_, pullback), *given in zip(forwards, douts, dlses, strict=True)]
    dq = sum(x[0].astype(np.float64) for x in grads).astype(dtype)
    dk, dv = (np.concatenate([x[i] for x in grads], axis=1) for i in (1, 2))
    inputs = (q, k, v, dout, dlse)
    oracle.assert_all_close(
        oracle.Attention(out, lse, dq, dk, dv), oracle.attention(*inputs), oracle.naive_in_dtype(*inputs)
    )


def test_without_a_gradient_of_lse_it_is_zero() -> None:
    parts = Parts(3, (1, 4, 2, 8), np.float32)
    (out, lse), pull = cuflash.merge_attention_vjp(parts.outs, parts.lses)
    for x, y in zip((out, lse), cuflash.merge_attention(parts.outs, parts.lses), strict=True):
        np.testing.assert_array_equal(x, y)
    for got, expected in zip(pull(parts.dout), pull(parts.dout, np.zeros_like(parts.dlse)), strict=True):
        np.testing.assert_array_equal(got, expected)


@needs_compiler
def test_many_parts_are_merged_in_groups(launches: Launches) -> None:
    parts = Parts(70, (1, 3, 2, 8), np.float32)
    outs, lses = [*map(as_torch, parts.outs)], [*map(as_torch, parts.lses)]
    cuflash.merge_attention(outs[:32], lses[:32])
    assert launches.take() == ["fwd_merge"]
    ops.merge_backward(ops.merge(outs, lses, exact=True), as_torch(parts.dout), None)
    assert launches.take() == ["fwd_merge"] * 4 + ["bwd_merge"] * 3


def test_stacked_parts_are_parts() -> None:
    outs, lses = random(3, 2, 5, 4, 8, dtype=np.float32), random(3, 2, 4, 5, dtype=np.float32, seed=1)
    for x, y in zip(cuflash.merge_attention(outs, lses), cuflash.merge_attention([*outs], [*lses]), strict=True):
        np.testing.assert_array_equal(x, y)


OUT, LSE = np.ones((2, 5, 4, 8), np.float32), np.ones((2, 4, 5), np.float32)
WRONG = {
    "none": ([], [], "outs has 0 arrays and lses 0; expected one of each for every part"),
    "fewer": ([OUT, OUT], [LSE], "outs has 2 arrays and lses 1"),
    "no list": (5, [LSE], "outs is 5; expected a list of arrays"),
    "shape": ([OUT, OUT[:, :4]], [LSE, LSE],
              r"outs\[1\] has shape \(2, 4, 4, 8\); expected \(2, 5, 4, 8\), by that of outs"),
    "lse": ([OUT], [LSE.swapaxes(1, 2)], r"lses\[0\] has shape \(2, 5, 4\); expected \(2, 4, 5\)"),
    "dtype": ([OUT, OUT.astype(FP16)], [LSE, LSE], r"outs\[1\] is float16; expected float32"),
    "double lse": ([OUT], [LSE.astype(np.float64)], r"lses\[0\] is float64; expected float32"),
    "rank": ([OUT[0, 0]], [LSE], r"outs\[0\] has 2 dimensions"),
    "integers": ([OUT.astype(int)], [LSE], r"outs\[0\] is int64; expected float16, bfloat16"),
    "columns": ([OUT[..., ::2]], [LSE], r"outs\[0\] is not contiguous along its last dimension"),
    "dim": ([OUT[..., :0]], [LSE], r"outs\[0\] has head dimension 0"),
    "word": (["a"], [LSE], r"outs\[0\] is a str; expected an array"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    outs, lses, message = WRONG[name]
    with pytest.raises(InvalidArgument, match=message):
        cuflash.merge_attention(outs, lses)


def test_gradients_have_the_shape_of_what_they_are_of() -> None:
    _, pull = cuflash.merge_attention_vjp([OUT], [LSE])
    with pytest.raises(InvalidArgument, match=r"dout has shape \(2, 4, 4, 8\); expected \(2, 5, 4, 8\)"):
        pull(OUT[:, :4])
    with pytest.raises(InvalidArgument, match=r"dlse is float64; expected float32"):
        pull(OUT, LSE.astype(np.float64))
