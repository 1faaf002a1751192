"""Caches that are appended to and attended over, by every backend, held to attention over rows gathered by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
from backends import LEFT_BY_HOPPER, Backend
from doubles.arrays import as_torch, to_numpy
from doubles.launch import Launches, needs_compiler
from inputs import BF16, FP16, random

import cuflash
from cuflash import ops
from cuflash.adapters.torch.tensors import Torch
from cuflash.api.cache import cache_call
from cuflash.errors import InvalidArgument


@dataclass(frozen=True)
class Cached:
    """One call: sizes, what of the cache is in use, and the words of the public function."""

    used: tuple[int, ...] | int | None = (30, 0, 77)
    len_q: int = 1
    new: int | None = None
    page: int = 0
    pad: tuple[int, ...] | None = None
    elements: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 24)
    room: int = 96
    rotary: int = 0
    angles: Any = None
    """The dtype of cosines and sines, that of q by default."""
    dtype: Any = FP16
    strided: bool = False
    words: dict[str, Any] = field(default_factory=dict)


ALIBI = np.random.default_rng(5).uniform(0.02, 0.3, (3, 4)).astype(np.float32)
SINK = np.random.default_rng(6).standard_normal(4).astype(np.float32)
MASK = np.random.default_rng(7).random((3, 1, 5, 96)) < 0.7
HALVES = {"rotary_interleaved": False}
CAUSAL = {"causal": True}
CASES = {
    "lengths": Cached(),
    "number": Cached(used=50),
    "whole": Cached(used=None),
    "empty": Cached(used=(0, 0, 0), len_q=2),
    "append": Cached(new=1, words=CAUSAL),
    "append-number": Cached(used=95, new=1),
    "append-to-nothing": Cached(used=0, new=3, len_q=3, words=CAUSAL),
    "append-more-than-asked": Cached(new=5, len_q=2, words=CAUSAL),
    "append-nothing": Cached(new=0),
    "strided": Cached(new=2, len_q=2, strided=True, rotary=32, words=CAUSAL),
    "elements": Cached(elements=(4, 0, 2), new=2, len_q=5, words=CAUSAL),
    "padded": Cached(pad=(7, 0, 77), new=1, rotary=16, words=CAUSAL),
    "padded-queries": Cached(pad=(29, 0, 77), len_q=4, words={"window_size": (5, 1)}),
    "interleaved": Cached(new=3, len_q=3, rotary=32, words=CAUSAL),
    "halves": Cached(new=3, len_q=3, rotary=16, words=CAUSAL | HALVES),
    "odd-rotary": Cached(new=1, rotary=6, dims=(10, 10), words=HALVES),
    "together": Cached(new=3, len_q=3, rotary=8),
    "together-halves": Cached(new=1, len_q=3, rotary=32, words=HALVES),
    "window-turns-apart": Cached(new=3, len_q=3, rotary=32, words={"window_size": (500, -1)}),
    "fp32-angles": Cached(new=2, len_q=2, rotary=32, angles=np.float32, dtype=BF16, words=CAUSAL),
    "fp64": Cached(new=2, len_q=2, rotary=32, dtype=np.float64, words=CAUSAL),
    "fp64-float-angles": Cached(new=2, rotary=32, angles=np.float32, dtype=np.float64, words=HALVES),
    "mqa": Cached(heads=(6, 1), new=1, rotary=32, dtype=BF16),
    "scores": Cached(len_q=5, new=5, words={"softcap": 2.0, "softmax_scale": 0.3, "sink": SINK, "alibi_slopes": ALIBI}),
    "mask": Cached(len_q=5, new=2, words={"attn_mask": MASK}),
    "pages1": Cached(page=1, new=1, words=CAUSAL),
    "pages3": Cached(page=3, new=4, len_q=4, rotary=16, words=CAUSAL),
    "pages16": Cached(page=16, new=2, len_q=2, rotary=32, dtype=BF16, words=CAUSAL | HALVES),
    "pages16-number": Cached(page=16, used=31, new=1),
    "pages-padded": Cached(page=5, pad=(7, 0, 70), len_q=3, words={"window_size": (4, 0)}),
    "pages-strided": Cached(page=7, strided=True, new=1, rotary=32),
    "pages-whole": Cached(page=16, used=None),
    "splits": Cached(used=(900, 3, 511), room=1000, page=16, new=1, words={"num_splits": 5}),
    "splits-dense": Cached(used=(900, 3, 511), room=1000, new=3, len_q=3, words={"num_splits": 128, "causal": True}),
}  # fmt: skip


def turned(x: np.ndarray, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """(n, heads, dim) rows as complex numbers times unit ones."""
    half = cos.shape[1]
    x = x.astype(np.float64)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    pairs = (x[..., first] + 1j * x[..., second]) * (cos + 1j * sin)[positions][:, None]
    x[..., first], x[..., second] = pairs.real, pairs.imag
    return x


class Call:
    """The arrays of a case, its cache full of NaN but for the rows in use, and what a call must make of them."""

    def __init__(self, case: Cached) -> None:
        self.case = case
        batch, room = 3, case.room
        heads_q, heads_kv = case.heads
        dim_qk, _ = case.dims
        rng = np.random.default_rng(3)
        self.new = case.new or 0
        self.used = np.broadcast_to(room if case.used is None else case.used, batch).astype(np.int32)
        self.pad = np.array(case.pad or (0,) * batch, np.int32)
        end = self.used + self.new
        if case.page:
            most = -(-room // case.page)
            counts = -(-end // case.page)
            self.table = np.full((batch, 2 * most), 2**31 - 1, np.int32)[:, ::2]
            free = iter(rng.permutation(counts.sum() + 2))
            for b, count in enumerate(counts):
                self.table[b, :count] = [next(free) for _ in range(count)]
            outer = int(counts.sum()) + 2, case.page
        else:
            self.table, self.elements = None, np.array(case.elements or range(batch), np.int32)
            outer = 5 if case.elements else batch, room
        self.caches = [self._nan(case, (*outer, heads_kv, dim)) for dim in case.dims]
        for seed, cache in enumerate(self.caches):
            for b in range(batch):
                rows = random(self.used[b] - self.pad[b], *cache.shape[2:], dtype=case.dtype, seed=10 * seed + b)
                cache[self.places(b, self.pad[b], self.used[b])] = rows
        self.before = [cache.copy() for cache in self.caches]
        self.q = random(batch, case.len_q, heads_q, dim_qk, dtype=case.dtype, seed=30)
        self.fresh = [random(batch, self.new, heads_kv, dim, dtype=case.dtype, seed=31 + dim) for dim in case.dims]
        if case.strided:
            self.q = random(batch, case.len_q, 2 * heads_q, dim_qk, dtype=case.dtype, seed=30)[:, ::-1, ::2]
            self.fresh = [
                random(batch, heads_kv, self.new, d + 3, dtype=case.dtype)[..., 3:].swapaxes(1, 2) for d in case.dims
            ]
        self.angles = None
        if case.rotary:
            angle = rng.uniform(-4, 4, (room + 5, case.rotary // 2 + 1))
            self.angles = [f(angle).astype(case.angles or case.dtype)[:, :-1] for f in (np.cos, np.sin)]

    @staticmethod
    def _nan(case: Cached, shape: tuple[int, ...]) -> np.ndarray:
        """NaN of the shape; strided, in another order of axes and with gaps."""
        if not case.strided:
            return np.full(shape, np.nan, case.dtype)
        pages, rows, heads, dim = shape
        return np.full((rows, heads, pages, dim + 8), np.nan, case.dtype)[..., :dim].transpose(2, 0, 1, 3)

    def places(self, b: int, first: int, end: int) -> tuple[Any, np.ndarray]:
        rows = np.arange(first, end)
        if self.table is None:
            return self.elements[b], rows
        return self.table[b, rows // self.case.page], rows % self.case.page

    def run(self, backend: Backend) -> list[np.ndarray]:
        """(out, lse) and the caches afterwards."""
        case, put = self.case, backend.put
        words = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in case.words.items()}
        given = dict.fromkeys((
            "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table",
            "alibi_slopes", "attn_mask", "attn_bias", "sink", "out", "softmax_scale",
        ))  # fmt: skip
        given |= {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "num_splits": 0}
        caches = [put(cache) for cache in self.caches]
        given |= {"q": put(self.q), "k_cache": caches[0], "v_cache": caches[1]}
        if case.new is not None:
            given |= {"k": put(self.fresh[0]), "v": put(self.fresh[1])}
        if self.angles:
            given |= {"rotary_cos": put(self.angles[0]), "rotary_sin": put(self.angles[1])}
        given["cache_seqlens"] = put(self.used) if isinstance(case.used, tuple) else case.used
        given["cache_batch_idx"] = put(self.elements) if case.elements else None
        given["cache_leftpad"] = put(self.pad) if case.pad else None
        given["block_table"] = None if self.table is None else put(self.table)
        options, arrays, cached = cache_call(**given | words)
        results = ops.forward(options.replace(family=backend.family), arrays, None, cached)
        return [backend.get(x) for x in (*results[:2], *caches)]

    def check(self, out: np.ndarray, lse: np.ndarray, *caches: np.ndarray) -> None:
        case, words = self.case, self.case.words
        interleaved = words.get("rotary_interleaved", True)
        apart = words.get("causal", False) or words.get("window_size", (-1, -1)) != (-1, -1)
        for b in range(3):
            rows = np.arange(self.used[b], self.used[b] + self.new)
            for cache, before, fresh, turns in zip(caches, self.before, self.fresh, (True, False), strict=True):
                at, exact = self.places(b, rows[0] if len(rows) else 0, rows[-1] + 1 if len(rows) else 0), fresh[b]
                if turns and self.angles and self.new:
                    exact = turned(fresh[b], rows, *(x.astype(np.float64) for x in self.angles), interleaved)
                    oracle.assert_close(cache[at], exact, exact.astype(case.dtype), "k_cache")
                else:
                    np.testing.assert_array_equal(cache[at].view(np.uint8), np.ascontiguousarray(exact).view(np.uint8))
                before[at] = cache[at]
        for cache, before in zip(caches, self.before, strict=True):  # no other row has changed
            np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (cache, before)))
        names = {
            "window_size": "window",
            "softmax_scale": "scale",
            "sink": "sink",
            "causal": "causal",
            "softcap": "softcap",
        }
        options = {names[name]: x for name, x in words.items() if name in names}
        for b in range(3):
            k, v = (cache[self.places(b, self.pad[b], self.used[b] + self.new)][None] for cache in caches)
            q = exact_q = self.q[b]
            if self.angles:
                positions = self.used[b] + np.arange(case.len_q) * apart
                exact_q = turned(q, positions, *(x.astype(np.float64) for x in self.angles), interleaved)
                q = exact_q.astype(case.dtype)
            of_b = dict(options)
            if "alibi_slopes" in words:
                of_b["alibi_slopes"] = words["alibi_slopes"][b]
            if "attn_mask" in words:
                of_b["mask"] = words["attn_mask"][b : b + 1, :, :, : k.shape[1]]
            exact = oracle.attention(exact_q[None], *(x.astype(np.float64) for x in (k, v)), **of_b)
            naive = oracle.naive_in_dtype(q[None], k, v, **of_b)
            oracle.assert_close(out[b : b + 1], exact.out, naive.out, f"out[{b}]")
            oracle.assert_close(lse[b : b + 1], exact.lse, naive.lse, f"lse[{b}]", dtype=case.dtype)


TURNS = [
    pytest.param(*place.values, name, marks=[*place.marks, *[pytest.mark.sample(3)] * ("-cpu" in place.values[0])])
    if hasattr(place, "values")
    else (place, name)
    for place in LEFT_BY_HOPPER
    for name, case in CASES.items()
    if "sm80" not in str(place) or case.dtype is not np.float64
]


@pytest.mark.parametrize(("backend", "name"), TURNS, indirect=["backend"])
def test_caches(backend: Backend, name: str) -> None:
    call = Call(CASES[name])
    call.check(*call.run(backend))


def small(dtype: Any = np.float32, room: int = 9) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Two caches, new keys and values, and queries, of two sequences."""
    caches = [random(2, room, 2, 8, dtype=dtype, seed=seed) for seed in (1, 2)]
    fresh = [random(2, 1, 2, 8, dtype=dtype, seed=seed) for seed in (3, 4)]
    return caches, fresh, [random(2, 1, 4, 8, dtype=dtype, seed=seed) for seed in (5, 6)]


