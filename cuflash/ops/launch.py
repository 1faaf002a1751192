"""One call on a GPU.

The first call on arrays of some kind is checked, planned and compiled into a :class:`Prepared`; later ones look it up,
fill their pointers into its parameter block and launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import itemgetter
from typing import Any

import numpy as np

from cuflash import device, jit
from cuflash.arrays import CuPy, Guest, Torch, View, cupy_arrays
from cuflash.dtypes import DType
from cuflash.errors import InvalidArgument
from cuflash.ops import check, draw
from cuflash.ops.call import ARGUMENTS, OUTPUTS, Options, given, results
from cuflash.ops.lengths import with_lengths
from cuflash.ops.scratch import KeptZeros
from cuflash.plan import Box, Plan, Workspace, choose
from cuflash.plan.tiles import heads_per_section
from cuflash.problem import Direction, Problem

_UNBOUNDED = check.MAX_LENGTH - 1
"""A window side that hides nothing: no two positions are further apart, and with it every bound is a 32-bit number."""

_UNNUMBERED = 2**31 - 1
"""More rows than cu_seqlens_k can count: with pages it numbers none."""

_EMPTY_VALUES = {"lse": -np.inf}
"""What results hold where there is nothing to attend to; 0 when not listed."""

_PARAMS_NAMES = {
    "attn_mask": "mask", "cu_seqlens_k": "cu_seqlens_kv", "seqused_k": "seqused_kv", "alibi_slopes": "alibi",
    "attn_bias": "bias", "block_table": "table",
}  # fmt: skip
"""Members of ``params.cuh`` that are not called like the argument."""

_ARGUMENTS_OF_PARAMS = {member: argument for argument, member in _PARAMS_NAMES.items()}

_PER_ROW = ("lse", "dlse", "delta")
"""Arrays of one number for each head and query row."""

_MAX_BLOCKS = 256
"""Parameter blocks that are kept of a kind of call: arrays come back to the same memory, in a model layer by layer."""

_MAX_PREPARED = 1024
_prepared: dict[tuple[Any, ...], Prepared] = {}


def run(
    framework: CuPy | Torch | Guest,
    direction: Direction,
    options: Options,
    arrays: Sequence[Any],
    generator: Any = None,
) -> tuple[Any, ...]:
    """Answer a call on arrays that live on a GPU; `arrays` in the order of :data:`ARGUMENTS`."""
    names = options.names(direction)
    if isinstance(framework, Guest):
        for name in OUTPUTS[direction]:
            if name in given(direction, arrays):
                raise InvalidArgument(
                    f"{name} is a {framework.name} array, and cuflash does not write to those. "
                    f"Drop {name} and use the array that is returned."
                )
        borrowed = framework.borrow(names, arrays)
        found = run(cupy_arrays(), direction, options, borrowed, generator)
        if direction == "forward":  # rng_state: JAX has no 64-bit integers by default
            found = tuple(x.view(np.uint32) if x.dtype == np.uint64 else x for x in found)
        return framework.lend(found, borrowed)

    options = with_lengths(framework, direction, options, arrays)
    pointers, described = framework.describe(names, arrays)
    key: tuple[Any, ...] | None
    try:
        key = direction, options.kind(), described
        prepared = _prepared.get(key)
    except TypeError:  # an option that cannot be part of a key
        key = prepared = None
    if prepared is None:
        settled = check.settled(options)
        if settled is not options:
            return run(framework, direction, settled, arrays, generator)
        prepared = prepare(framework, direction, options, given(direction, arrays))
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        if key is not None:
            _prepared[key] = prepared
    return prepared(arrays, pointers, generator)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything about a kind of call but its pointers."""

    framework: CuPy | Torch
    device: int
    launches: tuple[tuple[jit.Kernel, int], ...]
    """Kernels, each with its number of blocks; none when there is no pair of a query and a key."""
    params: Callable[[tuple[int, ...]], ctypes.Array]
    """The parameter block for the pointers of the given and of the allocated arrays, and with dropout the address of a
    generator, a seed and an offset."""
    allocations: tuple[tuple[Any, tuple[int, ...], Any], ...]
    """(allocator, shape, the framework's dtype) of the results that are not given, and of the workspaces."""
    results: Callable[[Sequence[Any]], tuple[Any, ...]]
    """Takes the results out of arguments and allocations."""
    fills: tuple[tuple[int, float], ...]
    """Where those are that no kernel writes, as there is nothing to attend to, and what they hold."""
    increment: int | None
    """How far the call moves a generator on; None without dropout and in the backward."""
    extents: tuple[check.Extent, ...]
    """Of every given array; empty when all results are allocated."""
    num_outputs: int
    """How many of the given arrays, the last ones, are written."""

    def __call__(self, arrays: Sequence[Any], pointers: list[int], generator: Any) -> tuple[Any, ...]:
        """Allocate, launch and return the results; `pointers` are those of the arrays that are not None."""
        if self.extents:
            check.check_separate(self.extents, pointers, self.num_outputs)
        framework = self.framework
        with framework.context(self.device):
            drawn: tuple[int, ...] = ()
            if self.increment is not None:
                drawn = draw.on_device(generator, self.increment, framework, self.device)
            allocated = [allocate(shape, dtype, self.device) for allocate, shape, dtype in self.allocations]
            everything = [*arrays, *allocated]
            if self.launches:
                params = self.params((*pointers, *[framework.pointer(x) for x in allocated], *drawn))
                for kernel, num_blocks in self.launches:
                    kernel.launch(num_blocks, params)
            for index, value in self.fills:
                everything[index][...] = value
        return self.results(everything)


