"""Launches that families share: dropout's seed, row sums, parts of split rows, the gradient of the sink."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cuflash.device import Device
from cuflash.plan import policies
from cuflash.plan.config import HEADER, Config, ForwardConfig, JvpConfig, SequenceConfig, Written
from cuflash.plan.plan import Box, Plan, Step, Workspace
from cuflash.plan.splits import divide
from cuflash.plan.tiles import packed_tiles, query_blocks, tiles
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineConfig(SequenceConfig):
    """``fwd_combine``."""

    dim_v: int
    rows: int
    """Of any head, that a block merges."""
    score: str = field(metadata={HEADER: "attention/score.cuh"})
    """For its unit, which rows' states are in."""
    sink: str = field(metadata={HEADER: "attention/softmax.cuh"})
    split: str = field(default="KeySplits", metadata={HEADER: "attention/ranges.cuh"})
    """KeySplits, KeyRanges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendConfig(SequenceConfig):
    """``cache_append``."""

    dim_qk: int
    dim_v: int
    copy_bytes: int
    rotary: str = field(metadata={HEADER: "attention/rotary.cuh"})
    """NoRotary, Halves, Pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig(SequenceConfig):
    """``bwd_delta``."""

    dim_v: int
    tile_q: int
    copy_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedConfig(Config):
    """``bwd_captured``."""

    element: str = field(metadata={HEADER: "element.cuh"})
    score: str = field(default="ScoreMod", metadata={HEADER: "attention/mods.cuh"})
    """What a caller wrote, which knows its sums."""
    written: Written | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkConfig(SequenceConfig):
    """``bwd_sink``."""

    score: str = field(metadata={HEADER: "attention/score.cuh"})
    """For its unit, which rows' states are in."""


def forward(problem: Problem, device: Device, family: str, *tiled: tuple[ForwardConfig, str]) -> Plan:
    """The plan of a forward by ``fwd_<family>``: with the first config, or the last where rows are few or keys split.

    Beside each config stands why its tiles are as they are.
    """
    division = divide(problem, device, tiled[0][0], tiled[-1][0])
    config, reason = tiled[0] if division.plain else tiled[-1]
    rows, heads = problem.len_q, problem.heads_q
    if division.grouped:
        config, rows, heads = replace(config, heads="HeadGroup"), problem.len_q * problem.group, problem.heads_kv
    kernel, blocks = f"fwd_{family}", tiles(rows, config.tile_q) * heads * problem.batch
    steps = rng_step(problem) + append_step(problem)
    workspaces = rotated(problem)
    if division.num_splits == 1:
        steps += (Step(kernel, "FwdParams", config, blocks, walks="kv"),)
    else:
        config = replace(config, split="KeySplits", sink="NoSink")  # a sink counts once, in the combine kernel
        main = Step(kernel, "FwdParams", config, blocks * division.num_splits, walks="kv")
        steps += (main, combine_step(problem))
        workspaces += part_workspaces(problem, division.num_splits)
    return Plan(
        problem, device, family, steps, workspaces, reason, num_splits=division.num_splits, division=division.reason
    )


def jvp(
    problem: Problem,
    device: Device,
    family: str,
    config: JvpConfig,
    reason: str,
    shares: int = 1,
    boxes: tuple[Box, ...] = (),
) -> Plan:
    """The plan of a forward with tangents by ``jvp_<family>``, whose blocks share a query tile by `shares`."""
    launch = Step(f"jvp_{family}", "JvpParams", config, query_blocks(problem, config.tile_q) * shares, boxes)
    return Plan(problem, device, family, (*rng_step(problem), launch), reason=reason)


def rng_step(problem: Problem) -> tuple[Step, ...]:
    """The launch before a forward with dropout; one kernel for all."""
    return () if problem.dropout is None else (Step("fwd_rng", "FwdParams", Config(threads=32), 1),)


def append_step(problem: Problem) -> tuple[Step, ...]:
    """The launch before a forward that adds keys to a cache, or turns queries; one kernel for all."""
    rows = max(problem.appended, problem.len_q if problem.rotary else 0)
    if not rows:
        return ()
    config = AppendConfig(
        element=problem.dtype.cuda,
        sequence=policies.sequence(problem),
        dim_qk=problem.dim_qk,
        dim_v=problem.dim_v,
        threads=256,
        copy_bytes=policies.copy_bytes(problem),
        rotary=policies.rotary(problem),
    )
    return (Step("cache_append", "FwdParams", config, problem.batch * rows),)


