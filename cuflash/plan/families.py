"""The catalogue of kernel families: what each one serves, declared as data, and the plan it makes.

Adding a kernel means adding its ``.cu``/``.cuh`` files and one ``Family`` here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from cuflash.device import Device
from cuflash.dtypes import DType
from cuflash.errors import UnsupportedProblem
from cuflash.plan import ceiling, tiles
from cuflash.plan.plan import Box, Config, Plan, Step, Workspace
from cuflash.plan.splits import divide
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True)
class Family:
    """One set of kernels that together serve one direction or both."""

    name: str
    summary: str
    min_capability: tuple[int, int]
    dtypes: tuple[str, ...]
    max_dim: int
    """The largest dim_qk and dim_v."""
    features: tuple[str, ...]
    """What :func:`needs` may name; anything else is a reason why not."""
    forward: Callable[[Problem, Device], Plan]
    backward: Callable[[Problem, Device], Plan] | None
    """None in a family without the feature ``backward``."""
    only: bool = False
    """Later architectures than `min_capability` lack its instructions."""
    leave: Callable[[Problem, Device], list[str]] = lambda problem, device: []
    """Reasons to leave what it could run to a later family."""

    def why_not(self, problem: Problem, device: Device) -> list[str]:
        """Reasons why this family does not run the problem; empty when it does."""
        reasons = []
        if device.capability < self.min_capability or (self.only and device.capability != self.min_capability):
            major, minor = self.min_capability
            reasons.append(f"needs sm_{major}{minor}" + ("a" if self.only else ""))
        if problem.dtype.name not in self.dtypes:
            reasons.append(f"no {problem.dtype} (has {', '.join(self.dtypes)})")
        for name, dim in (("dim_qk", problem.dim_qk), ("dim_v", problem.dim_v)):
            if dim > self.max_dim:
                reasons.append(f"{name} {dim} > {self.max_dim}")
        reasons += [f"no {feature}" for feature in needs(problem) if feature not in self.features]
        if problem.page_size and problem.direction == "backward":
            reasons.append("no gradients of pages: sequences may share them")
        return reasons or self.leave(problem, device)

    def plan(self, problem: Problem, device: Device) -> Plan:
        """The plan for a problem this family has no reason against."""
        make = self.forward if problem.direction == "forward" else self.backward
        if make is None:
            raise UnsupportedProblem(f"family {self.name} has no backward.")
        return make(problem, device)


FEATURES: dict[str, str] = {
    "backward": "gradients of q, k and v",
    "varlen": "packed sequences of different lengths (cu_seqlens, seqused_k)",
    "paged": "keys and values in the pages of a cache, of any size",
    "causal": "causal mask, bottom-right or top-left aligned",
    "window": "sliding window, either side, both alignments",
    "boolean mask": "boolean tensor, broadcast over any axis",
    "softcap": "soft-capped scores",
    "alibi": "linear biases by slope, (h,) or (b, h)",
    "bias": "additive tensor, broadcast over any axis",
    "bias gradient": "reduced over the broadcast axes in fp32, always deterministic",
    "sink": "learnable logit per head, with its gradient",
    "dropout": "counter-based Philox, bit-exact to PyTorch's flash and memory-efficient kernels",
    "gqa": "fewer key/value heads than query heads, summed in fp32",
    "dim_v != dim_qk": "value heads of another size",
    "deterministic": "bit-equal gradients from run to run",
    "unaligned rows": "rows that start off multiples of 16 bytes",
    "zero or negative strides": "expanded and reversed axes",
    "split keys": "the keys of a query shared by several blocks, merged in a fixed order",
}
"""Everything a problem can need beyond the plain product, in the words of the support table."""


def needs(problem: Problem) -> list[str]:
    """The features a problem makes use of."""
    used = {
        "backward": problem.direction == "backward",
        "varlen": problem.layout == "varlen" and not problem.page_size,
        "paged": problem.page_size != 0,
        "causal": problem.mask.kind == "causal",
        "window": problem.mask.kind == "window",
        "boolean mask": problem.mask.tensor,
        "softcap": problem.softcap != 0,
        "alibi": problem.alibi,
        "bias": problem.bias is not None,
        "bias gradient": problem.bias_grad,
        "sink": problem.sink,
        "dropout": problem.dropout is not None,
        "gqa": problem.group != 1,
        "dim_v != dim_qk": problem.dim_v != problem.dim_qk,
        "deterministic": problem.deterministic,
        "unaligned rows": problem.copy_bytes < 16,
        "zero or negative strides": not problem.ascending,
        "split keys": problem.num_splits > 1,
    }
    return [feature for feature in FEATURES if used[feature]]


_DROPOUTS = {None: "NoDropout", "byte": "ByteDropout", "word": "WordDropout"}


def _base_score(problem: Problem) -> str:
    """The score policy of q.k alone, without its number type."""
    # A scale below 1e-30 leaves nothing of a score anyway, and its inverse may be no float.
    if not problem.softcap:
        return "ScaledScore" if problem.softmax_scale > 1e-30 else "SignedScore"
    # The fast tangent errs by 2^-23 of the cap: less than 16-bit results show of caps as models have them.
    fast = problem.dtype.itemsize == 2 and 2**-8 <= problem.softcap <= 2**8 and abs(problem.softmax_scale) < 1e30
    return "SoftCapScore" if fast else "ExactSoftCapScore"


def _unit_score(problem: Problem, real: str) -> str:
    """A score policy with the unit of the problem's, for row-wise kernels that read rows' states."""
    return f"{'SignedScore' if problem.alibi or problem.bias else _base_score(problem)}<{real}>"


def _score(problem: Problem, real: str) -> str:
    """The score policy: a scale or a soft cap, plus a term for each additive bias."""
    score = f"{_base_score(problem)}<{real}>"
    for term in (["Alibi"] if problem.alibi else []) + ([f"Bias<{problem.bias.cuda}>"] if problem.bias else []):
        score = f"Plus<{score}, {term}>"
    return score


def _with_bias_copies(config: Config, problem: Problem, bias: DType) -> Config:
    """The same config with a bias that is copied beside the keys instead of a term of the score."""
    score = _score(replace(problem, bias=None), "float")
    copies = f"{'BiasRow' if problem.bias_broadcast[2] else 'BiasTiles'}<{bias.cuda}>"
    return replace(config, score=score if problem.alibi else f"NaturalScore<{score}>", bias_copies=copies)


def _real(problem: Problem) -> str:
    """The accumulator's type in CUDA."""
    return "double" if problem.dtype.accumulator == np.float64 else "float"


