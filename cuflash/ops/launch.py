"""One call on a GPU.

The first call on arrays of some kind is checked, planned and compiled into a :class:`Prepared`; later ones look it up,
put their pointers into a copy of its parameter block and launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cuflash import device, jit
from cuflash.arrays import CuPy, Framework, Guest, Torch, View, cupy_arrays
from cuflash.errors import InvalidArgument
from cuflash.ops import check
from cuflash.ops.lengths import with_lengths
from cuflash.ops.options import ARGUMENTS, OUTPUTS, RESULTS, Options, given
from cuflash.plan import Workspace, choose
from cuflash.problem import Direction, Problem

_UNBOUNDED = 2**30
"""A window side that hides nothing: no two positions are further apart (``check.MAX_LENGTH``)."""

_EMPTY_VALUES = {"lse": -np.inf}
"""What results hold where there is nothing to attend to; 0 when not listed."""

_PARAMS_NAMES = {"attn_mask": "mask", "cu_seqlens_k": "cu_seqlens_kv", "seqused_k": "seqused_kv"}
"""Members of ``params.cuh`` that are not called like the argument."""

_PER_ROW = ("lse", "dlse", "delta")
"""Arrays of one number for each head and query row."""

_MAX_PREPARED = 1024
_prepared: dict[tuple[Any, ...], Prepared] = {}


def run(framework: Framework, direction: Direction, options: Options, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Answer a call on arrays that live on a GPU; `arrays` in the order of :data:`check.ARGUMENTS`."""
    names = options.names(direction)
    if isinstance(framework, Guest):
        for name in OUTPUTS[direction]:
            if name in given(direction, arrays):
                raise InvalidArgument(
                    f"{name} is a {framework.name} array, and cuflash does not write to those. "
                    f"Drop {name} and use the array that is returned."
                )
        borrowed = framework.borrow(names, arrays)
        return framework.lend(run(cupy_arrays(), direction, options, borrowed), borrowed)

    options = with_lengths(framework, direction, options, arrays)
    pointers, described = framework.describe(names, arrays)
    key = (direction, options, described)
    try:
        prepared = _prepared.get(key)
    except TypeError:  # an option that cannot be hashed; preparing will say what is wrong with it
        prepared = None
    if prepared is None:
        prepared = _prepare(framework, direction, options, given(direction, arrays))
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    return prepared(arrays, pointers)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about a kind of call but its pointers."""

    framework: CuPy | Torch
    device: int
    launches: tuple[tuple[jit.Kernel, int], ...]
    """Kernels, each with its number of blocks; none when there is no pair of a query and a key."""
    template: np.ndarray
    """The parameter block as 8-byte words, without pointers."""
    block: np.dtype
    """The block as one opaque element: NumPy describes a structured one to CuPy member by member, 20 us a launch."""
    slots: tuple[int, ...]
    """The words that take the pointers: of the given arrays, then of the allocated ones."""
    allocations: tuple[tuple[Any, tuple[int, ...], Any], ...]
    """(allocator, shape, the framework's dtype) of the results that are not given, and of the workspaces."""
    results: tuple[tuple[int, float], ...]
    """Where each result is among arguments and allocations, and what it holds when nothing is launched."""
    extents: tuple[tuple[str, int, int], ...]
    """(name, first byte, end) of every given array from its pointer; empty when all results are allocated."""
    num_outputs: int
    """How many of the given arrays, the last ones, are written."""

    def __call__(self, arrays: Sequence[Any], pointers: list[int]) -> tuple[Any, ...]:
        """Allocate, launch and return the results; `pointers` are those of the arrays that are not None."""
        if self.extents:
            spans = [(name, p + first, p + end) for p, (name, first, end) in zip(pointers, self.extents, strict=True)]
            check.check_separate(spans, self.num_outputs)
        framework = self.framework
        with framework.context(self.device):
            allocated = [allocate(shape, dtype, self.device) for allocate, shape, dtype in self.allocations]
            everything = [*arrays, *allocated]
            if self.launches:
                words = self.template.copy()
                pointers += [framework.pointer(x) for x in allocated]
                for slot, pointer in zip(self.slots, pointers, strict=True):
                    words[slot] = pointer
                params = words.view(self.block)
                for kernel, num_blocks in self.launches:
                    kernel.launch(num_blocks, params)
            else:
                for index, value in self.results:
                    everything[index][...] = value
        return tuple([everything[index] for index, _ in self.results])


def _prepare(framework: CuPy | Torch, direction: Direction, options: Options, arguments: Mapping[str, Any]) -> Prepared:
    """Check a call on arrays of this kind, plan it and load its kernels."""
    views = {name: framework.view(options.name(name), x) for name, x in arguments.items()}
    problem = check.problem_of(direction, options, views)
    ordinal = int(views["q"].device.removeprefix("cuda:"))
    plan = choose(problem, device.current(ordinal), options.family)

    shapes = check.shapes(options, views)
    new = {
        name: Workspace(name, problem.dtype.accumulator if name == "lse" else problem.dtype.numpy, shapes[name])
        for name in RESULTS[direction]
        if name not in views
    }
    allocated = (*new.values(), *plan.workspaces)
    places = [*(name if name in views else None for name in ARGUMENTS[direction]), *new]
    outputs = [name for name in OUTPUTS[direction] if name in views]
    params = jit.params.dtype(plan.steps[0].params)
    with framework.context(ordinal):
        kernels = [(jit.load(step, ordinal), step.num_blocks) for step in plan.steps] if _has_pairs(problem) else []
    return Prepared(
        framework=framework,
        device=ordinal,
        launches=tuple(kernels),
        template=_template(params, problem, options, views, shapes),
        block=np.dtype((np.void, params.itemsize)),
        slots=tuple(_word(params, name) for name in (*views, *(w.name for w in allocated))),
        allocations=tuple(
            (framework.zeros if w.zeroed else framework.empty, w.shape, framework.dtype(w.dtype))
            for w in (allocated if kernels else new.values())
        ),
        results=tuple((places.index(name), _EMPTY_VALUES.get(name, 0.0)) for name in RESULTS[direction]),
        extents=tuple((view.name, *view.extent()) for view in views.values()) if outputs else (),
        num_outputs=len(outputs),
    )


def _has_pairs(problem: Problem) -> bool:
    return min(problem.batch, problem.rows_q, problem.rows_kv) > 0


def _word(params: np.dtype, argument: str) -> int:
    """Index of the 8-byte word of a parameter block that holds a pointer."""
    name = _PARAMS_NAMES.get(argument, argument)
    if name in params.fields:
        return params.fields[name][1] // 8
    attention, offset = params.fields["attention"]
    return (offset + attention.fields[name][1]) // 8


def _template(
    params: np.dtype,
    problem: Problem,
    options: Options,
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
) -> np.ndarray:
    """The parameter block of every call on arrays of this kind, as 8-byte words with zeros for pointers."""
    varlen = problem.layout == "varlen"
    block = np.zeros(1, params)
    attention = block["attention"]
    for name in ("softmax_scale", "softcap", "batch", "heads_q", "heads_kv", "len_q", "len_kv", "total_q", "total_kv"):
        attention[name] = getattr(problem, name)
    mask = problem.mask
    attention["window_left"] = _UNBOUNDED if mask.left is None else mask.left
    attention["window_right"] = _UNBOUNDED if mask.right is None else mask.right
    attention["top_left"] = mask.alignment == "top-left"
    if mask.tensor:
        view = views["attn_mask"]
        missing = 4 - len(view.shape)
        strides = [0] * missing + [stride if n > 1 else 0 for n, stride in zip(view.shape, view.strides, strict=True)]
        for axis, stride in zip(("batch", "head", "row", "column"), strides, strict=True):
            attention[f"mask_{axis}"] = stride

    for member in params.names:
        name = member.removesuffix("_stride")
        if name == member or (name == "dlse" and name not in views):
            continue
        if name in views:
            shape, itemsize = views[name].shape, views[name].itemsize
            strides = [stride // itemsize for stride in views[name].strides]
        else:
            shape = shapes[name]
            strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        axes = options.row_axes(varlen) if name in _PER_ROW else options.axes(varlen)
        steps = {axis: stride if n > 1 else 0 for axis, n, stride in zip(axes, shape, strides, strict=True)}
        block[member]["batch"] = steps.get("b", 0)
        block[member]["row"] = steps["total" if varlen else "s"]
        block[member]["head"] = steps["h"]
    return block.view(np.int64)
