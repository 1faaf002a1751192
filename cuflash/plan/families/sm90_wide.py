"""Hopper's forward of wide heads: its config, shared memory and plan, and what it leaves to others.

It belongs to the family ``sm90``, whose other kernels serve heads of up to 256 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import gcd

import numpy as np

from cuflash.device import Device
from cuflash.plan import policies, steps
from cuflash.plan.ceiling import Ceiling
from cuflash.plan.config import HEADER, AttentionConfig
from cuflash.plan.plan import Box, Plan, Step, Workspace
from cuflash.plan.splits import best_splits, key_tiles
from cuflash.plan.tiles import packed_tiles, query_blocks, round_up
from cuflash.problem import Problem

NARROW = 256
"""Columns of heads that the other kernels serve."""
MOST_QK, MOST_V = 576, 512
"""Columns of keys, and of values, that fit: those of multi-head latent attention."""

_ROWS = 64
"""Rows of a query tile, all of which both consumers have: those of a wgmma."""
_LEAST_BOX = 8
"""Rows of a box: those that the swizzle of shared memory repeats after."""
_LEAST_TILES = 4
"""Key tiles that a split is worth."""
_TILES = ((64, 4), (64, 3), (64, 2), (64, 1))
"""Keys of a tile and stages, best first. H200, keys of 576 columns with the values among them, 128 heads on 128 caches
of 16k keys: two stages of 64 keys 612 TFLOP/s, four of 32 keys 496. 512 columns, 4k: one stage of 64 keys 517, two of
32 keys 462."""
_TILES_ONCE = ((32, 4), (32, 3), (32, 2))
"""The same where nobody else reads the keys, so that memory decides. 16 heads on 128 times 4k keys: 4.0 TB/s, with two
stages of 64 keys 3.6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WideConfig(AttentionConfig):
    """``fwd_sm90_wide``."""

    sink: str = field(default="NoSink", metadata={HEADER: "attention/softmax.cuh"})
    """NoSink, LearnableSink."""
    heads: str = field(default="OneHead", metadata={HEADER: "attention/heads.cuh"})
    """Whose rows a query tile holds: OneHead, HeadGroup."""
    split: str = field(default="NoSplit", metadata={HEADER: "attention/split.cuh"})
    """Which of its keys a work walks: NoSplit, KeySplits, or Halves of what they say for each of a cluster's blocks."""
    shared_kv: bool
    """The values are the first columns of the keys, and are not copied again."""
    box_rows: int
    """Keys that are copied together, neighbours in a page where there are pages."""
    once: bool
    """Nobody else reads the keys of a work."""
    stages: int
    """Key tiles in flight."""
    producer_registers: int = 40
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int = 232


def is_wide(problem: Problem) -> bool:
    """Whether heads have more columns than ``forward/sm90.cuh`` has registers for."""
    return max(problem.dim_qk, problem.dim_v) > NARROW


