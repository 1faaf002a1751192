"""Written scores and masks in functions that torch compiles.

Torch follows a caller's Python and sees tensors where there are none yet, which no function under trace can be called
with. So the function is taken apart, where torch follows, into its code and what it finds by name; and put together
again, where torch does not, around stand-ins of tensors. Numbers and shapes in it are fixed in what is compiled: torch
compiles anew where they change.
"""

from __future__ import annotations

import json
import sys
import types
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from cuflash.dtypes import BF16
from cuflash.errors import UnsupportedProblem
from cuflash.mods import Mod, Traced, trace, words
from cuflash.mods.symbols import Captured
from cuflash.ops import Options
from cuflash.ops import written as plain


class Spelled(NamedTuple):
    """A mod in words, which a graph can hold."""

    text: str
    operands: tuple[str, ...]
    """Of each array that is read, the kind of its elements."""


def traced(argument: str, function: Any) -> Traced:
    """What `cuflash.mods.trace` finds, its mod spelled; torch follows this function.

    Raises
    ------
    UnsupportedProblem
        If the function reads what torch would not see.
    """
    if isinstance(function, Traced):
        arrays = tuple([_tensor(x) for x in function.arrays])
        return Traced(Spelled(*_spelled(argument, function.mod, len(arrays))), arrays)  # type: ignore[arg-type]
    tensors: list[Any] = []
    text, kinds, order = _found(argument, _parts(argument, function, tensors))
    return Traced(Spelled(text, kinds), tuple([tensors[i] for i in order]))  # type: ignore[arg-type]


def _parts(argument: str, value: Any, tensors: list[Any]) -> tuple[Any, ...]:
    """A value in constants, but for the tensors in it: these are numbered as they are found."""
    if isinstance(value, Captured):
        value = value.array
    if isinstance(value, torch.Tensor | np.ndarray):
        value = _tensor(value)
        tensors.append(value)
        return "array", len(tensors) - 1, str(value.dtype), tuple([_fixed(n) for n in value.shape])
    if value is None or isinstance(value, bool | int | float | str):
        return "value", value if value is None else _fixed(value)
    if isinstance(value, tuple | list):
        return "tuple", *[_parts(argument, x, tensors) for x in value]
    if isinstance(value, partial):
        keywords = [(name, _parts(argument, x, tensors)) for name, x in value.keywords.items()]
        return "partial", _parts(argument, value.func, tensors), _parts(argument, value.args, tensors), tuple(keywords)
    if isinstance(value, types.ModuleType):
        return "module", value.__name__
    if isinstance(value, types.FunctionType):
        cells = [_parts(argument, cell.cell_contents, tensors) for cell in value.__closure__ or ()]
        return "function", value.__code__, value.__module__, tuple(cells), _parts(argument, value.__defaults__, tensors)
    raise UnsupportedProblem(
        f"{argument} finds a {type(value).__name__} by name, and torch.compile follows functions, tensors and numbers. "
        f"Pass cuflash.mods.trace({argument!r}, function), called outside of what is compiled."
    )


def _tensor(x: Any) -> Any:
    """An array of NumPy as a tensor of the CPU."""
    return torch.as_tensor(x) if isinstance(x, np.ndarray) else x


def _fixed(number: Any) -> Any:
    """The same number, on which what is compiled depends."""
    for key in {number: None}:  # torch knows the value of a key
        return key
    return number


@torch.compiler.assume_constant_result
def _found(argument: str, parts: Any) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """What is left of a function: its words, the kinds of what it reads, and which of the tensors these are."""
    stand_ins: dict[int, np.ndarray] = {}
    mod, arrays = trace(argument, _rebuilt(parts, stand_ins))
    numbers = {id(x): number for number, x in stand_ins.items()}
    if any(id(x) not in numbers for x in arrays):
        raise UnsupportedProblem(
            f"{argument} reads an array that is a global name or made when a function was, and torch.compile follows "
            "arguments. Give the array a local name around the function."
        )
    return *_words(mod), tuple(numbers[id(x)] for x in arrays)


@torch.compiler.assume_constant_result
def _spelled(argument: str, mod: Mod, count: int) -> tuple[str, tuple[str, ...]]:
    return _words(plain.traced(argument, Traced(mod, (None,) * count)).mod)


def _words(mod: Mod) -> tuple[str, tuple[str, ...]]:
    text = json.dumps(words.to_words(mod), separators=(",", ":"))
    return text, tuple(operand.kind for operand in mod.operands)


def _rebuilt(parts: Any, stand_ins: dict[int, np.ndarray]) -> Any:
    """The value that was taken apart."""
    what, *rest = parts
    if what == "array":
        number, dtype, shape = rest
        name = dtype.removeprefix("torch.")
        element = BF16.numpy if name == "bfloat16" else np.dtype(name)
        stand_ins[number] = np.broadcast_to(np.zeros((), element), shape)  # of any size, without memory
        return stand_ins[number]
    if what == "value":
        return rest[0]
    if what == "tuple":
        return tuple(_rebuilt(x, stand_ins) for x in rest)
    if what == "partial":
        function, args, keywords = rest
        named = {name: _rebuilt(x, stand_ins) for name, x in keywords}
        return partial(_rebuilt(function, stand_ins), *_rebuilt(args, stand_ins), **named)
    if what == "module":
        return sys.modules[rest[0]]
    code, module, cells, defaults = rest
    closure = tuple(types.CellType(_rebuilt(x, stand_ins)) for x in cells)
    names = sys.modules[module].__dict__
    return types.FunctionType(code, names, code.co_name, _rebuilt(defaults, stand_ins), closure or None)


_block_masks: dict[str, Any] = {}


@torch.compiler.assume_constant_result
def kept(mask: Any) -> str:
    """A name of a block mask, by which a graph knows it: while the process lasts."""
    name = f"block mask {id(mask)}"
    _block_masks[name] = mask
    return name


def spelled(options: Options) -> str:
    """The written parts of options, in a text; torch follows this function."""
    text = ""
    for mod in (options.score_mod, options.mask_mod):
        if mod is not None:
            text += mod.text if isinstance(mod, Spelled) else _words(mod)[0]
        text += "\n"
    return text + ("" if options.block_mask is None else kept(options.block_mask))


@lru_cache(maxsize=256)
def written(text: str) -> dict[str, Any]:
    """The options of which :func:`spelled` gives the text."""
    score, mask, blocks = text.split("\n")
    chosen: dict[str, Any] = {
        name: words.from_words(json.loads(mod)) for name, mod in (("score_mod", score), ("mask_mod", mask)) if mod
    }
    return chosen | ({"block_mask": _block_masks[blocks]} if blocks else {})
