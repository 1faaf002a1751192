"""Tensors of a call as the copy engine sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from cuflash import jit
from cuflash.arrays import View
from cuflash.dtypes import DType
from cuflash.ops import check
from cuflash.ops.call import Options
from cuflash.plan import Box
from cuflash.problem import Problem


def tensor_map(
    box: Box,
    problem: Problem,
    options: Options,
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
) -> jit.tensormap.TensorMap | None:
    """The map of a tensor but for its address; None without elements, when there is no box to copy."""
    if problem.bias and box.tensor == "bias":
        return _bias_map(box, problem.bias, views["bias"])
    # Pages lie like batches; queries are read where they have been turned into.
    packed = problem.layout == "varlen" and not (problem.page_size and box.tensor in ("k", "v"))
    read = "rotated" if box.tensor == "q" and problem.rotary is not None else box.tensor
    axes = dict(zip(options.axes(packed), shape_and_steps(read, views, shapes), strict=True))
    dim, _ = axes.pop("d")
    sizes = {axis: n for axis, (n, _) in axes.items()}
    strides = {axis: step * problem.dtype.itemsize for axis, (_, step) in axes.items()}
    if 0 in sizes.values():
        return None
    if packed:
        row, head = strides["total"], strides["h"]
        if box.heads > 1:
            boxes = box.heads, box.rows // box.heads
            return jit.tensormap.ragged_group(problem.dtype, dim, sizes["total"], sizes["h"], (row, head), boxes)
        tensor = jit.tensormap.ragged(problem.dtype, dim, sizes["total"], sizes["h"], (row, head), box.rows)
        return replace(tensor, promotion=128) if box.once else tensor
    row, head, whole = strides["s"], strides["h"], strides["b"]
    if box.heads > 1:
        sizes_in, steps = (sizes["h"], sizes["s"], sizes["b"]), (head, row, whole)
        return jit.tensormap.grouped(problem.dtype, dim, sizes_in, steps, (box.heads, box.rows // box.heads))
    make = jit.tensormap.paged if box.ends else jit.tensormap.dense
    tensor = make(problem.dtype, dim, sizes["s"], sizes["h"], sizes["b"], (row, head, whole), box.rows)
    return replace(tensor, promotion=128) if box.once else tensor


def _bias_map(box: Box, dtype: DType, view: View) -> jit.tensormap.TensorMap | None:
    """The map of a bias, with one element along axes that are broadcast."""
    if view.empty:
        return None
    shape = (1,) * (4 - len(view.shape)) + view.shape
    steps = check.pair_strides(view)
    batch, heads, rows, columns = (n if step else 1 for n, step in zip(shape, steps, strict=True))
    batch_step, head_step, row_step, _ = (step * dtype.itemsize for step in steps)
    return jit.tensormap.dense(dtype, columns, rows, heads, batch, (row_step, head_step, batch_step), box.rows)


def shape_and_steps(
    name: str, views: Mapping[str, View], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, int]]:
    """Size and stride in elements along each axis of an array that is given, or will be allocated."""
    if name in views:
        view = views[name]
        return [(n, stride // view.itemsize) for n, stride in zip(view.shape, view.strides, strict=True)]
    shape = shapes[name]
    return [(n, prod(shape[axis + 1 :])) for axis, n in enumerate(shape)]
