"""The peers of the bench compute what cuflash computes: their options and layouts, on stand-ins or on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from doubles.peers import (
    TORCH,
    EagerTorch,
    flash_attn_3,
    flash_attn_3_varlen,
    flash_attn_3_with_kvcache,
    flash_attn_4,
    flash_attn_4_varlen,
    module,
)

import cuflash
from cuflash import create_block_mask, mods
from cuflash.bench import report
from cuflash.bench.peers import PEERS, chosen, find
from cuflash.bench.peers.flash_attention import FlashAttention3, FlashAttention4
from cuflash.bench.peers.jax import JaxCudnn, JaxFlashAttention3
from cuflash.bench.peers.product import CupyProduct, Product, TorchProduct
from cuflash.bench.peers.torch import FlexAttention, Torch, TorchCpu, TorchSdpa, TorchVarlen
from cuflash.bench.timing import Runner, Timing
from cuflash.cases import calls, sets
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import Case
from cuflash.dtypes import BF16, FP32
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.problem import Blocks, Problem, Rotary

CAUSAL = Mask(right=0)
PLAIN = Problem("forward", FP32, 2, 4, 4, 70, 70, 16, 16, softmax_scale=0.3)
PACKED = replace(
    PLAIN, layout="varlen", batch=3, heads_kv=2, len_q=67, len_kv=80, total_q=100, total_kv=161, softmax_scale=0.2
)
PROBLEMS: dict[str, Problem] = {
    "plain": PLAIN,
    "causal": replace(PLAIN, mask=CAUSAL),
    "causal_wide": replace(PLAIN, mask=CAUSAL, len_kv=90),
    "gqa": replace(PLAIN, heads_kv=2, mask=CAUSAL),
    "window": replace(PLAIN, mask=Mask(left=20, right=0)),
    "window_both": replace(PLAIN, mask=Mask(left=20, right=7)),
    "softcap": replace(PLAIN, softcap=2.0),
    "alibi": replace(PLAIN, alibi=True),
    "bias": replace(PLAIN, bias=FP32, bias_broadcast=(True, False, False, False)),
    "bias_row": replace(PLAIN, bias=FP32, bias_broadcast=(False, True, True, False)),
    "varlen": PACKED,
    "varlen_causal": replace(PACKED, mask=CAUSAL),
    "varlen_window_alibi": replace(PACKED, mask=Mask(left=20, right=7), alibi=True),
    "all_scores": replace(PLAIN, softcap=2.0, alibi=True, bias=FP32, mask=Mask(left=20, right=7)),
}
CASES = {
    name: Case(name, None, problem, *(((28, 5, 67), (80, 11, 70)) if problem.layout == "varlen" else ()))
    for name, problem in PROBLEMS.items()
}
SLOPES = np.random.default_rng(0).standard_normal((4, 139)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 3, 70).astype(np.int32)
SCORE = mods.trace("score_mod", lambda s, b, h, q, k: 2.0 * mods.tanh(s / 2.0) + SLOPES[h, k - q + 69])
RULE = mods.trace("mask_mod", lambda b, h, q, k: (IDS[q] == IDS[k]) | (abs(q - k) < 3))
CASES["written"] = Case(
    "written",
    None,
    replace(PLAIN, score_mod=SCORE.mod, mask_mod=RULE.mod, captured_flat=(0, 1)),
    captured=(*SCORE.arrays, *RULE.arrays),
)
BLOCKS = create_block_mask(RULE, len_q=PLAIN.len_q, len_kv=PLAIN.len_kv, block_size=16) & (np.arange(70) % 32 < 20)
CASES["blocks"] = Case(
    "blocks", None, replace(PLAIN, block_mask=Blocks(BLOCKS.block_size, BLOCKS.rule.mod)), blocks=BLOCKS
)


@pytest.fixture
def installed(monkeypatch) -> Callable[..., None]:
    def install(name: str, **contents: object) -> None:
        monkeypatch.setitem(sys.modules, name, module(name, **contents))

    return install


def close(got: Any, case: Case, inputs: Any) -> None:
    np.testing.assert_allclose(got, calls.of(case, inputs)()[0], atol=1e-5)


@pytest.fixture
def fa3(installed) -> FlashAttention3:
    installed("flash_attn_interface", flash_attn_func=flash_attn_3, flash_attn_varlen_func=flash_attn_3_varlen)
    installed("flash_attn_config", CONFIG={"build_flags": {}})
    return FlashAttention3()


@pytest.mark.parametrize("name", ["causal_wide", "gqa", "window", "softcap", "varlen", "varlen_causal"])
def test_flash_attention_3_is_asked_for_the_case(fa3, name):
    case = CASES[name]
    inputs = make(case, Normals(np))
    assert fa3.why_not(case.problem) is None
    close(fa3.call(TORCH, case, inputs)(), case, inputs)


CACHED = {
    "few": replace(PLAIN, heads_kv=2, len_q=3, mask=CAUSAL),
    "attend": replace(PLAIN, layout="cache", heads_kv=2, len_q=3, total_kv=140, mask=CAUSAL),
    "append": replace(
        PLAIN, layout="cache", len_q=2, total_kv=140, mask=CAUSAL, appended=2, rotary=Rotary(8, False, FP32, False)
    ),
    "paged": replace(PACKED, total_q=10, len_q=5, page_size=16, total_kv=16 * 13, mask=CAUSAL, softcap=2.0),
}


@pytest.mark.parametrize("name", CACHED)
def test_flash_attention_3_has_a_function_of_its_own_for_caches(installed, name):
    installed("flash_attn_interface", flash_attn_with_kvcache=flash_attn_3_with_kvcache)
    installed("flash_attn_config", CONFIG={"build_flags": {}})
    lens = ((1, 4, 5), (80, 11, 70)) if CACHED[name].page_size else ()
    case = Case(name, None, CACHED[name], *lens)
    inputs = make(case, Normals(np))
    peer = FlashAttention3()
    assert peer.why_not(case.problem) is None
    close(peer.call(TORCH, case, inputs)(), case, inputs)


def test_flash_attention_3_says_what_its_build_left_out(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    installed("fa3_fwd_interface")
    flags = {"FLASHATTENTION_DISABLE_LOCAL": True, "FLASHATTENTION_DISABLE_BACKWARD": True}
    installed("fa3_fwd_config", CONFIG={"build_flags": flags | {"FLASHATTENTION_DISABLE_VARLEN": False}})
    peer = FlashAttention3()
    assert peer.why_not(PROBLEMS["window"]) == "no window"
    assert peer.why_not(CASES["causal"].turned("backward").problem) == "built without backward"
    assert peer.why_not(PROBLEMS["varlen_causal"]) is None
    assert peer.why_not(PROBLEMS["alibi"]) == "no alibi"
    top_left = replace(CAUSAL, alignment="top-left")
    assert peer.why_not(replace(PROBLEMS["causal_wide"], mask=top_left)) == "its masks are aligned bottom-right"


@pytest.fixture
def fa4(installed) -> FlashAttention4:
    functions = {"flash_attn_func": flash_attn_4, "flash_attn_varlen_func": flash_attn_4_varlen}
    installed("flash_attn", cute=module("flash_attn.cute", **functions))
    installed("flash_attn.cute", **functions)
    return FlashAttention4()


FOR_4: dict[str, Problem] = {
    name: replace(PROBLEMS[name], dtype=BF16)
    for name in ("plain", "causal_wide", "gqa", "window", "window_both", "softcap", "varlen", "varlen_causal")
} | {
    "window_left": replace(PLAIN, dtype=BF16, mask=Mask(left=20)),
    "window_right": replace(PLAIN, dtype=BF16, mask=Mask(right=7)),
    "wide": replace(PLAIN, dtype=BF16, dim_qk=192, dim_v=128, softmax_scale=0.1, mask=CAUSAL),
    "sink": replace(PLAIN, dtype=BF16, sink=True, mask=CAUSAL),
    "deterministic": replace(PLAIN, dtype=BF16, deterministic=True, mask=CAUSAL),
}


@pytest.mark.parametrize("name", FOR_4)
def test_flash_attention_4_is_asked_for_the_case(fa4, name):
    case = replace(CASES.get(name, CASES["plain"]), id=name, problem=FOR_4[name])
    inputs = make(case, Normals(np))
    for direction in ("forward", "backward"):
        assert fa4.why_not(case.turned(direction).problem) is None
    out, expected = fa4.call(TORCH, case, inputs)(), calls.of(case, inputs)()[0]
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


def test_flash_attention_4_knows_which_rows_are_used(fa4):
    case = replace(CASES["varlen"], problem=FOR_4["varlen"], seqused_q=(28, 3, 0), seqused_kv=(80, 0, 64))
    inputs = make(case, Normals(np))
    close(fa4.call(TORCH, case, inputs)().astype(np.float32), case, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["causal", "varlen_causal"])
def test_flash_attention_4_is_asked_for_gradients(installed, name):
    """By autograd, which gets dout and hands back what the package computes; all of it with one forward before."""
    torch = pytest.importorskip("torch", reason="its autograd is asked where torch is installed")
    case = CASES[name].turned("backward")
    inputs = make(case, Normals(np))
    forwards = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, options):
            forwards.append(options)
            ctx.arrays = [x.detach().numpy() for x in (q, k, v)]
            ctx.options = options
            function = cuflash.flash_attn_varlen_func if "cu_seqlens_q" in options else cuflash.flash_attn_func
            ctx.out, ctx.lse = function(*ctx.arrays, **options, return_lse=True)
            return torch.from_numpy(ctx.out), torch.from_numpy(ctx.lse)

        @staticmethod
        def backward(ctx, dout, dlse):
            gradients = cuflash.flash_attn_backward(dout.numpy(), *ctx.arrays, ctx.out, ctx.lse, **ctx.options)
            return *(torch.from_numpy(x) for x in gradients[:3]), None

    def flash_attn(q, k, v, **options):
        arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return Function.apply(q, k, v, arrays)

    installed("flash_attn")
    installed("flash_attn.cute", flash_attn_func=flash_attn, flash_attn_varlen_func=flash_attn)
    peer = FlashAttention4()
    call = peer.call(torch, case, inputs)
    for _ in range(2):
        gradients = peer.tensors(case, inputs, call())
        for gradient, expected in zip(gradients, calls.of(case, inputs)(), strict=True):
            np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-5)
    assert len(forwards) == 1


def test_flash_attention_4_says_what_it_lacks(fa4):
    plain = FOR_4["plain"]
    assert fa4.why_not(PLAIN) == "fp16 and bf16 only"
    assert fa4.why_not(replace(plain, dim_v=260)) == "head dimensions are multiples of 8 up to 256"
    assert fa4.why_not(replace(plain, dim_qk=36)) == "head dimensions are multiples of 8 up to 256"
    for name, change in {
        "alibi": {"alibi": True}, "bias": {"bias": BF16}, "dropout": {"dropout": "byte"},
        "boolean mask": {"mask": Mask(tensor=True)},
    }.items():  # fmt: skip
        assert fa4.why_not(replace(plain, **change)) == f"no {name}"
    top_left = replace(FOR_4["causal_wide"], mask=replace(CAUSAL, alignment="top-left"))
    assert fa4.why_not(top_left) == "its masks are aligned bottom-right"
    paged = replace(FOR_4["varlen"], page_size=16)
    assert fa4.why_not(paged) == "no paged"


@pytest.mark.parametrize("name", ["varlen", "varlen_causal"])
def test_torch_varlen_is_asked_for_the_case(installed, monkeypatch, name):
    def varlen_attn(q, k, v, *lengths, scale, window_size, enable_gqa=False):
        assert enable_gqa
        return cuflash.flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, window_size=window_size)

    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: module(name, varlen_attn=varlen_attn) if "torch" in name else real(name),
    )
    case = CASES[name]
    inputs = make(case, Normals(np))
    peer = TorchVarlen()
    assert peer.why_not(case.problem) is None
    assert peer.why_not(PROBLEMS["causal"]) == "packed sequences only"
    close(peer.call(TORCH, case, inputs)(), case, inputs)


@pytest.fixture
def jax(installed) -> None:
    def flash_mha(q, k, v, softmax_scale=None, is_causal=False, window_size=(-1, -1)):
        return cuflash.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=is_causal, window_size=window_size)

    def flash_mha_varlen(q, k, v, starts_q, starts_k, max_seqlen_q, max_seqlen_k, is_causal=False, **options):
        lengths = (starts_q, starts_k, max_seqlen_q, max_seqlen_k)
        return cuflash.flash_attn_varlen_func(q, k, v, *lengths, causal=is_causal, **options)

    def dot_product_attention(q, k, v, bias, *, scale, is_causal, implementation, local_window_size=(-1, -1)):
        assert implementation == "cudnn"
        options = {"softmax_scale": scale, "causal": is_causal, "window_size": local_window_size}
        return cuflash.flash_attn_func(q, k, v, attn_bias=bias, **options)

    contents: dict[str, object] = {
        "default_backend": lambda: "gpu",
        "dlpack": SimpleNamespace(from_dlpack=lambda x: x),
        "nn": SimpleNamespace(dot_product_attention=dot_product_attention),
    }
    installed("jax", **contents)
    installed("flash_attn3_jax", flash_mha=flash_mha, flash_mha_varlen=flash_mha_varlen)


@pytest.mark.parametrize(
    ("make_peer", "names"),
    [
        (JaxCudnn, ["plain", "causal", "gqa", "window", "bias"]),
        (JaxFlashAttention3, ["causal_wide", "gqa", "window", "window_both", "varlen", "varlen_causal"]),
    ],
)
def test_jax_is_asked_for_the_case(jax, make_peer, names):
    peer = make_peer()
    for name in names:
        case = CASES[name]
        inputs = make(case, Normals(np))
        assert peer.why_not(case.problem) is None
        tensors = [x for x in (inputs.q, inputs.k, inputs.v, inputs.bias) if x is not None]
        close(peer.function(case.problem, inputs)(*tensors), case, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("make_peer", [FlexAttention, lambda: TorchSdpa("efficient"), lambda: TorchSdpa("cudnn")])
def test_torch_computes_the_case(make_peer: Callable[[], Torch], name):
    pytest.importorskip("torch", reason="torch's own functions are asked where torch is installed")
    peer, case = make_peer(), CASES[name]
    if isinstance(peer, TorchSdpa) and peer.why_not(case.problem):
        return  # what SDPA takes is on record below
    inputs = make(case, Normals(np))
    assert peer.why_not(case.problem) is None
    [out] = peer.tensors(case, inputs, peer.call(EagerTorch(), case, inputs)())
    assert out.shape == inputs.dout.shape
    close(out.numpy(), case, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gqa", "bias", "bias_row"])
def test_torch_computes_the_gradients_that_the_case_asks_for(name):
    pytest.importorskip("torch", reason="torch's own functions are asked where torch is installed")
    case = CASES[name]
    case = replace(case, problem=replace(case.problem, direction="backward", bias_grad=case.problem.bias is not None))
    inputs = make(case, Normals(np))
    peer = TorchSdpa("efficient")
    results = peer.call(EagerTorch(), case, inputs)()
    grads = [*peer.tensors(case, inputs, results), *results[3:]]
    for grad, expected in zip(grads, calls.of(case, inputs)(), strict=True):
        np.testing.assert_allclose(grad.numpy(), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", sets.cpu()[::3], ids=lambda case: case.id)
def test_torch_computes_the_same_on_the_cpu(case, direction):
    pytest.importorskip("torch", reason="torch's own function is asked where torch is installed")
    case = case.turned(direction)
    inputs = make(case, Normals(np))
    runner = TorchCpu().prepare(case, inputs)
    with runner.scope():
        tensors = runner.tensors(runner.launch())
    assert len(tensors) == (3 if direction == "backward" else 1)
    for x, expected in zip(tensors, calls.of(case, inputs)(), strict=False):
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-4)


@pytest.fixture
def everything_installed(jax, fa3, fa4, installed) -> None:
    contents = {"varlen_attn": None, "SDPBackend": None}
    for name in ("torch", "torch.nn", "torch.nn.attention", "torch.nn.attention.varlen"):
        installed(name, **contents)
    installed("torch.nn.attention.flex_attention")


NOT_ON_GPUS_UNLESS_NAMED = ["numpy-naive", "torch-cpu", "cuflash-jax", "cuflash-torch"]
ALL_BUT_PACKED = ["torch-flash", "torch-efficient", "torch-cudnn", "fa3", "fa4", "flex", "jax-cudnn", "jax-fa3", "gemm"]


@pytest.mark.parametrize(
    ("name", "takers"),
    [
        ("gqa-d128-causal-s2048", ALL_BUT_PACKED),
        ("window1024-d128-s8192", ["fa3", "fa4", "flex", "jax-cudnn", "jax-fa3", "gemm"]),
        ("varlen-d128-causal", ["torch-varlen", "fa3", "fa4", "flex", "jax-fa3", "gemm"]),
        ("softcap30-d128-s8192", ["fa3", "fa4", "flex", "gemm"]),
        ("alibi-d128-s8192", ["flex", "gemm"]),
        ("bias-d64-s4096", ["torch-efficient", "torch-cudnn", "flex", "jax-cudnn", "gemm"]),
        ("dropout0.1-d128-s8192", ["torch-flash", "torch-efficient", "torch-cudnn", "gemm"]),
        ("ramp16-d128-s8192", ALL_BUT_PACKED),
        ("documents16-d64", ["flex", "gemm", "built-in"]),
        ("decode-b1-s4k", [*ALL_BUT_PACKED, "read"]),
    ],
)
def test_who_takes_part(everything_installed, name, takers):
    peers = find(chosen(None, gpu=True), gpu=True)
    assert peers.notes == []
    assert [peer.name for peer in peers.implementations] == [
        "cuflash",
        *(n for n in PEERS if n not in NOT_ON_GPUS_UNLESS_NAMED),
    ]
    known = [case for kind in ("hopper", "mods", "decode") for cases in sets.of(kind).values() for case in cases]
    case = next(case for case in known if case.id == name)
    problem = case.turned("forward").problem
    assert [peer.name for peer in peers.implementations[1:] if peer.why_not(problem) is None] == takers


def test_jax_takes_gradients_of_what_the_case_asks_for(jax, monkeypatch):
    """The pullback gets every array as an argument: what a jitted function merely captures becomes part of its code."""
    case = replace(CASES["bias"], problem=replace(PROBLEMS["bias"], direction="backward"))
    inputs = make(case, Normals(np))
    jitted: list[tuple[object, ...]] = []

    def jit(function):
        return lambda *arguments: jitted.append(arguments) or function(*arguments)

    def vjp(function, *leaves):
        out = function(*leaves)
        return out, lambda dout: (out, dout, leaves)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(get_current_stream=NullStream)))
    fake = sys.modules["jax"]
    fake.jit, fake.vjp, fake.block_until_ready = jit, vjp, lambda x: x
    for bias_grad, leaves in ((False, 3), (True, 4)):
        wanted = replace(case, problem=replace(case.problem, bias_grad=bias_grad))
        JaxCudnn().prepare(wanted, inputs)
        (given, rest), (pullback, dout) = jitted[-2:]
        assert (len(given), len(rest)) == (leaves, 4 - leaves)
        out, seen, _ = pullback(dout)
        assert seen is inputs.dout
        close(out, case.turned("forward"), inputs)


def test_what_jax_returns_is_widened(jax, monkeypatch):
    case = replace(CASES["causal"], problem=replace(PROBLEMS["causal"], dtype=BF16))
    inputs = make(case, Normals(np))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(get_current_stream=NullStream)))
    fake = sys.modules["jax"]
    fake.jit, fake.block_until_ready = lambda function: function, lambda x: x
    runner = JaxCudnn().prepare(case, inputs)
    [out] = runner.tensors(runner.call())
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, calls.of(case, inputs)()[0].astype(np.float32))


class NullStream:
    def synchronize(self) -> None:
        pass


def test_sdpa_takes_one_mask_at_a_time(everything_installed):
    both = replace(PROBLEMS["bias"], mask=CAUSAL)
    assert TorchSdpa("efficient").why_not(both) == "one of causal mask, boolean mask and bias at a time"
    assert TorchSdpa("flash").why_not(PROBLEMS["bias"]) == "no bias"


def test_peers_are_named_one_by_one_or_by_their_framework():
    assert chosen("fa3, jax", gpu=True) == ["fa3", "jax-cudnn", "jax-fa3"]
    assert chosen("fa4", gpu=True) == ["fa4"]
    assert chosen("torch-cudnn,gemm", gpu=True) == ["torch-cudnn", "gemm"]
    assert chosen("numpy", gpu=False) == ["numpy-naive"]
    on_cpu = ["numpy-naive", "torch-cpu"]
    assert chosen(None, gpu=False) == on_cpu and not set(on_cpu) & set(chosen(None, gpu=True))
    assert chosen("", gpu=True) == []
    with pytest.raises(InvalidArgument, match="--peers names 'torc'"):
        chosen("torc", gpu=True)


@pytest.mark.parametrize("make_product", [TorchProduct, CupyProduct])
def test_a_row_of_the_product_tells_its_own_rate(everything_installed, installed, make_product: Callable[[], Product]):
    installed("cupy", cuda=SimpleNamespace(cublas="loaded"))
    product = make_product()
    assert product.why_not(replace(PLAIN, dtype=BF16)) is None
    assert product.why_not(PLAIN) == "no yardstick for fp32 and fp64"
    runner = product.of_product(Runner(product.name, product.family, print, print, "events", print))
    row = report.row(CASES["plain"], runner, Timing(gpu_us=1400.0, host_us=1.0))
    assert runner.tensors is None
    assert row.tflops == pytest.approx(2 * 8192**3 / 1400e-6 * 1e-12, rel=1e-3)
    assert row.gbps == pytest.approx(3 * 8192**2 * 2 / 1400e-6 * 1e-9, rel=1e-3)


def test_a_product_without_cublas_is_noted(installed, monkeypatch):
    class Cuda:
        @property
        def cublas(self) -> object:
            raise ImportError("libcublas.so is not here")

    monkeypatch.setitem(sys.modules, "torch", None)
    installed("cupy", cuda=Cuda())
    assert find(["gemm"], gpu=True).notes == ["gemm: ImportError: libcublas.so is not here"]


def test_the_product_is_the_product(everything_installed):
    product = TorchProduct()
    product._factors = [np.arange(4.0).reshape(2, 2), np.ones((2, 2))]
    np.testing.assert_array_equal(product.call(TORCH, CASES["plain"], None)(), [[1, 1], [5, 5]])


@pytest.mark.parametrize(("captures", "family"), [(True, "flash"), (False, "flash, eager")])
def test_a_row_says_whether_its_launches_were_captured(monkeypatch, installed, captures: bool, family: str) -> None:
    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    cuda = SimpleNamespace(
        ExternalStream=lambda ptr: stream,
        stream=lambda _: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: "replayed"),
        graph=graph,
        synchronize=lambda: None,
    )
    installed("torch", cuda=cuda)
    installed("cupy", cuda=SimpleNamespace(get_current_stream=lambda: stream))
    peer = Torch()
    peer.name, peer.family = "torch-flash", "flash"
    monkeypatch.setattr(peer, "scope", lambda torch: nullcontext())
    monkeypatch.setattr(peer, "call", lambda *_: lambda: "called")
    runner = peer.prepare(CASES["plain"], None)
    assert (runner.family, runner.launch()) == (family, "replayed" if captures else "called")
