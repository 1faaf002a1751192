"""DTensors, of which each process has a part: it attends to its own, where that needs no other."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from cuflash.adapters.torch.recorded import refuse_written
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.ops import Arrays, Options
from cuflash.problem import Direction


def answer(
    framework: Any, direction: Direction, options: Options, arrays: Arrays, generator: Any = None
) -> tuple[Any, ...]:
    """Answer a forward on q, k and v that are divided along the batch and the heads, or not at all.

    Raises
    ------
    InvalidArgument, UnsupportedProblem
        If a process would need more than its part, or there is an array beside the three.
    """
    q, k, v = arrays[:3]
    mesh, placements = q.device_mesh, tuple(q.placements)
    _check(direction, options, arrays)
    results = framework.answer(direction, options, Arrays(q.to_local(), k.to_local(), v.to_local()), generator)
    axes, of_rows = options.axes(False), options.row_axes(False)
    sizes = dict(zip(axes, q.shape, strict=True)) | {"d": v.shape[-1]}
    wholes = []
    for index, part in enumerate(results):
        its_axes = axes if index == 0 else of_rows
        shape = [sizes[axis] for axis in its_axes] + list(part.shape[len(its_axes) :])
        its_placements = [Shard(its_axes.index(axes[x.dim])) if isinstance(x, Shard) else x for x in placements]
        stride = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        wholes.append(
            DTensor.from_local(
                part, mesh, its_placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
            )
        )
    return tuple(wholes)


def _check(direction: Direction, options: Options, arrays: Arrays) -> None:
    """Refuse what a process cannot answer from its parts."""
    first, remedy = options.name("q"), "Call cuflash on to_local() of each, and say by DTensor.from_local what it gave."
    if direction == "backward":
        raise UnsupportedProblem(
            f"{first} is a DTensor, and gradients of those are taken by autograd alone. Call backward(). Or: {remedy}"
        )
    if options.dropout_p:
        raise UnsupportedProblem(
            f"{first} is a DTensor and {options.name('dropout_p')} is {options.dropout_p}: dropout draws by the number "
            f"of a batch element and a head, which a process does not know of its part. {remedy}"
        )
    refuse_written(options, "with DTensors, of which a process does not know the number of a batch element and a head")
    q = arrays.q
    axes = options.axes(False)
    for name, x in arrays.by_name().items():
        word = options.name(name)
        if name not in ("q", "k", "v"):
            raise UnsupportedProblem(
                f"{first} is a DTensor and {word} is given; with DTensors expected q, k and v alone. {remedy}"
            )
        if not isinstance(x, DTensor):
            raise InvalidArgument(
                f"{word} is a plain tensor but {first} is a DTensor; expected three of one mesh and its placements. "
                f"Pass to_local() of {first}, or distribute_tensor of {word}."
            )
        if x.ndim != 4:
            raise InvalidArgument(f"{word} is a DTensor of {x.ndim} dimensions; expected 4, {', '.join(axes)}.")
        if x.device_mesh != q.device_mesh or tuple(x.placements) != tuple(q.placements):
            raise UnsupportedProblem(
                f"{word} is a DTensor with placements {tuple(x.placements)} but {first} has {tuple(q.placements)}; "
                f"expected the same, on one mesh. Pass {word}.redistribute({first}.device_mesh, {first}.placements)."
            )
    allowed = [Replicate(), Shard(axes.index("b")), Shard(axes.index("h"))]
    parts = 1
    for index, placement in enumerate(q.placements):
        if placement not in allowed:
            raise UnsupportedProblem(
                f"{first} is a DTensor with placement {placement!r}, of which no process can attend to its part alone; "
                f"expected {allowed[0]}, {allowed[1]} or {allowed[2]}: whole, or divided along the batch or the heads. "
                f"Redistribute q, k and v. Or: {remedy}"
            )
        parts *= q.device_mesh.size(index) if placement == allowed[2] else 1
    heads_kv = arrays.k.shape[axes.index("h")]
    if heads_kv % parts:
        raise UnsupportedProblem(
            f"{first} is a DTensor with its heads in {parts} parts, and {options.name('k')} has {heads_kv} heads; "
            f"expected a multiple, for the keys of a process to be those of its queries. "
            f"Divide along the batch. Or: {remedy}"
        )
