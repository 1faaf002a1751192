"""Several devices of one CPU, as JAX has them in a process that is told so before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def _flag(count: int) -> str:
    return f"--xla_force_host_platform_device_count={count}"


def has_devices(count: int) -> bool:
    """Whether this process was told to have so many."""
    return _flag(count) in os.environ.get("XLA_FLAGS", "")


def run_with_devices(file: str, count: int) -> None:
    """Run a file of tests, of which one is skipped there as "is what starts this process", in such a process."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-rs", file]
    environment = os.environ | {"XLA_FLAGS": _flag(count), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 skipped" in done.stdout and "is what starts this process" in done.stdout
