"""What errors are compared with and how the bench tells of them: everything of it that needs no GPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from click.testing import CliRunner

from cuflash import dtypes
from cuflash.bench import report
from cuflash.bench.exactness import Exactness, steps
from cuflash.bench.peers import CuflashCpu, NumpyNaive
from cuflash.bench.timing import Runner
from cuflash.cases import sets
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import Case
from cuflash.cli import app
from cuflash.device import named
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.verify.deviations import Deviation, cells, ideal, rms, rounding
from cuflash.verify.flash import Flash
from cuflash.verify.naive import Extras, visible

CASES = {case.id: case for case in sets.exactness()}


def small(case_id: str, len_q: int = 40, len_kv: int = 40) -> Case:
    """A case of the table with fewer rows."""
    case = CASES[case_id]
    problem, built_in = (x and replace(x, len_q=len_q, len_kv=len_kv) for x in (case.problem, case.built_in))
    return replace(case, problem=problem, built_in=built_in)


@pytest.mark.parametrize(
    "case_id", ["bf16-d64-causal-x3", "fp16-d128-x10", "bf16-d128-gqa-x1", "bf16-d128-sink-x3", "fp16-d64-dropout-x1",
                "fp16-d64-dropout_word-x3", "bf16-alibi-d64-written-x3", "bf16-softcap30-d128-written-x10"]
)  # fmt: skip
def test_the_exact_answer_is_that_of_the_oracle(case_id):
    case = small(case_id, 40, 70).turned("backward")
    problem = case.built_in or case.problem
    inputs = make(case, Normals(np))
    expected = oracle.attention(
        inputs.q, inputs.k, inputs.v, inputs.dout, causal=problem.mask.right == 0, sink=inputs.sink,
        softcap=problem.softcap, alibi_slopes=inputs.captured[0] if problem.alibi else None,
        dropout_p=case.dropout_p, dropout_scheme=problem.dropout or "byte", rng_state=inputs.rng_state or (0, 0),
    )  # fmt: skip
    answers = ideal(case, inputs, np)[0] | ideal(case.turned("forward"), inputs, np)[0]
    assert list(answers) == ["dq", "dk", "dv", "out"]
    for name, x in answers.items():
        np.testing.assert_allclose(x, getattr(expected, name), rtol=1e-9, atol=1e-11)


def test_the_model_without_roundings_is_attention():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal(shape) for shape in [(9, 4, 8), (13, 2, 8), (13, 2, 5), (9, 4, 5)])
    dlse, sink = rng.standard_normal((4, 9)), rng.standard_normal(4)
    kept = np.array([oracle.flash_keep(3, 8, 0.3, 0, h, 4, np.arange(9)[:, None], np.arange(13)) for h in range(4)])
    exact = oracle.attention(
        q[None], k[None], v[None], dout[None], dlse[None],
        scale=0.3, softcap=1.5, window=(-1, 1), sink=sink, dropout_p=0.3, rng_state=(3, 8),
    )  # fmt: skip
    model, keep, extras = Flash(dtypes.FP64, 0.3, 1.5), visible(Mask(right=1), 9, 13), Extras(None, sink, kept / 0.7)
    q, k, v, dout = (x.swapaxes(0, 1) for x in (q, k, v, dout))
    out, lse = model.forward(q, k, v, keep, extras)
    grads = model.backward(dout, dlse, q, k, v, keep, extras)
    np.testing.assert_allclose(out.swapaxes(0, 1), exact.out[0], atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse[0], atol=1e-13)
    for grad, expected in zip(grads[:3], (exact.dq, exact.dk, exact.dv), strict=True):
        np.testing.assert_allclose(grad.swapaxes(0, 1), expected[0], atol=1e-12)
    np.testing.assert_allclose(grads.dsink, exact.dsink, atol=1e-12)


@pytest.mark.parametrize("case_id", ["bf16-d64-x1", "bf16-d64-x3", "fp16-d64-x3", "fp16-d64-x10"])
def test_the_model_rounds_what_flash_attention_rounds(case_id):
    """Step by step, a head after the other, as the algorithms of Dao et al. 2022 with one tile that has all keys."""
    case = small(case_id)
    problem, inputs = case.problem, make(case, Normals(np))

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).astype(problem.dtype.numpy).astype(np.float64)

    model = ideal(case, inputs, np)[1] | ideal(case.turned("backward"), inputs, np)[1]
    for h in range(problem.heads_q):
        q, k, v, dout = (x[0, :, h].astype(np.float64) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        s = q @ k.T * problem.softmax_scale
        weights = np.exp(s - s.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        out = rounded(rounded(weights) @ v / total)
        p = weights / total
        ds = rounded(p * (dout @ v.T - (dout * out).sum(axis=1, keepdims=True)))
        expected = {"out": out, "dq": rounded(ds @ k * problem.softmax_scale), "dv": rounded(rounded(p).T @ dout)}
        expected["dk"] = rounded(ds.T @ q * problem.softmax_scale)
        for name, x in expected.items():  # float64 decides a tie now and then
            ulp = float(np.finfo(np.float16).eps) if problem.dtype.name == "fp16" else 2.0**-7
            same = np.isclose(model[name][0, :, h], x, rtol=1e-12, atol=1e-15)
            assert same.mean() > 0.999, name
            np.testing.assert_allclose(model[name][0, :, h], x, rtol=4 * ulp, atol=1e-6)


def test_a_key_that_outweighs_its_row_is_exact():
    """Its probability is 1 in the model, so that out is the exact one, rounded once."""
    case = replace(small("bf16-d64-x1"), qk_factor=100.0)
    exact, model = (answers["out"] for answers in ideal(case, make(case, Normals(np)), np))
    assert rms(model - exact) == pytest.approx(rounding(exact, case.problem.dtype), rel=1e-3)


def test_the_model_of_tf32_rounds_what_is_multiplied_and_keeps_fp32_in_memory():
    case = small("tf32-d64-x1")
    inputs = make(case, Normals(np))
    exact, model = (answers["out"] for answers in ideal(case, inputs, np))
    q, k, v = (oracle.to_tf32(x[0, :, 0]).astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    s = q @ k.T * case.problem.softmax_scale
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    out = oracle.to_tf32(weights) @ v / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model[0, :, 0], out, atol=1e-5)
    np.testing.assert_array_equal(model, model.astype(np.float32))
    assert rounding(exact, case.problem.dtype) == pytest.approx(rms(oracle.to_tf32(exact) - exact), rel=1e-6)
    assert rounding(exact, case.problem.dtype) > 1000 * rounding(exact, dtypes.FP32)


def test_a_factor_scales_q_and_k_and_nothing_else():
    case = small("fp16-d64-x3")
    plain, scaled = make(replace(case, qk_factor=1.0), Normals(np)), make(case, Normals(np))
    for name in ("q", "k"):
        expected = (getattr(plain, name).astype(np.float32) * 3).astype(np.float16)
        np.testing.assert_array_equal(getattr(scaled, name), expected)
    for name in ("v", "dout"):
        np.testing.assert_array_equal(getattr(scaled, name), getattr(plain, name))


def test_the_set_is_what_the_bar_is_for():
    ids = list(CASES)
    assert len(ids) == len(set(ids)) == 126
    for dtype in ("bf16", "fp16"):
        for dim in (64, 128, 256):
            for mask in ("", "-causal"):
                for factor in (1, 3, 10):
                    case = CASES[f"{dtype}-d{dim}{mask}-x{factor}"]
                    problem = case.problem
                    assert (problem.dtype.name, problem.dim_qk, problem.dim_v) == (dtype, dim, dim)
                    assert (problem.mask.right, case.qk_factor) == (0 if mask else None, factor)
    assert {case.problem.dropout for case in CASES.values()} == {None, "byte", "word"}


def test_every_case_has_kernels_to_compile_ahead(monkeypatch):
    monkeypatch.setattr("cuflash.bench.exactness.current", lambda ordinal: named("h100"))
    backward = [case.turned("backward") for case in CASES.values()]
    kernels = {step.kernel for step in steps(backward)}
    hoppers = {"bwd_sm90", "bwd_sm90_short", "bwd_sm90_wide", "bwd_bias_sm90"}
    assert hoppers | {"bwd_sm80"} <= kernels
    assert len(steps(backward)) == len({(step.kernel, step.params, step.config) for step in steps(backward)})
    assert {step.kernel for step in steps(list(CASES.values()))} == {
        "fwd_sm90",
        "fwd_sm90_wide",
        "fwd_sm80",
        "fwd_sm80_short",
        "fwd_combine",
        "fwd_rng",
    }


class Rounder:
    """A peer that rounds the exact result once, or fails, or computes something else."""

    def __init__(self, name: str, result: Any) -> None:
        self.name, self._result = name, result

    def why_not(self, problem: object) -> str | None:
        return "no sink" if problem.sink else None

    def prepare(self, case: Case, inputs: object) -> Runner:
        def call() -> Any:
            if isinstance(self._result, Exception):
                raise self._result
            exact = ideal(case, inputs, np)[0]
            return [x.astype(case.problem.dtype.numpy).astype(np.float32) for x in exact.values()]

        tensors = None if self._result is None else list
        return Runner(self.name, "x", call, call, "wall", lambda: None, tensors=tensors)


def test_errors_are_in_units_of_rounding_once():
    peers = [Rounder("once", 1), Rounder("broken", RuntimeError("no such kernel")), Rounder("gemm", None)]
    bench = Exactness([CuflashCpu(), NumpyNaive(), *peers], gpu=False)
    cases = [small("bf16-d64-x3"), small("bf16-d64-x3").turned("backward"), small("fp16-d64-dropout-x1"),
             small("bf16-d128-sink-x1")]  # fmt: skip
    done = []
    bench.run(cases, 60.0, done.append)
    assert done == cases
    deviations = {(deviation.case, deviation.tensor): deviation for deviation in bench.report.deviations}
    assert list(deviations) == [
        ("bf16-d64-x3", "out"), ("bf16-d64-x3", "dq"), ("bf16-d64-x3", "dk"), ("bf16-d64-x3", "dv"),
        ("fp16-d64-dropout-x1", "out"), ("bf16-d128-sink-x1", "out"),
    ]  # fmt: skip
    for (case_id, tensor), deviation in deviations.items():
        plain = case_id == "bf16-d64-x3"
        assert list(deviation.errors) == ["model", "cuflash", *(["numpy-naive", "once"] if plain else [])]
        assert 1 <= deviation.errors["model"] < 4
        assert 0.99 < deviation.errors["cuflash"] < deviation.errors["model"] * 1.06
        if plain:
            assert deviation.errors["once"] == pytest.approx(1)
            assert deviation.errors["numpy-naive"] > 2
            assert deviation.phase == ("forward" if tensor == "out" else "backward")
    both = "forward bf16-d64-x3, backward bf16-d64-x3"
    drops = "forward fp16-d64-dropout-x1"
    assert set(bench.report.notes) == {
        f"broken (RuntimeError: no such kernel): {both}",
        f"gemm (does not compute the case): {both}",
        *(f"{name} (drops other pairs): {drops}" for name in ("numpy-naive", "once", "broken", "gemm")),
        *(f"{name} (no sink): forward bf16-d128-sink-x1" for name in ("numpy-naive", "once", "broken", "gemm")),
    }


def test_a_result_with_a_wrong_element_shows(monkeypatch):
    peer = Rounder("once", 1)
    real = peer.prepare

    def prepare(case: Case, inputs: object) -> Runner:
        runner = real(case, inputs)
        runner.tensors = lambda results: [np.where(np.arange(64) == 5, np.nan, x) for x in results]
        return runner

    monkeypatch.setattr(peer, "prepare", prepare)
    bench = Exactness([peer], gpu=False)
    bench.run([small("bf16-d64-x1")], 60.0, lambda case: None)
    assert math.isnan(bench.report.deviations[0].errors["once"])
    assert bench.report.deviations[0].beside_the_best is None


RECORDED = [
    Deviation("a", "forward", "out", 1e-3, {"model": 1.3, "cuflash": 1.5, "fa3": 1.0, "torch-efficient": 0.5}),
    Deviation("a", "backward", "dq", 1e-3, {"model": 2.0, "cuflash": 2.0, "torch-flash": 2.5, "torch-cudnn": 4.0}),
    Deviation("a", "backward", "dk", 1e-3, {"model": 2.0, "cuflash": 2.0, "torch-flash": 2.0}),
    Deviation("sink", "forward", "out", 1e-3, {"model": 1.0, "cuflash": 1.05}),
    Deviation("broken", "forward", "out", 1e-3, {"model": 1.0, "fa3": 1.0}),
]


def test_the_table_holds_cuflash_to_the_best_that_computes_the_case():
    header, lines = cells(RECORDED)
    peers = ["fa3", "torch-efficient", "torch-flash", "torch-cudnn"]
    assert header == ["case", "of", "cuflash", "beside the best", *peers, "model"]
    assert lines == [
        ["a", "out dq dk", "1.50 2.00 2.00", "1.50 0.80 1.00", "1.00", "0.50", "– 2.50 2.00", "– 4.00",
         "1.30 2.00 2.00"],
        ["sink", "out", "1.05", "1.05 (model)", "–", "–", "–", "–", "1.00"],
        ["broken", "out", "–", "–", "1.00", "–", "–", "–", "1.00"],
        ["a", "worst: out", "1.50", "1.50", "1.00", "0.50", "–", "–", "1.30"],
        ["sink", "worst: out", "1.05", "1.05 (model)", "–", "–", "–", "–", "1.00"],
    ]  # fmt: skip
    nothing = Deviation("nan", "forward", "out", 1e-3, {"model": 1.0, "cuflash": math.nan, "fa3": 1.0})
    assert cells([*RECORDED, nothing])[1][-2][:4] == ["nan", "worst: out", "nan", "nan"]


def test_a_report_keeps_errors_and_renders_them(tmp_path):
    recorded = report.new(gpu=False)
    recorded.deviations = RECORDED
    recorded.write(tmp_path / "out.json")
    assert report.Report.read(tmp_path / "out.json") == recorded
    text = (tmp_path / "out.json").read_text()
    assert sum("torch-efficient" in line for line in text.splitlines()) == 1
    assert "| sink | out | 1.05 | 1.05 (model) |" in report.markdown(recorded, "out.json")
    assert "| a | dq dk |" in report.markdown(recorded.of("backward"), "out.json")
    assert "| case |" not in report.markdown(report.new(gpu=False), "out.json")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_bench_compares_with_exact_results_and_renders_that(tmp_path, monkeypatch):
    cases = [small("bf16-d64-causal-x3"), small("fp16-d64-x10"), small("fp16-d64-sink-x1")]
    monkeypatch.setitem(sets.SETS, "exactness", lambda: cases)
    out = tmp_path / "out.json"
    printed = run("exactness", "--case=fp16", f"--json={out}")
    assert printed.count("worst: ") == 2 and "(model)" in printed
    content = json.loads(out.read_text())
    assert content["rows"] == content["host"] == [] and content["start"] == {}
    assert [(deviation["case"], deviation["tensor"]) for deviation in content["deviations"]] == [
        *(("fp16-d64-x10" if i % 2 == 0 else "fp16-d64-sink-x1", "out") for i in range(2)),
        *((case_id, name) for case_id in ("fp16-d64-x10", "fp16-d64-sink-x1") for name in ("dq", "dk", "dv")),
    ]
    assert "| fp16-d64-x10 | out dq dk dv |" in run(f"--render={out}")
    assert "| fp16-d64-x10 | out |" in run(f"--render={out}", "--phase=forward")
    only = run("exactness", "--case=bf16", "--phase=forward", "--peers=")
    assert "numpy-naive" not in only.partition("left out")[0]


@pytest.mark.parametrize("option", ["--quick", "--sustained", "--no-processes"])
def test_options_of_the_clock_are_refused(option):
    with pytest.raises(InvalidArgument, match="is for timing, and exactness times nothing"):
        run("exactness", option)


def test_a_gpu_without_cublas_is_told_what_to_install(monkeypatch):
    from cuflash.cli.soak import check_cublas

    class Cuda:
        @property
        def cublas(self) -> object:
            raise ImportError("libcublas.so is not here")

    monkeypatch.setitem(__import__("sys").modules, "cupy", SimpleNamespace(cuda=Cuda()))
    with pytest.raises(InvalidArgument, match=r"exactness needs cuBLAS.*Install nvidia-cublas \(.*\)\.$"):
        check_cublas("exactness")
