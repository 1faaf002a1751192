"""Caches of multi-head latent attention on a GPU: one key head, whose first columns are the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest

pytestmark = pytest.mark.gpu

DIM_QK, DIM_V, ROOM = 576, 512, 2048
LENGTHS = (1500, 1, 700, 64, 1987)


def packed(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys one sequence after the other, and where each starts."""
    return np.concatenate(keys), np.cumsum([0, *map(len, keys)], dtype=np.int32)


def expected(q: np.ndarray, keys: list[np.ndarray], causal: bool) -> list[oracle.Attention]:
    """The exact and the naive answer."""
    k, starts = packed(keys)
    batch, len_q, heads, _ = q.shape
    inputs = q.reshape(-1, heads, DIM_QK), k, k[..., :DIM_V]
    options = {"cu_seqlens_q": np.arange(batch + 1) * len_q, "cu_seqlens_k": starts, "causal": causal}
    return [f(*inputs, **options) for f in (oracle.attention, oracle.naive_in_dtype)]


@pytest.mark.parametrize("page_size", [0, 64, 16, 8])
@pytest.mark.parametrize(("heads", "len_q"), [(128, 1), (16, 1), (16, 4), (64, 3), (24, 1)])
def test_cache(cp: Any, heads: int, len_q: int, page_size: int) -> None:
    """What no sequence uses is NaN; more and fewer heads than rows of a tile, and a group that no tile holds."""
    import cuflash

    rng, batch = np.random.default_rng(heads + page_size), len(LENGTHS)
    q = rng.standard_normal((batch, len_q, heads, DIM_QK), np.float32).astype(np.float16)
    cache = np.full((batch, ROOM, 1, DIM_QK), np.nan, np.float16)
    for b, length in enumerate(LENGTHS):
        cache[b, :length] = rng.standard_normal((length, 1, DIM_QK), np.float32)
    keys = [cache[b, :length] for b, length in enumerate(LENGTHS)]
    options: dict[str, Any] = {"cache_seqlens": cp.asarray(np.array(LENGTHS, np.int32)), "causal": len_q > 1}
    if page_size:
        pages = batch * ROOM // page_size
        table = rng.permutation(pages).astype(np.int32).reshape(batch, -1)
        memory = np.empty((pages, page_size, 1, DIM_QK), np.float16)
        memory[table.ravel()] = cache.reshape(pages, page_size, 1, DIM_QK)
        cache = memory
        options["block_table"] = cp.asarray(table)
    k = cp.asarray(cache)
    out, lse = cuflash.flash_attn_with_kvcache(
        cp.asarray(q), k, k[..., :DIM_V], return_softmax_lse=True, **options
    )  # fmt: skip
    exact, naive = expected(q, keys, len_q > 1)
    oracle.assert_close(cp.asnumpy(out).reshape(-1, heads, DIM_V), exact.out, naive.out, "out")
    computed = cp.asnumpy(lse).transpose(1, 0, 2).reshape(heads, -1)
    oracle.assert_close(computed, exact.lse, naive.lse, "lse")


@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_repeats_are_bit_equal_and_like_separate_values(cp: Any, num_splits: int) -> None:
    import cuflash

    rng = np.random.default_rng(0)
    q, k = (cp.asarray(rng.standard_normal(shape, np.float32).astype(np.float16)) for shape in
            ((3, 1, 128, DIM_QK), (3, 1000, 1, DIM_QK)))  # fmt: skip
    answers = [cuflash.flash_attn_func(q, k, k[..., :DIM_V], num_splits=num_splits) for _ in range(10)]
    assert len({answer.tobytes() for answer in answers}) == 1
    apart = cuflash.flash_attn_func(q, k, k[..., :DIM_V].copy(), num_splits=num_splits)
    np.testing.assert_allclose(
        cp.asnumpy(apart).astype(np.float32), cp.asnumpy(answers[0]).astype(np.float32), atol=2e-3
    )


def test_a_prepared_call_refuses_values_elsewhere(cp: Any) -> None:
    import cuflash
    from cuflash.errors import InvalidArgument

    k = cp.zeros((2, 100, 1, DIM_QK), np.float16)
    q = cp.zeros((2, 1, 16, DIM_QK), np.float16)
    call = cuflash.flash_attn_prepare(q, k, k[..., :DIM_V])
    call(q, k, k[..., :DIM_V])
    other = cp.zeros_like(k)
    with pytest.raises(InvalidArgument, match="values do not begin where the keys do"):
        call(q, k, other[..., :DIM_V])
