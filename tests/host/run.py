"""Launches plans on the host, with the parameter blocks of the library and NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from unittest.mock import patch

import numpy as np

from cuflash import jit
from cuflash.arrays import View
from cuflash.jit import tensormap
from cuflash.jit.render import headers
from cuflash.ops import block, boxes, check
from cuflash.ops.call import Options, asked
from cuflash.plan import Plan, Step, policies
from host.build import build

UNIT = """
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#include "block.hpp"
#include "entry/{kernel}.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* launch(
    const void* params, long long num_blocks, int threads, int smem_bytes, unsigned seed, int cluster) {{
  const auto kernel = [](const void* p) {{ {kernel}(*static_cast<const cuflash::{params}*>(p)); }};
  return cuflash::host::launch(kernel, params, num_blocks, threads, smem_bytes, seed, cluster);
}}
EXPORT int bank_conflicts() {{ return static_cast<int>(cuflash::host::block.bank_conflicts); }}
"""


GUARD = 64 * 1024  # bytes on either side of a workspace


OPTIONS = asked()


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
        max(step.cluster, getattr(config, "slices", 1)),
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
    fifth = [1] * (5 - len(dims))
    return np.array([address, *dims, *fifth, *strides, *(0 for _ in fifth), *box, *fifth, itemsize], np.uint64)


def encoder(tensor: tensormap.TensorMap, device: int = 0) -> Callable[[int], tuple[int, ...]]:
    """What the driver's encoder is on a GPU."""
    layout = tensor.dims, tensor.strides, tensor.box, tensor.dtype.itemsize
    return lambda address: tuple(tensor_map(address - tensor.back, *layout).tolist())


def run_plan_on_host(
    plan: Plan,
    arrays: Mapping[str, np.ndarray],
    seed: int = 0,
    options: Options = OPTIONS,
    draw: Sequence[int] = (0, 0, 0),
) -> int:
    """Run every kernel of a plan, also where a call would launch none, and return their ldmatrix bank conflicts.

    ``arrays`` holds, by their names in ``params.cuh``, the inputs and the outputs, which are written in place:
    (b, s, h, d) or (total, h, d) tensors, lse, dlse as (b, h, s) or (h, total), mask, bias, dbias as pairs, and for
    pages k and v as (page, row, h, d) and their table as (b, max_pages). ``options`` are asked for what a plan does not
    hold, and ``draw`` is what a forward with dropout draws: the address of a generator, or 0, a seed and an offset.
    """
    workspaces, surroundings = {}, {}
    for workspace in plan.workspaces:
        buffer = np.full(workspace.nbytes + 2 * GUARD, 0xFF, np.uint8)
        inside = buffer[GUARD : GUARD + workspace.nbytes]
        if workspace.zeroed or workspace.kept:
            inside[...] = 0
        workspaces[workspace.name] = inside.view(workspace.dtype).reshape(workspace.shape)
        surroundings[workspace.name] = buffer[:GUARD], buffer[GUARD + workspace.nbytes :]

    params = parameter_block(plan, {**arrays, **workspaces}, options, draw).view(np.uint8)
    written = policies.written(plan.problem)
    conflicts = 0
    for step in plan.steps:
        block = jit.params.dtype(step.params, getattr(step.config, "written", None))
        own = params[jit.params.first_byte(step.config, written) :][: block.itemsize]
        conflicts += launch(step, own.view(block), seed)
        for name, sides in surroundings.items():
            if any((side != 0xFF).any() for side in sides):
                raise LaunchFailed(f"{step.kernel} wrote outside the workspace {name}")
        for workspace in plan.workspaces:
            if workspace.kept and workspaces[workspace.name].any():
                raise LaunchFailed(f"{step.kernel} does not leave {workspace.name} at zero")
    return conflicts


def parameter_block(plan: Plan, arrays: Mapping[str, np.ndarray], options: Options, draw: Sequence[int]) -> np.ndarray:
    """What the library fills in for a call on these arrays."""
    problem = plan.problem
    views = {name: view(name, x) for name, x in arrays.items()}
    shapes = check.shapes(options, views)
    laid_out = {name: x for name, x in views.items() if name not in {w.name for w in plan.workspaces}}
    template = block.template(plan, options, laid_out, shapes)
    maps = {
        box.tensor: tensor
        for step in plan.steps
        for box in step.boxes
        if (tensor := boxes.tensor_map(box, problem, options, views, shapes)) is not None
    }
    draws = bool(problem.dropout) and problem.direction == "forward"
    with patch.object(tensormap, "encoder", encoder):
        fill = block.filler(template, tuple(views), maps, 0, draws)
    pointers = (x.pointer for x in views.values())
    return np.frombuffer(fill((*pointers, *draw) if draws else (*pointers,)), template.dtype, 1)


def view(name: str, x: np.ndarray) -> View:
    """An array as the library sees one."""
    return View(name, x.shape, x.strides, x.dtype.name, x.itemsize, x.ctypes.data, "cpu")