def prepare(framework: CuPy | Torch, direction: Direction, options: Options, arguments: Mapping[str, Any]) -> Prepared:
    """Check a call on arrays of this kind, plan it and load its kernels."""
    views = {name: framework.view(options.name(name), x) for name, x in arguments.items()}
    check.check_on_cuda(framework.name, views)
    problem = check.problem_of(direction, options, views)
    ordinal = int(views["q"].device.removeprefix("cuda:"))
    plan = choose(problem, device.current(ordinal), options.family)

    shapes = check.shapes(options, views)
    names = results(problem, options.keep_state)
    new = {name: _result(name, problem, shapes[name]) for name in names if name not in views}
    places = [*(name if name in views else None for name in ARGUMENTS[direction]), *new]
    outputs = [name for name in OUTPUTS[direction] if name in views]
    params = jit.params.dtype(plan.steps[0].params)
    # Without pairs there is still a seed to draw, and a sink alone decides lse and its own gradient.
    rows = min(problem.batch, problem.rows_q) > 0
    whole = rows and (problem.rows_kv > 0 or problem.sink)
    steps = [step for step in plan.steps if (whole or step.kernel == "fwd_rng") and step.num_blocks > 0]
    allocated = (*new.values(), *(plan.workspaces if whole else ()))
    pointers = (*views, *(w.name for w in allocated))
    maps = {
        box.tensor: tensor
        for step in steps
        for box in step.boxes
        if (tensor := _tensor_map(box, problem, options, views, shapes)) is not None
    }
    with framework.context(ordinal):
        kernels = jit.load(steps, ordinal)
    return Prepared(
        framework=framework,
        device=ordinal,
        launches=tuple((kernel, step.num_blocks) for kernel, step in zip(kernels, steps, strict=True)),
        params=_filler(_template(params, plan, options, views, shapes), pointers, maps, ordinal, "rng_state" in names),
        allocations=tuple((_allocator(framework, w), w.shape, framework.dtype(w.dtype)) for w in allocated),
        results=itemgetter(*(places.index(name) for name in names)),
        fills=tuple(
            (places.index(name), _EMPTY_VALUES.get(name, 0.0)) for name in names if not whole and name != "rng_state"
        ),
        increment=draw.increment(problem) if "rng_state" in names else None,
        extents=tuple(map(check.extent, views.values())) if outputs else (),
        num_outputs=len(outputs),
    )


