"""Ampere and later, on tensor cores by mma.sync, fed by cp.async: tiles, shared memory, configs, plans.

The shared-memory formulas restate the kernels' ``SmemPlan`` structs; a kernel whose ``sizeof`` differs does not
compile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from cuflash.device import Device
from cuflash.features import FEATURES
from cuflash.plan import policies, steps
from cuflash.plan.bias import gradient_policy
from cuflash.plan.config import (
    BIAS_GRADIENT,
    CAPTURED_GRADIENT,
    HEADER,
    CopyConfig,
    FewConfig,
    ForwardConfig,
    JvpConfig,
    SequenceConfig,
)
from cuflash.plan.families.sm80_bias import sum_bias_gradient
from cuflash.plan.families.sm80_short import plan_short_backward, plan_short_forward, short_backward, short_forward
from cuflash.plan.families.sm80_tiles import halves, held_bias, is_wide, operand_tile, rounded, shared_tile
from cuflash.plan.family import Family
from cuflash.plan.plan import Plan, Step, Workspace
from cuflash.plan.splits import Division, deal, divide, heads_in_step, most_in_cluster
from cuflash.plan.tiles import fits_blocks, key_blocks, packed_tiles, query_blocks, resident, round_up, tiles
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class HalvedForwardConfig(ForwardConfig):
    """``fwd_sm80``."""

    halves: int
    """Of floats, in fp16: 2, or 1 where TF32's 11 bits are enough."""
    bias_held: str = field(default="NoHeldBias", metadata={HEADER: "tile/held_bias.cuh"})
    """NoHeldBias, HeldBias: a tile of it beside every key tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardConfig(CopyConfig):
    """``bwd_sm80``."""

    halves: int
    """As of the forward."""
    bias_held: str = field(default="NoHeldBias", metadata={HEADER: "tile/held_bias.cuh"})
    """As of the forward, beside every query tile."""
    stages: int
    """Query tiles in flight."""
    dim_splits: int
    """Blocks that share the columns of one gradient tile."""
    warps_across: int
    """Warps that share the keys of a fragment of scores. If more than one, P and dS pass through shared memory."""
    reduction: str = field(metadata={HEADER: "tile/dq_accum.cuh"})
    """How blocks add to dq: AtomicReduction, OrderedReduction."""
    bias_gradient: str = field(default="NoBiasGradient", metadata=BIAS_GRADIENT)
    captured_gradient: str = field(default="NoCapturedGradient", metadata=CAPTURED_GRADIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig(SequenceConfig):
    """``bwd_convert``, which reads ``bwd_sm80``'s fragments."""

    dim_qk: int
    tile_q: int
    dim_splits: int
    copy_bytes: int


def _beside(problem: Problem, tile_q: int, tile_kv: int, smem: int, most: int) -> tuple[str, int]:
    """The policy of a bias beside tiles of so many bytes, and the bytes of both, where those fit in the most there are.

    Of floats, whose products leave the time for a tile of it to arrive, and where every pair reads another element.
    """
    held = smem + held_bias(problem, tile_q, tile_kv)
    several = problem.bias is None or any(problem.bias_broadcast[2:]) or not problem.bias_boxes
    if several or problem.dtype.itemsize != 4 or problem.layout == "cache" or problem.score_mod or held > most:
        return "NoHeldBias", smem
    assert problem.bias is not None
    return f"HeldBias<{problem.bias.cuda}>", held


