"""Bytes of what the kernels for Ampere and later have in shared memory, by what elements are."""

from __future__ import annotations

from cuflash.dtypes import TF32
from cuflash.plan.tiles import round_up
from cuflash.problem import Problem


def shared_tile(rows: int, cols: int, itemsize: int = 2) -> int:
    """Bytes of a ``SharedTile`` (tile/shared.cuh), each row padded by eight elements."""
    return rows * (cols + 8) * itemsize


def is_wide(problem: Problem) -> bool:
    """Whether elements are floats, which the kernels take as two halves in fp16 (``tile/halves.cuh``), or doubles."""
    return problem.dtype.itemsize > 2


def halves(problem: Problem) -> int:
    """How many of the two are multiplied."""
    return 1 if problem.dtype == TF32 else 2


def _halves_tile(rows: int, cols: int) -> int:
    """Bytes of a ``HalvesTile`` (tile/halves.cuh): floats in two halves, and the scale of every row."""
    return shared_tile(rows, 2 * cols) + 4 * rows


def _double_tile(rows: int, cols: int) -> int:
    """Bytes of a ``DoubleTile`` (tile/doubles.cuh)."""
    return rows * cols * 8


def operand_tile(problem: Problem, rows: int, cols: int) -> int:
    """Bytes of a tile of q, k, v or dout, as the products of its elements take it."""
    of = {2: shared_tile, 4: _halves_tile, 8: _double_tile}
    return of[problem.dtype.itemsize](rows, cols)


def held_bias(problem: Problem, tile_q: int, tile_kv: int) -> int:
    """Bytes of a ``HeldBias::Tile`` (tile/held_bias.cuh)."""
    return tile_q * (tile_kv + 8) * problem.bias.itemsize if problem.bias else 0


def rounded(problem: Problem) -> tuple[int, int]:
    """``dim_qk`` and ``dim_v`` in whole fragments."""
    return round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