def _sequence(problem: Problem) -> str:
    """The policy that says how long sequences are and where they lie."""
    if problem.page_size:
        return "PagedSequence"
    return "VarlenSequence" if problem.layout == "varlen" else "DenseSequence"


def _config(problem: Problem, tile: tiles.Tile) -> Config:
    """The compile-time choices that follow from the problem, for a kernel with this tile."""
    real = _real(problem)
    masks = {"none": "NoMask", "causal": "CausalMask", "window": "WindowMask"}
    mask = masks[problem.mask.kind]
    return Config(
        element=problem.dtype.cuda,
        dim_qk=problem.dim_qk,
        dim_v=problem.dim_v,
        threads=tile.threads,
        sequence=_sequence(problem),
        mask=f"TensorMask<{mask}>" if problem.mask.tensor else mask,
        score=_score(problem, real),
        dropout=_DROPOUTS[problem.dropout],
        sink="LearnableSink" if problem.sink else "NoSink",
        reduction="OrderedReduction" if problem.deterministic else "AtomicReduction",
        tile_q=tile.tile_q,
        tile_kv=tile.tile_kv,
        stages=tile.stages,
        dim_splits=tile.dim_splits,
        copy_bytes=max(problem.copy_bytes, problem.dtype.itemsize),
        blocks_per_sm=tile.blocks_per_sm,
        ping_pong=tile.ping_pong,
        row_buffers=tile.row_buffers,
        producer_registers=tile.producer_registers,
        consumer_registers=tile.consumer_registers,
        smem_bytes=tile.smem_bytes,
    )


def _plain(config: Config, **changes: Any) -> Config:
    """The same config without the choices a row-wise helper kernel does not read, so that variants share it."""
    neutral = replace(config, mask="NoMask", score="ScaledScore<float>", dropout="NoDropout", sink="NoSink")
    return replace(neutral, reduction="AtomicReduction", tile_kv=1, stages=1, blocks_per_sm=1, **changes)


