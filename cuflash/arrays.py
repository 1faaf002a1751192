"""Arrays at the door: whose they are, where they lie, and how results go back to the same framework.

Below this file an array is a pointer with a shape, strides and a dtype. torch and JAX are found in ``sys.modules`` and
never imported: an array of theirs can only exist after their user imported them.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cuflash.errors import HOW_TO_GET_CUPY, InvalidArgument, UnsupportedProblem

Array = Any
"""An array of NumPy, CuPy, torch, JAX or another library that speaks DLPack."""
ArrayT = TypeVar("ArrayT")
"""The type of q, k and v, and of results with as many axes in the same dtype."""

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13  # DLDeviceType of dlpack.h


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

    def outline(self, name: str, x: Any) -> View:
        """Spell an array out that may have no memory: it is looked at, and not read."""
        raise NotImplementedError


class Library:
    """Whole arrays by the functions of their own library, which NumPy, CuPy and torch name alike."""

    xp: Any
    """The module of those functions."""

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
            key.append((x.shape, x.strides, x.dtype, pointer & 15))
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


class CuPy(Library):
    """CuPy arrays, on the current CuPy stream of their device."""

    name = "CuPy"

    def __init__(self) -> None:
        import cupy

        self.xp = self._cupy = cupy
        self._ndarray = cupy.ndarray
        self._current_device = cupy.cuda.runtime.getDevice
        self._here = nullcontext()

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
            key.append((x.shape, x.strides, x.dtype, data.device_id, pointer & 15))
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

    def context(self, device: int) -> AbstractContextManager[Any]:
        """Where launches and allocations for the device belong."""
        return self._here if self._current_device() == device else self._cupy.cuda.Device(device)

    def is_capturing(self) -> bool:
        """Whether the current stream records a graph."""
        return self._cupy.cuda.get_current_stream().is_capturing()

    def stream(self) -> tuple[int, Any]:
        """Handle of the current stream, and what keeps it from being destroyed; None where nothing here can."""
        stream = self._cupy.cuda.get_current_stream()
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

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear on the current stream; call inside :meth:`context`."""
        return self._cupy.zeros(shape, dtype)

    def pointer(self, x: Any) -> int:
        """Address of the first element."""
        return x.data.ptr


