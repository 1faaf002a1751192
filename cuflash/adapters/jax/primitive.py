"""The step of a JAX program that is one call: on the CPU the NumPy backend, on a GPU the kernels."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from cuflash import device
from cuflash.adapters.jax import ffi
from cuflash.adapters.jax.axes import DIVISIBLE, LIKE, axes_of
from cuflash.errors import REFUSALS, UnsupportedProblem
from cuflash.ops import given
from cuflash.ops.call import Options
from cuflash.ops.given import GivenCall
from cuflash.problem import Direction

_CPU, _GPU = "cuflash_numpy", "cuflash_cuda"
"""What XLA knows the two answers as; programs that were exported name them."""

primitive: Primitive = Primitive("cuflash_attention")
primitive.multiple_results = True


def given_call(
    direction: Direction, options: Options, names: tuple[str, ...], along: tuple[str, ...], operands: Sequence[Any]
) -> GivenCall:
    """The call on operands of these names, the tangents of some behind all others."""
    described = tuple((name, x.shape, x.dtype.name) for name, x in zip(names, operands, strict=False))
    return GivenCall(direction, options, described, along)


def bind(
    direction: Direction, options: Options, names: tuple[str, ...], along: tuple[str, ...], *operands: Any
) -> tuple[Any, ...]:
    """The results of a call on operands, which may be tracers."""
    return tuple(primitive.bind(*operands, call=given_call(direction, options, names, along, operands)))


@primitive.def_impl
def _run(*operands: Any, call: GivenCall) -> Any:
    return _program(call)(*operands)


@lru_cache(maxsize=1024)
def _program(call: GivenCall) -> Any:
    return jax.jit(lambda *operands: primitive.bind(*operands, call=call))


@primitive.def_abstract_eval
def _results(*operands: Any, call: GivenCall) -> list[Any]:
    """The types of the results, which vary over the mesh as the operands do; gradients lie where their operands do."""
    by_name = dict(zip((name for name, *_ in call.arrays), operands, strict=False))
    q, axes = by_name["q"], axes_of(call)
    on = dict(zip(axes["q"], q.sharding.spec, strict=True))
    on = {axis: on[axis] for axis in DIVISIBLE if axis in on}
    types = []
    for r in call.results:
        spec = PartitionSpec(*(on.get(axis) for axis in axes[r.name]))
        like = r.name[1:] if r.name.startswith("dcaptured") else LIKE.get(r.name)
        sharding = by_name[like].sharding if like else NamedSharding(q.sharding.mesh, spec)
        types.append(q.update(shape=r.shape, dtype=r.dtype, weak_type=False, sharding=sharding))
    return types


def alike(operands: Sequence[Any]) -> list[Any]:
    """The operands inside shard_map, all varying over the axes of the mesh that any of them varies over."""
    varying = [_varying(x) for x in operands]
    every = frozenset().union(*varying)
    return [
        x if over == every else jax.lax.pcast(x, tuple(sorted(every - over)), to="varying")
        for x, over in zip(operands, varying, strict=True)
    ]


def _varying(x: Any) -> frozenset[str]:
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind.varying if kind is not None else frozenset()


def _types(call: GivenCall) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in call.results]


def _on_cpu(*operands: Any, call: GivenCall) -> list[Any]:
    _register_cpu()
    return jax.ffi.ffi_call(_CPU, _types(call))(*operands, call=call.text())


def _on_gpu(*operands: Any, call: GivenCall) -> list[Any]:
    if call.along and call.direction == "backward":
        raise UnsupportedProblem(
            "cuflash does not take second derivatives on a GPU (jax.hessian, jax.jvp of jax.grad): no kernel computes "
            "tangents of gradients. Place the arrays on the CPU."
        )
    gpu = _register_gpu()
    planned = call.plan(gpu)
    if planned.fills:
        return [jnp.full(r.shape, x, r.dtype) for r, x in zip(call.results, planned.fills.values(), strict=True)]
    scratch = call.scratch(gpu).nbytes
    types = [*_types(call), *([jax.ShapeDtypeStruct((scratch,), np.uint8)] if scratch else [])]
    text = replace(call, room=scratch).text()
    return jax.ffi.ffi_call(_GPU, types)(*operands, call=text)[: len(call.results)]


def _elsewhere(*operands: Any, call: GivenCall) -> list[Any]:
    raise UnsupportedProblem(
        "a program is made for a device that cuflash does not know: it runs on the CPU and on GPUs of NVIDIA. "
        "Place the arrays there, or use jax.nn.dot_product_attention."
    )


mlir.register_lowering(primitive, mlir.lower_fun(_elsewhere, multiple_results=True))
mlir.register_lowering(primitive, mlir.lower_fun(_on_cpu, multiple_results=True), platform="cpu")
mlir.register_lowering(primitive, mlir.lower_fun(_on_gpu, multiple_results=True), platform="cuda")


_registering = threading.Lock()
_handlers: dict[str, Any] = {}
"""What XLA calls, by its name there: kept, as XLA has no more than an address."""


def register() -> None:
    """Let XLA know every answer that this process can give, for programs that were exported by another."""
    _register_cpu()
    if _gpus():
        _register_gpu()


def _register_cpu() -> None:
    with _registering:
        if _CPU not in _handlers:
            jax.devices()  # XLA's own registry must be there first
            _handlers[_CPU] = ffi.handler(_compute, REFUSALS)
            jax.ffi.register_ffi_target(_CPU, jax.ffi.pycapsule(_handlers[_CPU]), platform="cpu")


def _register_gpu() -> device.Device:
    """The GPU that programs are made for."""
    gpus = _gpus()
    if not gpus:
        raise UnsupportedProblem(
            "a program for CUDA is made where JAX sees no GPU, and which kernels it would run is not known. "
            "Make it where the GPU is."
        )
    with _registering:
        if _GPU not in _handlers:
            _handlers[_GPU] = ffi.handler(_launch, REFUSALS)
            target = jax.ffi.pycapsule(_handlers[_GPU])
            jax.ffi.register_ffi_target(_GPU, {"instantiate": target, "execute": target}, platform="CUDA")
    return device.current(gpus[0])


def _gpus() -> list[int]:
    """The numbers of this process' GPUs."""
    try:
        return [gpu.local_hardware_id for gpu in jax.local_devices(backend="cuda")]
    except RuntimeError:  # JAX has no backend of that name
        return []


