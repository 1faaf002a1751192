"""Peers on PyTorch: its own attention functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial, reduce
from operator import and_
from typing import Any, Literal

import cuflash
from cuflash.bench.peers.implementation import aligned_otherwise, beyond, own_words, window_size
from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.dtypes import FP64
from cuflash.mods import Mod
from cuflash.problem import Problem


class Torch:
    """What functions on torch tensors share: zero-copy inputs, gradients by autograd, torch's own graph capture."""

    name: str
    family: str

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Bring the inputs over, run once, capture; what cannot be captured is launched eagerly, and so named."""
        import cupy

        torch = importlib.import_module("torch")
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)

        @contextmanager
        def scope() -> Iterator[None]:
            with torch.cuda.stream(stream), self.scope(torch):
                yield

        with scope():
            call = self.call(torch, case, inputs)
            call()
            stream.synchronize()
            graph = self._capture(torch, call, stream)
        # Eager launches may leave the device waiting for the host, which a reader of the row has to know.
        launch, family = (call, f"{self.family}, eager") if graph is None else (graph.replay, self.family)
        runner = Runner(self.name, family, call, launch, "events", stream.synchronize, scope, keep=[graph])
        runner.tensors = partial(self.tensors, case, inputs)
        return runner

    def scope(self, torch: Any) -> AbstractContextManager[object]:
        """The switches under which the function picks this implementation; none to set."""
        return torch.enable_grad()

    def view(self, x: Any) -> Any:
        """A tensor of the inputs in the shape that the function takes: (b, s, h, d) or packed, as it is.

        Seen so once more it is as before, but for an axis of one.
        """
        return x

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """The forward of these tensors (bias may be None), which returns out."""
        raise NotImplementedError

    def call(self, torch: Any, case: Case, inputs: Inputs) -> Callable[[], object]:
        """The forward, or the gradients that the case asks for by the graph of one forward."""
        problem = case.problem
        q, k, v = (self.view(torch.from_dlpack(x)) for x in (inputs.q, inputs.k, inputs.v))
        bias: Any = None if inputs.bias is None else torch.from_dlpack(inputs.bias)
        captured = [torch.from_dlpack(x) for x in inputs.captured]
        if problem.direction == "forward":
            return self.bind(torch, case, replace(inputs, captured=tuple(captured)), q, k, v, bias)
        leaves = q, k, v = [x.detach().requires_grad_() for x in (q, k, v)]
        for i in problem.captured_gradients:
            captured[i] = captured[i].detach().requires_grad_()
            leaves.append(captured[i])
        inputs = replace(inputs, captured=tuple(captured))
        if problem.bias_grad:
            bias = bias.detach().requires_grad_()
            leaves.append(bias)
        out = self.bind(torch, case, inputs, q, k, v, bias)()
        dout = self.view(torch.from_dlpack(inputs.dout))
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def tensors(self, case: Case, inputs: Inputs, results: Any) -> list[Any]:
        """What a call returned, in the shapes of the case and in float64, which holds every value exactly."""
        forward = case.problem.direction == "forward"
        results, shapes = ([results], (inputs.dout,)) if forward else (results, (inputs.q, inputs.k, inputs.v))
        return [self.view(x).detach().double().reshape(like.shape) for x, like in zip(results, shapes, strict=False)]

    def _capture(self, torch: Any, call: Callable[[], object], stream: Any) -> Any | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


class TorchJvp(Torch):
    """The tangents of the formula written out, whole score matrices in the element type, by ``torch.func.jvp``."""

    name = "torch-jvp"
    family = "unfused"

    def why_not(self, problem: Problem) -> str | None:
        """It is there for tangents alone."""
        if problem.tangents is None:
            return "computes tangents alone"
        return beyond(problem, "causal", "tangents") or aligned_otherwise(problem, "top-left")

    def view(self, x: Any) -> Any:
        """(b, h, s, d)."""
        return x.transpose(1, 2)

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One push of the tangents; a mask is added as -inf."""
        problem = case.problem
        changes = [self.view(torch.from_dlpack(x)) for x in (inputs.tangent_q, inputs.tangent_k, inputs.tangent_v)]
        hidden: Any = None
        if problem.mask.kind == "causal":
            hidden = torch.full((problem.len_q, problem.len_kv), -torch.inf, dtype=q.dtype, device=q.device).triu(1)

        def attend(q: Any, k: Any, v: Any) -> Any:
            s = q @ k.mT * problem.softmax_scale
            return torch.softmax(s if hidden is None else s + hidden, -1) @ v

        return lambda: torch.func.jvp(attend, (q, k, v), tuple(changes))

    def tensors(self, case: Case, inputs: Inputs, results: Any) -> list[Any]:
        """Out alone: what tangents are compared with are tests."""
        return super().tensors(case, inputs, results[0])


