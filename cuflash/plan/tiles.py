"""Tile tables: how each kernel cuts a problem, what that costs in shared memory, and why these numbers.

The shared-memory formulas restate the kernels' ``SmemPlan`` structs; a kernel whose ``sizeof`` differs does not
compile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuflash.device import Device
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile of one kernel."""

    tile_q: int
    tile_kv: int
    threads: int
    smem_bytes: int
    stages: int = 1
    dim_splits: int = 1
    blocks_per_sm: int = 1
    ping_pong: bool = False
    row_buffers: int = 1
    producer_registers: int = 0
    consumer_registers: int = 0
    reason: str = ""


def round_up(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


def _shared_tile(rows: int, cols: int) -> int:
    """Bytes of a ``SharedTile`` (tile/shared.cuh): 16-bit elements, each row padded by eight."""
    return rows * (cols + 8) * 2


def _resident(smem_bytes: int, threads: int, registers: int, device: Device) -> int:
    """Blocks of this size that one multiprocessor holds; 1 KB of shared memory is reserved for each."""
    by_smem = device.smem_per_sm // (smem_bytes + 1024)
    by_registers = 65536 // (threads * registers)
    return max(1, min(by_smem, by_registers))


SM90_ROWS = 64
"""Query rows of a consumer warpgroup of ``forward/sm90.cuh``: those of one wgmma."""

_SM90_REGISTERS = {2: (24, 240), 3: (32, 160), 4: (24, 112)}
"""Consumers -> registers of a producer and of a consumer thread: what a launch gives a block, and ``setmaxnreg``, which
counts in eights, may share out."""

_LEAST_HEADS = 32
_L2_BYTES = 32 << 20
"""Of the 50 MB of an H100's L2 cache, what keys and values may fill beside q and out."""


def forward_sm90(problem: Problem, device: Device) -> Tile:
    """The tile of ``forward/sm90.cuh``: consumers of 64 query rows each, and a producer some kv tiles ahead."""
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
        smem = _sm90_smem(problem, consumers, tile_kv, stages, row_buffers)
        if smem <= device.smem_per_block:
            break
    producer, consumer = _SM90_REGISTERS[consumers]
    return Tile(
        tile_q=consumers * SM90_ROWS,
        tile_kv=tile_kv,
        threads=128 * (1 + consumers),
        smem_bytes=smem,
        stages=stages,
        ping_pong=ping_pong,
        row_buffers=row_buffers,
        producer_registers=producer,
        consumer_registers=consumer,
        reason=reason,
    )


def _sm90_smem(problem: Problem, consumers: int, tile_kv: int, stages: int, row_buffers: int) -> int:
    """Bytes of ``ForwardSm90::SmemPlan``: chunks of 64 columns, 128 bytes a row, and mbarriers."""
    row_qk, row_v = (128 * -(-dim // 64) for dim in (problem.dim_qk, problem.dim_v))
    rows = row_buffers * max(row_qk, row_v)
    barriers = 2 * (row_buffers * consumers + 2 * stages)  # full and empty
    works = 2 * (2 * 8 + 3 * 4)
    tiles = consumers * SM90_ROWS * rows + stages * tile_kv * (row_qk + row_v)
    smem = round_up(tiles + 8 * barriers + works, 1024)
    if problem.bias and problem.copies_bias:  # LoadedBias::Buffers of tile/bias.cuh
        rows = 8 if problem.bias_broadcast[2] else consumers * SM90_ROWS
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


def forward_sm80(problem: Problem, device: Device) -> Tile:
    """The tile of ``forward/sm80.cuh``."""
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
    # 32 rows a warp halve the shared-memory reads per product against 16; wide heads leave registers for 16 only.
    if problem.mask.tensor or problem.bias is not None or problem.dropout == "word":
        candidates = [(64, 64, 128, "16 rows a warp: the addresses of another tensor need the registers")]
    elif problem.dropout is not None or (problem.alibi and max(dim_qk, dim_v) <= 64):
        candidates = [(128, 64, 128, "32 rows a warp, 64 keys")] if max(dim_qk, dim_v) <= 128 else [(128, 64, 256, "")]
    elif max(dim_qk, dim_v) <= 64:
        # H200, 8k, d 64: 316 TFLOP/s; with 64 keys 284 (two blocks an SM) and 298 (three).
        candidates = [(128, 128, 128, "32 rows a warp, 128 keys: few barriers and row reductions a score")]
    elif max(dim_qk, dim_v) <= 128:
        # H200, 8k, d 128: 349 TFLOP/s; 64 x 64 292, 128 x 32 306, 16 rows a warp 234.
        candidates = [(128, 64, 128, "32 rows a warp, 64 keys: out and S fit in 255 registers, two blocks an SM")]
    else:
        candidates = [(128, 64, 256, "16 rows a warp: 256 columns of out take 128 registers")]
    candidates += [(64, 64, 128, "the largest that fits")]
    for tile_q, tile_kv, threads, reason in candidates:
        smem = _shared_tile(tile_q, max(dim_qk, dim_v)) + _shared_tile(tile_kv, dim_qk) + _shared_tile(tile_kv, dim_v)
        if smem <= device.smem_per_block:
            blocks = _resident(smem, threads, 255, device)
            return Tile(tile_q, tile_kv, threads, smem, blocks_per_sm=blocks, reason=reason)
    raise AssertionError(f"no forward tile of {problem} fits {device}")


def small_forward_sm80(problem: Problem, device: Device) -> Tile:
    """The tile of ``forward/sm80.cuh`` where rows are few or keys are split."""
    tile_q, tile_kv, threads = 64, 64, 128
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
    smem = _shared_tile(tile_q, max(dim_qk, dim_v)) + _shared_tile(tile_kv, dim_qk) + _shared_tile(tile_kv, dim_v)
    blocks = _resident(smem, threads, 255, device)
    return Tile(tile_q, tile_kv, threads, smem, blocks_per_sm=blocks, reason="the smallest: few rows, or few keys each")


def backward_sm80(problem: Problem, device: Device) -> Tile:
    """The tile of ``backward/sm80.cuh``, whose dq rows ``backward/convert.cuh`` shares."""
    widest = max(problem.dim_qk, problem.dim_v)
    if widest <= 64:
        # H200, 8k, d 64: 280 TFLOP/s; 16 key rows a warp 236, 64 keys 235; 64 queries 290, but they spill 350 bytes.
        candidates = [(32, 128, 128, 2, 1, "32 key rows a warp halve the shared-memory reads per product against 16")]
    elif widest <= 128:
        # H200, 8k, d 128: 284 TFLOP/s; with two stages 266, 64 keys 264, 32 queries 238.
        candidates = [
            (64, 128, 256, 1, 1, "dk and dv take 128 registers, S and dP 64"),
            (64, 64, 128, 1, 1, "the largest that fits"),
        ]
    else:
        # H200, 8k, d 256: 198 TFLOP/s; 64 keys 149, and with 32 queries 172.
        candidates = [
            (64, 128, 256, 1, 2, "two blocks share the columns of dk and dv, which else overflow the registers"),
            (64, 64, 128, 1, 2, "the largest that fits"),
            (16, 64, 128, 1, 2, "16 query rows: what fits in 99 KB"),
        ]
    for tile_q, tile_kv, threads, stages, splits, reason in candidates:
        smem = backward_sm80_smem(problem, tile_q, tile_kv, threads, stages, splits)
        if smem <= device.smem_per_block:
            return Tile(tile_q, tile_kv, threads, smem, stages=stages, dim_splits=splits, reason=reason)
    raise AssertionError(f"no backward tile of {problem} fits {device}")


def dq_columns(dim_qk: int, tile_q: int, threads: int, splits: int) -> int:
    """Columns of q and k in the backward's shared memory and in dq_accum (``DqAccum::kDimQk``)."""
    warps = threads // 32
    widest = 4 if dim_qk % (64 * splits) == 0 else 2
    warps_across = warps // min(warps // widest, tile_q // 16)
    return round_up(dim_qk, 16 * warps_across * splits)


def backward_sm80_smem(problem: Problem, tile_q: int, tile_kv: int, threads: int, stages: int, splits: int) -> int:
    """Bytes of ``BackwardSm80::SmemPlan``."""
    dim_qk = dq_columns(problem.dim_qk, tile_q, threads, splits)
    dim_v = round_up(problem.dim_v, 16 * splits)
    stage = _shared_tile(tile_q, dim_qk) + _shared_tile(tile_q, dim_v) + 3 * 4 * tile_q
    return _shared_tile(tile_kv, dim_qk) + _shared_tile(tile_kv, dim_v) + _shared_tile(tile_kv, tile_q) + stages * stage


def bias_sm80(problem: Problem) -> Tile:
    """The tile of ``backward/bias.cuh``: a square that fits every architecture."""
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
    edge = 64 if max(dim_qk, dim_v) <= 128 else 32
    smem = 2 * (_shared_tile(edge, dim_qk) + _shared_tile(edge, dim_v)) + edge * (edge + 1) * 4
    return Tile(edge, edge, 2 * edge, smem, reason="recomputes dS for each element of the bias")


def bias_simt(problem: Problem) -> Tile:
    """The tile of ``backward/bias_simt.cuh``."""
    edge, threads, size = 64, 256, problem.dtype.accumulator.itemsize
    smem = simt_operands(problem, edge, edge) + edge * (edge + 1) * size
    return Tile(edge, edge, threads, smem, reason="recomputes dS for each element of the bias")


def convert_smem(problem: Problem, tile: Tile) -> int:
    """Bytes of ``BackwardConvert::SmemPlan``."""
    return _shared_tile(tile.tile_q, dq_columns(problem.dim_qk, tile.tile_q, tile.threads, tile.dim_splits))


SIMT_COLS = 64
"""Rows of the other side that a simt block walks at a time."""


def forward_simt(problem: Problem, device: Device) -> Tile:
    """The tile of ``forward/simt.cuh``."""
    candidates = [
        (128, 64, 128, 168, "4 x 8 scores a thread; up to three blocks an SM load and multiply by turns"),
        (256, 32, 128, 168, "64 registers of out a thread; up to three blocks an SM load and multiply by turns"),
        (512, 32, 128, 255, "128 registers of out a thread"),
        (1024, 32, 256, 255, "128 registers of out a thread"),
        (2048, 16, 256, 255, "64 registers of out a thread"),
        (4096, 8, 256, 255, "64 registers of out a thread"),
    ]
    return _simt(candidates, problem, device)


def backward_simt(problem: Problem, device: Device) -> Tile:
    """The tile of ``backward/simt.cuh``: dk's and dv's; dq's has queries and keys exchanged."""
    candidates = [
        (64, 32, 128, 128, "4 x 4 scores a thread; up to four blocks an SM load and multiply by turns"),
        (128, 32, 128, 168, "4 x 4 scores a thread; up to three blocks an SM load and multiply by turns"),
        (256, 32, 128, 255, "128 registers of dk and dv a thread"),
        (512, 32, 256, 255, "128 registers of dk and dv a thread"),
        (1024, 16, 256, 255, "128 registers of dk and dv a thread"),
        (4096, 8, 256, 255, "at most 128 registers of dk and dv a thread"),
    ]
    tile = _simt(candidates, problem, device)
    return replace(tile, tile_q=tile.tile_kv, tile_kv=tile.tile_q)


def _simt(candidates: list[tuple[int, int, int, int, str]], problem: Problem, device: Device) -> Tile:
    """The first candidate (dim, rows, threads, registers, reason) that is wide enough, its rows being queries.

    The dim is the widest whose sums the registers hold in fp32.
    """
    # A double takes two registers; exp2 and 1 / x of doubles, another tensor's addresses and random numbers still more.
    double = problem.dtype.accumulator.itemsize == 8
    crowded = double or problem.mask.tensor or problem.bias is not None or problem.dropout is not None
    dim = max(problem.dim_qk, problem.dim_v) * (4 if double else 1)
    _, rows, threads, registers, reason = next(each for each in candidates if dim <= each[0])
    smem = simt_smem(problem, rows, threads)
    blocks = _resident(smem, threads, 255 if crowded else registers, device)
    return Tile(rows, SIMT_COLS, threads, smem, blocks_per_sm=blocks, reason=reason)


def simt_smem(problem: Problem, rows: int, threads: int) -> int:
    """Bytes of ``SimtBlock::SmemPlan`` (tile/gemm_simt.cuh), and of ``BackwardSimt::Inputs`` beside it."""
    size, cols = problem.dtype.accumulator.itemsize, SIMT_COLS
    pack, across = 16 // size, min(32, 4 * threads // rows)
    widest_row = round_up(max(problem.dim_qk, problem.dim_v), across)
    staged_rows = cols
    while staged_rows > pack and staged_rows * widest_row * size > 16384:
        staged_rows //= 2
    weighted = (rows * (cols + across) + staged_rows * widest_row) * size
    inputs = 112 if problem.direction == "backward" else 0
    return max(simt_operands(problem, rows, cols), weighted) + inputs


def simt_operands(problem: Problem, rows: int, cols: int) -> int:
    """Bytes of ``SimtBlock::Operands``."""
    size = problem.dtype.accumulator.itemsize
    staged_cols = max(round_up(-(-dim // -(-dim * size // 256)), 8) for dim in (problem.dim_qk, problem.dim_v))
    return (rows + cols) * (staged_cols + 16 // size) * size
