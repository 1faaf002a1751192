"""The command line: what each command prints and which status it ends with."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import click
import hypothesis.strategies as st
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

import cuflash.cli.compile
import cuflash.cli.explain
from cuflash import jit, mods, plan
from cuflash.bench.peers import PEERS
from cuflash.bench.run import Bench
from cuflash.cases import calls
from cuflash.cases.table import Case
from cuflash.cli import app
from cuflash.cli import check as check_command
from cuflash.device import named
from cuflash.dtypes import BF16
from cuflash.errors import CompileError, InvalidArgument, UnsupportedProblem
from cuflash.problem import Problem


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("cuflash.cli.bench.has_gpu", lambda: False)
    monkeypatch.setattr("cuflash.cli.check.has_gpu", lambda: False)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: str, status: int | None = 0) -> str:
    """What a command prints, whose exit status is this one, or any if it is None."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert status is None or result.exit_code == status, result.output
    return result.output


@pytest.fixture
def no_compiler(monkeypatch):
    def missing(*arch: str) -> None:
        raise CompileError("NVRTC is not here")

    monkeypatch.setattr(cuflash.cli.explain, "check_arch", missing)
    monkeypatch.setattr(cuflash.cli.compile, "version", missing)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Cubins without compiling; `fake.update(...)` changes what they report."""
    report = {"registers": 40, "stack": 0, "spill_stores": 0, "spill_loads": 0, "warnings": ()}

    def compile_kernel(kernel, config, params, arch):
        return jit.Cubin(path=None, kernel=kernel, arch=arch, seconds=0.25, **report)

    monkeypatch.setattr(cuflash.cli.explain, "check_arch", lambda arch: None)
    monkeypatch.setattr(cuflash.cli.compile, "version", lambda: (13, 0))
    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(jit, "compile_many", lambda jobs, workers: (compile_kernel(*job) for job in jobs))
    return report


def test_explain_shows_the_choice_and_why_not_the_rest(fake_compiler):
    printed = run("explain", "--device=h100", "--heads=16/4", "--len=1024x4096", "--causal", "--backward")
    assert "backward bf16 b2 h16/4 s1024x4096 d128 causal on NVIDIA H100 (sm_90a)" in printed
    assert "family     sm90: dk and dv take 128 registers" in printed
    assert "at most    100% of the tensor cores' peak" in printed
    for kernel in ("bwd_prepare_sm90: ", "bwd_sm90: ", "bwd_convert_sm90: "):
        assert kernel in printed
    assert "row_tiles" in printed and "dq_accum" in printed
    assert "not sm80   sm90 comes first" in printed and "not simt   sm90 comes first" in printed
    # 2 batches, 16 heads, the mean of 3072.5 ... 4096 visible keys a row, 2.5 times 4 * 128
    assert f"{2.5 * 4 * 128 * 2 * 16 * 1024 * (3073 + 4096) / 2 / 1e9:,.2f} G" in printed


def test_explain_compares_ways_of_dividing_a_call(no_compiler):
    def lines(*more):
        words = ["--device=h200", "--batch=1", "--heads=64/8", "--len=131072", "--causal"]
        printed = " ".join(run("explain", *words, *more).split())
        return printed[printed.index("on paper") :]

    of_eight = lines("--devices=8")
    assert "on paper 720 TFLOP/s, 338 GB/s in a node of 8; one device: 390.9" in of_eight
    assert " on 8 devices, 93% of their speed: waits 0.000 ms for 7 transfers" in of_eight
    assert "for 2 transfers, 528.5 MB to each device choose all-to-all, in zigzag order" in of_eight
    of_many = lines("--devices=128", "--tflops=600", "--network=25", "--backward")
    assert "600 TFLOP/s, 338 GB/s in a node of 8, 25 between nodes" in of_many
    assert "all-to-all not possible: q has 64 heads for 128 devices" in of_many
    assert "ring not possible: len_q is 131072; expected a multiple of 6" in lines("--devices=3")
    case = run("explain", "fwd_sm80-bf16-d64-causal", "--device=h100", "--devices=1", "--order=contiguous")
    assert "not possible: len_q is 203 and len_kv 331; expected the same where keys are masked" in case


def test_explain_says_why_there_are_no_registers(no_compiler):
    printed = run("explain", "--device=h100")
    assert "family     sm90: three consumers" in printed
    assert "at most    100% of the tensor cores' peak" in printed
    assert "registers, spills and stack are known after compiling: NVRTC is not here" in printed


def test_explain_goes_on_where_the_compiler_does_not_know_the_device(monkeypatch):
    """CUDA 13 compiles nothing for a V100."""
    pytest.importorskip("cupy", reason="asks the compiler")
    monkeypatch.setattr(jit.compile, "supported_archs", lambda: ("sm_80",))
    printed = run("explain", "--device=v100")
    assert "kernel     fwd_simt: " in printed and "compiles for sm_80, not for 'sm_70'" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device=v100", "--varlen"], "not sm80   needs sm_80"),
        (["--dtype=fp64", "--dim=160"], "not sm80   heads of 160 > 128 in fp64"),
        (["--dim=320"], "not sm80   dim_qk 320 > 256; dim_v 320 > 256"),
        (["--family=simt"], "family     simt"),
        (["--varlen", "--page-size=16", "--len=100"], "forward bf16 b2 h16 s100x100 d128 varlen pages16"),
        (["bwd_sm80-bf16-d64-window"], "backward bf16 b2 h2 s203x331 d64 window"),
        (["--len=1x900", "--num-splits=3"], "splits     3: asked for"),
        (
            ["--len=1x900", "--heads=16/4", "--num-splits=99"],
            "splits     15: 4 heads share a tile; of 99: one for each",
        ),
        (
            ["--len=1x900", "--heads=4/2"],
            "splits     8: 2 heads share a tile; 32 blocks of 264 that there can be at once",
        ),
        (
            ["--len=1x900", "--heads=4/2", "--dtype=fp32"],
            "splits     13: 2 heads share a tile; 4 blocks for 132 multiprocessors",
        ),
    ],
)
def test_explain_reads_its_options(no_compiler, arguments, expected):
    assert expected in run("explain", *arguments)


def test_explain_ends_with_status_1_when_nothing_runs_the_problem(no_compiler):
    printed = run("explain", "--dim=2048", status=1)
    assert "not sm80   dim_qk 2048 > 256" in printed
    assert "not simt   dim_qk 2048 > 1024" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads=5/2"], "k has 2 heads but q has 5; heads_q must be a multiple of heads_kv."),
        (["--heads=0"], "q has number of heads 0; expected at least 1."),
        (["--len=4x"], "--len '4x' is not understood; expected one integer or two, as in 4x2."),
        (["--len=-5"], "--len '-5' has -5; expected no negative number."),
        (["--len=999999999999"], "q has 999999999999 rows; expected at most 2**30 in a sequence"),
        (
            ["--len=1073741824", f"--batch={10**10}"],
            "q would have shape (10000000000, 1073741824, 16, 128), 43,980,465",
        ),
        (["--dim=0"], "q has head dimension 0; expected at least 1."),
        (["--dim=-1"], "--dim '-1' has -1; expected no negative number."),
        (["--scale=nan"], "softmax_scale is nan; expected a finite number."),
        (["--softcap=nan"], "softcap is nan; expected"),
        (["--softcap=-1"], "softcap is -1.0; expected"),
        (["--window", "-7,3"], "window_size is (-7, 3); expected bounds from 0 to 2**31 - 1, or -1 for unbounded."),
        (["--dropout=1"], "dropout_p is 1.0; expected a probability of dropping, from 0 to below 1."),
        (["--dtype=fp64", "--copy-bytes=2"], "q is misaligned"),
        (["--bias=hkj"], "--bias 'hkj' is not understood; expected some of the letters bhqk."),
        (["--bias=k", "--bias-dtype=fp64"], "attn_bias is float64; expected bfloat16 or float32."),
        (["--num-splits=129"], "num_splits is 129; expected an integer from 1 to 128"),
        (["--page-size=16"], "--page-size 16 is for packed queries, and at least 1; give --varlen too."),
        (["--varlen", "--page-size=0"], "--page-size 0 is for packed queries, and at least 1"),
        (["--device=abacus"], "device 'abacus' is not known"),
        (["--link=5"], "--link does nothing here; it goes with --devices."),
        (["--devices=2", "--dtype=fp32"], "tflops is None, and how fast NVIDIA H100"),
        (["--top-left"], "--top-left does nothing here; it goes with --causal or --window."),
        (["--bias-dtype=fp32"], "--bias-dtype does nothing here; it goes with --bias."),
        (["--backward", "--bias-grad"], "--bias-grad does nothing here; it goes with --bias."),
        (["--bias=k", "--bias-grad"], "--bias-grad does nothing here; it goes with --backward."),
        (["--bias=q", "--bias-apart"], "--bias-apart does nothing here; it goes with a --bias along several keys."),
        (["--deterministic"], "--deterministic does nothing here; it goes with --backward."),
        (["--backward", "--captured-grad"], "--captured-grad does nothing here; it goes with --score-mod."),
        (["--score-mod=score", "--captured-grad"], "--captured-grad does nothing here; it goes with --backward."),
        (["--score-mod=score+"], "--score-mod 'score+' is not an expression of score, b, h, q, k."),
        (["--mask-mod=score>0"], "mask_mod cannot be traced: NameError: name 'score' is not defined"),
        (["--dropout-scheme=word"], "--dropout-scheme does nothing here; it goes with --dropout."),
        (["--backward", "--num-splits=2"], "--num-splits does nothing here; it goes with the forward alone"),
        (["--heads=4/1", "--reversed"], "--reversed does nothing here; it goes with several heads."),
        (["fwd_sm80-bf16-d64", "--sink"], "--sink is given beside a case, which says everything but --device"),
        (["fwd_sm80-bf16"], "case 'fwd_sm80-bf16' is not an id; expected one id, for example: fwd_sm80-bf16-d32"),
    ],
)
def test_explain_names_the_option_that_is_wrong(arguments, message):
    with pytest.raises(InvalidArgument) as caught:
        run("explain", *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["explain", "--dtype=fp7"], "--dtype"),
        (["explain", "--copy-bytes=3"], "--copy-bytes"),
        (["explain", "--family=nope"], "--family"),
        (["source", "--batch=-1"], "--batch"),
        (["check", "smoke", "--seed=-1"], "--seed"),
        (["check", "smoke", "--soak=1", "--seconds=nan"], "--seconds"),
        (["check", "smoke", "--sanitize=magic"], "--sanitize"),
        (["compile", "smoke", "--jobs=0"], "--jobs"),
        (["bench", "--seconds=nan"], "--seconds"),
        (["bench", "--render=none.json"], "--render"),
        (["bench", "--phase=sideways"], "--phase"),
        (["support", "--write=none.md"], "--write"),
    ],
)
def test_a_value_that_no_option_has_is_refused_by_name(arguments, option):
    printed = run(*arguments, status=2)
    assert f"Error: Invalid value for '{option}'" in printed


def real_arrays(arguments: dict) -> dict:
    """The same problem as arrays of NumPy, and what `cuflash.explain` calls it."""
    bf16, rng = BF16.numpy, np.random.default_rng(0)
    b, hq, hkv, sq, sk, d, dv = 2, 4, 2, 24, 40, 16, 8
    q, k, v = (rng.standard_normal((b, *shape)).astype(bf16) for shape in ((sq, hq, d), (sk, hkv, d), (sk, hkv, dv)))
    if arguments.pop("shared_kv", False):
        v = k[..., :dv]
    if arguments.pop("reversed", False):
        k, v = k[:, :, ::-1], v[:, :, ::-1]
    if arguments.pop("varlen", False):
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        arguments |= {f"cu_seqlens_{x}": np.arange(3, dtype=np.int32) * n for x, n in (("q", sq), ("k", sk))}
    if size := arguments.pop("page_size", 0):
        pages = -(-sk // size)
        k, v = (np.zeros((b * pages, size, *x.shape[1:]), bf16) for x in (k, v))
        arguments["block_table"] = np.arange(b * pages, dtype=np.int32).reshape(b, pages)
    return {"q": q, "k": k, "v": v} | arguments


BIAS = np.zeros((1, 4, 24, 40), BF16.numpy)
SLOPES, SEEN = np.ones(4, np.float32), np.ones((2, 40), np.float32)
PROBLEMS: dict[str, dict] = {
    "": {},
    "--causal --top-left --scale=0.5 --softcap=3": {
        "causal": True, "alignment": "top-left", "softmax_scale": 0.5, "softcap": 3.0,
    },
    "--window=7,3 --mask": {"window_size": (7, 3), "attn_mask": np.ones((2, 1, 24, 40), bool)},
    "--window=1000,1000": {"window_size": (1000, 1000)},
    "--causal --mask": {"causal": True, "attn_mask": np.ones((24, 40), bool)},
    "--alibi --sink": {"alibi_slopes": SLOPES, "sink": SLOPES},
    "--bias=hqk": {"attn_bias": BIAS},
    "--bias=hqk --bias-apart": {"attn_bias": np.zeros((1, 4, 24, 80), BF16.numpy)[..., ::2]},
    "--bias=bk --bias-dtype=fp32": {"attn_bias": np.zeros((2, 1, 1, 40), np.float32)},
    "--bias=q": {"attn_bias": BIAS[:, :1, :, :1].copy()},
    "--bias=hqk --bias-grad --backward --deterministic": {
        "attn_bias": BIAS, "bias_grad": True, "backward": True, "deterministic": True,
    },
    "--dropout=0.5": {"dropout_p": 0.5},
    "--dropout=0.5 --dropout-scheme=word --backward": {
        "dropout_p": 0.5, "dropout_scheme": "word", "backward": True,
    },
    "--score-mod=score-captured0[h]*abs(q-k) --backward --captured-grad": {
        "score_mod": lambda s, b, h, q, k: s - SLOPES[h] * abs(q - k), "backward": True, "captured_grad": True,
    },
    "--score-mod=tanh(score)*2 --mask-mod=(captured0[b,k]>0)&(k<=q+16)": {
        "score_mod": lambda s, b, h, q, k: mods.tanh(s) * 2,
        "mask_mod": lambda b, h, q, k: (SEEN[b, k] > 0) & (k <= q + 16),
    },
    "--block-mask=16 --causal": {  # without a band of a call's own it would be one
        "block_mask": cuflash.create_block_mask(len_q=24, len_kv=40, block_size=16), "causal": True,
    },
    "--varlen --causal": {"varlen": True, "causal": True},
    "--varlen --page-size=16 --num-splits=3": {"varlen": True, "page_size": 16, "num_splits": 3},
    "--varlen --backward --sink": {"varlen": True, "sink": SLOPES, "backward": True},
    "--shared-kv": {"shared_kv": True},
    "--reversed": {"reversed": True},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[Problem]:
    """The problems that `explain` was asked about."""
    problems, real = [], plan.explain

    def explain(problem, *more):
        problems.append(problem)
        return real(problem, *more)

    monkeypatch.setattr(plan, "explain", explain)
    return problems


@pytest.mark.parametrize("arguments", PROBLEMS)
def test_options_make_the_problem_of_a_call(arguments, asked, no_compiler):
    run("explain", "--heads=4/2", "--len=24x40", "--dim=16x8", *arguments.split(), status=None)
    [problem] = asked
    assert problem == cuflash.explain(**real_arrays(dict(PROBLEMS[arguments])), device="h100").problem


def test_every_member_of_a_problem_has_an_option(asked, no_compiler):
    changes = ["--dtype=fp32", "--batch=3", "--heads=6/2", "--heads=4/4", "--len=25x40", "--len=24x41", "--dim=8x8"]
    changes += ["--dim=16x16", "--copy-bytes=2", "--tangents=q,v"]
    for arguments in ["", *changes, *PROBLEMS]:
        run("explain", *{"--heads": "--heads=4/2", "--len": "--len=24x40", "--dim": "--dim=16x8"}.values(),
            *arguments.split(), status=None)  # fmt: skip
    plain, *others = asked
    varied = {f.name for f in fields(Problem) for other in others if getattr(other, f.name) != getattr(plain, f.name)}
    of_caches = {"appended", "rotary", "leftpad"}  # which no option makes
    assert varied == {f.name for f in fields(Problem)} - of_caches


def sizes(separator: str) -> st.SearchStrategy[str]:
    number = st.sampled_from([-1, 0, 1, 2, 3, 16, 64, 100, 256, 1025, 4096, 2**20, 2**30, 2**31, 2**63, 10**30])
    return st.one_of(number.map(str), st.tuples(number, number).map(lambda pair: separator.join(map(str, pair))))


NUMBERS = st.sampled_from(["0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e-300", "1e300", "x", ""])
VALUES: dict[str, st.SearchStrategy[str]] = {
    "--heads": sizes("/"), "--len": sizes("x"), "--dim": sizes("x"), "--window": sizes(","),
    "--tangents": st.sampled_from(["q", "q,k,v", "v,bias", "sink", "q,q", "out", "", ","]),
    "--batch": sizes("x"), "--scale": NUMBERS, "--softcap": NUMBERS, "--dropout": NUMBERS,
    "--page-size": sizes("x"), "--num-splits": sizes("x"), "--bias": st.sampled_from(["", "k", "bhqk", "kk", "z"]),
    "--device": st.sampled_from(["v100", "sm_86", "h100", "b200", "", "sm_1"]),
    "--score-mod": st.sampled_from(
        ["score", "score * captured0[h]", "h", "", "score if q else k", "captured0[q] + captured0[q, k]"]
    ),
    "--mask-mod": st.sampled_from(["q >= k", "k", "captured7[b, h, q, k] > 0", "q >", "__import__('os')"]),
    "--block-mask": sizes("x"), "--devices": sizes("x"), "--node": sizes("x"),
    **dict.fromkeys(("--tflops", "--link", "--network"), NUMBERS),
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Some options of `explain`, with values that may be right."""
    command = app.commands["explain"]
    chosen = draw(st.lists(st.sampled_from([p for p in command.params if isinstance(p, click.Option)]), max_size=6))
    line = []
    for option in chosen:
        if option.is_flag:
            line.append(option.opts[0])
            continue
        choices = st.sampled_from(option.type.choices) if isinstance(option.type, click.Choice) else None
        line += [option.opts[0], draw(VALUES[option.opts[0]] if choices is None else choices)]
    return line


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=command_lines())
def test_whatever_the_options_the_answer_is_a_plan_or_a_refusal(line, no_compiler):
    result = CliRunner().invoke(app, ["explain", *line])
    if isinstance(result.exception, InvalidArgument | UnsupportedProblem):
        return
    assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exc_info)
    assert ("family" in result.output) if result.exit_code == 0 else result.output


