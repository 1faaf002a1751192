"""Checks of packed sequences and of pages: what says where they lie, first as arrays, then its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash.arrays import View
from cuflash.errors import InvalidArgument
from cuflash.numbers import integer, shown
from cuflash.ops.call import Options

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
"""The arguments that say where sequences lie."""


def is_packed(options: Options, views: Mapping[str, View]) -> bool:
    """Whether the call is on packed sequences; checks that what says so is complete and can be read."""
    starts = [views[name] for name in LENGTHS[:2] if name in views]
    if not starts:
        for name in (*LENGTHS[2:], "block_table", "max_seqlen_q", "max_seqlen_k"):
            if name in views or getattr(options, name, None) is not None:
                raise InvalidArgument(
                    f"{options.name(name)} is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too."
                )
        return False
    if len(starts) == 1:
        missing = next(name for name in LENGTHS if name != starts[0].name)
        raise InvalidArgument(f"{starts[0].name} is given but {missing} is not; packed sequences need both.")
    for view in (views[name] for name in LENGTHS if name in views):
        if view.dtype != "int32":
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected int32. Convert it.")
        if len(view.shape) != 1:
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected one dimension.")
        if (view.shape[0] > 1 and view.strides[0] != view.itemsize) or view.pointer % view.itemsize:
            raise InvalidArgument(f"{view.name} is not contiguous; pass a contiguous copy of it.")
    counts = [view.shape[0] for view in starts]
    if counts[0] == 0:
        raise InvalidArgument("cu_seqlens_q is empty; expected batch + 1 numbers, the first of them 0.")
    if counts[0] != counts[1]:
        raise InvalidArgument(
            f"cu_seqlens_k has {counts[1]} numbers but cu_seqlens_q has {counts[0]}; "
            "both need batch + 1, with a sequence of keys for each sequence of queries."
        )
    for view in (views[name] for name in LENGTHS[2:] if name in views):
        if view.shape[0] != counts[0] - 1:
            raise InvalidArgument(
                f"{view.name} has {view.shape[0]} numbers; expected one for each of the {counts[0] - 1} sequences."
            )
    if "block_table" in views:
        _check_table(views["block_table"], counts[0] - 1)
    return True


def _check_table(table: View, batch: int) -> None:
    """The numbers of every sequence's pages, by any strides."""
    if table.dtype != "int32":
        raise InvalidArgument(f"{table.name} is {table.dtype}; expected int32. Convert it.")
    if len(table.shape) != 2:
        raise InvalidArgument(f"{table.name} has shape {table.shape}; expected (b, max_pages).")
    if table.shape[0] != batch:
        raise InvalidArgument(
            f"{table.name} has {table.shape[0]} rows; expected one for each of the {batch} sequences."
        )
    steps = [stride for n, stride in zip(table.shape, table.strides, strict=True) if n > 1]
    if not table.empty and any(n % table.itemsize for n in (table.pointer, *steps)):
        raise InvalidArgument(f"{table.name} is misaligned; pass a contiguous copy of it.")


def length(options: Options, name: str) -> int:
    """The value of max_seqlen_q or max_seqlen_k."""
    given = getattr(options, name)
    value = integer(given)
    if value is None or value < 0:
        raise InvalidArgument(
            f"{name} is {shown(given)}; expected an integer from 0, or None to read it from cu_seqlens."
        )
    if value >= 2**31:
        raise InvalidArgument(f"{name} is {shown(given)}; expected fewer than 2**31. Pass the longest length, or None.")
    return value


