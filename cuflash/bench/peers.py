"""Everything the bench can time: cuflash itself, and the peers that this Python has, imported by name when asked for.

A peer refuses problems whose meaning it cannot express (``why_not``); what it cannot run it says itself by raising.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cuflash.bench import calls
from cuflash.bench.cases import Case
from cuflash.bench.inputs import Inputs
from cuflash.bench.naive import Naive, visible
from cuflash.bench.timing import Runner
from cuflash.plan import choose
from cuflash.plan.families import needs
from cuflash.problem import Problem


class Implementation(Protocol):
    """Something that computes attention and can be timed."""

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """Why the problem cannot even be put to it; None when it can."""

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Make the case ready to be launched again and again on CuPy's current stream."""


def _beyond(problem: Problem, *features: str) -> str | None:
    """Which needs of the problem are not among these features, in words."""
    everywhere = "backward", "gqa", "dim_v != dim_qk", "unaligned rows"
    missing = [need for need in needs(problem) if need not in (*everywhere, *features)]
    return f"no {', '.join(missing)}" if missing else None


def _not_square(problem: Problem) -> str | None:
    """Why a top-left causal mask would not mean the same."""
    if problem.mask.kind == "causal" and problem.layout == "dense" and problem.len_q != problem.len_kv:
        return "its causal mask is aligned top-left"
    return None


class CuflashGpu:
    """The public functions on CuPy arrays; the launches of one call are captured and replayed as a graph."""

    name = "cuflash"

    def why_not(self, problem: Problem) -> str | None:
        """Nothing: what no family runs raises."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Compile, warm up and capture."""
        import cupy

        from cuflash.device import current

        call = calls.of(case, inputs)
        family = choose(case.problem, current(cupy.cuda.Device().id), case.family).family
        stream = cupy.cuda.get_current_stream()
        # A pool of its own: another allocation must not get the scratch memory that the graph keeps writing to.
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            call()
            stream.synchronize()
            stream.begin_capture()
            try:
                outputs = call()
            finally:
                graph = stream.end_capture()
        return Runner(
            self.name,
            family,
            call,
            launch=lambda: graph.launch(stream),
            clock="events",
            wait=stream.synchronize,
            keep=[pool, outputs, graph],
        )


class CuflashCpu:
    """The public functions on NumPy arrays."""

    name = "cuflash"

    def why_not(self, problem: Problem) -> str | None:
        """Nothing: the NumPy backend runs every problem."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Nothing to prepare but the forward's results, where the case is a backward."""
        call = calls.of(case, inputs)
        return Runner(self.name, "reference", call, call, clock="wall", wait=lambda: None)


class NumpyNaive:
    """Attention as a NumPy user writes it: the whole score matrix, one sequence after the other."""

    name = "numpy-naive"

    def why_not(self, problem: Problem) -> str | None:
        """It has bands and soft caps, on dense tensors."""
        return _beyond(problem, "causal", "window", "softcap", "deterministic")

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Views in (heads, len, dim) order and the mask, outside the clock."""
        problem = case.problem
        naive = Naive(problem.dtype, problem.softmax_scale, problem.softcap)
        keep = visible(problem.mask, problem.len_q, problem.len_kv)
        sequences = [
            [x[b].swapaxes(0, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)] for b in range(problem.batch)
        ]

        def forward() -> object:
            return [naive.forward(q, k, v, keep) for q, k, v, _ in sequences]

        def backward() -> object:
            return [naive.backward(dout, 0.0, q, k, v, keep) for q, k, v, dout in sequences]

        call = forward if problem.direction == "forward" else backward
        return Runner(self.name, "naive", call, call, clock="wall", wait=lambda: None)


class _Torch:
    """What torch's functions share: zero-copy inputs, gradients by autograd, and torch's own graph capture."""

    name: str
    family: str

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Bring the inputs over, run once, capture; where capture fails, calls are launched eagerly."""
        import cupy

        torch = importlib.import_module("torch")
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)

        @contextmanager
        def scope() -> Iterator[None]:
            with torch.cuda.stream(stream), self.scope(torch):
                yield

        with scope():
            call = self._call(torch, case, inputs)
            call()
            stream.synchronize()
            graph = self._capture(torch, call, stream)
        launch = call if graph is None else graph.replay
        return Runner(self.name, self.family, call, launch, "events", stream.synchronize, scope, keep=[graph])

    def scope(self, torch: Any) -> AbstractContextManager[object]:
        """The switches under which the function picks this implementation."""
        raise NotImplementedError

    def forward(self, torch: Any, case: Case, inputs: Inputs) -> tuple[list[Any], Callable[..., Any]]:
        """(q, k, v) as the function takes them, and the function of them that returns out like q."""
        raise NotImplementedError

    def _call(self, torch: Any, case: Case, inputs: Inputs) -> Callable[[], object]:
        qkv, function = self.forward(torch, case, inputs)
        if case.problem.direction == "forward":
            return lambda: function(*qkv)
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = function(*leaves)
        dout = torch.from_dlpack(inputs.dout)
        dout = dout if dout.shape == out.shape else dout.transpose(1, 2)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def _capture(self, torch: Any, call: Callable[[], object], stream: Any) -> Any | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