def _allocator(framework: CuPy | Torch, workspace: Workspace) -> Callable[[tuple[int, ...], Any, int], Any]:
    if workspace.kept:
        return KeptZeros(framework)
    return framework.zeros if workspace.zeroed else framework.empty


def _result(name: str, problem: Problem, shape: tuple[int, ...]) -> Workspace:
    """A result to be allocated."""
    dtypes = {
        "lse": problem.dtype.accumulator, "row_state": problem.dtype.accumulator, "rng_state": np.dtype(np.uint64),
        "dbias": problem.dtype.accumulator, "dsink": np.dtype(np.float32),
    }  # fmt: skip
    # Kernels write dbias up to the packed rows there are, which may be fewer than max_seqlen.
    zeroed = name == "dbias" and problem.layout == "varlen"
    return Workspace(name, dtypes.get(name, problem.dtype.numpy), shape, zeroed)


def _filler(
    block: np.ndarray, pointers: Sequence[str], maps: Mapping[str, jit.tensormap.TensorMap], device: int, draws: bool
) -> Callable[[tuple[int, ...]], ctypes.Array]:
    """What fills a parameter block: :attr:`Prepared.params`."""
    params, content, words = block.dtype, block.tobytes(), ctypes.c_uint64 * (block.nbytes // 8)
    names = (*pointers, "generator", "seed", "offset") if draws else pointers
    slots = [(_word(params, name), index) for index, name in enumerate(names)]
    if draws:  # the kernels read the drawn seed and offset where the first one leaves them
        slots.append((_inner_word(params, "attention", "rng_state"), names.index("rng_state")))
    encoders = []
    for name, tensor in maps.items():
        first, argument = _word(params, f"{name}_map"), _ARGUMENTS_OF_PARAMS.get(name, name)
        encoders.append((slice(first, first + 16), names.index(argument), jit.tensormap.encoder(tensor, device)))

    def fill(numbers: tuple[int, ...]) -> ctypes.Array:
        filled: Any = words.from_buffer_copy(content)
        for word, index in slots:
            filled[word] = numbers[index]
        for place, index, encode in encoders:
            filled[place] = encode(numbers[index])
        return filled

    return fill if draws else lru_cache(_MAX_BLOCKS)(fill)


def _word(params: np.dtype, argument: str) -> int:
    """Index of the first 8-byte word of a parameter block that is for an argument."""
    name = _PARAMS_NAMES.get(argument, argument)
    members = jit.params.members(params)
    if name in members:
        return members[name][1] // 8
    return _inner_word(params, "pages" if argument == "block_table" else "attention", name)


def _inner_word(params: np.dtype, struct: str, name: str) -> int:
    """The same of a member of a struct inside."""
    inner, offset = jit.params.members(params)[struct]
    return (offset + jit.params.members(inner)[name][1]) // 8


def _tensor_map(
    box: Box,
    problem: Problem,
    options: Options,
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
) -> jit.tensormap.TensorMap | None:
    """The map of a tensor but for its address; None without elements, when there is no box to copy."""
    if problem.bias and box.tensor == "bias":
        return _bias_map(box, problem.bias, views["attn_bias"])
    varlen = problem.layout == "varlen"
    found = dict(zip(options.axes(varlen), _shape_and_steps(box.tensor, views, shapes), strict=True))
    dim, _ = found.pop("d")
    sizes = {axis: n for axis, (n, _) in found.items()}
    strides = {axis: step * problem.dtype.itemsize for axis, (_, step) in found.items()}
    if 0 in sizes.values():
        return None
    if varlen:
        row, head = strides["total"], strides["h"]
        return jit.tensormap.ragged(problem.dtype, dim, sizes["total"], sizes["h"], (row, head), box.rows)
    row, head, whole = strides["s"], strides["h"], strides["b"]
    return jit.tensormap.dense(problem.dtype, dim, sizes["s"], sizes["h"], sizes["b"], (row, head, whole), box.rows)


def _bias_map(box: Box, dtype: DType, view: View) -> jit.tensormap.TensorMap | None:
    """The map of a bias, with one element along axes that are broadcast."""
    if view.empty:
        return None
    shape = (1,) * (4 - len(view.shape)) + view.shape
    steps = check.pair_strides(view)
    batch, heads, rows, columns = (n if step else 1 for n, step in zip(shape, steps, strict=True))
    batch_step, head_step, row_step, _ = (step * dtype.itemsize for step in steps)
    return jit.tensormap.dense(dtype, columns, rows, heads, batch, (row_step, head_step, batch_step), box.rows)


def _shape_and_steps(
    name: str, views: Mapping[str, View], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, int]]:
    """Size and stride in elements along each axis of an array that is given, or will be allocated."""
    if name in views:
        view = views[name]
        return [(n, stride // view.itemsize) for n, stride in zip(view.shape, view.strides, strict=True)]
    shape = shapes[name]
    return [(n, prod(shape[axis + 1 :])) for axis, n in enumerate(shape)]


def _template(
    params: np.dtype,
    plan: Plan,
    options: Options,
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
) -> np.ndarray:
    """The parameter block of every call on arrays of this kind, with zeros for pointers."""
    problem = plan.problem
    varlen = problem.layout == "varlen"
    block = np.zeros(1, params)
    attention = block["attention"]
    for name in ("softmax_scale", "softcap", "batch", "heads_q", "heads_kv", "len_q", "len_kv", "total_q", "total_kv"):
        attention[name] = getattr(problem, name)
    mask = problem.mask
    attention["window_left"] = _UNBOUNDED if mask.left is None else mask.left
    attention["window_right"] = _UNBOUNDED if mask.right is None else mask.right
    attention["top_left"] = mask.alignment == "top-left"
    for name, view in ((name, views[name]) for name in ("attn_mask", "attn_bias") if name in views):
        for axis, stride in zip(("batch", "head", "row", "column"), check.pair_strides(view), strict=True):
            attention[f"{_PARAMS_NAMES[name]}_{axis}"] = stride
    if problem.alibi and len(views["alibi_slopes"].shape) == 2:
        attention["alibi_batch"] = check.pair_strides(views["alibi_slopes"])[2]
    dropout = check.dropout_of(options)
    attention["keep_scale"] = dropout.keep_scale if dropout else 1.0
    attention["dropout_p"] = dropout.p if dropout else 0.0
    if problem.direction == "forward":
        block["num_splits"] = plan.num_splits
        block["heads_per_section"] = heads_per_section(problem)
        if dropout:
            block["increment"] = np.uint64(draw.increment(problem)).astype(np.int64)
    if problem.bias_grad:
        shape = (1,) * (4 - len(shapes["dbias"])) + shapes["dbias"]
        for at, name in enumerate(("batch", "head", "row")):
            block[f"dbias_{name}"] = prod(shape[at + 1 :]) if shape[at] > 1 else 0

    if problem.page_size:
        attention["total_kv"] = _UNNUMBERED
        block["pages"] = _pages(views["k"], views["block_table"])

    for member in jit.params.members(params):
        name = member.removesuffix("_stride")
        if name == member or (name == "dlse" and name not in views):
            continue
        packed = varlen and not (problem.page_size and name in ("k", "v"))  # pages lie like batch elements
        axes = options.row_axes(packed) if name in _PER_ROW else options.axes(packed)
        found = zip(axes, _shape_and_steps(name, views, shapes), strict=True)
        steps = {axis: step if n > 1 else 0 for axis, (n, step) in found}
        block[member]["batch"] = steps.get("b", 0)
        block[member]["row"] = steps["total" if packed else "s"]
        block[member]["head"] = steps["h"]
    return block


def _pages(k: View, table: View) -> np.ndarray:
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
