"""PhiloxGenerator: where dropout's seeds and offsets come from, in step with torch's CUDA generator if wanted."""

from __future__ import annotations

import secrets
import struct
import threading
from typing import Any

import numpy as np

from cuflash.errors import InvalidArgument

_STATE = struct.Struct("<QQ")  # seed, offset


class PhiloxGenerator:
    """A seed and an offset that moves on with every draw, so that no two draws share random numbers.

    Draws on the same seed and offset are equal on every backend. All methods may be called from several threads.

    Parameters
    ----------
    seed : int, optional
        0 to 2**64 - 1; None takes one from the operating system.
    offset : int
        Where to start, a multiple of 4.

    Raises
    ------
    InvalidArgument
        If seed or offset is not such a number.

    Examples
    --------
    Draw what torch would draw, and let torch go on from there::

        generator = cuflash.PhiloxGenerator.from_torch_state(torch.cuda.get_rng_state())
        ...
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(generator.torch_state()), dtype=torch.uint8))
    """

    def __init__(self, seed: int | None = None, offset: int = 0) -> None:
        self._lock = threading.Lock()
        self._set(secrets.randbits(64) if seed is None else seed, offset)

    @classmethod
    def from_torch_state(cls, state: Any) -> PhiloxGenerator:
        """Build a generator that goes on where a CUDA generator of torch stands.

        Parameters
        ----------
        state : bytes-like or array of uint8
            The 16 bytes of ``torch.cuda.get_rng_state()``, little-endian seed and offset.
        """
        generator = cls(0)
        generator.set_torch_state(state)
        return generator

    @property
    def state(self) -> tuple[int, int]:
        """(seed, offset) of the next draw."""
        with self._lock:
            return self._seed, self._offset

    def next(self, increment: int) -> tuple[int, int]:
        """Return (seed, offset) for a draw of `increment` numbers; move on by as many, up to a multiple of 4."""
        if not _is_uint64(increment):
            raise InvalidArgument(
                f"increment is {increment!r}; expected an integer from 0 to 2**64 - 1. Pass how many numbers are drawn."
            )
        with self._lock:
            state = self._seed, self._offset
            self._offset = (self._offset + (int(increment) + 3) // 4 * 4) % 2**64
        return state

    def manual_seed(self, seed: int) -> PhiloxGenerator:
        """Start again at `seed`, offset 0; returns the generator."""
        self._set(seed, 0)
        return self

    def torch_state(self) -> bytes:
        """The 16 bytes that ``torch.cuda.set_rng_state`` takes, as a uint8 tensor."""
        return _STATE.pack(*self.state)

    def set_torch_state(self, state: Any) -> None:
        """Take over the 16 bytes that `torch_state` or ``torch.cuda.get_rng_state()`` returned."""
        flat = isinstance(state, bytes | bytearray | memoryview)
        values = np.frombuffer(state, np.uint8) if flat else np.asarray(state)
        if values.dtype != np.uint8 or values.shape != (_STATE.size,):
            raise InvalidArgument(
                f"state is {values.dtype} of shape {values.shape}; expected 16 bytes, seed and offset. "
                "Pass what torch.cuda.get_rng_state() or torch_state() returned."
            )
        self._set(*_STATE.unpack(values.tobytes()))

    def _set(self, seed: int, offset: int) -> None:
        if not _is_uint64(seed):
            raise InvalidArgument(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1, or None for any.")
        if not _is_uint64(offset) or offset % 4:
            raise InvalidArgument(
                f"offset is {offset!r}; expected a multiple of 4 from 0 to 2**64 - 4. Round it up to one."
            )
        with self._lock:
            self._seed, self._offset = int(seed), int(offset)

    def __reduce__(self) -> tuple[type[PhiloxGenerator], tuple[int, int]]:
        return type(self), self.state

    def __repr__(self) -> str:
        seed, offset = self.state
        return f"{type(self).__name__}(seed={seed}, offset={offset})"


def _is_uint64(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and 0 <= int(x) < 2**64


default_generator = PhiloxGenerator()
"""What calls draw from that are given no generator."""


def manual_seed(seed: int) -> PhiloxGenerator:
    """Seed the default generator, from which calls draw that are given none; returns it.

    Parameters
    ----------
    seed : int
        0 to 2**64 - 1.

    Raises
    ------
    InvalidArgument
        If seed is not such a number.
    """
    return default_generator.manual_seed(seed)