def forward(problem: Problem, device: Device) -> Plan:
    """The plan of ``forward/sm90_wide.cuh``."""
    grouped = packs_heads(problem)
    rows = problem.len_q * problem.group
    config, reason = _config(problem, device, once=grouped and rows <= _ROWS)
    works, group, division = query_blocks(problem, _ROWS), 1, ""
    if problem.layout == "varlen":
        works = problem.heads_q * packed_tiles(problem, _ROWS)
    if grouped:
        works, group = problem.batch * problem.heads_kv * -(-rows // _ROWS), min(problem.group, _ROWS)
        config = replace(config, heads="HeadGroup")
        division = f"{problem.group} heads share tiles; "
    num_splits = _num_splits(problem, config, works, device)
    blocks = min(works * num_splits, device.num_sms)
    differ = problem.layout != "dense" or problem.mask.kind != "none"  # tiles in length, so they are drawn
    drawn = differ and blocks < works * num_splits
    halves = _halves_keys(problem, config, works, num_splits, device)
    division += f"{works} tiles for {device.num_sms} multiprocessors"
    if halves:
        num_splits, division = num_splits // 2, f"{division}; two blocks of a cluster share each part"
    keys = ("k",) if config.shared_kv else ("k", "v")
    boxes = (Box("q", _ROWS, group), *(Box(name, config.box_rows, once=config.once) for name in keys))
    combine: tuple[Step, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    if num_splits > 1:
        config = replace(config, split="KeySplits", sink="NoSink")  # a sink counts once, in the combine kernel
        combine, workspaces = (steps.combine_step(problem),), steps.part_workspaces(problem, num_splits)
    if halves:
        config = replace(config, split=f"Halves<{config.split}>")
    elif num_splits == 1:
        boxes += (Box("out", _ROWS, group),)
    if drawn:
        workspaces += (Workspace("tickets", np.dtype(np.int32), (2,), kept=True),)
    before = steps.rng_step(problem) + steps.append_step(problem)
    main = Step("fwd_sm90_wide", "FwdParams", config, blocks, boxes, cluster=2 if halves else 1)
    launches = (*before, main, *combine)
    ceiling = _ceiling(problem, config)
    return Plan(
        problem, device, "sm90", launches, workspaces, reason, ceiling, num_splits=num_splits, division=division
    )


def _halves_keys(problem: Problem, config: WideConfig, works: int, num_splits: int, device: Device) -> bool:
    """Whether two blocks of a cluster share what one of half as many splits walks, in whose place their parts fit.

    Clusters of more find no place side by side where a block fills a multiprocessor. H200, 16 heads on 32 caches of 4k
    keys in four parts: clusters of four blocks 87.9 us, none 54.6; 128 heads, two parts: of two 76.6, none 91.8.
    """
    nbytes = _ROWS * (4 * (2 * 64 * _half_chunks(problem) + 8) + 8)
    return (
        problem.num_splits == 0
        and num_splits % 2 == 0
        and works * num_splits <= device.num_sms  # each block has one work
        and problem.dim_v % 64 == 0
        and problem.layout != "varlen"
        and nbytes <= config.stages * config.tile_kv * 128 * -(-problem.dim_qk // 64)
    )


def packs_heads(problem: Problem) -> bool:
    """Whether query tiles hold the heads of a group: few queries, and boxes that hold groups, or parts of one."""
    whole = problem.group > 1 and (_ROWS % problem.group == 0 or problem.group % _ROWS == 0)
    return problem.layout != "varlen" and problem.num_splits != 1 and problem.len_q < _ROWS and whole


def leave(problem: Problem) -> list[str]:
    """Reasons to leave a problem of wide heads to others."""
    if problem.direction == "backward":
        return _leave_gradients(problem)
    reasons = [f"dim_v {problem.dim_v} > {MOST_V}"] if problem.dim_v > MOST_V else []
    if problem.page_size % _LEAST_BOX:
        reasons.append(f"no pages of {problem.page_size} keys, but of multiples of {_LEAST_BOX}")
    if problem.page_size and problem.leftpad:
        reasons.append("no left padding in pages")
    if problem.block_mask is not None:
        reasons.append(f"no block mask of heads over {NARROW}")
    if problem.rotary:
        reasons.append("no queries that are turned first")
    return reasons


def _leave_gradients(problem: Problem) -> list[str]:
    """The same of gradients, by ``bwd_sm90_sliced``."""
    widest = max(problem.dim_qk, problem.dim_v)
    reasons = [f"no gradients of heads over {MOST_V}"] if widest > MOST_V else []
    if problem.block_mask is not None:
        reasons.append(f"no block mask of heads over {NARROW}")
    if problem.score_mod is not None:
        reasons.append(f"no gradients through a written score of heads over {NARROW}")
    return reasons


def of_wide_alone(problem: Problem) -> list[str]:
    """What no other kernel of the family has."""
    reasons = []
    if problem.direction == "forward" and problem.num_splits > 1:
        reasons.append("no split keys")
    return reasons


def _config(problem: Problem, device: Device, once: bool) -> tuple[WideConfig, str]:
    """The config, and why."""
    shared = _shares_values(problem)
    for tile_kv, stages in _TILES_ONCE if once else _TILES:
        smem = _smem(problem, tile_kv, stages)
        if smem <= device.smem_per_block:
            break
    config = WideConfig(
        **policies.policies(problem),
        tile_q=_ROWS,
        tile_kv=tile_kv,
        threads=384,
        smem_bytes=smem,
        sink=policies.sink(problem),
        shared_kv=shared,
        box_rows=gcd(problem.page_size, tile_kv) if problem.page_size else tile_kv,
        once=once,
        stages=stages,
    )
    return config, "two consumers with half the columns of out each, which take 128 registers"


def _shares_values(problem: Problem) -> bool:
    """Whether the halves of the values' columns that consumers multiply by lie in the keys' tile."""
    return problem.shared_kv and 2 * _half_chunks(problem) <= -(-problem.dim_qk // 64)


def _half_chunks(problem: Problem) -> int:
    """Chunks of 64 columns of out that a consumer has."""
    return -(-round_up(problem.dim_v, 64) // 128)


def _smem(problem: Problem, tile_kv: int, stages: int) -> int:
    """Bytes of ``ForwardSm90Wide::SmemPlan``."""
    row_qk, row_v = 128 * -(-problem.dim_qk // 64), 2 * 128 * _half_chunks(problem)
    rows = _ROWS * max(row_qk, row_v)
    keys = stages * tile_kv * (row_qk + (0 if _shares_values(problem) else row_v))
    weights, handed = _ROWS * 128 * -(-tile_kv // 64), _ROWS * 16
    barriers, works = 8 * 2 * (1 + 2 * stages), 2 * (2 * 8 + 4 * 4)
    return round_up(rows + keys + weights + handed + barriers + works, 1024)


def _num_splits(problem: Problem, config: WideConfig, works: int, device: Device) -> int:
    """Blocks that share a query tile's keys: as asked for, or where there are few tiles."""
    walked = key_tiles(problem, config)
    if problem.num_splits:
        return min(problem.num_splits, max(1, walked))
    if works >= 0.8 * device.num_sms:
        return 1
    return best_splits(works, walked // _LEAST_TILES, device.num_sms, 0.95)


def _ceiling(problem: Problem, config: WideConfig) -> Ceiling:
    """Q K^T with both operands in shared memory, half of P V with P in registers; keys and values written once."""
    dim_qk, dim_v, rows = round_up(problem.dim_qk, 16), 128 * _half_chunks(problem), config.tile_kv
    q, keys, values, weights = _ROWS * dim_qk, rows * dim_qk, rows * dim_v, _ROWS * rows
    written = keys if config.shared_kv else keys + values
    # Both consumers read their half of the values; one of them reads P, which the other writes.
    elements = q + keys + written + values + 2 * weights
    return Ceiling(
        tensor_cores=2 * _ROWS * (keys + values) / 4096,
        exponentials=weights / 16,
        shared_memory=elements * problem.dtype.itemsize / 128,
    )
