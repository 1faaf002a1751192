"""Written scores and masks on a GPU: what is printed, every family against the oracle, and what calls promise."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import oracle
import pytest
from host.cases import CAUSAL, HostCase, Tensors, dense, exact_and_naive, packed
from inputs import BF16, FP16, random
from written import (
    NUM_PLACES,
    NUM_SOURCES,
    Written,
    alibi,
    check_printed,
    composed,
    documents,
    far_documents,
    prefix,
    scaled,
    soft_cap,
    table,
    unit,
)  # fmt: skip

import cuflash
from cuflash import jit, mods, ops
from cuflash.errors import InvalidArgument
from cuflash.mods import Traced
from cuflash.ops.written import with_mods
from cuflash.verify.surroundings import Arena

pytestmark = pytest.mark.gpu

HOPPER = "sm90", "sm80"
"""The families that share a Hopper GPU: the second takes what the first leaves."""


def test_what_is_printed_computes_what_numpy_does(cp: Any) -> None:
    flags = ("--std=c++17", "-ftz=true", "-prec-div=false", f"-I{jit.sources.root()}")
    library = cp.RawModule(code=unit('extern "C" __global__'), options=flags)

    def run(name: str, *arrays: Any) -> None:
        library.get_function(name)((1,), (1,), (*arrays, np.int32(NUM_PLACES)))

    for number in range(NUM_SOURCES):
        for real in (np.float32, np.float64):
            check_printed(number, real, run, cp.asarray, cp.asnumpy)


Row = tuple[Any, HostCase, Callable[..., Written]]
"""The families that may answer, a case, and what is written."""

LENS = (190, 0, 33, 70), (250, 20, 40, 300)
ROWS: list[Row] = [
    ("simt", dense("fp32", (4, 2), (170, 190), (40, 24), batch=2), composed),
    ("simt", packed("fp64", (2, 1), *LENS, (24, 24), tail=5, mask=CAUSAL), table),
    ("simt", packed("fp32", (4, 2), *LENS, (64, 64), tail=5, mask=CAUSAL), composed),
    ("simt", dense("fp32", (4, 2), (3, 900), (32, 32), num_splits=3), prefix),
    ("simt", dense("fp64", (2, 1), (140, 150), (24, 24)), scaled),
    ("simt", dense("fp32", (2, 1), (140, 150), (128, 128), bias_axes="hk"), soft_cap),
    ("simt", dense("fp16", (2, 1), (140, 150), (256, 256)), far_documents),
    ("sm80", dense("fp32", (4, 2), (170, 250), (64, 64), batch=2), table),
    ("sm80", packed("fp32", (4, 2), *LENS, (128, 128), tail=5, mask=CAUSAL), composed),
    ("sm80", dense("bf16", (4, 2), (170, 250), (64, 64), batch=2, softcap=1.0), table),
    ("sm80", packed("fp16", (4, 2), *LENS, (64, 64), tail=5, mask=CAUSAL), composed),
    ("sm80", packed("bf16", (4, 2), *LENS, (128, 128), tail=5, mask=CAUSAL), table),
    ("sm80", dense("bf16", (8, 2), (3, 5000), (64, 64), num_splits=0), prefix),
    ("sm80", dense("bf16", (6, 2), (5, 5000), (128, 128), num_splits=0), alibi),
    ("sm80", dense("bf16", (6, 2), (40, 900), (64, 64), num_splits=3), table),
    ("sm80", dense("bf16", (2, 1), (170, 250), (64, 64), batch=2), far_documents),
    ("sm80", dense("bf16", (2, 2), (170, 250), (136, 136)), table),
    ("sm80", dense("bf16", (2, 2), (170, 250), (256, 192)), composed),
    ("sm80", dense("bf16", (2, 2), (50, 61), (32, 32), batch=140, mask=CAUSAL), table),
    ("sm80", dense("bf16", (2, 2), (50, 61), (32, 32), batch=140, bias_axes="hqk"), soft_cap),
    ("sm80", dense("bf16", (2, 2), (170, 170), (64, 64), dropout="byte", softcap=2.0), alibi),
    ("sm80", dense("bf16", (2, 1), (170, 250), (64, 64)), scaled),
    ("sm80", dense("bf16", (2, 1), (170, 250), (64, 64), alibi_axes="h", bias_axes="bhqk"), soft_cap),
    ("sm80", dense("bf16", (2, 1), (170, 250), (96, 96), deterministic=True), prefix),
    ("sm90", dense("bf16", (4, 2), (300, 400), (64, 64)), composed),
    ("sm90", dense("bf16", (4, 2), (1000, 1100), (64, 64), mask=CAUSAL), alibi),
    ("sm90", dense("bf16", (4, 2), (1000, 1100), (128, 128)), soft_cap),
    ("sm90", packed("bf16", (4, 2), *LENS, (128, 128), tail=5, mask=CAUSAL), alibi),
    ("sm90", packed("bf16", (4, 2), *LENS, (64, 64), tail=5, mask=CAUSAL), composed),
    ("sm90", dense("fp16", (2, 1), (300, 400), (128, 128)), far_documents),
    ("sm90", dense("bf16", (2, 1), (300, 400), (128, 128), deterministic=True), prefix),
    ("sm90", dense("bf16", (2, 1), (300, 400), (64, 64), deterministic=True), documents),
    ("sm90", dense("bf16", (4, 2), (300, 400), (64, 64), batch=2, mask=CAUSAL), table),
    ("sm90", packed("bf16", (4, 2), *LENS, (128, 128), tail=5), table),
    (HOPPER, dense("bf16", (2, 2), (100, 120), (32, 32), batch=140, mask=CAUSAL), composed),
    ("sm90", dense("bf16", (2, 1), (300, 400), (256, 256)), documents),
    ("sm90", dense("bf16", (2, 1), (300, 400), (192, 128)), prefix),
    ("sm90", dense("bf16", (2, 1), (300, 400), (128, 128), dropout="byte", alibi_axes="h"), composed),
    ("sm90", dense("bf16", (2, 1), (300, 400), (64, 64), bias_axes="hqk", bias_boxes=True), soft_cap),
    ("simt", dense("fp32", (4, 2), (170, 190), (40, 24), batch=2, deterministic=True), composed),
    ("simt", dense("fp64", (2, 1), (140, 150), (24, 24), deterministic=True), scaled),
    ("sm80", packed("bf16", (4, 2), *LENS, (128, 128), tail=5, mask=CAUSAL, deterministic=True), table),
    ("sm80", dense("bf16", (2, 2), (50, 61), (32, 32), batch=140, mask=CAUSAL, deterministic=True), table),
    ("sm80", dense("bf16", (2, 1), (170, 250), (64, 64), deterministic=True), scaled),
    ("sm90", dense("bf16", (4, 2), (300, 400), (64, 64), batch=2, mask=CAUSAL, deterministic=True), table),
    ("sm90", packed("bf16", (4, 2), *LENS, (128, 128), tail=5, deterministic=True), table),
    (HOPPER, dense("bf16", (4, 2), (300, 400), (128, 128)), table),
    (HOPPER, dense("bf16", (2, 1), (300, 400), (192, 192)), soft_cap),
]


def name_of(row: Row) -> str:
    family, case, make = row
    return f"{'-'.join([family] if isinstance(family, str) else family)}-{case.problem}-{make.__name__}".replace(
        " ", "-"
    )


def strided(cp: Any, x: np.ndarray) -> Any:
    """A copy in every other element of memory, the last axis backwards."""
    if x.ndim == 0:
        return cp.asarray(x)
    room = cp.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::-2]
    room[...] = cp.asarray(np.ascontiguousarray(x))
    return room


class Call:
    """A case on the GPU, its tensors between NaNs."""

    def __init__(self, cp: Any, family: Any, case: HostCase, make: Callable[..., Written]) -> None:
        self.case, self.written = case, make(case, np.random.default_rng(11))
        self.learns = self.written.learned is not None
        problem, self.tensors = case.problem, Tensors(case)
        for name in ("q", "k", "v", "dout", "dlse"):
            self.tensors.random(name)
        self.tensors.options |= self.written.options
        self.exact, self.naive = exact_and_naive(self.tensors, "dout", "dlse")
        self.arena, given = Arena(cp, 2**27), {}
        for turn, name in enumerate(self.tensors.arrays):
            x = self.tensors.arrays[name]
            tensor = name in ("q", "k", "v", "dout")
            unit = problem.copy_bytes if tensor or problem.bias_boxes else x.itemsize
            place = self.arena.cut(name, x.shape, x.dtype, unit, turn % 4 if tensor else None)
            place[...] = cp.asarray(np.ascontiguousarray(x))
            given[name] = place
        self.upstream = {name: given.pop(name) for name in ("dout", "dlse")}
        traced = {
            name: None if function is None else Traced(mod, tuple(strided(cp, x) for x in arrays))
            for name, function in (("score_mod", self.written.score), ("mask_mod", self.written.mask))
            for mod, arrays in [mods.trace(name, function) if function is not None else (None, ())]
        }
        self.drawn = tuple(map(int, cp.asnumpy(given.pop("rng_state")))) if problem.dropout else None
        sides = (problem.mask.left, problem.mask.right)
        varlen = problem.layout == "varlen"
        options = ops.asked(
            softmax_scale=problem.softmax_scale, window_size=tuple(-1 if x is None else x for x in sides),
            softcap=problem.softcap, dropout_p=case.dropout_p, num_splits=problem.num_splits, family=family,
            max_seqlen_q=problem.len_q if varlen else None, max_seqlen_k=problem.len_kv if varlen else None,
        )  # fmt: skip
        self.options, self.arrays = with_mods(options, ops.Arrays(**given), **traced)

    def forward(self) -> tuple[Any, ...]:
        """(out, lse, row_state), and what was drawn."""
        problem = self.case.problem
        place = self.arena.cut("out", self.tensors.shapes["out"], problem.dtype.numpy, problem.copy_bytes, 1)
        before = self.arena.snapshot()
        results = ops.forward(self.options.replace(keep_state=True), self.arrays._replace(out=place), self.drawn)
        copies = tuple(x.copy() for x in results)
        assert self.arena.change(before, [place]) == ""
        return copies

    def backward(self, out: Any, lse: Any, row_state: Any, *drawn: Any) -> tuple[Any, ...]:
        """dq, dk, dv, and what else there is."""
        problem = self.case.problem
        places = [
            self.arena.cut(f"d{name}", self.tensors.shapes[name], problem.dtype.numpy, problem.copy_bytes, turn)
            for turn, name in enumerate(("q", "k", "v"))
        ]
        options = self.options.replace(
            num_splits=0, deterministic=problem.deterministic, captured_grad=self.learns,
            bias_grad=problem.bias is not None,
        )  # fmt: skip
        arrays = self.arrays._replace(**self.upstream, out=out, lse=lse, row_state=row_state)
        arrays = arrays._replace(**dict(zip(("dq", "dk", "dv"), places, strict=True)))
        before = self.arena.snapshot()
        gradients = ops.backward(options, arrays._replace(rng_state=drawn[0] if drawn else None))
        computed = [*gradients[:3], *(x for x in gradients[3:5] if x is not None)]
        computed += gradients.dcaptured if self.learns else []
        copies = tuple(x.copy() for x in computed)
        assert self.arena.change(before, places) == ""
        return copies


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_kernels_compute_what_is_written(cp: Any, row: Row) -> None:
    call = Call(cp, *row)
    results = call.forward()
    for name, x in zip(("out", "lse"), results, strict=False):
        oracle.assert_close(cp.asnumpy(x), getattr(call.exact, name), getattr(call.naive, name), name)
    gradients = [cp.asnumpy(x) for x in call.backward(*results)]
    names = ["dq", "dk", "dv"] + ["dbias"] * (call.case.problem.bias is not None)
    for name, x in zip(names, gradients, strict=False):
        addends = call.case.problem.dtype.numpy if name == "dbias" else None
        oracle.assert_close(x, getattr(call.exact, name), getattr(call.naive, name), name, addends)
    if call.learns:
        assert call.written.learned is not None
        q = call.tensors.arrays["q"].astype(np.float64)
        (exact,), (naive,) = (call.written.learned(x, q) for x in (call.exact, call.naive))
        if exact.size:  # added one by one, where NumPy adds by pairs, and in fp64 what it adds is exact
            units = 1e-13 if gradients[-1].dtype == np.float64 else 1e-5
            naive = exact + np.maximum(np.abs(naive - exact), units * np.abs(exact).max())
        oracle.assert_close(gradients[-1], exact, naive, "dcaptured0", call.case.problem.dtype.numpy)

    counted = len(gradients) if call.case.problem.deterministic else len(names) if row[0] == "simt" else 0
    for _ in range(4):
        assert [x.tobytes() for x in call.forward()[:2]] == [x.tobytes() for x in results[:2]]
        again = call.backward(*results)
        assert [x.tobytes() for x in again[:counted]] == [x.tobytes() for x in gradients[:counted]]


READY: dict[str, Callable[[Any], dict[str, Any]]] = {
    "alibi": lambda put: {"score_mod": mods.alibi(put(random(4, dtype=np.float32)), 50)},
    "softcap": lambda put: {"score_mod": mods.softcap(2.5)},
    "relative_bias": lambda put: {"score_mod": mods.relative_bias(put(random(4, 129, dtype=np.float32)))},
    "t5_bias": lambda put: {"score_mod": mods.t5_bias(put(random(32, 4, dtype=np.float32)), True, 128)},
    "distance_decay": lambda put: {"score_mod": mods.distance_decay(put(np.array([0.9, 0.99, 0.5, 1], np.float32)))},
    "causal": lambda put: {"mask_mod": mods.causal(50)},
    "sliding_window": lambda put: {"mask_mod": mods.sliding_window(40, 7)},
    "dilated_window": lambda put: {"mask_mod": mods.dilated_window(48, 0, 3)},
    "block_window": lambda put: {"mask_mod": mods.block_window(32, 1)},
    "prefix_lm": lambda put: {"mask_mod": mods.prefix_lm(put(np.array([70, 10], np.int32)))},
    "document": lambda put: {"mask_mod": mods.document(put(np.arange(350) // 60))},
}  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_ready_ones_as_numpy_has_them(cp: Any, name: str) -> None:
    """Forward and gradients in bf16, on Hopper by its own kernels, with their numbers on either side."""
    q, dout = (random(2, 300, 4, 64, dtype=BF16, seed=seed) for seed in (0, 1))
    k, v = (random(2, 350, 4, 64, dtype=BF16, seed=seed) for seed in (2, 3))
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    out, pullback = cuflash.flash_attn_vjp(*wide[:3], **READY[name](np.asarray))
    expected = [out, *pullback(wide[3])[:3]]
    for put in (cp.asarray, np.asarray):
        out, pullback = cuflash.flash_attn_vjp(*map(cp.asarray, (q, k, v)), **READY[name](put))
        for got, want in zip([out, *pullback(cp.asarray(dout))[:3]], expected, strict=True):
            error = np.abs(cp.asnumpy(got).astype(np.float64) - want).max()
            assert error < 0.02 * np.abs(want).max(), error


def test_new_numbers_compile_nothing(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q = cp.asarray(random(1, 100, 2, 64))
    factor = cp.asarray(np.float32(1))

    def call() -> Any:
        return cuflash.flash_attn_func(q, q, q, score_mod=lambda s, b, h, q, k: s * factor)

    first = call()
    plain = cuflash.flash_attn_func(q, q, q).get()
    np.testing.assert_allclose(cp.asnumpy(first).astype(float), plain.astype(float), atol=2e-3)
    monkeypatch.setattr(jit.kernel, "compile_together", None)
    factor[...] = 3
    changed = call().get()
    factor = cp.asarray(np.float32(3))
    np.testing.assert_array_equal(call().get(), changed)
    scaled_up = cuflash.flash_attn_func(q, q, q, softmax_scale=3 * 64**-0.5).get()
    np.testing.assert_allclose(changed.astype(float), scaled_up.astype(float), atol=2e-3)


def test_graphs_read_what_arrays_hold(cp: Any) -> None:
    q = cp.asarray(random(1, 100, 2, 64))
    factor = cp.asarray(np.float32(2))
    on_host = np.array(2, np.float32)
    mod, host_mod = (lambda s, b, h, q, k: s * factor), (lambda s, b, h, q, k: s * on_host)
    cuflash.flash_attn_func(q, q, q, score_mod=mod)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out = cuflash.flash_attn_func(q, q, q, score_mod=mod)
        with pytest.raises(InvalidArgument, match="captured0 of score_mod is in host memory"):
            cuflash.flash_attn_func(q, q, q, score_mod=host_mod)
        graph = stream.end_capture()
        factor[...] = -1
        graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(cp.asnumpy(out), cuflash.flash_attn_func(q, q, q, score_mod=mod).get())


def test_sums_of_many_pairs(cp: Any) -> None:
    """Blocks that add to the same few numbers lose nothing."""
    q, k, v, dout = (cp.asarray(random(2, 1500, 4, 64, dtype=FP16, seed=seed)) for seed in range(4))
    shift = random(4, 33, dtype=np.float32)
    written = {"captured_grad": True}
    _, pullback = cuflash.flash_attn_vjp(q, k, v, score_mod=mods.relative_bias(cp.asarray(shift)), **written)
    (got,) = pullback(dout).dcaptured
    host = [cp.asnumpy(x).astype(np.float64) for x in (q, k, v, dout)]
    _, pullback = cuflash.flash_attn_vjp(*host[:3], score_mod=mods.relative_bias(shift), **written)
    (want,) = pullback(host[3]).dcaptured
    assert np.abs(cp.asnumpy(got) - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.skipif(find_spec("torch") is None, reason="no torch")
def test_torch_tensors_learn(cp: Any) -> None:
    """By autograd, in any type, and as PyTorch's own function takes them."""
    import torch

    arrays = [random(2, 4, 300, 64, dtype=np.float32, seed=seed) for seed in range(4)]
    numbers = random(4, 129, dtype=np.float32)

    def gradients(dtype: Any, device: str) -> list[np.ndarray]:
        q, k, v, dout = (torch.tensor(x, device=device, dtype=dtype) for x in arrays)
        learned = torch.tensor(numbers, device=device, requires_grad=True)
        ids = torch.arange(300, device=device) // 70
        for x in (q, k, v):
            x.requires_grad_()
        out = cuflash.flex_attention(
            q, k, v, lambda s, b, h, q, k: s + learned[h, q - k + 64],
            mask_mod=lambda b, h, q, k: ids[q] >= ids[k],
        )  # fmt: skip
        out.backward(dout)
        return [x.detach().cpu().double().numpy() for x in (out, q.grad, k.grad, v.grad, learned.grad)]

    for got, want in zip(gradients(torch.bfloat16, "cuda"), gradients(torch.float64, "cpu"), strict=True):
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


