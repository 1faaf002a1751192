"""The parameter block of a call: what it says of every call on arrays of a kind, and filling in pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from cuflash import jit
from cuflash.arrays import View
from cuflash.ops import check, draw, lists
from cuflash.ops.boxes import shape_and_steps
from cuflash.ops.call import Options
from cuflash.plan import Plan, policies
from cuflash.plan.config import Written
from cuflash.plan.families.sm90 import heads_per_section, key_heads_per_section
from cuflash.problem import Problem

UNBOUNDED = check.MAX_LENGTH - 1
"""A window side that hides nothing: no two positions are further apart, and with it every bound is a 32-bit number."""

_UNNUMBERED = 2**31 - 1
"""More rows than cu_seqlens_kv can count: with pages it numbers none."""

_PER_ROW = ("lse", "dlse", "delta", "tangent_lse")
"""Arrays of one number for each head and query row."""

_MAY_LACK = ("dlse", "tangent_q", "tangent_k", "tangent_v")
"""Arrays without which a call is whole."""

_STRUCTS = {"table": "pages"} | dict.fromkeys(("k_new", "v_new", "rotary_cos", "rotary_sin"), "append")
"""Which struct inside a parameter block holds a pointer, where it is not that of what both directions share."""

_MAX_BLOCKS = 256
"""Parameter blocks that are kept of a kind of call: arrays come back to the same memory, in a model layer by layer."""


def template(
    plan: Plan, options: Options, views: Mapping[str, View], shapes: Mapping[str, tuple[int, ...]]
) -> np.ndarray:
    """The parameter block of every call on arrays of this kind, with zeros for pointers."""
    problem, written = plan.problem, policies.written(plan.problem)
    params = jit.params.dtype(plan.steps[-1].params, written)
    block = np.zeros(1, params)
    _attention(block["attention"], problem, options, views)
    if written is not None:
        _captured(block["attention"], written, views)
    for listing in lists.listings(problem, plan.steps):
        for axis, lines in zip(("batch", "head"), listing.distances(problem), strict=True):
            block["attention"][f"{listing.side}_lines_{axis}"] = lines
    if problem.direction == "forward":
        block["num_splits"] = plan.num_splits
        block["heads_in_step"] = plan.heads_in_step
        block["heads_per_section"] = heads_per_section(problem)
        block["empty_lse"], block["tail_lse"] = options.empty_lse, options.tail_lse
        if problem.dropout:
            block["increment"] = np.uint64(draw.increment(problem)).astype(np.int64)
    elif problem.direction == "backward" and plan.family == "sm90":
        block["heads_per_section"] = key_heads_per_section(problem)
    if problem.bias_grad:
        shape = (1,) * (4 - len(shapes["dbias"])) + shapes["dbias"]
        for at, name in enumerate(("batch", "head", "row")):
            block[f"dbias_{name}"] = prod(shape[at + 1 :]) if shape[at] > 1 else 0
        block["bias_parts"] = plan.bias_parts
    if problem.tangents is not None:
        _pair_strides(block, "tangent_bias", views)
    if problem.page_size:
        block["pages"] = pages_of(views["k"], views["table"])
    if problem.layout == "cache":
        _append(block["append"], problem, views)
    for member in jit.params.members(params):
        name = member.removesuffix("_stride")
        if name != member and (name not in _MAY_LACK or name in views):
            _strides(block[member], name, problem, options, views, shapes)
    return block


def _attention(attention: np.ndarray, problem: Problem, options: Options, views: Mapping[str, View]) -> None:
    """Fill in the ``Attention`` struct but for its pointers."""
    for name in ("softmax_scale", "softcap", "batch", "heads_q", "heads_kv", "len_q", "len_kv", "total_q", "total_kv"):
        attention[name] = getattr(problem, name)
    if problem.page_size:
        attention["total_kv"] = _UNNUMBERED
    mask = problem.mask
    attention["window_left"] = UNBOUNDED if mask.left is None else mask.left
    attention["window_right"] = UNBOUNDED if mask.right is None else mask.right
    attention["top_left"] = mask.alignment == "top-left"
    for name in ("mask", "bias"):
        _pair_strides(attention, name, views)
    if problem.alibi and len(views["alibi"].shape) == 2:
        attention["alibi_batch"] = check.pair_strides(views["alibi"])[2]
    dropout = check.dropout_of(options)
    attention["keep_scale"] = dropout.keep_scale if dropout else 1.0
    attention["dropout_p"] = dropout.p if dropout else 0.0
    if problem.layout == "cache":
        attention["appended"] = problem.appended


def _pair_strides(struct: np.ndarray, name: str, views: Mapping[str, View]) -> None:
    """Fill in the strides of a tensor of pairs, where it is given."""
    if name in views:
        for axis, stride in zip(("batch", "head", "row", "column"), check.pair_strides(views[name]), strict=True):
            struct[f"{name}_{axis}"] = stride


def _strides(
    strides: np.ndarray,
    name: str,
    problem: Problem,
    options: Options,
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Fill in the ``Strides`` of an array, 0 along axes of one element."""
    packed = problem.layout == "varlen" and not (problem.page_size and name in ("k", "v"))  # pages lie like batches
    axes = options.row_axes(packed) if name in _PER_ROW else options.axes(packed)
    read = "rotated" if name == "q" and problem.rotary is not None else name
    shape_and_step = zip(axes, shape_and_steps(read, views, shapes), strict=True)
    steps = {axis: step if n > 1 else 0 for axis, (n, step) in shape_and_step}
    strides["batch"] = steps.get("b", 0)
    strides["row"] = steps["total" if packed else "s"]
    strides["head"] = steps["h"]


