"""Calls whose arrays are all given, results and scratch memory too: steps of programs that another compiler made.

Such a program knows its call as a text, from which everything else follows: nothing of this process is in it, so that
it may be stored and run by another one.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from cuflash import device, jit
from cuflash.arrays import View
from cuflash.errors import UnsupportedProblem
from cuflash.mods import Mod, words
from cuflash.numbers import integer, is_array
from cuflash.ops import check, on_numpy
from cuflash.ops.call import Arrays, Options, Tangents, asked
from cuflash.ops.call import results as names_of_results
from cuflash.ops.launch import PlannedCall, plan_views, result
from cuflash.plan import Scratch, Workspace
from cuflash.problem import Direction, Problem

_VERSION = 1
_DEFAULTS = asked().values()
_MODS = ("score_mod", "mask_mod")
_TANGENTS = {"dout": "out", "dlse": "lse"}
"""Arrays whose tangents go by other names."""


@dataclass(frozen=True)
class GivenCall:
    """A call on contiguous arrays of which shapes and element types are known, and no more."""

    direction: Direction
    options: Options
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    """Name, shape and element type of those that it reads, in the order of `Arrays.by_name`."""
    along: tuple[str, ...] = ()
    """Which of them come with a tangent, behind all others: then the call gives the tangents of its results instead,
    those of out and lse or of the gradients; of the gradients on a CPU alone."""
    room: int = 0
    """Bytes of scratch memory that a program has for it: what it needs on the GPU that the program is made for."""

    @cached_property
    def operands(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """The arrays and their tangents."""
        by_name = {name: array for array in self.arrays for name in array[:1]}
        return (*self.arrays, *(by_name[name] for name in self.along))

    @cached_property
    def views(self) -> dict[str, View]:
        """The arrays, under the caller's names."""
        return {name: contiguous(self.options.name(name), shape, dtype) for name, shape, dtype in self.arrays}

    @cached_property
    def problem(self) -> Problem:
        """Everything about the call but the values of its arrays, checked.

        Raises
        ------
        InvalidArgument
            If an array or an option is wrong, or does not fit another.
        """
        return check.problem_of(self.direction, self.options, self.views)

    @cached_property
    def results(self) -> tuple[Workspace, ...]:
        """What it writes, in order; seed and offset of dropout are among what it reads."""
        more = not self.along
        names = names_of_results(self.problem, self.options.keep_state and more, self.options.keep_delta and more)
        shapes = check.shapes(self.options, self.views)
        return tuple(result(name, self.problem, shapes[name]) for name in names if name != "rng_state")

    def plan(self, gpu: device.Device) -> PlannedCall:
        """What runs on a GPU.

        Raises
        ------
        UnsupportedProblem
            If nothing does.
        """
        options, views = self.options, self.views
        if self.along:
            options = options.replace(tangents="alone")
            named = zip(self.along, self.operands[len(self.arrays) :], strict=True)
            views = views | {check.TANGENT + of: contiguous(f"d{of}", *array[1:]) for of, array in named}
        return plan_views(self.direction, options, views, gpu)

    def scratch(self, gpu: device.Device) -> Scratch:
        """The scratch memory for a GPU."""
        return Scratch(self.plan(gpu).workspaces)

    def text(self) -> str:
        """The call in words that :func:`from_text` reads."""
        options = {name: x for name, x in self.options.values().items() if x != _DEFAULTS[name]}
        options |= {name: words.to_words(options[name]) for name in _MODS if name in options}
        content: dict[str, Any] = {
            "version": _VERSION,
            "direction": self.direction,
            "options": options,
            "arrays": self.arrays,
        }
        if self.along:
            content["along"] = self.along
        content |= {"room": self.room} if self.room else {}
        return json.dumps(content, separators=(",", ":"))


