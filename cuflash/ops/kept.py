"""Scratch memory that outlives a call."""

from __future__ import annotations

import threading
from typing import Any

from cuflash.arrays import CuPy, Torch

_MAX_KEPT = 64


class KeptZeros:
    """Arrays of zeros for kernels that leave them as they find them: one for each stream, cleared once.

    Calls on a stream run one after another, so they can share an array. A captured graph may run beside them, and gets
    its own. Threads are told apart as well, since each may call its own default stream by the same name.
    """

    def __init__(self, framework: CuPy | Torch) -> None:
        self._framework = framework
        self._arrays: dict[tuple[int, int], Any] = {}

    def __call__(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """The current stream's array; call inside the framework's context of the device."""
        framework = self._framework
        if framework.is_capturing():
            return framework.zeros(shape, dtype, device)
        key = framework.stream(), threading.get_ident()
        found = self._arrays.get(key)
        if found is None:
            if len(self._arrays) >= _MAX_KEPT:
                self._arrays.clear()
            found = self._arrays[key] = framework.zeros(shape, dtype, device)
        return found
