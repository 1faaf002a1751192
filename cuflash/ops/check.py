"""The arrays and keywords of a call to its Problem, or an InvalidArgument that says what is wrong with which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from cuflash.arrays import View
from cuflash.dropout import Dropout, Scheme
from cuflash.dtypes import DTYPES, DType
from cuflash.errors import InvalidArgument
from cuflash.masks import Alignment, Mask, band
from cuflash.numbers import finite, flag, integer, is_array, pair, scalar, shown
from cuflash.ops.call import OUTPUTS, Options
from cuflash.problem import MAX_SPLITS, Direction, Layout, Problem, Rotary

MAX_LENGTH = 2**30
"""Rows of one sequence: positions and the distances between any two are 32-bit numbers in the kernels."""

LENGTHS = ("cu_seqlens_q", "cu_seqlens_kv", "seqused_q", "seqused_kv")
"""The arrays that say where sequences lie."""

_REQUIRED: dict[Direction, tuple[str, ...]] = {
    "forward": ("q", "k", "v"),
    "backward": ("dout", "q", "k", "v", "out", "lse"),
}
_PER_ELEMENT = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_PER_ROW = ("lse", "dlse", "row_state")
_PAGES = ("num_pages", "page_size", "h", "d")
"""The axes of keys and values in the pages of a cache."""
_CACHE = ("b_cache", "s", "h", "d")
"""The same of those in a cache without pages."""
_WORDS = {
    "b": "batch size", "b_cache": "batch size", "s": "length", "total": "packed length", "h": "number of heads",
    "d": "head dimension", "num_pages": "number of pages", "page_size": "page size",
}  # fmt: skip
_EQUAL = (
    ("b", "q", "k"), ("b", "q", "v"), ("b_cache", "k", "v"), ("s", "k", "v"), ("total", "k", "v"),
    ("num_pages", "k", "v"), ("page_size", "k", "v"), ("d", "q", "k"), ("h", "k", "v"),
)  # fmt: skip
"""Axes along which two tensors must have one size."""
_RNG_STATES = [((2,), "uint64"), ((2,), "int64"), ((4,), "uint32")]
"""Shapes and dtypes that 16 bytes of seed and offset may have; JAX has no 64-bit integers by default."""
_DTYPES = {dtype.numpy.name: dtype for dtype in DTYPES.values()}
_RANGES = {"float32": (2.0**-126, 2.0**126), "float64": (2.0**-1022, 2.0**1022)}
"""What numbers beside the tensors may be at least, 0 aside, and at most, by the accumulator's dtype."""


