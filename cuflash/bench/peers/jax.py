"""Peers on JAX: cuDNN, and FlashAttention-3 with a backward and windows."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cuflash
from cuflash.bench.peers.implementation import aligned_otherwise, beyond, own_words, window_size
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.dtypes import FP16
from cuflash.problem import Problem

CALLS = 8
"""Calls of a program that is timed: XLA leaves some microseconds between programs, and none inside of one."""


class Jax:
    """A jitted JAX function and its pullback, on JAX's own stream.

    Device times are of programs in which each call waits for the one before, wherever that has what the next one reads.
    """

    name: str
    family: str

    def __init__(self) -> None:
        # JAX would take three quarters of the card at its first use and leave too little for the others.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self._jax = importlib.import_module("jax")
        if self._jax.default_backend() != "gpu":
            raise ImportError("this JAX has no GPU")

    def function(self, problem: Problem, inputs: Inputs) -> Callable[..., Any]:
        """Attention of (b, s, h, d) or packed arrays, and of a bias if there is one."""
        raise NotImplementedError

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Compile and run once."""
        import cupy

        jax, problem = self._jax, case.problem
        cupy.cuda.get_current_stream().synchronize()
        tensors = [self.array(x) for x in (inputs.q, inputs.k, inputs.v, inputs.bias) if x is not None]
        attend = self.function(problem, inputs)
        last: list[Any] = [None]
        function: Callable[..., Any]
        after: Callable[..., Sequence[Any]]
        arguments: Sequence[Any]
        if problem.direction == "forward":
            function, arguments, after = attend, tensors, _with_out_for_values
            fits = inputs.q.shape[:-1] == inputs.v.shape[:-1]
        else:
            leaves, rest = (tensors, []) if problem.bias_grad else (tensors[:3], tensors[3:])
            pullback = jax.jit(lambda leaves, rest: jax.vjp(lambda *x: attend(*x, *rest), *leaves)[1])(leaves, rest)
            function, arguments, after = _pull_back, (pullback, self.array(inputs.dout)), _with_dq_for_dout
            fits = inputs.dout.shape == inputs.q.shape
        calls = CALLS if fits and problem.dtype is not FP16 else 1  # in which gradients of gradients would be 0
        compiled, compiled_in_a_row = jax.jit(function), jax.jit(_in_a_row(function, after, calls))

        def call() -> Any:
            last[0] = compiled(*arguments)
            return last[0]

        def launch() -> Any:
            last[0] = compiled_in_a_row(*arguments)
            return last[0]

        def wait() -> None:
            jax.block_until_ready(last[0])

        def join() -> None:
            result = last[0][0] if isinstance(last[0], tuple) else last[0]
            result.__dlpack__(stream=cupy.cuda.get_current_stream().ptr)

        def wide(results: Any) -> list[Any]:  # JAX has float64 only where it is switched on
            results = results if isinstance(results, tuple) else (results,)
            return jax.block_until_ready([x.astype(problem.dtype.accumulator) for x in results])

        call()
        wait()
        return Runner(
            self.name, self.family, call, launch, clock="events", wait=wait, tensors=wide, calls=calls, join=join
        )

    def array(self, x: Any) -> Any:
        """The same memory as a JAX array."""
        return self._jax.dlpack.from_dlpack(x)


def _pull_back(pullback: Any, dout: Any) -> Any:
    return pullback(dout)


def _with_out_for_values(out: Any, q: Any, k: Any, v: Any, *bias: Any) -> Sequence[Any]:
    return q, k, out, *bias


def _with_dq_for_dout(gradients: Any, pullback: Any, dout: Any) -> Sequence[Any]:
    return pullback, gradients[0]


def _in_a_row(function: Callable[..., Any], after: Callable[..., Sequence[Any]], calls: int) -> Callable[..., Any]:
    """So many calls, each of what `after` makes of the result of the one before."""

    def run(*arguments: Any) -> Any:
        result = function(*arguments)
        for _ in range(calls - 1):
            result = function(*after(result, *arguments))
        return result

    return run


class JaxCuflash(Jax):
    """Cuflash itself inside a JAX program."""

    name = "cuflash-jax"
    family = "cuflash"

    def why_not(self, problem: Problem) -> str | None:
        """Dense calls with bands."""
        return beyond(problem, "causal", "window", "softcap")

    def function(self, problem: Problem, inputs: Inputs) -> Callable[..., Any]:
        """Attention of (b, s, h, d) arrays."""
        return partial(cuflash.flash_attn_func, **own_words(problem))


class JaxCudnn(Jax):
    """``jax.nn.dot_product_attention`` with cuDNN."""

    name = "jax-cudnn"
    family = "cudnn"

    def why_not(self, problem: Problem) -> str | None:
        """Top-left causal, windows on the left of the diagonal alone; no soft cap, no packed sequences."""
        if problem.mask.kind == "window" and problem.mask.right != 0:
            return "its windows are causal"
        features = ("causal", "window", "bias", "bias gradient")
        return beyond(problem, *features) or aligned_otherwise(problem, "top-left")

    def function(self, problem: Problem, inputs: Inputs) -> Callable[..., Any]:
        """Attention of (b, s, h, d) arrays, and of a bias if there is one."""
        attention = self._jax.nn.dot_product_attention
        mask = problem.mask
        options = {"scale": problem.softmax_scale, "is_causal": mask.right == 0, "implementation": "cudnn"}
        if mask.kind == "window":
            options["local_window_size"] = (mask.left, 0)
        return lambda q, k, v, bias=None: attention(q, k, v, bias, **options)


class JaxFlashAttention3(Jax):
    """FlashAttention-3 by the package ``flash-attn3-jax``, with the backward and windows that ``fa3-fwd`` lacks."""

    name = "jax-fa3"
    family = "fa3"

    def __init__(self) -> None:
        super().__init__()
        self._module = importlib.import_module("flash_attn3_jax")

    def why_not(self, problem: Problem) -> str | None:
        """Bands, dense or packed."""
        return beyond(problem, "causal", "window", "varlen") or aligned_otherwise(problem, "bottom-right")

    def function(self, problem: Problem, inputs: Inputs) -> Callable[..., Any]:
        """Attention of (b, s, h, d) or packed arrays."""
        options: dict[str, object] = {
            "softmax_scale": problem.softmax_scale,
            "is_causal": problem.mask.kind == "causal",
        }
        if problem.mask.kind == "window":
            options["window_size"] = window_size(problem)
        if problem.layout == "dense":
            return lambda q, k, v: self._module.flash_mha(q, k, v, **options)
        starts = [self.array(x) for x in (inputs.cu_seqlens_q, inputs.cu_seqlens_kv)]
        options |= {"max_seqlen_q": problem.len_q, "max_seqlen_k": problem.len_kv}
        return lambda q, k, v: self._module.flash_mha_varlen(q, k, v, *starts, **options)
