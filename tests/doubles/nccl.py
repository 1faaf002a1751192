"""An NCCL communicator between threads, which copies host memory, and streams that note what waits for what."""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from cuflash.parallel import Exchange
from cuflash.parallel.exchange import Message, Post, Wait
from doubles.arrays import as_cupy

SECONDS = 60
"""After which a message is taken for lost."""


class Group(threading.local):
    """What a thread has called since ``groupStart``: all is sent before anything is waited for."""

    sends: list[Callable[[], None]] | None = None
    receives: list[Callable[[], None]]

    def start(self) -> None:
        assert self.sends is None
        self.sends, self.receives = [], []

    def end(self) -> None:
        assert self.sends is not None
        for call in (*self.sends, *self.receives):
            call()
        self.sends = None


class Communicator:
    """As much of ``cupy.cuda.nccl.NcclCommunicator`` as cuflash calls."""

    def __init__(self, rank: int, size: int, group: Group, boxes: dict[tuple[int, int], queue.Queue]) -> None:
        self._rank, self._size, self._group, self._boxes = rank, size, group, boxes

    def rank_id(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def device_id(self) -> int:
        return 0  # in a process of its own

    def send(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert dtype == UINT8 and count and self._group.sends is not None
        Stream.of[stream].moved += count
        self._group.sends.append(lambda: self._boxes[self._rank, peer].put(ctypes.string_at(pointer, count)))

    def recv(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert dtype == UINT8 and count and self._group.sends is not None
        Stream.of[stream].moved += count
        self._group.receives.append(lambda: self._receive(pointer, count, peer))

    def _receive(self, pointer: int, count: int, peer: int) -> None:
        content = self._boxes[peer, self._rank].get(timeout=SECONDS)
        assert len(content) == count, "another message was expected"
        ctypes.memmove(pointer, content, count)


UINT8 = 1
"""What ``nccl.h`` numbers it as."""


class Stream:
    """A stream, how many bytes it was told to move, and the events to wait for: other streams and their bytes then."""

    of: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()
    """Streams by what stands for their handle."""

    def __init__(self, non_blocking: bool = True, priority: int = 0) -> None:
        assert non_blocking and priority <= 0
        self.ptr, self.moved = id(self), 0
        self.waited: list[tuple[Stream, int]] = []
        self.of[self.ptr] = self

    def record(self) -> tuple[Stream, int]:
        return self, self.moved

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.waited.append(event)


@contextmanager
def communicators(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[list[Communicator]]:
    """Communicators of so many threads, where CuPy's NCCL and streams are stood in for."""
    import cupy

    group, here = Group(), threading.local()
    boxes = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    def current() -> Stream:
        here.stream = getattr(here, "stream", None) or Stream()
        return here.stream

    monkeypatch.setattr(
        cupy.cuda, "nccl", SimpleNamespace(groupStart=group.start, groupEnd=group.end, NCCL_UINT8=UINT8), raising=False
    )
    monkeypatch.setattr(cupy.cuda, "Stream", Stream)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", current)
    yield [Communicator(rank, size, group, boxes) for rank in range(size)]
    assert all(box.empty() for box in boxes.values()), "a message was never received"


class OfHostMemory(Exchange):
    """An exchange of CuPy's arrays for arrays of NumPy, over the same memory."""

    def __init__(self, exchange: Exchange) -> None:
        self.rank, self.size, self._exchange = exchange.rank, exchange.size, exchange

    def post(self, post: Post) -> Wait:
        def lent(messages: Sequence[Message]) -> list[Message]:
            return [Message(peer, as_cupy(np.asarray(x))) for peer, x in messages]

        return self._exchange.post(Post(lent(post.sent), lent(post.received)))


def in_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """The results of as many threads, each of which is given its number."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
    if errors:
        raise errors[0]
    return results
