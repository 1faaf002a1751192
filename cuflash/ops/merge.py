"""Merging results of the same queries over different keys, of whatever arrays are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash import jit, reference
from cuflash.arrays import Guest, Launcher, Library, NumPy, View, framework_in_memory
from cuflash.dtypes import BY_NUMPY_NAME, DType
from cuflash.ops import check
from cuflash.plan import merge as plans

MAX_PARTS = 32
"""Parts that one launch merges; more are merged in groups first, in the accumulator's type."""

_AXES = ("batch", "row", "head")
_OF_OUT, _OF_LSE = (0, 1, 2), (0, 2, 1)
"""Where these are in (b, s, h, d) and in (b, h, s)."""


class Merged(NamedTuple):
    """What a merge found, and what it found it from, as arrays of one framework."""

    out: Any
    """In the accumulator's type where it was asked for."""
    lse: Any
    outs: list[Any]
    lses: list[Any]


def merge(outs: Sequence[Any], lses: Sequence[Any], exact: bool = False) -> Merged:
    """Merge parts; `exact` leaves out in the accumulator's type, for gradients."""
    names, arrays = _names(outs, lses), [*outs, *lses]
    framework = framework_in_memory(names, arrays)
    if (plain := _plain(framework, names, arrays, outs[0])) is not None:
        merged = merge(plain.arrays[: len(outs)], plain.arrays[len(outs) :], exact)
        out, lse = plain.hand_back([merged.out, merged.lse])
        return Merged(out, lse, list(outs), list(lses))
    assert isinstance(framework, Library)
    dtype = _checked(framework, names, outs, lses)
    if isinstance(framework, NumPy):
        outs, lses = ([np.asarray(x) for x in arrays] for arrays in (outs, lses))
        out, lse = reference.merge(outs, lses)
        return Merged(out if exact else out.astype(dtype.numpy), lse, outs, lses)
    assert isinstance(framework, Launcher)
    with framework.context(framework.ordinal(outs[0])):
        out, lse = _merge_on_gpu(framework, outs, lses, _real(dtype) if exact else dtype)
    return Merged(out, lse, list(outs), list(lses))


class _Plain(NamedTuple):
    """Arrays of another library as NumPy's or CuPy's, None where they were, and what makes results its own."""

    arrays: list[Any]
    hand_back: Callable[[Sequence[Any]], tuple[Any, ...]]


def _plain(framework: Library | Guest, names: Sequence[str], arrays: Sequence[Any], beside: Any) -> _Plain | None:
    """Arrays that others than NumPy, or kernels, cannot compute with as they are; None where they can."""
    if isinstance(framework, Guest):
        _, borrowed = framework.borrow(names, arrays)
        return _Plain(borrowed, lambda results: framework.lend(results, borrowed, beside))
    on_host = framework.on_host(names, arrays)
    return None if on_host is None else _Plain(on_host, framework.from_host)


def as_parts(merged: Merged) -> Any:
    """An exact output in the type of the parts."""
    dtype = merged.outs[0].dtype
    framework = framework_in_memory(["outs[0]"], merged.outs[:1])
    if isinstance(framework, Guest):
        return merged.out.astype(dtype)
    with framework.arithmetic(merged.out):
        return framework.cast(merged.out, dtype)


def merge_backward(merged: Merged, dout: Any, dlse: Any) -> tuple[list[Any], list[Any]]:
    """Gradients of every part's out and lse; `merged` is exact."""
    outs, lses = merged.outs, merged.lses
    names = [*_names(outs, lses), "dout", "dlse", "out", "lse"]
    arrays = [*outs, *lses, dout, dlse, merged.out, merged.lse]
    framework = framework_in_memory(names, arrays)
    if (plain := _plain(framework, names, arrays, dout)) is not None:
        n = len(outs)
        *parts, plain_dout, plain_dlse, out, lse = plain.arrays
        douts, dlses = merge_backward(Merged(out, lse, parts[:n], parts[n:]), plain_dout, plain_dlse)
        gradients = plain.hand_back([*douts, *dlses])
        return list(gradients[:n]), list(gradients[n:])
    assert isinstance(framework, Library)
    dtype = _checked(framework, names[: 2 * len(outs)], outs, lses)
    check.check_gradient(*_views(framework, ["dout", "outs[0]"], [dout, outs[0]]))
    if dlse is not None:
        check.check_gradient(*_views(framework, ["dlse", "lses[0]"], [dlse, lses[0]]))
    if isinstance(framework, NumPy):
        given = None if dlse is None else np.asarray(dlse)
        return reference.merge_backward(outs, lses, merged.out, merged.lse, np.asarray(dout), given)
    assert isinstance(framework, Launcher)
    with framework.context(framework.ordinal(outs[0])):
        return _backward_on_gpu(framework, dtype, merged, dout, dlse)


