"""The gradient of a bias: stored by the kernel that makes dS, or summed over what the bias is broadcast along.

Where every element of the bias belongs to one pair of one head, dS is its gradient, and in fp32 and fp64, where to two,
their sum, which is the same in either order. Elsewhere ``bwd_bias_*`` makes dS once more, tile by tile of the bias, and
sums it in registers over all that reads the tile. Against adding up in global memory what the main kernel has, per pair
of a (1, h, s, s) bias:

- the sum, 4 bytes a pair by atomics in L2 and for the same bits every time in turns; at some 2.5 TB/s 1.6 ps;
- two products of 2 d multiply-adds and an exponential; 0.6 ps at d 32 and 0.8 ps at d 64 on an H100's mma.sync, and
  8 d / 128 bytes of rows from L2 by tiles of 128, 0.4 and 0.8 ps.

So the products are the cheaper way, and the memory beside them is linear in the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from cuflash.device import Device
from cuflash.plan.config import HEADER, AttentionConfig, Config
from cuflash.plan.plan import Box, Step, Workspace
from cuflash.problem import Problem

_MOST_ROUNDS = 4
"""Blocks for every place there is for one: more parts even out no better and cost memory."""

_OVERHEAD = 2
"""What the start and the end of a block cost, in tiles of dS."""

_SUM_THREADS = 256


def is_in_place(problem: Problem) -> bool:
    """Whether the main kernel leaves its dS in the gradient of the bias: no two pairs share an element.

    Of floats and doubles, two may, as making dS once more takes longer than adding it. H200, b 2 h 16 s 4096 d 64 with
    a bias of the batch: fp32 10.8 ms, before 17.6 by plain multiply-adds; bf16 3.2 ms, and 2.2 by a sum of its own.

    The slope of a soft cap or a written score is part of its dS but not of this gradient.
    """
    sloped = problem.softcap or problem.score_mod is not None
    most = 2 if problem.dtype.itemsize > 2 else 1
    return problem.bias_grad and not sloped and _sharing(problem) <= most and _sharing_in_a_head(problem) == 1


def _sharing(problem: Problem) -> int:
    """How many pairs share an element of the bias."""
    return prod(n for n, one in zip(_axes(problem), problem.bias_broadcast, strict=True) if one)


def _sharing_in_a_head(problem: Problem) -> int:
    return prod(n for n, one in zip(_axes(problem)[2:], problem.bias_broadcast[2:], strict=True) if one)


def sums_on_the_way(problem: Problem) -> bool:
    """Whether a kernel that goes through the batch can sum the gradient: nothing but the batch shares it."""
    return problem.bias_grad and problem.bias_broadcast == (True, False, False, False) and problem.batch > 1


def needs_zeros(problem: Problem) -> bool:
    """Whether kernels add to the gradient, or leave elements out: tiles of hidden pairs, rows of no sequence."""
    added_or_hidden = _sharing(problem) > 1 or problem.mask.kind != "none" or problem.block_mask is not None
    return problem.layout == "varlen" or (is_in_place(problem) and added_or_hidden)


def gradient_policy(problem: Problem) -> str:
    """What the main kernel does with dS (``attention/bias_gradient.cuh``)."""
    real = "double" if problem.dtype.accumulator.itemsize == 8 else "float"
    if not is_in_place(problem):
        return "NoBiasGradient"
    return f"{'Stored' if _sharing(problem) == 1 else 'Added'}BiasGradient<{real}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSumConfig(Config):
    """``bwd_bias_sum``."""

    element: str = field(metadata={HEADER: "element.cuh"})


@dataclass(frozen=True, slots=True)
class BiasSum:
    """What is launched for a gradient that is summed; nothing if there is none."""

    steps: tuple[Step, ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    parts: int = 1
    """Blocks that share what adds to one tile of the gradient."""


def bias_sum(
    problem: Problem, device: Device, kernel: str, config: AttentionConfig, boxes: tuple[Box, ...] = ()
) -> BiasSum:
    """The launches of ``backward/bias.cuh``; the config's ``blocks_per_sm`` says how many of its blocks run at once."""
    if not problem.bias_grad or is_in_place(problem):
        return BiasSum()
    batch, heads, len_q, len_kv = _axes(problem)
    counts = batch, heads, -(-len_q // config.tile_q), -(-len_kv // config.tile_kv)
    tiles = prod(n for n, one in zip(counts, problem.bias_broadcast, strict=True) if not one)
    visits = prod(n for n, one in zip(counts, problem.bias_broadcast, strict=True) if one)
    parts = even_parts(tiles, visits, device.num_sms * config.blocks_per_sm)
    adding = add_parts(problem, parts)
    return replace(adding, steps=(Step(kernel, "BwdParams", config, tiles * parts, boxes), *adding.steps))


def add_parts(problem: Problem, parts: int) -> BiasSum:
    """The launch that adds up parts of the gradient, if there are more than one."""
    if parts == 1:
        return BiasSum()
    size = prod(1 if one else n for n, one in zip(_axes(problem), problem.bias_broadcast, strict=True))
    add_up = BiasSumConfig(element=problem.dtype.cuda, threads=_SUM_THREADS)
    steps = (Step("bwd_bias_sum", "BwdParams", add_up, -(-size // _SUM_THREADS)),)
    return BiasSum(steps, (Workspace("dbias_parts", problem.dtype.accumulator, (parts, size)),), parts)


def _axes(problem: Problem) -> tuple[int, int, int, int]:
    return problem.batch, problem.heads_q, problem.len_q, problem.len_kv


def even_parts(tiles: int, visits: int, places: int) -> int:
    """How many of the blocks that run in so many places at once share the visits of a tile, so that all end soonest."""
    most = min(visits, max(1, _MOST_ROUNDS * places // max(1, tiles)))

    def time(parts: int) -> int:
        return -(-tiles * parts // places) * (-(-visits // parts) + _OVERHEAD)

    return min(range(1, max(1, most) + 1), key=time)