def problem_of(direction: Direction, options: Options, views: Mapping[str, View]) -> Problem:
    """Check everything about a call but the values of its arrays; longest lengths must be filled in."""
    layout = layout_of(direction, options, views)
    varlen = layout == "varlen"
    dtype = _dtype(views["q"], views["k"], views["v"])
    q, k, v = (dict(zip(axes, views[name].shape, strict=True)) for name, axes in _axes(options, views).items())
    _check_sizes(options, views)

    dropout = dropout_of(options)
    page_size, total_q, total_kv = k.get("page_size", 0), q.get("total", 0), k.get("total", 0)
    most_kv = total_kv
    if page_size:
        total_kv, most_kv = k["num_pages"] * page_size, views["table"].shape[1] * page_size
    if varlen:
        batch = views["cu_seqlens_q"].shape[0] - 1
        len_q, len_kv = length(options, "max_seqlen_q"), length(options, "max_seqlen_k")
        if dropout is None or dropout.scheme == "byte":  # the word scheme numbers pairs by the lengths as given
            len_q, len_kv = min(len_q, total_q), min(len_kv, most_kv)
    else:
        batch, len_q, len_kv = q["b"], q["s"], k.get("s", most_kv)
        total_kv = k.get("b_cache", 0) * len_kv or total_kv
    for name, rows, total in (("q", len_q, total_q), ("k", max(len_kv, page_size), total_kv)):
        if rows > MAX_LENGTH or total >= 2**31:
            raise InvalidArgument(
                f"{options.name(name)} has {max(rows, total)} rows; "
                "expected at most 2**30 in a sequence, and fewer than 2**31 in all packed ones."
            )

    expected = shapes(options, views)
    for name in (*_PER_ELEMENT[3:], *_PER_ROW):
        if name in views:
            _check_like(views[name], expected[name], dtype.accumulator.name if name in _PER_ROW else views["q"].dtype)
    tensors = [views[name] for name in (*_PER_ELEMENT, *_NEW) if name in views]
    for view in tensors:
        _check_rows(view)
    for name in _PER_ROW:
        if name in views:
            _check_alignment(views[name])
    for name in written(direction, views):
        _check_writeable(views[name])

    scores = (batch, q["h"], len_q, len_kv)
    if varlen:  # the lengths as given, which a tensor of pairs has been made for
        scores = (batch, q["h"], length(options, "max_seqlen_q"), length(options, "max_seqlen_k"))
    bias, broadcast, bias_boxes = _bias(options, views, dtype, scores)
    if "alibi" in views:
        _check_alibi(views["alibi"], batch, q["h"])
    if "sink" in views:
        _check_like(views["sink"], (q["h"],), "float32")
        _check_rows(views["sink"])
    if direction == "backward":
        _check_rng_state(options, dropout, views.get("rng_state"))

    scale = options.softmax_scale
    if scale is not None:
        scale = _in_range(options.name("softmax_scale"), finite(options.name("softmax_scale"), scale), dtype, least=0)
    softcap = finite("softcap", options.softcap)
    if softcap < 0:
        raise InvalidArgument(f"softcap is {softcap}; expected 0 (none) or a positive number.")
    if softcap:
        softcap = _in_range("softcap", softcap, dtype, least=_RANGES[dtype.accumulator.name][0])
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
        layout=layout,
        total_q=total_q,
        total_kv=total_kv,
        page_size=page_size,
        appended=views["k_new"].shape[1] if "k_new" in views else 0,
        rotary=_rotary(options, views, dtype, len_kv),
        mask=_mask(options, views, scores).clipped(len_q, len_kv),
        softcap=softcap,
        softmax_scale=q["d"] ** -0.5 if scale is None else scale,
        alibi="alibi" in views,
        bias=bias,
        bias_broadcast=broadcast,
        bias_boxes=bias_boxes,
        bias_grad=options.bias_grad and direction == "backward",
        sink="sink" in views,
        dropout=dropout.scheme if dropout else None,
        deterministic=flag("deterministic", options.deterministic) and direction == "backward",
        num_splits=_num_splits(options) if direction == "forward" else 0,
        copy_bytes=_copy_bytes(tensors, (q["d"], v["d"])),
        ascending=all(stride > 0 for view in tensors if not view.empty for stride in _outer_strides(view)),
    )


def written(direction: Direction, views: Mapping[str, View]) -> tuple[str, ...]:
    """The given arrays that a call writes: its outputs, and a cache that it appends to."""
    cache = ("k", "v") if "k_new" in views else ()
    return (*cache, *(name for name in OUTPUTS[direction] if name in views))


def settled(options: Options) -> Options:
    """The options with the numbers that arrays and lists stand for; the same ones where there are none.

    What is left can be part of a key: two arrays may be one and hold other numbers later.
    """
    changes: dict[str, Any] = {
        name: scalar(value)
        for name, value in options.values().items()
        if name != "window_size" and isinstance(value, np.ndarray) and not value.shape
    }
    window = options.window_size
    if not isinstance(window, tuple) or any(map(is_array, window)):
        sides = pair(window)
        changes |= {} if sides is None else {"window_size": sides}
    return options.replace(**changes) if changes else options


