"""The gradient of a broadcast bias on Ampere and later (``backward/bias_sm80.cuh``): tiles, shared memory, config."""

from __future__ import annotations

from dataclasses import dataclass, field

from cuflash.device import Device
from cuflash.plan import policies
from cuflash.plan.bias import BiasSum, bias_sum, is_in_place
from cuflash.plan.config import HEADER, CopyConfig
from cuflash.plan.families import simt
from cuflash.plan.families.sm80_tiles import halves, held_bias, operand_tile, rounded
from cuflash.plan.tiles import resident, round_up
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasConfig(CopyConfig):
    """``bwd_bias_sm80``. Its score is that of q.k without the bias."""

    bias: str = field(metadata={HEADER: "element.cuh"})
    """Element type of the bias."""
    halves: int
    """As of the forward."""
    stages: int
    """Visits in flight."""


def sum_bias_gradient(problem: Problem, device: Device) -> BiasSum:
    """The launches of ``backward/bias.cuh`` by ``bwd_bias_sm80``."""
    if problem.bias is None or not problem.bias_grad or is_in_place(problem):
        return BiasSum()
    if problem.dtype.itemsize == 8:
        return simt.sum_bias_gradient(problem, device)
    edge_q, edge_kv = (_bias_edge(n) for n in (problem.len_q, problem.len_kv))
    # The largest tile reads the fewest rows for a pair, and the second stage hides how long that takes.
    candidates = ((edge_q, edge_kv, 2), (edge_q, edge_kv, 1), (64, 64, 2), (64, 64, 1), (32, 32, 1))
    tile_q, tile_kv, stages, smem = next(
        (*tile, smem) for tile in candidates if (smem := _bias_smem(problem, *tile)) <= device.smem_per_block
    )
    threads = {128 * 128: 256, 32 * 32: 64}.get(tile_q * tile_kv, 128)
    config = BiasConfig(
        **policies.policies(problem)
        | {"score": policies.score_without_bias(problem), "mask": policies.mask_without_lists(problem)},
        tile_q=tile_q,
        tile_kv=tile_kv,
        threads=threads,
        blocks_per_sm=resident(smem, threads, 168 if tile_q * tile_kv <= 64 * 64 else 255, device),
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
        bias=problem.bias.cuda,
        halves=halves(problem),
        stages=stages,
    )
    return bias_sum(problem, device, "bwd_bias_sm80", config)


def _bias_edge(length: int) -> int:
    """Edge of a tile of the bias: 128 unless a quarter more of padding would come with it."""
    return 128 if 4 * round_up(length, 128) <= 5 * round_up(length, 64) else 64


def _bias_smem(problem: Problem, tile_q: int, tile_kv: int, stages: int) -> int:
    """Bytes of ``BackwardBias::SmemPlan`` with ``BiasTileSm80``."""
    bias = held_bias(problem, tile_q, tile_kv)
    rows = sum(operand_tile(problem, tile, dim) for tile in (tile_q, tile_kv) for dim in rounded(problem))
    return max(bias + stages * (rows + 3 * 4 * tile_q), tile_q * (tile_kv + 1) * 4)
