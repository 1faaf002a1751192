"""Where packed sequences and pages lie: the values of the arrays that say so, and the longest lengths by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash.arrays import Framework, Guest, Library, View, framework_of, numpy_arrays
from cuflash.errors import InvalidArgument
from cuflash.ops import check
from cuflash.ops.call import Arrays, Options
from cuflash.ops.check import LENGTHS, length
from cuflash.problem import Direction, Problem


def with_lengths(direction: Direction, options: Options, arrays: Arrays) -> Options:
    """The options with the longest lengths in them and nothing left to validate.

    Where that needs the values of cu_seqlens and seqused, reading them waits for a GPU, and checks them all. Page
    numbers are read only to be validated.
    """
    if arrays.cu_seqlens_q is None:
        return options
    derived = options.max_seqlen_q is None or options.max_seqlen_k is None
    if not (derived or options.manner.validate):
        return options
    if derived:
        what, remedy = "max_seqlen_q or max_seqlen_k is None and", "Pass both."
    else:
        what, remedy = "validate is True:", "Validate before capturing."
    names = options.names(arrays)
    framework = framework_of(names, arrays.each())
    if isinstance(framework, Guest):
        framework, borrowed = framework.borrow(names, arrays.each())
        arrays = arrays.like(borrowed)
    if not isinstance(framework, Library):
        return options
    check_readable(framework, f"{what} cu_seqlens", remedy)
    views = options.views(framework, arrays)
    check.layout_of(direction, options, views)
    return read(options, views, arrays)


def check_readable(framework: Framework, what: str, remedy: str) -> None:
    """Refuse to read from a GPU while a graph is captured, which waiting for the GPU would break."""
    if isinstance(framework, Library) and framework.is_capturing():
        raise InvalidArgument(
            f"{what} would be read from the GPU, which is not possible while a CUDA graph is captured. {remedy}"
        )


def read(options: Options, views: Mapping[str, View], arrays: Arrays) -> Options:
    """Read what says where sequences lie, check its values and fill in the longest lengths."""
    values = {name: np.asarray(getattr(arrays, name).tolist(), np.int64) for name in LENGTHS if name in views}
    paged = "table" in views
    lengths_q = _lengths(views["cu_seqlens_q"].name, values["cu_seqlens_q"], views["q"])
    lengths_kv = _lengths(views["cu_seqlens_kv"].name, values["cu_seqlens_kv"], None if paged else views["k"])
    for name, lengths, rows in (("seqused_q", lengths_q, "queries"), ("seqused_kv", lengths_kv, "keys")):
        used = values.setdefault(name, lengths)
        wrong = np.flatnonzero((used < 0) | (used > lengths))
        if wrong.size:
            at = wrong[0]
            raise InvalidArgument(
                f"{options.name(name)}[{at}] is {used[at]}, but sequence {at} has {lengths[at]} {rows}; "
                "expected a number from 0 to those."
            )
    if paged:
        _check_room(views, values["seqused_kv"])
        if options.manner.validate or views["table"].device == "cpu":
            _check_pages(views, arrays.table, values["seqused_kv"])
    return options.replace(
        max_seqlen_q=_longest(options, "max_seqlen_q", lengths_q, values["seqused_q"]),
        max_seqlen_k=_longest(options, "max_seqlen_k", lengths_kv, values["seqused_kv"]),
        validate=False,
    )


def read_cache(options: Options, problem: Problem, arrays: Arrays, cached: int | None) -> Arrays:
    """The arrays of a call on a NumPy cache with the rows in use of every sequence, all values of lengths checked."""
    room, new = problem.len_kv, problem.appended
    if arrays.seqused_kv is None:
        rows = room if cached is None else check.cached_rows(options.name("seqused_kv"), cached, room, new)
        arrays = arrays._replace(seqused_kv=np.full(problem.batch, rows, np.int32))
    used = arrays.seqused_kv.astype(np.int64)
    added = f" and {new} are appended" if new else ""
    _check_values(
        options.name("seqused_kv"), used, room - new, f"as there is room for {room} rows of a sequence{added}"
    )
    if arrays.leftpad is not None:
        _check_values(options.name("leftpad"), arrays.leftpad, used, "as that many rows are in use")
    if arrays.cache_batch is not None:
        last = arrays.k.shape[0] - 1
        _check_values(options.name("cache_batch"), arrays.cache_batch, last, f"the numbers of {options.name('k')}")
    if arrays.table is not None:
        views = {name: numpy_arrays.view(options.name(name), getattr(arrays, name)) for name in ("k", "table")}
        _check_pages(views, arrays.table, used + new)
    if problem.rotary is not None:
        positions = 1 if problem.rotary.together else problem.len_q
        rows = arrays.rotary_cos.shape[0]
        if problem.len_q and used.max(initial=0) + positions > rows:
            raise InvalidArgument(
                f"rotary_cos has {rows} rows, but queries are at positions up to {used.max() + positions - 1}; "
                "expected a row for each."
            )
    return arrays


def _check_values(name: str, values: np.ndarray, most: int | np.ndarray, why: str) -> None:
    """Numbers of each sequence must lie from 0 to another number."""
    wrong = np.flatnonzero((values < 0) | (values > most))
    if wrong.size:
        at = wrong[0]
        limit = np.broadcast_to(most, values.shape)[at]
        raise InvalidArgument(f"{name}[{at}] is {values[at]}; expected a number from 0 to {limit}, {why}.")


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
    table, (_, page_size, *_) = views["table"], views["k"].shape
    over = np.flatnonzero(lengths > table.shape[1] * page_size)
    if over.size:
        raise InvalidArgument(
            f"{table.name} has {table.shape[1]} pages of {page_size} rows a sequence, but sequence {over[0]} has "
            f"{lengths[over[0]]} keys; pass more pages for each."
        )


def _check_pages(views: Mapping[str, View], pages: Any, lengths: np.ndarray) -> None:
    """Every key must be in a page that is there; numbers behind a sequence's last page may be anything."""
    table, (num_pages, page_size, *_) = views["table"], views["k"].shape
    if not isinstance(pages, np.ndarray):
        pages = np.array(pages.tolist(), np.int64).reshape(table.shape)
    for b, rows in enumerate(lengths.tolist()):
        used = pages[b, : -(-rows // page_size)]
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