def test_source_prints_the_config_and_every_file():
    printed = run("source", "fwd_sm80-bf16-d64-causal", "--device=h100")
    assert "using Mask = CausalMask;" in printed
    assert "kDimQk = 64;" in printed
    for name in ("entry/fwd_sm80.cu", "forward/sm80.cuh", "std.cuh"):
        assert str(jit.sources.root() / name) in printed.splitlines()


def test_compile_prints_every_variant(fake_compiler):
    printed = run("compile", "bwd_sm80-bf16-d64-causal", "--arch=sm_80", "--arch=sm_90a")
    lines = [line.split() for line in printed.splitlines() if "bwd_sm80-bf16-d64-causal" in line]
    assert [(line[0], line[2]) for line in lines] == [
        (arch, kernel) for arch in ("sm_80", "sm_90a") for kernel in ("bwd_delta", "bwd_sm80", "bwd_convert")
    ]
    assert lines[1][3:6] == ["40", "0", "0"]
    assert lines[1][-1] == "0.25"
    assert "6 of 6 kernels are as they should be." in printed


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        ({"spill_loads": 4096}, "spills 4096 bytes"),
        ({"warnings": ("info C7510: something is serialised",)}, "C7510"),
        ({"registers": 2000}, "registers of 65536"),
    ],
)
def test_compile_ends_with_status_1_on_a_bad_kernel(fake_compiler, report, complaint):
    fake_compiler.update(report)
    printed = run("compile", "fwd_sm80-bf16-d64", "--arch=sm_90a", status=1)
    assert complaint in printed
    assert "0 of 1 kernels are as they should be." in printed