class Torch(Library):
    """Tensors on CUDA devices, on torch's current stream of their device; memory comes from torch's allocator.

    Torch's allocator knows which stream a block belongs to and which blocks a captured graph owns, so nothing here has
    to be kept alive by hand.
    """

    name = "torch"

    def __init__(self) -> None:
        self.xp = self._torch = sys.modules["torch"]
        self._forward_ad = self._torch.autograd.forward_ad
        self._here = nullcontext()

    def describe(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[int], tuple[Any, ...]]:
        """Pointers of the arrays that are given, and everything else about all of them as a key.

        Raises
        ------
        InvalidArgument, UnsupportedProblem
            If one is not of torch, as the first is, or is no plain tensor in memory.
        """
        kind = type(arrays[0])
        grad = self._torch.is_grad_enabled()
        if self._forward_ad._current_level >= 0:
            framework_of(names, arrays)
            self._refuse_tangents(names, arrays)
        pointers: list[int] = []
        key: list[Any] = []
        for name, x in zip(names, arrays, strict=True):
            if x is None:
                key.append(None)
                continue
            if type(x) is not kind:
                framework_of(names, arrays)
            if grad and x.requires_grad:
                raise self._on_tape(name, x)
            try:
                pointer = x.data_ptr()
                described = x.shape, x.stride(), x.dtype, x.device, x.is_neg(), pointer & 15
            except RuntimeError as error:
                raise self._without_memory(name, x) from error
            if not pointer and 0 not in x.shape:
                raise self._without_memory(name, x)
            pointers.append(pointer)
            key.append(described)
        return pointers, tuple(key)

    def view(self, name: str, x: Any) -> View:
        """Spell the tensor out."""
        try:
            if x.is_neg():
                raise InvalidArgument(f"{name} is a lazily negated torch view; pass {name}.resolve_neg().")
            itemsize = x.element_size()
            strides = tuple(stride * itemsize for stride in x.stride())
            dtype = str(x.dtype).removeprefix("torch.")
            return View(name, tuple(x.shape), strides, dtype, itemsize, x.data_ptr(), str(x.device))
        except RuntimeError as error:
            raise self._without_memory(name, x) from error

    def ordinal(self, x: Any) -> int:
        """Number of the tensor's device."""
        return x.device.index

    def cast(self, x: Any, dtype: Any) -> Any:
        """The tensor in another dtype; itself if it has that one."""
        return x.to(dtype)

    def _beside(self, x: Any) -> dict[str, Any]:
        return {"device": x.device}

    def _refuse_tangents(self, names: Sequence[str], arrays: Sequence[Any]) -> None:
        for name, x in zip(names, arrays, strict=True):
            if x is not None and self._forward_ad.unpack_dual(x).tangent is not None:
                raise UnsupportedProblem(
                    f"{name} has a tangent of torch's forward mode, which would be lost: cuflash does not run inside "
                    "it yet. Pass the primal, and take gradients from cuflash.flash_attn_vjp."
                )

    def _on_tape(self, name: str, x: Any) -> InvalidArgument:
        if x.device.type != "cuda":  # without its gradient it would not be computed either
            return not_on_cuda(name, self.name, f"on {x.device}")
        return InvalidArgument(
            f"{name} requires grad, but autograd does not see cuflash's kernels: its gradient would be lost. "
            f"Pass {name}.detach() (or call under torch.no_grad()), and take gradients from "
            "cuflash.flash_attn_vjp or cuflash.flash_attn_backward."
        )

    def _without_memory(self, name: str, x: Any) -> InvalidArgument | UnsupportedProblem:
        """The refusal of a tensor whose elements do not lie in memory by its shape and strides."""
        if x.is_nested:
            return InvalidArgument(
                f"{name} is a nested tensor; expected a dense one. "
                "Pass its packed values to cuflash.flash_attn_varlen_func, with where they start."
            )
        if x.layout is not self._torch.strided:
            return InvalidArgument(f"{name} has layout {x.layout}; expected a dense tensor. Pass {name}.to_dense().")
        if type(x) is self._torch.Tensor and x.device.type != "meta":
            return UnsupportedProblem(
                f"{name} is a tensor inside torch.vmap, torch.func or the like, or its storage was given back: there "
                "is no memory to read. cuflash does not run inside torch's transforms yet. Call it on concrete "
                "tensors, and take gradients from cuflash.flash_attn_vjp."
            )
        return UnsupportedProblem(
            f"{name} is a {type(x).__name__} on {x.device} without memory of its own; expected a plain tensor. "
            "Call cuflash with the tensors that it stands for."
        )

    def context(self, device: int) -> AbstractContextManager[Any]:
        """Where launches and allocations for the device belong."""
        cuda = _cupy().cuda
        stream = self._torch.cuda.current_stream(device).cuda_stream
        if cuda.runtime.getDevice() == device and cuda.get_current_stream().ptr == stream:
            return self._here
        return _on_stream(device, stream)

    def is_capturing(self) -> bool:
        """Whether torch's current stream records a graph."""
        return self._torch.cuda.is_current_stream_capturing()

    def stream(self) -> tuple[int, Any]:
        """Handle of torch's current stream, and what keeps it from being destroyed; None where nothing here can."""
        stream = self._torch.cuda.current_stream()
        handle = stream.cuda_stream
        # Torch numbers its own streams, which it never destroys; one from elsewhere has its handle for a number.
        return handle, None if handle and stream.stream_id == handle else stream

    def is_done(self, stream: Any) -> bool:
        """Whether a stream has no work left."""
        return stream.query()

    def dtype(self, dtype: np.dtype) -> Any:
        """The framework's own name of a dtype."""
        return getattr(self._torch, dtype.name)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate on torch's current stream."""
        return self._torch.empty(shape, dtype=dtype, device=f"cuda:{device}")

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear on torch's current stream."""
        return self._torch.zeros(shape, dtype=dtype, device=f"cuda:{device}")

    def pointer(self, x: Any) -> int:
        """Address of the first element."""
        return x.data_ptr()


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
    """A framework reached through DLPack alone: its arrays become CuPy views, results become its arrays.

    Both ways the consumer names its stream and the producer orders the two, so nothing waits on the host.
    """

    def __init__(self, name: str, from_dlpack: Callable[[Any], Any]) -> None:
        self.name = name
        self._from_dlpack = from_dlpack

    def borrow(self, names: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
        """View the arrays as CuPy arrays that CuPy's current stream may read."""
        for name, x in zip(names, arrays, strict=True):
            if x is not None and not self.is_on_cuda(name, x):
                raise not_on_cuda(name, self.name, "in host memory")
        from_dlpack = _cupy().from_dlpack
        return [None if x is None else self._lent(name, x, from_dlpack) for name, x in zip(names, arrays, strict=True)]

    def is_on_cuda(self, name: str, x: Any) -> bool:
        """Whether an array lies on a GPU."""
        return self._lent(name, x, lambda x: x.__dlpack_device__())[0] in (_CUDA, _CUDA_MANAGED)

    def on_host(self, names: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
        """View arrays in host memory as NumPy arrays."""
        return [None if x is None else self._lent(name, x, np.asarray) for name, x in zip(names, arrays, strict=True)]

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

    def lend(self, results: Sequence[Any], borrowed: Sequence[Any]) -> tuple[Any, ...]:
        """Hand CuPy results over, and keep what was borrowed until the kernels queued so far are done with it.

        The owner's allocator knows nothing of CuPy's stream, and would reuse memory that its user drops too early.
        """
        with results[0].device:
            if not cupy_arrays().is_capturing():  # what a graph reads is its user's to keep
                event = _cupy().cuda.Event(block=True, disable_timing=True)
                event.record()
                _in_flight.hold(event, borrowed)
            return tuple(self._from_dlpack(x) for x in results)


Framework = NumPy | CuPy | Torch | Guest | Adapter
ON_GPU = (CuPy, Torch)
"""Frameworks whose `describe` holds all arrays to that of the first one."""

numpy_arrays: NumPy = NumPy()


@cache
def cupy_arrays() -> CuPy:
    """The one CuPy framework; imports CuPy."""
    _cupy()
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


def framework_in_memory(names: Sequence[str], arrays: Sequence[Any]) -> NumPy | CuPy | Torch | Guest:
    """`framework_of` for functions that look at elements, or at where they lie.

    Raises
    ------
    UnsupportedProblem
        If there are no elements yet.
    """
    framework = framework_of(names, arrays)
    if isinstance(framework, Adapter):
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
        if kind.__module__ == "torch._subclasses.fake_tensor":
            raise UnsupportedProblem(
                "cuflash does not run inside torch.compile, torch.export or FakeTensorMode yet, whose tensors have no "
                "memory. Call it on plain tensors, and take gradients from cuflash.flash_attn_vjp."
            )
        return _torch_tensors()
    if jax is not None and issubclass(kind, jax.core.Tracer):
        return _jax_tracers()
    if jax is not None and issubclass(kind, jax.Array):
        return _guest("JAX", jax.numpy.from_dlpack)
    module = sys.modules.get(kind.__module__.partition(".")[0])
    speaks = hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")
    if speaks and module is not None and hasattr(module, "from_dlpack"):
        return _guest(module.__name__, module.from_dlpack)
    return None


@cache
def _torch_tensors() -> Torch:
    return Torch()


@cache
def _jax_tracers() -> Adapter:
    from cuflash.adapters.jax import Traced

    return Traced()


@cache
def _guest(name: str, from_dlpack: Callable[[Any], Any]) -> Guest:
    return Guest(name, from_dlpack)


def _cupy() -> Any:
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


def not_on_cuda(name: str, framework: str, where: str) -> InvalidArgument:
    """The refusal of a guest's array that is on no GPU."""
    return InvalidArgument(
        f"{name} is a {framework} array {where}; cuflash computes {framework} arrays on CUDA devices and NumPy arrays "
        f"on the CPU. Move {name} to a GPU, or pass numpy.asarray({name})."
    )


class _StreamPointer:
    """A raw stream in the words of the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@cache  # never evicted: a CuPy stream object destroys what it wraps in some CuPy versions, and torch pools its streams
def _stream(device: int, pointer: int) -> Any:
    return _cupy().cuda.Stream.from_external(_StreamPointer(pointer))


@contextmanager
def _on_stream(device: int, pointer: int) -> Any:
    """Make a device and one of its streams current for CuPy."""
    with _cupy().cuda.Device(device), _stream(device, pointer):
        yield
