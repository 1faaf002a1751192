"""Written scores and masks as CUDA: ``ScoreMod``, ``MaskMod`` and ``BlockMod`` of ``config.cuh``, and ``captured.cuh``.

What they read are arguments of the kernels, in front of all others: a kernel of the same call that reads none of it
finds its own arguments behind them, laid out as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuflash.dtypes import DTYPES
from cuflash.mods.derive import slopes
from cuflash.mods.distance import learned
from cuflash.mods.emit import emit, in_units, is_bounded
from cuflash.mods.expression import Node, in_order
from cuflash.mods.tracing import Mod, Operand
from cuflash.plan.config import Written

_POINTER, _STRIDE, _SIZE = np.dtype(np.uint64), np.dtype(np.int64), np.dtype(np.int32)
_ELEMENTS = {dtype.numpy: dtype.cuda for dtype in DTYPES.values()} | {
    np.dtype(np.int32): "int", np.dtype(np.int64): "int64", np.dtype(np.uint8): "uint8", np.dtype(np.bool_): "uint8",
}  # fmt: skip
_BOUNDARY = 64
"""Bytes: what `TensorMap` asks of its place."""


def members(written: Written | None) -> dict[str, np.dtype]:
    """The members of ``Captured``, pointers as uint64: each array's address, strides in elements and sizes.

    With a block mask also its lists (``attention/lists.cuh``), and how many lines are between batch elements and heads.
    """
    types: dict[str, np.dtype] = {}
    operands = written.operands if written else ()
    for number, operand in enumerate(operands):
        types[f"captured{number}"] = _POINTER
        if written and number in written.gradients:
            types[f"dcaptured{number}"] = _POINTER
            if written.exact:
                types[f"dcaptured{number}_sums"] = _POINTER
        if operand.ndim:
            if written and number not in written.flat:
                types[f"captured{number}_stride"] = np.dtype((_STRIDE, (operand.ndim,)))
            types[f"captured{number}_size"] = np.dtype((_SIZE, (operand.ndim,)))
    if written and written.blocks:
        types |= dict.fromkeys(("kv_lines", "kv_list", "q_lines", "q_list", "q_turns"), _POINTER)
        types |= {f"{side}_lines_{axis}": _STRIDE for side in ("kv", "q") for axis in ("batch", "head")}
    nbytes = sum(kind.itemsize + -kind.itemsize % 8 for kind in types.values())
    if nbytes % _BOUNDARY:
        types["padding"] = np.dtype((_STRIDE, (-nbytes % _BOUNDARY // 8,)))
    return types


def captured_struct(written: Written) -> list[str]:
    """The lines of the struct ``Captured``."""
    lines = ["struct Captured {"]
    for name, kind in members(written).items():
        element, length = kind.base, kind.shape
        declared = {_POINTER: "void*", _STRIDE: "int64", _SIZE: "int"}[element]
        lines.append(f"  {declared} {name}" + "".join(f"[{n}]" for n in length) + ";")
    return [*lines, "};"]


def structs(written: Written, fast: bool = False) -> list[str]:
    """The lines of ``ScoreMod``, ``MaskMod`` and ``BlockMod``, if any; `fast` ones for results of 16 bits."""
    lines: list[str] = []
    if written.score is not None:
        printer = _Printer(written.score, written, 0, fast)
        score, slope = written.score.expression, slopes(written.score).by_score
        factor, value = in_units(score) if fast else (1.0, score)
        unit = "inner" if factor is None else f"static_cast<Real>({factor.hex()})"
        body = [
            f"  static constexpr bool kBoundedSlope = {str(is_bounded(slope)).lower()};",
            f"  static constexpr bool kFiniteBeyond = {str(is_bounded(score, beyond=True)).lower()};",
            "  template <class Real>",
            f"  CF_DEVICE static Real unit(Real inner) {{ return {unit}; }}",
        ]
        body += printer.function("Real value(Real s, Real unit, {})", value)
        body += printer.function("Real slope(Real s, Real unit, {})", slope)
        if written.gradients:
            body += printer.gradients("void add_gradients(Real s, Real unit, {}, Real ds)", written.gradients)
            body += printer.gradients_by_distance(
                "void add_at_distance(int b, int h, int distance, Real ds)", written.gradients
            )
        if written.exact:
            body += _sums(written)
        lines += printer.struct("ScoreMod", body)
    first = len(written.score.operands) if written.score else 0
    for name, mask in (("MaskMod", written.mask), ("BlockMod", written.blocks)):
        if mask is not None:
            printer = _Printer(mask, written, first, fast)
            lines += printer.struct(name, printer.function("bool value({})", mask.expression))
            first += len(mask.operands)
    return lines


class _Printer:
    """A struct that is made from the arguments of a kernel, a batch element and a head.

    It holds the numbers that are read for these, whatever the query and the key. `first` is the number of what it reads
    first among the arguments.
    """

    def __init__(self, mod: Mod, written: Written, first: int, fast: bool) -> None:
        self._mod, self._flat, self._exact = mod, written.flat, written.exact
        self._first, self._fast = first, fast
        results = [mod.expression]
        if mod.expression.kind == "real":
            results += [x for pair in slopes(mod).by_load for x in pair]
        self._held: dict[Node, str] = {}
        same: set[Node] = set()
        for node in in_order(*results):
            varies = node.op == "score" or (node.op == "position" and node.value in ("q", "k"))
            if varies or any(x not in same or x.kind == "real" for x in node.args):
                continue
            same.add(node)
            if node.op == "load":
                self._held[node] = f"held{len(self._held)}"

    def struct(self, name: str, body: list[str]) -> list[str]:
        """Its lines."""
        mod = self._mod
        lines = [f"// {mod}", f"struct {name} {{"]
        lines += ["  const Attention* a;"] if mod.operands else []
        lines += [f"  {_type(mod.operands[load.value])} {name};" for load, name in self._held.items()]
        made = " : a(&attention)" if mod.operands else ""
        lines += [f"  CF_DEVICE {name}(const Attention& attention, int b, int h){made} {{"]
        known: dict[Node, str] = {}
        for load, held in self._held.items():
            statements, words = emit(*load.args, operands=mod.operands, known=known)
            lines += ["    {", *(f"      {x}" for x in statements)] if statements else []
            lines += [f"      {held} = captured{load.value}({', '.join(words)});", *["    }"] * bool(statements)]
            known[load] = held
        lines += ["  }"]
        for i, operand in enumerate(mod.operands):
            array, axes = f"a->captured{self._first + i}", range(operand.ndim)
            nearest = [f"mods::nearest(i{n}, {array}_size[{n}])" for n in axes]
            lines += [f"  template <{', '.join(f'class I{axis}' for axis in axes)}>"] if operand.ndim else []
            if self._first + i in self._flat:
                index = _flat_index(array, nearest, "int")
            else:
                index = " + ".join(f"{x} * {array}_stride[{n}]" for n, x in enumerate(nearest))
            taken = ", ".join(f"I{axis} i{axis}" for axis in axes)
            read = _element(operand, array, index or "0")
            lines += [f"  CF_DEVICE {_type(operand)} captured{i}({taken}) const {{ return {read}; }}"]
        return [*lines, *body, "};", ""]

    def function(self, signature: str, result: Node) -> list[str]:
        """The lines of a member function that returns a number."""
        statements, (word,) = self._emit(result)
        return [*_opened(signature), *(f"    {x}" for x in statements), f"    return {word};", "  }"]

    def gradients(self, signature: str, wanted: Sequence[int]) -> list[str]:
        """The lines of one that adds what the gradient of the result makes of those of the numbers that are read."""
        loads = [(load, slope) for load, slope in slopes(self._mod).by_load if load.value in wanted]
        statements, words = self._emit(*(slope for _, slope in loads), *(i for load, _ in loads for i in load.args))
        lines = [*_opened(signature), *(f"    {x}" for x in statements)]
        indices = iter(words[len(loads) :])
        for (load, _), slope in zip(loads, words, strict=False):
            lines += [self._added(load, [next(indices) for _ in load.args], f"ds * {slope}")]
        return [*lines, "  }"]

    def gradients_by_distance(self, signature: str, wanted: Sequence[int]) -> list[str]:
        """The same of all pairs of a distance, where that decides which numbers are read; else none."""
        loads = learned(self._mod, wanted)
        statements, words = self._emit(*(i for _, indices in loads for i in indices))
        lines = [*_opened(signature), *(f"    {x}" for x in statements)]
        rest = iter(words)
        lines += [self._added(load, [next(rest) for _ in indices], "ds") for load, indices in loads]
        return [*lines, "  }"] if loads else []

    def _added(self, load: Node, indices: Sequence[str], term: str) -> str:
        """The line that adds a term to the gradient of what a load reads."""
        array = f"a->captured{load.value}"
        nearest = [f"mods::nearest({x}, {array}_size[{n}])" for n, x in enumerate(indices)]
        at = _flat_index(array, nearest, "int" if load.value in self._flat else "int64") or "0"
        if self._exact:
            return f"    ExactSum<Real>::add(a->dcaptured{load.value}_sums, {at}, {term});"
        return f"    ptx::red_add(static_cast<Real*>(a->dcaptured{load.value}) + {at}, {term});"

    def _emit(self, *results: Node) -> tuple[list[str], list[str]]:
        return emit(*results, operands=self._mod.operands, known=self._held, fast=self._fast)


def _sums(written: Written) -> list[str]:
    """The lines of a member function that names every gradient, its exact sums and how many there are."""
    lines = ["  template <class Each>", "  CF_DEVICE static void for_each_sum(const Attention* a, const Each& each) {"]
    for number in written.gradients:
        sizes = (f"a->captured{number}_size[{n}]" for n in range(written.operands[number].ndim))
        count = " * ".join(["int64(1)", *sizes])
        lines.append(f"    each(a->dcaptured{number}, a->dcaptured{number}_sums, {count});")
    return [*lines, "  }"]


def _flat_index(array: str, nearest: Sequence[str], kind: str) -> str:
    """Where an element is in contiguous memory."""
    at = ""
    for n, x in enumerate(nearest):
        at = f"({at} * {array}_size[{n}] + {x})" if at else f"static_cast<{kind}>({x})"
    return at


def _opened(signature: str) -> list[str]:
    result, _, rest = signature.format("int b, int h, Place q, Place k").partition(" ")
    return ["  template <class Real>", f"  CF_DEVICE {result} {rest} const {{"]


def _type(operand: Operand) -> str:
    """Of a number of an expression that is read from an array."""
    if operand.kind == "real":
        return "double" if operand.dtype == np.float64 else "float"
    return "int64" if operand.dtype == np.int64 else operand.kind


def _element(operand: Operand, array: str, index: str) -> str:
    return f"mods::{operand.kind}_of(static_cast<const {_ELEMENTS[operand.dtype]}*>({array})[{index}])"
