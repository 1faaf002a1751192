"""What a block mask can be made of, as one kind of rule: an expression of the position and NumPy's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash.arrays import Guest, framework_in_memory, numpy_arrays
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.mods import Captured, Traced, trace
from cuflash.mods.expression import Node
from cuflash.mods.library import document


def in_host_memory(name: str, array: Any) -> np.ndarray:
    """An array of any library as NumPy's view, or of one on a GPU a copy, for which the GPU is waited for.

    Raises
    ------
    InvalidArgument
        If it lies on a GPU while a CUDA graph is captured.
    """
    framework = framework_in_memory([name], [array])
    if isinstance(framework, Guest):
        framework, [array] = framework.borrow([name], [array])
    if framework is not numpy_arrays:
        held = framework.on_host([name], [array])
        if held is None and framework.is_capturing():
            raise InvalidArgument(
                f"{name} would be read from the GPU, which is not possible while a CUDA graph is captured. "
                "Make block masks before."
            )
        array = framework.copied(array) if held is None else held[0]
    return np.asarray(array)


def traced_rule(function: Callable[..., Any] | Traced) -> Traced:
    """A mask that is written as a function, or traced already, and the arrays that it reads as NumPy's."""
    mod, arrays = function if isinstance(function, Traced) else trace("mask_mod", function)
    if mod.expression.kind != "bool":
        raise InvalidArgument(f"mask is {mod}, traced as a score; expected what mods.trace makes of a mask_mod.")
    return Traced(mod, tuple(in_host_memory("an array that mask_mod reads", x) for x in arrays))


def of_array(seen: np.ndarray) -> Callable[..., Any]:
    """The rule of a boolean array (b|1, h|1, len_q|1, len_kv|1), which leaves out what it does not depend on."""
    varying = [axis for axis, n in enumerate(seen.shape) if n != 1]
    held = Captured(seen.reshape([seen.shape[axis] for axis in varying]))
    if not varying:
        shown = bool(seen.item())
        return lambda b, h, q, k: (k >= 0) if shown else (k < 0)
    return lambda *position: held[tuple(position[axis] for axis in varying)]


def of_band(mask: Mask, len_q: int, len_kv: int) -> Callable[..., Any]:
    """The rule of a band around the diagonal of these lengths; its numbers are no part of what is compiled."""
    off = mask.offset(len_q, len_kv)
    first, last = (
        None if side is None else Captured(np.array(off + sign * side, np.int32))
        for sign, side in ((-1, mask.left), (1, mask.right))
    )

    def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = k >= 0 if first is None else k - q >= first
        return seen if last is None else k - q <= last if first is None else seen & (k - q <= last)

    return rule


def of_blocks(blocks: np.ndarray, block_size: tuple[int, int]) -> Callable[..., Any]:
    """The rule of a boolean array of whole blocks, (b|1, h|1, rows|1, columns|1)."""
    rule = of_array(blocks)
    return lambda b, h, q, k: rule(b, h, q // block_size[0], k // block_size[1])


def of_documents(starts: np.ndarray, length: int) -> Callable[..., Any]:
    """The rule of rows packed one document behind the other: each sees its own; rows behind the last are one more."""
    return document(np.searchsorted(starts, np.arange(length), side="right").astype(np.int32))


def band_of(rule: Traced) -> Mask | None:
    """The band that a rule is: bounds of ``k - q`` alone that do not hide a query's own key; None where it is more."""
    left: int | None = None
    right: int | None = None
    conditions = [rule.mod.expression]
    while conditions:
        node = conditions.pop()
        if node.op == "bitwise_and":
            conditions += node.args
            continue
        if node.op not in ("less", "less_equal"):
            return None
        sides = [_linear(side, rule.arrays) for side in node.args]
        if None in sides:
            return None
        of_q, of_k, number = (a - b for a, b in zip(*sides, strict=True))
        number += node.op == "less"
        if (of_q, of_k, number <= 0) == (0, -1, True):  # keys are counted from 0
            continue
        if (of_q, of_k) == (1, -1):
            left = -number if left is None else min(left, -number)
        elif (of_q, of_k) == (-1, 1):
            right = -number if right is None else min(right, -number)
        else:
            return None
    return None if min(left or 0, right or 0) < 0 else Mask(left, right, "top-left")


def _linear(node: Node, arrays: tuple[Any, ...]) -> tuple[int, int, int] | None:
    """An expression as a sum: how many times q and k, and a number; None where it is something else."""
    if node.op == "position":
        return {"q": (1, 0, 0), "k": (0, 1, 0)}.get(node.value)
    if node.op == "constant" and node.kind == "int":
        return 0, 0, node.value
    if node.op == "load" and not node.args and arrays[node.value].dtype.kind in "iu":
        return 0, 0, int(arrays[node.value])
    if node.op not in ("add", "subtract", "negative"):
        return None
    sides = [_linear(side, arrays) for side in node.args]
    if None in sides:
        return None
    first, *others = sides
    sign = 1 if node.op == "add" else -1
    if not others:
        return tuple(-x for x in first)  # type: ignore[union-attr,return-value]
    return tuple(a + sign * b for a, b in zip(first, others[0], strict=True))  # type: ignore[arg-type,return-value]