def _tiles(longest: int, tile: int) -> int:
    """Tiles of the longest sequence; never 0, so that outputs of empty sequences are still written."""
    return max(1, -(-longest // tile))


def _query_blocks(problem: Problem, tile_q: int) -> int:
    return _tiles(problem.len_q, tile_q) * problem.heads_q * problem.batch


def _key_blocks(problem: Problem, tile_kv: int) -> int:
    return _tiles(problem.len_kv, tile_kv) * problem.heads_kv * problem.batch


def _row_workspaces(problem: Problem) -> tuple[Workspace, ...]:
    """What ``bwd_delta`` leaves of every query row: a delta and a ``RowShift``, laid out like the log-sum-exp."""
    rows = problem.heads_q * (problem.total_q if problem.layout == "varlen" else problem.batch * problem.len_q)
    return tuple(
        Workspace(name, problem.dtype.accumulator, shape) for name, shape in (("delta", (rows,)), ("shift", (rows, 2)))
    )


def delta_step(problem: Problem) -> Step:
    """The first launch of every backward."""
    config = _plain(_config(problem, tiles.Tile(tile_q=64, tile_kv=1, threads=128, smem_bytes=0)), dim_qk=1)
    return Step("bwd_delta", "BwdParams", config, _query_blocks(problem, config.tile_q))


def _rng_step(problem: Problem) -> tuple[Step, ...]:
    """The launch before a forward with dropout."""
    if problem.dropout is None:
        return ()
    config = Config(element="float", dim_qk=1, dim_v=1, threads=32)  # one kernel for all
    return (Step("fwd_rng", "FwdParams", config, 1),)


def _sink_step(problem: Problem) -> tuple[Step, ...]:
    """The launch for the gradient of the sink logits, where there are any."""
    if not problem.sink:
        return ()
    threads = 256
    tile = tiles.Tile(1, 1, threads, smem_bytes=threads * problem.dtype.accumulator.itemsize)
    config = _plain(_config(problem, tile), dim_qk=1, dim_v=1, copy_bytes=problem.dtype.itemsize)
    config = replace(config, score=_unit_score(problem, _real(problem)))
    return (Step("bwd_sink", "BwdParams", config, problem.heads_q),)


def _bias_step(problem: Problem, kernel: str, tile: tiles.Tile) -> tuple[Step, ...]:
    """The launch for the gradient of the bias, where it is wanted."""
    if not problem.bias_grad:
        return ()
    counts = (problem.batch, problem.heads_q, -(-problem.len_q // tile.tile_q), -(-problem.len_kv // tile.tile_kv))
    blocks = prod(1 if one else n for n, one in zip(counts, problem.bias_broadcast, strict=True))
    config = replace(_config(problem, tile), reduction="AtomicReduction")
    return (Step(kernel, "BwdParams", config, blocks),)


def _sm90_forward(problem: Problem, device: Device) -> Plan:
    tile = tiles.forward_sm90(problem, device)
    works = _query_blocks(problem, tile.tile_q)
    if problem.layout == "varlen":  # as many tiles as there may be
        works = problem.heads_q * (problem.total_q // tile.tile_q + problem.batch)
    blocks = min(works, device.num_sms)  # they go from one tile to another, and load the next while they store the last
    differ = problem.layout == "varlen" or problem.mask.kind != "none"  # tiles in length, so they are drawn
    tickets = Workspace("tickets", np.dtype(np.int32), (2,), kept=True)
    workspaces = (tickets,) if differ and blocks < works else ()
    config = replace(_config(problem, tile), reduction="AtomicReduction")
    boxes: tuple[Box, ...] = (
        Box("q", tiles.SM90_ROWS),
        Box("k", tile.tile_kv),
        Box("v", tile.tile_kv),
        Box("out", tiles.SM90_ROWS),
    )
    if problem.bias and problem.copies_bias:
        config = _with_bias_copies(config, problem, problem.bias)
        boxes += (Box("bias", 1 if problem.bias_broadcast[2] else tile.tile_q),)
    step = Step("fwd_sm90", "FwdParams", config, blocks, boxes)
    most = ceiling.forward_sm90(problem, tile)
    return Plan(problem, device, "sm90", (*_rng_step(problem), step), workspaces, reason=tile.reason, ceiling=most)


def _leave_to_sm80(problem: Problem, device: Device) -> list[str]:
    """Why a decoding step is left to ``sm80``, where heads share a tile or blocks the keys; and what is too large."""
    if _query_blocks(problem, tiles.SM90_ROWS) >= 2**31:
        return ["2^31 query tiles or more"]
    if problem.len_q > tiles.SM90_ROWS:
        return []
    tile, small = tiles.forward_sm80(problem, device), tiles.small_forward_sm80(problem, device)
    division = divide(problem, device, tile, small)
    return [] if division.plain else [f"sm80 serves few queries better ({division.reason})"]


def _forward(problem: Problem, device: Device, family: str, tile: tiles.Tile, small: tiles.Tile) -> Plan:
    """The plan of a forward whose plain kernel has this tile, and a small one where rows are few or keys are split."""
    division = divide(problem, device, tile, small)
    tile = tile if division.plain else small
    whole = replace(_config(problem, tile), reduction="AtomicReduction")
    config, rows, heads = whole, problem.len_q, problem.heads_q
    if division.grouped:
        config, rows, heads = replace(config, heads="HeadGroup"), problem.len_q * problem.group, problem.heads_kv
    steps = _rng_step(problem)
    workspaces: tuple[Workspace, ...] = ()
    blocks = _tiles(rows, tile.tile_q) * heads * problem.batch
    if division.num_splits == 1:
        steps += (Step(f"fwd_{family}", "FwdParams", config, blocks),)
    else:
        config = replace(config, split="KeySplits", sink="NoSink")  # a sink counts once, in the combine kernel
        combine = _plain(whole, dim_qk=1, copy_bytes=problem.dtype.itemsize, tile_q=8, threads=128, smem_bytes=0)
        combine = replace(combine, sink=whole.sink, score=_unit_score(problem, _real(problem)))
        steps += (
            Step(f"fwd_{family}", "FwdParams", config, blocks * division.num_splits),
            Step("fwd_combine", "FwdParams", combine, _query_blocks(problem, combine.tile_q)),
        )
        # PartRows of attention/split.cuh
        rows = problem.rows_q + (problem.batch if problem.layout == "varlen" else 0)
        shape = (division.num_splits, rows, problem.heads_q)
        workspaces = (
            Workspace("partial_out", problem.dtype.accumulator, (*shape, problem.dim_v)),
            Workspace("partial_state", problem.dtype.accumulator, (*shape, 2)),
        )
    return Plan(
        problem, device, family, steps, workspaces, tile.reason, num_splits=division.num_splits,
        division=division.reason,
    )  # fmt: skip


def _sm80_forward(problem: Problem, device: Device) -> Plan:
    tile, small = tiles.forward_sm80(problem, device), tiles.small_forward_sm80(problem, device)
    return _forward(problem, device, "sm80", tile, small)


def _sm80_backward(problem: Problem, device: Device) -> Plan:
    tile = tiles.backward_sm80(problem, device)
    config = _config(problem, tile)
    blocks = _key_blocks(problem, tile.tile_kv) * tile.dim_splits
    convert = _plain(config, dim_v=1, smem_bytes=tiles.convert_smem(problem, tile))
    steps = (
        delta_step(problem),
        Step("bwd_sm80", "BwdParams", config, blocks),
        Step("bwd_convert", "BwdParams", convert, _query_blocks(problem, tile.tile_q)),
        *_bias_step(problem, "bwd_bias_sm80", tiles.bias_sm80(problem)),
        *_sink_step(problem),
    )

    if problem.layout == "varlen":  # VarlenSequence::num_q_tiles
        q_tiles = problem.total_q // tile.tile_q + problem.batch
    else:
        q_tiles = problem.batch * -(-problem.len_q // tile.tile_q)
    columns = tiles.dq_columns(problem.dim_qk, tile.tile_q, tile.threads, tile.dim_splits)
    shape = (problem.heads_q * q_tiles, tile.tile_q, columns)
    workspaces = [
        *_row_workspaces(problem),
        Workspace("dq_accum", np.dtype(np.float32), shape, zeroed=True),
    ]
    if problem.deterministic:
        turns = (problem.heads_q * q_tiles * tile.dim_splits,)
        workspaces.append(Workspace("dq_turn", np.dtype(np.int32), turns, zeroed=True))
    return Plan(problem, device, "sm80", steps, tuple(workspaces), reason=tile.reason)


def _simt_forward(problem: Problem, device: Device) -> Plan:
    tile = tiles.forward_simt(problem, device)
    return _forward(problem, device, "simt", tile, tile)


def _simt_backward(problem: Problem, device: Device) -> Plan:
    tile = tiles.backward_simt(problem, device)
    # No block adds to another's rows, so the gradients are always deterministic and the config need not say so.
    dkdv = replace(_config(problem, tile), reduction="AtomicReduction")
    dq = replace(dkdv, tile_q=tile.tile_kv, tile_kv=tile.tile_q)  # either kernel owns as many rows
    steps = (
        delta_step(problem),
        Step("bwd_simt_dkdv", "BwdParams", dkdv, _key_blocks(problem, dkdv.tile_kv)),
        Step("bwd_simt_dq", "BwdParams", dq, _query_blocks(problem, dq.tile_q)),
        *_bias_step(problem, "bwd_bias_simt", tiles.bias_simt(problem)),
        *_sink_step(problem),
    )
    return Plan(problem, device, "simt", steps, _row_workspaces(problem), reason=tile.reason)


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
    forward=_sm90_forward,
    backward=None,
    leave=_leave_to_sm80,
)  # fmt: skip

SM80 = Family(
    name="sm80",
    summary="tensor cores by mma.sync and cp.async",
    min_capability=(8, 0),
    dtypes=("fp16", "bf16"),
    max_dim=256,
    features=tuple(FEATURES),
    forward=_sm80_forward,
    backward=_sm80_backward,
)

SIMT = Family(
    name="simt",
    summary="plain fused multiply-adds",
    min_capability=(7, 0),
    dtypes=("fp16", "bf16", "fp32", "fp64"),
    max_dim=1024,
    features=tuple(FEATURES),
    forward=_simt_forward,
    backward=_simt_backward,
)

FAMILIES: tuple[Family, ...] = (SM90, SM80, SIMT)
"""In order of preference: the first without a reason against a problem runs it."""