@needs_compiler
def test_a_call_is_two_launches_and_reads_no_length(launches: Launches) -> None:
    (k_cache, v_cache), (k, v), (q, _) = small(FP16)
    lengths = np.array([3, 5], np.int32)
    arrays = [as_torch(x) for x in (q, k_cache, v_cache, k, v)]
    used = as_torch(lengths)
    used.tolist = None
    cuflash.flash_attn_with_kvcache(*arrays, cache_seqlens=used, causal=True)
    assert launches.take() == ["cache_append", "fwd_sm80"]
    for row in (3, 5):
        np.testing.assert_array_equal(k_cache[(3, 5).index(row), row], k[(3, 5).index(row), 0])
    cuflash.flash_attn_with_kvcache(*arrays[:3], cache_seqlens=used, causal=True)
    assert launches.take() == ["fwd_sm80"]
    empty = as_torch(np.empty((2, 0, 4, 8), FP16))
    cuflash.flash_attn_with_kvcache(empty, *arrays[1:], cache_seqlens=used)
    assert launches.take() == ["cache_append"]


@needs_compiler
def test_rows_without_room_are_written_nowhere(launches: Launches) -> None:
    """Lengths on a device are not read, so that what is behind the cache must be safe from them."""
    (k_cache, v_cache), _, (q, _) = small(FP16)
    k, v = (random(2, 4, 2, 8, dtype=FP16, seed=seed) for seed in (7, 8))
    around = [np.full((4, *cache.shape[1:]), 7, FP16) for cache in (k_cache, v_cache)]
    caches = [x[1:3] for x in around]
    lengths = np.array([7, -2], np.int32)
    cuflash.flash_attn_with_kvcache(*map(as_torch, (q, *caches, k, v)), cache_seqlens=as_torch(lengths))
    for x, new in zip(around, (k, v), strict=True):
        expected = np.full_like(x, 7)
        expected[1, 7:9], expected[2, :2] = new[0, :2], new[1, 2:]
        np.testing.assert_array_equal(x, expected)


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_a_prepared_call_is_the_call(launches: Launches, wrap: Any) -> None:
    caches, fresh, queries = small(FP16)
    others = [cache.copy() for cache in caches]
    lengths, cos, sin = np.array([3, 5], np.int32), *random(2, 9, 4, dtype=FP16)
    words = {"rotary_cos": wrap(cos), "rotary_sin": wrap(sin), "causal": True, "softcap": 2.0, "sink": wrap(SINK)}
    used = {"cache_seqlens": wrap(lengths)}
    attend = cuflash.flash_attn_prepare(*map(wrap, (queries[0], *fresh)), cache=[*map(wrap, caches)], **used, **words)
    for q in queries:
        arrays = [*map(wrap, (q, *fresh))]
        out, lse = attend(*arrays)
        expected = cuflash.flash_attn_with_kvcache(
            arrays[0], *map(wrap, others), *arrays[1:], **used, **words, return_softmax_lse=True
        )
        for x, y in zip((out, lse), expected, strict=True):
            np.testing.assert_array_equal(values(x), values(y))
        for x, y in zip(caches, others, strict=True):
            np.testing.assert_array_equal(x, y)
        lengths += 1
    with pytest.raises(InvalidArgument, match=r"cache_seqlens is 3, but it was none at the preparation\. Leave it out"):
        attend(*arrays, cache_seqlens=3)
    with pytest.raises(InvalidArgument, match=r"k is None; expected float16 of shape \(2, 1, 2, 8\)"):
        attend(arrays[0])


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_a_prepared_call_takes_a_number_of_rows(launches: Launches, wrap: Any) -> None:
    caches, _, (q, _) = small(FP16)
    attend = cuflash.flash_attn_prepare(wrap(q), None, None, cache=[*map(wrap, caches)], cache_seqlens=4)
    for rows in (None, 4, 7, 0):
        out, _ = attend(wrap(q)) if rows is None else attend(wrap(q), cache_seqlens=rows)
        expected = cuflash.flash_attn_with_kvcache(
            wrap(q), *map(wrap, caches), cache_seqlens=4 if rows is None else rows
        )
        np.testing.assert_array_equal(values(out), values(expected))
    with pytest.raises(InvalidArgument, match="cache_seqlens is 10; expected an integer from 0 to 9"):
        attend(wrap(q), cache_seqlens=10)


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("to_an_array", [False, True])
def test_a_bound_call_reads_its_arrays_anew(launches: Launches, wrap: Any, to_an_array: bool) -> None:
    caches, fresh, queries = small(FP16)
    others = [cache.copy() for cache in caches]
    lengths, cos, sin = np.array([3, 5], np.int32), *random(2, 9, 4, dtype=FP16)
    words = {"rotary_cos": wrap(cos), "rotary_sin": wrap(sin), "cache_seqlens": wrap(lengths), "causal": True}
    own = [np.zeros_like(x) for x in (queries[0], *fresh)]
    place = wrap(np.zeros_like(queries[0])) if to_an_array else None
    attend = cuflash.flash_attn_prepare(*map(wrap, own), cache=[*map(wrap, caches)], **words, out=place)
    step = attend.bind(*map(wrap, own), out=place)
    before = [cache.copy() for cache in caches]
    results = []
    for q in queries:
        for x, y in zip(own, (q, *fresh), strict=True):
            x[...] = y
        results.append(step())
        expected = cuflash.flash_attn_with_kvcache(
            wrap(q), *map(wrap, others), *map(wrap, fresh), **words, return_softmax_lse=True
        )
        for x, y in zip((*results[-1], *caches), (*expected, *others), strict=True):
            np.testing.assert_array_equal(values(x), values(y))
        lengths += 1
    assert all((x != y).any() for x, y in zip(caches, before, strict=True)), "something was appended"
    assert all(x is y for x, y in zip(*results[:2], strict=True)), "results are the same arrays"
    assert place is None or results[0][0] is place
    with pytest.raises(InvalidArgument, match="cache_seqlens is 3, but it was none at the preparation"):
        step(cache_seqlens=3)
    with pytest.raises(InvalidArgument, match=r"k is None; expected float16 of shape \(2, 1, 2, 8\)"):
        attend.bind(wrap(own[0]), out=place)


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_a_bound_call_takes_a_number_of_rows(launches: Launches, wrap: Any) -> None:
    caches, _, (q, _) = small(FP16)
    step = cuflash.flash_attn_prepare(wrap(q), None, None, cache=[*map(wrap, caches)], cache_seqlens=4).bind(wrap(q))
    for rows in (None, 7, 0, None):
        out, lse = step() if rows is None else step(cache_seqlens=rows)
        expected = cuflash.flash_attn_with_kvcache(
            wrap(q), *map(wrap, caches), cache_seqlens=4 if rows is None else rows, return_softmax_lse=True
        )
        for x, y in zip((out, lse), expected, strict=True):
            np.testing.assert_array_equal(values(x), values(y))
    with pytest.raises(InvalidArgument, match="cache_seqlens is 10; expected an integer from 0 to 9"):
        step(cache_seqlens=10)


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_a_bound_call_allocates_once_and_may_have_nothing_to_launch(launches: Launches, wrap: Any) -> None:
    q, k = wrap(random(1, 2, 2, 8, dtype=FP16)), wrap(random(1, 300, 2, 8, dtype=FP16))
    step = cuflash.flash_attn_prepare(q, k, k, num_splits=2).bind(q, k, k)
    count = len(launches.allocated)
    first = [values(x).copy() for x in step()]
    for x, y in zip(step(), first, strict=True):
        np.testing.assert_array_equal(values(x), y)
    assert len(launches.allocated) == count, "tickets are left as they were found, and no memory is new"
    none = wrap(np.zeros((1, 0, 2, 8), FP16))
    out, lse = cuflash.flash_attn_prepare(q, none, none).bind(q, none, none)()
    assert not values(out).any() and np.isneginf(values(lse)).all()
    with pytest.raises(InvalidArgument, match="out"):
        cuflash.flash_attn_prepare(q, k, k, out=q).bind(q, k, k, out=q)


