"""Launches plans on the host: the parameter structs of ``kernels/params.cuh`` filled from NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cuflash.jit import tensormap
from cuflash.jit.params import dtype as params_dtype
from cuflash.jit.render import headers
from cuflash.plan import Box, Plan, Step
from cuflash.plan.families.sm90 import heads_per_section
from cuflash.problem import Problem
from host.build import build

UNIT = """
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#include "block.hpp"
#include "entry/{kernel}.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* launch(const void* params, long long num_blocks, int threads, int smem_bytes, unsigned seed) {{
  const auto kernel = [](const void* p) {{ {kernel}(*static_cast<const cuflash::{params}*>(p)); }};
  return cuflash::host::launch(kernel, params, num_blocks, threads, smem_bytes, seed);
}}
EXPORT int bank_conflicts() {{ return static_cast<int>(cuflash::host::block.bank_conflicts); }}
"""


GUARD = 64 * 1024  # bytes on either side of a workspace


class LaunchFailed(RuntimeError):
    """The kernel deadlocked, or touched memory that is not its own."""


def launch(step: Step, params: np.ndarray, seed: int = 0) -> int:
    """Run one kernel to its end; ``seed`` decides in which order warps run. Returns its ldmatrix bank conflicts."""
    rendered = headers(step.kernel, step.config, step.params)
    library = build(UNIT.format(kernel=step.kernel, params=step.params), *rendered.items())
    library.launch.restype = ctypes.c_char_p
    raw = aligned(params)
    config = step.config
    error = library.launch(
        ctypes.c_void_p(raw.ctypes.data),
        ctypes.c_longlong(step.num_blocks),
        config.threads,
        config.smem_bytes,
        ctypes.c_uint(seed),
    )
    if error is not None:
        raise LaunchFailed(f"{step.kernel}: {error.decode()}\n{rendered['config.cuh']}")
    return library.bank_conflicts()


def aligned(params: np.ndarray) -> np.ndarray:
    """The bytes of a parameter block at a multiple of 64, which ``TensorMap`` asks for."""
    memory = np.empty(params.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    raw = memory[first : first + params.nbytes]
    raw[...] = np.frombuffer(params.tobytes(), np.uint8)
    return raw


def tensor_map(
    address: int, dims: Sequence[int], strides: Sequence[int], box: Sequence[int], itemsize: int
) -> np.ndarray:
    """The words of a map as the emulated copy engine reads them: strides in bytes, of all dimensions but the first."""
    words = np.zeros(16, np.uint64)
    words[:13] = [address, *dims, *strides, *box, itemsize]
    return words


def encoder(tensor: tensormap.TensorMap, device: int = 0) -> Callable[[int], tuple[int, ...]]:
    """What the driver's encoder is on a GPU."""
    layout = tensor.dims, tensor.strides, tensor.box, tensor.dtype.itemsize
    return lambda address: tuple(tensor_map(address - tensor.back, *layout).tolist())


def box_map(problem: Problem, array: np.ndarray, box: Box) -> np.ndarray:
    """The map of a (b, s, h, d) or (total, h, d) array, or of a (b, h, q, k) bias."""
    *order, dim = range(array.ndim)
    order = order if problem.layout == "varlen" else [1, 2, 0]
    describe, dtype = tensormap.ragged if problem.layout == "varlen" else tensormap.dense, problem.dtype
    if box.tensor == "bias":
        order, describe, dtype = [2, 1, 0], tensormap.dense, problem.bias
    sizes, steps = zip(*((array.shape[axis], array.strides[axis]) for axis in order), strict=True)
    encode = encoder(describe(dtype, array.shape[dim], *sizes, steps, box.rows))
    return np.array(encode(array.ctypes.data), np.uint64)


