"""Jobs of a call on all cores, while BLAS keeps each product of matrices on one.

A matrix product of one tile is too short to be worth sharing: OpenBLAS would wake all its threads for each and wait for
the slowest. Jobs are cut by the sizes of the call alone, so that results do not depend on who computes them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from math import prod
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

from cuflash import settings

WORTH = 2**18
"""Scores below which waking other threads takes longer than a call: half a millisecond on one core."""

TINY = 2**11
"""Scores below which BLAS itself takes one thread: products of heads up to 128 are then below OpenBLAS's threshold."""

BRIEF = 2**23
"""Scores of a call that ends within some milliseconds."""

KEPT_BYTES = 2**22
"""The largest scratch array that outlives a call; tiles are smaller."""


class Scratch:
    """Arrays that a worker uses again from tile to tile: fresh ones would be mapped in and cleared page by page."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, np.dtype], np.ndarray] = {}
        self._last: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The array of that name, with whatever it held."""
        last = self._last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        size = prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.size < size:
            buffer = np.empty(size, dtype)
            if buffer.nbytes > KEPT_BYTES:
                return buffer.reshape(shape)
            self._buffers[name, dtype] = buffer
        self._last[name] = array = buffer[:size].reshape(shape)
        return array


class SpareScratch(threading.local):
    """What a thread has for its next job: memory that it wrote last, and that is in its core's cache.

    It has none in the middle of a job, as another call may begin there, in a signal's handler.
    """

    _spare: Scratch | None = None

    def borrow(self) -> Scratch:
        """Scratch that nobody else has."""
        spare, self._spare = self._spare, None
        return Scratch() if spare is None else spare

    def give_back(self, scratch: Scratch) -> None:
        """Keep it for this thread's next job."""
        self._spare = scratch


tile_scratch, key_scratch = SpareScratch(), SpareScratch()

Job = Callable[[Scratch], object]
"""Part of a call that touches no result of another part."""


def run(jobs: Iterable[Job], scores: int) -> None:
    """Run all jobs, which compute about so many scores together, and return when they are done.

    The calling thread works too and waits for no helper that has not begun, so that calls from many threads, or from a
    pool that is busy, cannot lock each other out. The first exception of a job is raised, after all others have ended.
    """
    left = deque(jobs)

    def work() -> None:
        before = _limit(_libraries().own) if scores >= TINY else []
        scratch = tile_scratch.borrow()
        try:
            # Threads do not inherit the caller's state; what a number beyond a type's range becomes is documented.
            with np.errstate(all="ignore"):
                while left:
                    try:
                        job = left.popleft()
                    except IndexError:  # another thread was faster
                        return
                    job(scratch)
        except BaseException:
            left.clear()
            raise
        finally:
            tile_scratch.give_back(scratch)
            _give_back(before)

    if scores < TINY:
        work()
        return
    most = min(settings.num_threads(), len(left)) - 1 if scores >= WORTH else 0
    with _held, _crew.apart(briefly=scores < BRIEF) if most > 0 else nullcontext():
        helpers = [_Helper(work) for _ in range(most)]
        _crew.send(helpers)
        try:
            work()
        finally:
            failures = [helper.end() for helper in helpers]
    for failure in failures:
        if failure is not None:
            raise failure


class _Helper:
    """Work of a call that waits for a thread, until one begins it or the call ends.

    Made of two locks, as the shortest calls that are shared take half a millisecond, and a future 20 microseconds.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._claim, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """Do the work, if the call has not ended."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
        except BaseException as error:
            self._failure = error
        finally:
            self._running.release()

    def end(self) -> BaseException | None:
        """Wait until what has begun is done, and return its exception; what has not begun never will."""
        if not self._claim.acquire(blocking=False):
            self._running.acquire()
        return self._failure


class _Crew:
    """Threads that wait for helpers' work; as many as a call has ever wanted."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[_Helper] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self._cores: set[int] = set()  # that they are kept to

    @contextmanager
    def apart(self, briefly: bool) -> Iterator[None]:
        """Keep the threads off the core where the calling one is; if it is `briefly`, keep that one there, too.

        Threads wait for each other's Python for microseconds. A scheduler that lets idle cores sleep wakes them where
        another computes, and sees after some ticks, by then a short call has ended, that both do.
        """
        usable = _usable_cores()
        if len(usable) < 2:
            yield
            return
        here = {_this_core()}
        others = usable - here
        if self._cores != others:
            self._cores = others
            for thread in self.threads:
                _keep_to(thread.native_id, others)
        if not briefly:
            yield
            return
        _keep_to(0, here)
        try:
            yield
        finally:
            _keep_to(0, usable)

    def send(self, helpers: list[_Helper]) -> None:
        """Have the work begun by threads that have nothing to do, where this platform has any."""
        while len(self.threads) < len(helpers):
            thread = threading.Thread(target=self._serve, name=f"cuflash_{len(self.threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down, or there are no more threads
                break
            self.threads.append(thread)
        for helper in helpers:
            self._waiting.put(helper)

    def _serve(self) -> None:
        _keep_to(0, self._cores)
        while True:
            self._waiting.get().begin()


try:
    _this_core: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu
except (AttributeError, OSError, TypeError):  # no Linux

    def _this_core() -> int:
        return -1


def _usable_cores() -> set[int]:
    """Those that this thread may use, where threads can be kept to some of them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") and _this_core() >= 0 else set()


def _keep_to(thread: int | None, cores: set[int]) -> None:
    """Have a thread, 0 is this one, run on these cores only."""
    if cores and thread is not None:
        with suppress(OSError):
            os.sched_setaffinity(thread, cores)


class _HeldBlas:
    """NumPy's BLAS, held to one thread while any call runs and given back what it had when none does.

    The number is the process's own, not a thread's: calls that overlap must not take each other's 1 for what was there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = 0
        self._before: list[tuple[LibController, int]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self.calls == 0:
                self._before = _limit(_libraries().shared)
            self.calls += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self.calls -= 1
            if self.calls == 0:
                self.give_back()

    def give_back(self) -> None:
        """Set the numbers of threads that were there before."""
        _give_back(self._before)


class _Libraries(NamedTuple):
    """The BLAS libraries that the process has loaded; NumPy's own is among them from its import on."""

    shared: list[LibController]
    """Whose number of threads is the process's."""
    own: list[LibController]
    """Where every thread has a number of its own."""


@cache
def _libraries() -> _Libraries:
    shared: list[LibController] = []
    own: list[LibController] = []
    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        per_thread = library.internal_api == "openblas" and library.threading_layer == "openmp"
        (own if per_thread else shared).append(library)
    return _Libraries(shared, own)


def _limit(libraries: Iterable[LibController]) -> list[tuple[LibController, int]]:
    """Set one thread; returns those that had more, and how many."""
    before = [(library, library.num_threads) for library in libraries]
    before = [(library, number) for library, number in before if number is not None and number != 1]
    for library, _ in before:
        _set(library, 1)
    return before


def _give_back(before: Iterable[tuple[LibController, int]]) -> None:
    for library, number in before:
        _set(library, number)
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread()


def _set(library: LibController, number: int) -> None:
    # threadpoolctl lets only the thread that was first set a number; here whichever call is first or last does.
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)
    library.set_num_threads(number)


_crew = _Crew()
_held = _HeldBlas()


def _forget() -> None:
    """Start anew in a forked child, which has the parent's queue and locks, but none of its threads."""
    global _crew, _held
    _crew = _Crew()
    if _held.calls:
        _held.give_back()
    _held = _HeldBlas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
