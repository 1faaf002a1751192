"""Mods in the words of JSON: what a program that is stored says of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.dtypes import BF16
from cuflash.mods.expression import Node, in_order
from cuflash.mods.symbols import Operand
from cuflash.mods.tracing import Mod


def to_words(mod: Mod) -> dict[str, Any]:
    """Every operation with the numbers of those that it uses, and of every operand its element type and rank."""
    order = in_order(mod.expression)
    numbers = {node: i for i, node in enumerate(order)}
    return {
        "nodes": [[node.op, [numbers[x] for x in node.args], node.value, node.kind] for node in order],
        "operands": [[operand.dtype.name, operand.ndim] for operand in mod.operands],
    }


def from_words(words: dict[str, Any]) -> Mod:
    """The mod that these words are of."""
    nodes: list[Node] = []
    for op, args, value, kind in words["nodes"]:
        nodes.append(Node(op, tuple(nodes[i] for i in args), value, kind))
    operands = (Operand(BF16.numpy if name == "bfloat16" else np.dtype(name), ndim) for name, ndim in words["operands"])
    return Mod(nodes[-1], tuple(operands))
