"""Arrays at the door: whose they are, where they lie, and how results go back to the same framework.

Below this file an array is a pointer with a shape, strides and a dtype. torch and JAX are found in ``sys.modules`` and
never imported: an array of theirs can only exist after their user imported them. What cuflash has for one of them alone
is in ``adapters/``, which is loaded when such an array is met.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cuflash.errors import HOW_TO_GET_CUPY, InvalidArgument, UnsupportedProblem

Array = Any
"""An array of NumPy, CuPy, torch, JAX or another library that speaks DLPack."""
ArrayT = TypeVar("ArrayT")
"""The type of q, k and v, and of results with as many axes in the same dtype."""

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType of dlpack.h


class View(NamedTuple):
    """One array argument, spelled out in the same words for every framework."""

    name: str
    """What the caller knows the argument as."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Distances between neighbours along each axis, in bytes."""
    dtype: str
    """NumPy's name of the element type: ``float16``, ``bfloat16``, ``int32``, ..."""
    itemsize: int
    pointer: int
    device: str
    """``cpu`` or ``cuda:<ordinal>``."""
    writeable: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is no element."""
        return 0 in self.shape

    def extent(self) -> tuple[int, int]:
        """First byte and end of the elements, relative to the pointer."""
        if self.empty:
            return 0, 0
        steps = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        return sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps) + self.itemsize


class Adapter:
    """A framework whose arrays may be more than memory: recorded for gradients, batched, or traced by a compiler."""

    name: str

    def answer(
        self, direction: Any, options: Any, arrays: Any, generator: Any = None, cached: Any = None
    ) -> tuple[Any, ...]:
        """Answer a call of ``ops.forward`` or ``ops.backward`` with what ``ops.answer`` gives for plain arrays.

        The first array is of this framework; the others may be anything, and are checked here.
        """
        raise NotImplementedError

    def out(self, options: Any, arrays: Any, generator: Any = None) -> Any:
        """The first result of a forward, for a caller who wants no other."""
        return self.answer("forward", options, arrays, generator)[0]

    def answer_along(self, options: Any, arrays: Any, tangents: Any, generator: Any = None) -> tuple[Any, ...]:
        """The same of a call of ``ops.jvp``."""
        raise NotImplementedError

    def tracer(self) -> Any:
        """What finds out at the moment what a written function does, in the place of ``mods.trace``; None for that."""
        return None

    def divided(self, method: str, asked: Any, tensors: Any, group: Any) -> tuple[Any, Any]:
        """(out, lse) of a call that devices share, by the name of a function of ``cuflash.parallel``.

        Raises
        ------
        UnsupportedProblem
            Where a library's arrays are not divided.
        """
        raise UnsupportedProblem(
            f"{method} does not divide arrays of {self.name} over devices. Call it under JAX or CuPy."
        )

    def outline(self, name: str, x: Any) -> View:
        """Spell an array out that may have no memory: it is looked at, and not read."""
        raise NotImplementedError


class Library:
    """Whole arrays by the functions of their own library, which NumPy, CuPy and torch name alike."""

    name: str
    xp: Any
    """The module of those functions."""

    def describe(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[int], tuple[Any, ...]]:
        """Pointers of the arrays that are given, and everything else about all of them as a key."""
        raise NotImplementedError

    def view(self, name: str, x: Any) -> View:
        """Spell an array out."""
        raise NotImplementedError

    def ordinal(self, x: Any) -> int:
        """Number of an array's device."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate."""
        raise NotImplementedError

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear."""
        raise NotImplementedError

    def outline(self, name: str, x: Any) -> View:
        """Spell an array out for `explain`, which does not read it."""
        return self.view(name, x)

    def on_host(self, names: Sequence[str], arrays: Sequence[Any]) -> list[Any] | None:
        """Arrays in host memory as NumPy's views; None where they are NumPy's, or on a GPU."""
        return None

    def from_host(self, results: Sequence[np.ndarray]) -> tuple[Any, ...]:
        """Results for arrays that :meth:`on_host` took."""
        return tuple(results)

    def is_capturing(self) -> bool:
        """Whether calls are recorded in a CUDA graph."""
        return False

    def generator(self, device: int) -> Any:
        """What dropout on a device draws from where a call names nothing; None for cuflash's own generator."""
        return None

    def arithmetic(self, x: Any) -> AbstractContextManager[Any]:
        """Where those functions take arrays that are beside `x`, and do not warn."""
        return nullcontext()

    def full(self, shape: Sequence[int], value: float, dtype: Any, beside: Any) -> Any:
        """A new array on the device of another, in a dtype of the library."""
        return self.xp.full(tuple(shape), value, dtype=dtype, **self._beside(beside))

    def arange(self, n: int, beside: Any) -> Any:
        """0 to n - 1 in int64 on the device of an array."""
        return self.xp.arange(n, dtype=self.xp.int64, **self._beside(beside))

    def moved(self, x: np.ndarray, beside: Any) -> Any:
        """A copy of an array in host memory on the device of another."""
        return self.xp.asarray(x, **self._beside(beside))

    def copied(self, x: Any) -> np.ndarray:
        """A copy in host memory of an array on a GPU."""
        copy: np.ndarray = x.get()
        return copy

    def cast(self, x: Any, dtype: Any) -> Any:
        """The array in another dtype of the library; itself if it has that one."""
        return x.astype(dtype, copy=False)

    def _beside(self, x: Any) -> dict[str, Any]:
        """The keywords that put a new array on the device of another."""
        return {}


