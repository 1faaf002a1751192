"""q, k and v beside one another: their axes, element type and sizes, and the shapes and rows that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cuflash.arrays import View
from cuflash.dropout import Dropout
from cuflash.dtypes import BY_NUMPY_NAME, FP32, TF32, DType
from cuflash.errors import InvalidArgument
from cuflash.numbers import flag, shown
from cuflash.ops.call import Options
from cuflash.ops.check.packed import length

MAX_LENGTH = 2**30
"""Rows of one sequence: positions and the distances between any two are 32-bit numbers in the kernels."""

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


def axes_of(options: Options, views: Mapping[str, View]) -> dict[str, tuple[str, ...]]:
    """The axes of q, k and v."""
    axes = options.axes(varlen="cu_seqlens_q" in views)
    of_keys = _PAGES if "table" in views else _CACHE if options.cache else axes
    return {"q": axes} | dict.fromkeys(("k", "v"), of_keys)


def sizes_of(options: Options, views: Mapping[str, View]) -> dict[str, dict[str, int]]:
    """The sizes of q, k and v by axis, once they have their axes."""
    axes_by_name = axes_of(options, views)
    return {name: dict(zip(axes, views[name].shape, strict=True)) for name, axes in axes_by_name.items()}


def check_ranks(options: Options, views: Mapping[str, View]) -> None:
    """q, k and v must have their axes."""
    for name, axes in axes_of(options, views).items():
        view = views[name]
        if len(view.shape) != len(axes):
            raise InvalidArgument(
                f"{view.name} has {len(view.shape)} dimensions, shape {view.shape}; "
                f"expected {len(axes)}: ({', '.join(axes)})."
            )
        if axes is _PAGES and view.shape[1] == 0:
            raise InvalidArgument(f"{view.name} has page size 0, shape {view.shape}; expected at least 1.")


def dtype_of(q: View, k: View, v: View, precision: object = "full") -> DType:
    """The element type, which is that of all three, or TF32 where products may take fp32 as that."""
    if q.dtype not in BY_NUMPY_NAME:
        raise InvalidArgument(
            f"{q.name} is {q.dtype}; expected {', '.join(BY_NUMPY_NAME)}. Convert {q.name}, {k.name} and {v.name}."
        )
    for view in (k, v):
        if view.dtype != q.dtype:
            raise InvalidArgument(f"{view.name} is {view.dtype} but {q.name} is {q.dtype}; convert one of them.")
    dtype = BY_NUMPY_NAME[q.dtype]
    if not isinstance(precision, str) or precision not in ("full", "tf32"):
        raise InvalidArgument(f'precision is {shown(precision)}; expected "full" or "tf32".')
    if precision == "full":
        return dtype
    if dtype != FP32:
        raise InvalidArgument(f'precision is "tf32" but {q.name} is {q.dtype}; it is for float32, leave it out.')
    return TF32


def check_sizes(options: Options, views: Mapping[str, View]) -> None:
    """q, k and v must fit each other."""
    sizes = sizes_of(options, views)
    shown = {name: _show(views[name], axes) for name, axes in axes_of(options, views).items()}
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


def _show(view: View, axes: Sequence[str]) -> str:
    """``q: (b=2, s=128, h=8, d=64) float16``."""
    sizes = ", ".join(f"{axis}={n}" for axis, n in zip(axes, view.shape, strict=True))
    return f"{view.name}: ({sizes}) {view.dtype}"


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
        "tangent_out": out, "tangent_lse": rows,
        **{f"d{name}": view.shape for name, view in views.items() if name.startswith("captured")},
    }  # fmt: skip


class Rows(NamedTuple):
    """How many sequences there are and how long they are, as `Problem` has it."""

    batch: int
    len_q: int
    len_kv: int
    total_q: int
    total_kv: int
    page_size: int


def rows_of(options: Options, views: Mapping[str, View], dropout: Dropout | None) -> Rows:
    """The rows of the call, which must be few enough for the kernels to count; longest lengths must be filled in."""
    sizes = sizes_of(options, views)
    q, k = sizes["q"], sizes["k"]
    page_size, total_q, total_kv = k.get("page_size", 0), q.get("total", 0), k.get("total", 0)
    most_kv = total_kv
    if page_size:
        total_kv, most_kv = k["num_pages"] * page_size, views["table"].shape[1] * page_size
    if "cu_seqlens_q" in views:
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
    return Rows(batch, len_q, len_kv, total_q, total_kv, page_size)


def scores_of(options: Options, rows: Rows, heads: int, varlen: bool) -> tuple[int, int, int, int]:
    """The shape that tensors of pairs broadcast to; of packed sequences by the longest lengths as they are given."""
    if varlen:
        return rows.batch, heads, length(options, "max_seqlen_q"), length(options, "max_seqlen_k")
    return rows.batch, heads, rows.len_q, rows.len_kv
