"""Expressions of scalars: what a written score or mask becomes, and the operations that there are."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np

Kind = Literal["bool", "int", "real"]
"""What a scalar is: each is a case of the next."""

_ORDER: tuple[Kind, ...] = ("bool", "int", "real")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, in every language that it is printed in; `derive` has its derivative."""

    name: str
    operands: Kind
    """The least kind of its operands: others are converted to it, and then all to the greatest among them."""
    result: Kind | None
    """The kind of its result; None: that of its operands."""
    numpy: Callable[..., Any]
    cuda: str
    """The operands by number, ``Real`` for the accumulator's type, and functions of a namespace ``mods``."""


def _floor_divide(a: Any, b: Any) -> Any:
    """Floor division of integers, 0 where b is."""
    return np.floor_divide(a, np.where(np.equal(b, 0), 1, b)) * np.not_equal(b, 0)


def _remainder(a: Any, b: Any) -> Any:
    """What floor division leaves, 0 where b is 0."""
    return np.remainder(a, np.where(np.equal(b, 0), 1, b)) * np.not_equal(b, 0)


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in (
    Operation("add", "int", None, np.add, "{0} + {1}"),
    Operation("subtract", "int", None, np.subtract, "{0} - {1}"),
    Operation("multiply", "int", None, np.multiply, "{0} * {1}"),
    Operation("divide", "real", "real", np.divide, "{0} / {1}"),
    Operation("floor_divide", "int", "int", _floor_divide, "mods::floor_divide({0}, {1})"),
    Operation("remainder", "int", "int", _remainder, "mods::remainder({0}, {1})"),
    Operation("negative", "int", None, np.negative, "-{0}"),
    Operation("abs", "int", None, np.abs, "mods::abs({0})"),
    Operation("minimum", "int", None, np.minimum, "mods::minimum({0}, {1})"),
    Operation("maximum", "int", None, np.maximum, "mods::maximum({0}, {1})"),
    Operation("power", "real", "real", np.power, "mods::power({0}, {1})"),
    Operation("exp", "real", "real", np.exp, "mods::exp({0})"),
    Operation("log", "real", "real", np.log, "mods::log({0})"),
    Operation("sqrt", "real", "real", np.sqrt, "mods::sqrt({0})"),
    Operation("tanh", "real", "real", np.tanh, "mods::tanh({0})"),
    Operation("sin", "real", "real", np.sin, "mods::sin({0})"),
    Operation("cos", "real", "real", np.cos, "mods::cos({0})"),
    Operation("floor", "real", "real", np.floor, "mods::floor({0})"),
    Operation("less", "bool", "bool", np.less, "{0} < {1}"),
    Operation("less_equal", "bool", "bool", np.less_equal, "{0} <= {1}"),
    Operation("equal", "bool", "bool", np.equal, "{0} == {1}"),
    Operation("not_equal", "bool", "bool", np.not_equal, "{0} != {1}"),
    Operation("bitwise_and", "bool", None, np.bitwise_and, "{0} & {1}"),
    Operation("bitwise_or", "bool", None, np.bitwise_or, "{0} | {1}"),
    Operation("bitwise_xor", "bool", None, np.bitwise_xor, "{0} ^ {1}"),
    Operation("invert", "bool", None, np.invert, "mods::invert({0})"),
    Operation("left_shift", "int", "int", np.left_shift, "mods::left_shift({0}, {1})"),
    Operation("right_shift", "int", "int", np.right_shift, "mods::right_shift({0}, {1})"),
    Operation("where", "bool", None, np.where, "{0} ? {1} : {2}"),
    Operation("int", "bool", "int", lambda x: np.asarray(x).astype(np.int64), "static_cast<int>({0})"),
    Operation("real", "bool", "real", np.asarray, "static_cast<Real>({0})"),
)}  # fmt: skip
"""All but the leaves: ``score``, ``position``, ``constant`` and ``load``."""

POSITIONS = ("b", "h", "q", "k")
"""Batch element, query head, query and key: what a position node stands for."""