class TorchSdpa(_Torch):
    """``torch.nn.functional.scaled_dot_product_attention`` held to one of its backends."""

    def __init__(self, backend: Literal["flash", "efficient", "cudnn"]) -> None:
        self.name = f"torch-{backend}"
        self.family = backend
        self._switch = {
            "flash": "FLASH_ATTENTION",
            "efficient": "EFFICIENT_ATTENTION",
            "cudnn": "CUDNN_ATTENTION",
        }[backend]

    def why_not(self, problem: Problem) -> str | None:
        """It knows no window, no soft cap and no packed sequences, and is top-left aligned."""
        return _beyond(problem, "causal", *([] if self.family == "flash" else ["boolean mask"])) or _not_square(problem)

    def scope(self, torch: Any) -> AbstractContextManager[object]:
        """Allow this backend alone."""
        attention = importlib.import_module("torch.nn.attention")
        return attention.sdpa_kernel(getattr(attention.SDPBackend, self._switch))

    def forward(self, torch: Any, case: Case, inputs: Inputs) -> tuple[list[Any], Callable[..., Any]]:
        """(b, h, s, d) views."""
        problem = case.problem
        qkv = [torch.from_dlpack(x).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
        options: dict[str, object] = {"scale": problem.softmax_scale, "is_causal": problem.mask.kind == "causal"}
        if problem.group > 1:
            options["enable_gqa"] = True
        if inputs.mask_tensor is not None:
            options["attn_mask"] = torch.from_dlpack(inputs.mask_tensor)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return qkv, lambda q, k, v: sdpa(q, k, v, **options)


class FlashAttention3(_Torch):
    """FlashAttention-3's own functions: the full package, or the forward-only build ``fa3-fwd``."""

    name = "fa3"
    family = "fa3"

    def __init__(self) -> None:
        for module in ("flash_attn_interface", "fa3_fwd_interface"):
            try:
                self._module = importlib.import_module(module)
            except ImportError:
                continue
            self._forward_only = module == "fa3_fwd_interface"
            return
        raise ImportError("neither flash_attn_interface nor fa3_fwd_interface is installed")

    def why_not(self, problem: Problem) -> str | None:
        """The full package has all but boolean masks; the forward-only build was made without windows."""
        if self._forward_only and problem.direction == "backward":
            return "the forward-only build"
        windows = [] if self._forward_only else ["window"]
        if problem.mask.kind != "none" and problem.mask.alignment == "top-left" and problem.len_q != problem.len_kv:
            return "its masks are aligned bottom-right"
        return _beyond(problem, "causal", "softcap", "varlen", "deterministic", *windows)

    def scope(self, torch: Any) -> AbstractContextManager[object]:
        """No switch to set."""
        return torch.enable_grad()

    def forward(self, torch: Any, case: Case, inputs: Inputs) -> tuple[list[Any], Callable[..., Any]]:
        """(b, s, h, d) or packed tensors, as they are."""
        problem = case.problem
        qkv = [torch.from_dlpack(x) for x in (inputs.q, inputs.k, inputs.v)]
        options: dict[str, object] = {
            "softmax_scale": problem.softmax_scale,
            "causal": problem.mask.kind == "causal",
            "softcap": problem.softcap,
        }
        if problem.deterministic:
            options["deterministic"] = True
        if problem.mask.kind == "window":
            sides = (problem.mask.left, problem.mask.right)
            options["window_size"] = tuple(-1 if side is None else side for side in sides)
        function = self._module.flash_attn_func
        if problem.layout == "varlen":
            function = self._module.flash_attn_varlen_func
            options |= {
                "cu_seqlens_q": torch.from_dlpack(inputs.cu_seqlens_q),
                "cu_seqlens_k": torch.from_dlpack(inputs.cu_seqlens_kv),
                "max_seqlen_q": problem.len_q,
                "max_seqlen_k": problem.len_kv,
            }

        def out_only(q: Any, k: Any, v: Any) -> Any:
            result = function(q, k, v, **options)
            return result[0] if isinstance(result, tuple) else result  # older builds return (out, lse)

        return qkv, out_only


class _Jax:
    """A jitted JAX function and its pullback; JAX has its own streams, so many calls are timed by the host's clock."""

    name: str
    family: str

    def __init__(self) -> None:
        # JAX would take three quarters of the card at its first use and leave too little for the others.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self._jax = importlib.import_module("jax")
        if self._jax.default_backend() != "gpu":
            raise ImportError("this JAX has no GPU")

    def function(self, problem: Problem) -> Callable[..., Any]:
        """Attention of (b, s, h, d) arrays."""
        raise NotImplementedError

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Compile and run once."""
        import cupy

        jax = self._jax
        cupy.cuda.get_current_stream().synchronize()
        q, k, v, dout = (jax.dlpack.from_dlpack(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        last: list[Any] = [None]
        if case.problem.direction == "forward":
            compiled = jax.jit(self.function(case.problem))

            def call() -> None:
                last[0] = compiled(q, k, v)

        else:
            pullback = jax.jit(lambda q, k, v: jax.vjp(self.function(case.problem), q, k, v)[1])(q, k, v)
            compiled = jax.jit(lambda pullback, dout: pullback(dout))

            def call() -> None:
                last[0] = compiled(pullback, dout)

        def wait() -> None:
            jax.block_until_ready(last[0])

        call()
        wait()
        return Runner(self.name, self.family, call, call, clock="wall", wait=wait)


class JaxCudnn(_Jax):
    """``jax.nn.dot_product_attention`` with cuDNN."""

    name = "jax-cudnn"
    family = "cudnn"

    def why_not(self, problem: Problem) -> str | None:
        """No window on the right, no soft cap; causal is top-left."""
        return _beyond(problem, "causal") or _not_square(problem)

    def function(self, problem: Problem) -> Callable[..., Any]:
        """Attention of (b, s, h, d) arrays."""
        attention = self._jax.nn.dot_product_attention
        causal = problem.mask.kind == "causal"
        return lambda q, k, v: attention(q, k, v, scale=problem.softmax_scale, is_causal=causal, implementation="cudnn")


class JaxFlashAttention3(_Jax):
    """FlashAttention-3 by the package ``flash-attn3-jax``, which has a backward where ``fa3-fwd`` has none."""

    name = "jax-fa3"
    family = "fa3"

    def __init__(self) -> None:
        super().__init__()
        self._module = importlib.import_module("flash_attn3_jax")

    def why_not(self, problem: Problem) -> str | None:
        """Dense and causal problems."""
        return _beyond(problem, "causal")

    def function(self, problem: Problem) -> Callable[..., Any]:
        """Attention of (b, s, h, d) arrays."""
        causal = problem.mask.kind == "causal"
        return lambda q, k, v: self._module.flash_mha(q, k, v, softmax_scale=problem.softmax_scale, is_causal=causal)


PEERS: dict[str, tuple[Callable[[], Implementation], ...]] = {
    "torch": (
        lambda: TorchSdpa("flash"),
        lambda: TorchSdpa("efficient"),
        lambda: TorchSdpa("cudnn"),
    ),
    "fa3": (FlashAttention3,),
    "jax": (JaxCudnn, JaxFlashAttention3),
    "numpy": (NumpyNaive,),
}
"""What ``--peers`` may name."""


@dataclass(frozen=True, slots=True)
class Found:
    """The implementations of this machine."""

    implementations: list[Implementation]
    notes: list[str]
    """Why others are missing."""


def find(names: list[str], gpu: bool) -> Found:
    """Cuflash and those of the named peers that can be imported; on the CPU only ``numpy`` can be."""
    found = Found([CuflashGpu() if gpu else CuflashCpu()], [])
    for name in names:
        if gpu == (name == "numpy"):
            found.notes.append(f"{name}: runs {'without' if gpu else 'only with'} a GPU")
            continue
        for make in PEERS[name]:
            try:
                if name == "torch":
                    importlib.import_module("torch")
                found.implementations.append(make())
            except (ImportError, AttributeError, OSError, RuntimeError) as error:
                found.notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                if name == "torch":
                    break
    return found