def rotated(problem: Problem) -> tuple[Workspace, ...]:
    """Where queries are after their turn: what a forward with rotary embeddings reads as q."""
    if problem.rotary is None:
        return ()
    shape = problem.batch, problem.len_q, problem.heads_q, problem.dim_qk
    return (Workspace("rotated", problem.dtype.numpy, shape),)


def combine_step(problem: Problem, split: str = "KeySplits") -> Step:
    """The last launch of a forward whose keys are split."""
    # Eight parts at once take 168 registers of fp64, and more than 80 of fp32, which six blocks leave.
    size, threads = problem.dtype.accumulator.itemsize, 128
    columns = problem.dim_v * size // 16 if problem.dim_v * size % 16 == 0 else problem.dim_v
    rows = max(1, threads >> (columns - 1).bit_length())  # at a time
    config = CombineConfig(
        element=problem.dtype.cuda,
        sequence=policies.sequence(problem),
        dim_v=problem.dim_v,
        threads=threads,
        blocks_per_sm=5 if size == 4 else 2,
        rows=rows,
        score=policies.unit_score(problem),
        sink=policies.sink(problem),
        split=split,
    )
    return Step("fwd_combine", "FwdParams", config, problem.batch * tiles(problem.len_q * problem.heads_q, rows))


def part_workspaces(problem: Problem, num_splits: int) -> tuple[Workspace, ...]:
    """What the blocks of split rows leave: ``PartRows`` of ``attention/split.cuh``."""
    shape = (num_splits, packed_tiles(problem, 1), problem.heads_q)
    return (
        Workspace("partial_out", problem.dtype.accumulator, (*shape, problem.dim_v)),
        Workspace("partial_state", problem.dtype.accumulator, (*shape, 2)),
    )


def delta_step(problem: Problem) -> Step:
    """The first launch of every backward."""
    config = DeltaConfig(
        element=problem.dtype.cuda,
        sequence=policies.sequence(problem),
        dim_v=problem.dim_v,
        threads=128,
        tile_q=64,
        copy_bytes=policies.copy_bytes(problem),
    )
    return Step("bwd_delta", "BwdParams", config, query_blocks(problem, config.tile_q))


def row_workspaces(problem: Problem) -> tuple[Workspace, ...]:
    """What ``bwd_delta`` leaves of every query row: a delta and a ``RowShift``, laid out like the log-sum-exp."""
    rows = problem.heads_q * problem.rows_q
    return tuple(
        Workspace(name, problem.dtype.accumulator, shape) for name, shape in (("delta", (rows,)), ("shift", (rows, 2)))
    )


def sink_step(problem: Problem) -> tuple[Step, ...]:
    """The launch for the gradient of the sink logits, where there are any."""
    if not problem.sink:
        return ()
    threads = 256
    config = SinkConfig(
        element=problem.dtype.cuda,
        sequence=policies.sequence(problem),
        threads=threads,
        smem_bytes=threads * problem.dtype.accumulator.itemsize,
        score=policies.unit_score(problem),
    )
    return (Step("bwd_sink", "BwdParams", config, problem.heads_q),)


def captured_step(problem: Problem, device: Device) -> tuple[Step, ...]:
    """The launch that rounds the exact sums of gradients of what a written score reads, where there are any."""
    written = policies.written(problem)
    if written is None or not written.exact:
        return ()
    config = CapturedConfig(element=problem.dtype.cuda, threads=256, written=written)
    return (Step("bwd_captured", "BwdParams", config, 4 * device.num_sms),)


def exact_sums(gradient: str, problem: Problem, count: int) -> Workspace:
    """What kernels add such a gradient up in: ``ExactSum::kWords`` words of 64 bits a number."""
    words = 13 if problem.dtype.accumulator.itemsize == 4 else 89
    return Workspace(f"{gradient}_sums", np.dtype(np.uint8), (count, 8 * words), zeroed=True)