@pytest.mark.skipif(find_spec("jax") is None, reason="no jax")
def test_jax_arrays(cp: Any) -> None:
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    q = random(1, 300, 2, 64)
    slopes = np.array([0.5, 0.1], np.float32)
    x, held = jax.numpy.asarray(q), jax.numpy.asarray(slopes)
    want = cuflash.flash_attn_func(*[cp.asarray(q)] * 3, score_mod=mods.alibi(cp.asarray(slopes)))
    for put in (held, slopes):
        got = cuflash.flash_attn_func(x, x, x, score_mod=mods.alibi(put))
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(np.asarray(got), cp.asnumpy(want))

    def attend(x: Any, held: Any) -> Any:
        return cuflash.flash_attn_func(x, x, x, score_mod=mods.alibi(held))

    np.testing.assert_array_equal(np.asarray(jax.jit(attend)(x, held)), cp.asnumpy(want))
    wide, host = jax.numpy.asarray(q, np.float32), q.astype(np.float64)
    learned = jax.jit(jax.grad(lambda held: attend(wide, held).sum()))(held)
    _, pullback = cuflash.flash_attn_vjp(host, host, host, score_mod=mods.alibi(slopes), captured_grad=True)
    np.testing.assert_allclose(np.asarray(learned), pullback(np.ones_like(host)).dcaptured[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (FP16, 128), (np.float32, 64), (np.float64, 40)])
