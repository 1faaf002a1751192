"""Hopper, on warpgroup tensor cores by wgmma, fed by bulk copies: tiles, shared memory, configs, plans.

The shared-memory formulas restate the kernels' ``SmemPlan`` structs; a kernel whose ``sizeof`` differs does not
compile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cuflash.device import Device
from cuflash.plan import policies, steps
from cuflash.plan.ceiling import Ceiling
from cuflash.plan.config import HEADER, AttentionConfig
from cuflash.plan.families.sm80 import forward_division
from cuflash.plan.family import Family
from cuflash.plan.plan import Box, Plan, Step, Workspace
from cuflash.plan.tiles import query_blocks, round_up
from cuflash.problem import Problem

_ROWS = 64
"""Query rows of a consumer warpgroup of ``forward/sm90.cuh``: those of one wgmma."""

_REGISTERS = {2: (24, 240), 3: (32, 160), 4: (24, 112)}
"""Consumers -> registers of a producer and of a consumer thread: what a launch gives a block, and ``setmaxnreg``, which
counts in eights, may share out."""

_LEAST_HEADS = 32
_L2_BYTES = 32 << 20
"""Of the 50 MB of an H100's L2 cache, what keys and values may fill beside q and out."""

_FLOPS, _EXPONENTIALS, _SMEM_BYTES = 4096, 16, 128
"""What a multiprocessor does in a cycle: 16-bit multiply-adds twice, exponentials, bytes of shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig(AttentionConfig):
    """``fwd_sm90``."""

    sink: str = field(default="NoSink", metadata={HEADER: "attention/softmax.cuh"})
    """NoSink, LearnableSink."""
    bias_copies: str = field(default="NoBias", metadata={HEADER: "tile/bias.cuh"})
    """NoBias, BiasTiles, BiasRow."""
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
    dim = round_up(max(problem.dim_qk, problem.dim_v), 16)
    full = problem.mask.kind == "none"
    crowded = problem.dropout or problem.mask.tensor or (problem.bias is not None and not problem.copies_bias)
    scored = crowded or problem.softcap or problem.alibi or problem.bias is not None
    if dim > 128:
        consumers, tile_kv, reason = 2, 64, "two consumers: out takes up to 128 registers, S 32"
    elif crowded or (dim > 64 and scored and not problem.softcap):
        consumers, tile_kv = 2, 128
        reason = "two consumers: what else makes a score needs more registers than more consumers have"
    elif dim > 64:
        consumers, tile_kv, reason = 3, 64, "three consumers read k and v once for 192 rows"
    else:
        consumers, tile_kv = 4, 64
        reason = "four consumers read k and v once for 256 rows; S, P and out fit in 112 registers"
    # With turns, softmaxes run under the products of others; without, no consumer visits what only others' rows see.
    ping_pong = full or problem.copies_bias or tile_kv == 128
    # H200, d 128: a second q, which hides the end of a work behind the next one, gives 1 % at 8k and 7 % at 1k.
    # Half the keys are for a bias in fp32 beside large heads.
    choices = ((tile_kv, 4, 2), (tile_kv, 3, 2), (tile_kv, 2, 2), (tile_kv, 2, 1), (tile_kv // 2, 2, 1))
    for tile_kv, stages, row_buffers in choices:
        smem = _forward_smem(problem, consumers, tile_kv, stages, row_buffers)
        if smem <= device.smem_per_block:
            break
    producer, consumer = _REGISTERS[consumers]
    config = ForwardConfig(
        **policies.policies(problem),
        tile_q=consumers * _ROWS,
        tile_kv=tile_kv,
        threads=128 * (1 + consumers),
        smem_bytes=smem,
        sink=policies.sink(problem),
        stages=stages,
        ping_pong=ping_pong,
        row_buffers=row_buffers,
        producer_registers=producer,
        consumer_registers=consumer,
    )
    return _with_bias_copies(config, problem), reason


def _with_bias_copies(config: ForwardConfig, problem: Problem) -> ForwardConfig:
    """The same config with a bias that is copied beside the keys instead of a term of the score, where it can be."""
    if problem.bias is None or not problem.copies_bias:
        return config
    score = policies.score(replace(problem, bias=None))
    copies = f"{'BiasRow' if problem.bias_broadcast[2] else 'BiasTiles'}<{problem.bias.cuda}>"
    return replace(config, score=score if problem.alibi else f"NaturalScore<{score}>", bias_copies=copies)


def _forward_smem(problem: Problem, consumers: int, tile_kv: int, stages: int, row_buffers: int) -> int:
    """Bytes of ``ForwardSm90::SmemPlan``: chunks of 64 columns, 128 bytes a row, and mbarriers."""
    row_qk, row_v = (128 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    rows = row_buffers * max(row_qk, row_v)
    barriers = 2 * (row_buffers * consumers + 2 * stages)  # full and empty
    works = 2 * (2 * 8 + 3 * 4)
    tiles = consumers * _ROWS * rows + stages * tile_kv * (row_qk + row_v)
    smem = round_up(tiles + 8 * barriers + works, 1024)
    if problem.bias and problem.copies_bias:  # LoadedBias::Buffers of tile/bias.cuh
        rows = 8 if problem.bias_broadcast[2] else consumers * _ROWS
        row = 128 * -(-tile_kv * problem.bias.itemsize // 128)
        smem += round_up(stages * (rows * row + 16), 1024)
    return smem


def heads_per_section(problem: Problem) -> int:
    """Query heads to work on together (``forward/sm90.cuh``).

    Tiles of equal length are worked on head by head. Others come longest first, of so many heads that there are long
    ones to begin with, and few enough that their keys and values meet in the L2 cache.
    """
    if problem.mask.kind == "none":
        return problem.group
    head = problem.len_kv * (problem.dim_qk + problem.dim_v) * problem.dtype.itemsize
    heads_kv = max(_LEAST_HEADS, _L2_BYTES // max(1, head))
    # Never more than there are, so that a section's works can be counted in 32 bits.
    return min(problem.group << (heads_kv.bit_length() - 1), max(1, problem.batch * problem.heads_q))


def _forward(problem: Problem, device: Device) -> Plan:
    config, reason = _forward_config(problem, device)
    works = query_blocks(problem, config.tile_q)
    if problem.layout == "varlen":  # as many tiles as there may be
        works = problem.heads_q * (problem.total_q // config.tile_q + problem.batch)
    blocks = min(works, device.num_sms)  # they go from one tile to another, and load the next while they store the last
    differ = problem.layout == "varlen" or problem.mask.kind != "none"  # tiles in length, so they are drawn
    tickets = Workspace("tickets", np.dtype(np.int32), (2,), kept=True)
    workspaces = (tickets,) if differ and blocks < works else ()
    boxes: tuple[Box, ...] = (
        Box("q", _ROWS), Box("k", config.tile_kv), Box("v", config.tile_kv), Box("out", _ROWS),
    )  # fmt: skip
    if problem.copies_bias:
        boxes += (Box("bias", 1 if problem.bias_broadcast[2] else config.tile_q),)
    launches = (*steps.rng_step(problem), Step("fwd_sm90", "FwdParams", config, blocks, boxes))
    ceiling = _forward_ceiling(problem, config)
    return Plan(problem, device, "sm90", launches, workspaces, reason, ceiling=ceiling)


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


def _leave_to_sm80(problem: Problem, device: Device) -> list[str]:
    """Why a decoding step is left to ``sm80``, where heads share a tile or blocks the keys; and what is too large."""
    if query_blocks(problem, _ROWS) >= 2**31:
        return ["2^31 query tiles or more"]
    if problem.len_q > _ROWS:
        return []
    division = forward_division(problem, device)
    return [] if division.plain else [f"sm80 serves few queries better ({division.reason})"]


SM90 = Family(
    name="sm90",
    summary="warpgroup tensor cores by wgmma, fed by bulk copies",
    min_capability=(9, 0),
    only=True,
    dtypes=("fp16", "bf16"),
    max_dim=256,
    features=(
        "varlen", "causal", "window", "boolean mask", "softcap", "alibi", "bias", "sink", "dropout", "gqa",
        "dim_v != dim_qk",
    ),
    forward=_forward,
    backward=None,
    leave=_leave_to_sm80,
)  # fmt: skip