def test_compile_shows_what_does_not_compile(fake_compiler, monkeypatch):
    monkeypatch.setattr(jit, "compile_many", lambda jobs, workers: iter([CompileError("mask.cuh(7): error: no")]))
    assert "mask.cuh(7): error: no" in run("compile", "fwd_sm80-bf16-d64", "--arch=sm_90a", status=1)


def test_compile_without_a_compiler_says_so(no_compiler):
    with pytest.raises(CompileError, match="NVRTC is not here"):
        run("compile", "--all")


def test_compile_wants_cases_or_all():
    for arguments in ([], ["smoke", "--all"]):
        with pytest.raises(InvalidArgument, match="name the cases to compile, or give --all"):
            run("compile", *arguments)


def test_check_runs_cases_on_numpy():
    printed = run("check", "fwd_simt-fp32-d33")
    assert "1 cases on the NumPy backend" in printed
    assert [line.split()[:2] for line in printed.splitlines() if "fwd_simt" in line] == [
        ["fwd_simt-fp32-d33", "out"],
        ["fwd_simt-fp32-d33", "lse"],
    ]


def test_check_ends_with_status_1_on_a_wrong_result(monkeypatch):
    real = calls.of
    monkeypatch.setattr(calls, "of", lambda *a: lambda: tuple(x * 1.1 for x in real(*a)()))
    assert "2 outputs are too far from the exact answer." in run("check", "fwd_simt-fp32-d16", status=1)