def _forward_config(problem: Problem, device: Device) -> tuple[HalvedForwardConfig, str]:
    """The config of ``forward/sm80.cuh``, and why these tiles."""
    widest = max(rounded(problem))
    if is_wide(problem):
        return _first_that_fits(problem, device, _wide_forward_tiles(problem))
    # 32 rows a warp halve the shared-memory reads per product against 16; wide heads leave registers for 16 only.
    if problem.mask.tensor or problem.bias is not None or problem.dropout == "word" or problem.written:
        candidates = [(64, 64, 128, "16 rows a warp: the addresses of another tensor need the registers")]
    elif problem.dropout is not None or (problem.alibi and widest <= 64):
        candidates = [(128, 64, 128, "32 rows a warp, 64 keys")] if widest <= 128 else [(128, 64, 256, "")]
    elif widest <= 64:
        # H200, 8k, d 64: 316 TFLOP/s; with 64 keys 284 (two blocks an SM) and 298 (three).
        candidates = [(128, 128, 128, "32 rows a warp, 128 keys: few barriers and row reductions a score")]
    elif widest <= 128:
        # H200, 8k, d 128: 349 TFLOP/s; 64 x 64 292, 128 x 32 306, 16 rows a warp 234.
        candidates = [(128, 64, 128, "32 rows a warp, 64 keys: out and S fit in 255 registers, two blocks an SM")]
    elif resident(_forward_of(problem, device, 64, 64, 128).smem_bytes, 128, 255, device) > 1:
        # H200, 4k, d 256: 307 TFLOP/s; 128 x 64 278, 64 x 32 254.
        candidates = [(64, 64, 128, "16 rows a warp: 256 columns of out take 128 registers; two blocks an SM")]
    else:
        candidates = [(128, 64, 256, "16 rows a warp: 256 columns of out take 128 registers")]
    return _first_that_fits(problem, device, (*candidates, (64, 64, 128, "the largest that fits")))


def _small_forward_config(problem: Problem, device: Device) -> tuple[HalvedForwardConfig, str]:
    """The config of ``forward/sm80.cuh`` where rows are few or keys are split, and why."""
    if is_wide(problem):
        return _first_that_fits(problem, device, _SMALL_WIDE_TILES, whole=False)
    return _forward_of(problem, device, 64, 64, 128, whole=False), "the smallest: few rows, or few keys each"


_SMALL_WIDE_TILES = (
    (64, 64, 128, "16 rows a warp: few rows, or few keys each"),
    (64, 32, 128, "16 rows a warp, the largest that fits"),
    (32, 32, 64, "16 rows a warp, the largest that fits"),
)
"""Of floats, which are split into halves, and of doubles."""


def _wide_forward_tiles(problem: Problem) -> tuple[tuple[int, int, int, str], ...]:
    """Candidates of ``forward/sm80.cuh`` for floats and doubles."""
    widest = max(rounded(problem))
    if problem.dtype.itemsize == 8:
        return (64, 32, 128, "16 rows a warp: out takes a register for every column"), *_SMALL_WIDE_TILES[1:]
    candidates: list[tuple[int, int, int, str]] = []
    if problem.len_q > 64 and widest <= 128:
        if problem.mask.kind == "none" and problem.len_q >= 1024 and problem.block_mask is None:
            # H200, 4k: d 64 86 TFLOP/s and d 128 98; 128 x 64 80 and 79, 128 x 32 82 and 84, 16 rows a warp 58 and 69.
            if widest > 64 and problem.copies_bias:
                candidates += [(256, 32, 256, "32 rows a warp, eight of which share the keys' halves, beside a bias")]
            candidates += [(256, 64, 256, "32 rows a warp, eight of which share the keys' halves")]
        candidates += [(128, 64 if widest <= 64 else 32, 128, "32 rows a warp, two blocks an SM")]
    elif widest <= 64:
        candidates += [_SMALL_WIDE_TILES[0]]
    return (*candidates, *_SMALL_WIDE_TILES[1:])


def _first_that_fits(
    problem: Problem, device: Device, candidates: tuple[tuple[int, int, int, str], ...], whole: bool = True
) -> tuple[HalvedForwardConfig, str]:
    """The config of the first of some tiles, each with a reason, that a block has the shared memory for."""
    for tile_q, tile_kv, threads, reason in candidates:
        config = _forward_of(problem, device, tile_q, tile_kv, threads, whole)
        if config.smem_bytes <= device.smem_per_block:
            return config, reason
    raise AssertionError(f"no forward tile of {problem} fits {device}")


