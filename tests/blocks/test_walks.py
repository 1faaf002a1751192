"""Lists of a block mask in the tiles of kernels, beside all pairs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cuflash import BlockMask, Mask, create_block_mask
from cuflash.blocks.mask import EVERY_PAIR
from cuflash.blocks.walks import Walk, over_keys, over_queries

TILES = [(16, 16), (8, 16), (16, 4), (32, 16), (24, 10), (64, 64)]


def made(name: str) -> BlockMask:
    """Masks of 6 query heads and blocks of 16 x 16, of which the last ones are cut short."""
    rng = np.random.default_rng(4)
    kept = rng.random((2, 6, 4, 5)) < 0.5
    kept[0, 1], kept[..., 2] = False, False  # an empty head, an empty column
    sizes = {"len_q": 61, "len_kv": 70, "block_size": 16}
    if name == "own":
        return create_block_mask(lambda b, h, q, k: (k < 20) | (q % 5 < 3), batch=2, heads=6, blocks=kept, **sizes)
    if name == "heads":
        return create_block_mask(heads=6, blocks=kept[:1], **sizes)
    if name == "shared":
        return create_block_mask(Mask(right=0), blocks=kept[1, 0], **sizes)
    return create_block_mask(Mask(right=0), len_q=0, len_kv=70, block_size=16)


def cells(mask: BlockMask, tile_q: int, tile_kv: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every tile, (b, h, rows, columns), whether a block that it touches is visible, and whether all are full."""
    rows, columns = mask.grid.shape
    kinds = mask.kv.kinds(0, mask.batch * mask.heads * rows, columns).reshape(mask.batch, mask.heads, rows, columns)
    by_pair = kinds.repeat(mask.block_size[0], 2)[:, :, : mask.len_q].repeat(mask.block_size[1], 3)[..., : mask.len_kv]
    shape = *by_pair.shape[:2], -(-mask.len_q // tile_q), -(-mask.len_kv // tile_kv)
    some, whole = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, j in product(*map(range, shape[2:])):
        tile = by_pair[:, :, i * tile_q : (i + 1) * tile_q, j * tile_kv : (j + 1) * tile_kv]
        some[:, :, i, j], whole[:, :, i, j] = (tile > 0).any((2, 3)), (tile == 2).all((2, 3))
    return some, whole


def test_no_pair_is_tested_where_all_blocks_are_full_and_hold_whole_tiles() -> None:
    kept = np.random.default_rng(0).random((3, 4)) < 0.5
    sizes = {"len_q": 300, "len_kv": 450}
    assert create_block_mask(blocks=kept, **sizes).tested is EVERY_PAIR
    for other in (
        create_block_mask(lambda b, h, q, k: k < 300, blocks=kept | [True, True, True, False], **sizes),
        create_block_mask(blocks=kept.repeat(2, 0)[:5], block_size=(64, 128), **sizes),
    ):
        assert other.tested is other.rule
    again = create_block_mask(lambda b, h, q, k: k < 256, blocks=kept, **sizes)  # at the edge of a block
    assert again.tested is EVERY_PAIR and again.kind != create_block_mask(blocks=kept, **sizes).kind


def assert_ranked(walk: Walk, per_matrix: int) -> None:
    """The lines of each matrix from the longest to the shortest, of equals the later one first."""
    lengths = walk.lines[:, 2] - walk.lines[:, 0]
    for first in range(0, len(lengths), max(per_matrix, 1)):
        mine = lengths[first : first + per_matrix]
        assert walk.lines[first : first + per_matrix, 3].tolist() == sorted(
            range(per_matrix), key=lambda i, mine=mine: (-mine[i], -i)
        )


def listed(walk: Walk, line: int) -> tuple[list[int], list[int]]:
    """The full tiles of a line, and its partial ones."""
    begin, full_end, end, _ = walk.lines[line]
    return walk.entries[begin:full_end].tolist(), walk.entries[full_end:end].tolist()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["own", "heads", "shared", "empty"])
def test_key_tiles_of_query_tiles(name: str, tile: tuple[int, int]) -> None:
    mask = made(name)
    some, whole = cells(mask, *tile)
    walk = over_keys(mask, *tile)
    assert walk.lines.shape == (some[..., 0].size, 4) and walk.lines.dtype == walk.entries.dtype == np.int32
    assert_ranked(walk, some.shape[2])
    for line, (seen, full) in enumerate(
        zip(some.reshape(-1, some.shape[3]), whole.reshape(-1, some.shape[3]), strict=True)
    ):
        assert listed(walk, line) == (np.flatnonzero(full).tolist(), np.flatnonzero(seen & ~full).tolist())


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["own", "heads", "shared", "empty"])
def test_query_tiles_of_key_tiles_and_their_turns(name: str, tile: tuple[int, int], group: int) -> None:
    mask = made(name)
    some, whole = cells(mask, *tile)
    walk = over_queries(mask, *tile, group)
    batch, heads, rows, columns = some.shape
    heads_kv = 1 if heads == 1 else heads // group
    bits = {1: 0, 2: 1, 6: 3}[group]
    assert walk.lines.shape == (batch * heads_kv * columns, 4)
    assert_ranked(walk, columns)
    for b, h, j in product(range(batch), range(heads_kv), range(columns)):
        line = (b * heads_kv + h) * columns + j
        own = [0] * group if heads == 1 else [h * group + member for member in range(group)]
        expected: tuple[list[int], list[int]] = [], []
        for i, member in product(range(rows), range(group)):
            if some[b, own[member], i, j]:
                expected[not whole[b, own[member], i, j]].append((i << bits) + member)
        assert listed(walk, line) == expected
        begin, _, end, _ = walk.lines[line]
        for entry, turn in zip(walk.entries[begin:end], walk.turns[begin:end], strict=True):
            i, member = divmod(entry, 1 << bits)
            assert turn == some[b, own[member], i, j + 1 :].sum()