def test_check_runs_itself_under_the_sanitizer(monkeypatch):
    commands = []

    def fake_run(command, check, env):
        commands.append((command, env.get("CUFLASH_DEBUG")))
        return subprocess.CompletedProcess(command, 97)

    monkeypatch.delenv("CUFLASH_DEBUG", raising=False)
    monkeypatch.setattr(check_command.shutil, "which", lambda name, path=None: "/tools/compute-sanitizer")
    monkeypatch.setattr(check_command.subprocess, "run", fake_run)
    run("check", "smoke", "--sanitize=memcheck", status=97)
    run("check", "smoke", "--sanitize=racecheck", "--seed=3", status=97)
    [(_, debug_memcheck), (command, debug)] = commands
    assert (debug_memcheck, debug) == (None, "1")
    assert command[:3] == ["/tools/compute-sanitizer", "--tool=racecheck", "--error-exitcode=97"]
    assert command[3:] == [sys.executable, "-m", "cuflash", "check", "smoke", "--seed=3", "--no-pool"]


def test_check_says_what_sanitizing_needs(monkeypatch):
    monkeypatch.setattr(check_command.shutil, "which", lambda name, path=None: None)
    with pytest.raises(InvalidArgument, match="needs the program compute-sanitizer"):
        run("check", "smoke", "--sanitize=memcheck")


