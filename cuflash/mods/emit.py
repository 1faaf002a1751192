"""Expressions as CUDA text, the statements of a function's body.

Positions, and whole numbers of arrays of at most 32 bits, are ``int``, as are their sums, differences and small
multiples. Other products, left shifts, constants beyond 32 bits, numbers of arrays of int64, and whatever is made of
these, are ``int64``, as all are in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cuflash.mods.distance import steps, varies
from cuflash.mods.expression import OPERATIONS, Node, constant, in_order
from cuflash.mods.symbols import Operand

TYPES = {"bool": "bool", "int": "int", "real": "Real"}

_SMALL = 2**8
"""Products of positions by no more stay within 32 bits up to 8 million of these."""


def emit(
    *results: Node, operands: Sequence[Operand] = (), known: Mapping[Node, str] | None = None, fast: bool = False
) -> tuple[list[str], list[str]]:
    """The statements that compute expressions, and what stands for each result after them.

    The text reads ``s`` and ``unit``, of type ``Real``, whose product is the score, the positions by their names, and a
    captured array as ``captured0(i, j)``, of a type as the array's kind has; `operands` are those arrays. Loads that
    are `known` have names. What is `fast` errs by some units in the last place of 1, and is for at most a million
    queries and keys.
    """
    known = known or {}
    results = tuple(map(quick, results)) if fast else results
    statements: list[str] = []
    words: dict[Node, str] = {}
    wide: set[Node] = set()
    for node in in_order(*results, leaves=known):
        if _is_wide(node, wide, operands):
            wide.add(node)
        if node in known:
            words[node] = f"static_cast<{TYPES[node.kind]}>({known[node]})" if node.kind == "real" else known[node]
            continue
        kind = "int64" if node in wide else TYPES[node.kind]
        # Operands of whole numbers are converted to the widest among them, and to the result.
        own = node.op != "load" and (node in wide or any(x in wide for x in node.args))
        args = [f"static_cast<int64>({words[x]})" if own and x.kind == "int" and x not in wide else words[x]
                for x in node.args]  # fmt: skip
        text = _text(node, args, kind)
        if node.args and node.op != "constant":
            name = f"x{len(statements)}"
            statements.append(f"const {kind} {name} = {text};")
            text = name
        words[node] = text
    return statements, [words[x] for x in results]


def _is_wide(node: Node, wide: set[Node], operands: Sequence[Operand]) -> bool:
    """Whether a whole number has 64 bits."""
    if node.kind != "int":
        return False
    if node.op == "constant":
        return not -(2**31) <= node.value < 2**31
    if node.op == "load":
        return bool(operands) and operands[node.value].dtype == np.int64
    if any(x in wide for x in node.args):
        return True
    if node.op == "multiply":
        return not any(x.op == "constant" and abs(x.value) <= _SMALL for x in node.args)
    return node.op == "left_shift" and not (node.args[1].op == "constant" and 0 <= node.args[1].value <= 8)


def _text(node: Node, args: Sequence[str], kind: str) -> str:
    if node.op == "constant":
        return _number(node, kind)
    if node.op == "score":
        return "(s * unit)"
    if node.op == "position":
        return f"{node.value}.at" if node.value in ("q", "k") else str(node.value)
    if node.op == "load":
        return f"static_cast<{kind}>(captured{node.value}({', '.join(args)}))"
    if node.op == "raw_score":
        return "s"
    if node.op == "inverse_unit":
        return "(Real(1) / unit)"
    if node.op == "tanh_of_exponent":
        return f"mods::tanh_of_exponent({args[0]})"
    if node.op == "small_real":
        known = _known(node.args[0])
        if not known:
            return f"mods::small_real({args[0]})"
        return f"mods::small_real({args[0]} - ({known})) - static_cast<Real>(-({known}))"
    if node.op == "multiply" and node.args[0].op == "score" and node.args[1].op == "constant":
        return f"s * (unit * {args[1]})"  # of which the second product is the same for all scores
    return OPERATIONS[node.op].cuda.format(*args)


def work(result: Node) -> int:
    """How many operations an expression does for every pair of a query and a key; a load counts as three."""
    varies: set[Node] = set()
    count = 0
    for node in in_order(result):
        if node.op == "score" or node.value in ("q", "k") or any(x in varies for x in node.args):
            varies.add(node)
            count += {"load": 3, "score": 0, "position": 0}.get(node.op, 1)
    return count


def quick(result: Node) -> Node:
    """The same but for some roundings, with products by constants put together: numbers for results of 16 bits."""
    made: dict[Node, Node] = {}
    bounds: dict[Node, float] = {}
    for node in in_order(result):
        args = tuple(made[x] for x in node.args)
        bounds[node] = _bound(node, [bounds[x] for x in node.args])
        new = node if args == node.args or node.op == "load" else Node(node.op, args, node.value, node.kind)
        factor, rest = _factor(new)
        if node.op == "real" and node.args[0].kind == "int":
            new = _real(args[0], bounds[node.args[0]] < 2**22)
        elif node.op == "tanh":
            new = Node("tanh_of_exponent", (_product(args[0], 2 * math.log2(math.e)),))
        elif factor is not None:
            new = _product(rest, factor)
        made[node] = new
    return made[result]


def in_units(result: Node) -> tuple[float | None, Node]:
    """What a fast result is a multiple of, and how often it is taken: saves a product for every pair.

    The unit may be a constant, or that of the score, said by None, if what is added to it is a number for a head times
    a distance.
    """
    result = quick(result)
    factor, rest = _factor(result)
    if factor is not None and 2.0**-100 < factor < 2.0**100:  # so that a float holds it, and what is made of it
        return factor, rest
    if result.op in ("add", "subtract"):
        a, b = result.args
        if b.op == "score" and result.op == "add":
            a, b = b, a
        if a.op == "score" and b.op == "multiply":
            for x, y in (b.args, b.args[::-1]):
                if not varies(x) and _is_distance(y):
                    each = Node("multiply", (Node("multiply", (x, Node("inverse_unit"))), y))
                    return None, Node(result.op, (Node("raw_score"), each))
    return 1.0, result


def _is_distance(node: Node) -> bool:
    return node.op == "small_real" or (node.op == "abs" and _is_distance(node.args[0]))


def is_bounded(result: Node, beyond: bool = False) -> bool:
    """Whether a number is finite, and no larger than a million, whatever the score is.

    With `beyond` it is asked of a score of 0, of queries past the last one, and whether it is finite as far as numbers
    are that are read whatever the query: those beside it are wrong, too, if these are not.
    """
    bounds: dict[Node, float] = {}
    for node in in_order(result):
        bounds[node] = _size(node, [bounds[x] for x in node.args], beyond)
    return bounds[result] <= (_LARGEST if beyond else 2.0**20)


def _size(node: Node, of_args: Sequence[float], beyond: bool) -> float:
    """What the size of a number is at most; infinity where it may be anything."""
    if node.kind == "bool":
        return 1.0
    if node.op == "constant":
        return abs(float(node.value))
    if node.op == "score":
        return 0.0 if beyond else math.inf
    if node.op == "position":
        return 2.0**20
    if node.op == "load":
        return 2.0**63 if node.kind == "int" else 2.0**20 if beyond and not any(map(varies, node.args)) else math.inf
    if node.op == "tanh":
        return 1.0 if of_args[0] < math.inf or _is_finite(node.args[0]) else math.inf
    if node.op in ("sin", "cos"):
        return 1.0 if of_args[0] < math.inf else math.inf
    if node.op == "multiply":
        return 0.0 if 0.0 in of_args and math.inf not in of_args else of_args[0] * of_args[1]
    if node.op in ("add", "subtract"):
        return sum(of_args)
    if node.op in ("negative", "abs", "real", "minimum", "maximum"):
        return max(of_args)
    if node.op == "where":
        return max(of_args[1:])
    return math.inf


def _is_finite(node: Node) -> bool:
    """Whether a number is the score times constants."""
    factor, rest = _factor(node)
    return node.op == "score" or (factor is not None and _is_finite(rest))


_LARGEST = 2.0**100


def _known(node: Node) -> str:
    """What the compiler knows of a whole number that is a sum of multiples of the query and the key."""
    of_both = steps(node)
    return " + ".join(f"{step} * {name}.known" for step, name in zip(of_both or (), "qk", strict=False) if step)


def _real(node: Node, small: bool) -> Node:
    """A whole number as a real one; small ones by additions, of which there are more in a cycle than conversions."""
    if node.op == "abs":
        return Node("abs", (_real(node.args[0], small),))
    return Node("small_real" if small else "real", (node,))


def _bound(node: Node, of_args: Sequence[float]) -> float:
    """What the size of a whole number is at most, of at most a million queries and keys."""
    if node.kind == "int" and node.op == "constant":
        return abs(node.value)
    if node.op == "position":
        return 2**20
    return sum(of_args) if node.op in ("add", "subtract", "negative", "abs", "minimum", "maximum") else math.inf


def _product(node: Node, factor: float) -> Node:
    """A number times a constant."""
    inner, rest = _factor(node)
    if inner is not None and _SMALLEST < abs(factor * inner) < 1 / _SMALLEST:
        node, factor = rest, factor * inner
    return node if factor == 1 else Node("multiply", (node, constant(factor)))


def _factor(node: Node) -> tuple[float | None, Node]:
    """A constant, and what it is multiplied by; None where a node is no such product."""
    if node.kind == "real" and node.op in ("multiply", "divide"):
        a, b = node.args
        if node.op == "multiply" and a.op == "constant":
            a, b = b, a
        if b.op == "constant" and _SMALLEST < abs(b.value) < 1 / _SMALLEST:
            return (b.value if node.op == "multiply" else 1 / b.value), a
    return None, node


_SMALLEST = 2.0**-100


def _number(node: Node, kind: str) -> str:
    """A constant, to the last bit."""
    if node.kind == "bool":
        return str(node.value).lower()
    if node.kind == "int":
        value = (node.value + 2**63) % 2**64 - 2**63  # as 64 bits have it
        text = f"({value + 1} - 1)" if value in (-(2**31), -(2**63)) else f"{value}" if value >= 0 else f"({value})"
        return f"static_cast<int64>({text})" if kind == "int64" else text
    if math.isinf(node.value):
        return f"({'-' if node.value < 0 else ''}infinity<Real>())"
    return f"static_cast<Real>({node.value.hex()})"


def cap_of(expression: Node) -> float | None:
    """The cap of an expression that is ``cap * tanh(score / cap)`` and no more; None of others."""
    if expression.op != "multiply":
        return None
    factor, bent = sorted(expression.args, key=lambda node: node.op != "constant")
    if factor.op != "constant" or bent.op != "tanh" or bent.args[0].op != "divide":
        return None
    score, cap = bent.args[0].args
    plain = score.op == "score" and cap.op == "constant" and factor.value == cap.value
    return float(cap.value) if plain and _LEAST_CAP <= cap.value <= 1 / _LEAST_CAP else None


_LEAST_CAP = 2.0**-20
"""Where the kernels' soft cap and the function are surely the same."""
