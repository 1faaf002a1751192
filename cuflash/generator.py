"""PhiloxGenerator: where dropout's seeds and offsets come from, in step with torch's CUDA generator if wanted."""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import threading
import weakref
from typing import Any

import numpy as np

from cuflash.errors import REFUSALS, InvalidArgument, shorten
from cuflash.numbers import integer, shown

_STATE = struct.Struct("<QQ")  # seed, offset

_alive: weakref.WeakSet[PhiloxGenerator] = weakref.WeakSet()


class PhiloxGenerator:
    """A seed and an offset that moves on with every draw, so that no two draws share random numbers.

    Draws on the same seed and offset are equal on every backend. All methods may be called from several threads.

    The state is kept on the host, where drawing costs nothing, until `to_device` moves it to a GPU. From there on
    kernels advance it, also those of a captured CUDA graph at every replay. Calls on streams that run side by side then
    need generators of their own, and the methods that read or change the state wait for the GPU.

    A forked process has the generators that its parent had, in the same state; the default one alone moves to a seed
    that follows from the parent's and the number of the fork, so that workers draw differently.

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
        try:
            self._lock = threading.Lock()
            _alive.add(self)
            self._array: Any = None  # CuPy (2,) uint64, where the state is on a GPU
            self._set(secrets.randbits(64) if seed is None else seed, offset)
        except REFUSALS as error:
            shorten(error)
            raise

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
            return self._load()

    def next(self, increment: int) -> tuple[int, int]:
        """Return (seed, offset) for a draw of `increment` numbers; move on by as many, up to a multiple of 4."""
        try:
            step = _uint64(increment)
            if step is None:
                raise InvalidArgument(
                    f"increment is {shown(increment)}; expected an integer from 0 to 2**64 - 1. "
                    "Pass how many numbers are drawn."
                )
            with self._lock:
                seed, offset = self._load()
                self._store(seed, (offset + (step + 3) // 4 * 4) % 2**64)
            return seed, offset
        except REFUSALS as error:
            shorten(error)
            raise

    def to_device(self, device: int | None = None) -> PhiloxGenerator:
        """Keep the state in the memory of a GPU from now on; returns the generator.

        Call it before a CUDA graph with dropout is captured. The graph then draws fresh numbers at every replay.

        Parameters
        ----------
        device : int, optional
            Number of the GPU, CuPy's current one by default.
        """
        import cupy

        with self._lock:
            ordinal = cupy.cuda.Device().id if device is None else device
            if self._array is None or self._array.device.id != ordinal:  # captured graphs know the address
                state = self._load()
                with cupy.cuda.Device(ordinal):
                    self._array = cupy.empty(2, np.uint64)
                self._store(*state)
        return self

    def address(self, device: int) -> int:
        """Where a GPU keeps the state, for kernels to advance it; 0 if it is elsewhere."""
        array = self._array
        return array.data.ptr if array is not None and array.data.device_id == device else 0

    def manual_seed(self, seed: int) -> PhiloxGenerator:
        """Start again at `seed`, offset 0; returns the generator."""
        try:
            self._set(seed, 0)
            return self
        except REFUSALS as error:
            shorten(error)
            raise

    def torch_state(self) -> bytes:
        """The 16 bytes that ``torch.cuda.set_rng_state`` takes, as a uint8 tensor."""
        return _STATE.pack(*self.state)

    def set_torch_state(self, state: Any) -> None:
        """Take over the 16 bytes that `torch_state` or ``torch.cuda.get_rng_state()`` returned."""
        try:
            flat = isinstance(state, bytes | bytearray | memoryview)
            values = np.frombuffer(state, np.uint8) if flat else np.asarray(state)
            if values.dtype != np.uint8 or values.shape != (_STATE.size,):
                raise InvalidArgument(
                    f"state is {values.dtype} of shape {values.shape}; expected 16 bytes, seed and offset. "
                    "Pass what torch.cuda.get_rng_state() or torch_state() returned."
                )
            self._set(*_STATE.unpack(values.tobytes()))
        except REFUSALS as error:
            shorten(error)
            raise

    def _set(self, seed: int, offset: int) -> None:
        state = checked(seed, offset)
        with self._lock:
            self._store(*state)

    def _load(self) -> tuple[int, int]:
        if self._array is None:
            return self._host
        with self._array.device as device:
            device.synchronize()
            return tuple(self._array.get().tolist())

    def _store(self, seed: int, offset: int) -> None:
        if self._array is None:
            self._host = seed, offset
            return
        with self._array.device as device:
            device.synchronize()
            self._array.set(np.array((seed, offset), np.uint64))
            device.synchronize()

    def __reduce__(self) -> tuple[type[PhiloxGenerator], tuple[int, int]]:
        return type(self), self.state

    def __repr__(self) -> str:
        seed, offset = self.state
        return f"{type(self).__name__}(seed={seed}, offset={offset})"


def checked(seed: Any, offset: Any) -> tuple[int, int]:
    """A seed and an offset as integers.

    Raises
    ------
    InvalidArgument
        If they are none that a generator can have.
    """
    first, start = _uint64(seed), _uint64(offset)
    if first is None:
        raise InvalidArgument(f"seed is {shown(seed)}; expected an integer from 0 to 2**64 - 1, or None for any.")
    if start is None or start % 4:
        raise InvalidArgument(
            f"offset is {shown(offset)}; expected a multiple of 4 from 0 to 2**64 - 4. Round it up to one."
        )
    return first, start


def _uint64(value: Any) -> int | None:
    """The integer, if it is one of 64 bits without a sign."""
    number = integer(value)
    return number if number is not None and 0 <= number < 2**64 else None


default_generator: PhiloxGenerator = PhiloxGenerator()
"""What calls draw from that are given no generator."""

_forks = 0
"""How many processes this one and those before it have started, which tells their children apart."""


def _before_fork() -> None:
    global _forks
    _forks += 1


def _after_fork_in_child() -> None:
    """Draw differently than the parent and its other children; a lock that another thread held is nobody's now."""
    for generator in list(_alive):
        generator._lock = threading.Lock()
    seed, _ = default_generator._host
    words = hashlib.sha256(f"{seed} {_forks}".encode()).digest()
    default_generator._array = None  # of a GPU that this process does not have
    default_generator._host = int.from_bytes(words[:8], "little"), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


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
