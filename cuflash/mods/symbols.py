"""Scalars of which only the expression is known: what a function under trace is called with, and what it makes."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Never

import ml_dtypes
import numpy as np

from cuflash.errors import InvalidArgument
from cuflash.mods.expression import Kind, Node, apply, constant, spelled
from cuflash.numbers import shown


@dataclass(frozen=True, slots=True)
class Operand:
    """What is compiled in of an array that a mod reads; its sizes and strides are not."""

    dtype: np.dtype
    ndim: int

    @property
    def kind(self) -> Kind:
        """What its elements are in an expression."""
        return "bool" if self.dtype == np.bool_ else "int" if self.dtype.kind in "iu" else "real"


class Operands:
    """The arrays that a function under trace has read so far."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.arrays: list[Any] = []
        self.kinds: list[Operand] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        """While a function is traced, what captured arrays are entered into."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def number(self, array: Any, kind: Operand) -> int:
        """The number of an array, one more where it was not read before."""
        for i, known in enumerate(self.arrays):
            if known is array:
                return i
        self.arrays.append(array)
        self.kinds.append(kind)
        return len(self.arrays) - 1


_CURRENT: ContextVar[Operands | None] = ContextVar("cuflash_mods_operands", default=None)


class Symbol:
    """A scalar of which only the expression is known; Python's operators and NumPy's functions extend it."""

    __slots__ = ("_node",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def node(self) -> Node:
        """Its expression."""
        return self._node

    def __repr__(self) -> str:
        return spelled(self.node)

    def __bool__(self) -> bool:
        _refuse(
            "the truth of",
            self,
            "it is a symbol here, for if, and, or, not and a < b < c; use cuflash.mods.where, &, | and ~",
        )

    def __int__(self) -> int:
        _refuse("the value of", self, "it is a symbol here; use cuflash.mods.floor or whole-number division, //")

    __index__ = __int__

    def __float__(self) -> float:
        _refuse("the value of", self, "it is a symbol here; in the place of math's functions use those of cuflash.mods")

    def __iter__(self) -> Iterator[Any]:
        _refuse("the elements of", self, "it is one number")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Symbol:
        name = _UFUNCS.get(ufunc.__name__)
        if name is None or method != "__call__" or options:
            _refuse(f"numpy.{ufunc.__name__} of", self, "use a function of cuflash.mods")
        return operation(name, *inputs)

    def __array_function__(self, function: Any, types: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Symbol:
        if function is not np.where or options:
            _refuse(f"numpy.{function.__name__} of", self, "use a function of cuflash.mods")
        return operation("where", *args)

    def _with(self, name: str, other: Any, swapped: bool = False) -> Symbol:
        """An operation of two operands, this the first unless they are swapped."""
        if node_of(other) is None:
            return NotImplemented
        return operation(name, other, self) if swapped else operation(name, self, other)

    def __add__(self, other: Any) -> Symbol:
        return self._with("add", other)

    def __radd__(self, other: Any) -> Symbol:
        return self._with("add", other, swapped=True)

    def __sub__(self, other: Any) -> Symbol:
        return self._with("subtract", other)

    def __rsub__(self, other: Any) -> Symbol:
        return self._with("subtract", other, swapped=True)

    def __mul__(self, other: Any) -> Symbol:
        return self._with("multiply", other)

    def __rmul__(self, other: Any) -> Symbol:
        return self._with("multiply", other, swapped=True)

    def __truediv__(self, other: Any) -> Symbol:
        return self._with("divide", other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self._with("divide", other, swapped=True)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._with("floor_divide", other)

    def __rfloordiv__(self, other: Any) -> Symbol:
        return self._with("floor_divide", other, swapped=True)

    def __mod__(self, other: Any) -> Symbol:
        return self._with("remainder", other)

    def __rmod__(self, other: Any) -> Symbol:
        return self._with("remainder", other, swapped=True)

    def __pow__(self, other: Any) -> Symbol:
        return self._with("power", other)

    def __rpow__(self, other: Any) -> Symbol:
        return self._with("power", other, swapped=True)

    def __and__(self, other: Any) -> Symbol:
        return self._with("bitwise_and", other)

    def __rand__(self, other: Any) -> Symbol:
        return self._with("bitwise_and", other, swapped=True)

    def __or__(self, other: Any) -> Symbol:
        return self._with("bitwise_or", other)

    def __ror__(self, other: Any) -> Symbol:
        return self._with("bitwise_or", other, swapped=True)

    def __xor__(self, other: Any) -> Symbol:
        return self._with("bitwise_xor", other)

    def __rxor__(self, other: Any) -> Symbol:
        return self._with("bitwise_xor", other, swapped=True)

    def __lshift__(self, other: Any) -> Symbol:
        return self._with("left_shift", other)

    def __rlshift__(self, other: Any) -> Symbol:
        return self._with("left_shift", other, swapped=True)

    def __rshift__(self, other: Any) -> Symbol:
        return self._with("right_shift", other)

    def __rrshift__(self, other: Any) -> Symbol:
        return self._with("right_shift", other, swapped=True)

    def __lt__(self, other: Any) -> Symbol:
        return self._with("less", other)

    def __le__(self, other: Any) -> Symbol:
        return self._with("less_equal", other)

    def __gt__(self, other: Any) -> Symbol:
        return self._with("greater", other)

    def __ge__(self, other: Any) -> Symbol:
        return self._with("greater_equal", other)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self._with("equal", other)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self._with("not_equal", other)

    def __neg__(self) -> Symbol:
        return operation("negative", self)

    def __abs__(self) -> Symbol:
        return operation("abs", self)

    def __invert__(self) -> Symbol:
        return operation("invert", self)

    def __pos__(self) -> Symbol:
        return self


_UFUNCS = {name: name for name in (
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "negative", "minimum", "maximum", "power",
    "exp", "log", "sqrt", "tanh", "sin", "cos", "floor", "less", "less_equal", "equal", "not_equal", "bitwise_and",
    "bitwise_or", "bitwise_xor", "invert", "left_shift", "right_shift",
)} | {
    "absolute": "abs", "logical_and": "bitwise_and", "logical_or": "bitwise_or", "logical_not": "invert",
    "greater": "greater", "greater_equal": "greater_equal",
}  # fmt: skip


def operation(name: str, *operands: Any) -> Symbol:
    """An operation on symbols and numbers.

    Raises
    ------
    InvalidArgument
        If an operand is none of these, or of a kind that the operation does not take.
    """
    nodes = []
    for x in operands:
        node = node_of(x)
        if node is None:
            _refuse(f"{name} of", x, "expected symbols and numbers")
        nodes.append(node)
    if name in ("greater", "greater_equal"):
        name, nodes = "less" + name.removeprefix("greater"), nodes[::-1]
    if name in _INTEGERS and any(node.kind == "real" for node in nodes):
        if name == "floor_divide":
            return Symbol(apply("floor", apply("divide", *nodes)))
        if name == "remainder":
            whole = apply("floor", apply("divide", *nodes))
            return Symbol(apply("subtract", nodes[0], apply("multiply", whole, nodes[1])))
        _refuse(f"{name} of", operands[0], "it is an operation on integers and truth values")
    if name == "power" and nodes[1].op == "constant" and nodes[1].kind == "int" and 0 <= nodes[1].value <= 64:
        return Symbol(_whole_power(nodes[0], nodes[1].value))
    if name == "where" and nodes[0].kind != "bool":
        _refuse("where of the condition", operands[0], "expected a comparison")
    return Symbol(apply(name, *nodes))


_INTEGERS = ("floor_divide", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor", "invert", "left_shift",
             "right_shift")  # fmt: skip


def _whole_power(base: Node, exponent: int) -> Node:
    """By squaring: exact for integers, and right for negative bases."""
    if exponent == 0:
        return constant(1.0 if base.kind == "real" else 1)
    half = _whole_power(base, exponent // 2)
    square = apply("multiply", half, half) if exponent > 1 else None
    if exponent % 2 == 0:
        assert square is not None
        return square
    return base if square is None else apply("multiply", square, base)


class Captured(Symbol):
    """An array that a mod reads. One without axes is a number; of others, ``array[i, j]`` is one."""

    __slots__ = ("array", "operand")

    def __init__(self, array: Any) -> None:
        if isinstance(array, np.ma.MaskedArray):
            raise InvalidArgument("a masked array was captured, whose mask nothing follows; pass its filled(...).")
        self.array = array
        self.operand = Operand(_dtype(array), len(array.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array; as a number in an expression, it is compiled in."""
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        """Axes of the array."""
        return self.operand.ndim

    @property
    def dtype(self) -> np.dtype:
        """Of the array, as NumPy has it."""
        return self.operand.dtype

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def __repr__(self) -> str:
        return f"captured({'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype})"

    @property
    def node(self) -> Node:
        """Its value, of one without axes."""
        if self.ndim:
            _refuse("the value of", self, f"index all of its {self.ndim} axes")
        return self._load(())

    def __getitem__(self, index: Any) -> Symbol:
        indices = index if isinstance(index, tuple) else (index,)
        nodes = [node_of(i) for i in indices]
        if len(nodes) != self.ndim or not all(node is not None and node.kind == "int" for node in nodes):
            _refuse(f"the elements {shown(index)} of", self, f"expected one integer for each of its {self.ndim} axes")
        return Symbol(self._load(tuple(node for node in nodes if node is not None)))

    def _load(self, index: tuple[Node, ...]) -> Node:
        operands = _CURRENT.get()
        if operands is None:
            raise InvalidArgument(f"{self!r} was read outside of a score_mod or mask_mod; use the array itself there.")
        number = operands.number(self.array, self.operand)
        return Node("load", index, number, self.operand.kind)