def from_text(text: str | bytes) -> GivenCall:
    """The call that a program knows by this text.

    Raises
    ------
    UnsupportedProblem
        If another version of cuflash wrote it.
    """
    content = json.loads(text)
    if content["version"] != _VERSION:
        raise UnsupportedProblem(
            f"a compiled program calls cuflash in the words of version {content['version']}, and this cuflash knows "
            f"version {_VERSION}. Export the program again."
        )
    options: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in content["options"].items()}
    options |= {name: words.from_words(options[name]) for name in _MODS if name in options}
    arrays = tuple((name, tuple(shape), dtype) for name, shape, dtype in content["arrays"])
    along = tuple(content.get("along", ()))
    return GivenCall(content["direction"], asked(**options), arrays, along, content.get("room", 0))


def plain(options: Options) -> Options:
    """The options in numbers of Python's own, which text can hold, once they are checked."""
    return asked(**{name: _plain(x) for name, x in check.settled(options).values().items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if value is None or isinstance(value, bool | str | Mod):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if is_array(value):  # which the checks refuse
        return value
    number = integer(value)
    return float(value) if number is None else number


def contiguous(name: str, shape: tuple[int, ...], dtype: str) -> View:
    """A contiguous array that a compiler will put somewhere."""
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    strides = tuple(itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(name, shape, strides, dtype, itemsize, 0, "jax")


def on_gpu(call: GivenCall, ordinal: int) -> Callable[[list[int], int], None]:
    """The launches of a call on a GPU: from pointers and a stream to work on the stream, and to nothing else.

    The pointers are of the arrays that it reads, of its results, and of its scratch memory if it needs any.
    """
    gpu = device.current(ordinal)
    planned, scratch = call.plan(gpu), call.scratch(gpu)
    if scratch.nbytes != call.room:
        raise UnsupportedProblem(
            f"a compiled program has {call.room} bytes of scratch memory for a call that needs {scratch.nbytes} on "
            f"{gpu}: it was made for another GPU. Compile it where it runs."
        )
    launches, params = planned.load(ordinal), planned.params(ordinal)
    num_read, zeroed, starts = len(call.operands), scratch.nbytes_zeroed, scratch.starts
    cleared = [(num_read + i, r.nbytes) for i, r in enumerate(call.results) if r.zeroed and r.nbytes]

    def launch(pointers: list[int], stream: int) -> None:
        for index, nbytes in cleared:
            jit.clear(pointers[index], nbytes, stream)
        if scratch.nbytes:
            memory = pointers.pop()
            if zeroed:
                jit.clear(memory, zeroed, stream)
            pointers += [memory + start for start in starts]
        block = params(tuple(pointers))
        for start in launches:
            start(block, stream)

    return launch


def on_cpu(call: GivenCall, pointers: Sequence[int]) -> None:
    """Compute a call in host memory; pointers of what it reads, then of its results."""
    described = [*call.operands, *((r.name, r.shape, r.dtype.name) for r in call.results)]
    arrays = [_array(pointer, x) for pointer, (_, *x) in zip(pointers, described, strict=True)]
    num_read, num_operands = len(call.arrays), len(call.operands)
    by_name = [(name, array) for (name, *_), array in zip(described, arrays, strict=True)]
    read, changes, written = (
        dict(part) for part in (by_name[:num_read], by_name[num_read:num_operands], by_name[num_operands:])
    )
    captured = tuple(read.pop(name) for name in [*read] if name.startswith("captured")) or None
    along = None
    if call.along:
        places = written if call.direction == "forward" else {}
        along = Tangents(**{_TANGENTS.get(name, name): x for name, x in (changes | places).items()})
    if call.direction == "forward":
        rng_state = read.pop("rng_state", None)
        generator = None if rng_state is None else tuple(rng_state.view(np.uint64).tolist())
        if along is not None:
            on_numpy.forward(call.options, Arrays(**read, captured=captured), generator, along=along)
            return
        computed = on_numpy.forward(call.options, Arrays(**read, out=written["out"], captured=captured), generator)
    else:
        gradients = {name: written[name] for name in ("dq", "dk", "dv")}
        computed = on_numpy.backward(call.options, Arrays(**read, **gradients, captured=captured), along)
    for place, x in zip(written.values(), computed, strict=False):  # rng_state, the last one, is not written
        if place is not x:
            place[...] = x


def _array(pointer: int, description: Sequence[Any]) -> np.ndarray:
    """Memory as an array."""
    shape, dtype = description
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    if not nbytes:
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype).reshape(shape)