def check_on_cuda(library: str, views: Mapping[str, View]) -> None:
    """Refuse arrays that no kernel can read, unless they lie apart, which `layout_of` says."""
    view = next(iter(views.values()))
    if not view.device.startswith("cuda"):
        raise InvalidArgument(
            f"{view.name} is a {library} array on {view.device}, which no kernel reads. "
            f"Move {view.name} to a CUDA device, or call flash_attn_func, which computes on the CPU as well."
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
    if options.cache:
        _check_cache(options, views)
        return "cache"
    varlen = _is_packed(options, views)
    if flag("validate", options.manner.validate) and not varlen:
        raise InvalidArgument("validate is True but no sequences are packed; there is nothing to check. Drop it.")
    _check_ranks(options, views)
    return "varlen" if varlen else "dense"


def _check_ranks(options: Options, views: Mapping[str, View]) -> None:
    """q, k and v must have their axes."""
    for view, axes in ((views[name], axes) for name, axes in _axes(options, views).items()):
        if len(view.shape) != len(axes):
            raise InvalidArgument(
                f"{view.name} has {len(view.shape)} dimensions, shape {view.shape}; "
                f"expected {len(axes)}: ({', '.join(axes)})."
            )
        if axes is _PAGES and view.shape[1] == 0:
            raise InvalidArgument(f"{view.name} has page size 0, shape {view.shape}; expected at least 1.")


_NEW = "k_new", "v_new"
"""Keys and values that are appended to a cache."""
_PER_SEQUENCE = "seqused_kv", "leftpad", "cache_batch"
"""Numbers of each sequence of a cache."""


def _check_cache(options: Options, views: Mapping[str, View]) -> None:
    """What says which part of a cache is in use and what is appended to it must be complete and fit q and the cache."""
    _check_ranks(options, views)
    q, k, v = (views[name] for name in ("q", "k", "v"))
    batch = q.shape[0]
    for view in (views[name] for name in _PER_SEQUENCE if name in views):
        if view.dtype != "int32":
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected int32. Convert it.")
        if view.shape != (batch,):
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected ({batch},), one for each sequence.")
        if (view.shape[0] > 1 and view.strides[0] != view.itemsize) or view.pointer % view.itemsize:
            raise InvalidArgument(f"{view.name} is not contiguous; pass a contiguous copy of it.")
    if "table" in views:
        _check_table(views["table"], batch)
        if "cache_batch" in views:
            indices, table = views["cache_batch"].name, views["table"].name
            raise InvalidArgument(
                f"{indices} and {table} are both given; a cache in pages has no batch. Pass {table}[{indices}] alone."
            )
    elif "cache_batch" not in views and k.shape[0] < batch:
        raise InvalidArgument(
            f"{k.name} has batch size {k.shape[0]} but {q.name} has {batch}; "
            f"pass {options.name('cache_batch')} to say which of them each sequence has."
        )
    new = [views.get(name) for name in _NEW]
    if (new[0] is None) != (new[1] is None):
        given, missing = _NEW if new[1] is None else reversed(_NEW)
        raise InvalidArgument(
            f"{options.name(given)} is given but {options.name(missing)} is not; both are appended, or none."
        )
    for view, cache in ((view, cache) for view, cache in zip(new, (k, v), strict=True) if view is not None):
        rows = view.shape[1] if len(view.shape) == 4 else 0
        expected = batch, rows, *cache.shape[2:]
        if view.shape != expected:
            of_cache = f"({batch}, new keys, {cache.shape[2]}, {cache.shape[3]})"
            raise InvalidArgument(
                f"{view.name} has shape {view.shape}; expected {of_cache}, with the batch of {q.name} and the heads of "
                f"{cache.name}."
            )
        if view.dtype != cache.dtype:
            raise InvalidArgument(
                f"{view.name} is {view.dtype} but {cache.name} is {cache.dtype}; convert one of them."
            )
    if new[0] is not None and new[1] is not None and new[0].shape[1] != new[1].shape[1]:
        raise InvalidArgument(
            f"{new[1].name} has length {new[1].shape[1]} but {new[0].name} has {new[0].shape[1]}; they must be equal."
        )


def _rotary(options: Options, views: Mapping[str, View], dtype: DType, room: int) -> Rotary | None:
    """How positions turn queries and new keys; cosines and sines must be there for every row of the cache."""
    interleaved = flag("rotary_interleaved", options.rotary_interleaved)
    given = [name for name in ("rotary_cos", "rotary_sin") if name in views]
    if not given:
        return None
    if len(given) == 1:
        missing = "rotary_sin" if given[0] == "rotary_cos" else "rotary_cos"
        raise InvalidArgument(f"{given[0]} is given but {missing} is not; a turn needs both.")
    if "k_new" not in views:
        raise InvalidArgument(
            f"rotary_cos is given but {options.name('k_new')} is not; queries are turned with the keys that are "
            "appended. Turn q before the call, or append."
        )
    cos, dim = views["rotary_cos"], views["q"].shape[3]
    allowed = list(dict.fromkeys((dtype.numpy.name, "float32")))
    if cos.dtype not in allowed:
        raise InvalidArgument(f"rotary_cos is {cos.dtype}; expected {' or '.join(allowed)}. Convert it.")
    if len(cos.shape) != 2 or not 0 < 2 * cos.shape[1] <= dim or cos.shape[0] < room:
        raise InvalidArgument(
            f"rotary_cos has shape {cos.shape}; expected (rows, rotary_dim / 2), at least {room} rows as the cache has "
            f"and at most {dim // 2} columns."
        )
    _check_like(views["rotary_sin"], cos.shape, cos.dtype)
    for name in given:
        _check_rows(views[name])
    together = not flag("causal", options.causal) and pair(options.window_size) == (-1, -1)
    return Rotary(2 * cos.shape[1], interleaved, _DTYPES[cos.dtype], together)


def cached_rows(name: str, cached: Any, room: int, appended: int) -> int:
    """How many rows of a cache every sequence uses before a call, where a number says so."""
    rows = integer(cached)
    if rows is None or not 0 <= rows <= room - appended:
        new = f", as there is room for {room} and the call appends {appended}" if appended else ""
        raise InvalidArgument(f"{name} is {shown(cached)}; expected an integer from 0 to {room - appended}{new}.")
    return rows


def _is_packed(options: Options, views: Mapping[str, View]) -> bool:
    """Whether the call is on packed sequences; checks that what says so is complete and can be read."""
    starts = [views[name] for name in LENGTHS[:2] if name in views]
    if not starts:
        for name in (*LENGTHS[2:], "table", "max_seqlen_q", "max_seqlen_k"):
            if name in views or getattr(options, name, None) is not None:
                raise InvalidArgument(
                    f"{options.name(name)} is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too."
                )
        return False
    if len(starts) == 1:
        missing = options.name(next(name for name in LENGTHS if name not in views))
        raise InvalidArgument(f"{starts[0].name} is given but {missing} is not; packed sequences need both.")
    for view in (views[name] for name in LENGTHS if name in views):
        if view.dtype != "int32":
            raise InvalidArgument(f"{view.name} is {view.dtype}; expected int32. Convert it.")
        if len(view.shape) != 1:
            raise InvalidArgument(f"{view.name} has shape {view.shape}; expected one dimension.")
        if (view.shape[0] > 1 and view.strides[0] != view.itemsize) or view.pointer % view.itemsize:
            raise InvalidArgument(f"{view.name} is not contiguous; pass a contiguous copy of it.")
    counts = [view.shape[0] for view in starts]
    if counts[0] == 0:
        raise InvalidArgument("cu_seqlens_q is empty; expected batch + 1 numbers, the first of them 0.")
    if counts[0] != counts[1]:
        raise InvalidArgument(
            f"cu_seqlens_k has {counts[1]} numbers but cu_seqlens_q has {counts[0]}; "
            "both need batch + 1, with a sequence of keys for each sequence of queries."
        )
    for view in (views[name] for name in LENGTHS[2:] if name in views):
        if view.shape[0] != counts[0] - 1:
            raise InvalidArgument(
                f"{view.name} has {view.shape[0]} numbers; expected one for each of the {counts[0] - 1} sequences."
            )
    if "table" in views:
        _check_table(views["table"], counts[0] - 1)
    return True


def _check_table(table: View, batch: int) -> None:
    """The numbers of every sequence's pages, by any strides."""
    if table.dtype != "int32":
        raise InvalidArgument(f"{table.name} is {table.dtype}; expected int32. Convert it.")
    if len(table.shape) != 2:
        raise InvalidArgument(f"{table.name} has shape {table.shape}; expected (b, max_pages).")
    if table.shape[0] != batch:
        raise InvalidArgument(
            f"{table.name} has {table.shape[0]} rows; expected one for each of the {batch} sequences."
        )
    steps = [stride for n, stride in zip(table.shape, table.strides, strict=True) if n > 1]
    if not table.empty and any(n % table.itemsize for n in (table.pointer, *steps)):
        raise InvalidArgument(f"{table.name} is misaligned; pass a contiguous copy of it.")


def length(options: Options, name: str) -> int:
    """The value of max_seqlen_q or max_seqlen_k."""
    longest = getattr(options, name)
    value = integer(longest)
    if value is None or value < 0:
        raise InvalidArgument(
            f"{name} is {shown(longest)}; expected an integer from 0, or None to read it from cu_seqlens."
        )
    if value >= 2**31:
        raise InvalidArgument(
            f"{name} is {shown(longest)}; expected fewer than 2**31. Pass the longest length, or None."
        )
    return value


def _axes(options: Options, views: Mapping[str, View]) -> dict[str, tuple[str, ...]]:
    """The axes of q, k and v."""
    axes = options.axes(varlen="cu_seqlens_q" in views)
    of_keys = _PAGES if "table" in views else _CACHE if options.cache else axes
    return {"q": axes} | dict.fromkeys(("k", "v"), of_keys)


def shapes(options: Options, views: Mapping[str, View]) -> dict[str, tuple[int, ...]]:
    """The shapes of everything that follows from those of q, k and v."""
    q, k, v = (views[name].shape for name in ("q", "k", "v"))
    varlen = len(q) == 3
    sizes = dict(zip(options.axes(varlen), q, strict=True))
    rows = tuple(sizes[axis] for axis in options.row_axes(varlen))
    out = (*q[:-1], v[-1])
    bias = views["bias"].shape if "bias" in views else ()
    return {
        "out": out, "dout": out, "lse": rows, "dlse": rows, "delta": rows, "row_state": (*rows, 2), "rng_state": (2,),
        "rotated": q, "dq": q, "dk": k, "dv": v, "dbias": bias, "dsink": (sizes["h"],),
    }  # fmt: skip


def dropout_of(options: Options) -> Dropout | None:
    """What happens to probabilities after the softmax; None where all are kept."""
    name = options.name("dropout_p")
    p = finite(name, options.dropout_p)
    if not 0 <= p < 1:
        raise InvalidArgument(f"{name} is {p}; expected a probability of dropping, from 0 to below 1.")
    if not isinstance(options.dropout_scheme, str) or options.dropout_scheme not in get_args(Scheme):
        raise InvalidArgument(f"dropout_scheme is {shown(options.dropout_scheme)}; expected 'byte' or 'word'.")
    unbiased = flag("unbiased_dropout", options.unbiased_dropout)
    return Dropout(p, options.dropout_scheme, unbiased) if p else None


def pair_strides(view: View) -> tuple[int, int, int, int]:
    """Strides in elements along batch, head, row and column of a tensor of pairs, 0 where it broadcasts."""
    steps = [stride // view.itemsize if n > 1 else 0 for n, stride in zip(view.shape, view.strides, strict=True)]
    batch, head, row, column = [0] * (4 - len(steps)) + steps
    return batch, head, row, column


def check_output(view: View, like: View) -> None:
    """Check an output that has the shape, dtype and device of another array."""
    if view.device != like.device:
        raise InvalidArgument(f"{view.name} is on {view.device} but {like.name} is on {like.device}; move one of them.")
    if view.shape != like.shape:
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; expected {like.shape}, that of {like.name} with size 1 along the "
            "axes that it is expanded over."
        )
    _check_like(view, like.shape, like.dtype)
    _check_alignment(view)
    _check_writeable(view)


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


def _check_sizes(options: Options, views: Mapping[str, View]) -> None:
    """q, k and v must fit each other."""
    axes_of = _axes(options, views)
    sizes = {name: dict(zip(axes, views[name].shape, strict=True)) for name, axes in axes_of.items()}
    shown = {name: _show(views[name], axes) for name, axes in axes_of.items()}
    for axis, a, b in _EQUAL:
        if axis in sizes[a] and axis in sizes[b] and sizes[a][axis] != sizes[b][axis]:
            raise InvalidArgument(
                f"{views[b].name} has {_WORDS[axis]} {sizes[b][axis]} but {views[a].name} has {sizes[a][axis]}; "
                f"they must be equal.\n  {shown[a]}    {shown[b]}"
            )
    for name, of_name in sizes.items():
        for axis in ("h", "d"):
            if of_name[axis] == 0:
                raise InvalidArgument(f"{views[name].name} has {_WORDS[axis]} 0; expected at least 1.\n  {shown[name]}")
        for axis in ("b", "h", "d"):  # which an empty tensor may have in any number
            size = of_name.get(axis, 0)
            if size >= 2**31:
                raise InvalidArgument(
                    f"{views[name].name} has {_WORDS[axis]} {size}; expected fewer than 2**31.\n  {shown[name]}"
                )
    heads_q, heads_kv = sizes["q"]["h"], sizes["k"]["h"]
    both = f"{views['k'].name} has {heads_kv} heads but {views['q'].name} has {heads_q}"
    drawn = f"\n  {shown['q']}    {shown['k']}"
    if heads_q % heads_kv:
        raise InvalidArgument(f"{both}; heads_q must be a multiple of heads_kv.{drawn}")
    if heads_q != heads_kv and not flag("enable_gqa", options.manner.enable_gqa):
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
    strides = [stride for n, stride in zip(view.shape, view.strides, strict=True) if n > 1]
    if not view.empty and any(n % view.itemsize for n in (view.pointer, *strides)):
        raise _misaligned(view)


def _misaligned(view: View) -> InvalidArgument:
    return InvalidArgument(
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


def _in_range(name: str, value: float, dtype: DType, least: float) -> float:
    """Refuse what leaves the range in which logits are computed, its product with log2(e) included."""
    most = _RANGES[dtype.accumulator.name][1]
    if not least <= abs(value) <= most:
        bounds = f"from {least:.3g} to {most:.3g}" if least else f"at most {most:.3g} in magnitude"
        raise InvalidArgument(f"{name} is {value:g}; expected {bounds}, as {dtype} is computed in {dtype.accumulator}.")
    return value


def _num_splits(options: Options) -> int:
    value = integer(options.num_splits)
    if value is None or not 0 <= value <= MAX_SPLITS:
        raise InvalidArgument(
            f"num_splits is {shown(options.num_splits)}; expected an integer from 1 to {MAX_SPLITS}, "
            "or 0 to leave it to the plan."
        )
    return value


def _mask(options: Options, views: Mapping[str, View], scores: tuple[int, int, int, int]) -> Mask:
    """The band of the keywords, and the boolean tensor, which must broadcast to the shape of the scores."""
    causal = flag(options.name("causal"), options.causal)
    if not isinstance(options.alignment, str) or options.alignment not in get_args(Alignment):
        raise InvalidArgument(f"alignment is {shown(options.alignment)}; expected 'bottom-right' or 'top-left'.")
    window = pair(options.window_size)
    if window is None:
        raise InvalidArgument(
            f"window_size is {shown(options.window_size)}; expected a tuple of two integers (left, right)."
        )
    if not all(-1 <= bound < 2**31 for bound in window):
        raise InvalidArgument(f"window_size is {window}; expected bounds from 0 to 2**31 - 1, or -1 for unbounded.")
    mask = band(causal, window, options.alignment)
    view = views.get("mask")
    if view is None:
        return mask
    if view.dtype != "bool":
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected bool, True where a query and a key take part.")
    _check_pairs(view, scores)
    return replace(mask, tensor=True)


def _bias(
    options: Options, views: Mapping[str, View], dtype: DType, scores: tuple[int, int, int, int]
) -> tuple[DType | None, tuple[bool, bool, bool, bool], bool]:
    """The members of Problem that speak of the additive tensor but for its gradient, in their order."""
    wants_gradient = flag("bias_grad", options.bias_grad)
    view = views.get("bias")
    if view is None:
        if wants_gradient:
            name = options.name("bias")
            raise InvalidArgument(f"bias_grad is True but {name} is None; pass the bias whose gradient is wanted.")
        return None, (False, False, False, False), True
    allowed = [dtype.numpy.name] + (["float32"] if dtype.numpy.name != "float32" else [])
    if view.dtype not in allowed:
        raise InvalidArgument(f"{view.name} is {view.dtype}; expected {' or '.join(allowed)}. Convert it.")
    _check_pairs(view, scores)
    _check_alignment(view)
    batch, head, row, column = pair_strides(view)
    expanded = [n > 1 and stride == 0 and not view.empty for n, stride in zip(view.shape, view.strides, strict=True)]
    if wants_gradient and any(expanded):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape} with strides of {view.strides} bytes, and its gradient is wanted; "
            "expected size 1 along axes that are broadcast. Pass it before it is expanded."
        )
    outer = batch, head, row
    ascending = column in (0, 1) and all(stride >= 0 for stride in outer)
    boxes = ascending and not any(n % 16 for n in (view.pointer, *(stride * view.itemsize for stride in outer)))
    broadcast = [n == 1 or wide for n, wide in zip(view.shape, expanded, strict=True)]
    along_batch, along_heads, along_rows, along_keys = [True] * (4 - len(broadcast)) + broadcast
    return _DTYPES[view.dtype], (along_batch, along_heads, along_rows, along_keys), boxes


