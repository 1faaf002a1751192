"""Devices with a thread each, over a communicator that copies host memory: no GPU takes part."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles.arrays import as_cupy, needs_cupy, to_numpy
from doubles.nccl import OfHostMemory, communicators, in_threads
from inputs import BF16, FP32, random

import cuflash
from cuflash.parallel import all_to_all_attention_vjp, nccl, ring_attention, ring_attention_vjp, token_order
from cuflash.parallel import devices as devices_of
from cuflash.parallel.devices import exchange_of
from cuflash.parallel.exchange import Message, Post
from cuflash.parallel.nccl import Nccl

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


@pytest.mark.parametrize("function", [ring_attention_vjp, all_to_all_attention_vjp])
def test_no_message_is_on_its_way_while_the_first_call_of_a_kind_loads_kernels(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_of, "_known", set())
    x = [random(1, 8, 2, 4, dtype=FP32, seed=rank) for rank in range(2)]
    barrier = threading.Barrier(2)
    with communicators(monkeypatch, 2) as devices:

        def run(rank: int) -> list[list[int]]:
            counts = []
            for words in ({}, {}, {"order": "zigzag", "causal": True}):
                exchange = Nccl(devices[rank])
                barrier.wait(30)
                out, pullback = function(x[rank], x[rank], x[rank], OfHostMemory(exchange), **words)
                counts.append([exchange._stream.times_synchronized])
                for _ in range(2):
                    barrier.wait(30)
                    pullback(out)
                    counts[-1].append(exchange._stream.times_synchronized)
            return counts

        for first, second, other in in_threads(2, run):
            assert 0 < first[0] < first[1] == first[2] and second == [0, 0, 0]
            assert 0 < other[0] < other[1] == other[2]


def test_which_groups_are_communicators(monkeypatch: pytest.MonkeyPatch) -> None:
    with communicators(monkeypatch, 3) as devices:
        for group in (devices[2], SimpleNamespace(_comm=devices[2])):
            assert (exchange_of(group).rank, exchange_of(group).size) == (2, 3)
    x = np.zeros((1, 4, 2, 8))
    with pytest.raises(cuflash.InvalidArgument, match=r"group is 3; expected a cupy.cuda.nccl.NcclCommunicator"):
        ring_attention(x, x, x, 3)
