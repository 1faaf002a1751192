"""The devices of an NCCL communicator, each of which a process or a thread of its own drives.

Messages and their order are tested with a communicator that copies host memory between threads, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuflash.arrays import cupy_arrays
from cuflash.errors import InvalidArgument
from cuflash.numbers import shown
from cuflash.parallel.exchange import Exchange, Post, Wait

_FIRST_BYTES = 1 << 16
"""Of every message, that go before all others."""

_alone: dict[int, int] = {}
"""GPUs of communicators without a barrier, by the thread that drives them."""
_noting = threading.Lock()


class Nccl(Exchange):
    """Messages by NCCL on a stream beside the current one, so that they overlap what is computed.

    NCCL's kernels hold multiprocessors while they wait for those of the other device, which themselves would wait for
    kernels that fill theirs until they end. So what is computed beside messages begins when their first bytes are here,
    by which time both ends are at work.

    Parameters
    ----------
    communicator : cupy.cuda.nccl.NcclCommunicator
        That of the current device. One that is passed to a call as it is belongs to a process of its own.
    barrier : threading.Barrier, optional
        The threads of this process that drive a GPU each, all of which pass the same. NCCL's kernels of one GPU wait
        for those of another, and the driver may have a thread that allocates memory or loads a kernel wait for them, so
        that the others would never be launched [1]_: at a barrier all are ready, and at the next all are launched.

    Raises
    ------
    InvalidArgument
        If either is something else, the barrier has room for more threads than there are devices, or there is none and
        another thread of this process drives another GPU.

    References
    ----------
    .. [1] NVIDIA, "NCCL Developer Guide", Using NCCL with CUDA: Concurrency between NCCL and CUDA calls.

    Examples
    --------
    Two threads of one process::

        unique, barrier = nccl.get_unique_id(), threading.Barrier(2)

        def run(rank):
            with cupy.cuda.Device(rank), cupy.cuda.Stream(non_blocking=True):
                group = cuflash.parallel.Nccl(nccl.NcclCommunicator(2, unique, rank), barrier)
                return ring_attention(q[rank], k[rank], v[rank], group, causal=True)
    """

    def __init__(self, communicator: Any, barrier: threading.Barrier | None = None) -> None:
        if not is_communicator(communicator):
            raise InvalidArgument(f"communicator is {shown(communicator)}; expected a cupy.cuda.nccl.NcclCommunicator.")
        self.rank: int = communicator.rank_id()
        self.size: int = communicator.size()
        if barrier is not None and (not isinstance(barrier, threading.Barrier) or barrier.parties > self.size):
            raise InvalidArgument(
                f"barrier is {shown(barrier)}; expected a threading.Barrier of those of {self.size} devices that "
                "threads of this process drive."
            )
        if barrier is None and self.size > 1:
            _check_alone(communicator.device_id())
        import cupy
        from cupy.cuda import nccl

        self._communicator, self._nccl, self._cuda = communicator, nccl, cupy.cuda
        self._barrier = barrier
        self._stream = cupy.cuda.Stream(non_blocking=True, priority=-1)  # the other bytes go before what is computed

    def post(self, post: Post) -> Wait:
        """Send and receive once the current stream has come this far."""
        stream, current = self._stream, self._cuda.get_current_stream()
        # What is sent is computed then, and what is received may lie where an array lay that is still read until then.
        stream.wait_event(current.record())
        with self._in_step():
            self._move(post, slice(_FIRST_BYTES))
            begun = stream.record()
            self._move(post, slice(_FIRST_BYTES, None))
        current.wait_event(begun)
        done = stream.record()

        def wait() -> None:
            self._cuda.get_current_stream().wait_event(done)
            held.clear()

        held = [post]  # the arrays must not be freed before
        return wait

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Launch messages while the other threads of this process launch theirs."""
        if self._barrier is None:
            yield
            return
        self._barrier.wait()
        try:
            yield
        except BaseException:
            self._barrier.abort()  # the others would wait for good
            raise
        self._barrier.wait()

    def _move(self, post: Post, part: slice) -> None:
        """Send and receive some bytes of every message that has them."""
        arrays, nccl = cupy_arrays(), self._nccl
        nccl.groupStart()
        for messages, move in ((post.sent, self._communicator.send), (post.received, self._communicator.recv)):
            for peer, x in messages:
                if some := range(x.nbytes)[part]:
                    move(arrays.pointer(x) + some.start, len(some), nccl.NCCL_UINT8, peer, self._stream.ptr)
        nccl.groupEnd()


def is_communicator(x: Any) -> bool:
    """Whether this is what NCCL's calls are made on."""
    return all(hasattr(x, name) for name in ("rank_id", "size", "send", "recv"))


def _check_alone(gpu: int) -> None:
    """Refuse another GPU than those of other threads: without a barrier they would sooner or later wait for good."""
    thread = threading.get_ident()
    with _noting:
        for ended in _alone.keys() - {x.ident for x in threading.enumerate()}:
            del _alone[ended]
        others = {other for driver, other in _alone.items() if driver != thread} - {gpu}
        if others:
            raise InvalidArgument(
                f"communicator is of GPU {gpu}, and another thread of this process sends from GPU {min(others)}: each "
                "could wait for the other for good. Pass cuflash.parallel.Nccl(communicator, barrier) as group, with "
                "one threading.Barrier for all of these threads."
            )
        _alone[thread] = gpu