def test_tangents(cp: Any, dtype: Any, dim: int) -> None:
    """Along all of q, k and v, through the slope of the score and past what is hidden."""
    arrays = [random(2, n, 4, dim, dtype=dtype, seed=seed) for seed, n in enumerate((300, 350, 350) * 2)]
    numbers = random(4, 129, dtype=np.float32)

    def tangents(put: Any, *given: Any) -> Any:
        held, reach = put(numbers), 64
        return cuflash.flash_attn_jvp(
            *given, causal=True, mask_mod=mods.sliding_window(90, 7, 50),
            score_mod=lambda s, b, h, q, k: mods.where(k % 7 == 3, -np.inf, 2 * mods.tanh(s) + held[h, k - q + reach]),
        )  # fmt: skip

    results = tangents(cp.asarray, *map(cp.asarray, arrays))
    expected = tangents(np.asarray, *(x.astype(np.float64) for x in arrays))
    part = {2: 0.03, 4: 1e-4, 8: 1e-11}[np.dtype(dtype).itemsize]
    for got, want in zip(results, expected, strict=True):
        got, seen = cp.asnumpy(got).astype(np.float64), np.isfinite(want)
        assert np.abs(got[seen] - want[seen]).max() < part * np.abs(want[seen]).max()
        np.testing.assert_array_equal(got[~seen], want[~seen])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_sums_are_the_same_bits(cp: Any, dim: int) -> None:
    """Of many blocks on few numbers, in turn and in a graph, which is cleared before every replay."""
    q, k, v, dout = (cp.asarray(random(2, 1500, 4, dim, dtype=BF16, seed=seed)) for seed in range(4))
    numbers = cp.asarray(random(4, 33, dtype=np.float32))
    written = {"score_mod": mods.relative_bias(numbers), "captured_grad": True}
    _, pullback = cuflash.flash_attn_vjp(q, k, v, **written, deterministic=True)
    first = pullback(dout)
    (loose,) = cuflash.flash_attn_vjp(q, k, v, **written)[1](dout).dcaptured
    (exact,) = first.dcaptured
    assert cp.abs(exact - loose).max() < 1e-4 * cp.abs(loose).max()
    for _ in range(10):
        again = pullback(dout)
        for x, y in zip((*first[:3], *first.dcaptured), (*again[:3], *again.dcaptured), strict=True):
            assert (x.view(np.uint8) == y.view(np.uint8)).all()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        replayed = pullback(dout)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
    stream.synchronize()
    assert (replayed.dcaptured[0] == exact).all()
