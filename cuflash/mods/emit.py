"""Expressions as CUDA text, the statements of a function's body; no kernel is made of them yet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cuflash.mods.expression import OPERATIONS, Node, in_order

TYPES = {"bool": "bool", "int": "int", "real": "Real"}


def emit(*results: Node) -> tuple[list[str], list[str]]:
    """The statements that compute expressions, and what stands for each result after them.

    The text reads the variables ``s`` (the score, a ``Real``), ``b``, ``h``, ``q`` and ``k``, and a captured array as
    ``captured<0>(i, j)``, of a type as the array's kind has.
    """
    statements: list[str] = []
    words: dict[Node, str] = {}
    for node in in_order(*results):
        args = [words[x] for x in node.args]
        text = _text(node, args)
        if node.args and node.op != "constant":
            name = f"x{len(statements)}"
            statements.append(f"const {TYPES[node.kind]} {name} = {text};")
            text = name
        words[node] = text
    return statements, [words[x] for x in results]


def _text(node: Node, args: Sequence[str]) -> str:
    if node.op == "constant":
        return _number(node)
    if node.op == "score":
        return "s"
    if node.op == "position":
        return str(node.value)
    if node.op == "load":
        return f"captured<{node.value}>({', '.join(args)})"
    return OPERATIONS[node.op].cuda.format(*args)


def _number(node: Node) -> str:
    """A constant, to the last bit."""
    if node.kind == "bool":
        return str(node.value).lower()
    if node.kind == "int":
        return f"{node.value}" if node.value >= 0 else f"({node.value})"
    if math.isinf(node.value):
        return f"({'-' if node.value < 0 else ''}infinity<Real>())"
    return f"static_cast<Real>({node.value.hex()})"
