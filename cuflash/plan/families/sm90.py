"""Hopper, on warpgroup tensor cores by wgmma, fed by bulk copies: tiles, shared memory, configs, plans.

The shared-memory formulas restate the kernels' ``SmemPlan`` structs; a kernel whose ``sizeof`` differs does not
compile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from math import gcd

import numpy as np

from cuflash.device import Device
from cuflash.plan import policies, steps
from cuflash.plan.bias import BiasSum, add_parts, bias_sum, even_parts, gradient_policy, is_in_place, sums_on_the_way
from cuflash.plan.ceiling import Ceiling
from cuflash.plan.config import BIAS_GRADIENT, CAPTURED_GRADIENT, HEADER, AttentionConfig, JvpConfig, SequenceConfig
from cuflash.plan.families import sm90_wide
from cuflash.plan.families.sm80 import SM80, forward_division, lists_without_turns
from cuflash.plan.families.sm80_bias import sum_bias_gradient
from cuflash.plan.families.sm80_short import short_backward, short_forward
from cuflash.plan.families.sm80_tiles import held_bias
from cuflash.plan.family import Family
from cuflash.plan.plan import Box, Plan, Step, Workspace
from cuflash.plan.splits import best_splits, heads_in_step, key_tiles
from cuflash.plan.tiles import fits_blocks, key_blocks, packed_tiles, query_blocks, round_up, tiles
from cuflash.problem import Problem

_ROWS = 64
"""Rows of a consumer warpgroup, queries in ``forward/sm90.cuh`` and keys in ``backward/sm90.cuh``: those of a wgmma."""

_REGISTERS = {1: (240, 240), 2: (24, 240), 3: (32, 160), 4: (24, 112)}
"""Consumers -> registers of a producer and of a consumer thread: what a launch gives a block, and ``setmaxnreg``, which
counts in eights, may share out."""

_PAGING_REGISTERS = {2: (40, 232), 3: (56, 152), 4: (32, 112)}
"""The same where a producer's warp looks up pages."""

_MOST_STAGES = 6
"""Of a lone consumer: 192 KB of keys and values of 128 columns."""
_LEAST_TILES = 4
"""Key tiles that a split is worth."""
_LEAST_READ = 48 << 20
"""Bytes of keys and values from which on a lone consumer reads them faster than ``fwd_sm80_few``. H200, d 128: one
query on 4 times 4k keys 23.9 us instead of 25.2, on 8k keys 16.7 like the other, on 4k keys 13.4 instead of 11.6."""

_LIGHT = 14
"""Operations on a score that a caller may write beside four consumers of 64 columns: none spills that has no more."""

_LEAST_ROWS = 8
"""Of a box: what the swizzle of 128 bytes spans."""

_LEAST_HEADS = 32
_L2_BYTES = 32 << 20
"""Of the 50 MB of an H100's L2 cache, what keys and values may fill beside q and out."""

_SECTION_BYTES, _LEAST_HEAD_BYTES = 16 << 20, 2 << 20
"""What the query rows of a section of heads may take in the backward, dq in fp32 included, and how much of a head pays.
H200: d 128 causal 8k 4 to 6 %, 2k 2 %, d 64 causal 8k 1 % faster, 2k 2 %, 512 6 % slower."""

_FLOPS, _EXPONENTIALS, _SMEM_BYTES = 4096, 16, 128
"""What a multiprocessor does in a cycle: 16-bit multiply-adds twice, exponentials, bytes of shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig(AttentionConfig):
    """``fwd_sm90``."""

    sink: str = field(default="NoSink", metadata={HEADER: "attention/softmax.cuh"})
    """NoSink, LearnableSink."""
    bias_copies: str = field(default="NoBias", metadata={HEADER: "tile/bias.cuh"})
    """NoBias, BiasTiles, BiasRow."""
    heads: str = field(default="OneHead", metadata={HEADER: "attention/heads.cuh"})
    """Whose rows a query tile holds: OneHead, HeadGroup."""
    split: str = field(default="NoSplit", metadata={HEADER: "attention/ranges.cuh"})
    """Which of its keys a work walks: NoSplit, KeySplits, KeyRanges, or Halves<> for each of a cluster's two blocks."""
    box_rows: int
    """Keys of a box: those of a tile, or what a page and a tile have in common."""
    stages: int
    """Key tiles in flight."""
    ping_pong: bool
    """Warpgroups take turns on the tensor cores."""
    row_buffers: int
    """Tiles of q that a consumer has room for; out takes the place of the one that is done."""
    producer_registers: int
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int


