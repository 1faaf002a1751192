"""Counts of tiles, and of what a multiprocessor holds of them: what the plans of all families share.

How each kernel cuts a problem, what that costs in shared memory, and why, is in its family's file.
"""

from __future__ import annotations

from cuflash.device import Device
from cuflash.problem import Problem


def round_up(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


def tiles(longest: int, tile: int) -> int:
    """Tiles of the longest sequence; never 0, so that outputs of empty sequences are still written."""
    return max(1, -(-longest // tile))


def packed_tiles(problem: Problem, tile_q: int) -> int:
    """Query tiles of all sequences where each starts a new one: ``num_q_tiles`` of ``attention/sequence.cuh``."""
    if problem.layout == "varlen":  # as many as there may be, whatever the lengths are
        return problem.total_q // tile_q + problem.batch
    return problem.batch * -(-problem.len_q // tile_q)


def fits_blocks(problem: Problem, tile_q: int, tile_kv: int) -> bool:
    """Whether no tile reaches over several blocks of a block mask: empty ones would be computed with visible ones."""
    return problem.block_mask is None or not any(
        block % tile for block, tile in zip(problem.block_mask.size, (tile_q, tile_kv), strict=True)
    )


def query_blocks(problem: Problem, tile_q: int) -> int:
    """Blocks of a kernel that has one for each query tile of each head."""
    return tiles(problem.len_q, tile_q) * problem.heads_q * problem.batch


def key_blocks(problem: Problem, tile_kv: int) -> int:
    """Blocks of a kernel that has one for each key tile of each key head."""
    return tiles(problem.len_kv, tile_kv) * problem.heads_kv * problem.batch


def resident(smem_bytes: int, threads: int, registers: int, device: Device) -> int:
    """Blocks of this size that one multiprocessor holds; 1 KB of shared memory is reserved for each."""
    by_smem = device.smem_per_sm // (smem_bytes + 1024)
    by_registers = 65536 // (threads * registers)
    return max(1, min(by_smem, by_registers))