CAPTURABLE = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool")
"""NumPy's names of the element types that arrays which a mod reads may have."""


def _dtype(array: Any) -> np.dtype:
    """The dtype of an array of any library."""
    name = str(array.dtype).rpartition(".")[2]
    try:
        dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.name not in CAPTURABLE:
        raise InvalidArgument(f"an array of {name} was captured; expected one of {', '.join(CAPTURABLE)}.")
    return dtype


def node_of(value: Any) -> Node | None:
    """The expression of a symbol or a number, None of anything else."""
    if isinstance(value, Symbol):
        return value.node
    if isinstance(value, bool | np.bool_):
        return constant(bool(value))
    if isinstance(value, int | np.integer):
        if not -(2**31) <= value < 2**31:
            _refuse("the integer", value, "kernels have 32 bits; write it as a float")
        return constant(int(value))
    if isinstance(value, float | np.floating) or type(value) is ml_dtypes.bfloat16:
        if value != value:
            _refuse("the number", value, "a score that is no number hides nothing; use -inf or mask_mod")
        return constant(float(value))
    return None


def _refuse(what: str, value: Any, remedy: str) -> Never:
    operands = _CURRENT.get()
    who = operands.argument if operands else "a written score or mask"
    described = repr(value) if isinstance(value, Symbol) else shown(value)
    raise InvalidArgument(f"{who} asks for {what} {described}; {remedy}.{_line()}")


def _line() -> str:
    """Where the caller's function is, for a message."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("cuflash", "numpy"):
        frame = frame.f_back
    return quoted(frame.f_code.co_filename, frame.f_lineno)


def quoted(file: str, number: int) -> str:
    """A line of a file, for a message."""
    text = linecache.getline(file, number).strip()
    return f"\n  {file}, line {number}" + (f": {text}" if text else "")
