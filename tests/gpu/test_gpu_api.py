"""The public functions on a GPU: every library's arrays, zero-copy, on its own stream; capture, memory, refusals."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32, random
from libraries import LIBRARIES, Library, WithCuPy, WithJax, WithTorch

import cuflash
from cuflash import jit, ops
from cuflash.errors import InvalidArgument, UnsupportedProblem

pytestmark = pytest.mark.gpu
STARTS_Q, STARTS_K = np.array([0, 30, 30, 75], np.int32), np.array([0, 10, 40, 90], np.int32)
SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()


@pytest.fixture(params=["cupy", "torch"])
def writeable_library(request: pytest.FixtureRequest) -> Library:
    """One whose arrays can be written."""
    return LIBRARIES[request.param]()


@pytest.fixture
def params_of_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Every (kernel, parameter block) that is launched."""
    seen: list[tuple[str, np.ndarray]] = []
    original = jit.Kernel.of

    def of(self: jit.Kernel, num_blocks: int) -> jit.Launch:
        launch = original(self, num_blocks)

        def recording(params: ctypes.Array, stream: int) -> None:
            struct = jit.params.dtype("FwdParams" if self.name.startswith("fwd") else "BwdParams")
            seen.append((self.name, np.frombuffer(params, struct, 1)))
            launch(params, stream)

        return recording

    monkeypatch.setattr(jit.Kernel, "of", of)
    monkeypatch.setattr(ops.launch, "_prepared", {})
    yield seen


def inputs(dtype: np.dtype = FP16, packed: bool = False) -> list[np.ndarray]:
    """q, k, v, dout, dlse."""
    rows_q, rows_kv = ((80,), (95,)) if packed else ((2, 80), (2, 95))
    return [
        random(*rows_q, 4, 64, dtype=dtype),
        random(*rows_kv, 2, 64, dtype=dtype, seed=1),
        random(*rows_kv, 2, 64, dtype=dtype, seed=2),
        random(*rows_q, 4, 64, dtype=dtype, seed=3),
        random(*((4, 80) if packed else (2, 4, 80)), dtype=FP32, seed=4),
    ]


def assert_right(results: list[np.ndarray], arrays: list[np.ndarray], **options: Any) -> None:
    """Compare (out, lse, dq, dk, dv), or the first of them, with the oracle."""
    exact, naive = oracle.attention(*arrays, **options), oracle.naive_in_dtype(*arrays, **options)
    oracle.assert_all_close(oracle.Attention(*results, *[None] * (5 - len(results))), exact, naive)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_arrays_of_every_library(library: Library, params_of_launches: list, packed: bool, dtype: np.dtype) -> None:
    arrays = inputs(dtype, packed)
    q, k, v, dout, dlse = map(library.put, arrays)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K} if packed else {}
    given = {name: library.put(x) for name, x in lengths.items()}
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, **given, return_lse=True)
    results = [out, lse, *pullback(dout, dlse)]
    assert all(map(library.owns, results))
    assert_right([library.get(x) for x in results], arrays, causal=True, **lengths)

    for kernel, params in params_of_launches:
        names = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        if kernel.startswith("bwd"):
            names |= {"dout": dout, "dlse": dlse} | dict(zip(("dq", "dk", "dv"), results[2:], strict=True))
        for name, x in names.items():
            assert params[name][0] == library.pointer(x), f"{kernel}: {name} was copied"


def test_lengths_are_validated_on_request(library: Library) -> None:
    q, k, v = map(library.put, inputs(packed=True)[:3])
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "seqused_k": np.array([10, 0, 50], np.int32)}
    longest = {"max_seqlen_q": 45, "max_seqlen_k": 50}
    given = {name: library.put(x) for name, x in lengths.items()} | longest
    trusted = cuflash.flash_attn_varlen_func(q, k, v, **given)
    checked = cuflash.flash_attn_varlen_func(q, k, v, **given, validate=True)
    np.testing.assert_array_equal(library.get(checked), library.get(trusted))
    given["seqused_k"] = library.put(np.array([10, 0, 51], np.int32))
    with pytest.raises(InvalidArgument, match=r"seqused_k\[2\] is 51, but sequence 2 has 50 keys"):
        cuflash.flash_attn_varlen_func(q, k, v, **given, validate=True)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
