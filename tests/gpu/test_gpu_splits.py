"""Few queries on a GPU: keys split between blocks, heads that share a tile, and what both promise about bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, random

import cuflash

pytestmark = pytest.mark.gpu


def inputs(len_q: int, len_kv: int, group: int, batch: int = 2, dim: int = 64, dtype: Any = FP16) -> list[np.ndarray]:
    """q, k and v of two key heads."""
    shapes = (batch, len_q, 2 * group, dim), (batch, len_kv, 2, dim), (batch, len_kv, 2, dim)
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [FP16, BF16, np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_lengths_groups_and_splits(cp: Any, group: int, dtype: Any) -> None:
    rng = np.random.default_rng(group)
    for len_q in (1, 3, 17):
        for num_splits in (0, 1, 2, 5, 128):
            len_kv = int(rng.choice([1, 63, 64, 65, 300, 1000, 5000]))
            causal, left = bool(rng.integers(2)), int(rng.choice([-1, 0, 40, 700]))
            options = {"causal": causal, "window_size": (left, -1)}
            arrays = inputs(len_q, len_kv, group, dtype=dtype)
            results = cuflash.flash_attn_func(
                *map(cp.asarray, arrays), **options, num_splits=num_splits, return_lse=True
            )
            expected = {"causal": causal, "window": (left, -1)}
            exact, naive = oracle.attention(*arrays, **expected), oracle.naive_in_dtype(*arrays, **expected)
            oracle.assert_all_close(oracle.Attention(*(x.get() for x in results)), exact, naive)


@pytest.mark.parametrize("num_splits", [0, 1, 3, 128])
def test_packed_sequences(cp: Any, num_splits: int) -> None:
    lens_q, lens_kv = (1, 0, 3, 17, 1), (5000, 40, 0, 700, 64)
    starts = [np.cumsum((0, *lens), dtype=np.int32) for lens in (lens_q, lens_kv)]
    used = np.array([4900, 40, 0, 64, 64], np.int32)
    q, k, v = random(25, 8, 64), random(starts[1][-1], 2, 64, seed=1), random(starts[1][-1], 2, 64, seed=2)
    lengths = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "seqused_k": used}
    results = cuflash.flash_attn_varlen_func(
        *map(cp.asarray, (q, k, v)), **{name: cp.asarray(x) for name, x in lengths.items()}, causal=True,
        num_splits=num_splits, return_lse=True,
    )  # fmt: skip
    exact, naive = (f(q, k, v, **lengths, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*(x.get() for x in results)), exact, naive)
    out, lse = (x.get() for x in results)
    assert not out[22:].any() and np.isneginf(lse[:, 22:]).all(), "rows of no sequence"


@pytest.mark.parametrize("num_splits", [0, 7, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_repeats_are_bit_equal(cp: Any, num_splits: int, dropout_p: float) -> None:
    arrays = [cp.asarray(x) for x in inputs(3, 4000, 8)]
    options = {"num_splits": num_splits, "return_lse": True, "dropout_p": dropout_p, "generator": (5, 8)}
    first = [x.tobytes() for x in cuflash.flash_attn_func(*arrays, **options)]
    for _ in range(19):
        assert [x.tobytes() for x in cuflash.flash_attn_func(*arrays, **options)] == first


@pytest.mark.parametrize("dtype", [FP16, BF16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_one_split_gives_a_row_the_same_bits_in_any_batch(cp: Any, dtype: Any) -> None:
    q, k, v = (cp.asarray(x) for x in inputs(1, 3000, 4, batch=33, dtype=dtype))
    options = {"causal": True, "num_splits": 1, "return_lse": True}
    together = cuflash.flash_attn_func(q, k, v, **options)
    for b in (0, 7, 32):
        alone = cuflash.flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
        assert [x.tobytes() for x in alone] == [x[b].tobytes() for x in together]

    # The same sequence among packed ones of other lengths.
    lens = [1, 3000, 500]
    starts_q, starts_k = (cp.asarray(np.cumsum((0, *n), dtype=np.int32)) for n in ((1, 1, 200), lens))
    rows = [cp.concatenate([x[0, :n] for n in lens]) for x in (k, v)]
    packed_q = cp.concatenate([q[1], q[0], cp.repeat(q[2], 200, 0)])
    out, lse = cuflash.flash_attn_varlen_func(packed_q, *rows, starts_q, starts_k, **options)
    assert out[1].tobytes() == together[0][0, 0].tobytes()
    assert cp.ascontiguousarray(lse[:, 1]).tobytes() == together[1][0, :, 0].tobytes()


def test_every_number_of_splits_serves_the_gradients(cp: Any) -> None:
    arrays = inputs(17, 2000, 4)
    dout = random(*arrays[0].shape, seed=9)
    exact, naive = (f(*arrays, dout, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    q, k, v = map(cp.asarray, arrays)
    for num_splits in (0, 1, 6):
        out, lse = cuflash.flash_attn_func(q, k, v, causal=True, num_splits=num_splits, return_lse=True)
        grads = cuflash.flash_attn_backward(cp.asarray(dout), q, k, v, out, lse, causal=True, deterministic=True)
        results = oracle.Attention(*(x.get() for x in (out, lse, *grads)))
        oracle.assert_all_close(results, exact, naive)


def test_capture_with_scratch_memory(cp: Any) -> None:
    arrays = inputs(1, 4000, 8)
    q, k, v = places = [cp.asarray(x) for x in arrays]
    assert cuflash.explain(q, k, v).plan.num_splits > 1
    cuflash.flash_attn_func(q, k, v, return_lse=True)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        captured = cuflash.flash_attn_func(q, k, v, return_lse=True)
        graph = stream.end_capture()
    for seed in (10, 11):
        for place, x in zip(places, arrays, strict=True):
            place[...] = cp.asarray(random(*x.shape, seed=seed))
        expected = [x.get() for x in cuflash.flash_attn_func(q, k, v, return_lse=True)]
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for x, y in zip(captured, expected, strict=True):
            np.testing.assert_array_equal(x.get(), y)


def test_scratch_memory_is_what_explain_says(cp: Any) -> None:
    q, k, v = (cp.asarray(x) for x in inputs(3, 4000, 8))
    plan = cuflash.explain(q, k, v, num_splits=11).plan
    # In tiles of 32 rows, out and two numbers of each row's softmax; and how many parts of a tile are there.
    assert plan.workspace_bytes == 11 * 4 * 32 * (64 + 2) * 4 + 4 * 4
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        out = cuflash.flash_attn_func(q, k, v, num_splits=11)
        assert pool.total_bytes() <= plan.workspace_bytes + out.nbytes + 16 * 1024


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(("len_q", "group"), [(5, 8), (9, 4), (16, 4), (32, 2), (1, 64)])
def test_a_group_of_heads_in_one_tile_of_hoppers(cp: Any, len_q: int, group: int, dtype: Any) -> None:
    rng = np.random.default_rng(len_q)
    for len_kv in (1, 65, 700, 3000):
        dim, batch = int(rng.choice([40, 64, 128])), int(rng.choice([1, 3, 70]))
        words = {"causal": bool(rng.integers(2)), "softcap": float(rng.choice([0, 2]))}
        left = int(rng.choice([-1, 40, 3000]))
        arrays = inputs(len_q, len_kv, group, batch if len_kv == 65 else 1, dim, dtype)
        sink = random(2 * group, dtype=np.float32, seed=7)
        given, expected = {"window_size": (left, -1), "sink": cp.asarray(sink)}, {"window": (left, -1), "sink": sink}
        on_gpu = [*map(cp.asarray, arrays)]
        if cp.cuda.Device().compute_capability == "90":
            (step,) = (s for s in cuflash.explain(*on_gpu, **words).plan.steps if s.kernel == "fwd_sm90")
            assert step.config.heads == "HeadGroup"
        results = cuflash.flash_attn_func(*on_gpu, **words, **given, return_lse=True)
        exact, naive = (f(*arrays, **words, **expected) for f in (oracle.attention, oracle.naive_in_dtype))
        oracle.assert_all_close(oracle.Attention(*(x.get() for x in results)), exact, naive)


@pytest.mark.parametrize(
    ("len_q", "group", "dim"), [(17, 4, 128), (64, 4, 64), (33, 8, 256), (100, 1, 128), (200, 1, 64)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_some_queries_over_long_keys(cp: Any, len_q: int, group: int, dim: int, causal: bool) -> None:
    """Chunks of a prompt and tokens to be verified: several consumers have the rows, several blocks the keys."""
    arrays = inputs(len_q, 5000, group, 1, dim, BF16)
    on_gpu = [*map(cp.asarray, arrays)]
    if cp.cuda.Device().compute_capability == "90":
        plan = cuflash.explain(*on_gpu, causal=causal).plan
        assert plan.family == "sm90" and plan.num_splits > 1
    for words in ({}, {"window_size": (2000, 0 if causal else 7), "softcap": 3.0}):
        results = cuflash.flash_attn_func(*on_gpu, causal=causal, **words, return_lse=True)
        expected = {"window" if name == "window_size" else name: value for name, value in words.items()}
        exact, naive = (f(*arrays, causal=causal, **expected) for f in (oracle.attention, oracle.naive_in_dtype))
        oracle.assert_all_close(oracle.Attention(*(x.get() for x in results)), exact, naive)
        again = cuflash.flash_attn_func(*on_gpu, causal=causal, **words, return_lse=True)
        assert [x.tobytes() for x in results] == [x.tobytes() for x in again]


def test_one_query_over_more_keys_than_a_cache_of_the_gpu_holds(cp: Any) -> None:
    arrays = inputs(1, 50_000, 4, batch=1, dim=128)
    results = cuflash.flash_attn_func(*map(cp.asarray, arrays), return_lse=True)
    exact, naive = (f(*arrays) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*(x.get() for x in results)), exact, naive)
