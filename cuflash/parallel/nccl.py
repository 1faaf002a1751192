"""The devices of an NCCL communicator, each of which a process or a thread of its own drives.

Messages and their order are tested with a communicator that copies host memory between threads, too.
"""

from __future__ import annotations

from typing import Any

from cuflash.arrays import cupy_arrays
from cuflash.parallel.exchange import Exchange, Post, Wait

_FIRST_BYTES = 1 << 16
"""Of every message, that go before all others."""


class Nccl(Exchange):
    """Messages by NCCL on a stream beside the current one, so that they overlap what is computed.

    NCCL's kernels hold multiprocessors while they wait for those of the other device, which themselves would wait for
    kernels that fill theirs until they end. So what is computed beside messages begins when their first bytes are here,
    by which time both ends are at work.
    """

    def __init__(self, communicator: Any) -> None:
        import cupy
        from cupy.cuda import nccl

        self.rank: int = communicator.rank_id()
        self.size: int = communicator.size()
        self._communicator, self._nccl, self._cuda = communicator, nccl, cupy.cuda
        self._stream = cupy.cuda.Stream(non_blocking=True, priority=-1)  # the other bytes go before what is computed

    def post(self, post: Post) -> Wait:
        """Send and receive once the current stream has come this far."""
        stream, current = self._stream, self._cuda.get_current_stream()
        # What is sent is computed then, and what is received may lie where an array lay that is still read until then.
        stream.wait_event(current.record())
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

    def settle(self) -> None:
        """Return when all messages have arrived."""
        self._stream.synchronize()

    def _move(self, post: Post, part: slice) -> None:
        """Send and receive some bytes of every message that has them."""
        arrays, nccl = cupy_arrays(), self._nccl
        nccl.groupStart()
        for messages, move in ((post.sent, self._communicator.send), (post.received, self._communicator.recv)):
            for peer, x in messages:
                if some := range(x.nbytes)[part]:
                    move(arrays.pointer(x) + some.start, len(some), nccl.NCCL_UINT8, peer, self._stream.ptr)
        nccl.groupEnd()
