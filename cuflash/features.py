"""What a problem can need beyond the plain product: one row a feature.

From these rows follow the reasons why a kernel family does not run a problem, and the support table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cuflash.dtypes import BF16
from cuflash.masks import Mask
from cuflash.mods import trace
from cuflash.problem import Blocks, Problem

PLAIN = Problem("forward", BF16, batch=1, heads_q=4, heads_kv=4, len_q=256, len_kv=256, dim_qk=64, dim_v=64)
"""A problem that needs no feature."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One row."""

    name: str
    words: str
    """What the support table says of it."""
    used: Callable[[Problem], bool]
    """Whether a problem makes use of it."""
    example: Problem
    """A problem that needs it and nothing else."""


FEATURES: dict[str, Feature] = {feature.name: feature for feature in (
    Feature("backward", "gradients of q, k and v",
        lambda problem: problem.direction == "backward",
        replace(PLAIN, direction="backward")),
    Feature("varlen", "packed sequences of different lengths (cu_seqlens, seqused_k)",
        lambda problem: problem.layout == "varlen" and not problem.page_size,
        replace(PLAIN, layout="varlen", total_q=256, total_kv=256)),
    Feature("paged", "keys and values in the pages of a cache, of any size",
        lambda problem: problem.page_size != 0,
        replace(PLAIN, layout="varlen", total_q=64, total_kv=64, page_size=16)),
    Feature("causal", "causal mask, bottom-right or top-left aligned",
        lambda problem: problem.mask.kind == "causal",
        replace(PLAIN, mask=Mask(right=0))),
    Feature("window", "sliding window, either side, both alignments",
        lambda problem: problem.mask.kind == "window",
        replace(PLAIN, mask=Mask(left=8, right=0))),
    Feature("boolean mask", "boolean tensor, broadcast over any axis",
        lambda problem: problem.mask.tensor,
        replace(PLAIN, mask=Mask(tensor=True))),
    Feature("softcap", "soft-capped scores",
        lambda problem: problem.softcap != 0,
        replace(PLAIN, softcap=30.0)),
    Feature("alibi", "linear biases by slope, (h,) or (b, h)",
        lambda problem: problem.alibi,
        replace(PLAIN, alibi=True)),
    Feature("bias", "additive tensor, broadcast over any axis",
        lambda problem: problem.bias is not None,
        replace(PLAIN, bias=BF16)),
    Feature("bias gradient", "reduced over the broadcast axes in fp32, always deterministic",
        lambda problem: problem.bias_grad,
        replace(PLAIN, bias_grad=True)),
    Feature("written score", "a Python function of the score and its position",
        lambda problem: problem.score_mod is not None,
        replace(PLAIN, score_mod=trace("score_mod", lambda score, b, h, q, k: score - 0.5 * abs(q - k)).mod)),
    Feature("written mask", "a Python function of the position",
        lambda problem: problem.mask_mod is not None,
        replace(PLAIN, mask_mod=trace("mask_mod", lambda b, h, q, k: (q ^ k) % 3 != 0).mod)),
    Feature("block mask", "lists of blocks with a visible pair: others are never visited",
        lambda problem: problem.block_mask is not None,
        replace(PLAIN, block_mask=Blocks((128, 128), trace("mask_mod", lambda b, h, q, k: q // 128 >= k // 128).mod))),
    Feature("captured gradient", "of the numbers that a written score reads",
        lambda problem: problem.captured_grad,
        replace(PLAIN, captured_grad=True)),
    Feature("tangents", "how the results change as what is read does, by `flash_attn_jvp`",
        lambda problem: problem.tangents is not None,
        replace(PLAIN, tangents=("q", "k", "v"))),
    Feature("sink", "learnable logit per head, with its gradient",
        lambda problem: problem.sink,
        replace(PLAIN, sink=True)),
    Feature("dropout", "counter-based Philox, bit-exact to PyTorch's flash and memory-efficient kernels",
        lambda problem: problem.dropout is not None,
        replace(PLAIN, dropout="byte")),
    Feature("gqa", "fewer key/value heads than query heads, summed in fp32",
        lambda problem: problem.group != 1,
        replace(PLAIN, heads_kv=1)),
    Feature("dim_v != dim_qk", "value heads of another size",
        lambda problem: problem.dim_v != problem.dim_qk,
        replace(PLAIN, dim_v=32)),
    Feature("deterministic", "bit-equal gradients from run to run",
        lambda problem: problem.deterministic,
        replace(PLAIN, deterministic=True)),
    Feature("unaligned rows", "rows that start off multiples of 16 bytes",
        lambda problem: problem.copy_bytes < 16,
        replace(PLAIN, copy_bytes=2)),
    Feature("zero or negative strides", "expanded and reversed axes",
        lambda problem: not problem.ascending,
        replace(PLAIN, ascending=False)),
    Feature("split keys", "the keys of a query shared by several blocks, merged in a fixed order",
        lambda problem: problem.direction == "forward" and problem.num_splits > 1,
        replace(PLAIN, num_splits=4)),
)}  # fmt: skip


def needs(problem: Problem) -> list[str]:
    """The features that a problem makes use of."""
    return [feature.name for feature in FEATURES.values() if feature.used(problem)]