class NumPy(Library):
    """Arrays in host memory."""

    name = "NumPy"
    xp = np

    def arithmetic(self, x: Any) -> AbstractContextManager[Any]:
        """Where NumPy does not warn of the range of numbers."""
        return np.errstate(all="ignore")

    def describe(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[int], tuple[Any, ...]]:
        """Pointers of the arrays that are given, and all else but whether they may be written as a key."""
        pointers: list[int] = []
        key: list[Any] = []
        for x in arrays:
            if x is None:
                key.append(None)
                continue
            pointer = x.__array_interface__["data"][0]
            pointers.append(pointer)
            key += (x.shape, x.strides, x.dtype, pointer & 15)
        return pointers, tuple(key)

    def view(self, name: str, x: np.ndarray) -> View:
        """Spell the array out."""
        pointer = x.__array_interface__["data"][0]
        return View(name, x.shape, x.strides, _name(x.dtype), x.itemsize, pointer, "cpu", x.flags.writeable)

    def ordinal(self, x: np.ndarray) -> int:
        """Number of the one device."""
        return 0

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear."""
        return np.zeros(shape, dtype)


class Launcher(Library):
    """Arrays of a library on the GPU, whose streams and memory kernels are launched with."""

    def elsewhere(self, device: int) -> AbstractContextManager[Any] | None:
        """Where launches and allocations for the device belong; None where they belong here."""
        raise NotImplementedError

    def context(self, device: int) -> AbstractContextManager[Any]:
        """The same, to be entered in any case."""
        there = self.elsewhere(device)
        return nullcontext() if there is None else there

    def launch_stream(self, device: int) -> int:
        """The handle of the device's current stream, on which calls are launched."""
        raise NotImplementedError

    def allocator(self, shape: tuple[int, ...], dtype: Any, device: int) -> Callable[[], Any]:
        """What :meth:`empty` of these does, for the same again and again; call inside :meth:`context`."""
        return partial(self.empty, shape, dtype, device)

    def scratch(self, nbytes: int, device: int) -> Callable[[], tuple[Any, int]]:
        """What allocates so many bytes that only kernels see: what holds them, and where they begin."""
        allocate = self.allocator((nbytes,), self.dtype(np.dtype(np.uint8)), device)

        def made() -> tuple[Any, int]:
            memory = allocate()
            return memory, self.pointer(memory)

        return made

    def stream(self) -> tuple[int, Any]:
        """Handle of the current stream, and what keeps it from being destroyed; None where nothing here can."""
        raise NotImplementedError

    def is_done(self, stream: Any) -> bool:
        """Whether a stream has no work left, nor will have it from a graph that is being captured."""
        raise NotImplementedError

    def dtype(self, dtype: np.dtype) -> Any:
        """The framework's own name of a dtype."""
        raise NotImplementedError

    def pointer(self, x: Any) -> int:
        """Address of the first element."""
        raise NotImplementedError

    def pointers(self, arrays: Sequence[Any]) -> list[int]:
        """Addresses of the first elements."""
        raise NotImplementedError


