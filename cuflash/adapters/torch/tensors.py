"""Tensors of PyTorch as arrays: where they lie, and what answers a call on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import numpy as np

from cuflash.arrays import Adapter, Launcher, View, framework_of, not_here, numpy_arrays
from cuflash.dtypes import BF16
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.generator import default_generator
from cuflash.ops import Arrays, Options, Tangents, draw, launch, on_numpy
from cuflash.ops.answer import answer as answer_plain
from cuflash.ops.jvp import NAMES, on_gpu
from cuflash.problem import Direction

ON_GPU = (
    "no kernel computes tangents of gradients: second derivatives are taken of arrays in host memory alone, by the "
    "NumPy backend. Move the arrays there."
)
"""What is said of them on a GPU."""


def _name_of(x: Any, names: Sequence[str], arrays: Sequence[Any]) -> str:
    """What the caller knows one of the arrays as, where it is to be told."""
    return next(name for name, y in zip(names, arrays, strict=True) if y is x)


class Draws:
    """What dropout of tensors draws from: torch's own generator of their device, as ``torch.manual_seed`` seeds it.

    So checkpoints of activations, which give torch its state back, drop what they dropped. cuflash's own generator is
    drawn from where it was moved to the device, for the graphs that are captured there.
    """

    def __init__(self, device: int) -> None:
        self._device, self._generators = device, sys.modules["torch"].cuda.default_generators

    def address(self, device: int) -> int:
        """Where the device keeps the state of cuflash's own generator; 0 if it is elsewhere."""
        return default_generator.address(device)

    def next(self, increment: int) -> tuple[int, int]:
        """(seed, offset) for a draw of `increment` numbers; torch's generator moves on."""
        generator = self._generators[self._device]
        offset = generator.get_offset()
        generator.set_offset(offset + (increment + 3) // 4 * 4)
        return generator.initial_seed() % 2**64, offset


class Torch(Launcher, Adapter):
    """Tensors on CUDA devices, on torch's current stream of their device, and in host memory, where NumPy computes.

    Memory comes from torch's allocator, which knows which stream a block belongs to and which blocks a captured graph
    owns, so nothing here has to be kept alive by hand.
    """

    name = "torch"

    def __init__(self) -> None:
        self.xp = self._torch = sys.modules["torch"]
        self._forward_ad = self._torch.autograd.forward_ad
        self._devices: dict[int, Any] = {}

    def describe(self, names: Sequence[str], arrays: Sequence[Any]) -> tuple[list[int], tuple[Any, ...]]:
        """Pointers of the arrays that are given, and everything else about all of them as a key.

        Raises
        ------
        InvalidArgument, UnsupportedProblem
            If one is not of torch, as the first is, or is no plain tensor in memory.
        """
        kind = self._torch.Tensor
        grad = self._torch.is_grad_enabled()
        if self._forward_ad._current_level >= 0:
            framework_of(names, arrays)
            self._refuse_tangents(names, arrays)
        pointers: list[int] = []
        key: list[Any] = []
        for x in arrays:
            if x is None:
                key.append(None)
                continue
            if type(x) is not kind:
                self._check_kind(_name_of(x, names, arrays), x, names, arrays)
            if grad and x.requires_grad:
                raise self._on_tape(_name_of(x, names, arrays), x)
            try:
                pointer = x.data_ptr()
                shape = x.shape
                key += (shape, x.stride(), x.dtype, x.device, x.is_neg(), pointer & 15)
            except RuntimeError as error:
                raise self._without_memory(_name_of(x, names, arrays), x) from error
            if not pointer and 0 not in shape:
                raise self._without_memory(_name_of(x, names, arrays), x)
            pointers.append(pointer)
        return pointers, tuple(key)

    def view(self, name: str, x: Any) -> View:
        """Spell the tensor out."""
        try:
            self._check_kind(name, x, [name], [x])
            if x.is_neg():
                raise InvalidArgument(f"{name} is a lazily negated torch view; pass {name}.resolve_neg().")
            itemsize = x.element_size()
            strides = tuple(stride * itemsize for stride in x.stride())
            dtype = str(x.dtype).removeprefix("torch.")
            return View(name, tuple(x.shape), strides, dtype, itemsize, x.data_ptr(), str(x.device))
        except RuntimeError as error:
            raise self._without_memory(name, x) from error

    def outline(self, name: str, x: Any) -> View:
        """Spell the tensor out, from its shape alone where it has no memory."""
        try:
            return self.view(name, x)
        except (InvalidArgument, UnsupportedProblem):
            if x.is_nested or x.layout is not self._torch.strided:
                raise
            itemsize = x.element_size()
            shape, strides = tuple(x.shape), tuple(stride * itemsize for stride in x.stride())
            return View(name, shape, strides, str(x.dtype).removeprefix("torch."), itemsize, 0, str(x.device))

    def ordinal(self, x: Any) -> int:
        """Number of the tensor's device, 0 for the CPU."""
        return x.device.index or 0

    def generator(self, device: int) -> Draws:
        """What dropout on a device draws from where a call names nothing."""
        return Draws(device)

    def arithmetic(self, x: Any) -> AbstractContextManager[Any]:
        """Where torch records nothing."""
        return self._torch.no_grad()

    def tracer(self) -> Any:
        """What torch can follow, where it follows this."""
        if not self._torch.compiler.is_dynamo_compiling():
            return None
        from cuflash.adapters.torch.written import traced

        return traced

    def answer(
        self,
        direction: Direction,
        options: Options,
        arrays: Arrays,
        generator: Any = None,
        cached: int | None = None,
        alone: bool = False,
    ) -> tuple[Any, ...]:
        """Answer a call on tensors, plain or recorded, batched or traced; with out alone there may be nothing else.

        Raises
        ------
        InvalidArgument, UnsupportedProblem
            As `ops.answer`, and for what has no gradient and is to have one.
        """
        torch = self._torch
        kind = type(arrays.q)
        is_fake = False
        if kind is not torch.Tensor:
            if kind.__name__ == "DTensor":
                from cuflash.adapters.torch import sharded

                return sharded.answer(self, direction, options, arrays, generator)
            is_fake = kind.__module__ == "torch._subclasses.fake_tensor"
        if is_fake or torch.compiler.is_dynamo_compiling():
            from cuflash.adapters.torch.operators import traced

            return traced(direction, options, arrays, generator, cached)
        if generator is not None:
            draw.check(generator)
        if torch._C._are_functorch_transforms_active() or torch._C._is_any_autocast_enabled():
            return self._recorded.answer(self, direction, options, arrays, generator, cached)
        along = direction == "forward" and self._forward_ad._current_level >= 0
        if along and self._moves(arrays):
            return self._recorded.recorded(self, options, arrays, generator)
        if torch.is_grad_enabled() and self._needs_grad(options, arrays):
            if direction == "forward":
                return self._recorded.recorded(self, options, arrays, generator, alone)
            return self._recorded.answer(self, direction, options, arrays)
        return self.plain(direction, options, arrays, generator, cached)

    def out(self, options: Options, arrays: Arrays, generator: Any = None) -> Any:
        """The first result of a forward, for a caller who wants no other."""
        torch, q = self._torch, arrays[0]
        # What autograd records of q, k and v alone is answered here, as most of its time is Python's.
        if (
            generator is None
            and not torch.compiler.is_dynamo_compiling()
            and type(q) is torch.Tensor
            and q.is_cuda
            and torch.is_grad_enabled()
            and not torch._C._are_functorch_transforms_active()
            and not torch._C._is_any_autocast_enabled()
            and self._needs_grad(options, arrays)
            and self._recorded.is_of_three(options, arrays)
        ):
            return self._recorded.out_of_three((self, options), *arrays[:3])
        return self.answer("forward", options, arrays, generator, None, True)[0]

    @cached_property
    def _recorded(self) -> Any:
        """The module for what autograd records, once something is."""
        from cuflash.adapters.torch import recorded

        return recorded

    def answer_along(
        self, options: Options, arrays: Arrays, tangents: Tangents, generator: Any = None
    ) -> tuple[Any, ...]:
        """Answer a call of `ops.jvp`, which autograd does not see."""
        if generator is not None:
            draw.check(generator)
        names, given = [*options.names(arrays), *NAMES], [*arrays.each(), *tangents]
        framework_of(names, given)
        for name, x in zip(names, given, strict=True):
            if x is not None and x.requires_grad and self._torch.is_grad_enabled():
                raise InvalidArgument(
                    f"{name} requires grad, and autograd does not see flash_attn_jvp: its gradient would be lost. "
                    f"Pass {name}.detach()."
                )
        on_host = self._changing(options, arrays, tangents)
        if on_host is None:
            return on_gpu(self, options, arrays, tangents, generator)
        return self.from_host(on_numpy.jvp(options, *on_host, self._drawn(options, generator)))

    def along(self, direction: Direction, options: Options, arrays: Arrays, tangents: Tangents) -> tuple[Any, ...]:
        """The tangents of a call's results, of out and lse or of gradients, where nothing is recorded."""
        on_host = self._changing(options, arrays, tangents)
        if on_host is None:
            if direction == "backward":
                raise UnsupportedProblem(ON_GPU)
            changes = Tangents(*(None if x is None else x.contiguous() for x in tangents))
            return launch.run(self, direction, options.replace(tangents="alone"), arrays, tangents=changes)
        borrowed, changes = on_host
        if direction == "backward":
            return self.from_host(on_numpy.backward(options, borrowed, changes))
        drawn = None if borrowed.rng_state is None else tuple(borrowed.rng_state.view(np.uint64).tolist())
        return self.from_host(on_numpy.jvp(options, borrowed._replace(rng_state=None), changes, drawn)[2:])

    def _changing(self, options: Options, arrays: Arrays, tangents: Tangents) -> tuple[Arrays, Tangents] | None:
        """Tensors in host memory and their tangents as NumPy's views; None where they are on a GPU."""
        each = arrays.each()
        names = [*options.names(arrays), *NAMES]
        on_host = None if arrays.q.is_cuda else self.on_host(names, [*each, *tangents])
        if on_host is None:
            return None
        return arrays.like(on_host[: len(each)]), Tangents(*on_host[len(each) :])

    def _drawn(self, options: Options, generator: Any) -> Any:
        """What dropout in host memory draws from: torch's own generator, where a call names none."""
        if generator is None and options.dropout_p:
            return int(self._torch.randint(2**63 - 1, ())), 0
        return generator

    def _moves(self, arrays: Arrays) -> bool:
        """Whether an array has a tangent of torch's forward mode."""
        tensors = (x for x in arrays.each() if isinstance(x, self._torch.Tensor))
        return any(self._forward_ad.unpack_dual(x).tangent is not None for x in tensors)

    def _needs_grad(self, options: Options, arrays: Arrays) -> bool:
        try:
            for x in arrays if arrays.captured is None else arrays.each():
                if x is not None and x.requires_grad:
                    return True
        except AttributeError:  # of another library
            framework_of(options.names(arrays), arrays.each())
            raise
        return False

    def plain(
        self,
        direction: Direction,
        options: Options,
        arrays: Arrays,
        generator: Any = None,
        cached: int | None = None,
    ) -> tuple[Any, ...]:
        """Answer a call on tensors of which nothing is recorded."""
        on_host = None if arrays.q.is_cuda else self.on_host(options.names(arrays), arrays.each())
        if on_host is None:
            return answer_plain(self, direction, options, arrays, generator, cached)
        drawn = self._drawn(options, generator)
        results = answer_plain(numpy_arrays, direction, options, arrays.like(on_host), drawn, cached)
        places = arrays.outputs(direction)
        places += (None,) * (len(results) - len(places))
        return tuple(y if place is None else place for y, place in zip(self.from_host(results), places, strict=True))

    def on_host(self, names: Sequence[str], arrays: Sequence[Any]) -> list[Any] | None:
        """Tensors in host memory as NumPy's views; None where they are on a GPU.

        Raises
        ------
        InvalidArgument, UnsupportedProblem
            If one is no plain tensor in memory, or they are on several devices.
        """
        self.describe(names, arrays)
        views = [self.view(name, x) for name, x in zip(names, arrays, strict=True) if x is not None]
        for view in views:
            if view.device != views[0].device:
                raise InvalidArgument(
                    f"{view.name} is on {view.device} but {views[0].name} is on {views[0].device}; "
                    "all arrays of a call must be on one device. Move one of them."
                )
        if views[0].device.startswith("cuda"):
            return None
        if views[0].device != "cpu":
            raise not_here(views[0].name, self.name, f"on {views[0].device}")
        return [None if x is None else self._to_numpy(x) for x in arrays]

    def from_host(self, results: Sequence[np.ndarray]) -> tuple[Any, ...]:
        """Results for tensors in host memory."""
        return tuple(map(self._from_numpy, results))

    def _to_numpy(self, x: Any) -> np.ndarray:
        """The memory of a tensor in host memory; NumPy has bfloat16 from ml_dtypes, which torch does not know."""
        x = x.detach()
        if x.dtype is not self._torch.bfloat16:
            return x.numpy()
        return x.view(self._torch.uint16).numpy().view(BF16.numpy)

    def _from_numpy(self, x: np.ndarray) -> Any:
        if x.dtype != BF16.numpy:
            return self._torch.from_numpy(x)
        return self._torch.from_numpy(x.view(np.uint16)).view(self._torch.bfloat16)

    def moved(self, x: np.ndarray, beside: Any) -> Any:
        """A copy of an array in host memory on the device of a tensor."""
        return self._from_numpy(np.array(x)).to(beside.device)

    def copied(self, x: Any) -> np.ndarray:
        """A copy in host memory of a tensor on a GPU."""
        return self._to_numpy(x.cpu())

    def cast(self, x: Any, dtype: Any) -> Any:
        """The tensor in another dtype; itself if it has that one."""
        return x.to(dtype)

    def _beside(self, x: Any) -> dict[str, Any]:
        return {"device": x.device}

    def _check_kind(self, name: str, x: Any, names: Sequence[str], arrays: Sequence[Any]) -> None:
        """Refuse what is of another library, or what torch would warn of when it is asked for its memory."""
        framework_of(names, arrays)
        if type(x).__module__ == "torch._subclasses.fake_tensor":
            raise self._without_memory(name, x)

    def _refuse_tangents(self, names: Sequence[str], arrays: Sequence[Any]) -> None:
        for name, x in zip(names, arrays, strict=True):
            if x is not None and self._forward_ad.unpack_dual(x).tangent is not None:
                raise UnsupportedProblem(
                    f"{name} has a tangent of torch's forward mode, which would be lost: cuflash does not run inside "
                    "it. Pass the primal, and take gradients by backward() or torch.func.grad."
                )

    def _on_tape(self, name: str, x: Any) -> InvalidArgument:
        return InvalidArgument(
            f"{name} requires grad, and autograd sees neither prepared calls nor merges: its gradient would be lost. "
            f"Pass {name}.detach(), or call flash_attn_func or merge_attention_vjp."
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
                "is no memory to read. Call cuflash on concrete tensors, and take "
                "gradients from cuflash.flash_attn_vjp."
            )
        if type(x).__name__ == "DTensor":
            return UnsupportedProblem(
                f"{name} is a DTensor, of which each process has a part; expected a plain tensor. Pass "
                f"{name}.to_local(), or call cuflash inside torch.distributed.tensor.experimental.local_map."
            )
        return UnsupportedProblem(
            f"{name} is a {type(x).__name__} on {x.device} without memory of its own; expected a plain tensor. "
            "Call cuflash with the tensors that it stands for."
        )

    def elsewhere(self, device: int) -> AbstractContextManager[Any] | None:
        """Where launches and allocations for the device belong; None where they belong here."""
        torch = self._torch
        return None if torch._C._cuda_getDevice() == device else torch.cuda.device(device)

    def launch_stream(self, device: int) -> int:
        """The handle of torch's current stream of the device."""
        handle: int = self._torch._C._cuda_getCurrentRawStream(device)  # as compiled graphs ask: no object
        return handle

    def is_capturing(self) -> bool:
        """Whether torch's current stream records a graph."""
        return self._torch.cuda.is_initialized() and self._torch.cuda.is_current_stream_capturing()

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
        return self._torch.empty(shape, dtype=dtype, device=self._device(device))

    def allocator(self, shape: tuple[int, ...], dtype: Any, device: int) -> Callable[[], Any]:
        """What :meth:`empty` of these does."""
        # An element that stands for all of an array says as much, and is read in less time than words.
        element = self._torch.empty((), dtype=dtype, device=self._device(device))
        return partial(self._torch.empty_like, element.expand(shape))

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """Allocate and clear on torch's current stream."""
        return self._torch.zeros(shape, dtype=dtype, device=self._device(device))

    def _device(self, number: int) -> Any:
        """Torch's own object of a device, which it need not read from a string."""
        device = self._devices.get(number)
        if device is None:
            device = self._devices[number] = self._torch.device("cuda", number)
        return device

    def pointer(self, x: Any) -> int:
        """Address of the first element."""
        return x.data_ptr()

    def pointers(self, arrays: Sequence[Any]) -> list[int]:
        """Addresses of the first elements."""
        return [x.data_ptr() for x in arrays]