def _check_pairs(view: View, scores: tuple[int, int, int, int]) -> None:
    """A tensor of pairs must broadcast to the shape of the scores."""
    padded = (1,) * (4 - len(view.shape)) + view.shape
    if len(padded) != 4 or any(n not in (1, size) for n, size in zip(padded, scores, strict=True)):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; "
            f"expected one that broadcasts to (b, heads_q, len_q, len_kv) = {scores}."
        )


def _check_alibi(view: View, batch: int, heads: int) -> None:
    """One slope for each query head, or for each of each batch element."""
    if view.shape not in ((heads,), (batch, heads)):
        raise InvalidArgument(
            f"{view.name} has shape {view.shape}; expected (heads_q,) or (b, heads_q), here ({heads},) or "
            f"({batch}, {heads})."
        )
    _check_like(view, view.shape, "float32")
    _check_rows(view)


def _check_rng_state(options: Options, dropout: Dropout | None, view: View | None) -> None:
    """The backward draws what the forward drew."""
    name, p = options.name("rng_state"), options.name("dropout_p")
    if view is None:
        if dropout is not None:
            raise InvalidArgument(f"{name} is None but {p} is {dropout.p}; pass the seed and offset of the forward.")
        return
    if dropout is None:
        raise InvalidArgument(f"{name} is given but {p} is 0; pass the {p} of the forward.")
    if (view.shape, view.dtype) not in _RNG_STATES:
        raise InvalidArgument(
            f"{name} is {view.dtype} of shape {view.shape}; expected uint64 of shape (2,). "
            "Pass the seed and offset that the forward returned."
        )
    _check_rows(view)
    if view.pointer % 8:
        raise _misaligned(view)


def _copy_bytes(tensors: Sequence[View], dims: Sequence[int]) -> int:
    """The widest access, up to 16 bytes, that every row of every tensor starts and ends on."""
    addresses = [n for view in tensors if not view.empty for n in (view.pointer, *_outer_strides(view))]
    return math.gcd(16, *(dim * tensors[0].itemsize for dim in dims), *addresses)
