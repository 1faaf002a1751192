"""Attention over devices that one process stands for, against one device in float64."""

from __future__ import annotations

import doctest
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32, FP64, random

import cuflash
from cuflash.parallel import (
    all_to_all_attention,
    all_to_all_attention_vjp,
    attention,
    exchange,
    ring_attention,
    ring_attention_vjp,
    token_order,
)

METHODS = {"ring": ring_attention_vjp, "heads": all_to_all_attention_vjp}
BANDS = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "near": (True, (4, 0)), "sides": (False, (7, 2))}


class Whole:
    """The tensors of a call, and the parts of devices."""

    def __init__(
        self, devices: int, order: Any, packed: bool, dtype: Any, heads: tuple[int, int] = (8, 2), rows: int = 3
    ) -> None:
        self.devices, self.order, self.packed = devices, order, packed
        places = devices * (2 if order == "zigzag" else 1)
        lengths = [n * places for n in (rows, 1, 0, 5)] if packed else [rows * places]
        total = sum(lengths)
        self.starts = np.cumsum([0, *lengths]).astype(np.int32) if packed else None
        self.tokens = token_order(total if self.starts is None else self.starts, devices, order)
        before = () if packed else (2,)
        shapes = [
            (*before, total, h, d) for h, d in zip((heads[0], *heads[1:] * 2, heads[0]), (8, 8, 12, 12), strict=True)
        ]
        q, k, v, dout = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        dlse = random(*before, heads[0], total, dtype=FP64 if dtype is FP64 else FP32)
        self.tensors = q, k, v, dout, dlse

    def parts(self, x: np.ndarray) -> list[np.ndarray]:
        axis = -1 if x is self.tensors[-1] else -3
        return np.split(np.take(x, self.tokens, axis), self.devices, axis)

    def joined(self, parts: Any, axis: int = -3) -> np.ndarray:
        return np.take(np.concatenate(parts, axis), np.argsort(self.tokens), axis)

    def judge(self, results: Any, **words: Any) -> None:
        """Results of devices: out, lse, dq, dk and dv."""
        if self.packed:
            words |= {"cu_seqlens_q": self.starts, "cu_seqlens_k": self.starts}
        exact, naive = (f(*self.tensors, **words) for f in (oracle.attention, oracle.naive_in_dtype))
        computed = oracle.Attention(*(self.joined(x, -1 if i == 1 else -3) for i, x in enumerate(results)))
        oracle.assert_all_close(computed, exact, naive)


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [FP32, FP16, FP64])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_devices_compute_what_one_does(
    method: str, devices: int, order: Any, band: str, packed: bool, dtype: Any
) -> None:
    whole = Whole(devices, order, packed, dtype)
    q, k, v, dout, dlse = map(whole.parts, whole.tensors)
    causal, window = BANDS[band]
    (out, lse), pullback = METHODS[method](
        q, k, v, causal=causal, window_size=window, order=order, cu_seqlens=whole.starts, return_lse=True
    )
    whole.judge([out, lse, *pullback(dout, dlse)], causal=causal, window=window)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("method", "devices", "heads"),
    [("ring", 3, (4, 2)), ("ring", 5, (3, 1)), ("ring", 6, (2, 2)), ("heads", 3, (6, 3)), ("heads", 6, (6, 2))],
)
def test_any_number_of_devices(method: str, devices: int, heads: tuple[int, int], packed: bool) -> None:
    for order, band in (("zigzag", "causal"), ("contiguous", "sides")):
        whole = Whole(devices, order, packed, FP32, heads)
        q, k, v, dout, dlse = map(whole.parts, whole.tensors)
        causal, window = BANDS[band]
        (out, lse), pullback = METHODS[method](
            q, k, v, causal=causal, window_size=window, order=order, cu_seqlens=whole.starts, return_lse=True
        )
        whole.judge([out, lse, *pullback(dout, dlse)], causal=causal, window=window)


@pytest.mark.parametrize("method", METHODS)
def test_scale_softcap_and_bfloat16(method: str) -> None:
    whole = Whole(2, "zigzag", False, BF16, heads=(6, 2), rows=11)
    q, k, v, dout, dlse = map(whole.parts, whole.tensors)
    words = {"softmax_scale": 0.6, "softcap": 2.5}
    (out, lse), pullback = METHODS[method](q, k, v, causal=True, order="zigzag", return_lse=True, **words)
    whole.judge([out, lse, *pullback(dout, dlse)], causal=True, scale=0.6, softcap=2.5)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_queries_may_be_fewer_than_keys_where_all_are_seen(order: Any) -> None:
    q, k, v, dout = (random(1, n, h, 8, dtype=FP32) for n, h in ((12, 4), (36, 2), (36, 2), (12, 4)))
    parts = [np.split(x, 3, axis=1) for x in (q, k, v, dout)]
    (out, lse), pullback = ring_attention_vjp(*parts[:3], order=order, return_lse=True)
    computed = [np.concatenate(x, -1 if i == 1 else 1) for i, x in enumerate([out, lse, *pullback(parts[3])])]
    exact, naive = (f(q, k, v, dout) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*computed), exact, naive)
    (out, lse), pullback = all_to_all_attention_vjp(
        *(np.split(x, 2, axis=1) for x in (q, k, v)), causal=True, return_lse=True
    )
    computed = [
        np.concatenate(x, -1 if i == 1 else 1) for i, x in enumerate([out, lse, *pullback(np.split(dout, 2, 1))])
    ]
    exact, naive = (f(q, k, v, dout, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*computed), exact, naive)