def _forward_config(problem: Problem, device: Device) -> tuple[ForwardConfig, str]:
    """The config of ``forward/sm90.cuh``: consumers of 64 query rows each, a producer some kv tiles ahead; and why."""
    consumers, teams, tile_kv, reason = _consumers(problem, device)
    # With turns, softmaxes run under the products of others; without, no consumer visits what only others' rows see.
    ping_pong = problem.copies_bias or (problem.block_mask is None and (problem.mask.kind == "none" or tile_kv == 128))
    # H200, d 128: a second q, which hides the end of a work behind the next one, gives 1 % at 8k and 7 % at 1k.
    # Half the keys are for a bias in fp32 beside large heads.
    choices = ((tile_kv, 4, 2), (tile_kv, 3, 2), (tile_kv, 2, 2), (tile_kv, 2, 1), (tile_kv // 2, 2, 1))
    for tile_kv, stages, row_buffers in choices:
        smem = teams * _forward_smem(problem, consumers, tile_kv, stages, row_buffers)
        if smem <= device.smem_per_block:
            break
    producer, consumer = (_PAGING_REGISTERS if problem.page_size else _REGISTERS)[teams * consumers]
    score, bias_copies = _score_and_bias(problem)
    config = ForwardConfig(
        **policies.policies(problem) | {"score": score},
        tile_q=consumers * _ROWS,
        tile_kv=tile_kv,
        box_rows=gcd(tile_kv, problem.page_size),
        threads=128 * (1 + teams * consumers),
        smem_bytes=smem,
        sink=policies.sink(problem),
        bias_copies=bias_copies,
        heads="HeadGroup" if _groups_rows(problem) else "OneHead",
        stages=stages,
        ping_pong=ping_pong,
        row_buffers=row_buffers,
        producer_registers=producer,
        consumer_registers=consumer,
    )
    return config, reason


def _consumers(problem: Problem, device: Device) -> tuple[int, int, int, str]:
    """How many consumers a team has, how many teams a block, and keys of a tile; and why."""
    dim = round_up(max(problem.dim_qk, problem.dim_v), 16)
    crowded = _is_crowded(problem)
    teams = 1
    elsewhere = problem.alibi or problem.bias is not None or policies.knows_its_place(problem)
    of_score_alone = (not elsewhere) if problem.written else bool(problem.softcap)
    scored = crowded or problem.softcap or problem.alibi or problem.bias is not None or problem.written
    if dim > 128:
        consumers, tile_kv, reason = 2, 64, "two consumers: out takes up to 128 registers, S 32"
    elif _groups_rows(problem):
        consumers, tile_kv, reason = 2, 128, f"two consumers have the rows of {problem.group} heads"
    elif dim <= 64 and _is_light(problem):
        consumers, teams, tile_kv = 2, 2, 64
        reason = "two teams of two consumers: 128 queries each, as many as blocks have"
    elif problem.block_mask or crowded or (dim > 64 and scored and not of_score_alone):
        consumers, tile_kv = 2, 128
        reason = "two consumers: what else makes a score needs more registers than more consumers have"
    elif dim > 64:
        consumers, tile_kv, reason = 3, 64, "three consumers read k and v once for 192 rows"
        if _fills_better(problem, device):
            consumers, tile_kv, reason = 2, 128, "two consumers: tiles of 192 rows would stay emptier"
    elif problem.num_splits != 1 and problem.len_q <= 2 * _ROWS and problem.len_kv >= _LONG_KEYS * problem.len_q:
        consumers, tile_kv, reason = 2, 128, "two consumers: tiles of 256 rows would stay emptier"
    else:
        consumers, tile_kv = 4, 64
        reason = "four consumers read k and v once for 256 rows; S, P and out fit in 112 registers"
        emptier = problem.len_q > 256 and 5 * round_up(problem.len_q, 192) <= 4 * round_up(problem.len_q, 256)
        if problem.copies_bias and emptier:
            consumers, reason = 3, "three consumers: tiles of 256 rows would stay emptier"
    return consumers, teams, tile_kv, reason


def _fills_better(problem: Problem, device: Device) -> bool:
    """Whether two consumers, which are slower at their best, leave so much less of tiles and multiprocessors idle.

    Not with one split, where the batch decides nothing. H200, d 128, causal: 512 queries on 32k keys 368 us, else 459.
    """
    rows = {c: c * -(-query_blocks(problem, c * _ROWS) // device.num_sms) for c in (2, 3)}  # of all waves, in 64
    return problem.layout != "varlen" and problem.num_splits != 1 and 10 * rows[2] <= 7 * rows[3]


def _is_crowded(problem: Problem) -> bool:
    """Whether what makes a score needs more registers than three or four consumers have."""
    crowded = problem.dropout or problem.mask.tensor or (problem.bias is not None and not problem.copies_bias)
    return bool(crowded) or policies.written_work(problem) > _LIGHT


def _is_light(problem: Problem) -> bool:
    """Whether a block mask is all that there is beside products: a rule that partial blocks alone are tested by."""
    others = problem.dropout, problem.mask.tensor, problem.bias, problem.softcap, problem.alibi, problem.score_mod
    return problem.block_mask is not None and problem.mask_mod is None and not any(others)


def _score_and_bias(problem: Problem) -> tuple[str, str]:
    """The policies of a score and of a bias: copied beside the rows where it can be, else a term of the score."""
    if problem.bias is None or not problem.copies_bias:
        return policies.score(problem), "NoBias"
    copies = f"{'BiasRow' if problem.bias_broadcast[2] else 'BiasTiles'}<{problem.bias.cuda}>"
    return policies.score_beside_bias(problem), copies


def _forward_smem(
    problem: Problem, consumers: int, tile_kv: int, stages: int, row_buffers: int, ranges: bool = False
) -> int:
    """Bytes of ``ForwardSm90::SmemPlan``: chunks of 64 columns, 128 bytes a row, and mbarriers."""
    row_qk, row_v = (128 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    rows = row_buffers * max(row_qk, row_v)
    barriers = 2 * (row_buffers * consumers + 2 * stages)  # full and empty
    works = 2 * (2 * 8 + 4 * (8 if ranges else 4))
    works += 0 if problem.block_mask is None else 2 * 56  # ListedTiles
    tiles = consumers * _ROWS * rows + stages * tile_kv * (row_qk + row_v)
    smem = round_up(tiles + 8 * barriers + works, 1024)
    return smem + (_bias_buffers(problem, consumers * _ROWS, tile_kv, stages) if problem.copies_bias else 0)


def _bias_buffers(problem: Problem, tile_q: int, tile_kv: int, stages: int) -> int:
    """Bytes of ``LoadedBias::Buffers`` (tile/bias.cuh)."""
    rows = 8 if problem.bias_broadcast[2] else tile_q
    row = 128 * -(-tile_kv * (problem.bias.itemsize if problem.bias else 0) // 128)
    return round_up(stages * (rows * row + 16), 1024)


def heads_per_section(problem: Problem) -> int:
    """Query heads to work on together (``forward/sm90.cuh``).

    Tiles of equal length are worked on head by head. Others come longest first, of so many heads that there are long
    ones to begin with, and few enough that their keys and values meet in the L2 cache.
    """
    if sm90_wide.is_wide(problem) and sm90_wide.packs_heads(problem):
        return 1  # the tiles of a group, which share keys, are neighbours
    if problem.mask.kind == "none":
        return problem.group
    head = problem.len_kv * (problem.dim_qk + problem.dim_v) * problem.dtype.itemsize
    heads_kv = max(_LEAST_HEADS, _L2_BYTES // max(1, head))
    # Never more than there are, so that a section's works can be counted in 32 bits.
    return min(problem.group << (heads_kv.bit_length() - 1), max(1, problem.batch * problem.heads_q))


def _packs_heads(problem: Problem) -> bool:
    """Whether the queries of a group of heads fill one tile of a lone consumer, whose keys nobody else reads."""
    return problem.len_q * problem.group <= _ROWS and _has_whole_groups(problem)


def _has_whole_groups(problem: Problem) -> bool:
    """Whether tiles and boxes can hold the queries of all heads of a group, for what makes a score beside products."""
    group, mask = problem.group, problem.mask
    plain = problem.dropout is None and not mask.tensor and problem.bias is None and not problem.written
    free = problem.num_splits == 0 and problem.tangents is None
    whole = 1 < group <= _ROWS and group & (group - 1) == 0
    counted = problem.batch * problem.heads_kv * problem.len_kv < 2**36  # tiles of keys, in 32 bits
    return free and plain and whole and counted


def _groups_rows(problem: Problem) -> bool:
    """Whether several consumers share the queries of a group of heads: each head's would leave tiles emptier."""
    rows = problem.len_q * problem.group
    fuller = 4 * tiles(rows, 2 * _ROWS) < 3 * problem.group * tiles(problem.len_q, 2 * _ROWS)
    return fuller and rows > _ROWS and problem.len_kv >= _LONG_KEYS * problem.len_q and _has_whole_groups(problem)


def _packed_config(problem: Problem, device: Device) -> tuple[ForwardConfig, str]:
    """The config of ``forward/sm90.cuh`` for the queries of a group in one tile: one consumer, keys far ahead.

    Where the device alone knows how many keys a sequence has, blocks share all of them in equal ranges.
    """
    ranges = problem.layout != "dense"
    for stages, row_buffers in product(range(_MOST_STAGES, 1, -1), (2, 1)):
        smem = _forward_smem(problem, 1, _ROWS, stages, row_buffers, ranges)
        if smem <= device.smem_per_block:
            break
    config = ForwardConfig(
        **policies.policies(problem),
        tile_q=_ROWS,
        tile_kv=_ROWS,
        box_rows=gcd(_ROWS, problem.page_size),
        threads=256,
        smem_bytes=smem,
        sink="NoSink" if ranges else policies.sink(problem),  # with parts it counts once, in the combine kernel
        heads="HeadGroup",
        split="KeyRanges" if ranges else "NoSplit",
        stages=stages,
        ping_pong=False,
        row_buffers=row_buffers,
        producer_registers=255,
        consumer_registers=255,
    )
    return config, f"one consumer: memory decides, and keys are loaded {stages} tiles ahead"


def _packed_forward(problem: Problem, device: Device) -> Plan:
    """The plan of few queries of many heads over long keys: the tile of a group's queries, its keys in parts."""
    works = problem.batch * problem.heads_kv
    config, reason = _packed_config(problem, device)
    if problem.layout != "dense":
        return _ranges_forward(problem, device, config, reason)
    num_splits = best_splits(works, key_tiles(problem, config) // _LEAST_TILES, device.num_sms, 0.95)
    division = f"{problem.group} heads share a tile; {works} tiles for {device.num_sms} multiprocessors"
    boxes: tuple[Box, ...] = (Box("q", _ROWS, problem.group), *_key_boxes(problem, config, once=True))
    combine: tuple[Step, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    blocks = min(works * num_splits, device.num_sms)
    halves = _halves(problem, num_splits) and blocks == works * num_splits  # each has one work
    if halves:
        num_splits, division = num_splits // 2, f"{division}; two blocks of a cluster share each part"
    if num_splits > 1:
        config = replace(config, split="KeySplits", sink="NoSink")  # a sink counts once, in the combine kernel
        combine = (steps.combine_step(problem),)
        workspaces += steps.part_workspaces(problem, num_splits)
    if halves:
        config = replace(config, split=f"Halves<{config.split}>")
    elif num_splits == 1:
        boxes += (Box("out", _ROWS, problem.group),)
    main = Step("fwd_sm90", "FwdParams", config, blocks, boxes, cluster=2 if halves else 1)
    launches = (main, *combine)
    return Plan(problem, device, "sm90", launches, workspaces, reason, num_splits=num_splits, division=division)


def _halves(problem: Problem, num_splits: int) -> bool:
    """Whether two blocks of a cluster share what one of half as many splits walks, and merge in their shared memory."""
    return num_splits % 2 == 0 and problem.dim_v % 8 == 0


def key_heads_per_section(problem: Problem) -> int:
    """Key heads to work on together in the backward (``backward/block_sm90.cuh``): the longest tiles come first.

    Short tiles then fill the end of the grid. Only so many that what is read and added to meets in the L2 cache; and
    one where tiles are of equal length, or so few a head that none is much longer than others.
    """
    size, all_heads = problem.dtype.itemsize, problem.batch * problem.heads_kv
    head_bytes = problem.len_q * problem.group * (problem.dim_qk * (size + 4) + problem.dim_v * size)
    if problem.mask.kind != "causal" or head_bytes < _LEAST_HEAD_BYTES or not all_heads:
        return 1
    heads = min(max(1, _SECTION_BYTES // head_bytes), all_heads)
    return -(-all_heads // -(-all_heads // heads))  # so that no section is much smaller than others


def _key_boxes(problem: Problem, config: ForwardConfig, once: bool = False) -> tuple[Box, Box]:
    ends = problem.page_size > 0 or problem.layout == "cache"
    return Box("k", config.box_rows, once=once, ends=ends), Box("v", config.box_rows, once=once, ends=ends)


def _ranges_forward(problem: Problem, device: Device, config: ForwardConfig, reason: str) -> Plan:
    """The same with parts as ``KeyRanges`` of ``attention/ranges.cuh`` deals them out."""
    works, blocks = problem.batch * problem.heads_kv, device.num_sms
    walked = key_tiles(problem, config)
    parts = max(1, min(walked, -(-blocks // max(1, works)) + 1))
    division = f"{problem.group} heads share a tile; at most, as {blocks} blocks share all tiles of keys alike"
    slots, rows = (works + blocks,), problem.len_q * problem.group
    real = problem.dtype.accumulator
    workspaces = (
        *steps.rotated(problem),
        Workspace("partial_out", real, (*slots, rows, problem.dim_v)),
        Workspace("partial_state", real, (*slots, rows, 2)),
        Workspace("part_slots", np.dtype(np.int32), (works, 2)),
    )
    boxes = (Box("q", _ROWS, problem.group), *_key_boxes(problem, config, once=True))
    launches = (
        *steps.append_step(problem),
        Step("fwd_sm90", "FwdParams", config, blocks, boxes),
        steps.combine_step(problem, "KeyRanges"),
    )
    return Plan(
        problem, device, "sm90", launches, workspaces, reason, num_splits=parts,
        heads_in_step=heads_in_step(problem.heads_kv, blocks, 0.98 if works > blocks else 0.95), division=division,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpgroupJvpConfig(JvpConfig):
    """``jvp_sm90``."""

    stages: int
    """Key tiles in flight."""
    producer_registers: int
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int


def _jvp(problem: Problem, device: Device) -> Plan:
    """The plan of ``forward/jvp_sm90.cuh``."""
    consumers, stages = 2, 2
    if max(problem.dim_qk, problem.dim_v) <= 64:
        # H200, 8k, d 64: 631 TFLOP/s; 96 keys 585, 64 keys 529.
        tile_kv, reason = 128, "two consumers: S, S', out and its tangent take 192 registers"
    else:
        # H200, 8k, d 128: 704 TFLOP/s; 48 keys 589.
        tile_kv, reason = 64, "two consumers: out and its tangent take 128 registers, S and S' 64"
    producer, consumer = _REGISTERS[consumers]
    config = WarpgroupJvpConfig(
        **policies.policies(problem),
        tile_q=consumers * _ROWS,
        tile_kv=tile_kv,
        threads=128 * (1 + consumers),
        smem_bytes=_jvp_smem(problem, consumers, tile_kv, stages),
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
        tangent_bias=policies.tangent_bias(problem),
        stages=stages,
        producer_registers=producer,
        consumer_registers=consumer,
    )
    rows = {"q": _ROWS, "k": tile_kv, "v": tile_kv}
    boxes = (Box(tangent + name, n) for tangent in ("", "tangent_") for name, n in rows.items())
    return steps.jvp(problem, device, "sm90", config, reason, boxes=tuple(boxes))


def _jvp_smem(problem: Problem, consumers: int, tile_kv: int, stages: int) -> int:
    """Bytes of ``JvpSm90::SmemPlan``."""
    row_qk, row_v = (128 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    tiles = consumers * _ROWS * max(row_qk, row_v) + stages * tile_kv * (row_qk + row_v)
    return round_up(2 * tiles + 2 * 8 * (1 + 2 * stages), 1024)


def _forward(problem: Problem, device: Device) -> Plan:
    if problem.tangents is not None:
        return _jvp(problem, device)
    if sm90_wide.is_wide(problem):
        return sm90_wide.forward(problem, device)
    if _packs_heads(problem):
        return _packed_forward(problem, device)
    config, reason = _forward_config(problem, device)
    group = problem.group if config.heads == "HeadGroup" else 1
    works = (problem.heads_q // group) * _query_tiles(problem, config.tile_q, group)
    num_splits, division = _idle_splits(problem, config, works, device)
    works *= num_splits
    teams = (config.threads // 128 - 1) * _ROWS // config.tile_q
    # Blocks go from one tile to another, and load the next while they store the last.
    blocks = min(-(-works // teams), device.num_sms)
    # Tiles that differ in length are drawn.
    differ = problem.layout != "dense" or problem.mask.kind != "none" or problem.block_mask is not None
    tickets = Workspace("tickets", np.dtype(np.int32), (2,), kept=True)
    workspaces = steps.rotated(problem) + ((tickets,) if differ and teams * blocks < works else ())
    boxes: tuple[Box, ...] = (Box("q", _ROWS, group), *_key_boxes(problem, config))
    if problem.copies_bias:
        boxes += (Box("bias", 1 if problem.bias_broadcast[2] else config.tile_q),)
    ceiling = _forward_ceiling(problem, config)
    combine: tuple[Step, ...] = ()
    if num_splits == 1:
        boxes += (Box("out", _ROWS, group),)
    else:
        config = replace(config, split="KeySplits", sink="NoSink")  # a sink counts once, in the combine kernel
        combine = (steps.combine_step(problem),)
        workspaces += steps.part_workspaces(problem, num_splits)
    before = steps.rng_step(problem) + steps.append_step(problem)
    launches = (*before, Step("fwd_sm90", "FwdParams", config, blocks, boxes, "kv"), *combine)
    return Plan(
        problem, device, "sm90", launches, workspaces, reason, ceiling, num_splits=num_splits, division=division
    )


def _query_tiles(problem: Problem, tile_q: int, group: int) -> int:
    """Tiles of all sequences, with the rows of so many heads in each."""
    if problem.layout == "varlen":  # as many as there may be, whatever the lengths are
        return problem.total_q * group // tile_q + problem.batch
    return problem.batch * tiles(problem.len_q * group, tile_q)


_LONG_KEYS, _LEAST_PART = 8, 1024
"""Keys to a query from which on they may be split, and how many of them are worth a block of their own."""


def _idle_splits(problem: Problem, config: ForwardConfig, works: int, device: Device) -> tuple[int, str]:
    """Blocks that share a query tile's keys where few queries over long keys would leave the others idle, and why."""
    long = problem.len_kv >= _LONG_KEYS * problem.len_q and problem.block_mask is None
    if problem.num_splits or not long or not 0 < works < 0.8 * device.num_sms:
        return 1, ""
    most = key_tiles(problem, config) * config.tile_kv // _LEAST_PART
    return best_splits(works, most, device.num_sms, 0.95), f"{works} tiles for {device.num_sms} multiprocessors"


def _forward_ceiling(problem: Problem, config: ForwardConfig) -> Ceiling:
    """The ceiling of ``forward/sm90.cuh``: Q K^T with both operands in shared memory, P V with P in registers."""
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
    consumers, size = config.tile_q // _ROWS, problem.dtype.itemsize
    # Every consumer reads its own rows of q and all of k and v, which the copy engine writes once for all.
    q = config.tile_q * dim_qk
    kv = config.tile_kv * (dim_qk + dim_v)
    # A tile of a bias is written and read once; one row of it is next to nothing.
    bias = 0 if not problem.copies_bias or problem.bias_broadcast[2] else config.tile_q * config.tile_kv
    bias_bytes = 2 * bias * (problem.bias.itemsize if problem.bias else 0)
    return Ceiling(
        tensor_cores=2 * config.tile_q * kv / _FLOPS,
        exponentials=config.tile_q * config.tile_kv / _EXPONENTIALS,
        shared_memory=((q + consumers * kv + kv) * size + bias_bytes) / _SMEM_BYTES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardConfig(AttentionConfig):
    """``bwd_sm90``, ``bwd_sm90_listed``, ``bwd_sm90_wide`` and, with slices, ``bwd_sm90_sliced``."""

    reduction: str = field(metadata={HEADER: "tile/dq_accum.cuh"})
    """AtomicReduction, OrderedReduction."""
    bias_gradient: str = field(default="NoBiasGradient", metadata=BIAS_GRADIENT)
    captured_gradient: str = field(default="NoCapturedGradient", metadata=CAPTURED_GRADIENT)
    bias_copies: str = field(default="NoBias", metadata={HEADER: "tile/bias.cuh"})
    """NoBias, BiasTiles, BiasRow."""
    copied_sums: bool = False
    """Shares of dq are added to the sums by the copy engine instead of from registers."""
    slices: int = 1
    """Blocks of a cluster that share the columns of a head."""
    stages: int = 2
    """Query tiles in flight."""
    producer_registers: int = 24
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig(SequenceConfig):
    """``bwd_prepare_sm90``."""

    dim_qk: int
    dim_v: int
    tile_q: int
    score: str = field(metadata={HEADER: "attention/score.cuh"})
    """For its unit, which rows' states are in."""
    copy_bytes: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig(SequenceConfig):
    """``bwd_convert_sm90``."""

    dim_qk: int
    tile_q: int
    copy_bytes: int = 16


def _backward_config(problem: Problem, device: Device) -> tuple[BackwardConfig, str]:
    """The config of ``backward/sm90.cuh``, or of ``backward/sm90_wide.cuh`` where its tile has 64 keys; and why."""
    widest, slices = max(problem.dim_qk, problem.dim_v), 1
    if widest <= 64:
        # H200, d 64, 8k: 530 TFLOP/s, all launches (benchmarks/results/2026-11-30-h200-backward.json).
        tile_q, tile_kv, reason = 128, 128, "dk and dv take 64 registers, S and dP 128"
    elif widest <= 128:
        # H200, d 128, 8k, the main launch alone: 590 TFLOP/s, causal 570. The first version's 80 queries, dq through
        # shared memory, 595 and 520.
        tile_q, tile_kv, reason = 64, 128, "dk and dv take 128 registers, S and dP 64"
    elif widest <= sm90_wide.NARROW:
        tile_q, tile_kv, reason = 64, 64, "one warpgroup has the registers for dk, another those for dv"
    else:
        tile_q, tile_kv, slices = 64, 64, 2
        reason = "a cluster of two blocks with half the columns each, one warpgroup for dk and one for dv"
    config = BackwardConfig(
        **policies.policies(problem),
        tile_q=tile_q,
        tile_kv=tile_kv,
        threads=384,
        reduction="OrderedReduction" if problem.deterministic else "AtomicReduction",
        # H200, 8k: 2 % faster at d 128, causal 3 to 6 %, but 3 to 6 % slower at d 64. A turn ends when all has been
        # added, which only those who add from registers know.
        copied_sums=64 < widest <= 128 and not problem.deterministic,
        slices=slices,
        bias_gradient=gradient_policy(problem),
        captured_gradient=policies.captured_gradient(problem),
    )
    config = replace(config, smem_bytes=_backward_smem(problem, config))
    # Beside the widest heads there is no room for a tile of the bias, and beside the smallest not for one in fp32.
    if problem.copies_bias and tile_kv != _ROWS:
        smem = config.smem_bytes + _bias_buffers(problem, tile_q, tile_kv, 1)
        if smem <= device.smem_per_block:
            score, bias_copies = policies.score_without_bias(problem), _score_and_bias(problem)[1]
            config = replace(config, smem_bytes=smem, score=score, bias_copies=bias_copies)
    return config, reason


def _backward_smem(problem: Problem, config: BackwardConfig) -> int:
    """Bytes of ``BackwardSm90::SmemPlan`` or ``BackwardSm90Wide::SmemPlan``."""
    row_qk, row_v = (128 * -(-dim // (64 * config.slices)) for dim in (problem.dim_qk, problem.dim_v))
    dout_stages = config.stages if config.slices == 1 else 1
    barriers = 8 * (2 * (config.stages + dout_stages) + 2)  # full and empty of q and dout; k, v
    queries = config.stages * (config.tile_q * row_qk + _row_tile(config.tile_q)) + dout_stages * config.tile_q * row_v
    inputs = round_up(config.tile_kv * (row_qk + row_v) + queries + barriers, 1024)
    ds, rings = 2 * config.tile_q * config.tile_kv * 2, 8 * 2 * 2
    if config.tile_kv == _ROWS:  # P in fp32, and a ring of its own; dP, and rings of both, that slices hand over
        handed = config.tile_q * config.tile_kv * 4
        across = handed + 2 * 8 * 2 if config.slices > 1 else 0
        return round_up(inputs + ds + handed + rings + 8 * 2 + across, 1024)
    adders = 2 * _ROWS * 64 * 4 if config.copied_sums else 8  # ShareAdder of each of eight warps
    return round_up(inputs + ds + rings + adders, 1024)


def _row_tile(tile_q: int) -> int:
    """Bytes of ``RowTile`` (``tile/query_tiles.cuh``)."""
    return 3 * 4 * tile_q + 16


def _dq_columns(config: BackwardConfig) -> int:
    """``QueryTiles::kColumns``."""
    return round_up(config.dim_qk, 16 if config.tile_q == 128 else 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortBackwardConfig(AttentionConfig):
    """``bwd_sm90_short``."""

    bias_held: str = field(default="NoHeldBias", metadata={HEADER: "tile/held_bias.cuh"})
    """NoHeldBias, HeldBias."""
    bias_copies: str = field(default="NoBias", metadata={HEADER: "tile/bias.cuh"})
    """NoBias."""
    sum_bias: bool
    """The gradient of a bias that the batch shares is summed on the way."""
    slices: int = 1
    """All columns of a head are one block's."""
    stages: int = 2
    """Batch elements in flight."""
    copy_bytes: int = 16
    producer_registers: int = 56
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int = 224


_SHORT = 128
"""Queries and keys of a sequence that ``backward/sm90_short.cuh`` has room for; half as many are left to ``sm80``."""


def _short_backward(problem: Problem, device: Device) -> Plan | None:
    """The plan of a backward by ``bwd_sm90_short``, where there are enough sequences and they fit in its tile."""
    lengths, widest = (problem.len_q, problem.len_kv), max(problem.dim_qk, problem.dim_v)
    fits = problem.layout == "dense" and min(lengths) > _ROWS and max(lengths) <= _SHORT and widest <= 64
    shared = problem.bias is None or problem.bias_broadcast[0]
    few = problem.batch * problem.heads_q < 2 * device.num_sms
    sloped = problem.bias_grad and problem.softcap  # so that dS is not the gradient of the bias
    if not fits or not shared or few or problem.written or problem.group > 1 or is_in_place(problem) or sloped:
        return None
    tile_q = 64
    tiles = 2 * _SHORT * 128 * sum(2 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    ds, rows, barriers = _SHORT * _SHORT * 2, 2 * _SHORT // tile_q * _row_tile(tile_q), 2 * 2 * 2 * 8
    smem = tiles + ds + rows + barriers + held_bias(problem, _SHORT, _SHORT)
    smem = round_up(smem, 1024)
    if smem > device.smem_per_block:
        return None
    config = ShortBackwardConfig(
        **policies.policies(problem) | {"score": policies.score_without_bias(problem)},
        tile_q=tile_q,
        tile_kv=_SHORT,
        threads=384,
        smem_bytes=smem,
        bias_held=f"HeldBias<{problem.bias.cuda}>" if problem.bias else "NoHeldBias",
        sum_bias=sums_on_the_way(problem),
    )
    boxes = tuple(Box(name, tile_q) for name in ("q", "dout", "dq")) + tuple(
        Box(name, _ROWS) for name in ("k", "v", "dk", "dv")
    )
    parts = even_parts(problem.heads_q, problem.batch, device.num_sms)
    bias = add_parts(problem, parts) if config.sum_bias else sum_bias_gradient(problem, device)
    others = (*bias.steps, *steps.sink_step(problem))
    launches = (Step("bwd_sm90_short", "BwdParams", config, problem.heads_q * parts, boxes), *others)
    workspaces = (steps.row_workspaces(problem) if others else ()) + bias.workspaces
    reason = "all queries and keys of a sequence are one tile"
    return Plan(problem, device, "sm90", launches, workspaces, reason, bias_parts=bias.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasConfig(AttentionConfig):
    """``bwd_bias_sm90``. Its score is that of q.k without the bias."""

    bias: str = field(metadata={HEADER: "element.cuh"})
    """Element type of the bias."""
    stages: int = 2
    """Visits in flight."""
    producer_registers: int = 24
    """Of a thread of the warpgroup that loads, and of those that compute."""
    consumer_registers: int = 240


def _sum_bias_gradient(problem: Problem, device: Device, boxes: tuple[Box, ...]) -> BiasSum:
    """The launches that sum a bias' gradient, by ``bwd_bias_sm90`` where batch and heads alone share elements."""
    along_rows, along_keys = problem.bias_broadcast[2:]
    widest = max(problem.dim_qk, problem.dim_v)
    if problem.bias is None or not problem.bias_grad or is_in_place(problem) or along_rows or along_keys or widest > 64:
        return sum_bias_gradient(problem, device)
    if problem.block_mask is not None:  # of which its kernel walks no lists
        return sum_bias_gradient(problem, device)
    tile = 128
    stages = 2
    smem = round_up(stages * tile * 4 * 128 + 2 * 8 * stages + held_bias(problem, tile, tile), 1024)
    config = BiasConfig(
        **policies.policies(problem) | {"score": policies.score_without_bias(problem)},
        tile_q=tile,
        tile_kv=tile,
        threads=384,
        smem_bytes=smem,
        bias=problem.bias.cuda,
        stages=stages,
    )
    return bias_sum(problem, device, "bwd_bias_sm90", config, boxes)


def _backward(problem: Problem, device: Device) -> Plan:
    if short := _short_backward(problem, device):
        return short
    config, reason = _backward_config(problem, device)
    blocks = config.slices * key_blocks(problem, config.tile_kv)
    kernel = "bwd_sm90" if config.tile_kv != _ROWS else "bwd_sm90_wide" if config.slices == 1 else "bwd_sm90_sliced"
    if listed := _listed(problem, device, config):
        config, kernel, blocks = listed, "bwd_sm90_listed", min(device.num_sms, blocks)
    columns = _dq_columns(config)
    prepare = PrepareConfig(
        element=config.element,
        sequence=config.sequence,
        dim_qk=config.dim_qk,
        dim_v=config.dim_v,
        tile_q=config.tile_q,
        score=policies.unit_score(problem),
        threads=256,
    )
    convert = ConvertConfig(
        element=config.element,
        sequence=config.sequence,
        dim_qk=config.dim_qk,
        tile_q=config.tile_q,
        threads=256,
        smem_bytes=config.tile_q * 128 * -(-columns // 64),  # BackwardConvertSm90::SmemPlan
    )
    boxes: tuple[Box, ...] = (
        Box("q", config.tile_q), Box("k", _ROWS), Box("v", _ROWS), Box("dout", config.tile_q), Box("dk", _ROWS),
        Box("dv", _ROWS),
    )  # fmt: skip
    if config.bias_copies != "NoBias":
        boxes += (Box("bias", 1 if problem.bias_broadcast[2] else config.tile_q),)
    bias = _sum_bias_gradient(problem, device, boxes)
    launches = (
        Step("bwd_prepare_sm90", "BwdParams", prepare, query_blocks(problem, config.tile_q)),
        Step(kernel, "BwdParams", config, blocks, boxes, "q"),
        Step("bwd_convert_sm90", "BwdParams", convert, query_blocks(problem, config.tile_q)),
        *bias.steps,
        *steps.sink_step(problem),
        *steps.captured_step(problem, device),
    )
    workspaces = _backward_workspaces(problem, config, columns) + bias.workspaces
    ceiling = _backward_ceiling(problem, config)
    return Plan(problem, device, "sm90", launches, workspaces, reason, ceiling=ceiling, bias_parts=bias.parts)


def _listed(problem: Problem, device: Device, config: BackwardConfig) -> BackwardConfig | None:
    """The config of ``backward/listed_sm90.cuh``, where it walks the lists: of dense tensors, and in any order.

    H200, d 64, 8k: half of the blocks empty 2661 us instead of 2827, a tenth visible 798 instead of 783. At d 128 2539
    instead of 2709 and 744 instead of 709, but a prefix LM 3392 instead of 3185: works are dealt out in turn, and the
    longest of the last head may come as a block's last.
    """
    lists = problem.block_mask is not None and problem.layout == "dense" and not problem.deterministic
    if not lists or max(problem.dim_qk, problem.dim_v) > 64 or config.bias_copies != "NoBias":
        return None
    row_qk, row_v = (128 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    keys = config.tile_kv * (row_qk + row_v)
    queries = config.stages * (config.tile_q * (row_qk + row_v) + _row_tile(config.tile_q))
    inputs = round_up(keys + queries + 8 * (2 * 2 * config.stages + 2), 1024)
    smem = inputs + 2 * config.tile_q * config.tile_kv * 2 + keys + 1024  # of which rings and works take less
    return None if smem > device.smem_per_block else replace(config, copied_sums=False, smem_bytes=smem)


def _backward_workspaces(problem: Problem, config: BackwardConfig, columns: int) -> tuple[Workspace, ...]:
    """Row sums, and of every query tile what its rows need, dq in fp32, and whose turn it is to add to it."""
    q_tiles = problem.heads_q * packed_tiles(problem, config.tile_q)
    workspaces = (
        *steps.row_workspaces(problem),
        Workspace("row_tiles", np.dtype(np.uint8), (q_tiles, _row_tile(config.tile_q))),
        Workspace("dq_accum", np.dtype(np.float32), (q_tiles, config.tile_q, columns)),
    )
    if problem.deterministic:
        shares = 2 if config.tile_q == 128 else columns // 64
        workspaces += (Workspace("dq_turn", np.dtype(np.int32), (q_tiles, shares)),)
    return workspaces


def _backward_ceiling(problem: Problem, config: BackwardConfig) -> Ceiling:
    """The ceiling of ``backward/sm90.cuh``: S, dP and dQ with both operands in shared memory, dK and dV with one."""
    dim_qk, dim_v = (
        round_up(dim, 16) if config.slices == 1 else 64 * -(-dim // (64 * config.slices))
        for dim in (problem.dim_qk, problem.dim_v)
    )
    size, pairs = problem.dtype.itemsize, config.tile_q * config.tile_kv
    consumers = config.tile_kv // _ROWS  # each reads the queries anew for S, dP, dK and dV
    queries, keys = config.tile_q * (dim_qk + dim_v), config.tile_kv * (dim_qk + dim_v)
    # dQ: two warpgroups, each all of dS and half the columns of K, or half of dS and all of K.
    halves = 2 * config.tile_q * config.tile_kv + config.tile_kv * dim_qk
    if config.tile_q == 128:
        halves = config.tile_q * config.tile_kv + 2 * config.tile_kv * dim_qk
    handed = pairs * 2 * 4 * (3 if config.slices > 1 else config.tile_kv == _ROWS)  # P, addends, written and read
    traffic = (2 * consumers * queries + keys + halves + queries + pairs) * size + handed
    return Ceiling(
        tensor_cores=2 * pairs * (3 * dim_qk + 2 * dim_v) / _FLOPS,
        exponentials=pairs / _EXPONENTIALS,
        shared_memory=traffic / _SMEM_BYTES,
    )


def _leave_to_sm80(problem: Problem, device: Device) -> list[str]:
    """Why a problem is left to ``sm80``: decoding, where heads share a tile or blocks the keys, or what has no tile."""
    if query_blocks(problem, _ROWS) >= 2**31:
        return ["2^31 query tiles or more"]
    if problem.tangents is not None:
        return _leave_tangents_to_sm80(problem)
    if sm90_wide.is_wide(problem):
        return sm90_wide.leave(problem)
    if alone := sm90_wide.of_wide_alone(problem):
        return alone
    if problem.page_size % _LEAST_ROWS:
        return [f"no boxes of pages whose size, {problem.page_size}, is no multiple of {_LEAST_ROWS}"]
    if problem.page_size and problem.leftpad:
        return ["no boxes of pages that a sequence begins in the middle of"]
    if problem.block_mask is not None and (problem.page_size or problem.layout == "cache"):
        return ["no boxes of caches beside lists of blocks"]
    if problem.block_mask is not None and not _walks_whole_blocks(problem, device):
        return ["its tiles reach over several blocks of the mask, those of sm80 do not"]
    if problem.direction == "backward":
        if _short_backward(problem, device) is None and short_backward(problem, device) is not None:
            return ["sm80 serves short sequences better"]
        if problem.score_mod is not None and max(problem.dim_qk, problem.dim_v) > 128:
            return ["the assembler serialises products beside a written score of more than 128 columns"]
        if turns := lists_without_turns(problem):
            return turns
        if problem.captured_gradients and not policies.learns_distances(problem):
            return ["no gradients of numbers that are read by more than the distance, or not added to the score"]
        # Its two warpgroups share dq's columns, of which there must be two chunks of 64 or a tile of 128 queries.
        return ["dim_v > 64 beside dim_qk <= 64"] if problem.dim_qk <= 64 < problem.dim_v <= 128 else []
    if short_forward(problem, device) is not None:
        return ["sm80 serves short sequences better"]
    if problem.len_q > _ROWS or (_groups_rows(problem) and problem.len_kv >= _LEAST_PART):
        return []
    read = problem.batch * problem.heads_kv * problem.len_kv * (problem.dim_qk + problem.dim_v) * problem.dtype.itemsize
    many = problem.len_q * problem.group > 32  # rows for sm80's kernel of few
    if _packs_heads(problem) and (many or (read >= _LEAST_READ and _reads_faster(problem))):
        return []
    division = forward_division(problem, device)
    return [] if division.plain else [f"sm80 serves few queries better ({division.reason})"]


def _reads_faster(problem: Problem) -> bool:
    """Whether few rows over long keys are read faster by boxes than by the rows of ``sm80``'s kernel.

    H200, 8 caches of 8k keys, pages of 16, 64 and 256: 74.8, 73.0 and 71.3 us, by rows 76.6, 78.3 and 75.9. 64 of 4k:
    265.4, 254.0 and 254.8, by rows 264.1, 261.4 and 259.6; of unequal lengths in pages of 16 598 and 573. Two kernels,
    though: with what appends to a cache there would be three.
    """
    return problem.layout == "dense" or (problem.page_size % _ROWS == 0 and not steps.append_step(problem))


def _leave_tangents_to_sm80(problem: Problem) -> list[str]:
    """The same of a forward with tangents."""
    reasons = []
    if not {"q", "k", "v"} <= {*(problem.tangents or ())}:
        reasons.append("no tangents but along all of q, k and v")
    if max(problem.dim_qk, problem.dim_v) > 128:
        reasons.append("no tangents of heads over 128")
    if problem.mask.tensor or problem.bias or problem.dropout or problem.written:
        reasons.append("no registers for tangents beside a boolean mask, a bias, dropout or a written score or mask")
    if not reasons and problem.len_q <= _ROWS:
        reasons.append("sm80 serves few queries better")
    return reasons


def _walks_whole_blocks(problem: Problem, device: Device) -> bool:
    """Whether tiles fit the blocks of a mask, or those of ``sm80`` do not either."""

    def fits(steps: tuple[Step, ...]) -> bool:
        configs = [step.config for step in steps if step.walks]
        return all(isinstance(x, AttentionConfig) and fits_blocks(problem, x.tile_q, x.tile_kv) for x in configs)

    make = _forward if problem.direction == "forward" else _backward
    return fits(make(problem, device).steps) or not fits(SM80.plan(problem, device).steps)


SM90 = Family(
    name="sm90",
    summary="warpgroup tensor cores by wgmma, fed by bulk copies, with gradients of heads up to 512",
    min_capability=(9, 0),
    only=True,
    dtypes=("fp16", "bf16"),
    max_dim=sm90_wide.MOST_QK,
    features=(
        "backward", "varlen", "causal", "window", "boolean mask", "softcap", "alibi", "bias", "bias gradient",
        "written score", "written mask", "captured gradient", "block mask", "sink", "dropout", "gqa", "dim_v != dim_qk",
        "deterministic", "tangents", "split keys", "paged",
    ),
    caches=True,
    forward=_forward,
    backward=_backward,
    leave=_leave_to_sm80,
)  # fmt: skip
