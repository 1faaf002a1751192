"""Outputs in the caller's memory: slices of one buffer that lie between each other, and what has bytes in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from doubles.arrays import as_torch
from doubles.launch import Launches, needs_compiler
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import ops
from cuflash.arrays import numpy_arrays
from cuflash.errors import InvalidArgument
from cuflash.ops import overlap

PLACES = ["numpy", pytest.param("sm80", marks=needs_compiler), pytest.param("simt", marks=needs_compiler)]
B, SQ, H, D = 2, 70, 2, 32


def slices(rows: int = SQ) -> list[np.ndarray]:
    """Eight (b, s, h, d) slices of one buffer, whose elements lie in turn along every row."""
    whole = np.random.default_rng(1).standard_normal((B, rows, H, 8, D)).astype(np.float16)
    return [whole[..., i, :] for i in range(8)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("heads_first", [False, True], ids=["heads between", "rows between"])
def test_slices_of_one_buffer(launches: Launches, place: str, heads_first: bool) -> None:
    wrap = (lambda x: x) if place == "numpy" else as_torch
    options = ops.asked(causal=True, family=None if place == "numpy" else place)
    all_slices = slices()
    if heads_first:
        whole = np.random.default_rng(1).standard_normal((B, SQ, 8, H, D)).astype(np.float16)
        all_slices = [whole[:, :, i] for i in range(8)]
    q, k, v, dout, out, dq, dk, dv = all_slices
    inputs = [x.copy() for x in (q, k, v, dout)]
    for x in (out, dq, dk, dv):
        x[...] = np.nan
    wrapped = [wrap(x) for x in all_slices]
    arrays = ops.Arrays(*wrapped[:3], out=wrapped[4])
    _, lse = ops.forward(options, arrays)
    gradients = dict(zip(("dq", "dk", "dv"), wrapped[5:], strict=True))
    ops.backward(options, arrays._replace(dout=wrapped[3], lse=lse, **gradients))
    for x, before in zip((q, k, v, dout), inputs, strict=True):
        np.testing.assert_array_equal(x, before)
    exact, naive = (f(*inputs, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    lse = lse if isinstance(lse, np.ndarray) else lse.x
    oracle.assert_all_close(oracle.Attention(out, lse, dq, dk, dv), exact, naive)


@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_bytes_in_common(launches: Launches, wrap: Any) -> None:
    q, k, v, dout, out, g, other, _ = slices()
    lse = np.zeros((B, H, SQ), np.float32)
    inputs = [wrap(x) for x in (dout, q, k, v, out, lse)]
    one_further = np.lib.stride_tricks.as_strided(g[..., 1:], g.shape, g.strides)
    reversed_rows = g[:, ::-1]
    for first, second in ((g, g), (g, one_further), (one_further, g), (g, reversed_rows), (other, g)):
        for names in (("dq", "dk"), ("dk", "dv"), ("dv", "dq")):
            given = dict(zip(names, (first, second), strict=True))
            if first is other:
                given[names[1]] = np.lib.stride_tricks.as_strided(other[:, :, :, -1:], g.shape, g.strides)
            with pytest.raises(InvalidArgument, match=r"^d[kv] shares memory with d[qk], which is written too"):
                cuflash.flash_attn_backward(*inputs, **{name: wrap(x) for name, x in given.items()})
    for name, inside in (
        ("dq", q),
        ("dk", dout[:, ::-1]),
        ("dv", np.lib.stride_tricks.as_strided(k, k.shape, k.strides)),
    ):
        with pytest.raises(
            InvalidArgument, match=rf"^{name} shares memory with .*, which is still read while {name} is"
        ):
            cuflash.flash_attn_backward(*inputs, **{name: wrap(inside)})
    assert launches.kernels == []


@given(st.data())
def test_what_meets_is_what_shares_memory(data: st.DataObject) -> None:
    memory = np.zeros(4000, np.uint8)

    def one(itemsize: int) -> np.ndarray:
        shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
        step, strides = itemsize, []
        for n in shape:
            strides.append(step * data.draw(st.sampled_from([0, 1, 1, 1, -1])))
            step *= max(n, 1) + data.draw(st.integers(0, 2))
        reach = sum((n - 1) * abs(stride) for n, stride in zip(shape, strides, strict=True) if n)
        start = data.draw(st.integers(1500, 2500 - itemsize)) // itemsize * itemsize
        assert reach < 1400
        x = memory[start : start + itemsize].view(f"V{itemsize}")
        return np.lib.stride_tricks.as_strided(x, shape, strides)

    a, b = one(data.draw(st.sampled_from([1, 2, 4]))), one(data.draw(st.sampled_from([1, 2, 4])))
    views = [numpy_arrays.view(name, x) for name, x in (("a", a), ("b", b))]
    extents, pointers = [overlap.extent(view) for view in views], [view.pointer for view in views]
    shares = bool(np.shares_memory(a, b))
    assert shares is bool({*_bytes(a, memory)} & {*_bytes(b, memory)})
    if shares:
        with pytest.raises(InvalidArgument, match=r"^b shares memory with a"):
            overlap.check_separate(extents, pointers, 1)
    else:
        overlap.check_separate(extents, pointers, 1)


def _bytes(x: np.ndarray, memory: np.ndarray) -> list[int]:
    """The places in the memory that an array's elements take."""
    first = x.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    starts = [first + sum(i * s for i, s in zip(at, x.strides, strict=True)) for at in np.ndindex(x.shape)]
    return [start + i for start in starts for i in range(x.itemsize)]