@needs_compiler
@pytest.mark.parametrize("wrap", [lambda x: x, as_torch], ids=["numpy", "torch"])
def test_a_captured_call_reads_its_arrays_anew(launches: Launches, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, fresh, queries = small(FP16)
    others, lengths = [cache.copy() for cache in caches], np.array([3, 5], np.int32)
    words = {"cache_seqlens": wrap(lengths), "causal": True}
    own = [np.zeros_like(x) for x in (queries[0], *fresh)]
    attend = cuflash.flash_attn_prepare(*map(wrap, own), cache=[*map(wrap, caches)], **words)
    bound = attend.bind(*map(wrap, own))
    launches.take()
    step = bound.captured()
    assert not launches.take(), "recording runs nothing"
    on_gpu, expected_kernels = not isinstance(wrap(own[0]), np.ndarray), None
    for number, q in enumerate(queries):
        for x, y in zip(own, (q, *fresh), strict=True):
            x[...] = y
        count = len(launches.allocated)
        results = step()
        assert len(launches.allocated) == count
        kernels = launches.take()
        assert len(kernels) == 2 * on_gpu and expected_kernels in (None, kernels)
        expected_kernels = kernels
        assert all(x is y for x, y in zip(results, bound(), strict=True)), "results are those of the bound call"
        assert launches.take() == kernels
        expected = cuflash.flash_attn_with_kvcache(
            wrap(q), *map(wrap, others), *map(wrap, fresh), **words, return_softmax_lse=True
        )
        step()
        launches.take()
        for x, y in zip((*results, *caches), (*expected, *others), strict=True):
            np.testing.assert_array_equal(values(x), values(y), err_msg=str(number))
        lengths += 1
    with pytest.raises(InvalidArgument, match="cache_seqlens is 3, but a captured call has that of its preparation"):
        step(cache_seqlens=3)
    if on_gpu:  # a capture around the call records kernels, not a graph
        params = len(launches.params)
        monkeypatch.setattr(Torch, "is_capturing", lambda self: True)
        attend.bind(*map(wrap, own)).captured()()
        assert len(launches.params) == params + 2


@needs_compiler
def test_a_captured_call_keeps_a_number_of_rows_and_may_have_nothing_to_launch(launches: Launches) -> None:
    caches, _, (q, _) = small(FP16)
    attend = cuflash.flash_attn_prepare(as_torch(q), None, None, cache=[*map(as_torch, caches)], cache_seqlens=4)
    out, lse = attend.bind(as_torch(q)).captured()()
    expected = cuflash.flash_attn_with_kvcache(q, *caches, cache_seqlens=4, return_softmax_lse=True)
    for x, y in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(values(x), values(y), atol=2e-3)
    q, none = as_torch(random(1, 2, 2, 8, dtype=FP16)), as_torch(np.zeros((1, 0, 2, 8), FP16))
    out, lse = cuflash.flash_attn_prepare(q, none, none).bind(q, none, none).captured()()
    assert not values(out).any() and np.isneginf(values(lse)).all()


def test_a_prepared_call_without_a_cache_takes_masks_and_sinks() -> None:
    q, k, v = (random(2, 5, 4, 8, dtype=np.float32, seed=seed) for seed in range(3))
    words = {"attn_mask": np.tri(5, dtype=bool), "sink": SINK, "alibi_slopes": ALIBI[0]}
    attend = cuflash.flash_attn_prepare(q, k, v, **words)
    np.testing.assert_array_equal(attend(q, k, v)[0], cuflash.flash_attn_func(q, k, v, **words))
    with pytest.raises(InvalidArgument, match="cache_seqlens is 3, but there is no cache"):
        attend(q, k, v, cache_seqlens=3)
    with pytest.raises(InvalidArgument, match="block_table is given but cache is not"):
        cuflash.flash_attn_prepare(q, k, v, block_table=np.zeros((2, 1), np.int32))
    with pytest.raises(InvalidArgument, match=r"cache is 5; expected a tuple \(k_cache, v_cache\)"):
        cuflash.flash_attn_prepare(q, k, v, cache=5)
    with pytest.raises(InvalidArgument, match="alignment is 'top-left' and there is a cache"):
        cuflash.flash_attn_prepare(q, k, v, cache=(k, v), alignment="top-left")


LENGTHS = np.array([3, 5], np.int32)
TABLE = np.zeros((2, 3), np.int32)
ANGLES = {"rotary_cos": np.ones((9, 4), np.float32), "rotary_sin": np.ones((9, 4), np.float32)}
NEW = np.ones((2, 1, 2, 8), np.float32)
WRONG = {
    "k alone": ({"k": NEW, "cache_seqlens": 1}, "k is given but v is not; both are appended, or none"),
    "v alone": ({"v": NEW, "cache_seqlens": 1}, "v is given but k is not"),
    "no lengths": ({"k": NEW, "v": NEW}, "k is given but cache_seqlens is None; pass how many rows"),
    "heads": ({"k": NEW[:, :, :1], "v": NEW, "cache_seqlens": 1},
              r"k has shape \(2, 1, 1, 8\); expected \(2, new keys, 2, 8\), with the batch of q and the heads of k_"),
    "rank": ({"k": NEW[0], "v": NEW, "cache_seqlens": 1}, r"k has shape \(1, 2, 8\); expected \(2, new keys, 2, 8\)"),
    "dtype of v": ({"k": NEW, "v": NEW.astype(FP16), "cache_seqlens": 1}, "v is float16 but v_cache is float32"),
    "length of v": ({"k": NEW, "v": np.ones((2, 2, 2, 8), np.float32), "cache_seqlens": 1},
                    "v has length 2 but k has 1; they must be equal"),
    "no room": ({"k": NEW, "v": NEW, "cache_seqlens": 9},
                "cache_seqlens is 9; expected an integer from 0 to 8, as there is room for 9 and the call appends 1"),
    "no room in one": ({"k": NEW, "v": NEW, "cache_seqlens": np.array([3, 9], np.int32)},
                       r"cache_seqlens\[1\] is 9; expected a number from 0 to 8, as there is room for 9 rows"),
    "negative": ({"cache_seqlens": np.array([-1, 3], np.int32)},
                 r"cache_seqlens\[0\] is -1; expected a number from 0 to 9"),
    "a word": ({"cache_seqlens": "all"}, "cache_seqlens is 'all'; expected an integer from 0 to 9"),
    "int64": ({"cache_seqlens": LENGTHS.astype(np.int64)}, "cache_seqlens is int64; expected int32"),
    "three lengths": ({"cache_seqlens": np.zeros(3, np.int32)}, r"cache_seqlens has shape \(3,\); expected \(2,\)"),
    "padding": ({"cache_seqlens": LENGTHS, "cache_leftpad": np.array([4, 0], np.int32)},
                r"cache_leftpad\[0\] is 4; expected a number from 0 to 3, as that many rows are in use"),
    "element": ({"cache_seqlens": 3, "cache_batch_idx": np.array([0, 2], np.int32)},
                r"cache_batch_idx\[1\] is 2; expected a number from 0 to 1, the numbers of k_cache"),
    "both": ({"cache_batch_idx": LENGTHS, "block_table": TABLE},
             r"cache_batch_idx and block_table are both given; .* Pass block_table\[cache_batch_idx\] alone"),
    "page": ({"block_table": TABLE + 2, "cache_seqlens": 20}, r"block_table\[0, 0\] is 2, but there are 2 pages"),
    "rows of a table": ({"block_table": TABLE[:1]}, "block_table has 1 rows; expected one for each of the 2 sequences"),
    "turn nothing": (ANGLES | {"cache_seqlens": 1},
                     "rotary_cos is given but k is not; queries are turned with the keys"),
    "no sine": ({"k": NEW, "v": NEW, "cache_seqlens": 1, "rotary_cos": ANGLES["rotary_cos"]},
                "rotary_cos is given but rotary_sin is not; a turn needs both"),
    "few angles": ({"k": NEW, "v": NEW, "cache_seqlens": 1} | {name: x[:8] for name, x in ANGLES.items()},
                   r"rotary_cos has shape \(8, 4\); expected \(rows, rotary_dim / 2\), at least 9 rows"),
    "wide angles": ({"k": NEW, "v": NEW, "cache_seqlens": 1} | dict.fromkeys(ANGLES, np.ones((9, 5), np.float32)),
                    r"rotary_cos has shape \(9, 5\); .* at most 4 columns"),
    "angles of fp16": ({"k": NEW, "v": NEW, "cache_seqlens": 1} | {n: x.astype(FP16) for n, x in ANGLES.items()},
                       "rotary_cos is float16; expected float32"),
    "shared": ({"k": NEW, "v": NEW, "cache_seqlens": 1, "v_cache": None}, "v_cache shares memory with k_cache"),
    "interleaved": ({"rotary_interleaved": "no"}, "rotary_interleaved is 'no'; expected True or False"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(name: str) -> None:
    (k_cache, v_cache), _, (q, _) = small()
    words, message = WRONG[name]
    words = dict(words)
    if "v_cache" in words:
        v_cache = k_cache
        del words["v_cache"]
    before = k_cache.copy(), v_cache.copy()
    with pytest.raises(InvalidArgument, match=message):
        cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, **words)
    for x, y in zip((k_cache, v_cache), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_cache_that_cannot_be_written_is_refused() -> None:
    (k_cache, v_cache), (k, v), (q, _) = small()
    v_cache.flags.writeable = False
    with pytest.raises(InvalidArgument, match="v_cache is read-only"):
        cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2)
    cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=2)
    k_cache = np.broadcast_to(k_cache[:1], k_cache.shape)
    with pytest.raises(InvalidArgument, match=r"k_cache (is read-only|has elements that share memory)"):
        cuflash.flash_attn_with_kvcache(q, k_cache, v_cache.copy(), k, v, cache_seqlens=2)


def test_a_cache_holds_more_sequences_than_are_asked_for() -> None:
    (k_cache, v_cache), _, (q, _) = small()
    out = cuflash.flash_attn_with_kvcache(q[:1], k_cache, v_cache, cache_seqlens=5)
    np.testing.assert_array_equal(out, cuflash.flash_attn_func(q[:1], k_cache[:1, :5], v_cache[:1, :5]))
    with pytest.raises(
        InvalidArgument, match="k_cache has batch size 1 but q has 2; pass cache_batch_idx to say which"
    ):
        cuflash.flash_attn_with_kvcache(q, k_cache[:1], v_cache[:1])


def test_heads_of_keys_may_lie_between_those_of_values() -> None:
    caches = random(2, 9, 2, 2, 8, dtype=np.float32)
    _, (k, v), (q, _) = small()
    cuflash.flash_attn_with_kvcache(q, caches[:, :, 0], caches[:, :, 1], k, v, cache_seqlens=4)
    np.testing.assert_array_equal(caches[:, 4, 0], k[:, 0])
    np.testing.assert_array_equal(caches[:, 4, 1], v[:, 0])


def values(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else to_numpy(x)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_captured_graph_serves_every_length(page_size: int) -> None:
    """Lengths and pages that change after the capture are those that a replay reads and appends by."""
    import cupy

    rng = np.random.default_rng(2)
    room, table = 400, np.arange(50, dtype=np.int32).reshape(2, 25)
    shape = (50, 16, 2, 64) if page_size else (2, room, 2, 64)
    host = [random(*shape, dtype=FP16, seed=seed) for seed in (1, 2)]
    q, k, v = (random(2, 1, heads, 64, dtype=FP16, seed=heads) for heads in (8, 2, 2))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        caches = [cupy.asarray(x) for x in host]
        given = [cupy.asarray(x) for x in (q, k, v)]
        used, pages = cupy.zeros(2, np.int32), cupy.asarray(table)
        words = {"cache_seqlens": used, "block_table": pages if page_size else None, "causal": True}
        attend = cuflash.flash_attn_prepare(*given, cache=caches, **words)
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            attend(*given)
            stream.synchronize()
            stream.begin_capture()
            results = attend(*given)
            graph = stream.end_capture()
        for lengths in ([0, 399], [17, 3], [250, 300]):
            used.set(np.array(lengths, np.int32))
            pages.set(rng.permutation(table.ravel()).astype(np.int32).reshape(table.shape))
            for cache, x in zip(caches, host, strict=True):
                cache.set(x)
            graph.launch(stream)
            replayed = [x.get() for x in (*results, *caches)]
            for cache, x in zip(caches, host, strict=True):
                cache.set(x)
            called = cuflash.flash_attn_with_kvcache(given[0], *caches, *given[1:], **words, return_softmax_lse=True)
            for x, y in zip(replayed, (*called, *caches), strict=True):
                np.testing.assert_array_equal(x.view(np.uint8), y.get().view(np.uint8))