def test_what_was_measured_outlives_a_bench_that_is_stopped(tmp_path, monkeypatch):
    measure = Bench._case

    def stopped(bench: Bench, case: Case, seconds: float) -> None:
        if bench.report.rows:
            raise KeyboardInterrupt
        measure(bench, case, seconds)

    monkeypatch.setattr(Bench, "_case", stopped)
    out = tmp_path / "out.json"
    with pytest.raises(AssertionError):
        run("bench", "numpy", "--phase=forward", "--quick", "--no-processes", "--peers=", f"--json={out}")
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_bench_writes_its_rows_and_renders_them(tmp_path):
    out = tmp_path / "out.json"
    printed = run("bench", "numpy", "--case=d64-s256", "--phase=forward", "--quick", "--no-processes", f"--json={out}")
    assert "d64-s256" in printed
    rows = json.loads(out.read_text())["rows"]
    assert [(row["impl"], row["phase"]) for row in rows] == [("cuflash", "forward"), ("numpy-naive", "forward")]

    page = tmp_path / "page.md"
    page.write_text("<!-- measurements:begin -->\nold\n<!-- measurements:end -->\n")
    run("bench", f"--render={out}", f"--write={page}")
    assert "| d64-s256 |" in page.read_text()
    assert "old" not in page.read_text()
    assert "| d64-s256 |" in run("bench", f"--render={out}")

    page.write_text("<!-- measurements-forward:begin -->\nold\n<!-- measurements-forward:end -->\n")
    run("bench", f"--render={out}", "--phase=forward", f"--write={page}")
    assert "| d64-s256 |" in page.read_text() and "old" not in page.read_text()
    assert "| d64-s256 |" not in run("bench", f"--render={out}", "--phase=backward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["postfill"], "problem set 'postfill' is not known; expected one of: prefill, gqa, window,"),
        (["numpy", "--case=d7"], "--case 'd7' matches nothing in numpy"),
        (["numpy", "--peers=torch,fortran"], "--peers names 'fortran'"),
        (["--write=README.md"], "--write needs --render"),
    ],
)
def test_bench_names_the_option_that_is_wrong(arguments, message):
    with pytest.raises(InvalidArgument) as caught:
        run("bench", *arguments)
    assert message in str(caught.value)


