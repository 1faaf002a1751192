"""Which blocks are visible, as lists: for each row of blocks the columns, those without a hidden pair first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cuflash.errors import InvalidArgument

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Kinds of blocks: no pair of it is visible, some are, all are."""


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The visible blocks of each of some rows.

    Row ``r`` has the columns ``indices[offsets[r]:offsets[r + 1]]``, of which the first ``full[r]`` are full and the
    others partial; either part ascends.
    """

    offsets: np.ndarray
    """(rows + 1,) int32."""
    indices: np.ndarray
    """(offsets[-1],) int32."""
    full: np.ndarray
    """(rows,) int32."""

    def __post_init__(self) -> None:
        for array in (self.offsets, self.indices, self.full):
            array.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lists):
            return NotImplemented
        mine, others = ((x.offsets, x.indices, x.full) for x in (self, other))
        return all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def counts(self) -> np.ndarray:
        """(rows,) visible blocks of each row."""
        return np.diff(self.offsets)

    def kinds(self, start: int, stop: int, columns: int) -> np.ndarray:
        """The kinds of all blocks of rows from `start` to before `stop`, (rows, columns) int8."""
        kinds = np.zeros((stop - start, columns), np.int8)
        rows, indices, whole = self.entries(start, stop)
        kinds[rows, indices] = np.where(whole, FULL, PARTIAL)
        return kinds

    def seen(self, spans: Iterable[tuple[int, int]], columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each column, whether some row of some spans lists it, and whether it is full in all of them."""
        visible, whole, rows = np.zeros(columns, np.int64), np.zeros(columns, np.int64), 0
        for start, stop in spans:
            _, indices, full = self.entries(start, stop)
            visible += np.bincount(indices, minlength=columns)
            whole += np.bincount(indices[full], minlength=columns)
            rows += stop - start
        return visible > 0, whole == rows

    def transposed(self, matrices: int, rows: int, columns: int) -> Lists:
        """The lists of each column, of matrices of `rows` by `columns` blocks that lie one behind the other."""
        row, column, whole = self.entries(0, matrices * rows)
        line = row // max(rows, 1) * columns + column
        order = np.argsort(2 * line + ~whole, kind="stable")  # which leaves rows ascending
        return _listed(line[order], (row % max(rows, 1))[order], whole[order], matrices * columns)

    def entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row after `start`, column and fullness of every visible block of these rows, as they lie."""
        offsets = self.offsets[start : stop + 1].astype(np.int64)
        rows = np.repeat(np.arange(stop - start), np.diff(offsets))
        place = np.arange(offsets[0], offsets[-1]) - offsets[rows]
        return rows, self.indices[offsets[0] : offsets[-1]], place < self.full[start:stop][rows]


def listed(chunks: Iterable[np.ndarray]) -> Lists:
    """The lists of rows that come some at a time, as the kinds of all their blocks."""
    start, parts = 0, [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))]
    for kinds in chunks:
        rows, columns = np.nonzero(kinds)
        whole = kinds[rows, columns] == FULL
        order = np.argsort(2 * rows + ~whole, kind="stable")
        parts.append((start + rows[order], columns[order], whole[order]))
        start += len(kinds)
    rows, columns, whole = (np.concatenate(x) for x in zip(*parts, strict=True))
    return _listed(rows, columns, whole, start)


def _listed(rows: np.ndarray, columns: np.ndarray, whole: np.ndarray, number: int) -> Lists:
    """Blocks in order as lists of so many rows."""
    if len(rows) >= 2**31:
        raise InvalidArgument(
            f"the mask has {len(rows):,} visible blocks; expected fewer than 2**31. Make it of larger blocks."
        )
    offsets = np.zeros(number + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=number), out=offsets[1:])
    return Lists(offsets, columns.astype(np.int32), np.bincount(rows[whole], minlength=number).astype(np.int32))