class Node:
    """An operation on other nodes, or a leaf. Nodes of the same structure are one object, and so keys as they are.

    Attributes
    ----------
    op : str
        A name of `OPERATIONS`, or ``score``, ``position`` (value: one of `POSITIONS`), ``constant`` (value: a bool, int
        or float) or ``load`` (value: the number of the captured array; args: one index for each of its axes).
    args : tuple of Node
    value : object
    kind : Kind
    """

    __slots__ = ("__weakref__", "args", "kind", "op", "value")

    op: str
    args: tuple[Node, ...]
    value: Any
    kind: Kind

    def __new__(cls, op: str, args: tuple[Node, ...] = (), value: Any = None, kind: Kind = "real") -> Node:
        """The only node of this structure."""
        # repr tells 0.0 from -0.0 and 1 from True, which are equal.
        key = op, args, type(value), repr(value), kind
        with _lock:
            node = _nodes.get(key)
            if node is None:
                node = object.__new__(cls)
                node.op, node.args, node.value, node.kind = op, args, value, kind
                _nodes[key] = node
        return node

    def __reduce__(self) -> tuple[Any, ...]:
        return Node, (self.op, self.args, self.value, self.kind)

    def __repr__(self) -> str:
        return spelled(self)


_nodes: WeakValueDictionary[Any, Node] = WeakValueDictionary()
_lock = threading.Lock()

SCORE = Node("score", kind="real")


def constant(value: bool | int | float) -> Node:
    """A number that is compiled in."""
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
    return Node("constant", value=value, kind=kind)


ZERO, ONE = constant(0.0), constant(1.0)


def apply(name: str, *args: Node) -> Node:
    """An operation on nodes, of the kinds that it takes; of constants, its result."""
    operation = OPERATIONS[name]
    if name == "where":
        condition, *branches = args
        kind = _greatest(branches)
        return Node("where", (condition, *(converted(x, kind) for x in branches)), kind=kind)
    kind = max(operation.operands, _greatest(args), key=_ORDER.index)
    args = tuple(converted(x, kind) for x in args)
    result = operation.result or kind
    if all(x.op == "constant" for x in args):
        with np.errstate(all="ignore"):
            value = operation.numpy(*(np.asarray(x.value) for x in args))
        if result != "real" or math.isfinite(value):
            return constant({"bool": bool, "int": int, "real": float}[result](value))
    return Node(name, args, kind=result)


def converted(node: Node, kind: Kind) -> Node:
    """The same number as at least this kind."""
    if _ORDER.index(node.kind) >= _ORDER.index(kind):
        return node
    if node.op == "constant":
        return constant(float(node.value) if kind == "real" else int(node.value))
    return Node("real" if kind == "real" else "int", (node,), kind=kind)


def _greatest(nodes: Iterable[Node]) -> Kind:
    return max((node.kind for node in nodes), key=_ORDER.index)


def in_order(*results: Node, leaves: Container[Node] = ()) -> list[Node]:
    """All nodes that the results are made of, each once and after its operands, but for what `leaves` are made of."""
    seen: set[Node] = set()
    order: list[Node] = []
    stack = [(node, False) for node in reversed(results)]
    while stack:
        node, operands_done = stack.pop()
        if operands_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in leaves:
                stack += [(x, False) for x in reversed(node.args)]
    return order


_SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "floor_divide": "//", "remainder": "%", "less": "<",
    "less_equal": "<=", "equal": "==", "not_equal": "!=", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
    "left_shift": "<<", "right_shift": ">>", "power": "**",
}  # fmt: skip


def spelled(result: Node, names: tuple[str, ...] = ()) -> str:
    """The expression as Python would have it, captured arrays by these names; what comes again stands again."""
    words: dict[Node, str] = {}
    for node in in_order(result):
        args = [words[x] for x in node.args]
        if node.op == "constant":
            words[node] = str(node.value)
        elif node.op == "load":
            name = names[node.value] if names else f"captured{node.value}"
            words[node] = f"{name}[{', '.join(args)}]" if args else name
        elif node.op in ("score", "position"):
            words[node] = node.value or "score"
        elif node.op in ("int", "real"):
            words[node] = args[0]
        elif node.op in _SIGNS:
            words[node] = f"({args[0]} {_SIGNS[node.op]} {args[1]})"
        else:
            words[node] = f"{node.op}({', '.join(args)})"
        if len(words[node]) > 500:  # what shares parts may be exponentially long when written out
            words[node] = "…"
    return words[result].removeprefix("(").removesuffix(")") if result.op in _SIGNS else words[result]
