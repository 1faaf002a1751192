"""Expressions as functions again, which other functions may call: what masks are composed by."""

from __future__ import annotations

from collections.abc import Callable

from cuflash.mods.expression import POSITIONS, SCORE, Node, in_order
from cuflash.mods.symbols import Captured, Symbol, operation
from cuflash.mods.tracing import Traced


def function_of(traced: Traced) -> Callable[..., Symbol]:
    """A function that does what was traced, ``(b, h, q, k)``, or ``(score, b, h, q, k)`` where the score is read.

    It may be traced again, called by functions that are, and at other positions than their own.
    """
    expression = traced.mod.expression
    order = in_order(expression)
    names = ("score", *POSITIONS) if SCORE in order else POSITIONS
    arrays = [Captured(array) for array in traced.arrays]

    def replayed(*symbols: Symbol) -> Symbol:
        leaves = dict(zip(names, symbols, strict=True))
        made: dict[Node, Symbol] = {}
        for node in order:
            args = [made[x] for x in node.args]
            if node.op == "constant":
                made[node] = Symbol(node)
            elif node.op in ("position", "score"):
                made[node] = leaves[node.value or "score"]
            elif node.op == "load":
                array = arrays[node.value]
                made[node] = array[tuple(args)] if args else Symbol(array.node)
            elif node.op in ("int", "real"):
                made[node] = Symbol(Node(node.op, (args[0].node,), kind=node.kind))
            else:
                made[node] = operation(node.op, *args)
        return made[expression]

    return replayed
