"""From a Python function of scalars to an expression: called once with symbols that write down what is done to them."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from cuflash.errors import InvalidArgument
from cuflash.mods.expression import POSITIONS, SCORE, Node, apply, spelled
from cuflash.mods.symbols import Captured, Operand, Operands, Symbol, node_of, quoted
from cuflash.numbers import is_array, shown


@dataclass(frozen=True, slots=True)
class Mod:
    """A score or a mask as a function of the position, without the arrays that it reads: what a kernel is made from.

    Two functions that do the same with operands of the same kinds are equal mods.
    """

    expression: Node
    operands: tuple[Operand, ...] = ()

    def __str__(self) -> str:
        return spelled(self.expression)


class Traced(NamedTuple):
    """A mod and the arrays of one call that it reads, by number."""

    mod: Mod
    arrays: tuple[Any, ...]


def trace(argument: str, function: Callable[..., Any]) -> Traced:
    """What a written score, ``(score, b, h, q, k)``, or mask, ``(b, h, q, k)``, does.

    Parameters
    ----------
    argument : {'score_mod', 'mask_mod'}
        Which of the two it is, and what messages call it.
    function : callable
        Called once. Arrays in its closure, defaults and globals, and in those of functions in its closure, are captured
        where it indexes them; any other array is when it is wrapped by `captured`.

    Raises
    ------
    InvalidArgument
        If the function takes other arguments, returns something else or depends on the value of one in a way that
        cannot be written down; the message has the line.
    """
    if not callable(function):
        raise InvalidArgument(f"{argument} is {shown(function)}; expected a function of {_SIGNATURES[argument]}.")
    operands = Operands(argument)
    symbols = [Symbol(Node("position", value=name, kind="int")) for name in POSITIONS]
    if argument == "score_mod":
        symbols.insert(0, Symbol(SCORE))
    with operands.current():
        try:
            result = _with_captured(function)(*symbols)
        except InvalidArgument:
            raise
        except Exception as error:
            hint = ""
            if isinstance(error, IndexError | TypeError):
                hint = (
                    f"\nIt is called once with symbols, as {argument}{_SIGNATURES[argument]}. Arrays that it reads from"
                    " objects or modules need cuflash.mods.captured(array), functions of other libraries their twins in"
                    " cuflash.mods."
                )
            raise InvalidArgument(
                f"{argument} cannot be traced: {type(error).__name__}: {error}{_line_of(error)}{hint}"
            ) from error
        node = node_of(result)
    if argument == "mask_mod" and (node is None or node.kind != "bool"):
        raise InvalidArgument(f"mask_mod returned {_described(result)}; expected a comparison, True for keys to see.")
    if argument == "score_mod" and (node is None or node.kind == "bool"):
        raise InvalidArgument(f"score_mod returned {_described(result)}; expected a number, the score to use.")
    assert node is not None
    if argument == "score_mod":
        node = apply("real", node) if node.kind != "real" else node
    return Traced(Mod(node, tuple(operands.kinds)), tuple(operands.arrays))


_SIGNATURES = {"score_mod": "(score, b, h, q, k)", "mask_mod": "(b, h, q, k)"}


def _has_elements(value: Any) -> bool:
    """Whether a value is an array: modules of arrays have a shape, too, a function."""
    return is_array(value) and isinstance(value.shape, tuple) and hasattr(value, "dtype")


def _with_captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function where the arrays that it finds by name are captured ones."""
    return _Rebinding().function(function)


class _Rebinding:
    """Copies of functions that see captured arrays, each made once, as they may name one another."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def function(self, function: Any) -> Any:
        """The copy of a function; callables of other kinds as they are."""
        if isinstance(function, partial):
            keywords = {name: self.value(x) for name, x in function.keywords.items()}
            return partial(self.function(function.func), *map(self.value, function.args), **keywords)
        if not isinstance(function, types.FunctionType):
            return function
        if id(function) in self._made:
            return self._made[id(function)]
        names = function.__globals__
        arrays = {x: Captured(names[x]) for x in function.__code__.co_names if _has_elements(names.get(x))}
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copy = types.FunctionType(
            function.__code__, {**names, **arrays} if arrays else names, function.__name__, None, cells or None
        )
        self._made[id(function)] = copy
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # of a name that has no value yet
                cell.cell_contents = self.value(original.cell_contents)
        copy.__defaults__ = tuple(map(self.value, function.__defaults__ or ())) or None
        copy.__kwdefaults__ = {name: self.value(x) for name, x in (function.__kwdefaults__ or {}).items()}
        return copy

    def value(self, value: Any) -> Any:
        """What a copy sees in the place of a value."""
        if isinstance(value, Symbol):
            return value
        return Captured(value) if _has_elements(value) else self.function(value)


def _line_of(error: BaseException) -> str:
    """Where an error was raised outside of this library, for a message."""
    place = ""
    step = error.__traceback__
    while step:
        if step.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "cuflash":
            place = quoted(step.tb_frame.f_code.co_filename, step.tb_lineno)
        step = step.tb_next
    return place


def _described(value: Any) -> str:
    return f"a {value.node.kind} number, {value!r}" if isinstance(value, Symbol) else shown(value)
