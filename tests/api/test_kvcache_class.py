"""The cache class, held to sequences kept as plain lists of rows, through random appends, reorders and clears."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import BF16, random

import cuflash
from cuflash.errors import InvalidArgument

HEADS, DIM, DIM_V, LAYERS = 2, 8, 6, 2


class Twin:
    """What a cache should hold: for each sequence and layer, its rows of keys and of values."""

    def __init__(self, sequences: int) -> None:
        self.rows = [
            [[np.zeros((0, HEADS, d), np.float32) for d in (DIM, DIM_V)] for _ in range(LAYERS)]
            for _ in range(sequences)
        ]

    def append(self, b: int, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.rows[b][layer] = [np.concatenate(pair) for pair in zip(self.rows[b][layer], (k, v), strict=True)]

    def check(self, cache: cuflash.KVCache) -> None:
        batch = len(self.rows)
        assert cache.lengths == [len(of[0][0]) for of in self.rows] == cache.seqlens.tolist()
        q = random(batch, 1, 2 * HEADS, DIM, dtype=np.float32, seed=9)
        for layer in range(LAYERS):
            out, lse = cache.attend(q, layer=layer, return_softmax_lse=True)
            for b, of in enumerate(self.rows):
                exact = oracle.attention(q[b : b + 1], *(x[None] for x in of[layer]))
                naive = oracle.naive_in_dtype(q[b : b + 1], *(x[None] for x in of[layer]))
                oracle.assert_close(out[b : b + 1], exact.out, naive.out, f"sequence {b}")
                oracle.assert_close(lse[b : b + 1], exact.lse, naive.lse, f"lse {b}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cache_holds_what_was_appended(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 4), "sequences")
    page_size = data.draw(st.sampled_from([None, 1, 3, 16]), "page size")
    like = np.zeros(1, np.float32)
    cache = cuflash.KVCache(batch, 30, HEADS, DIM, like=like, layers=LAYERS, dim_v=DIM_V, page_size=page_size)
    cache.k[...], cache.v[...] = np.nan, np.nan
    twin = Twin(batch)
    for turn in range(data.draw(st.integers(1, 6), "turns")):
        what = data.draw(st.sampled_from(["append", "append", "ragged", "reorder", "clear", "failed"]), "what")
        if what == "reorder":
            order = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch), "order")
            try:
                cache.reorder(order)
            except InvalidArgument as error:
                assert "pages are needed for copies" in str(error)
                continue
            twin.rows = [[[x.copy() for x in pair] for pair in twin.rows[i]] for i in order]
        elif what == "clear":
            b = data.draw(st.integers(0, batch - 1))
            cache.clear(b)
            twin.rows[b] = Twin(1).rows[0]
        else:
            counts = [data.draw(st.integers(0, 5))] * batch
            if what == "ragged":
                counts = [data.draw(st.integers(0, 5)) for _ in range(batch)]
            most = max(counts)
            if max(cache.lengths) + most > cache.length:
                continue
            k, v = (random(LAYERS, batch, most, HEADS, d, dtype=np.float32, seed=turn * 7 + d) for d in (DIM, DIM_V))
            q = random(batch, most, 2 * HEADS, DIM, dtype=np.float32)
            with pytest.raises(KeyError) if what == "failed" else cache.room(counts if what == "ragged" else most):
                if what == "failed":
                    with cache.room(most):
                        cache.append(k[0], v[0])
                        raise KeyError
                cache.append(k[0], v[0], 0)
                cache.attend(q, k[1], v[1], 1, causal=True)
            if what != "failed":
                for b, count in enumerate(counts):
                    for layer in range(LAYERS):
                        twin.append(b, layer, k[layer, b, :count], v[layer, b, :count])
        twin.check(cache)
    if page_size:
        table = zip(cache.block_table.tolist(), cache.lengths, strict=True)
        used = {page for pages, rows in table for page in pages[: -(-rows // page_size)]}
        assert len(cache._pages.free) + len(used) == cache.k.shape[1]
    cache.clear()
    assert cache.lengths == [0] * batch
    assert not page_size or sorted(cache._pages.free) == list(range(cache.k.shape[1]))


def test_ragged_prompts_see_their_own_rows_alone() -> None:
    q, k, v = (random(3, 7, n, 8, dtype=np.float32, seed=n) for n in (4, 2, 2))
    counts = [3, 7, 1]
    for page_size in (None, 2):
        cache = cuflash.KVCache(3, 20, 2, 8, like=q, page_size=page_size)
        with cache.room(counts):
            out = cache.attend(q, k, v, causal=True)
        assert cache.lengths == counts
        for b, count in enumerate(counts):
            own = cuflash.flash_attn_func(*(x[b : b + 1, :count] for x in (q, k, v)), causal=True)
            np.testing.assert_allclose(out[b : b + 1, :count], own, atol=1e-6)


def test_whole_pages_are_shared_and_begun_ones_copied() -> None:
    k = random(2, 6, 2, 8, dtype=np.float32)
    cache = cuflash.KVCache(2, 40, 2, 8, like=k, page_size=4, num_pages=5)
    with cache.room(6):
        cache.append(k, k)
    assert "4 of 5 pages of 4 in use" in repr(cache)
    cache.reorder([1, 1])
    table = cache.block_table
    assert table[0, 0] == table[1, 0] and table[0, 1] != table[1, 1]
    assert "3 of 5 pages of 4 in use" in repr(cache)
    with pytest.raises(InvalidArgument, match="4 more pages are needed, but 2 of 5 are free"), cache.room(10):
        pass
    assert cache.lengths == [6, 6]
    with cache.room(2):
        cache.append(k[:, :2], k[:, :2])
    cache.clear(0)
    assert "2 of 5 pages of 4 in use" in repr(cache)


def test_it_prints_itself() -> None:
    like = np.zeros(3, BF16)
    dense = cuflash.KVCache(9, 100, 2, 64, like=like, layers=3, dim_v=32)
    nbytes = 9 * 100 * 2 * 96 * 3 * 2
    assert dense.nbytes == nbytes
    assert repr(dense) == (
        "<KVCache: 3 layers, 9 sequences of 0, 0, 0, 0, 0, 0, 0, 0, ... rows, 100 at most, 2 heads of 64 and 32, "
        f"bfloat16 on cpu, {nbytes:,} bytes>"
    )
    assert dense.k.base is dense.v.base
    assert str(dense).count("0 of 100 rows") == dense._repr_html_().count("0 of 100 rows") == 9
    with dense.room([0, 50, *[0] * 7]):
        pass
    assert "█" * 20 + "·" * 20 + " 50 of 100 rows" in str(dense)


def test_a_prepared_layer_attends() -> None:
    q, k, v = (random(2, 1, n, 8, dtype=np.float32, seed=n) for n in (4, 2, 2))
    one, other = (cuflash.KVCache(2, 20, 2, 8, like=q, page_size=3) for _ in range(2))
    step = one.prepare(q, k, v, causal=True)
    for _ in range(4):
        with one.room(1), other.room(1):
            np.testing.assert_array_equal(step(q, k, v)[0], other.attend(q, k, v, causal=True))


LIKE = np.zeros(1, np.float32)
WRONG = {
    "like": (lambda: cuflash.KVCache(1, 2, 3, 4, like=[1]), "like is a list"),
    "dtype": (lambda: cuflash.KVCache(1, 2, 3, 4, like=np.zeros(1, int)), "like is int64; expected float16"),
    "length": (lambda: cuflash.KVCache(1, 0, 3, 4, like=LIKE), "length is 0; expected a positive integer"),
    "pages": (lambda: cuflash.KVCache(1, 2, 3, 4, like=LIKE, num_pages=3), "num_pages is 3 but page_size is None"),
    "rows": (lambda: cache().room([1, 2, 3]).__enter__(), r"rows is \[1, 2, 3\]; expected how many rows are new"),
    "negative": (lambda: cache().room(-1).__enter__(), "rows is -1"),
    "long": (lambda: cache().room(11).__enter__(), "sequence 0 has 0 rows and would get 11 more, but length is 10"),
    "no room": (lambda: cache().append(K, K), "k has 1 rows, but there is room for 0; append what"),
    "layer": (lambda: cache().attend(K, layer=1), "layer is 1; expected one from 0 to 0"),
    "order": (lambda: cache().reorder([0]), r"origins is \[0\]; expected 2 numbers of sequences, from 0 to 1"),
    "sequence": (lambda: cache().clear(2), "sequence is 2; expected one from 0 to 1"),
}  # fmt: skip
K = np.zeros((2, 1, 2, 8), np.float32)


def cache() -> cuflash.KVCache:
    return cuflash.KVCache(2, 10, 2, 8, like=LIKE)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_room_is_made_once() -> None:
    made = cache()
    with made.room(1), pytest.raises(InvalidArgument, match="room is made while room is made"), made.room(1):
        pass
