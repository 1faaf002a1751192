"""Peers on JAX: cuDNN, and FlashAttention-3 with a backward and windows."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import cuflash
from cuflash.bench.peers.implementation import aligned_otherwise, beyond, own_words, window_size
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.problem import Problem


class Jax:
    """A jitted JAX function and its pullback; JAX has its own streams, so many calls are timed by the host's clock."""

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
        function = self.function(problem, inputs)
        last: list[Any] = [None]
        if problem.direction == "forward":
            compiled = jax.jit(function)

            def call() -> Any:
                last[0] = compiled(*tensors)
                return last[0]

        else:
            leaves, rest = (tensors, []) if problem.bias_grad else (tensors[:3], tensors[3:])
            pullback = jax.jit(lambda leaves, rest: jax.vjp(lambda *x: function(*x, *rest), *leaves)[1])(leaves, rest)
            compiled, dout = jax.jit(lambda pullback, dout: pullback(dout)), self.array(inputs.dout)

            def call() -> Any:
                last[0] = compiled(pullback, dout)
                return last[0]

        def wait() -> None:
            jax.block_until_ready(last[0])

        def wide(results: Any) -> list[Any]:  # JAX has float64 only where it is switched on
            results = results if isinstance(results, tuple) else (results,)
            return jax.block_until_ready([x.astype(problem.dtype.accumulator) for x in results])

        call()
        wait()
        return Runner(self.name, self.family, call, call, clock="wall", wait=wait, tensors=wide)

    def array(self, x: Any) -> Any:
        """The same memory as a JAX array."""
        return self._jax.dlpack.from_dlpack(x)


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
