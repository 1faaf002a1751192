"""FlashAttention-3 and -4 by their own packages, on torch tensors; both are aligned bottom-right."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cuflash.bench.peers.implementation import aligned_otherwise, beyond, window_size
from cuflash.bench.peers.torch import Torch, cu_seqlens
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.problem import Problem


class FlashAttention3(Torch):
    """The full package, or the forward-only build ``fa3-fwd``."""

    name = "fa3"
    family = "fa3"

    def __init__(self) -> None:
        for module, config in (("flash_attn_interface", "flash_attn_config"), ("fa3_fwd_interface", "fa3_fwd_config")):
            try:
                self._module = importlib.import_module(module)
            except ImportError:
                continue
            self._left_out = _left_out(config)
            return
        raise ImportError("neither flash_attn_interface nor fa3_fwd_interface is installed")

    def why_not(self, problem: Problem) -> str | None:
        """No score features but the soft cap; a build may have left out more."""
        built = [x for x in ("window", "softcap", "varlen", "paged") if x not in self._left_out]
        if problem.direction in self._left_out:
            return f"built without {problem.direction}"
        built += ["cache"] if hasattr(self._module, "flash_attn_with_kvcache") else []
        return beyond(problem, "causal", "deterministic", *built) or aligned_otherwise(problem, "bottom-right")

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One call of the function."""
        problem = case.problem
        options = _options(torch, problem, inputs)
        if problem.mask.kind == "window":
            options["window_size"] = window_size(problem)
        if problem.page_size or (_few_queries(problem) and hasattr(self._module, "flash_attn_with_kvcache")):
            return self._cached(torch, problem, inputs, options, q, k, v)
        return _out_only(self._module, problem, options, q, k, v)

    def _cached(
        self, torch: Any, problem: Problem, inputs: Inputs, options: dict[str, object], q: Any, k: Any, v: Any
    ) -> Callable[[], Any]:
        """The function that splits the keys of few queries, as the others do not, and that knows pages."""
        function = self._module.flash_attn_with_kvcache
        if problem.page_size:
            starts_q, starts_kv = cu_seqlens(torch, inputs)
            names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_k", "max_seqlen_q"
            options = {name: option for name, option in options.items() if name not in names}
            options |= {"cu_seqlens_q": starts_q, "max_seqlen_q": problem.len_q}
            options |= {"cache_seqlens": starts_kv[1:] - starts_kv[:-1]}
            options["page_table"] = torch.from_dlpack(inputs.block_table)
        if problem.layout == "cache":
            given = {
                "cache_seqlens": inputs.seqused_kv, "k": inputs.k_new, "v": inputs.v_new,
                "rotary_cos": inputs.rotary_cos, "rotary_sin": inputs.rotary_sin,
            }  # fmt: skip
            options |= {name: torch.from_dlpack(x) for name, x in given.items() if x is not None}
            if problem.rotary is not None:
                options["rotary_interleaved"] = problem.rotary.interleaved
        return lambda: function(q, k, v, **options)


def _few_queries(problem: Problem) -> bool:
    """Whether a forward is one of new queries over a longer cache."""
    return problem.direction == "forward" and problem.layout != "varlen" and problem.len_q < problem.len_kv


class FlashAttention4(Torch):
    """The package ``flash-attn-4``, whose kernels are compiled for each variant at its first call."""

    name = "fa4"
    family = "fa4"

    def __init__(self) -> None:
        self._module = importlib.import_module("flash_attn.cute")

    def why_not(self, problem: Problem) -> str | None:
        """Of score features the soft cap and sinks; 16-bit types, and head sizes that its copies can step through.

        Which of those sizes an architecture has not, it says itself.
        """
        if problem.dtype.itemsize != 2:
            return "fp16 and bf16 only"
        if max(problem.dim_qk, problem.dim_v) > 256 or problem.dim_qk % 8 or problem.dim_v % 8:
            return "head dimensions are multiples of 8 up to 256"
        features = ("causal", "window", "varlen", "softcap", "sink", "deterministic")
        return beyond(problem, *features) or aligned_otherwise(problem, "bottom-right")

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One call of the function."""
        problem = case.problem
        options = _options(torch, problem, inputs)
        if problem.mask.kind == "window":  # -1 would be the key before the diagonal
            options["window_size"] = problem.mask.left, problem.mask.right
        used = {"seqused_q": inputs.seqused_q, "seqused_k": inputs.seqused_kv, "learnable_sink": inputs.sink}
        options |= {name: torch.from_dlpack(x) for name, x in used.items() if x is not None}
        return _out_only(self._module, problem, options, q, k, v)


def _options(torch: Any, problem: Problem, inputs: Inputs) -> dict[str, object]:
    """The keywords that both packages know, but for the window."""
    options: dict[str, object] = {
        "softmax_scale": problem.softmax_scale,
        "causal": problem.mask.kind == "causal",
        "softcap": problem.softcap,
    }
    if problem.deterministic:
        options["deterministic"] = True
    if problem.layout == "varlen":
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options |= zip(names, (*cu_seqlens(torch, inputs), problem.len_q, problem.len_kv), strict=True)
    return options


def _out_only(module: Any, problem: Problem, options: dict[str, object], q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """A call of a package's function for dense or packed tensors that returns out alone."""
    function = module.flash_attn_func if problem.layout == "dense" else module.flash_attn_varlen_func

    def out_only() -> Any:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result  # most builds return (out, lse)

    return out_only


def _left_out(config: str) -> set[str]:
    """What a build of FlashAttention-3 says it was made without; a build that says nothing has everything."""
    try:
        flags = importlib.import_module(config).CONFIG["build_flags"]
    except ImportError:
        return set()
    words = {
        "LOCAL": "window", "SOFTCAP": "softcap", "VARLEN": "varlen", "BACKWARD": "backward", "PAGEDKV": "paged",
    }  # fmt: skip
    return {word for flag, word in words.items() if flags.get(f"FLASHATTENTION_DISABLE_{flag}")}