def _captured(attention: np.ndarray, written: Written, views: Mapping[str, View]) -> None:
    """Fill in what a written score or mask reads, but for its pointers."""
    for number, operand in enumerate(written.operands):
        if operand.ndim:
            view = views[f"captured{number}"]
            if number not in written.flat:
                attention[f"captured{number}_stride"] = [stride // view.itemsize for stride in view.strides]
            attention[f"captured{number}_size"] = view.shape


def _append(append: np.ndarray, problem: Problem, views: Mapping[str, View]) -> None:
    """Fill in the ``Append`` struct but for its pointers; all its tensors are (b, s, h, d)."""
    for name in ("k_new", "v_new", "q"):
        if name in views:
            for axis, (n, step) in zip(("batch", "row", "head"), shape_and_steps(name, views, {}), strict=False):
                append[f"{name}_stride"][axis] = step if n > 1 else 0
    if problem.rotary is None:
        return
    for name in ("rotary_cos", "rotary_sin"):
        (rows, step), _ = shape_and_steps(name, views, {})
        append[f"{name}_row"] = step if rows > 1 else 0
        append["rotary_rows"] = rows
    append["turn_together"] = problem.rotary.together


def pages_of(k: View, table: View) -> np.ndarray:
    """The ``Pages`` struct without its pointer; keys lie like (b, s, h, d) tensors with a page for each b."""
    pages = np.zeros((), jit.params.dtype("Pages"))
    for axis, name in enumerate(("table_batch", "table_page")):
        pages[name] = table.strides[axis] // table.itemsize if table.shape[axis] > 1 else 0
    pages["count"], pages["size"] = k.shape[:2]
    # Exact for keys below 2**30, as rounding up adds less than 2**(shift - 30) to multiplier * size: Granlund and
    # Montgomery 1994, doi 10.1145/178243.178249.
    shift = 30 + (k.shape[1] - 1).bit_length()
    pages["multiplier"], pages["shift"] = -(-(2**shift) // k.shape[1]), shift
    return pages


def filler(
    block: np.ndarray,
    pointers: Sequence[str],
    maps: Mapping[str, jit.tensormap.TensorMap],
    device: int,
    draws: bool,
    counts: bool = False,
) -> Callable[[tuple[int, ...]], ctypes.Array]:
    """What fills a parameter block: :attr:`Prepared.params`."""
    params, copy = block.dtype, jit.parameters(block.tobytes())
    names = (*pointers, *(("generator", "seed", "offset") if draws else ("cached",) if counts else ()))
    slots = [(_word(params, name), index) for index, name in enumerate(names)]
    if "rotated" in names:  # queries are read from where they have been turned into
        slots[names.index("q")] = _inner_word(params, "append", "q"), names.index("q")
        slots[names.index("rotated")] = _word(params, "q"), names.index("rotated")
    if "rng_state" in names:  # the kernels read seed and offset where they are given, or the first one leaves them
        slots.append((_inner_word(params, "attention", "rng_state"), names.index("rng_state")))
    encoders = []
    for name, tensor in maps.items():
        first = _word(params, f"{name}_map")
        read = "rotated" if name == "q" and "rotated" in names else name
        encoders.append((slice(first, first + 16), names.index(read), jit.tensormap.encoder(tensor, device)))

    def fill(numbers: tuple[int, ...]) -> ctypes.Array:
        filled: Any = copy()
        for word, index in slots:
            filled[word] = numbers[index]
        for place, index, encode in encoders:
            filled[place] = encode(numbers[index])
        return filled

    return fill if draws else lru_cache(_MAX_BLOCKS)(fill)


def _word(params: np.dtype, name: str) -> int:
    """Index of the first 8-byte word of a member of a parameter block or of a struct in it."""
    members = jit.params.members(params)
    name = "q" if name == "rotated" else name
    if name in members:
        return members[name][1] // 8
    return _inner_word(params, _STRUCTS.get(name, "attention"), name)


def _inner_word(params: np.dtype, struct: str, name: str) -> int:
    """The same of a member of a struct inside."""
    inner, offset = jit.params.members(params)[struct]
    return (offset + jit.params.members(inner)[name][1]) // 8
