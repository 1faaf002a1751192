"""Scratch memory that outlives a call."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from cuflash.arrays import Launcher

_MAX_KEPT = 64
_PER_THREAD = 2
"""cudaStreamPerThread: what every thread calls its own default stream."""

_numbers = itertools.count()
_thread = threading.local()


class KeptZeros:
    """Allocates an array of zeros for kernels that leave it as they find it: one for each stream, cleared once.

    Calls on a stream run one after another, so they can share an array. What is true of streams need not be of their
    handles: CUDA hands that of a destroyed stream out again while its work still runs. So a stream is kept as long as
    its array, and one that others may destroy has none. A captured graph may run beside calls, and gets its own.
    """

    def __init__(self, framework: Launcher, shape: tuple[int, ...], dtype: Any, device: int) -> None:
        self._framework, self._asked = framework, (shape, dtype, device)
        self._kept: dict[Any, tuple[Any, Any]] = {}
        """Streams and their arrays by handle, and by thread where threads share the handle."""
        self._lock = threading.Lock()

    def __call__(self) -> Any:
        """The current stream's array; call inside the framework's context of the device."""
        framework = self._framework
        if framework.is_capturing():
            return framework.zeros(*self._asked)
        handle, stream = framework.stream()
        key = handle if handle != _PER_THREAD else (handle, _thread_number())
        kept = self._kept.get(key)
        return self._keep(key, stream, framework.zeros(*self._asked)) if kept is None else kept[1]

    def own(self) -> Any:
        """An array that no other call gets; call inside the framework's context of the device."""
        return self._framework.zeros(*self._asked)

    def _keep(self, key: Any, stream: Any, array: Any) -> Any:
        """The array, kept for the next call if there is room and its stream can be kept with it."""
        if stream is None:
            return array
        with self._lock:
            if len(self._kept) >= _MAX_KEPT:
                self._kept = {k: kept for k, kept in self._kept.items() if not self._framework.is_done(kept[0])}
            if len(self._kept) < _MAX_KEPT:
                self._kept[key] = stream, array
        return array


def _thread_number() -> int:
    """A number that no thread has had before; those of the operating system return."""
    try:
        return _thread.number
    except AttributeError:
        _thread.number = next(_numbers)
        return _thread.number
