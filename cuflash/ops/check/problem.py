"""The arrays and keywords of a call to its Problem: every check, one after another."""

from __future__ import annotations

from collections.abc import Mapping

from cuflash.arrays import View
from cuflash.dtypes import DType
from cuflash.numbers import flag
from cuflash.ops.call import OUTPUTS, Options
from cuflash.ops.check.array import (
    check_alignment,
    check_like,
    check_rows,
    check_writeable,
    copy_bytes_of,
    outer_strides,
)
from cuflash.ops.check.bias import bias_of, check_alibi, check_sink
from cuflash.ops.check.cache import NEW
from cuflash.ops.check.dropout import check_rng_state, dropout_of
from cuflash.ops.check.layout import layout_of
from cuflash.ops.check.mask import blocks_of, mask_of
from cuflash.ops.check.options import num_splits_of, softcap_of, softmax_scale_of
from cuflash.ops.check.rotary import rotary_of
from cuflash.ops.check.sizes import check_sizes, dtype_of, rows_of, scores_of, shapes, sizes_of
from cuflash.ops.check.tangents import TANGENT, check_tangents, tangents_of
from cuflash.ops.check.written import captured_grad_of, flat_of
from cuflash.problem import Direction, Problem

_LIKE_Q = ("out", "dout", "dq", "dk", "dv")
"""Arrays of the element type of q, k and v."""
_PER_ROW = ("lse", "dlse", "row_state")
"""Arrays of the accumulator's type, with numbers for each head and query row."""


def problem_of(direction: Direction, options: Options, views: Mapping[str, View]) -> Problem:
    """Check everything about a call but the values of its arrays; longest lengths must be filled in."""
    layout = layout_of(direction, options, views)
    dtype = dtype_of(views["q"], views["k"], views["v"], options.precision)
    check_sizes(options, views)
    sizes = sizes_of(options, views)
    heads, dim_qk, dim_v = sizes["q"]["h"], sizes["q"]["d"], sizes["v"]["d"]
    dropout = dropout_of(options)
    rows = rows_of(options, views, dropout)
    _check_memory(direction, options, views, dtype)
    scores = scores_of(options, rows, heads, layout == "varlen")
    bias, broadcast, bias_boxes = bias_of(options, views, dtype, scores)
    if "alibi" in views:
        check_alibi(views["alibi"], rows.batch, heads)
    if "sink" in views:
        check_sink(views["sink"], heads)
    check_tangents(views, tangents_of(views), options)
    if direction == "backward":
        check_rng_state(options, dropout, views.get("rng_state"))
    captured_grad = captured_grad_of(options, views)
    tensors = _tensors(views)
    return Problem(
        direction=direction,
        dtype=dtype,
        **rows._asdict(),
        heads_q=heads,
        heads_kv=sizes["k"]["h"],
        dim_qk=dim_qk,
        dim_v=dim_v,
        layout=layout,
        softmax_scale=softmax_scale_of(options, dtype, dim_qk),
        softcap=softcap_of(options, dtype),
        leftpad="leftpad" in views,
        appended=views["k_new"].shape[1] if "k_new" in views else 0,
        rotary=rotary_of(options, views, dtype, rows.len_kv),
        mask=mask_of(options, views, scores).clipped(rows.len_q, rows.len_kv),
        alibi="alibi" in views,
        bias=bias,
        bias_broadcast=broadcast,
        bias_boxes=bias_boxes,
        bias_grad=options.bias_grad and direction == "backward",
        score_mod=options.score_mod,
        mask_mod=options.mask_mod,
        block_mask=blocks_of(options, scores),
        captured_flat=flat_of(views),
        captured_grad=captured_grad and direction == "backward",
        sink="sink" in views,
        dropout=dropout.scheme if dropout else None,
        deterministic=flag("deterministic", options.deterministic) and direction == "backward",
        tangents=tuple(tangents_of(views)) if options.tangents != "no" else None,
        num_splits=num_splits_of(options) if direction == "forward" else 0,
        copy_bytes=copy_bytes_of(tensors, (dim_qk, dim_v)),
        shared_kv=direction == "forward" and _share_rows(views["k"], views["v"]),
        ascending=all(stride > 0 for view in tensors if not view.empty for stride in outer_strides(view)),
    )


def _share_rows(k: View, v: View) -> bool:
    """Whether v is the first columns of k. Of arrays that a compiler is yet to place nothing is known."""
    return k.pointer == v.pointer != 0 and k.strides == v.strides and v.shape[-1] <= k.shape[-1]


def _check_memory(direction: Direction, options: Options, views: Mapping[str, View], dtype: DType) -> None:
    """What follows from q, k and v must be like them, rows contiguous, elements aligned and outputs writeable."""
    expected = shapes(options, views)
    for name in (*_LIKE_Q, *_PER_ROW):
        if name in views:
            of_accumulator = name in _PER_ROW
            check_like(views[name], expected[name], dtype.accumulator.name if of_accumulator else views["q"].dtype)
    for view in _tensors(views):
        check_rows(view)
    for name in (*_PER_ROW, TANGENT + "bias"):
        if name in views:
            check_alignment(views[name])
    if TANGENT + "sink" in views:
        check_rows(views[TANGENT + "sink"])
    for name in written(direction, views):
        check_writeable(views[name])


def _tensors(views: Mapping[str, View]) -> list[View]:
    """The given arrays that have rows of elements."""
    changes = (TANGENT + name for name in ("q", "k", "v"))
    return [views[name] for name in ("q", "k", "v", *_LIKE_Q, *NEW, *changes) if name in views]


def written(direction: Direction, views: Mapping[str, View]) -> tuple[str, ...]:
    """The given arrays that a call writes: its outputs, and a cache that it appends to."""
    cache = ("k", "v") if "k_new" in views else ()
    return (*cache, *(name for name in OUTPUTS[direction] if name in views))
