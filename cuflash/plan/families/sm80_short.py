"""Many short sequences on Ampere and later (``sm80_short.cuh`` of the forward and the backward): configs, plans."""

from __future__ import annotations

from dataclasses import dataclass, field

from cuflash.device import Device
from cuflash.plan import policies, steps
from cuflash.plan.bias import add_parts, even_parts, gradient_policy, sums_on_the_way
from cuflash.plan.config import BIAS_GRADIENT, CAPTURED_GRADIENT, HEADER, CopyConfig
from cuflash.plan.families.sm80_bias import sum_bias_gradient
from cuflash.plan.families.sm80_tiles import held_bias, is_wide, rounded, shared_tile
from cuflash.plan.plan import Plan, Step
from cuflash.plan.tiles import resident
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortForwardConfig(CopyConfig):
    """``fwd_sm80_short``."""

    sink: str = field(default="NoSink", metadata={HEADER: "attention/softmax.cuh"})
    """NoSink, LearnableSink."""
    bias_held: str = field(default="NoHeldBias", metadata={HEADER: "tile/held_bias.cuh"})
    """NoHeldBias, HeldBias."""
    stages: int
    """Batch elements in flight."""


def _short_edge(problem: Problem, device: Device) -> int:
    """The edge of a tile that holds all queries and keys of a sequence; 0 where there is none, or others are faster.

    H200, one sequence of 64 with two heads: forward 3.3 us instead of 5.1, backward 7.5 instead of 11.4, in one launch
    instead of three.
    """
    longest = max(problem.len_q, problem.len_kv)
    few = problem.batch * problem.heads_q < 2 * device.num_sms
    widest = max(problem.dim_qk, problem.dim_v)
    if longest > (64 if few else 128) or widest > 64 or problem.block_mask or is_wide(problem):
        return 0
    return 64 if longest <= 64 else 128


def _hold_bias(problem: Problem, device: Device, edge: int, smem: int) -> tuple[str, int]:
    """The policy of a bias beside so many bytes, and the bytes of both.

    A bias that the batch shares stays in shared memory, where there is room.
    """
    held = smem + held_bias(problem, edge, edge)
    if problem.bias is None or not problem.bias_broadcast[0] or held > device.smem_per_block:
        return "NoHeldBias", smem
    return f"HeldBias<{problem.bias.cuda}>", held


def short_forward(problem: Problem, device: Device) -> ShortForwardConfig | None:
    """The config of ``forward/sm80_short.cuh`` where sequences fit in one of its tiles; else None."""
    edge = _short_edge(problem, device)
    # With one split asked for, a row's bits depend on its own sequence alone, not on how many there are.
    if not 4 * problem.len_q > edge > 0 or problem.layout == "cache" or problem.page_size or problem.num_splits:
        return None
    dim_qk, dim_v = rounded(problem)
    stage = shared_tile(edge, max(dim_qk, dim_v)) + shared_tile(edge, dim_qk) + shared_tile(edge, dim_v)
    stages, threads, registers = (2, 128, 96) if edge == 64 else (2, 256, 255)
    bias_held, smem = _hold_bias(problem, device, edge, stages * stage)
    score = policies.score(problem) if bias_held == "NoHeldBias" else policies.score_beside_bias(problem)
    if smem > device.smem_per_block:
        return None
    return ShortForwardConfig(
        **policies.policies(problem) | {"score": score},
        tile_q=edge,
        tile_kv=edge,
        threads=threads,
        blocks_per_sm=resident(smem, threads, registers, device),
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
        bias_held=bias_held,
        stages=stages,
    )


def plan_short_forward(problem: Problem, device: Device, config: ShortForwardConfig) -> Plan:
    """The launches of a forward by this config."""
    parts = even_parts(problem.heads_q, problem.batch, device.num_sms * config.blocks_per_sm)
    launches = (*steps.rng_step(problem), Step("fwd_sm80_short", "FwdParams", config, problem.heads_q * parts))
    return Plan(problem, device, "sm80", launches, (), "all queries and keys of a sequence are one tile")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortBackwardConfig(CopyConfig):
    """``bwd_sm80_short``."""

    bias_gradient: str = field(default="NoBiasGradient", metadata=BIAS_GRADIENT)
    bias_held: str = field(default="NoHeldBias", metadata={HEADER: "tile/held_bias.cuh"})
    """NoHeldBias, HeldBias."""
    captured_gradient: str = field(default="NoCapturedGradient", metadata=CAPTURED_GRADIENT)
    queries: int
    """Of which scores are in registers at once."""
    stages: int
    """Batch elements in flight."""
    sum_bias: bool
    """The gradient of a bias that the batch shares is summed on the way."""


def short_backward(problem: Problem, device: Device) -> ShortBackwardConfig | None:
    """The config of ``backward/sm80_short.cuh`` where sequences fit in one of its tiles; else None."""
    edge = _short_edge(problem, device)
    if not edge or problem.group > 1 or is_wide(problem):
        return None
    dim_qk, dim_v = rounded(problem)
    stage = 2 * (shared_tile(edge, dim_qk) + shared_tile(edge, dim_v)) + 3 * 4 * edge
    queries, stages, registers = (64, 2, 168) if edge == 64 else (64, 2, 255)
    smem, threads = shared_tile(edge, edge) + stages * stage, 2 * edge
    if smem > device.smem_per_block:
        return None
    bias_held, smem = _hold_bias(problem, device, edge, smem)
    score = policies.score(problem) if bias_held == "NoHeldBias" else policies.score_without_bias(problem)
    return ShortBackwardConfig(
        **policies.policies(problem) | {"score": score},
        tile_q=edge,
        tile_kv=edge,
        threads=threads,
        blocks_per_sm=resident(smem, threads, registers, device),
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
        queries=queries,
        stages=stages,
        bias_gradient=gradient_policy(problem),
        bias_held=bias_held,
        captured_gradient=policies.captured_gradient(problem),
        sum_bias=sums_on_the_way(problem),
    )


def plan_short_backward(problem: Problem, device: Device, config: ShortBackwardConfig) -> Plan:
    """The launches of the gradients by this config."""
    parts = even_parts(problem.heads_q, problem.batch, device.num_sms * config.blocks_per_sm)
    bias = add_parts(problem, parts) if config.sum_bias else sum_bias_gradient(problem, device)
    others = (*bias.steps, *steps.sink_step(problem), *steps.captured_step(problem, device))
    launches = (Step("bwd_sm80_short", "BwdParams", config, problem.heads_q * parts), *others)
    workspaces = (steps.row_workspaces(problem) if others else ()) + bias.workspaces
    reason = "all queries and keys of a sequence are one tile"
    return Plan(problem, device, "sm80", launches, workspaces, reason, bias_parts=bias.parts)