def _forward_of(
    problem: Problem, device: Device, tile_q: int, tile_kv: int, threads: int, whole: bool = True
) -> HalvedForwardConfig:
    """The config of a tile; not `whole` where the heads of a group may be packed into it."""
    dim_qk, dim_v = rounded(problem)
    columns = dim_qk if is_wide(problem) else max(dim_qk, dim_v)  # narrow results leave in the place of q
    smem = (
        operand_tile(problem, tile_q, columns)
        + operand_tile(problem, tile_kv, dim_qk)
        + operand_tile(problem, tile_kv, dim_v)
    )
    bias_held, smem = _beside(problem, tile_q, tile_kv, smem, device.smem_per_block) if whole else ("NoHeldBias", smem)
    score = policies.score(problem) if bias_held == "NoHeldBias" else policies.score_beside_bias(problem)
    return HalvedForwardConfig(
        **policies.policies(problem) | {"score": score},
        tile_q=tile_q,
        tile_kv=tile_kv,
        threads=threads,
        blocks_per_sm=resident(smem, threads, 255, device),
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
        halves=halves(problem),
        bias_held=bias_held,
    )


_FEW_SHAPES = ((2, 4, 4), (2, 4, 3), (1, 4, 4), (1, 4, 3), (1, 4, 2), (1, 2, 2))
"""Blocks an SM, warps and stages of ``forward/sm80_few.cuh``, best first. H200, d 128, four rows on 64k keys: 3720
GB/s; one block of eight warps 3557, of four with six stages 3529."""

_FEW_SHAPES_OF_MANY_ROWS = ((1, 8, 3), *_FEW_SHAPES)
"""The same for more than eight rows, whose parts more threads merge sooner. H200, d 128, 16 rows on 16 times 8k keys:
3941 GB/s, by two blocks of four warps 3760; 32 rows 3672 and 3380."""


def _few_config(problem: Problem, device: Device) -> tuple[FewConfig, str] | None:
    """The config of ``forward/sm80_few.cuh``, and why; None where rows are many or keys few."""
    rows, widest = problem.len_q * problem.group, max(rounded(problem))
    if (
        is_wide(problem)
        or problem.num_splits == 1
        or problem.dropout
        or problem.block_mask
        or problem.len_kv <= 256
        or rows > (32 if widest <= 128 else 16)
    ):
        return None
    if problem.batch * problem.heads_q * problem.len_kv >= 2**36:  # the kernel counts tiles of keys in 32 bits
        return None
    tile_q = 16 if rows <= 16 else 32
    for blocks, warps, stages in _FEW_SHAPES_OF_MANY_ROWS if rows > 8 else _FEW_SHAPES:
        smem = _few_smem(problem, tile_q, warps, stages)
        if smem <= device.smem_per_block and blocks * (smem + 1024) <= device.smem_per_sm:
            break
    config = FewConfig(
        **policies.policies(problem),
        tile_q=tile_q,
        tile_kv=16 * warps,
        threads=32 * warps,
        blocks_per_sm=blocks,
        smem_bytes=smem,
        copy_bytes=policies.copy_bytes(problem),
        sink=policies.sink(problem),
        heads="HeadGroup" if problem.group > 1 else "OneHead",
        stages=stages,
    )
    return config, f"{warps} warps with keys of their own, {stages} tiles ahead"


def _few_smem(problem: Problem, tile_q: int, warps: int, stages: int) -> int:
    """Bytes of ``ForwardSm80Few::SmemPlan``."""
    dim_qk, dim_v = rounded(problem)
    stage = shared_tile(16, dim_qk) + shared_tile(16, dim_v)
    part = 16 * (4 * dim_v + 8)
    return 2 * shared_tile(tile_q, dim_qk) + warps * stages * max(stage, part) + warps * 2 * 16 * 8 + 8


def forward_division(problem: Problem, device: Device) -> Division:
    """How a forward deals rows and keys out to blocks."""
    if few := _few_config(problem, device):
        return deal(problem, device, few[0])[0]
    return divide(problem, device, _forward_config(problem, device)[0], _small_forward_config(problem, device)[0])