def test_keys_in_pages(library: Library, params_of_launches: list, page_size: int, dtype: np.dtype) -> None:
    q, k, v, *_ = inputs(dtype, packed=True)
    most = -(-50 // page_size)
    table = np.random.default_rng(0).permutation(3 * most).reshape(3, most).astype(np.int32)
    pages = [np.full((3 * most, page_size, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
    for b, (start, end) in enumerate(pairwise(STARTS_K.tolist())):
        page, row = np.divmod(np.arange(end - start), page_size)
        for paged, packed in zip(pages, (k, v), strict=True):
            paged[table[b, page], row] = packed[start:end]
        table[b, -(-(end - start) // page_size) :] = 2**31 - 1
    given = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K, "block_table": table}
    put = {"q": q, "k": pages[0], "v": pages[1], **given}
    put = {name: library.put(x) for name, x in put.items()}
    for more in ({}, {"max_seqlen_q": 45, "max_seqlen_k": 50, "validate": True}):
        results = cuflash.flash_attn_varlen_func(**put, causal=True, return_lse=True, **more)
        lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
        assert_right([library.get(x) for x in results], [q, k, v], causal=True, **lengths)
    for _, params in params_of_launches:
        assert params["k"][0] == library.pointer(put["k"]), "k was copied"


@pytest.mark.parametrize("scheme", [None, "byte", "word"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_returned_probabilities(library: Library, packed: bool, scheme: str | None) -> None:
    arrays = inputs(FP16, packed)[:3]
    options = {"causal": True} | ({"dropout_p": 0.3, "dropout_scheme": scheme, "generator": (7, 8)} if scheme else {})
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K} if packed else {}
    function = cuflash.flash_attn_varlen_func if packed else cuflash.flash_attn_func
    expected = function(*arrays, **lengths, **options, return_attn_probs=True)
    given = {name: library.put(x) for name, x in lengths.items()}
    results = function(*map(library.put, arrays), **given, **options, return_attn_probs=True)
    assert all(map(library.owns, results))
    for one, other in zip(map(library.get, results), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-3)
    signed = library.get(results[2])
    assert signed.dtype == FP16 and signed.shape == ((3 if packed else 2), 4, 128, 128)
    np.testing.assert_array_equal(np.signbit(signed), np.signbit(expected[2]))


def test_sdpa_with_a_boolean_mask(library: Library) -> None:
    q, k, v = (x.swapaxes(1, 2) for x in inputs()[:3])
    mask = np.random.default_rng(0).random((2, 1, 80, 95)) < 0.5
    out, lse = cuflash.scaled_dot_product_attention(
        *map(library.put, (q, k, v, mask)), enable_gqa=True, return_lse=True
    )
    assert library.owns(out)
    assert_right([library.get(out).swapaxes(1, 2), library.get(lse)], inputs()[:3], mask=mask)


@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_tensors(library: Library, b: int, sq: int, sk: int) -> None:
    q, k, v = (random(*shape) for shape in ((b, sq, 4, 64), (b, sk, 2, 64), (b, sk, 2, 32)))
    (out, lse), pullback = cuflash.flash_attn_vjp(*map(library.put, (q, k, v)), return_lse=True)
    gradients = pullback(library.put(np.ones((b, sq, 4, 32), FP16)))
    assert not library.get(out).any() and np.isneginf(library.get(lse)).all()
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == x.shape and not library.get(gradient).any()


def test_rows_of_no_sequence(library: Library) -> None:
    x = library.put(random(5, 2, 64))
    starts = library.put(np.zeros(1, np.int32))
    out, lse = cuflash.flash_attn_varlen_func(x, x, x, starts, starts, return_lse=True)
    assert not library.get(out).any() and np.isneginf(library.get(lse)).all()


ANY_STRIDES = ("sm80", "simt")
"""Families that serve what the copy engine of ``sm90`` does not; other families round otherwise."""


def test_out_in_a_slice(writeable_library: Library) -> None:
    library, (q, k, v, *_) = writeable_library, inputs()
    buffer = library.put(np.full((4, 2, 83, 72), 7, FP16))
    place = buffer[:, :, 1:81, 4:68]
    place = place.transpose(1, 2, 0, 3) if isinstance(library, WithCuPy) else place.permute(1, 2, 0, 3)
    assert cuflash.flash_attn_func(*map(library.put, (q, k, v)), out=place) is place
    filled = library.get(buffer)
    written = filled[:, :, 1:81, 4:68].transpose(1, 2, 0, 3)
    assert_right([written], inputs()[:3])
    fresh = ops.forward(ops.asked(family=ANY_STRIDES), ops.Arrays(*map(library.put, (q, k, v))))[0]
    np.testing.assert_array_equal(written, library.get(fresh))
    filled[:, :, 1:81, 4:68] = 7
    assert (filled == 7).all()


def test_gradients_in_one_packed_array(writeable_library: Library) -> None:
    library = writeable_library
    qkv, dout = library.put(random(2, 80, 3, 4, 64)), library.put(random(2, 80, 4, 64, seed=1))
    q, k, v = (qkv[:, :, i] for i in range(3))
    out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
    expected = cuflash.flash_attn_backward(dout, q, k, v, out, lse, deterministic=True)
    dqkv = library.put(np.full((2, 80, 3, 4, 64), np.nan, FP16))
    places = {name: dqkv[:, :, i] for i, name in enumerate(("dq", "dk", "dv"))}
    got = cuflash.flash_attn_backward(dout, q, k, v, out, lse, deterministic=True, **places)
    assert all(x is place for x, place in zip(got, places.values(), strict=True))
    np.testing.assert_array_equal(library.get(dqkv), np.stack([library.get(x) for x in expected], axis=2))


def test_negative_and_zero_strides(cp: Any) -> None:
    q, k, v = (cp.asarray(x) for x in inputs()[:3])
    backwards = [x[:, ::-1, ::-1] for x in (q, k, v)]
    options = ops.asked(causal=True, family=ANY_STRIDES)
    expected = ops.forward(options, ops.Arrays(*map(cp.ascontiguousarray, backwards)))[0]
    np.testing.assert_array_equal(cuflash.flash_attn_func(*backwards, causal=True).get(), expected.get())
    broadcast = [cp.broadcast_to(x[:1, :1], x.shape) for x in (q, k, v)]
    expected = ops.forward(ops.asked(family=ANY_STRIDES), ops.Arrays(*map(cp.ascontiguousarray, broadcast)))[0]
    np.testing.assert_array_equal(cuflash.flash_attn_func(*broadcast).get(), expected.get())


def test_runs_on_the_current_cupy_stream(cp: Any) -> None:
    arrays = inputs()[:3]
    values = [cp.asarray(x) for x in arrays]
    q, k, v = (cp.full_like(x, np.nan) for x in values)
    expected = cuflash.flash_attn_func(*values)
    spin = cp.RawKernel(SPIN, "spin")
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        cuflash.flash_attn_func(*values)  # the stream's memory is there, so that nothing is allocated below
        spin((1,), (1,), (np.int64(300_000_000),))  # about 0.2 s, after which the inputs are there
        for place, x in zip((q, k, v), values, strict=True):
            place[...] = x
        out = cuflash.flash_attn_func(q, k, v)
        assert not stream.done, "the call waited for the device"
    stream.synchronize()
    np.testing.assert_array_equal(out.get(), expected.get())


def test_runs_on_torchs_current_stream() -> None:
    library = WithTorch()
    torch = library.torch
    values = [library.put(x) for x in inputs()]
    q, k, v, dout, _ = (torch.full_like(x, float("nan")) for x in values)
    (expected, _), pullback = cuflash.flash_attn_vjp(*values[:3], deterministic=True, return_lse=True)
    expected_gradients = pullback(values[3])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        cuflash.flash_attn_vjp(*values[:3], deterministic=True)[1](values[3])  # the stream's memory is there
        torch.cuda._sleep(300_000_000)
        for place, x in zip((q, k, v, dout), values, strict=False):
            place.copy_(x)
        (out, _), pullback = cuflash.flash_attn_vjp(q, k, v, deterministic=True, return_lse=True)
        gradients = pullback(dout)
        assert not stream.query(), "the call waited for the device"
        total = out.float().sum()
    stream.synchronize()
    assert total.item() == pytest.approx(expected.float().sum().item(), rel=1e-4, abs=1e-2)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


def test_torch_leaves_the_current_stream_of_cupy_alone(cp: Any) -> None:
    library = WithTorch()
    mine = cp.cuda.Stream(non_blocking=True)
    with mine, library.torch.cuda.stream(library.torch.cuda.Stream()):
        x = library.put(random(1, 64, 2, 64))
        cuflash.flash_attn_func(x, x, x)
        assert cp.cuda.get_current_stream().ptr == mine.ptr


def test_jax_streams_are_ordered_both_ways(cp: Any) -> None:
    library = WithJax()
    jax, jnp = library.jax, library.jax.numpy
    arrays = inputs()[:3]

    @jax.jit
    def late(x: Any, n: Any) -> Any:
        slow = jax.lax.fori_loop(0, n, lambda i, m: jnp.tanh(m @ m), jnp.ones((2048, 2048)))
        return x + (slow[0, 0] * 0).astype(x.dtype)

    q, k, v = map(library.put, arrays)
    late(q, 1).block_until_ready()
    expected = library.get(cuflash.flash_attn_func(q, k, v))
    with cp.cuda.Stream(non_blocking=True):
        for _ in range(5):
            out = cuflash.flash_attn_func(late(q, 200), k, v)
            doubled = jnp.add(out, out)
            np.testing.assert_array_equal(library.get(doubled), expected + expected)


def test_jax_inputs_live_until_the_kernel_is_done() -> None:
    library = WithJax()
    jnp = library.jax.numpy
    host = random(4, 2048, 8, 64)
    x = library.put(host)
    expected = library.get(cuflash.flash_attn_func(x, x, x))
    for _ in range(20):
        fresh = x + 0
        out = cuflash.flash_attn_func(fresh, fresh, fresh)
        del fresh
        junk = jnp.full(host.shape, jnp.nan, jnp.float16)
        np.testing.assert_array_equal(library.get(out), expected)
        del junk


def test_cupy_graph_capture(cp: Any) -> None:
    arrays = inputs()[:4]
    q, k, v, dout = (cp.asarray(x) for x in arrays)

    def step() -> tuple[Any, ...]:
        (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, deterministic=True, return_lse=True)
        return out, lse, *pullback(dout)

    step()  # kernels are compiled and loaded before the capture
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        captured = step()
        graph = stream.end_capture()
    for seed in (10, 11):
        for place, x in zip((q, k, v, dout), arrays, strict=True):
            place[...] = cp.asarray(random(*x.shape, seed=seed))
        expected = [x.get() for x in step()]
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for x, y in zip(captured, expected, strict=True):
            np.testing.assert_array_equal(x.get(), y)


def test_a_prepared_call_runs_on_the_current_stream_and_in_graphs(writeable_library: Library, cp: Any) -> None:
    library, (q, k, v, *_) = writeable_library, inputs(BF16)
    attend = cuflash.flash_attn_prepare(*map(library.put, (q, k, v)), causal=True)
    for seed in (5, 6):
        arrays = [random(*x.shape, dtype=BF16, seed=seed) for x in (q, k, v)]
        tensors = list(map(library.put, arrays))
        expected = cuflash.flash_attn_func(*tensors, causal=True, return_lse=True)
        results = attend(*tensors)
        for one, other in zip(results, expected, strict=True):
            np.testing.assert_array_equal(library.get(one), library.get(other))
        assert_right([library.get(x) for x in results], arrays, causal=True)
    with pytest.raises(InvalidArgument, match="k is bfloat16 of shape"):
        attend(tensors[0], tensors[1][:, 1:], tensors[2])
    if not isinstance(library, WithCuPy):
        return
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        captured = attend(*tensors)
        graph = stream.end_capture()
    tensors[0][...] = cp.asarray(q)
    cp.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert_right([x.get() for x in captured], [q, *arrays[1:]], causal=True)


def test_a_captured_token_reads_its_arrays_anew(cp: Any, writeable_library: Library) -> None:
    """A cache grows by replays of one graph, on this thread and another, beside bound calls and inside a capture."""
    library = writeable_library
    own = [library.put(np.zeros(shape, BF16)) for shape in ((2, 1, 8, 64), (2, 1, 2, 64), (2, 1, 2, 64))]
    k_cache, v_cache = (random(2, 600, 2, 64, seed=seed).astype(BF16) for seed in (1, 2))
    caches, lengths = [library.put(x) for x in (k_cache, v_cache)], library.put(np.array([0, 577], np.int32))
    attend = cuflash.flash_attn_prepare(*own, cache=caches, cache_seqlens=lengths, causal=True)
    bound = attend.bind(*own)
    step = bound.captured()
    used = np.array([0, 577], np.int32)
    for token in range(6):
        fresh = [random(*x.shape, seed=10 * token + i).astype(BF16) for i, x in enumerate(own)]
        for place, x in zip(own, fresh, strict=True):
            place[...] = library.put(x)
        expected = cuflash.flash_attn_with_kvcache(
            fresh[0], k_cache, v_cache, *fresh[1:], cache_seqlens=used, causal=True, return_softmax_lse=True
        )
        cp.cuda.Device().synchronize()
        if token == 2:
            thread = threading.Thread(target=step)  # writes to the same results
            thread.start(), thread.join()
        elif token == 3:
            results = bound()
        elif token == 4 and isinstance(library, WithCuPy):
            with cp.cuda.Stream(non_blocking=True) as stream:
                stream.begin_capture()
                step()
                graph = stream.end_capture()
                graph.launch(stream)
        else:
            results = step()
        cp.cuda.Device().synchronize()
        computed = (*results, *caches)
        for x, y in zip(computed, (*expected, k_cache, v_cache), strict=True):
            np.testing.assert_allclose(library.get(x).astype(np.float64), y.astype(np.float64), atol=2e-2)
        used += 1
        lengths += 1


def test_pages_change_between_replays_of_a_graph(cp: Any) -> None:
    """A cache grows and its pages move while a captured graph stays the same."""
    q, k, v = (cp.asarray(random(*shape)) for shape in ((3, 4, 64), (5, 16, 2, 64), (5, 16, 2, 64)))
    starts_q, starts_k = (cp.asarray(np.array(x, np.int32)) for x in ([0, 1, 2, 3], [0, 32, 64, 96]))
    used, table = cp.asarray(np.array([1, 16, 17], np.int32)), cp.zeros((3, 2), np.int32)
    given = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "seqused_k": used, "block_table": table}
    given |= {"max_seqlen_q": 1, "max_seqlen_k": 32}
    out = cuflash.flash_attn_varlen_func(q, k, v, **given)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        cuflash.flash_attn_varlen_func(q, k, v, **given, out=out)
        graph = stream.end_capture()
    for lengths, pages in (([1, 16, 17], [[4, 0], [1, 0], [2, 3]]), ([30, 2, 0], [[3, 1], [0, 0], [0, 0]])):
        used.set(np.array(lengths, np.int32))
        table.set(np.array(pages, np.int32))
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        expected = cuflash.flash_attn_varlen_func(
            *(x.get() if hasattr(x, "get") else x for x in (q, k, v)),
            **{name: x.get() if hasattr(x, "get") else x for name, x in given.items()},
        )
        np.testing.assert_allclose(out.get(), expected, atol=5e-3)


def test_torch_graph_capture() -> None:
    library = WithTorch()
    torch = library.torch
    arrays = inputs(packed=True)[:4]
    q, k, v, dout = map(library.put, arrays)
    lengths = {"cu_seqlens_q": library.put(STARTS_Q), "cu_seqlens_k": library.put(STARTS_K)}
    lengths |= {"max_seqlen_q": 45, "max_seqlen_k": 50}

    def step() -> tuple[Any, ...]:
        (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, **lengths, deterministic=True, return_lse=True)
        return out, lse, *pullback(dout)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (10, 11):
        for place, x in zip((q, k, v, dout), arrays, strict=True):
            place.copy_(library.put(random(*x.shape, seed=seed)))
        expected = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))


def test_dropout_in_a_cupy_graph_is_fresh_at_every_replay(cp: Any) -> None:
    q, k, v, dout = (cp.asarray(x) for x in inputs()[:4])
    generator = cuflash.PhiloxGenerator(2**64 - 3, 8).to_device()

    def step(source: Any) -> tuple[Any, ...]:
        out, pullback = cuflash.flash_attn_vjp(q, k, v, dropout_p=0.5, generator=source, deterministic=True)
        return out, *pullback(dout)

    step((0, 0))
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        with pytest.raises(InvalidArgument, match=r"Call generator\.to_device\(\) before capturing"):
            step(cuflash.PhiloxGenerator(1))
        captured = step(generator)
        graph = stream.end_capture()
    assert generator.state == (2**64 - 3, 8), "nothing has run yet"
    for _ in range(3):
        before = generator.state
        graph.launch(stream)
        stream.synchronize()
        assert generator.state == (before[0], before[1] + 32 * q.shape[0] * q.shape[2])
        for x, y in zip(captured, step(before), strict=True):
            np.testing.assert_array_equal(x.get(), y.get())


def test_dropout_in_a_torch_graph_is_fresh_at_every_replay() -> None:
    library = WithTorch()
    torch = library.torch
    q, k, v = map(library.put, inputs()[:3])
    generator = cuflash.PhiloxGenerator(5).to_device()

    def step(source: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, 0.5, dropout_scheme="word", generator=source)

    step((0, 0))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(generator)
    for _ in range(3):
        before = generator.state
        graph.replay()
        torch.cuda.synchronize()
        assert generator.state != before
        assert torch.equal(captured, step(before))


def test_a_generator_on_the_device_is_the_same_generator(cp: Any) -> None:
    on_host, on_device = cuflash.PhiloxGenerator(9, 4), cuflash.PhiloxGenerator(9, 4).to_device()
    q, k, v = (cp.asarray(x) for x in inputs()[:3])
    for _ in range(3):
        outs = [cuflash.flash_attn_func(q, k, v, 0.3, generator=each).get() for each in (on_host, on_device)]
        np.testing.assert_array_equal(*outs)
        assert on_host.state == on_device.state
    assert on_host.next(5) == on_device.next(5) and on_host.state == on_device.state
    address = on_device.address(0)
    assert on_device.to_device(0).manual_seed(3).state == (3, 0) and on_device.address(0) == address


def test_the_context_survives_refused_calls(cp: Any) -> None:
    q, k, v = (cp.asarray(x) for x in inputs()[:3])
    expected = cuflash.flash_attn_func(q, k, v).get()
    raw = cp.zeros(2 * 80 * 4 * 64 * 2 + 2, cp.uint8)
    misaligned = cp.ndarray(q.shape, q.dtype, raw.data + 1)
    wide = cp.zeros((1, 8, 1, 2048), FP16)
    starts = cp.asarray(STARTS_Q)
    refused = {
        "dtype": lambda: cuflash.flash_attn_func(q.astype(cp.int16), k, v),
        "mixed dtypes": lambda: cuflash.flash_attn_func(q, k.astype(cp.float32), v),
        "host array": lambda: cuflash.flash_attn_func(q, k, v.get()),
        "misaligned": lambda: cuflash.flash_attn_func(misaligned, k, v),
        "last dim": lambda: cuflash.flash_attn_func(q[..., ::2], k[..., ::2], v),
        "heads": lambda: cuflash.flash_attn_func(q[:, :, :3], k, v),
        "out": lambda: cuflash.flash_attn_func(q, k, v, out=q),
        "window": lambda: cuflash.flash_attn_func(q, k, v, window_size=(-2, 0)),
        "starts": lambda: cuflash.flash_attn_varlen_func(q[0], k[0], v[0], starts.astype(cp.int64), starts),
        "starts beyond": lambda: cuflash.flash_attn_varlen_func(q[0, :70], k[0], v[0], starts, starts),
        "too wide": lambda: cuflash.flash_attn_func(wide, wide, wide),
    }
    for name, call in refused.items():
        with pytest.raises((InvalidArgument, UnsupportedProblem)):
            call()
        cp.cuda.Device().synchronize()
        np.testing.assert_array_equal(cuflash.flash_attn_func(q, k, v).get(), expected, err_msg=name)


def test_requires_grad_is_recorded() -> None:
    library = WithTorch()
    x = library.put(random(1, 64, 2, 64)).requires_grad_()
    cuflash.flash_attn_func(x, x, x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bool(x.grad.isfinite().all())
    with library.torch.no_grad():
        assert not cuflash.flash_attn_func(x, x, x).requires_grad


def test_libraries_do_not_mix(cp: Any) -> None:
    library = WithTorch()
    x = random(1, 64, 2, 64)
    with pytest.raises(InvalidArgument, match="k is a CuPy array but q is a torch array"):
        cuflash.flash_attn_func(library.put(x), cp.asarray(x), library.put(x))


def test_memory_grows_with_the_lengths_only(cp: Any) -> None:
    peaks = {}
    for length in (32768, 65536):
        q, k, v, dout = (cp.asarray(random(1, length, 2, 64, seed=seed)) for seed in range(4))
        pool = cp.cuda.MemoryPool()
        with cp.cuda.using_allocator(pool.malloc):
            _, pullback = cuflash.flash_attn_vjp(q, k, v, causal=True)
            forward = pool.total_bytes()
            gradients = pullback(dout)
            peaks[length] = pool.total_bytes()
        assert forward < 1.5 * q.nbytes, f"forward took {forward} bytes at {length}"
        assert np.isfinite(gradients[0].get()).all()
    assert peaks[65536] < 2.1 * peaks[32768]
    assert peaks[65536] < 10 * 65536 * 2 * 64 * 2


def test_arrays_on_another_device_than_the_current(cp: Any) -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one GPU")
    arrays = inputs()
    with cp.cuda.Device(1):
        q, k, v, dout, dlse = (cp.asarray(x) for x in arrays)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, return_lse=True)
    results = [out, lse, *pullback(dout, dlse)]
    assert all(x.device.id == 1 for x in results) and cp.cuda.Device().id == 0
    assert_right([x.get() for x in results], arrays)
    with pytest.raises(InvalidArgument, match="k is on cuda:0 but q is on cuda:1"):
        cuflash.flash_attn_func(q, cp.asarray(arrays[1]), v)


def test_threads_on_their_own_streams(cp: Any) -> None:
    tensors = [[cp.asarray(random(1, n, 2, 64, seed=seed)) for seed in range(3)] for n in (64, 100, 128, 200)]
    expected = [cuflash.flash_attn_func(*x).get() for x in tensors]
    wrong: list[int] = []

    def work(i: int) -> None:
        with cp.cuda.Stream(non_blocking=True) as stream:
            for _ in range(20):
                out = cuflash.flash_attn_func(*tensors[i])
                stream.synchronize()
                if not np.array_equal(out.get(), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tensors))]
    cp.cuda.Device().synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_explain_uses_the_arrays_device(library: Library, cp: Any) -> None:
    x = library.put(random(1, 96, 2, 64))
    report = cuflash.explain(x, x, x, causal=True)
    hopper = cp.cuda.Device().compute_capability == "90"
    assert report.plan is not None and report.plan.family == ("sm90" if hopper else "sm80")
