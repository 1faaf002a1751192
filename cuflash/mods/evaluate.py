"""Expressions as NumPy computes them, for many positions at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cuflash.mods.expression import OPERATIONS, Node, in_order


def evaluate(
    *results: Node, score: np.ndarray | None, positions: Mapping[str, Any], captured: Sequence[np.ndarray], real: Any
) -> list[np.ndarray]:
    """The values of expressions.

    Parameters
    ----------
    *results : Node
        What to compute; what they share is computed once.
    score : ndarray, optional
        In the dtype `real`; None where no result reads it.
    positions : mapping of str to ndarray of int
        ``b``, ``h``, ``q`` and ``k``, of shapes that broadcast with one another and the scores.
    captured : sequence of ndarray
        By number. An index outside one reads its nearest element.
    real : dtype
        What real numbers are computed in.

    Returns
    -------
    list of ndarray
        One for each result, of a shape that broadcasts to that of the scores; bool, int64 or `real`.
    """
    values: dict[Node, Any] = {}
    with np.errstate(all="ignore"):
        for node in in_order(*results):
            args = [values[x] for x in node.args]
            if node.op == "constant":
                values[node] = np.asarray(node.value, real) if node.kind == "real" else node.value
            elif node.op == "position":
                values[node] = positions[node.value]
            elif node.op == "score":
                values[node] = score
            elif node.op == "load":
                values[node] = _loaded(captured[node.value], args, node, real)
            elif node.op == "real":
                values[node] = np.asarray(args[0]).astype(real)
            else:
                values[node] = OPERATIONS[node.op].numpy(*args)
    return [np.asarray(values[x]) for x in results]


def _loaded(array: np.ndarray, index: Sequence[Any], node: Node, real: Any) -> np.ndarray:
    """Elements of a captured array, the nearest ones where there are none."""
    within = tuple(np.clip(i, 0, size - 1) for i, size in zip(index, array.shape, strict=True))
    return array[within].astype({"bool": np.bool_, "int": np.int64, "real": real}[node.kind])