class CuPy(Launcher):
    """CuPy arrays, on the current CuPy stream of their device."""

    name = "CuPy"

    def __init__(self) -> None:
        import cupy

        self.xp = self._cupy = cupy
        self._ndarray = cupy.ndarray
        self._current_device = cupy.cuda.runtime.getDevice
        self._current_stream = cupy.cuda.get_current_stream

    def describe(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[int], tuple[Any, ...]]:
        """Pointers of the arrays that are given, and everything else about all of them as a key.

        Raises
        ------
        InvalidArgument
            If one is not of CuPy, as the first is.
        """
        kind = type(arrays[0])
        pointers: list[int] = []
        key: list[Any] = []
        for x in arrays:
            if x is None:
                key.append(None)
                continue
            if type(x) is not kind:
                framework_of(names, arrays)
            data = x.data
            pointer = data.ptr
            pointers.append(pointer)
            key += (x.shape, x.strides, x.dtype, data.device_id, pointer & 15)
        return pointers, tuple(key)

    def view(self, name: str, x: Any) -> View:
        """Spell the array out."""
        device = f"cuda:{x.data.device_id}"
        return View(name, x.shape, x.strides, _name(x.dtype), x.dtype.itemsize, x.data.ptr, device)

    def ordinal(self, x: Any) -> int:
        """Number of the array's device."""
        return x.data.device_id

    def arithmetic(self, x: Any) -> AbstractContextManager[Any]:
        """Where CuPy computes on the array's device."""
        return self.context(x.data.device_id)

    def elsewhere(self, device: int) -> AbstractContextManager[Any] | None:
        """Where launches and allocations for the device belong; None where they belong here."""
        return None if self._current_device() == device else self._cupy.cuda.Device(device)

    def launch_stream(self, device: int) -> int:
        """The handle of CuPy's current stream; call inside :meth:`context`."""
        handle: int = self._current_stream().ptr
        return handle

    def is_capturing(self) -> bool:
        """Whether the current stream records a graph."""
        return self._current_stream().is_capturing()

    def stream(self) -> tuple[int, Any]:
        """Handle of the current stream, and what keeps it from being destroyed; None where nothing here can."""
        stream = self._current_stream()
        return stream.ptr, None if isinstance(stream, self._cupy.cuda.ExternalStream) else stream

    def is_done(self, stream: Any) -> bool:
        """Whether a stream has no work left, nor will have it from a graph that is being captured."""
        # Only this thread's default stream could be asked for under the name of another's.
        return stream.ptr > 2 and not stream.is_capturing() and stream.done

    def dtype(self, dtype: np.dtype) -> Any:
        """The framework's own name of a dtype."""
        return dtype

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate on the current stream; call inside :meth:`context`."""
        return self._ndarray(shape, dtype)

    def allocator(self, shape: tuple[int, ...], dtype: Any, device: int) -> Callable[[], Any]:
        """What :meth:`empty` of these does."""
        return partial(self._ndarray, shape, dtype)

    def scratch(self, nbytes: int, device: int) -> Callable[[], tuple[Any, int]]:
        """The same without an array around it, which takes longer to make than to find the memory."""
        alloc = self._cupy.cuda.alloc

        def made() -> tuple[Any, int]:
            memory = alloc(nbytes)
            return memory, memory.ptr

        return made

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear on the current stream; call inside :meth:`context`."""
        return self._cupy.zeros(shape, dtype)

    def pointer(self, x: Any) -> int:
        """Address of the first element."""
        return x.data.ptr

    def pointers(self, arrays: Sequence[Any]) -> list[int]:
        """Addresses of the first elements."""
        return [x.data.ptr for x in arrays]


class InFlight:
    """What kernels that are still running read, held until an event behind them and not until a next call."""

    def __init__(self) -> None:
        self._held: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: threading.Thread | None = None

    def hold(self, event: Any, held: Any) -> None:
        """Keep a reference until the event has happened."""
        self._held.put((event, held))
        if self._waiting is None or not self._waiting.is_alive():
            with self._lock:
                if self._waiting is None or not self._waiting.is_alive():
                    self._waiting = threading.Thread(target=self._let_go, name="cuflash-in-flight", daemon=True)
                    self._waiting.start()

    def _let_go(self) -> None:
        while True:
            event, held = self._held.get()
            with suppress(Exception):  # an error of a kernel, which every later call meets
                event.synchronize()
            del event, held


_in_flight = InFlight()