class TorchSdpa(Torch):
    """``torch.nn.functional.scaled_dot_product_attention`` held to one of its backends."""

    def __init__(self, backend: Literal["flash", "efficient", "cudnn", "math"]) -> None:
        importlib.import_module("torch")
        self.name = f"torch-{backend}"
        self.family = backend
        self._switch = {
            "flash": "FLASH_ATTENTION",
            "efficient": "EFFICIENT_ATTENTION",
            "cudnn": "CUDNN_ATTENTION",
            "math": "MATH",
        }[backend]

    def why_not(self, problem: Problem) -> str | None:
        """It knows no window, soft cap, ALiBi nor packed sequences, is top-left aligned and takes one mask."""
        if self.family == "math" and problem.dtype != FP64:
            return "whole score matrices, timed in fp64 alone, which no other backend takes"
        everything = ["boolean mask", "bias", "bias gradient"]
        masks = {"flash": [], "efficient": everything, "cudnn": ["boolean mask", "bias"], "math": everything}
        masked = [problem.mask.kind == "causal", problem.mask.tensor, problem.bias is not None]
        return (
            beyond(problem, "causal", "dropout", *masks[self.family])
            or aligned_otherwise(problem, "top-left")
            or ("one of causal mask, boolean mask and bias at a time" if sum(masked) > 1 else None)
        )

    def scope(self, torch: Any) -> AbstractContextManager[object]:
        """Allow this backend alone."""
        attention = importlib.import_module("torch.nn.attention")
        return attention.sdpa_kernel(getattr(attention.SDPBackend, self._switch))

    def view(self, x: Any) -> Any:
        """(b, h, s, d)."""
        return x.transpose(1, 2)

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One call of the function; its random bits are its own."""
        problem = case.problem
        mask = bias if inputs.mask_tensor is None else torch.from_dlpack(inputs.mask_tensor)
        options: dict[str, object] = {
            "attn_mask": mask,
            "dropout_p": case.dropout_p,
            "scale": problem.softmax_scale,
            "is_causal": problem.mask.kind == "causal",
        }
        if problem.group > 1:
            options["enable_gqa"] = True
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(q, k, v, **options)


class TorchCuflash(Torch):
    """Cuflash itself on tensors of torch."""

    name = "cuflash-torch"
    family = "cuflash"

    def __init__(self) -> None:
        importlib.import_module("torch")

    def why_not(self, problem: Problem) -> str | None:
        """Dense calls with bands."""
        return beyond(problem, "causal", "window", "softcap")

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One call of the function."""
        return partial(cuflash.flash_attn_func, q, k, v, **own_words(case.problem))


