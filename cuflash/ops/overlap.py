"""Whether arrays that are written have bytes in common with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuflash.arrays import View
from cuflash.errors import InvalidArgument

_MAX_POINTERS = 256
"""Calls of a kind whose arrays are remembered to lie apart."""


class Extent(NamedTuple):
    """Where the elements of an array lie, relative to its first one."""

    name: str
    first: int
    """First byte of all, and their end."""
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def extent(view: View) -> Extent:
    """Where the elements of an array lie."""
    return Extent(view.name, *view.extent(), view.shape, view.strides, view.itemsize)


def checker(views: Mapping[str, View], written: Sequence[str]) -> Callable[[tuple[int, ...]], None]:
    """What refuses pointers, in the order of the views, with which an array that is written meets another.

    It looks once at pointers that come again.
    """
    names = list(views)
    order = [names.index(name) for name in (*(name for name in names if name not in written), *written)]
    extents = [extent(views[names[i]]) for i in order]

    @lru_cache(_MAX_POINTERS)
    def check(pointers: tuple[int, ...]) -> None:
        check_separate(extents, [pointers[i] for i in order], len(written))

    return check


def check_separate(extents: Sequence[Extent], pointers: Sequence[int], num_outputs: int) -> None:
    """Refuse outputs that have bytes in common with an input or with each other; outputs are the last arrays.

    Slices of one array that lie between each other have none in common.
    """
    spans = [(p + extent.first, p + extent.end) for p, extent in zip(pointers, extents, strict=True)]
    num_inputs = len(spans) - num_outputs
    for i in range(num_inputs, len(spans)):
        first, end = spans[i]
        for j in range(i):
            if first < spans[j][1] and spans[j][0] < end and _meet(extents[i], extents[j], pointers[j] - pointers[i]):
                output, other = extents[i].name, extents[j].name
                why = f"which is still read while {output} is written" if j < num_inputs else "which is written too"
                raise InvalidArgument(f"{output} shares memory with {other}, {why}. Give {output} memory of its own.")


@lru_cache(maxsize=1024)
def _meet(a: Extent, b: Extent, distance: int) -> bool:
    """Whether any byte belongs to both arrays, of which the second begins this far behind the first."""
    middle = 2**62  # any address does: nothing is read
    first, second = (np.asarray(_Memory(middle + start, x)) for start, x in ((0, a), (distance, b)))
    try:
        return np.shares_memory(first, second, max_work=10**6)  # type: ignore[arg-type]  # any integer is taken
    except np.exceptions.TooHardError:  # no lattice of slices is
        return True


class _Memory:
    """An extent at an address in words that NumPy understands."""

    def __init__(self, pointer: int, extent: Extent) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (pointer, False), "shape": extent.shape, "strides": extent.strides,
            "typestr": f"|V{extent.itemsize}",
        }  # fmt: skip