class Guest:
    """A framework reached through DLPack alone: its arrays become NumPy's or CuPy's views, results become its arrays.

    On a GPU the consumer names its stream and the producer orders the two, both ways, so nothing waits on the host.
    """

    def __init__(
        self,
        name: str,
        from_dlpack: Callable[[Any], Any],
        to_numpy: Callable[[Any], np.ndarray] = np.from_dlpack,
        from_numpy: Callable[[np.ndarray, Any], Any] | None = None,
    ) -> None:
        self.name = name
        self._from_dlpack, self._to_numpy = from_dlpack, to_numpy
        self._from_numpy = from_numpy or (lambda x, beside: from_dlpack(x))

    def beyond(self, arrays: Any, generator: Any = None) -> Adapter | None:
        """What answers a call on arrays of this library that are not all one piece of memory; None where they are."""
        return None

    def borrow(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[NumPy | CuPy, list[Any]]:
        """View the arrays as NumPy's or, from a GPU, as CuPy's, which CuPy's current stream may read.

        Raises
        ------
        InvalidArgument
            If they are not all in host memory or all on GPUs, or one does not lend its memory.
        """
        given = [(name, x) for name, x in zip(names, arrays, strict=True) if x is not None]
        places = [self._place(name, x) for name, x in given]
        for (name, _), place in zip(given, places, strict=True):
            if place != places[0]:
                raise InvalidArgument(
                    f"{name} is {place} but {given[0][0]} is {places[0]}; "
                    "all arrays of a call must be on one device. Move one of them."
                )
        framework: NumPy | CuPy = numpy_arrays if places[0] == "in host memory" else cupy_arrays()
        take = self._to_numpy if framework is numpy_arrays else cupy_module().from_dlpack
        borrowed = [None if x is None else self._lent(name, x, take) for name, x in zip(names, arrays, strict=True)]
        return framework, borrowed

    def _place(self, name: str, x: Any) -> str:
        """Where an array lies, as messages say it."""
        kind, number = self._lent(name, x, lambda x: x.__dlpack_device__())
        if kind in (_CUDA, _CUDA_MANAGED):
            return "on a GPU"
        if kind in (_CPU, _CUDA_HOST):
            return "in host memory"
        raise not_here(name, self.name, f"on device {int(number)} of DLPack's kind {int(kind)}")

    def _lent(self, name: str, x: Any, take: Callable[[Any], Any]) -> Any:
        """What an array's library gives of it, which may be nothing: it was deleted, or lies on several GPUs."""
        try:
            return take(x)
        except Exception as error:
            why = "it was deleted" if getattr(x, "is_deleted", bool)() else str(error)
            raise InvalidArgument(
                f"{name} is a {self.name} array that does not lend its memory ({why}). "
                "Pass one that is whole, on one device."
            ) from error

    def lend(self, results: Sequence[Any], borrowed: Sequence[Any], beside: Any = None) -> tuple[Any, ...]:
        """Hand results over, beside an array of the library if they are NumPy's.

        What was borrowed from a GPU is kept until the kernels queued so far are done with it: the owner's allocator
        knows nothing of CuPy's stream, and would reuse memory that its user drops too early.
        """
        if isinstance(results[0], np.ndarray):
            return tuple(self._from_numpy(x, beside) for x in results)
        with results[0].device:
            if not cupy_arrays().is_capturing():  # what a graph reads is its user's to keep
                event = cupy_module().cuda.Event(block=True, disable_timing=True)
                event.record()
                _in_flight.hold(event, borrowed)
            return tuple(self._from_dlpack(x) for x in results)


Framework = Library | Guest | Adapter
"""A library of arrays at the door; its `name` is what messages call it."""

numpy_arrays: NumPy = NumPy()


@cache
def cupy_arrays() -> CuPy:
    """The one CuPy framework; imports CuPy."""
    cupy_module()
    return CuPy()


def framework_of(names: Sequence[str], arrays: Sequence[Any]) -> Framework:
    """The framework that all the given arrays belong to; None among them is an argument that was left out.

    Raises
    ------
    InvalidArgument
        If one is not an array, or they belong to different frameworks.
    """
    kinds: set[type] = set(map(type, arrays))
    kinds.discard(type(None))
    if len(kinds) == 1 and (framework := framework_of_type(*kinds)) is not None:
        return framework
    first, first_name, first_type = None, "", None
    for name, x in zip(names, arrays, strict=True):
        kind: type = type(x)
        if x is None or kind is first_type:
            continue
        framework = framework_of_type(kind)
        if isinstance(x, np.ma.MaskedArray):
            raise InvalidArgument(
                f"{name} is a masked array, whose mask no arithmetic of attention follows. "
                f"Pass {name}.filled(...), and hide keys by attn_mask."
            )
        if framework is None:
            raise InvalidArgument(
                f"{name} is a {type(x).__name__}; expected an array of NumPy, CuPy, torch, JAX or another library that "
                f"speaks DLPack. Convert it first, for example with numpy.asarray or cupy.asarray."
            )
        if first is None:
            first, first_name, first_type = framework, name, type(x)
        elif framework.name == first.name:  # an array that is traced beside one that is not
            first = framework if isinstance(framework, Adapter) else first
        else:
            raise InvalidArgument(
                f"{name} is a {framework.name} array but {first_name} is a {first.name} array; "
                "all arrays of a call must come from one framework. Convert one of them."
            )
    if first is None:
        raise InvalidArgument(f"{names[0]} is None; expected an array.")
    return first


def framework_in_memory(names: Sequence[str], arrays: Sequence[Any]) -> Library | Guest:
    """`framework_of` for functions that look at elements, or at where they lie.

    Raises
    ------
    UnsupportedProblem
        If there are no elements yet.
    """
    framework = framework_of(names, arrays)
    if not isinstance(framework, Library | Guest):
        name = next(name for name, x in zip(names, arrays, strict=True) if x is not None)
        raise UnsupportedProblem(
            f"{name} is traced by {framework.name}, and this needs arrays in memory. Inside {framework.name}'s "
            "transformations call the flash_attn functions that take q, k and v, or scaled_dot_product_attention, for "
            "outputs, log-sum-exps and gradients."
        )
    return framework


@lru_cache(maxsize=256)
def framework_of_type(kind: type) -> Framework | None:
    """The framework an array type belongs to; None when it is not an array type."""
    if issubclass(kind, np.ndarray):
        return None if issubclass(kind, np.ma.MaskedArray) else numpy_arrays
    cupy, torch, jax = (sys.modules.get(name) for name in ("cupy", "torch", "jax"))
    if cupy is not None and issubclass(kind, cupy.ndarray):
        return cupy_arrays()
    if torch is not None and issubclass(kind, torch.Tensor):
        return _torch_tensors()
    if jax is not None and issubclass(kind, jax.core.Tracer):
        return _jax_tracers()
    if jax is not None and issubclass(kind, jax.Array):
        return _jax_arrays()
    if kind.__module__.partition(".")[0] == "dask":
        raise UnsupportedProblem(
            f"a {kind.__name__} of dask is a plan of chunks and no memory. Pass its compute(), or call cuflash on its "
            "blocks by dask.array.map_blocks."
        )
    module = sys.modules.get(kind.__module__.partition(".")[0])
    speaks = hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")
    if speaks and module is not None and hasattr(module, "from_dlpack"):
        return _guest(module.__name__, module.from_dlpack)
    return None


@cache
def _torch_tensors() -> Any:
    from cuflash.adapters.torch.tensors import Torch

    return Torch()


@cache
def _jax_tracers() -> Any:
    from cuflash.adapters.jax import Traced

    return Traced()


@cache
def _jax_arrays() -> Guest:
    from cuflash.adapters.jax import Concrete

    return Concrete(_jax_tracers())


@cache
def _guest(name: str, from_dlpack: Callable[[Any], Any]) -> Guest:
    return Guest(name, from_dlpack)


def cupy_module() -> Any:
    """CuPy, which launches the kernels for every framework."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"cuflash launches its kernels through CuPy, which cannot be imported. {HOW_TO_GET_CUPY}."
        ) from error
    return cupy


def _name(dtype: np.dtype) -> str:
    """NumPy's name of an element type, which is the same for either byte order; ``>f4`` and the like of the foreign."""
    return dtype.name if dtype.isnative else str(dtype)


def not_here(name: str, framework: str, where: str) -> InvalidArgument:
    """The refusal of an array that is neither on a CUDA device nor in host memory."""
    return InvalidArgument(
        f"{name} is a {framework} array {where}; cuflash computes on CUDA devices and on the CPU. "
        f"Move {name} to one of them."
    )
