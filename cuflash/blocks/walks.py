"""The lists of a block mask in the tiles of a kernel, which walks them as they are.

Kernels cut queries and keys into tiles of their own. A tile within a block is of the block's kind. One that reaches
over several is full where all of them are, and else partial if one is visible: its pairs are then tested by the rule.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuflash.blocks.mask import BlockMask
from cuflash.errors import InvalidArgument


class Walk(NamedTuple):
    """What ``attention/lists.cuh`` reads, int32."""

    lines: np.ndarray
    """(lines, 4): where the tiles of a line are in the list, ``begin``, ``full_end`` and ``end``, and ``ranked``.

    The last is of line `i` of a matrix the number of the one that `i` others are longer than, the later one of equals
    first."""
    entries: np.ndarray
    """Of each line the tiles that are full, ascending, and then the partial ones, ascending."""
    turns: np.ndarray
    """Of each entry how many key tiles behind its own its query tile sees; none for walks over keys."""


def over_keys(mask: BlockMask, tile_q: int, tile_kv: int) -> Walk:
    """The key tiles of each query tile: line ``(b * heads + h) * query tiles + i``."""
    matrix, row, column, full = _tiles(mask, tile_q, tile_kv)
    height, _ = _counts(mask, tile_q, tile_kv)
    return _walk(matrix * height + row, column, full, mask.batch * mask.heads * height, height)


def over_queries(mask: BlockMask, tile_q: int, tile_kv: int, group: int) -> Walk:
    """The query tiles of each key tile, of all heads of its group: line ``(b * key heads + h) * key tiles + j``.

    An entry is the number of a query tile and below it the head's among those of a group, in as few bits as these take.
    """
    matrix, row, column, full = _tiles(mask, tile_q, tile_kv)
    height, width = _counts(mask, tile_q, tile_kv)
    order = np.lexsort((column, row, matrix))
    matrix, row, column, full = (x[order] for x in (matrix, row, column, full))
    ends = np.cumsum(np.bincount(matrix * height + row, minlength=mask.batch * mask.heads * height))
    turns = ends[matrix * height + row] - 1 - np.arange(len(row))
    if mask.heads == 1:  # one list for all heads is one for each member of a group
        member = np.repeat(np.arange(group), len(row))
        matrix, row, column, full, turns = (np.tile(x, group) for x in (matrix, row, column, full, turns))
    else:
        matrix, member = np.divmod(matrix, group)
    matrices = mask.batch * (1 if mask.heads == 1 else mask.heads // group)
    bits = (group - 1).bit_length()
    return _walk(matrix * width + column, (row << bits) + member, full, matrices * width, width, turns)


def _counts(mask: BlockMask, tile_q: int, tile_kv: int) -> tuple[int, int]:
    """Query and key tiles."""
    return -(-mask.len_q // tile_q), -(-mask.len_kv // tile_kv)


def _walk(
    line: np.ndarray, entry: np.ndarray, full: np.ndarray, lines: int, per_matrix: int, turns: np.ndarray | None = None
) -> Walk:
    """Entries in any order as a list."""
    if len(entry) >= 2**31 or (len(entry) and entry.max() >= 2**31):
        raise InvalidArgument(
            f"the mask has {len(entry):,} visible tiles of a kernel; expected fewer than 2**31. Hide more, or split "
            "the call along the heads."
        )
    order = np.lexsort((entry, ~full, line))
    ends = np.cumsum(np.bincount(line, minlength=lines))
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)[:lines]
    full_ends = begins + np.bincount(line[full], minlength=lines)
    spans = np.stack([begins, full_ends, ends, _ranked(ends - begins, per_matrix)], axis=-1).astype(np.int32)
    taken = np.zeros(0, np.int32) if turns is None else turns[order].astype(np.int32)
    return Walk(spans, entry[order].astype(np.int32), taken)


def _ranked(lengths: np.ndarray, per_matrix: int) -> np.ndarray:
    """Of each matrix the numbers of its lines, the longest first, the later one of equals first."""
    by_matrix = lengths.reshape(-1, max(per_matrix, 1))[:, ::-1]
    return (per_matrix - 1 - np.argsort(-by_matrix, axis=1, kind="stable")).ravel()


def _tiles(mask: BlockMask, tile_q: int, tile_kv: int) -> tuple[np.ndarray, ...]:
    """Matrix, query tile, key tile and fullness of every visible tile, in some order."""
    rows, _ = mask.grid.shape
    line, column, full = mask.kv.entries(0, mask.batch * mask.heads * rows)
    matrix, row = np.divmod(line, max(rows, 1))
    entry, row, high = _overlaps(row, mask.block_size[0], tile_q, mask.len_q)
    matrix, column, full = matrix[entry], column[entry], full[entry]
    entry, column, wide = _overlaps(column, mask.block_size[1], tile_kv, mask.len_kv)
    matrix, row, high, full = matrix[entry], row[entry], high[entry], full[entry]
    if mask.block_size[0] % tile_q == 0 and mask.block_size[1] % tile_kv == 0:
        return matrix, row, column, full
    height, width = _counts(mask, tile_q, tile_kv)
    places, where = np.unique((matrix * height + row) * width + column, return_inverse=True)
    seen = np.bincount(where, weights=np.where(full, high * wide, 0), minlength=len(places))
    matrix, rest = np.divmod(places, max(height * width, 1))
    row, column = np.divmod(rest, max(width, 1))
    area = np.minimum(tile_q, mask.len_q - row * tile_q) * np.minimum(tile_kv, mask.len_kv - column * tile_kv)
    return matrix, row, column, seen == area


def _overlaps(block: np.ndarray, size: int, tile: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every overlap of blocks with tiles: which block by its place, the tile's number, and how many rows they share."""
    start, stop = block * size, np.minimum((block + 1) * size, length)
    first = start // tile
    counts = -(-stop // tile) - first
    entry = np.repeat(np.arange(len(block)), counts)
    number = np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts) + first[entry]
    shared = np.minimum((number + 1) * tile, stop[entry]) - np.maximum(number * tile, start[entry])
    return entry, number, shared
