"""How a forward deals rows and keys out to blocks: which heads share a tile, and how many blocks share a row's keys.

The rules are FlashAttention-3's (Shah et al. 2024, arXiv 2407.08608), on the whole multiprocessors of a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.device import Device
from cuflash.plan.config import AttentionConfig, ForwardConfig
from cuflash.plan.tiles import tiles
from cuflash.problem import MAX_SPLITS, Problem


@dataclass(frozen=True, slots=True)
class Division:
    """The choice for one forward."""

    grouped: bool
    """The rows of a tile are the queries of every head that shares keys (``HeadGroup``)."""
    num_splits: int
    """Blocks that share the keys of one query tile."""
    reason: str

    @property
    def plain(self) -> bool:
        """One head a tile, one block a row."""
        return not self.grouped and self.num_splits == 1


def divide(problem: Problem, device: Device, whole: ForwardConfig, small: ForwardConfig) -> Division:
    """Choose for a family whose plain kernel has one tile, and maybe a small one where rows are few or keys are split.

    ``Problem.num_splits`` of 1 is the plain kernel: nothing but a row's own sequence decides how it is computed.
    """
    if problem.num_splits == 1:
        return Division(False, 1, "asked for: a row's bits depend on its own sequence alone")
    group = problem.group
    fuller = _efficiency(problem.len_q, whole.tile_q) < 0.9 * _efficiency(problem.len_q * group, whole.tile_q)
    grouped = fuller and problem.block_mask is None  # whose lists are of query tiles of one head
    rows, heads = (problem.len_q * group, problem.heads_kv) if grouped else (problem.len_q, problem.heads_q)
    together = f"{group} heads share a tile; " if grouped else ""

    def blocks(of: ForwardConfig) -> int:
        return max(1, problem.batch * heads * -(-rows // of.tile_q))

    if problem.num_splits > 1:
        num_splits, why = _asked(problem, small)
        return Division(grouped, num_splits, together + why)
    whole = small if grouped else whole
    fill = f"{blocks(whole)} blocks for {device.num_sms} multiprocessors"
    if blocks(whole) >= 0.8 * device.num_sms:
        return Division(grouped, 1, together + fill)
    walked = key_tiles(problem, whole)
    if walked <= 4:
        return Division(grouped, 1, f"{together}{fill}, but only {walked} tiles of keys")
    return Division(
        grouped, best_splits(blocks(small), key_tiles(problem, small), device.num_sms, 0.85), together + fill
    )


_MOST_PARTS, _FEW_PARTS, _TILES_WORTH_MORE = 32, 16, 16
"""Ranges of one query tile's keys that one block merges quickly enough; those that it merges soon; and the key tiles of
a range that make more of them worth it. H200, d 128, one query on 4k keys, 64 tiles: 16 parts 11.6 us, 32 12.6."""


_CLUSTER_TILES = 32
"""Key tiles up to which few blocks that merge in their shared memory are sooner done than more that do in memory. H200,
d 128, one query: 512 keys of 4 heads, 8 tiles, 6.5 us by 8 blocks of a cluster, by as many others 8.0; 1024 keys 7.1,
by 16 others 8.9, by 16 of a cluster 7.4; 4096 keys of 8 heads, 64 tiles, 11.8 by 8, 12.0 by 16, 10.5 by 16 others."""


def most_in_cluster(device: Device) -> int:
    """The most blocks that a cluster can have anywhere on a device; consumers' Blackwell is left alone."""
    return 8 if device.capability[0] in (9, 10) else 1


def deal(problem: Problem, device: Device, few: ForwardConfig) -> tuple[Division, int, str]:
    """The choice for a kernel of few rows, its blocks, and how they share the key tiles: KeyRanges or KeySplits.

    In ranges blocks have to find out first where theirs begin. H200, d 128, one query: splits where all of them have a
    block at once 12.2 us on 4k keys of 8 heads, ranges 13.3; 9.9 and 10.9 on 1k of 4 heads, 9.0 and 10.0 on 512.
    """
    grouped = problem.group > 1
    rows, heads = (problem.len_q * problem.group, problem.heads_kv) if grouped else (problem.len_q, problem.heads_q)
    together = f"{problem.group} heads share a tile; " if grouped else ""
    query_tiles = tiles(rows, few.tile_q) * heads * problem.batch
    if problem.num_splits:
        num_splits, why = _asked(problem, few)
        return Division(grouped, num_splits, together + why), query_tiles * num_splits, "KeySplits"
    walked = key_tiles(problem, few)
    alike = problem.layout == "dense" or problem.batch == 1  # in length
    most = min(walked, _MOST_PARTS, max(_FEW_PARTS, walked // _TILES_WORTH_MORE))
    if alike and walked <= _CLUSTER_TILES and most_in_cluster(device) > 1:
        most = min(most, most_in_cluster(device))
    resident = device.num_sms * few.blocks_per_sm
    if alike and 0 < query_tiles * most <= resident:
        why = f"{query_tiles * most} blocks of {resident} that there can be at once"
        return Division(grouped, most, together + why), query_tiles * most, "KeySplits"
    blocks = max(1, min(resident, query_tiles * most))
    parts = min(walked, -(-blocks // max(1, query_tiles)) + 1)
    why = f"at most, as {blocks} blocks share all tiles of keys alike"
    return Division(grouped, max(1, parts), together + why), blocks, "KeyRanges"


def heads_in_step(heads: int, blocks: int, busy: float = 0.95) -> int:
    """The most heads whose blocks can walk the same keys at a time (``attention/ranges.cuh``), in whole teams.

    For their sake at least so much of all blocks must be `busy`.

    Heads of a key are neighbours in memory. H200: a block for each of 8 heads of 64 times 4k keys 246 us, blocks with
    keys of one head at places of their own 259.
    """
    teams = (size for size in range(1, heads + 1) if heads % size == 0 and blocks // size * size >= busy * blocks)
    return max(teams, default=1)


def _asked(problem: Problem, config: ForwardConfig) -> tuple[int, str]:
    """The number of splits that a call asks for, of those that there can be, and why."""
    num_splits = max(1, min(problem.num_splits, -(-problem.len_kv // config.tile_kv)))
    why = "asked for" if num_splits == problem.num_splits else f"of {problem.num_splits}: one for each tile of keys"
    return num_splits, why


def _efficiency(rows: int, tile: int) -> float:
    """The part of all rows of the tiles that are used."""
    return rows / (-(-rows // tile) * tile) if rows else 1.0


def key_tiles(problem: Problem, config: AttentionConfig) -> int:
    """The most key tiles that one query tile sees."""
    keys, mask = problem.len_kv, problem.mask
    if mask.left is not None and mask.right is not None:  # and up to a tile more, where they straddle its edges
        keys = min(keys, mask.left + mask.right + min(problem.len_q, config.tile_q) + config.tile_kv - 1)
    return -(-keys // config.tile_kv)


def best_splits(blocks: int, walked: int, num_sms: int, share: float) -> int:
    """The fewest splits with which waves of blocks keep at least this share of the multiprocessors that any do busy."""
    counts = range(1, max(1, min(MAX_SPLITS, walked)) + 1)
    efficiency = [blocks * s / (-(-blocks * s // num_sms) * num_sms) for s in counts]
    return next(s for s, e in zip(counts, efficiency, strict=True) if e >= share * max(efficiency))
