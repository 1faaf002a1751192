"""The derivative of an expression by one of its leaves, as an expression."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from cuflash.mods.expression import ONE, SCORE, ZERO, Node, apply, constant, converted, in_order
from cuflash.mods.tracing import Mod

_Rule = Callable[..., Node]


class Slopes(NamedTuple):
    """How a written score moves."""

    by_score: Node
    by_load: tuple[tuple[Node, Node], ...]
    """A load of a real number each, and how the score moves with it; not those that it does not move with."""


@lru_cache(maxsize=1024)
def slopes(mod: Mod) -> Slopes:
    """The derivatives of a written score by the score and by everything that it reads."""
    loads = [node for node in in_order(mod.expression) if node.op == "load" and node.kind == "real"]
    by_load = ((load, derivative(mod.expression, load)) for load in loads)
    return Slopes(derivative(mod.expression, SCORE), tuple(pair for pair in by_load if pair[1] is not ZERO))


@lru_cache(maxsize=1024)
def curvature(mod: Mod) -> Node:
    """The second derivative of a written score by the score."""
    return derivative(slopes(mod).by_score, SCORE)


def derivative(result: Node, leaf: Node) -> Node:
    """How the result moves with a leaf: the score, or a number that is read from a captured array.

    Carried forwards from the leaf, so that a branch that `where` does not take cannot reach the derivative of the one
    that it takes. At a kink it is one of the one-sided derivatives: the second operand's where `minimum` or `maximum`
    has equal ones, and 1 for `abs` at 0.
    """
    slopes: dict[Node, Node] = {}
    for node in in_order(result):
        if node is leaf:
            slopes[node] = ONE
        elif node.kind != "real" or node.op not in _RULES:
            slopes[node] = ZERO
        else:
            slopes[node] = _RULES[node.op](node, *node.args, *(slopes[x] for x in node.args))
    return slopes[result]


def _plus(a: Node, b: Node) -> Node:
    return b if a is ZERO else a if b is ZERO else apply("add", a, b)


def _minus(a: Node, b: Node) -> Node:
    return a if b is ZERO else apply("negative", b) if a is ZERO else apply("subtract", a, b)


def _times(a: Node, b: Node) -> Node:
    """The product; of nothing, nothing, whatever the other is."""
    if a is ZERO or b is ZERO:
        return ZERO
    return b if a is ONE else a if b is ONE else apply("multiply", a, b)


def _chosen(condition: Node, a: Node, b: Node) -> Node:
    return a if a is b else apply("where", condition, a, b)


def _quotient(y: Node, a: Node, b: Node, da: Node, db: Node) -> Node:
    slope = _minus(da, _times(y, db))
    return ZERO if slope is ZERO else apply("divide", slope, b)


def _power(y: Node, a: Node, b: Node, da: Node, db: Node) -> Node:
    less_one = apply("power", a, apply("subtract", b, ONE))
    by_base = _times(_times(b, less_one), da)
    by_exponent = ZERO if db is ZERO else _times(_times(y, apply("log", a)), db)
    return _plus(by_base, by_exponent)


def _over(slope: Node, divisor: Node) -> Node:
    return ZERO if slope is ZERO else apply("divide", slope, divisor)


# (result, *operands, *their slopes)
_RULES: dict[str, _Rule] = {
    "add": lambda y, a, b, da, db: _plus(da, db),
    "subtract": lambda y, a, b, da, db: _minus(da, db),
    "multiply": lambda y, a, b, da, db: _plus(_times(da, b), _times(a, db)),
    "divide": _quotient,
    "negative": lambda y, a, da: _minus(ZERO, da),
    "abs": lambda y, a, da: _chosen(apply("less", a, ZERO), _minus(ZERO, da), da),
    "minimum": lambda y, a, b, da, db: _chosen(apply("less", a, b), da, db),
    "maximum": lambda y, a, b, da, db: _chosen(apply("less", b, a), da, db),
    "power": _power,
    "exp": lambda y, a, da: _times(y, da),
    "log": lambda y, a, da: _over(da, a),
    "sqrt": lambda y, a, da: _over(_times(constant(0.5), da), y),
    "tanh": lambda y, a, da: _times(apply("subtract", ONE, apply("multiply", y, y)), da),
    "sin": lambda y, a, da: _times(apply("cos", a), da),
    "cos": lambda y, a, da: _minus(ZERO, _times(apply("sin", a), da)),
    "where": lambda y, c, a, b, dc, da, db: _chosen(c, da, db),
    "real": lambda y, a, da: converted(da, "real"),
}
"""Of every operation whose result moves with its operands: `floor`, comparisons and integers do not."""