_read: Any = lru_cache(maxsize=4096)(given.from_text)


def _compute(text: bytes, pointers: list[int], stream: Any) -> None:
    given.on_cpu(_read(text), pointers)


_launchers: dict[tuple[bytes, int], Any] = {}


def _launch(text: bytes, pointers: list[int], stream: Any) -> None:
    """Launch a call's kernels; when its program is instantiated, have them ready on every GPU.

    They could not be loaded while a command buffer records what is launched.
    """
    if not pointers:
        _prepare(text)
        return
    ordinal = device.ordinal()
    launch = _launchers.get((text, ordinal)) or _launcher(text, ordinal)
    launch(pointers, stream())


def _prepare(text: bytes) -> None:
    """Have the kernels of a call ready on every GPU that is like the one its program is made for."""
    why_not: list[UnsupportedProblem] = []
    gpus = _gpus()
    for ordinal in gpus:
        try:
            _launcher(text, ordinal)
        except UnsupportedProblem as error:
            why_not.append(error)
    if len(why_not) == len(gpus):
        raise why_not[0]


def _launcher(text: bytes, ordinal: int) -> Any:
    launch = _launchers.get((text, ordinal))
    if launch is None:
        with device.activated(ordinal):
            launch = _launchers[text, ordinal] = given.on_gpu(_read(text), ordinal)
    return launch