def _cluster(device: Device, num_splits: int) -> int:
    """Blocks of a query tile that are a cluster: all, or each is one of its own."""
    return num_splits if num_splits <= most_in_cluster(device) else 1


def _few_forward(problem: Problem, device: Device, config: FewConfig, reason: str) -> Plan:
    """The plan of a forward by ``fwd_sm80_few``, whose blocks merge what they find."""
    division, blocks, split = deal(problem, device, config)
    cluster = _cluster(device, division.num_splits) if split == "KeySplits" else 1
    config = replace(config, split=split, cluster=cluster > 1)
    rows, heads = problem.len_q * problem.group, problem.heads_kv
    query_tiles = tiles(rows, config.tile_q) * heads * problem.batch
    workspaces = steps.rotated(problem)
    ranges = split == "KeyRanges"  # which begin and end anywhere, whatever the lengths
    if ranges or division.num_splits > cluster:
        slots = 2 * blocks if ranges else blocks
        shape = (slots, config.tile_q)
        workspaces += (
            Workspace("partial_out", problem.dtype.accumulator, (*shape, rounded(problem)[1])),
            Workspace("partial_state", problem.dtype.accumulator, (*shape, 2)),
            Workspace("tickets", np.dtype(np.int32), (query_tiles,), kept=True),
        )
    launches = (*steps.append_step(problem), Step("fwd_sm80_few", "FwdParams", config, blocks, cluster=cluster))
    step = heads_in_step(problem.heads_kv, blocks) if ranges else 1
    return Plan(
        problem, device, "sm80", launches, workspaces, reason, num_splits=division.num_splits, heads_in_step=step,
        division=division.reason,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WideJvpConfig(JvpConfig):
    """``jvp_sm80``."""

    dim_splits: int
    """Blocks that share the columns of one output tile."""


def _jvp_config(problem: Problem, device: Device) -> tuple[WideJvpConfig, str]:
    """The config of ``forward/jvp_sm80.cuh``, and why these tiles."""
    widest = max(rounded(problem))
    crowded = problem.mask.tensor or problem.bias is not None or problem.dropout is not None or problem.alibi
    if widest <= 64 and crowded:
        candidates = [(64, 64, 128, 1, "64 keys: what else makes a score needs registers beside S, S' and both sums")]
    elif widest <= 64:
        # H200, 8k, d 64: 318 TFLOP/s, causal 298; 128 x 32 with 32 rows a warp 303 and 292, 64 x 64 292 and 287.
        candidates = [(64, 128, 128, 1, "16 rows a warp, 128 keys: few barriers and row reductions a score")]
    elif widest <= 128:
        # H200, 8k, d 128: 323 TFLOP/s, causal 305.
        candidates = [(64, 64, 128, 1, "16 rows a warp: both sums take 128 registers, S and S' 64")]
    else:
        # H200, 8k, d 256: 195 TFLOP/s.
        candidates = [(128, 32, 256, 2, "two blocks share the columns of out, which else overflow the registers")]
    splits = candidates[0][3]
    candidates += [(64, 32, 128, splits, "the largest that fits"), (32, 32, 64, splits, "what fits in 99 KB")]
    for tile_q, tile_kv, threads, splits, reason in candidates:
        smem = _jvp_smem(problem, tile_q, tile_kv, splits)
        if smem <= device.smem_per_block:
            config = WideJvpConfig(
                **policies.policies(problem),
                tile_q=tile_q,
                tile_kv=tile_kv,
                threads=threads,
                blocks_per_sm=resident(smem, threads, 255, device),
                smem_bytes=smem,
                copy_bytes=policies.copy_bytes(problem),
                sink=policies.sink(problem),
                tangent_bias=policies.tangent_bias(problem),
                dim_splits=splits,
            )
            return config, reason
    raise AssertionError(f"no forward tile with tangents of {problem} fits {device}")


def _jvp_smem(problem: Problem, tile_q: int, tile_kv: int, splits: int) -> int:
    """Bytes of ``JvpSm80::SmemPlan``."""
    dim_qk, dim_v = round_up(problem.dim_qk, 16), round_up(problem.dim_v, 16 * splits)
    rows = shared_tile(tile_q, max(dim_qk, dim_v // splits))
    return 2 * (rows + shared_tile(tile_kv, dim_qk) + shared_tile(tile_kv, dim_v))


def _forward(problem: Problem, device: Device) -> Plan:
    if problem.tangents is not None:
        config, reason = _jvp_config(problem, device)
        return steps.jvp(problem, device, "sm80", config, reason, config.dim_splits)
    if few := _few_config(problem, device):
        return _few_forward(problem, device, *few)
    if short := short_forward(problem, device):
        return plan_short_forward(problem, device, short)
    return steps.forward(
        problem, device, "sm80", _forward_config(problem, device), _small_forward_config(problem, device)
    )


class BackwardTile(NamedTuple):
    """How ``bwd_sm80`` may cut a problem, and why so."""

    reason: str
    tile_q: int
    tile_kv: int
    threads: int
    stages: int
    splits: int = 1
    across: int = 1

    @property
    def gradients_across(self) -> int:
        """Warps that share the keys of a fragment of dk and dv: ``BackwardSm80::kGradAcross``."""
        warps = self.threads // 32
        return warps // min(warps, self.tile_kv // 32) if self.across > 1 else 1


def _backward_config(problem: Problem, device: Device) -> tuple[BackwardConfig, BackwardTile]:
    """The config of ``backward/sm80.cuh``, whose dq rows ``backward/convert.cuh`` shares, and its tile."""
    candidates = _wide_backward_tiles(problem) if is_wide(problem) else _backward_tiles(problem)
    fitting = [tile for tile in candidates if fits_blocks(problem, tile.tile_q, tile.tile_kv)]
    for tile in fitting or candidates:
        smem = _backward_smem(problem, tile)
        bias_held, smem = _beside(problem, tile.tile_q, tile.tile_kv, smem, device.smem_per_block)
        score = policies.score(problem) if bias_held == "NoHeldBias" else policies.score_without_bias(problem)
        if smem <= device.smem_per_block and _dq_columns(problem.dim_qk, tile) % (16 * tile.gradients_across) == 0:
            config = BackwardConfig(
                **policies.policies(problem) | {"score": score},
                tile_q=tile.tile_q,
                tile_kv=tile.tile_kv,
                threads=tile.threads,
                smem_bytes=smem,
                copy_bytes=policies.copy_bytes(problem),
                halves=halves(problem),
                bias_held=bias_held,
                stages=tile.stages,
                dim_splits=tile.splits,
                warps_across=tile.across,
                reduction="OrderedReduction" if problem.deterministic else "AtomicReduction",
                bias_gradient=gradient_policy(problem),
                captured_gradient=policies.captured_gradient(problem),
            )
            return config, tile
    raise AssertionError(f"no backward tile of {problem} fits {device}")


def _backward_tiles(problem: Problem) -> list[BackwardTile]:
    """Candidates for 16-bit elements, best first."""
    widest = max(problem.dim_qk, problem.dim_v)
    largest = "the largest that fits"
    if widest <= 64:
        # H200, 8k, d 64: 314 TFLOP/s; by less unrolled products 280, 16 key rows a warp 236, 64 keys 235.
        reason = "32 key rows a warp halve the shared-memory reads per product against 16"
        return [BackwardTile(reason, 32, 128, 128, 2), BackwardTile(largest, 64, 64, 128, 1)]
    # P passes through shared memory, too, but fragments of 32 rows read less of everything else.
    shared = "32 rows of dk and dv a warp, which read less from shared memory than 16"
    if widest <= 128:
        # H200, 4k, d 128: 308 TFLOP/s, with one stage 292; 16 key rows a warp 279; 64 keys 277, of 16 rows a warp 267.
        return [
            BackwardTile(shared, 64, 128, 256, 2, across=2),
            BackwardTile(shared, 64, 128, 256, 1, across=2),
            BackwardTile("64 keys: what fits in 99 KB", 64, 64, 128, 1, across=2),
        ]
    # H200, 4k, d 256: 254 TFLOP/s, with one stage 226; two blocks to 128 keys 196; 32 x 32 173, and 149 by 16 x 64.
    split = "two blocks share the columns of dk and dv, which else overflow the registers"
    return [
        BackwardTile(shared, 64, 64, 256, 2, across=2),
        BackwardTile(shared, 64, 64, 256, 1, across=2),
        BackwardTile(split, 64, 128, 256, 1, splits=2),
        BackwardTile(largest, 64, 64, 128, 1, splits=2),
        BackwardTile("32 keys: what fits in 99 KB", 32, 32, 128, 1, across=2),
        BackwardTile("16 query rows: what fits in 99 KB", 16, 64, 128, 1, splits=2),
    ]


def _wide_backward_tiles(problem: Problem) -> list[BackwardTile]:
    """Candidates for floats, which are split into halves, and for doubles."""
    widest = max(problem.dim_qk, problem.dim_v)
    split = "two blocks share the columns of dk and dv, which else overflow the registers"
    largest = BackwardTile("the largest that fits", 16, 64, 128, 1)
    if problem.dtype.itemsize == 8:
        if widest <= 64:
            tile = BackwardTile("16 key rows a warp: dk and dv take 128 registers", 32, 64, 128, 2)
            eight = "eight warps, which share P and dS, have the registers that dk and dv need"
            return [*([BackwardTile(eight, 32, 64, 256, 2, across=2)] if widest > 32 else []), tile, largest]
        return [
            BackwardTile(split, 16, 64, 128, 1, splits=2),
            BackwardTile("32 keys: what fits", 16, 32, 64, 1, splits=2),
        ]
    if widest > 128:
        return [BackwardTile(split, 16, 64, 128, 1, splits=2)]
    if widest <= 64:
        beside = [BackwardTile("32 key rows a warp, beside a tile of the bias", 32, 256, 256, 1)]
        if not problem.copies_bias or problem.len_kv <= 128:
            beside = []
        if problem.len_kv <= 64:
            beside = [BackwardTile("32 key rows a warp, no more keys than there are", 32, 64, 64, 1)]
        # H200, 4k, d 64: 79 TFLOP/s; 64 keys 65, 64 x 64 66, 256 keys 79.
        return [*beside, BackwardTile("32 key rows a warp, two blocks an SM", 32, 128, 128, 1), largest]
    # H200, 4k, d 128: 81 TFLOP/s; 64 keys 76, 16 queries 62.
    return [BackwardTile("16 key rows a warp: dk and dv take 128 registers", 32, 128, 256, 1), largest]


def _dq_columns(dim_qk: int, tile: BackwardTile) -> int:
    """Columns of q and k in the backward's shared memory and in dq_accum (``DqAccum::kDimQk``)."""
    warps = tile.threads // 32
    widest = 4 if dim_qk % (64 * tile.splits) == 0 else 2
    warps_across = warps // max(1, min(warps // widest, tile.tile_q // 16))
    return round_up(dim_qk, 16 * warps_across * tile.splits)


def _backward_smem(problem: Problem, tile: BackwardTile) -> int:
    """Bytes of ``BackwardSm80::SmemPlan``."""
    tile_q, tile_kv = tile.tile_q, tile.tile_kv
    dim_qk = _dq_columns(problem.dim_qk, tile)
    dim_v = round_up(problem.dim_v, 16 * tile.gradients_across * tile.splits)
    numbers = 3 * problem.dtype.accumulator.itemsize * tile_q
    stage = operand_tile(problem, tile_q, dim_qk) + operand_tile(problem, tile_q, dim_v) + numbers
    if problem.dtype.itemsize == 4:
        scores = shared_tile(tile_kv, 2 * tile_q) + 4 * tile.threads // 32 * tile_q
    else:
        scores = operand_tile(problem, tile_kv, tile_q) * (2 if tile.across > 1 else 1)
    return operand_tile(problem, tile_kv, dim_qk) + operand_tile(problem, tile_kv, dim_v) + scores + tile.stages * stage


def _backward(problem: Problem, device: Device) -> Plan:
    short = short_backward(problem, device)
    if short is not None:
        return plan_short_backward(problem, device, short)
    config, tile = _backward_config(problem, device)
    columns = _dq_columns(problem.dim_qk, tile)
    convert = ConvertConfig(
        element=config.element,
        sequence=config.sequence,
        dim_qk=config.dim_qk,
        tile_q=config.tile_q,
        threads=config.threads,
        smem_bytes=shared_tile(config.tile_q, columns, problem.dtype.itemsize),  # BackwardConvert::SmemPlan
        dim_splits=config.dim_splits,
        copy_bytes=config.copy_bytes,
    )
    blocks = key_blocks(problem, config.tile_kv) * config.dim_splits
    bias = sum_bias_gradient(problem, device)
    launches = (
        steps.delta_step(problem),
        Step("bwd_sm80", "BwdParams", config, blocks, walks="q"),
        Step("bwd_convert", "BwdParams", convert, query_blocks(problem, config.tile_q)),
        *bias.steps,
        *steps.sink_step(problem),
        *steps.captured_step(problem, device),
    )
    workspaces = _backward_workspaces(problem, config, columns) + bias.workspaces
    return Plan(problem, device, "sm80", launches, workspaces, tile.reason, bias_parts=bias.parts)


def _backward_workspaces(problem: Problem, config: BackwardConfig, columns: int) -> tuple[Workspace, ...]:
    """Row sums, dq in fp32, and whose turn it is to add to it."""
    q_tiles = problem.heads_q * packed_tiles(problem, config.tile_q)
    shape = (q_tiles, config.tile_q, columns)
    workspaces = (*steps.row_workspaces(problem), Workspace("dq_accum", problem.dtype.accumulator, shape, zeroed=True))
    if problem.deterministic:
        turns = (q_tiles * config.dim_splits,)
        workspaces += (Workspace("dq_turn", np.dtype(np.int32), turns, zeroed=True),)
    return workspaces


def lists_without_turns(problem: Problem) -> list[str]:
    """Why blocks that take turns at dq do not walk a block mask: its lists count every turn that there can be."""
    fewer = problem.layout == "varlen" or problem.mask.kind != "none"
    if problem.direction == "backward" and problem.deterministic and problem.block_mask is not None and fewer:
        return ["no turns of a block mask beside a band or in packed sequences, which leave some out"]
    return []


def _leave(problem: Problem, device: Device) -> list[str]:
    """What of floats and doubles is left to plain multiply-adds: tangents, and what does not fit."""
    if turns := lists_without_turns(problem):
        return turns
    if not is_wide(problem):
        return []
    if problem.tangents is not None:
        return [f"no tangents in {problem.dtype}"]
    widest = max(problem.dim_qk, problem.dim_v)
    if problem.dtype.itemsize == 8 and widest > _WIDEST_DOUBLE:
        return [f"heads of {widest} > {_WIDEST_DOUBLE} in {problem.dtype}"]
    if problem.direction == "backward":
        smem = _backward_smem(problem, _wide_backward_tiles(problem)[-1])
        if smem > device.smem_per_block:
            return [f"gradients in {problem.dtype} need {smem:,} bytes of shared memory"]
    return []


_WIDEST_DOUBLE = 128
"""The largest head whose output in doubles leaves registers for scores."""


SM80 = Family(
    name="sm80",
    summary="tensor cores by mma.sync and cp.async, of fp32 in halves, of fp64 up to head dimension 128",
    min_capability=(8, 0),
    dtypes=("fp16", "bf16", "fp32", "tf32", "fp64"),
    max_dim=256,
    features=tuple(FEATURES),
    caches=True,
    forward=_forward,
    backward=_backward,
    leave=_leave,
)
