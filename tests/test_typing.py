"""What type checkers say of calls in ``tests/typing``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def checked(*command: str | Path) -> str:
    """What a checker says where it finds something."""
    done = subprocess.run([*map(str, command), "tests/typing"], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_mypy_knows_the_results(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert checked(sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path) == ""


def test_pyright_knows_the_results() -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    if pyright is None:
        pytest.skip("pyright is not installed")
    assert checked(pyright, "--pythonpath", sys.executable) == ""
