"""The devices of an NCCL communicator, each of which a process or a thread of its own drives.

Messages and their order are tested with a communicator that copies host memory between threads, too.
"""

from __future__ import annotations

from typing import Any

from cuflash.arrays import cupy_arrays
from cuflash.parallel.exchange import Exchange, Post, Wait


class Nccl(Exchange):
    """Messages by NCCL on a stream beside the current one, so that they overlap what is computed."""

    def __init__(self, communicator: Any) -> None:
        import cupy
        from cupy.cuda import nccl

        self.rank: int = communicator.rank_id()
        self.size: int = communicator.size()
        self._communicator, self._nccl, self._cuda = communicator, nccl, cupy.cuda
        # Before what is computed: kernels that fill the GPU would keep a message waiting until they end.
        self._stream = cupy.cuda.Stream(non_blocking=True, priority=-1)

    def post(self, post: Post) -> Wait:
        """Send and receive once the current stream has come this far."""
        arrays, nccl, stream = cupy_arrays(), self._nccl, self._stream
        # What is sent is computed then, and what is received may lie where an array lay that is still read until then.
        stream.wait_event(self._cuda.get_current_stream().record())
        nccl.groupStart()
        for messages, move in ((post.sent, self._communicator.send), (post.received, self._communicator.recv)):
            for peer, x in messages:
                if x.nbytes:
                    move(arrays.pointer(x), x.nbytes, nccl.NCCL_UINT8, peer, stream.ptr)
        nccl.groupEnd()
        done = stream.record()

        def wait() -> None:
            self._cuda.get_current_stream().wait_event(done)
            held.clear()

        held = [post]  # the arrays must not be freed before
        return wait