class TorchCpu(TorchSdpa):
    """The same function on the CPU, on all its cores, of tensors that share their memory with NumPy's arrays."""

    def __init__(self) -> None:
        super().__init__("flash")
        self.name = "torch-cpu"

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Bring the inputs over and, for the gradients, run the forward once."""
        torch = importlib.import_module("torch")

        @contextmanager
        def scope() -> Iterator[None]:
            backward = case.problem.direction == "backward"
            with torch.set_grad_enabled(backward), self.scope(torch):
                yield

        with scope():
            call = self.call(torch, case, inputs)
        tensors = partial(self.tensors, case, inputs)
        return Runner(self.name, self.family, call, call, "wall", wait=lambda: None, scope=scope, tensors=tensors)


class TorchVarlen(Torch):
    """``torch.nn.attention.varlen.varlen_attn``, FlashAttention-2 on packed sequences."""

    name = "torch-varlen"
    family = "flash"

    def __init__(self) -> None:
        self._function = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def why_not(self, problem: Problem) -> str | None:
        """Packed sequences only."""
        if problem.layout == "dense":
            return "packed sequences only"
        return beyond(problem, "varlen", "causal", "window") or aligned_otherwise(problem, "bottom-right")

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """One call of the function."""
        problem = case.problem
        lengths = (*cu_seqlens(torch, inputs), problem.len_q, problem.len_kv)
        options: dict[str, object] = {"scale": problem.softmax_scale, "window_size": window_size(problem)}
        if problem.group > 1:
            options["enable_gqa"] = True
        return lambda: self._function(q, k, v, *lengths, **options)


_MOST_PAIRS = 2**31
"""Beyond so many pairs a block mask is made by compiled code, which does not write down the mask of every pair."""


_KERNEL_OPTIONS: tuple[dict[str, int], ...] = {}, {"num_stages": 2}, {"num_stages": 1}


class FlexAttention(Torch):
    """``torch.nn.attention.flex_attention``, compiled: block masks for bands and documents, scores changed by code."""

    name = "flex"
    family = "triton"

    def __init__(self) -> None:
        self._module = importlib.import_module("torch.nn.attention.flex_attention")

    def why_not(self, problem: Problem) -> str | None:
        """What it is asked for here: bands and documents, and what is a function of one score and its place."""
        if problem.layout == "varlen" and problem.bias is not None:
            return "no bias of packed sequences"
        written = "written score", "written mask", "block mask", "captured gradient"
        return beyond(problem, "varlen", "causal", "window", "softcap", "alibi", "bias", "bias gradient", *written)

    def call(self, torch: Any, case: Case, inputs: Inputs) -> Callable[[], object]:
        """As its compiler chooses, or with fewer tiles in flight where those choices need more memory than there is."""
        for options in _KERNEL_OPTIONS:
            self._kernel_options = options
            try:
                call = super().call(torch, case, inputs)
                call()
                return call
            except RuntimeError as error:
                if options is _KERNEL_OPTIONS[-1] or "out of resource" not in str(error):
                    raise
        raise AssertionError("one of them returns or raises")

    def view(self, x: Any) -> Any:
        """(b, h, s, d); packed sequences are one long one."""
        return (x if x.ndim == 4 else x[None]).transpose(1, 2)

    def bind(self, torch: Any, case: Case, inputs: Inputs, q: Any, k: Any, v: Any, bias: Any) -> Callable[[], Any]:
        """Compile for this case alone; the block mask is made outside the clock."""
        torch.compiler.reset()  # each case is a variant, and too many variants of one function are an error
        # The backward runs again and again on what one forward has kept.
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False
        problem = case.problem
        read = len(problem.score_mod.operands) if problem.score_mod else 0
        places = self._places(torch, case, inputs)
        block_mask = None
        rule, held = problem.mask_mod, inputs.captured[read:]
        if case.blocks is not None:
            rule = case.blocks.rule.mod
            held = tuple(torch.from_numpy(x).to(q.device) for x in case.blocks.rule.arrays)
        if visible := _visible(problem, *places, _written(torch, rule, held)):
            make = self._module.create_block_mask
            if q.shape[2] * k.shape[2] > _MOST_PAIRS:
                make = torch.compile(make)
            batch, heads = (case.blocks.batch, case.blocks.heads) if case.blocks is not None else (1, 1)
            own = (n if n > 1 else None for n in (batch, heads))
            block_mask = make(visible, *own, q.shape[2], k.shape[2], device=str(q.device))
        options: dict[str, object] = {
            "score_mod": _written(torch, problem.score_mod, inputs.captured[:read])
            or _score_mod(torch, problem, inputs, bias, places[0]),
            "block_mask": block_mask,
            "scale": problem.softmax_scale,
            "enable_gqa": problem.group > 1,
        }
        if self._kernel_options:
            options["kernel_options"] = self._kernel_options
        function = torch.compile(self._module.flex_attention, dynamic=False, fullgraph=True)
        return lambda: function(q, k, v, **options)

    def _places(self, torch: Any, case: Case, inputs: Inputs) -> tuple[Callable[[Any], Any], Any, Any]:
        """The key on a query row's diagonal, and the documents of packed query and key rows (None if dense)."""
        problem = case.problem
        if problem.layout == "dense":
            offset = problem.mask.offset(problem.len_q, problem.len_kv)
            return lambda row: row + offset, None, None
        starts_q, starts_kv = (starts.long() for starts in cu_seqlens(torch, inputs))
        numbers = torch.arange(len(case.lens_q), device=starts_q.device)
        document_q, document_kv = (numbers.repeat_interleave(starts.diff()) for starts in (starts_q, starts_kv))
        lens = zip(starts_q.diff().tolist(), starts_kv.diff().tolist(), strict=True)
        offsets = torch.tensor([problem.mask.offset(len_q, len_kv) for len_q, len_kv in lens], device=starts_q.device)
        shift = starts_kv[:-1] + offsets - starts_q[:-1]
        diagonals = torch.arange(len(document_q), device=starts_q.device) + shift[document_q]
        return lambda row: diagonals[row], document_q, document_kv