def test_one_device_gives_the_bits_of_no_devices() -> None:
    q, k, v = (random(2, 24, 4, 16) for _ in range(3))
    expected = cuflash.flash_attn_func(q, k, v, causal=True)
    for call in (ring_attention, all_to_all_attention):
        np.testing.assert_array_equal(call([q], [k], [v], causal=True)[0], expected)
    halves = [np.split(x, 2, axis=1) for x in (q, k, v)]
    np.testing.assert_array_equal(np.concatenate(all_to_all_attention(*halves, causal=True), axis=1), expected)


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_to_the_bit(method: str) -> None:
    whole = Whole(4, "zigzag", False, FP16, heads=(4, 2), rows=9)
    q, k, v, dout, dlse = map(whole.parts, whole.tensors)

    def run() -> list[np.ndarray]:
        out, pullback = METHODS[method](q, k, v, causal=True, order="zigzag", deterministic=True)
        return [x for shards in (out, *pullback(dout, dlse)) for x in shards]

    for first, second in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_rows_that_see_nothing_and_empty_arrays() -> None:
    q, k, v, dout = (random(1, n, 2, 8, dtype=FP32) for n in (8, 0, 0, 8))
    parts = [np.split(x, 2, axis=1) for x in (q, k, v, dout)]
    for function, size in ((ring_attention_vjp, 2), (all_to_all_attention_vjp, 2)):
        (out, lse), pullback = function(*parts[:3], return_lse=True)
        assert len(out) == size and not np.any(out) and np.isneginf(lse).all()
        dq, dk, _ = pullback(parts[3])
        assert not np.any(dq) and dk[0].shape == (1, 0, 2, 8)
    empty = [np.zeros((1, 0, 2, 8), FP32)] * 2
    assert ring_attention(empty, empty, empty, causal=True, order="zigzag")[1].shape == (1, 0, 2, 8)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, tuple[int, ...]]]:
    """From whom to whom the arrays of which shape go, in calls to come."""
    sent: list[tuple[int, int, tuple[int, ...]]] = []
    together = exchange.run_together

    def watched(rank: int, program: Any) -> Any:
        wait = None
        try:
            while True:
                post = next(program) if wait is None else program.send(wait)
                sent.extend((rank, message.peer, message.array.shape) for message in post.sent)
                wait = yield post
        except StopIteration as stop:
            return stop.value

    monkeypatch.setattr(
        "cuflash.parallel.devices.run_together", lambda programs: together([*map(watched, count(), programs)])
    )
    return sent


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_half_of_the_heads_of_long_sequences_travel_while_others_are_attended_to(
    order: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(2, order, packed, FP32, heads=(8, 4))
    q, k, v, dout, dlse = map(whole.parts, whole.tensors)
    attended: list[int] = []
    forward = cuflash.ops.forward

    def noting(options: Any, arrays: Any) -> Any:
        attended.append(len(sent))
        return forward(options, arrays)

    monkeypatch.setattr("cuflash.ops.forward", noting)
    monkeypatch.setattr("cuflash.parallel.heads._LONG", q[0].nbytes)
    sent = watch(monkeypatch)
    words = {"causal": True, "order": order, "cu_seqlens": whole.starts, "return_lse": True}
    (out, lse), pullback = all_to_all_attention_vjp(q, k, v, **words)
    assert attended == [12, 14, 16, 18], "two devices in turn, each with q, k and v of both shares before it begins"
    assert {shape[-2] for *_, shape in sent} == {2, 1}
    results = [out, lse, *pullback(dout, dlse)]
    assert len(sent) == 2 * 2 * (3 + 2) + 2 * 2 * (2 + 3)
    whole.judge(results, causal=True)
    monkeypatch.setattr("cuflash.parallel.heads._LONG", q[0].nbytes + 1)
    attended.clear()
    (out, lse), pullback = all_to_all_attention_vjp(q, k, v, **words)
    assert len(attended) == 2
    whole.judge([out, lse, *pullback(dout, dlse)], causal=True)


def test_only_neighbours_keys_travel_with_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = watch(monkeypatch)
    x = np.split(random(1, 64, 2, 8), 4, axis=1)
    _, pullback = ring_attention_vjp(x, x, x, causal=True, window_size=(5, 0))
    assert sorted(sent) == [(i, i + 1, (1, 5, 2, 8)) for i in range(3) for _ in "kv"]
    sent.clear()
    pullback(x)
    there, back = ([(i, i + 1), (i + 1, i)] for i in range(3)), [(1, 5, 2, 8)]
    assert sorted(sent) == sorted((*ends, back[0]) for pair in there for ends in pair for _ in "kv")


X = np.zeros((1, 6, 4, 8), FP32)
P = np.zeros((6, 4, 8), FP32)
REFUSED = {
    "odd rows": (lambda: ring_attention([X[:, :5]], [X[:, :5]], [X[:, :5]], order="zigzag"), "q has 5 rows .* even"),
    "odd keys": (lambda: ring_attention([X], [X[:, :5]], [X[:, :5]], order="zigzag"), "k has 5 rows .* even"),
    "rows": (lambda: ring_attention([X], [X[:, :5]], [X[:, :5]], causal=True), "k has 5 rows .* but q has 6"),
    "zigzag rows": (lambda: all_to_all_attention([X], [X[:, :4]], [X[:, :4]], order="zigzag"), "k has 4 rows"),
    "v": (lambda: ring_attention([X], [X], [X[:, :5]]), r"v has shape \(1, 5, 4, 8\) and k"),
    "unlike": (lambda: ring_attention([X, X[:, :4]], [X, X], [X, X]), "that of the first device's q"),
    "lists": (lambda: ring_attention([X, X], [X, X], X), "v is array.*; expected a list of arrays"),
    "fewer": (lambda: ring_attention([X, X], [X], [X, X]), "k is a list of 1; expected"),
    "no devices": (lambda: ring_attention([], [], []), "q is a list of 0"),
    "no group": (lambda: ring_attention(X, X, X), "group is None; expected a cupy.cuda.nccl.NcclCommunicator"),
    "group": (lambda: ring_attention([X], [X], [X], "x"), "group is 'x' and q, k and v are lists"),
    "order": (lambda: ring_attention([X], [X], [X], order="zig"), "order is 'zig'; expected 'contiguous'"),
    "window": (lambda: ring_attention([X], [X], [X], window_size=3), "window_size is 3; expected a tuple"),
    "dtype": (lambda: ring_attention(*[[X.astype(int)]] * 3), "q is int64; expected float16"),
    "rank": (lambda: ring_attention([P], [P], [P]), "q has 3 dimensions"),
    "packed rank": (lambda: ring_attention([X], [X], [X], cu_seqlens=[0, 6]), "q has 4 dimensions"),
    "cu_seqlens": (lambda: ring_attention([P], [P], [P], cu_seqlens=[0, 5]), "rise from 0 to 6"),
    "kind": (lambda: ring_attention([P], [P], [P], cu_seqlens=[0.5, 6]), "expected a row of integers"),
    "uneven": (lambda: ring_attention(*[[P, P]] * 3, cu_seqlens=[0, 5, 12]), "sequence 0 has 5 rows; .*multiple of 2"),
    "max_seqlen": (lambda: ring_attention([P], [P], [P], cu_seqlens=[0, 6], max_seqlen=5), "max_seqlen is 5, but"),
    "idle": (lambda: ring_attention([X], [X], [X], max_seqlen=6), "max_seqlen is given without cu_seqlens"),
    "heads": (lambda: all_to_all_attention(*[[X[:, :, :3]] * 2] * 3), "q has 3 heads for 2 devices"),
    "key heads": (lambda: all_to_all_attention([X] * 4, [X[:, :, :3]] * 4, [X[:, :, :3]] * 4), "k has 3 heads for 4"),
    "dout": (lambda: ring_attention_vjp([X], [X], [X])[1]([X[:, :5]]), r"dout has shape \(1, 5, 4, 8\)"),
    "douts": (lambda: ring_attention_vjp([X], [X], [X])[1]([X, X]), "dout is a list of 2 arrays for 1 devices"),
    "dlse": (lambda: ring_attention_vjp([X], [X], [X])[1]([X], [X]), "dlse has shape"),
    "order of": (lambda: token_order(6, 4), "a multiple of 8"),
    "devices": (lambda: token_order(6, 0), "devices is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(name: str) -> None:
    call, match = REFUSED[name]
    with pytest.raises(cuflash.InvalidArgument, match=match) as caught:
        call()
    assert caught.traceback[-1].path == Path(__file__), "the caller's line is the last one"


def test_docstring_examples() -> None:
    result = doctest.testmod(attention)
    assert result.attempted > 10 and result.failed == 0
