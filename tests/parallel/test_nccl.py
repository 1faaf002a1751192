"""Devices with a thread each, over a communicator that copies host memory: no GPU takes part."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles.arrays import as_cupy, needs_cupy, to_numpy
from doubles.nccl import OfHostMemory, communicators, in_threads
from inputs import BF16, FP32, random

import cuflash
from cuflash.parallel import Nccl, all_to_all_attention_vjp, nccl, ring_attention, ring_attention_vjp, token_order
from cuflash.parallel.devices import exchange_of
from cuflash.parallel.exchange import Message, Post, Wait

pytestmark = needs_cupy

CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "ring": (ring_attention_vjp, 4, {"order": "zigzag", "causal": True}),
    "window": (ring_attention_vjp, 3, {"causal": True, "window_size": (5, 0)}),
    "packed": (ring_attention_vjp, 2, {"order": "zigzag", "window_size": (3, 1), "cu_seqlens": [0, 24, 32, 48]}),
    "heads": (all_to_all_attention_vjp, 4, {"order": "zigzag", "causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_threads_get_the_bits_of_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, size, words = CASES[name]
    before = () if "cu_seqlens" in words else (2,)
    tensors = [random(*before, 48, h, 8, dtype=BF16, seed=i) for i, h in enumerate((4, 2, 2, 4))]
    tokens = token_order(words.get("cu_seqlens", 48), size, words.get("order", "contiguous"))
    q, k, v, dout = (np.split(np.take(x, tokens, -3), size, -3) for x in tensors)
    dlse = np.split(random(*before, 4, 48, dtype=FP32), size, -1)
    (out, lse), pullback = function(q, k, v, return_lse=True, **words)
    expected = [out, lse, *pullback(dout, dlse)]

    with communicators(monkeypatch, size) as devices:

        def run(rank: int) -> list[np.ndarray]:
            exchange = OfHostMemory(Nccl(devices[rank]))
            (out, lse), pullback = function(q[rank], k[rank], v[rank], exchange, return_lse=True, **words)
            return [out, lse, *pullback(dout[rank], dlse[rank])]

        for rank, results in enumerate(in_threads(size, run)):
            for computed, of_all in zip(results, expected, strict=True):
                np.testing.assert_array_equal(computed, of_all[rank])


def test_messages_overlap_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(nccl, "_FIRST_BYTES", 16)
    with communicators(monkeypatch, 2) as devices:

        def run(rank: int) -> None:
            exchange = Nccl(devices[rank])
            assert (exchange.rank, exchange.size) == (rank, 2)
            sent = [random(3, 5, dtype=FP32, seed=rank), random(7, dtype=BF16, seed=rank), np.zeros(0, FP32)]
            received = [np.empty_like(x) for x in sent]
            to, fro = ([Message(1 - rank, as_cupy(x)) for x in arrays] for arrays in (sent, received))
            here, there = cupy.cuda.get_current_stream(), exchange._stream
            wait = exchange.post(Post(to, fro))
            assert [stream for stream, _ in there.waited] == [here], "what is sent has been computed"
            assert here.waited == [(there, 2 * (16 + 14))], "and what is computed waits for the first bytes alone"
            wait()
            assert here.waited[1:] == [(there, 2 * (60 + 14))]
            for x, y in zip(received, sent, strict=True):
                np.testing.assert_array_equal(x, random(*y.shape, dtype=y.dtype, seed=1 - rank) if y.size else y)
            assert to_numpy(fro[0].array).tobytes() == received[0].tobytes()

        in_threads(2, run)


KINDS = "ready", "launched", "on"


@pytest.mark.parametrize("name", CASES)
def test_threads_with_a_barrier_launch_messages_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, size, words = CASES[name]
    x = np.split(random(*(() if "cu_seqlens" in words else (2,)), 48, 4, 8, dtype=FP32), size, -3)
    barrier, lock = threading.Barrier(size), threading.Lock()
    events: list[tuple[str, int]] = []

    def note(kind: str, rank: int) -> None:
        with lock:
            events.append((kind, rank))

    class Noting(Nccl):
        def post(self, post: Post) -> Wait:
            time.sleep(0.002 * self.rank)  # the last one is late
            note("ready", self.rank)
            wait = super().post(post)
            note("on", self.rank)
            return wait

        def _move(self, post: Post, part: slice) -> None:
            super()._move(post, part)
            note("launched", self.rank)

    with communicators(monkeypatch, size) as devices:

        def run(rank: int) -> None:
            exchange = OfHostMemory(Noting(devices[rank], barrier))
            out, pullback = function(x[rank], x[rank], x[rank], exchange, **words)
            pullback(out)

        in_threads(size, run)
    times = {kind: [[i for i, x in enumerate(events) if x == (kind, r)] for r in range(size)] for kind in KINDS}
    ready, launched, on = (zip(*times[kind], strict=True) for kind in KINDS)
    steps = list(zip(ready, zip(launched, launched, strict=True), on, strict=True))
    assert len(steps) > 1
    for arrived, (first, rest), gone in steps:
        assert max(arrived) < min(first) and max(rest) < min(gone)


def test_a_thread_that_fails_lets_no_other_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2)

    def run(rank: int) -> None:
        exchange = Nccl(devices[rank], barrier)
        if rank:
            monkeypatch.setattr(exchange, "_move", lambda post, part: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                exchange.post(Post([], []))
        else:
            with pytest.raises(threading.BrokenBarrierError):
                exchange.post(Post([], []))

    with communicators(monkeypatch, 2) as devices:
        in_threads(2, run)


def test_threads_without_a_barrier_are_refused_a_second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_alone", {})
    first, second = threading.Event(), threading.Event()

    def run(rank: int) -> None:
        monkeypatch.setattr(devices[rank], "device_id", lambda: rank)
        if rank:
            first.wait(30)
            with pytest.raises(cuflash.InvalidArgument, match=r"of GPU 1, and another thread of this process .* GPU 0"):
                exchange_of(devices[rank])
            Nccl(devices[rank], threading.Barrier(2))
            second.set()
        else:
            for _ in range(2):
                exchange_of(devices[rank])
            first.set()
            second.wait(30)

    with communicators(monkeypatch, 2) as devices:
        in_threads(2, run)
        exchange_of(devices[1])  # the other thread has ended


def test_what_is_no_communicator_or_barrier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cuflash.InvalidArgument, match=r"communicator is 3; expected a cupy.cuda.nccl.NcclCommunicator"):
        Nccl(3)
    with communicators(monkeypatch, 2) as devices:
        for barrier in (2, threading.Barrier(3)):
            with pytest.raises(cuflash.InvalidArgument, match=r"barrier is .*; expected a threading.Barrier"):
                Nccl(devices[0], barrier)


def test_which_groups_are_communicators(monkeypatch: pytest.MonkeyPatch) -> None:
    with communicators(monkeypatch, 3) as devices:
        for group in (devices[2], SimpleNamespace(_comm=devices[2])):
            assert (exchange_of(group).rank, exchange_of(group).size) == (2, 3)
    x = np.zeros((1, 4, 2, 8))
    with pytest.raises(cuflash.InvalidArgument, match=r"group is 3; expected a cupy.cuda.nccl.NcclCommunicator"):
        ring_attention(x, x, x, 3)
