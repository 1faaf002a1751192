"""What a run of the suite leaves out, by the rules in conftest.py, on a suite of a score of tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from covering import sampled

TESTS = """
import os
import pytest

@pytest.mark.sample(4)
@pytest.mark.parametrize("case", range(10))
def test_group(case): pass

@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.sample(3)] * (n != 1)) for n in range(6)])
def test_some(case): pass

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
    has_gpu(tmp_path, "'this machine is one for tests'")
    (tmp_path / "tests" / "test_few.py").write_text(TESTS)
    settings = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings[settings.index("[tool.pytest.ini_options]") :])
    return tmp_path


def has_gpu(suite: Path, why_not: str) -> None:
    rules = (ROOT / "tests" / "conftest.py").read_text()
    (suite / "tests" / "conftest.py").write_text(f"{rules}\n\ndef why_no_gpu():\n    return {why_not}\n")


def run(suite: Path, *arguments: str) -> tuple[str, str, set[str]]:
    """The header line, the last line, and what ran or was skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"COLUMNS": "90", "PYTEST_ADDOPTS": ""}
    output = subprocess.run(command, cwd=suite, capture_output=True, text=True, env=environment).stdout
    (header,) = re.findall("^cuflash: .*", output, re.MULTILINE)
    names = re.findall(r"::(test_\w+(?:\[\d\])?)(?= ).*(?:PASSED|SKIPPED)|(?:PASSED|SKIPPED).*::(\S+)", output)
    return header, output.splitlines()[-1], {a or b for a, b in names}


GROUP = {f"test_group[{case}]" for case in range(10)} | {f"test_some[{case}]" for case in range(6)}
GPU = {f"test_on_a_gpu[{case}]" for case in range(3)}
SAMPLE = {f"test_group[{case}]" for case in (0, 4, 8)} | {f"test_some[{case}]" for case in (0, 1, 4)}


def test_a_sample_runs_unless_somebody_asks_for_all(suite: Path) -> None:
    for processes in "-n0", "-n2":
        header, end, ran = run(suite, processes)
        assert "--all" in header and ran == SAMPLE | {"test_alone"} | GPU
        assert "10 deselected" in end or processes == "-n2"
    header, _, ran = run(suite, "-n0", "--all")
    assert header == "cuflash: every case of every group runs" and ran == GROUP | {"test_alone"} | GPU


@pytest.mark.parametrize("named", ["tests/test_few.py", "-kgroup", "tests/test_few.py::test_group"])
def test_what_is_named_runs_whole(suite: Path, named: str) -> None:
    header, _, ran = run(suite, named, *["-n0"] * ("::" not in named))
    assert header == "cuflash: every case of every group runs" and ran >= {test for test in GROUP if "group" in test}


def test_where_there_is_a_gpu_one_process_runs_all(suite: Path) -> None:
    where, tests = suite / "where.txt", suite / "tests" / "test_few.py"
    note = f"open({str(where)!r}, 'a').write(str(os.getpid()) + chr(10))"
    tests.write_text(tests.read_text().replace("(case): pass", f"(case): {note}"))
    has_gpu(suite, "None")
    for arguments, tests_run in ([], 9), (["-m", "gpu"], 3):
        where.unlink(missing_ok=True)
        run(suite, *arguments)
        ran = where.read_text().split()
        assert len(ran) == tests_run and len(set(ran)) == 1


def test_a_sample_of_cases_has_whatever_any_of_them_has() -> None:
    cases = {f"case{n}": (n, {n % 3, n // 8}) for n in range(24)} | {"alone": (24, {"what no other has"})}
    marks = {case.id: [mark.args for mark in case.marks] for case in sampled(cases, every=5)}
    assert list(marks) == list(cases) and all(args in ([], [(5,)]) for args in marks.values())
    always = [cases[name] for name, args in marks.items() if not args]
    assert len(always) < 8 and set().union(*(held for _, held in always)) == {0, 1, 2, "what no other has"}


def test_no_two_files_of_tests_have_one_name() -> None:
    """Pytest imports files by their names alone, and of two with one name refuses the whole suite."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
