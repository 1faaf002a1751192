"""The command line: what each command prints and which status it ends with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import cuflash.cli.compile
import cuflash.cli.explain
from cuflash import jit
from cuflash.bench import calls
from cuflash.cli import app
from cuflash.cli import check as check_command
from cuflash.errors import CompileError, InvalidArgument


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("cuflash.cli.bench.has_gpu", lambda: False)
    monkeypatch.setattr("cuflash.cli.check.has_gpu", lambda: False)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def no_compiler(monkeypatch):
    def missing() -> None:
        raise CompileError("NVRTC is not here")

    monkeypatch.setattr(cuflash.cli.explain, "version", missing)
    monkeypatch.setattr(cuflash.cli.compile, "version", missing)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Cubins without compiling; `fake.update(...)` changes what they report."""
    report = {"registers": 40, "stack": 0, "spill_stores": 0, "spill_loads": 0, "warnings": ()}

    def compile_kernel(kernel, config, params, arch):
        return jit.Cubin(path=None, kernel=kernel, arch=arch, seconds=0.25, **report)

    monkeypatch.setattr(cuflash.cli.explain, "version", lambda: (13, 0))
    monkeypatch.setattr(cuflash.cli.compile, "version", lambda: (13, 0))
    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(jit, "compile_many", lambda jobs, workers: (compile_kernel(*job) for job in jobs))
    return report


def test_explain_shows_the_choice_and_why_not_the_rest(fake_compiler):
    printed = run("explain", "--device=h100", "--heads=16/4", "--len=1024x4096", "--causal", "--backward")
    assert "backward bf16 b2 h16/4 s1024x4096 d128 causal on NVIDIA H100 (sm_90a)" in printed
    assert "family     sm80" in printed
    for kernel in ("bwd_delta", "bwd_sm80", "bwd_convert"):
        assert kernel in printed
    assert "dq_accum" in printed
    assert "not simt   sm80 comes first" in printed
    # 2 batches, 16 heads, the mean of 3072.5 ... 4096 visible keys a row, 2.5 times 4 * 128
    assert f"{2.5 * 4 * 128 * 2 * 16 * 1024 * (3073 + 4096) / 2 / 1e9:,.2f} G" in printed


def test_explain_says_why_there_are_no_registers(no_compiler):
    printed = run("explain", "--device=h100")
    assert "family     sm90: three consumers" in printed
    assert "at most    100% of the tensor cores' peak" in printed
    assert "registers, spills and stack are known after compiling: NVRTC is not here" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device=v100", "--varlen"], "not sm80   needs sm_80"),
        (["--dtype=fp64"], "not sm80   no fp64 (has fp16, bf16)"),
        (["--dim=320"], "not sm80   dim_qk 320 > 256; dim_v 320 > 256"),
        (["--family=simt"], "family     simt"),
        (["--varlen", "--page-size=16", "--len=100"], "forward bf16 b2 h16 s100x100 d128 varlen pages16"),
        (["bwd_sm80-bf16-d64-window"], "backward bf16 b2 h2 s203x331 d64 window"),
        (["--len=1x900", "--num-splits=3"], "splits     3: asked for"),
        (
            ["--len=1x900", "--heads=16/4", "--num-splits=99"],
            "splits     15: 4 heads share a tile; of 99: one for each",
        ),
        (["--len=1x900", "--heads=4/2"], "splits     13: 2 heads share a tile; 4 blocks for 132 multiprocessors"),
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
        (["--dtype=fp7"], "--dtype 'fp7' is not an element type; expected fp16, bf16, fp32, fp64."),
        (["--heads=5/2"], "--heads '5/2': query heads must be a multiple of key heads."),
        (["--len=4x"], "--len '4x' is not understood; expected one integer or two, as in 4x2."),
        (["--mask", "--causal"], "--mask decides alone"),
        (["--page-size=16"], "--page-size is for packed queries; give --varlen too."),
        (["--device=abacus"], "device 'abacus' is not known"),
        (["fwd_sm80-bf16"], "case 'fwd_sm80-bf16' is not an id; expected one id, for example: fwd_sm80-bf16-d32"),
    ],
)
def test_explain_names_the_option_that_is_wrong(arguments, message):
    with pytest.raises(InvalidArgument) as caught:
        run("explain", *arguments)
    assert message in str(caught.value)


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

    def fake_run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 97)

    monkeypatch.setattr(check_command.shutil, "which", lambda name, path=None: "/tools/compute-sanitizer")
    monkeypatch.setattr(check_command.subprocess, "run", fake_run)
    run("check", "smoke", "--sanitize=racecheck", "--seed=3", status=97)
    [command] = commands
    assert command[:3] == ["/tools/compute-sanitizer", "--tool=racecheck", "--error-exitcode=97"]
    assert command[3:] == [sys.executable, "-m", "cuflash", "check", "smoke", "--seed=3", "--no-pool"]


def test_check_says_what_sanitizing_needs(monkeypatch):
    monkeypatch.setattr(check_command.shutil, "which", lambda name, path=None: None)
    with pytest.raises(InvalidArgument, match="needs the program compute-sanitizer"):
        run("check", "smoke", "--sanitize=memcheck")


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


def test_an_error_ends_the_program_with_its_message_and_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "cuflash", "explain", "--dtype=fp7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == ("InvalidArgument: --dtype 'fp7' is not an element type; expected fp16, bf16, fp32, fp64.\n")
    assert done.stdout == ""