def test_bench_times_new_processes(tmp_path):
    out = tmp_path / "out.json"
    run("bench", "numpy", "--case=d64-s256", "--phase=forward", "--quick", "--peers=", f"--json={out}")
    content = json.loads(out.read_text())
    assert content["start"].keys() == {"forward, cpu", "backward, cpu"}
    for times in content["start"].values():
        assert list(times) == ["import_s", "context_s", "first_call_s", "second_call_s"]
        assert times["import_s"] > 0.001
    assert [(each["impl"], each["phase"]) for each in content["host"]] == [
        ("cuflash", "forward"),
        ("cuflash", "backward"),
    ]


def test_bench_refuses_a_file_that_no_bench_wrote(tmp_path):
    for text in ("", "{}", "[]", "3", '{"rows": [3]}', '{"rows": [{"case": "x"}]}', "\x00"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InvalidArgument, match=r"x\.json is not what `bench --json` writes"):
            run("bench", f"--render={tmp_path / 'x.json'}")


def test_options_that_would_not_act_are_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{}")
    for arguments, message in (
        (["bench", f"--render={file}", "--quick"], "--quick is for a measurement"),
        (["bench", "numpy", f"--render={file}"], "PROBLEMS is for a measurement"),
        (["check", "smoke", "--numpy", "--sanitize=memcheck"], "--numpy and --sanitize exclude each other"),
        (["check", "smoke", "--no-pool"], "--no-pool is for a GPU"),
        (["check", "smoke", "--sanitize=memcheck", "--seconds=3"], "--seconds needs --soak"),
        (["cache", "--list", "--clear"], "--list and --clear exclude each other"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            run(*arguments)


def test_cache_shows_lists_and_clears(tmp_path):
    folder = jit.cache.folder("fwd_sm80-bf16-d64", "0123456789abcdef")
    jit.cache.publish(folder, b"cubin", {"arch": "sm_80", "registers": 77}, "config")
    printed = run("cache", "--list")
    assert f"place    {tmp_path / 'cache'}" in printed
    assert "kernels  1" in printed
    assert "fwd_sm80-bf16-d64-0123456789ab" in printed
    assert "77" in printed
    assert "deleted 1 kernels" in run("cache", "--clear")
    assert "kernels  0" in run("cache")


# In a process


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> str:
    """A cache of kernels that processes share."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shell(kept) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a line in which `cuflash` is the command line."""

    def run_line(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        line = line.replace("cuflash", f"{shlex.quote(sys.executable)} -W error -m cuflash")
        everything = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        everything |= {"CUFLASH_CACHE_DIR": kept} | environment
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=everything, check=False)

    return run_line


def test_an_error_ends_the_program_with_its_message_and_status_2(shell):
    done = shell("cuflash explain --len -5")
    assert done.returncode == 2
    assert done.stderr == "InvalidArgument: --len '-5' has -5; expected no negative number.\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *((each, ">&- 2>&-") for each in ("support", "explain --len 256", "cache", "source --len 256", "--help")),
        ("explain --len 256", ">&-"),
        ("support", ">&-"),
        ("cache", "2>&-"),
        ("check fwd_simt-fp32-d16 --soak=1 --numpy", ">&-"),
    ],
)
def test_commands_run_where_there_is_nowhere_to_print(command, place, shell):
    done = shell(f"cuflash {command} {place}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_stdout_leaves_its_number_to_no_file(tmp_path, shell):
    page = tmp_path / "page.md"
    page.write_text("<!-- support-table:begin -->\n<!-- support-table:end -->\n")
    done = shell(f"cuflash support --write {page} >&- <&-")
    assert done.returncode == 0
    assert page.read_text(encoding="utf-8").startswith("<!-- support-table:begin -->\n- `sm90`")


def test_an_error_is_told_where_stdout_is_closed(shell):
    done = shell("cuflash explain --len -5 >&-")
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "InvalidArgument")


