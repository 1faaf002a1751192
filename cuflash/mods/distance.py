"""Which numbers of an expression the distance from a key to a query decides, and by what they grow along a sequence."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from cuflash.mods.derive import slopes
from cuflash.mods.expression import ONE, Node, constant, in_order
from cuflash.mods.tracing import Mod


def learned(mod: Mod, wanted: Container[int]) -> tuple[tuple[Node, tuple[Node, ...]], ...]:
    """The loads whose numbers have gradients, and their indices made of the distance alone, in a node of that name.

    Empty where something else decides one of these, or where the numbers are not added to the score as they are.
    """
    by_score, by_load = slopes(mod)
    loads = [(load, slope) for load, slope in by_load if load.value in wanted]
    added = by_score is ONE and all(slope is ONE for _, slope in loads)
    if not added or not all(_is_by_distance(index) for load, _ in loads for index in load.args):
        return ()
    return tuple((load, _by_distance(load.args)) for load, _ in loads)


def _by_distance(indices: tuple[Node, ...]) -> tuple[Node, ...]:
    """The same of a query as far as the distance, and key 0."""
    made: dict[Node, Node] = {}
    for node in in_order(*indices):
        if node.op == "position" and node.value in ("q", "k"):
            made[node] = Node("position", value="distance", kind="int") if node.value == "q" else constant(0)
        else:
            made[node] = Node(node.op, tuple(made[x] for x in node.args), node.value, node.kind)
    return tuple(made[x] for x in indices)


def _is_by_distance(node: Node) -> bool:
    """Whether a number stays as it is where the query and the key are as many further."""
    by_position = steps(node)
    if by_position is not None:
        return sum(by_position) == 0
    return node.op not in ("position", "score") and all(map(_is_by_distance, node.args))


def steps(node: Node) -> tuple[int, int] | None:
    """By what a whole number grows from query to query and from key to key; None where by no constant."""
    if not varies(node):
        return 0, 0
    if node.op == "position":
        return int(node.value == "q"), int(node.value == "k")
    signs = {"negative": (-1,), "add": (1, 1), "subtract": (1, -1)}.get(node.op)
    if signs is None:
        return None
    total = np.zeros(2, int)
    for sign, x in zip(signs, node.args, strict=True):
        of_one = steps(x)
        if of_one is None:
            return None
        total += sign * np.array(of_one)
    return int(total[0]), int(total[1])


def varies(result: Node) -> bool:
    """Whether a number is another for another query, key or score."""
    return any(node.op == "score" or node.value in ("q", "k") for node in in_order(result))