def _merge_on_gpu(framework: Launcher, outs: Sequence[Any], lses: Sequence[Any], result: DType) -> tuple[Any, Any]:
    """(out, lse) of parts that have been checked; groups of them first where they are many."""
    views = [framework.view("", x) for x in (*outs, *lses)]
    dtype, ordinal = BY_NUMPY_NAME[views[0].dtype], framework.ordinal(outs[0])
    if len(outs) > MAX_PARTS:
        groups = [
            _merge_on_gpu(framework, outs[first : first + MAX_PARTS], lses[first : first + MAX_PARTS], _real(dtype))
            for first in range(0, len(outs), MAX_PARTS)
        ]
        return _merge_on_gpu(framework, [out for out, _ in groups], [lse for _, lse in groups], result)
    out = framework.empty(views[0].shape, framework.dtype(result.numpy), ordinal)
    lse = framework.empty(views[len(outs)].shape, framework.dtype(dtype.accumulator), ordinal)
    params = _params(views[: len(outs)], views[len(outs) :])
    rows, dim = int(params["rows"][0]), int(params["dim"][0])
    if rows and dim:
        params["out"], params["lse"] = framework.pointer(out), framework.pointer(lse)
        # The result is contiguous from the start of an allocation on.
        step = plans.forward(dtype, result, rows, dim, _copy_bytes(views[: len(outs)], dim))
        _launch(framework, step, params, ordinal)
    return out, lse


def _backward_on_gpu(
    framework: Launcher, dtype: DType, merged: Merged, dout: Any, dlse: Any
) -> tuple[list[Any], list[Any]]:
    ordinal = framework.ordinal(dout)
    element, real = (framework.dtype(x) for x in (dtype.numpy, dtype.accumulator))
    douts = [framework.empty(tuple(x.shape), element, ordinal) for x in merged.outs]
    dlses = [framework.empty(tuple(x.shape), real, ordinal) for x in merged.lses]
    for first in range(0, len(douts), MAX_PARTS):
        group = slice(first, first + MAX_PARTS)
        views = [[framework.view("", x) for x in arrays[group]] for arrays in (merged.outs, merged.lses)]
        params = _params(*views)
        rows, dim = int(params["rows"][0]), int(params["dim"][0])
        if not (rows and dim):
            continue
        for name, arrays in (("dout", douts), ("dlse", dlses)):
            params["parts"][name][0, : len(views[0])] = [framework.pointer(x) for x in arrays[group]]
        params["out"], params["lse"] = framework.pointer(merged.out), framework.pointer(merged.lse)
        for name, x, axes in (("dout", dout, _OF_OUT), ("dlse", dlse, _OF_LSE)):
            if x is not None:
                params[name] = framework.pointer(x)
                _put_strides(params[f"{name}_stride"][0], framework.view(name, x), axes)
        _launch(framework, plans.backward(dtype, rows, dim), params, ordinal)
    return douts, dlses


def _params(outs: Sequence[View], lses: Sequence[View]) -> np.ndarray:
    """The parameter block without what is written."""
    params = np.zeros(1, jit.params.dtype("MergeParams"))
    *batch, length, heads, dim = outs[0].shape
    params["count"], params["heads"], params["len"], params["dim"] = len(outs), heads, length, dim
    params["rows"] = math.prod(batch) * length * heads
    for part, out, lse in zip(params["parts"][0], outs, lses, strict=False):
        part["out"], part["lse"] = out.pointer, lse.pointer
        _put_strides(part["out_stride"], out, _OF_OUT)
        _put_strides(part["lse_stride"], lse, _OF_LSE)
    return params


def _put_strides(strides: np.ndarray, view: View, axes: tuple[int, int, int]) -> None:
    """Fill in ``Strides`` of (batch, row, head), which lie along these axes of an array; packed ones have no batch."""
    steps = [step // view.itemsize if n > 1 else 0 for n, step in zip(view.shape, view.strides, strict=True)]
    if len(steps) == (3 if axes == _OF_OUT else 2):
        steps = [0, *steps]
    for name, axis in zip(_AXES, axes, strict=True):
        strides[name] = steps[axis]


def _launch(framework: Launcher, step: Any, params: np.ndarray, ordinal: int) -> None:
    (kernel,) = jit.load([step], ordinal)
    kernel.launch(step.num_blocks, jit.parameters(params.tobytes())(), framework.launch_stream(ordinal))


def _copy_bytes(views: Sequence[View], dim: int) -> int:
    """The widest access that every row of every part allows, up to 16 bytes."""
    numbers = [n for view in views for n in (view.pointer, *view.strides[:-1])]
    return math.gcd(16, dim * views[0].itemsize, *numbers)


def _real(dtype: DType) -> DType:
    """The accumulator's own type."""
    return BY_NUMPY_NAME[dtype.accumulator.name]


def _names(outs: Sequence[Any], lses: Sequence[Any]) -> list[str]:
    return [*(f"outs[{i}]" for i in range(len(outs))), *(f"lses[{i}]" for i in range(len(lses)))]


def _checked(framework: Library, names: Sequence[str], outs: Sequence[Any], lses: Sequence[Any]) -> DType:
    """The element type of parts that fit each other."""
    views = _views(framework, names, [*outs, *lses])
    if not isinstance(framework, NumPy):
        check.check_on_cuda(framework.name, {view.name: view for view in views})
    return check.dtype_of_parts(views[: len(outs)], views[len(outs) :])


def _views(framework: Library, names: Sequence[str], arrays: Sequence[Any]) -> list[View]:
    """The arrays spelled out, which must be of one library."""
    framework.describe(names, arrays)
    return [framework.view(name, x) for name, x in zip(names, arrays, strict=True)]
