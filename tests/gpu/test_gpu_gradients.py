"""Gradients on a GPU, of every size that a kernel treats in a way of its own: repeats, graphs, places, lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from inputs import FP16, FP32, random

import cuflash

pytestmark = pytest.mark.gpu

DIMS = {"d64": (64, 64), "d128": (128, 128), "d192x128": (192, 128), "d256": (256, 256), "d64x256": (64, 256)}
MASKS = {"full": {}, "causal": {"causal": True}}
STARTS_Q, STARTS_K = np.array([0, 150, 150, 153, 420], np.int32), np.array([0, 70, 360, 360, 700], np.int32)
USED_K = np.array([70, 250, 0, 333], np.int32)
by_dims = pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
by_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def drawn(
    dims: tuple[int, int], rows: tuple[int, int], *outer: int, heads: tuple[int, int] = (4, 2), seed: int = 0
) -> list[np.ndarray]:
    """q, k, v, dout and dlse in fp16, with `outer` axes before the rows."""
    (dim_qk, dim_v), (len_q, len_k) = dims, rows
    shapes = [(len_q, heads[0], dim_qk), (len_k, heads[1], dim_qk), (len_k, heads[1], dim_v), (len_q, heads[0], dim_v)]
    tensors = [random(*outer, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
    return [*tensors, random(*outer, heads[0], len_q, dtype=FP32, seed=seed + 4)]


def assert_right(results: list[Any], arrays: list[np.ndarray], **options: Any) -> None:
    """Compare (out, lse, dq, dk, dv) with the oracle."""
    exact, naive = oracle.attention(*arrays, **options), oracle.naive_in_dtype(*arrays, **options)
    oracle.assert_all_close(oracle.Attention(*(x.get() for x in results), None, None), exact, naive)


@by_dims
@by_mask
def test_fifty_deterministic_repeats_are_bit_equal(cp: Any, dims: tuple[int, int], mask: dict) -> None:
    """More blocks than fit on any GPU at once, so that some wait for others that have yet to start."""
    q, k, v, dout, dlse = map(cp.asarray, drawn(dims, (1900, 2050), 2, heads=(16, 8)))
    out, lse = cuflash.flash_attn_func(q, k, v, **mask, return_lse=True)

    def gradients() -> list[bytes]:
        results = cuflash.flash_attn_backward(dout, q, k, v, out, lse, dlse=dlse, deterministic=True, **mask)
        return [x.tobytes() for x in results]

    first = gradients()
    for _ in range(49):
        assert gradients() == first


@pytest.mark.parametrize("batch", [2, 3], ids=["added", "summed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@by_dims
def test_fifty_gradients_of_a_shared_bias_are_bit_equal(cp: Any, dims: tuple[int, int], dtype: str, batch: int) -> None:
    arrays = drawn(dims, (280, 150), batch, heads=(2, 1))[:4]
    q, k, v, dout = (cp.asarray(x.astype(dtype)) for x in arrays)
    bias = random(1, 2, 280, 150).astype(dtype)
    _, pullback = cuflash.flash_attn_vjp(q, k, v, attn_bias=cp.asarray(bias), bias_grad=True)
    first = pullback(dout).dbias
    exact, naive = (f(*(x.astype(dtype) for x in arrays), bias=bias) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_close(first.get(), exact.dbias, naive.dbias, "dbias", np.dtype(dtype))
    for _ in range(49):
        assert (pullback(dout).dbias == first).all()


@by_dims
def test_fifty_repeats_of_packed_sequences_are_bit_equal(cp: Any, dims: tuple[int, int]) -> None:
    q, k, v, dout, _ = map(cp.asarray, drawn(dims, (420, 700)))
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED_K}
    given = {name: cp.asarray(x) for name, x in lengths.items()} | {"causal": True}
    _, pullback = cuflash.flash_attn_vjp(q, k, v, **given, deterministic=True)
    first = [x.tobytes() for x in pullback(dout)]
    for _ in range(49):
        assert [x.tobytes() for x in pullback(dout)] == first


@by_dims
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "ordered"])
def test_a_captured_step_is_right_at_every_replay(cp: Any, dims: tuple[int, int], deterministic: bool) -> None:
    """Sums begin at zero and turns at the first block, however often the graph has run."""
    places = [cp.asarray(x) for x in drawn(dims, (200, 330), 2)]
    q, k, v, dout, dlse = places

    def step() -> tuple[Any, ...]:
        (out, lse), pullback = cuflash.flash_attn_vjp(
            q, k, v, causal=True, deterministic=deterministic, return_lse=True
        )  # fmt: skip
        return out, lse, *pullback(dout, dlse)

    step()  # kernels are compiled and loaded before the capture
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        captured = step()
        graph = stream.end_capture()
    for seed in (10, 20):
        arrays = drawn(dims, (200, 330), 2, seed=seed)
        for place, x in zip(places, arrays, strict=True):
            place[...] = cp.asarray(x)
        for _ in range(2):
            for x in captured:
                x[...] = np.nan
            cp.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            assert_right(list(captured), arrays, causal=True)


@by_dims
@by_mask
def test_gradients_of_out_and_lse(cp: Any, dims: tuple[int, int], mask: dict) -> None:
    arrays = drawn(dims, (290, 210), 2)  # under a causal mask the first queries see no key
    *tensors, dout, dlse = map(cp.asarray, arrays)
    (out, lse), pullback = cuflash.flash_attn_vjp(*tensors, **mask, return_lse=True)
    assert_right([out, lse, *pullback(dout, dlse)], arrays, **mask)
    only_lse = [*arrays[:3], np.zeros_like(arrays[3]), arrays[4]]
    assert_right([out, lse, *pullback(cp.zeros_like(dout), dlse)], only_lse, **mask)


@by_dims
def test_gradients_of_packed_sequences_and_their_lse(cp: Any, dims: tuple[int, int]) -> None:
    arrays = drawn(dims, (430, 710))  # ten rows more than there are in sequences
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": USED_K}
    tensors = [cp.asarray(x) for x in arrays]
    for x, starts in zip(tensors[:4], (STARTS_Q, STARTS_K, STARTS_K, STARTS_Q), strict=True):
        x[starts[-1] :] = np.nan
    for b, used in enumerate(USED_K):
        for x in tensors[1:3]:
            x[STARTS_K[b] + used : STARTS_K[b + 1]] = np.nan
    given = {name: cp.asarray(x) for name, x in lengths.items()}
    (out, lse), pullback = cuflash.flash_attn_vjp(*tensors[:3], **given, causal=True, return_lse=True)
    assert_right([out, lse, *pullback(*tensors[3:])], arrays, causal=True, **lengths)


ORDERS = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1), "sbhd": (1, 0, 2), "hsbd": (2, 1, 0)}


@by_dims
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("elements", [8, 1], ids=["aligned", "odd"])
def test_gradients_in_places_of_any_strides(cp: Any, dims: tuple[int, int], order: tuple, elements: int) -> None:
    """Between NaNs that stay, at multiples of 16 bytes or at odd ones, in any order of the axes."""
    arrays = drawn(dims, (200, 150), 2)
    q, k, v, dout, dlse = map(cp.asarray, arrays)
    buffers, places = {}, {}
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        sizes = [x.shape[axis] + 1 for axis in order]
        buffer = cp.full((*sizes, x.shape[3] + 3 * elements), np.nan, FP16)
        inside = buffer[*(slice(x.shape[axis]) for axis in order), elements : elements + x.shape[3]]
        buffers[name], places[name] = buffer, inside.transpose(*np.argsort(order), 3)
        assert places[name].shape == x.shape
    out, lse = cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True)
    results = cuflash.flash_attn_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True, **places)
    assert all(x is place for x, place in zip(results, places.values(), strict=True))
    assert_right([out, lse, *results], arrays, causal=True)
    for name, place in places.items():
        place[...] = np.nan
        assert bool(cp.isnan(buffers[name]).all()), f"{name}: something beside it was written"


@by_dims
def test_hopper_has_kernels_of_its_own_for_gradients(cp: Any, dims: tuple[int, int]) -> None:
    q, k, v, *_ = map(cp.asarray, drawn(dims, (200, 150), 2))
    hopper = cp.cuda.Device().compute_capability == "90"
    for options in ({}, {"causal": True, "deterministic": True}, {"softcap": 2.0, "dropout_p": 0.2}):
        report = cuflash.explain(q, k, v, backward=True, **options)
        assert report.plan is not None and report.plan.family == ("sm90" if hopper else "sm80")
