"""A cache of keys and values: what says how much of it is in use, and what is appended to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.numbers import integer, shown
from cuflash.ops.call import Options
from cuflash.ops.check.array import check_contiguous, check_int32
from cuflash.ops.check.packed import check_table
from cuflash.ops.check.sizes import check_ranks

NEW = "k_new", "v_new"
"""Keys and values that are appended to a cache."""
_PER_SEQUENCE = "seqused_kv", "leftpad", "cache_batch"
"""Numbers of each sequence of a cache."""


def check_cache(options: Options, views: Mapping[str, View]) -> None:
    """What says which part of a cache is in use and what is appended to it must be complete and fit q and the cache."""
    check_ranks(options, views)
    q, k = views["q"], views["k"]
    batch = q.shape[0]
    for view in (views[name] for name in _PER_SEQUENCE if name in views):
        check_int32(view)
        if view.shape != (batch,):
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected ({batch},), one for each sequence.")
        check_contiguous(view)
    if "table" in views:
        check_table(views["table"], batch)
        if "cache_batch" in views:
            indices, table = views["cache_batch"].name, views["table"].name
            raise InvalidArgument(
                f"{indices} and {table} are both given; a cache in pages has no batch. Pass {table}[{indices}] alone."
            )
    elif "cache_batch" not in views and k.shape[0] < batch:
        raise InvalidArgument(
            f"{k.name} has batch size {k.shape[0]} but {q.name} has {batch}; "
            f"pass {options.name('cache_batch')} to say which of them each sequence has."
        )
    _check_new(options, views)


def _check_new(options: Options, views: Mapping[str, View]) -> None:
    """What is appended must be keys and values, of every sequence and like those of the cache."""
    q, caches = views["q"], (views["k"], views["v"])
    new = [views[name] for name in NEW if name in views]
    if len(new) == 1:
        given, missing = sorted(NEW, key=views.__contains__, reverse=True)
        raise InvalidArgument(
            f"{options.name(given)} is given but {options.name(missing)} is not; both are appended, or none."
        )
    for view, cache in zip(new, caches, strict=False):
        rows = view.shape[1] if len(view.shape) == 4 else 0
        expected = q.shape[0], rows, *cache.shape[2:]
        if view.shape != expected:
            of_cache = f"({q.shape[0]}, new keys, {cache.shape[2]}, {cache.shape[3]})"
            raise InvalidArgument(
                f"{view.name} has shape {view.shape}; expected {of_cache}, with the batch of {q.name} and the heads of "
                f"{cache.name}."
            )
        if view.dtype != cache.dtype:
            raise InvalidArgument(
                f"{view.name} is {view.dtype} but {cache.name} is {cache.dtype}; convert one of them."
            )
    if len({view.shape[1] for view in new}) > 1:
        k, v = new
        raise InvalidArgument(f"{v.name} has length {v.shape[1]} but {k.name} has {k.shape[1]}; they must be equal.")


def cached_rows(name: str, cached: Any, room: int, appended: int) -> int:
    """How many rows of a cache every sequence uses before a call, where a number says so."""
    rows = integer(cached)
    if rows is None or not 0 <= rows <= room - appended:
        new = f", as there is room for {room} and the call appends {appended}" if appended else ""
        raise InvalidArgument(f"{name} is {shown(cached)}; expected an integer from 0 to {room - appended}{new}.")
    return rows