def with_lengths(options: Options, views: Mapping[str, View], arrays: Mapping[str, Any]) -> Options:
    """Read what says where sequences lie, check its values and fill in the longest lengths."""
    values = {name: np.asarray(arrays[name].tolist(), np.int64) for name in LENGTHS if name in arrays}
    paged = "block_table" in views
    lengths_q = _lengths("cu_seqlens_q", values["cu_seqlens_q"], views["q"])
    lengths_k = _lengths("cu_seqlens_k", values["cu_seqlens_k"], None if paged else views["k"])
    for name, lengths, rows in (("seqused_q", lengths_q, "queries"), ("seqused_k", lengths_k, "keys")):
        used = values.setdefault(name, lengths)
        wrong = np.flatnonzero((used < 0) | (used > lengths))
        if wrong.size:
            at = wrong[0]
            raise InvalidArgument(
                f"{options.name(name)}[{at}] is {used[at]}, but sequence {at} has {lengths[at]} {rows}; "
                "expected a number from 0 to those."
            )
    if paged:
        _check_room(views, values["seqused_k"])
        if options.validate or views["block_table"].device == "cpu":
            _check_pages(views, arrays["block_table"], values["seqused_k"])
    return options._replace(
        max_seqlen_q=_longest(options, "max_seqlen_q", lengths_q, values["seqused_q"]),
        max_seqlen_k=_longest(options, "max_seqlen_k", lengths_k, values["seqused_k"]),
        validate=False,
    )


def _lengths(name: str, starts: np.ndarray, packed: View | None) -> np.ndarray:
    """Rows of each sequence of a packed tensor; without one, the numbers say nothing but lengths."""
    lengths = np.diff(starts)
    if starts[0] != 0:
        raise InvalidArgument(f"{name}[0] is {starts[0]}; expected 0, the first row of the first sequence.")
    falls = np.flatnonzero(lengths < 0)
    if falls.size:
        at = falls[0] + 1
        raise InvalidArgument(
            f"{name}[{at}] is {starts[at]} after {starts[at - 1]}; "
            "expected the first row of each sequence in rising order, and the end of the last."
        )
    if packed is not None and starts[-1] > packed.shape[0]:
        at = np.flatnonzero(starts > packed.shape[0])[0]
        raise InvalidArgument(
            f"{name}[{at}] is {starts[at]}, but {packed.name} has {packed.shape[0]} rows; expected at most that many."
        )
    return lengths


def _check_room(views: Mapping[str, View], lengths: np.ndarray) -> None:
    """Every sequence must fit into the pages that its row of the table can name."""
    table, (_, page_size, *_) = views["block_table"], views["k"].shape
    over = np.flatnonzero(lengths > table.shape[1] * page_size)
    if over.size:
        raise InvalidArgument(
            f"{table.name} has {table.shape[1]} pages of {page_size} rows a sequence, but sequence {over[0]} has "
            f"{lengths[over[0]]} keys; pass more pages for each."
        )


def _check_pages(views: Mapping[str, View], block_table: Any, lengths: np.ndarray) -> None:
    """Every key must be in a page that is there; numbers behind a sequence's last page may be anything."""
    table, (num_pages, page_size, *_) = views["block_table"], views["k"].shape
    if not isinstance(block_table, np.ndarray):
        block_table = np.array(block_table.tolist(), np.int64).reshape(table.shape)
    for b, length in enumerate(lengths.tolist()):
        used = block_table[b, : -(-length // page_size)]
        wrong = np.flatnonzero((used < 0) | (used >= num_pages))
        if wrong.size:
            at = wrong[0]
            raise InvalidArgument(
                f"{table.name}[{b}, {at}] is {used[at]}, but there are {num_pages} pages; "
                "expected the number of one, from 0."
            )


def _longest(options: Options, name: str, lengths: np.ndarray, used: np.ndarray) -> int:
    """The longest length as given, no shorter than what is in use of any sequence; all rows of the longest if None."""
    if getattr(options, name) is None:
        return int(lengths.max(initial=0))
    allowed, longest = length(options, name), int(used.max(initial=0))
    if allowed < longest:
        at = used.argmax()
        rows = f"has {longest} rows" if longest == lengths[at] else f"uses {longest} of its rows"
        raise InvalidArgument(f"{name} is {allowed}, but sequence {at} {rows}; pass at least that many, or None.")
    return allowed
