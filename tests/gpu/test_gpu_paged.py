"""Keys in the pages of a cache on a GPU: any table, holes behind the last key, and boxes of the copy engine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16

import cuflash

pytestmark = pytest.mark.gpu

ROOM = 32_768
"""Keys that there is room for in a sequence: so many that Hopper's own kernel reads them, however few they are."""


class Cache:
    """Sequences of some lengths over pages in random order; rows of no key are NaN, and numbers of no page wild."""

    def __init__(self, lens: tuple[int, ...], page_size: int, heads: int, dim: int, dtype: Any, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, page_size, *lens])
        counts = [-(-n // page_size) for n in lens]
        pages = rng.permutation(sum(counts) + 3)
        self.table = np.full((len(lens), -(-ROOM // page_size)), 2**31 - 1, np.int32)
        self.rows = [rng.standard_normal((n, 2, heads, dim)).astype(dtype) for n in lens]
        self.kv = np.full((len(pages), page_size, 2, heads, dim), np.nan, dtype)
        for b, (n, count) in enumerate(zip(lens, counts, strict=True)):
            self.table[b, :count], pages = pages[:count], pages[count:]
            page, row = np.divmod(np.arange(n), page_size)
            self.kv[self.table[b, page], row] = self.rows[b]

    def on_gpu(self, cp: Any) -> tuple[Any, Any, Any]:
        """k, v and the table; k and v lie side by side, rows of every second head apart."""
        kv = cp.asarray(self.kv)
        return kv[:, :, 0], kv[:, :, 1], cp.asarray(self.table)


def check(cache: Cache, q: list[np.ndarray], out: list[np.ndarray], lse: list[np.ndarray], **words: Any) -> None:
    """Compare sequence by sequence, rows as (q, h, d) and (h, q)."""
    for b, rows in enumerate(cache.rows):
        one = q[b][None], rows[None, :, 0], rows[None, :, 1]
        exact, naive = oracle.attention(*one, **words), oracle.naive_in_dtype(*one, **words)
        oracle.assert_all_close(oracle.Attention(out[b][None], lse[b][None]), exact, naive, f"sequence {b}")


LENS = (700, 1, 64, 3000, 0, 65, 333, 128)


def on_hopper(cp: Any, heads: str, *call: Any, **words: Any) -> None:
    """That a call goes to Hopper's own kernel, where there is one."""
    if cp.cuda.Device().compute_capability == "90":
        (step,) = (step for step in cuflash.explain(*call, **words).plan.steps if step.kernel == "fwd_sm90")
        assert step.config.heads == heads


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("page_size", [8, 16, 48, 64, 256])
def test_few_queries_over_pages(cp: Any, page_size: int, dtype: Any) -> None:
    rng = np.random.default_rng(page_size)
    for len_q, group, dim in ((1, 4, 128), (3, 8, 64), (16, 4, 40)):
        cache = Cache(LENS, page_size, 2, dim, dtype)
        k, v, table = cache.on_gpu(cp)
        causal, left = bool(rng.integers(2)), int(rng.choice([-1, 30, 500]))
        q = rng.standard_normal((len(LENS), len_q, 2 * group, dim)).astype(dtype)
        words = {"causal": causal, "window": (left, -1)}
        given = {"cache_seqlens": cp.asarray(LENS, np.int32), "block_table": table, "causal": causal}
        results = cuflash.flash_attn_with_kvcache(
            cp.asarray(q), k, v, **given, window_size=(left, -1), return_softmax_lse=True
        )
        out, lse = (x.get() for x in results)
        check(cache, q, out, lse, **words)
        for _ in range(5):
            again = cuflash.flash_attn_with_kvcache(cp.asarray(q), k, v, **given, window_size=(left, -1))
            assert again.get().tobytes() == out.tobytes()


@pytest.mark.parametrize("page_size", [64, 192])
@pytest.mark.parametrize("len_q", [1, 16])
def test_one_sequence_in_pages(cp: Any, len_q: int, page_size: int) -> None:
    """All blocks share its keys, however many of them are in use."""
    for length in (5000, 100, 0):
        cache = Cache((length,), page_size, 4, 128, BF16)
        k, v, table = cache.on_gpu(cp)
        q = np.random.default_rng(length).standard_normal((1, len_q, 16, 128)).astype(BF16)
        given = {"cache_seqlens": cp.asarray([length], np.int32), "block_table": table, "causal": True}
        results = [
            [x.get() for x in cuflash.flash_attn_with_kvcache(cp.asarray(q), k, v, **given, return_softmax_lse=True)]
            for _ in range(3)
        ]
        assert len({out.tobytes() for out, _ in results}) == 1
        check(cache, q, *results[0], causal=True)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("longest", [16, 130])
def test_packed_queries_over_pages(cp: Any, longest: int, page_size: int) -> None:
    """A chunk of some, one token of others."""
    lens_q = [longest if n == 700 else min(n, 20 * (b % 2) or 1, longest) for b, n in enumerate(LENS)]
    starts_q, starts_k = (np.cumsum((0, *lens), dtype=np.int32) for lens in (lens_q, LENS))
    for dim, causal, left in ((128, page_size > 16, -1), (64, True, 100), (256, True, 500)):
        cache = Cache(LENS, page_size, 2, dim, BF16, longest)
        k, v, table = cache.on_gpu(cp)
        q = np.random.default_rng(longest).standard_normal((starts_q[-1] + 3, 8, dim)).astype(BF16)
        given = {"cu_seqlens_q": cp.asarray(starts_q), "cu_seqlens_k": cp.asarray(starts_k), "block_table": table}
        words = {"max_seqlen_q": longest, "max_seqlen_k": ROOM, "causal": causal, "window_size": (left, -1)}
        call = cp.asarray(q), k, v
        on_hopper(cp, "HeadGroup", *call, **given, **words)
        results = cuflash.flash_attn_varlen_func(*call, **given, **words, return_lse=True)
        out, lse = (x.get() for x in results)
        rows = [slice(*ends) for ends in pairwise(starts_q)]
        each = [q[at] for at in rows], [out[at] for at in rows], [lse[:, at] for at in rows]
        check(cache, *each, causal=causal, window=(left, -1))
        assert not out[starts_q[-1] :].any() and np.isneginf(lse[:, starts_q[-1] :]).all(), "rows of no sequence"


@pytest.mark.parametrize("len_q", [1, 12, 100])
@pytest.mark.parametrize("leftpad", [False, True])
def test_a_cache_whose_lengths_the_gpu_knows(cp: Any, leftpad: bool, len_q: int) -> None:
    """Dense, with the rows behind the keys and before them NaN."""
    rng = np.random.default_rng(len_q)
    used = np.array([900, 64, 2000, 1, 130, 0], np.int32)
    first = np.minimum([3, 0, 700, 0, 17, 0], used).astype(np.int32) if leftpad else np.zeros(6, np.int32)
    places = np.array([4, 0, 1, 5, 3, 6], np.int32)
    kv = np.full((7, 8192, 2, 2, 128), np.nan, BF16)
    for place, a, b in zip(places, first, used, strict=True):
        kv[place, a:b] = rng.standard_normal((b - a, 2, 2, 128)).astype(BF16)
    q = rng.standard_normal((6, len_q, 8, 128)).astype(BF16)
    on_gpu = cp.asarray(kv)
    out, lse = cuflash.flash_attn_with_kvcache(
        cp.asarray(q), on_gpu[:, :, 0], on_gpu[:, :, 1], cache_seqlens=cp.asarray(used), causal=True,
        cache_batch_idx=cp.asarray(places), cache_leftpad=cp.asarray(first) if leftpad else None,
        return_softmax_lse=True,
    )  # fmt: skip
    for i, (place, a, b) in enumerate(zip(places, first, used, strict=True)):
        one = q[i][None], kv[place, a:b, 0][None], kv[place, a:b, 1][None]
        exact, naive = oracle.attention(*one, causal=True), oracle.naive_in_dtype(*one, causal=True)
        oracle.assert_all_close(oracle.Attention(out[i].get()[None], lse[i].get()[None]), exact, naive, f"sequence {i}")


def test_keys_are_appended_and_turned_before_the_copy_engine_reads(cp: Any) -> None:
    """Results are those of the NumPy backend; other kernels have just written the last keys of the pages."""
    rng = np.random.default_rng(0)
    used = np.array([500, 63, 0, 2000], np.int32)
    cache = Cache(tuple(used + 4), 16, 2, 128, BF16)
    q = rng.standard_normal((4, 4, 8, 128)).astype(BF16)
    new = rng.standard_normal((2, 4, 4, 2, 128)).astype(BF16)
    angles = rng.random((ROOM, 64)).astype(np.float32)
    given = {"rotary_cos": np.cos(angles).astype(BF16), "rotary_sin": np.sin(angles).astype(BF16)}
    given |= {"k": new[0], "v": new[1], "cache_seqlens": used, "block_table": cache.table}
    words = {"causal": True, "rotary_interleaved": False, "return_softmax_lse": True}
    kv = cp.asarray(cache.kv)
    results = cuflash.flash_attn_with_kvcache(
        cp.asarray(q), kv[:, :, 0], kv[:, :, 1], **{n: cp.asarray(x) for n, x in given.items()}, **words
    )
    expected = cuflash.flash_attn_with_kvcache(q, cache.kv[:, :, 0], cache.kv[:, :, 1], **given, **words)
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x.get().astype(np.float32), y.astype(np.float32), rtol=0.02, atol=0.02)
