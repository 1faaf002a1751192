"""Any architecture, on plain fused multiply-adds: tiles, shared memory, plans.

The shared-memory formulas restate the kernels' ``SmemPlan`` structs; a kernel whose ``sizeof`` differs does not
compile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from cuflash.device import Device
from cuflash.features import FEATURES
from cuflash.plan import policies, steps
from cuflash.plan.bias import BiasSum, bias_sum, gradient_policy
from cuflash.plan.config import BIAS_GRADIENT, CAPTURED_GRADIENT, CopyConfig, ForwardConfig, JvpConfig
from cuflash.plan.family import Family
from cuflash.plan.plan import Plan, Step
from cuflash.plan.tiles import key_blocks, query_blocks, resident, round_up
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class DqConfig(CopyConfig):
    """``bwd_simt_dq``."""

    bias_gradient: str = field(default="NoBiasGradient", metadata=BIAS_GRADIENT)
    captured_gradient: str = field(default="NoCapturedGradient", metadata=CAPTURED_GRADIENT)


_COLS = 64
"""Rows of the other side that a block walks at a time."""

_Candidate = tuple[int, int, int, int, str]
"""The widest dim whose sums the registers hold in fp32; rows of a block, threads, registers of a thread; why."""

_FORWARD: tuple[_Candidate, ...] = (
    (128, 64, 128, 168, "4 x 8 scores a thread; up to three blocks an SM load and multiply by turns"),
    (256, 32, 128, 168, "64 registers of out a thread; up to three blocks an SM load and multiply by turns"),
    (512, 32, 128, 255, "128 registers of out a thread"),
    (1024, 32, 256, 255, "128 registers of out a thread"),
    (2048, 16, 256, 255, "64 registers of out a thread"),
    (4096, 8, 256, 255, "64 registers of out a thread"),
)
_TWO_SUMS: tuple[_Candidate, ...] = (
    (64, 32, 128, 128, "4 x 4 scores a thread; up to four blocks an SM load and multiply by turns"),
    (128, 32, 128, 168, "4 x 4 scores a thread; up to three blocks an SM load and multiply by turns"),
    (256, 32, 128, 255, "128 registers of both sums a thread"),
    (512, 32, 256, 255, "128 registers of both sums a thread"),
    (1024, 16, 256, 255, "128 registers of both sums a thread"),
    (4096, 8, 256, 255, "at most 128 registers of both sums a thread"),
)


class _Tile(TypedDict):
    """What one candidate makes of a config."""

    tile_q: int
    tile_kv: int
    threads: int
    blocks_per_sm: int
    smem_bytes: int


def _tile(candidates: tuple[_Candidate, ...], problem: Problem, device: Device) -> tuple[_Tile, str]:
    """The first candidate that is wide enough, its rows being queries; and why."""
    # A double takes two registers; exp2 and 1 / x of doubles, another tensor's addresses and random numbers still more.
    double = problem.dtype.accumulator.itemsize == 8
    crowded = double or problem.mask.tensor or problem.bias is not None or problem.dropout is not None
    crowded = crowded or problem.written
    dim = max(problem.dim_qk, problem.dim_v) * (4 if double else 1)
    _, rows, threads, registers, reason = next(candidate for candidate in candidates if dim <= candidate[0])
    smem = _smem(problem, rows, threads)
    blocks = resident(smem, threads, 255 if crowded else registers, device)
    return _Tile(tile_q=rows, tile_kv=_COLS, threads=threads, blocks_per_sm=blocks, smem_bytes=smem), reason


def _smem(problem: Problem, rows: int, threads: int) -> int:
    """Bytes of ``SimtBlock::SmemPlan`` (tile/gemm_simt.cuh), and of ``BackwardSimt::Inputs`` beside it."""
    size, cols = problem.dtype.accumulator.itemsize, _COLS
    pack, across = 16 // size, min(32, 4 * threads // rows)
    widest_row = round_up(max(problem.dim_qk, problem.dim_v), across)
    staged_rows = cols
    while staged_rows > pack and staged_rows * widest_row * size > 16384:
        staged_rows //= 2
    weighted = (rows * (cols + across) + staged_rows * widest_row) * size
    inputs = 112 if problem.direction == "backward" else 0
    return max(_operands(problem, rows, cols), weighted) + inputs


def _operands(problem: Problem, rows: int, cols: int) -> int:
    """Bytes of ``SimtBlock::Operands``."""
    size = problem.dtype.accumulator.itemsize
    staged_cols = max(round_up(-(-dim // -(-dim * size // 256)), 8) for dim in (problem.dim_qk, problem.dim_v))
    return (rows + cols) * (staged_cols + 16 // size) * size


def sum_bias_gradient(problem: Problem, device: Device) -> BiasSum:
    """The launches of ``backward/bias.cuh`` by ``bwd_bias_simt``."""
    edge, threads = 64, 256
    smem = max(_operands(problem, edge, edge), edge * (edge + 1) * problem.dtype.accumulator.itemsize)
    config = CopyConfig(
        **policies.policies(problem) | {"mask": policies.mask_without_lists(problem)},
        tile_q=edge,
        tile_kv=edge,
        threads=threads,
        blocks_per_sm=resident(smem, threads, 128 if problem.dtype.accumulator.itemsize == 4 else 255, device),
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
    )
    return bias_sum(problem, device, "bwd_bias_simt", config)


def _forward(problem: Problem, device: Device) -> Plan:
    if problem.tangents is not None:
        return _jvp(problem, device)
    tile, reason = _tile(_FORWARD, problem, device)
    config = ForwardConfig(
        **policies.policies(problem),
        **tile,
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
    )
    return steps.forward(problem, device, "simt", (config, reason))


def _jvp(problem: Problem, device: Device) -> Plan:
    tile, reason = _tile(_TWO_SUMS, problem, device)
    config = JvpConfig(
        **policies.policies(problem),
        **tile,
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
        tangent_bias=policies.tangent_bias(problem),
    )
    return steps.jvp(problem, device, "simt", config, reason)


def _backward(problem: Problem, device: Device) -> Plan:
    tile, reason = _tile(_TWO_SUMS, problem, device)
    # No block adds to another's rows, so the gradients are always deterministic and the config need not say so.
    common = policies.policies(problem), policies.copy_bytes(problem)
    dq = DqConfig(
        **common[0],
        **tile,
        copy_bytes=common[1],
        bias_gradient=gradient_policy(problem),
        captured_gradient=policies.captured_gradient(problem, in_fragments=False),
    )
    # Either kernel owns as many rows.
    dkdv = CopyConfig(**common[0], **tile | {"tile_q": dq.tile_kv, "tile_kv": dq.tile_q}, copy_bytes=common[1])
    bias = sum_bias_gradient(problem, device)
    launches = (
        steps.delta_step(problem),
        Step("bwd_simt_dkdv", "BwdParams", dkdv, key_blocks(problem, dkdv.tile_kv), walks="q"),
        Step("bwd_simt_dq", "BwdParams", dq, query_blocks(problem, dq.tile_q), walks="kv"),
        *bias.steps,
        *steps.sink_step(problem),
        *steps.captured_step(problem, device),
    )
    workspaces = steps.row_workspaces(problem) + bias.workspaces
    return Plan(problem, device, "simt", launches, workspaces, reason, bias_parts=bias.parts)


SIMT = Family(
    name="simt",
    summary="plain fused multiply-adds",
    min_capability=(7, 0),
    dtypes=("fp16", "bf16", "fp32", "fp64"),
    max_dim=1024,
    features=tuple(FEATURES),
    caches=True,
    forward=_forward,
    backward=_backward,
)
