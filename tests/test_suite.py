"""What a run of the suite leaves out, by the rules in conftest.py, on a suite of a dozen tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os
import pytest

@pytest.mark.sample(4)
@pytest.mark.parametrize("case", range(10))
def test_group(case): pass

def test_alone():
    assert "COLUMNS" not in os.environ

@pytest.mark.gpu
@pytest.mark.parametrize("case", range(3))
def test_on_a_gpu(case): pass
"""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "tests" / "test_few.py").write_text(TESTS)
    settings = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings[settings.index("[tool.pytest.ini_options]") :])
    return tmp_path


def run(suite: Path, *arguments: str) -> tuple[str, str, set[str]]:
    """The header line, the last line, and what ran or was skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"COLUMNS": "90"}
    output = subprocess.run(command, cwd=suite, capture_output=True, text=True, env=environment).stdout
    (header,) = re.findall("^cuflash: .*", output, re.MULTILINE)
    names = re.findall(r"::(test_\w+(?:\[\d\])?)(?= ).*(?:PASSED|SKIPPED)|(?:PASSED|SKIPPED).*::(\S+)", output)
    return header, output.splitlines()[-1], {a or b for a, b in names}


GROUP, GPU = {f"test_group[{case}]" for case in range(10)}, {f"test_on_a_gpu[{case}]" for case in range(3)}
SAMPLE = {"test_group[0]", "test_group[4]", "test_group[8]"}


@pytest.mark.parametrize("processes", [["-n0"], ["-n2"]], ids=["one", "two"])
def test_a_sample_runs_unless_somebody_asks_for_all(suite: Path, processes: list[str]) -> None:
    header, end, ran = run(suite, *processes)
    assert "--all" in header and ran == SAMPLE | {"test_alone"} | GPU
    assert "7 deselected" in end or processes != ["-n0"]
    header, _, ran = run(suite, "--all", *processes)
    assert header == "cuflash: every case of every group runs" and ran == GROUP | {"test_alone"} | GPU


@pytest.mark.parametrize("named", [["tests/test_few.py"], ["-k", "group"], ["tests/test_few.py::test_group"]], ids=str)
def test_what_is_named_runs_whole(suite: Path, named: list[str]) -> None:
    header, _, ran = run(suite, *named)
    assert header == "cuflash: every case of every group runs" and ran >= GROUP


def test_where_there_is_a_gpu_one_process_runs_all(suite: Path) -> None:
    where, tests, conftest = suite / "where.txt", suite / "tests" / "test_few.py", suite / "tests" / "conftest.py"
    note = f"open({str(where)!r}, 'a').write(str(os.getpid()) + chr(10))"
    tests.write_text(tests.read_text().replace("(case): pass", f"(case): {note}"))
    conftest.write_text(f"{conftest.read_text()}\n\ndef why_no_gpu():\n    return None\n")
    for arguments, tests_run, processes in ([], 6, {1}), (["-m", "gpu"], 3, {1}), (["-m", "not gpu", "-n2"], 3, {1, 2}):
        where.unlink(missing_ok=True)
        run(suite, *arguments)
        ran = where.read_text().split()
        assert len(ran) == tests_run and len(set(ran)) in processes
