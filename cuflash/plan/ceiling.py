"""What the tensor cores can reach at most: a count of what one tile takes of each unit of a multiprocessor.

It knows no latencies, no instruction issue, no masks and no power, so that what is measured lies below it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.tiles import SM90_ROWS, Tile, round_up
from cuflash.problem import Problem

_FLOPS, _EXPONENTIALS, _SMEM_BYTES = 4096, 16, 128
"""What a multiprocessor of sm_90 does in a cycle: 16-bit multiply-adds twice, exponentials, bytes of shared memory."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Cycles that each unit is busy for one query tile and one kv tile."""

    tensor_cores: float
    exponentials: float
    shared_memory: float

    @property
    def share(self) -> float:
        """Of the tensor cores' peak, what the slowest unit leaves."""
        return self.tensor_cores / max(self.tensor_cores, self.exponentials, self.shared_memory)

    def __str__(self) -> str:
        others = self.exponentials / self.tensor_cores, self.shared_memory / self.tensor_cores
        return (
            f"{self.share:.0%} of the tensor cores' peak: exponentials take {others[0]:.0%} and shared memory "
            f"{others[1]:.0%} of the time of their products"
        )


def forward_sm90(problem: Problem, tile: Tile) -> Ceiling:
    """The ceiling of ``forward/sm90.cuh``: Q K^T with both operands in shared memory, P V with P in registers."""
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16)
    consumers, size = tile.tile_q // SM90_ROWS, problem.dtype.itemsize
    # Every consumer reads its own rows of q and all of k and v, which the copy engine writes once for all.
    q = tile.tile_q * dim_qk
    kv = tile.tile_kv * (dim_qk + dim_v)
    # A tile of a bias is written and read once; one row of it is next to nothing.
    bias = 0 if not problem.copies_bias or problem.bias_broadcast[2] else tile.tile_q * tile.tile_kv
    bias_bytes = 2 * bias * (problem.bias.itemsize if problem.bias else 0)
    return Ceiling(
        tensor_cores=2 * tile.tile_q * kv / _FLOPS,
        exponentials=tile.tile_q * tile.tile_kv / _EXPONENTIALS,
        shared_memory=((q + consumers * kv + kv) * size + bias_bytes) / _SMEM_BYTES,
    )