@pytest.mark.parametrize("command", ["support", "explain --len 256"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_commands_print_in_any_encoding(command, encoding, shell):
    done = shell(f"cuflash {command}", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    if command == "support":  # a table whose marks can be told apart
        rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| sink")]
        yes, no = ("✓", "–") if encoding == "utf-8" else ("yes", "-")
        assert rows[0][3:5] == [" `sink` ", f" {no} "] and yes in done.stdout


def test_a_full_disk_and_a_reader_that_is_gone_end_without_a_traceback(shell):
    done = shell("cuflash support > /dev/full")
    assert (done.returncode, done.stderr) == (2, "OSError: [Errno 28] No space left on device\n")
    done = shell("(cuflash support; echo $? >&2) | head -1")
    assert done.stderr in ("0\n", "1\n") and done.stdout.count("\n") == 1


def test_help_needs_no_docstrings():
    help_of = [
        subprocess.run([sys.executable, *strip, "-m", "cuflash", "--help"], capture_output=True, text=True, check=True)
        for strip in ([], ["-OO"])
    ]
    assert help_of[0].stdout == help_of[1].stdout
    for name in app.commands:
        assert any(line.split()[0] == name and len(line.split()) > 4 for line in help_of[1].stdout.splitlines() if line)


@pytest.mark.parametrize("name", [None, *app.commands])
def test_help_fits_80_columns_and_cuts_no_word(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run(*([] if name is None else [name]), "--help")
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    if name is None:
        assert "..." not in printed.partition("Commands:")[2]
    if name == "bench":
        for peer in PEERS:
            assert peer in printed


@pytest.mark.parametrize("backward", [False, True])
def test_explain_fits_80_columns(backward, asked, fake_compiler, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    everything = ["--causal", "--dropout=0.1", "--sink", "--bias=hqk", *(["--backward", "--bias-grad"] * backward)]
    printed = run("explain", "--device=h100", *everything)
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    words = " ".join(printed.split())
    for step in plan.choose(*asked, named("h100")).steps:
        assert f"kernel {step.kernel}: {step.num_blocks:,} blocks of {step.config.threads} threads, " in words
        assert f"kernel {step}" in words


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_tables_lose_nothing_in_a_narrow_terminal(columns, fake_compiler, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    fake_compiler.update(spill_loads=4096)
    printed = run("compile", "fwd_sm80-bf16-d64-causal", "--arch=sm_90a", status=1)
    assert "…" not in printed and "sm_90a" in printed and "fwd_sm80" in printed
    squeezed = "".join(printed.split())
    assert "4096" in squeezed and "0.25" in squeezed
    if columns == 160:
        assert "fwd_sm80-bf16-d64-causal" in printed and "spills 4096 bytes, 324 are allowed" in printed
    if columns >= 80:
        assert max(map(len, printed.splitlines())) <= columns


def test_the_version_is_that_of_the_package():
    assert run("--version") == f"cuflash {cuflash.__version__}\n"