def _visible(
    problem: Problem,
    diagonal: Callable[[Any], Any],
    document_q: Any,
    document_kv: Any,
    written: Callable[..., Any] | None,
) -> Callable[..., Any] | None:
    """Whether a query row sees a key, as ``create_block_mask`` asks it; None when every row sees every key."""
    left, right = problem.mask.left, problem.mask.right
    tests: list[Callable[[Any, Any], Any]] = []
    if written is not None:
        return written
    if left is not None:
        tests.append(lambda row, key: key >= diagonal(row) - left)
    if right is not None:
        tests.append(lambda row, key: key <= diagonal(row) + right)
    if document_q is not None:
        tests.append(lambda row, key: document_q[row] == document_kv[key])

    def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
        return reduce(and_, [test(row, key) for test in tests])

    return visible if tests else None


def _written(torch: Any, mod: Mod | None, captured: Sequence[Any]) -> Callable[..., Any] | None:
    """A written score or mask as a Python function of torch's numbers, spelled out for torch's compiler."""
    if mod is None:
        return None
    names = [f"captured{i}" for i in range(len(captured))]
    positions = "b, h, q, k" if mod.expression.kind == "bool" else "score, b, h, q, k"
    functions = {name: getattr(torch, name) for name in ("tanh", "exp", "log", "sqrt", "where")}
    made = eval(f"lambda {', '.join(names)}: lambda {positions}: {mod}", {"abs": abs, **functions})
    return made(*captured)


def _score_mod(
    torch: Any, problem: Problem, inputs: Inputs, bias: Any, diagonal: Callable[[Any], Any]
) -> Callable[..., Any] | None:
    """What happens to a score after its scale; None when nothing does."""
    slopes = torch.from_dlpack(inputs.alibi_slopes) if problem.alibi else None
    softcap = problem.softcap
    many = [0 if one else 1 for one in problem.bias_broadcast]

    def score_mod(score: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        if softcap:
            score = softcap * (score / softcap).tanh()
        if slopes is not None:
            score = score - slopes[h] * (key - diagonal(row)).abs()
        if bias is not None:
            score = score + bias[b * many[0], h * many[1], row * many[2], key * many[3]]
        return score

    return score_mod if softcap or slopes is not None or bias is not None else None


def cu_seqlens(torch: Any, inputs: Inputs) -> tuple[Any, Any]:
    """Where packed query and key sequences start."""
    return torch.from_dlpack(inputs.cu_seqlens_q), torch.from_dlpack(inputs.cu_seqlens_kv)