def strides(array: np.ndarray, axes: str) -> tuple[int, int, int]:
    """(batch, row, head) strides in elements of an array whose axes are named by letters, 0 for those it lacks."""
    of = {axis: stride // array.itemsize for axis, stride in zip(axes, array.strides, strict=True)}
    return of.get("b", 0), of["s"], of["h"]


def attention_params(problem: Problem, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ``Attention`` struct."""
    a = np.zeros((), params_dtype("Attention"))
    for name in ("batch", "heads_q", "heads_kv", "len_q", "len_kv", "total_q", "total_kv", "softmax_scale", "softcap"):
        a[name] = getattr(problem, name)
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "seqused_q", "seqused_kv", "alibi", "sink", "rng_state"):
        if arrays.get(name) is not None:
            a[name] = arrays[name].ctypes.data
    a["alibi_batch"] = problem.heads_q if problem.alibi and arrays["alibi"].ndim == 2 else 0
    a["keep_scale"] = 1
    unbounded = max(problem.len_q, problem.len_kv)
    a["window_left"] = unbounded if problem.mask.left is None else problem.mask.left
    a["window_right"] = unbounded if problem.mask.right is None else problem.mask.right
    a["top_left"] = problem.mask.alignment == "top-left"
    for name, wanted in (("mask", problem.mask.tensor), ("bias", problem.bias)):
        if wanted:
            pairs = arrays[name]
            a[name] = pairs.ctypes.data
            for axis, stride in zip(("batch", "head", "row", "column"), pair_strides(pairs), strict=True):
                a[f"{name}_{axis}"] = stride
    return a


def pair_strides(pairs: np.ndarray) -> list[int]:
    """Strides in elements of a 4-dimensional array of pairs, 0 where it broadcasts."""
    return [stride // pairs.itemsize if n > 1 else 0 for n, stride in zip(pairs.shape, pairs.strides, strict=True)]


def page_params(problem: Problem, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ``Pages`` struct."""
    pages = np.zeros((), params_dtype("Pages"))
    table, pages["count"], pages["size"] = arrays["table"], len(arrays["k"]), problem.page_size
    pages["table"] = table.ctypes.data
    pages["table_batch"], pages["table_page"] = (stride // table.itemsize for stride in table.strides)
    pages["shift"] = 30 + (problem.page_size - 1).bit_length()
    pages["multiplier"] = -(-(2 ** int(pages["shift"])) // problem.page_size)
    return pages


def run_plan_on_host(
    plan: Plan, arrays: Mapping[str, np.ndarray], seed: int = 0, numbers: Mapping[str, float] | None = None
) -> int:
    """Run every kernel of a plan, and return their ldmatrix bank conflicts.

    ``arrays`` holds, by their names in ``params.cuh``, the inputs and the outputs, which are written in place:
    (b, s, h, d) or (total, h, d) tensors, lse, dlse as (b, h, s) or (h, total), mask, bias, dbias as pairs, and for
    pages k and v as (page, row, h, d) and their table as (b, max_pages).
    ``numbers`` are the members that neither a problem nor an array holds: dropout's.
    """
    problem = plan.problem
    layout = "bshd" if problem.layout == "dense" else "shd"
    layouts = dict.fromkeys(("k", "v"), "bshd") if problem.page_size else {}  # the number of a page is axis b
    row_layout = "bhs" if problem.layout == "dense" else "hs"
    workspaces, surroundings = {}, {}
    conflicts = 0
    for workspace in plan.workspaces:
        buffer = np.full(workspace.nbytes + 2 * GUARD, 0xFF, np.uint8)
        inside = buffer[GUARD : GUARD + workspace.nbytes]
        if workspace.zeroed or workspace.kept:
            inside[...] = 0
        workspaces[workspace.name] = inside.view(workspace.dtype).reshape(workspace.shape)
        surroundings[workspace.name] = buffer[:GUARD], buffer[GUARD + workspace.nbytes :]

    numbers = {"empty_lse": -np.inf, "tail_lse": -np.inf} | dict(numbers or {})
    for step in plan.steps:
        params = np.zeros((), params_dtype(step.params))
        params["attention"] = attention_params(problem, arrays)
        for name, number in numbers.items():
            for struct in params, params["attention"]:
                if name in struct.dtype.names:
                    struct[name] = number
        for name in params.dtype.names:
            array = arrays.get(name)
            if name == "attention" or name.endswith("_stride") or array is None:
                continue
            params[name] = array.ctypes.data
            if f"{name}_stride" in params.dtype.names:
                axes = row_layout if name in ("lse", "dlse") else layouts.get(name, layout)
                params[f"{name}_stride"] = strides(array, axes)
        if problem.page_size:
            params["attention"]["total_kv"] = 2**31 - 1
            params["pages"] = page_params(problem, arrays)
        if problem.bias_grad:
            for axis, stride in zip(("batch", "head", "row"), pair_strides(arrays["dbias"]), strict=False):
                params[f"dbias_{axis}"] = stride
        for name, scratch in workspaces.items():
            params[name] = scratch.ctypes.data
        for box in step.boxes:
            if arrays[box.tensor].size:
                params[f"{box.tensor}_map"]["words"] = box_map(problem, arrays[box.tensor], box)
        if "heads_per_section" in params.dtype.names:
            params["heads_per_section"] = heads_per_section(problem)
        if "num_splits" in params.dtype.names:
            params["num_splits"] = plan.num_splits
        if "delta" in workspaces:
            dense = problem.layout == "dense"
            rows = (problem.batch, problem.heads_q, problem.len_q) if dense else (problem.heads_q, problem.total_q)
            params["delta_stride"] = strides(workspaces["delta"].reshape(rows), row_layout)
        conflicts += launch(step, params, seed)
        for name, sides in surroundings.items():
            if any((side != 0xFF).any() for side in sides):
                raise LaunchFailed(f"{step.kernel} wrote outside the workspace {name}")
        for workspace in plan.workspaces:
            if workspace.kept and workspaces[workspace.name].any():
                raise LaunchFailed(f"{step.kernel} does not leave {workspace.name} at zero")
    return conflicts
