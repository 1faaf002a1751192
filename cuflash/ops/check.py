"""The arrays and keywords of a call to its Problem, or an InvalidArgument that says what is wrong with which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cuflash.arrays import View
from cuflash.dtypes import DTYPES, DType
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask, band
from cuflash.ops.options import OUTPUTS, Options
from cuflash.ops.packed import is_packed, length
from cuflash.problem import Direction, Layout, Problem

MAX_LENGTH = 2**30
"""Rows of one sequence: positions and the distances between any two are 32-bit numbers in the kernels."""

_REQUIRED: dict[Direction, tuple[str, ...]] = {
    "forward": ("q", "k", "v"),
    "backward": ("dout", "q", "k", "v", "out", "lse"),
}
_PER_ELEMENT = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_PER_ROW = ("lse", "dlse")
_WORDS = {"b": "batch size", "s": "length", "total": "packed length", "h": "number of heads", "d": "head dimension"}
_EQUAL = ("b", "q", "k"), ("b", "q", "v"), ("s", "k", "v"), ("total", "k", "v"), ("d", "q", "k"), ("h", "k", "v")
"""Axes along which two tensors must have one size."""
_DTYPES = {dtype.numpy.name: dtype for dtype in DTYPES.values()}


def problem_of(direction: Direction, options: Options, views: Mapping[str, View]) -> Problem:
    """Check everything about a call but the values of its arrays; longest lengths must be filled in."""
    varlen = layout_of(direction, options, views) == "varlen"
    axes = options.axes(varlen)
    dtype = _dtype(views["q"], views["k"], views["v"])
    q, k, v = (dict(zip(axes, views[name].shape, strict=True)) for name in ("q", "k", "v"))
    _check_sizes(options, views, axes)

    if varlen:
        batch = views["cu_seqlens_q"].shape[0] - 1
        len_q = min(length(options, "max_seqlen_q"), q["total"])
        len_kv = min(length(options, "max_seqlen_k"), k["total"])
    else:
        batch, len_q, len_kv = q["b"], q["s"], k["s"]
    for name, rows, total in (("q", len_q, q.get("total", 0)), ("k", len_kv, k.get("total", 0))):
        if rows > MAX_LENGTH or total >= 2**31:
            raise InvalidArgument(
                f"{options.name(name)} has {max(rows, total)} rows; "
                "expected at most 2**30 in a sequence, and fewer than 2**31 in all packed ones."
            )

    expected = shapes(options, views)
    for name in (*_PER_ELEMENT[3:], *_PER_ROW):
        if name in views:
            _check_like(views[name], expected[name], dtype.accumulator.name if name in _PER_ROW else views["q"].dtype)
    tensors = [views[name] for name in _PER_ELEMENT if name in views]
    for view in tensors:
        _check_rows(view)
    for name in _PER_ROW:
        if name in views:
            _check_alignment(views[name])
    for name in OUTPUTS[direction]:
        if name in views:
            _check_writeable(views[name])

    scale = options.softmax_scale
    softcap = _finite("softcap", options.softcap)
    if softcap < 0:
        raise InvalidArgument(f"softcap is {softcap}; expected 0 (none) or a positive number.")
    return Problem(
        direction=direction,
        dtype=dtype,
        batch=batch,
        heads_q=q["h"],
        heads_kv=k["h"],
        len_q=len_q,
        len_kv=len_kv,
        dim_qk=q["d"],
        dim_v=v["d"],
        layout="varlen" if varlen else "dense",
        total_q=q.get("total", 0),
        total_kv=k.get("total", 0),
        mask=_mask(options, views, (batch, q["h"], len_q, len_kv)).clipped(len_q, len_kv),
        softcap=softcap,
        softmax_scale=q["d"] ** -0.5 if scale is None else _finite(options.name("softmax_scale"), scale),
        deterministic=_flag("deterministic", options.deterministic) and direction == "backward",
        copy_bytes=_copy_bytes(tensors, (q["d"], v["d"])),
    )


def layout_of(direction: Direction, options: Options, views: Mapping[str, View]) -> Layout:
    """Check that the arrays are there, on one device and of the right ranks; how they lie."""
    for name in _REQUIRED[direction]:
        if name not in views:
            raise InvalidArgument(f"{options.name(name)} is None; expected an array.")
    for view in views.values():
        if view.device != views["q"].device:
            raise InvalidArgument(
                f"{view.name} is on {view.device} but {views['q'].name} is on {views['q'].device}; "
                "all arrays of a call must be on one device. Move one of them."
            )
    varlen = is_packed(options, views)
    axes = options.axes(varlen)
    for view in (views[name] for name in ("q", "k", "v")):
        if len(view.shape) != len(axes):
            raise InvalidArgument(
                f"{view.name} has {len(view.shape)} dimensions, shape {view.shape}; "
                f"expected {len(axes)}: ({', '.join(axes)})."
            )
    return "varlen" if varlen else "dense"


def shapes(options: Options, views: Mapping[str, View]) -> dict[str, tuple[int, ...]]:
    """The shapes of everything that follows from those of q, k and v."""
    q, k, v = (views[name].shape for name in ("q", "k", "v"))
    varlen = len(q) == 3
    sizes = dict(zip(options.axes(varlen), q, strict=True))
    rows = tuple(sizes[axis] for axis in options.row_axes(varlen))
    out = (*q[:-1], v[-1])
    return {"out": out, "dout": out, "lse": rows, "dlse": rows, "delta": rows, "dq": q, "dk": k, "dv": v}


def check_separate(spans: Sequence[tuple[str, int, int]], num_outputs: int) -> None:
    """Refuse outputs whose bytes, from first to last, reach into those of an input; outputs are the last spans."""
    inputs, outputs = spans[:-num_outputs], spans[-num_outputs:]
    for output, out_first, out_end in outputs:
        for name, first, end in inputs:
            if out_first < end and first < out_end:
                raise InvalidArgument(
                    f"{output} shares memory with {name}, which is still read while {output} is written. "
                    f"Give {output} memory of its own."
                )


def _show(view: View, axes: Sequence[str]) -> str:
    """``q: (b=2, s=128, h=8, d=64) float16``."""
    sizes = ", ".join(f"{axis}={n}" for axis, n in zip(axes, view.shape, strict=True))
    return f"{view.name}: ({sizes}) {view.dtype}"


def _dtype(q: View, k: View, v: View) -> DType:
    if q.dtype not in _DTYPES:
        raise InvalidArgument(
            f"{q.name} is {q.dtype}; expected {', '.join(_DTYPES)}. Convert {q.name}, {k.name} and {v.name}."
        )
    for view in (k, v):
        if view.dtype != q.dtype:
            raise InvalidArgument(f"{view.name} is {view.dtype} but {q.name} is {q.dtype}; convert one of them.")
    return _DTYPES[q.dtype]


def _check_sizes(options: Options, views: Mapping[str, View], axes: Sequence[str]) -> None:
    """q, k and v must fit each other."""
    for axis, *pair in _EQUAL:
        if axis in axes:
            a, b = (views[name] for name in pair)
            size_a, size_b = (view.shape[axes.index(axis)] for view in (a, b))
            if size_a != size_b:
                raise InvalidArgument(
                    f"{b.name} has {_WORDS[axis]} {size_b} but {a.name} has {size_a}; they must be equal.\n"
                    f"  {_show(a, axes)}    {_show(b, axes)}"
                )
    for view in (views[name] for name in ("q", "k", "v")):
        for axis in ("h", "d"):
            if view.shape[axes.index(axis)] == 0:
                raise InvalidArgument(f"{view.name} has {_WORDS[axis]} 0; expected at least 1.\n  {_show(view, axes)}")
    q, k = views["q"], views["k"]
    heads_q, heads_kv = (view.shape[axes.index("h")] for view in (q, k))
    both = f"{k.name} has {heads_kv} heads but {q.name} has {heads_q}"
    drawn = f"\n  {_show(q, axes)}    {_show(k, axes)}"
    if heads_q % heads_kv:
        raise InvalidArgument(f"{both}; heads_q must be a multiple of heads_kv.{drawn}")
    if heads_q != heads_kv and not _flag("enable_gqa", options.enable_gqa):
        raise InvalidArgument(f"{both}; pass enable_gqa=True to let query heads share key/value heads.{drawn}")


def _check_like(view: View, shape: tuple[int, ...], dtype: str) -> None:
    if view.shape != shape:
        raise InvalidArgument(f"{view.name} has shape {view.shape}; expected {shape}.")
    if view.dtype != dtype:
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected {dtype}.")


def _outer_strides(view: View) -> list[int]:
    """Strides in bytes of all axes but the last along which there is more than one element."""
    return [stride for n, stride in zip(view.shape[:-1], view.strides[:-1], strict=True) if n > 1]


def _check_rows(view: View) -> None:
    """Rows must be contiguous; the other strides are free."""
    if not view.empty and view.shape[-1] > 1 and view.strides[-1] != view.itemsize:
        raise InvalidArgument(
            f"{view.name} is not contiguous along its last dimension, whose stride is {view.strides[-1]} bytes; "
            f"expected {view.itemsize}. Pass a contiguous copy of it."
        )
    _check_alignment(view)


def _check_alignment(view: View) -> None:
    """Elements must start at multiples of their size."""
    if not view.empty and any(n % view.itemsize for n in (view.pointer, *_outer_strides(view))):
        raise InvalidArgument(
            f"{view.name} is misaligned: not all of its elements start at a multiple of their {view.itemsize} bytes. "
            "Pass a contiguous copy of it."
        )


def _check_writeable(view: View) -> None:
    """An output must be writeable, and no two of its elements may be one."""
    if not view.writeable:
        raise InvalidArgument(f"{view.name} is read-only; pass an array that can be written.")
    if view.empty:
        return
    reach = 0
    for stride, n in sorted((abs(stride), n) for n, stride in zip(view.shape, view.strides, strict=True) if n > 1):
        if stride < reach + view.itemsize:
            raise InvalidArgument(
                f"{view.name} has elements that share memory, shape {view.shape} with strides of {view.strides} bytes; "
                "pass an array without overlap."
            )
        reach += stride * (n - 1)


def _finite(name: str, value: Any) -> float:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise InvalidArgument(f"{name} is {value!r}; expected a finite number.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
        raise InvalidArgument(f"{name} is {value!r}; expected True or False.")
    return bool(value)


def _mask(options: Options, views: Mapping[str, View], scores: tuple[int, int, int, int]) -> Mask:
    """The mask of the keywords, or of the boolean tensor, which must broadcast to the shape of the scores."""
    causal = _flag(options.name("causal"), options.causal)
    if options.alignment not in ("bottom-right", "top-left"):
        raise InvalidArgument(f"alignment is {options.alignment!r}; expected 'bottom-right' or 'top-left'.")
    window = options.window_size
    whole = isinstance(window, tuple) and all(isinstance(n, int | np.integer) for n in window)
    if not whole or len(window) != 2:
        raise InvalidArgument(f"window_size is {window!r}; expected a tuple of two integers (left, right).")
    if not all(-1 <= bound < 2**31 for bound in window):
        raise InvalidArgument(f"window_size is {window!r}; expected bounds from 0 to 2**31 - 1, or -1 for unbounded.")
    view = views.get("attn_mask")
    if view is None:
        return band(causal, window, options.alignment)

    if causal or window != (-1, -1):
        other = options.name("causal") if causal else "window_size"
        raise InvalidArgument(f"attn_mask and {other} are given together; combine them into attn_mask.")
    if "cu_seqlens_q" in views:
        raise InvalidArgument("attn_mask is given with cu_seqlens_q; masks are for sequences that are not packed.")
    if view.dtype != "bool":
        raise InvalidArgument(f"attn_mask is {view.dtype}; expected bool, True where a query and a key take part.")
    padded = (1,) * (4 - len(view.shape)) + view.shape
    if len(padded) != 4 or any(n not in (1, size) for n, size in zip(padded, scores, strict=True)):
        raise InvalidArgument(
            f"attn_mask has shape {view.shape}; expected one that broadcasts to (b, heads_q, len_q, len_kv) = {scores}."
        )
    return Mask(tensor=True)


def _copy_bytes(tensors: Sequence[View], dims: Sequence[int]) -> int:
    """The widest access, up to 16 bytes, that every row of every tensor starts and ends on."""
    addresses = [n for view in tensors if not view.empty for n in (view.pointer, *_outer_strides(view))]
    return math.gcd(16, *(dim * tensors[0].itemsize for dim in dims), *addresses)
