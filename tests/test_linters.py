"""A commit is held to one form wherever it is looked at: by its author's hooks and by ``.ci/run``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_ci_runs_the_linters_of_the_hooks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = {pin for pins in re.findall(r"additional_dependencies: \[(.*)\]", hooks) for pin in pins.split(", ")}
    names = [pin.partition("==")[0] for pin in pins]
    assert sorted(names) == ["clang-format", "ruff"], "one version of each"

    steps = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"install -e '\.\[dev\]' \$\((.*)\)$", steps, flags=re.MULTILINE)
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(printed.split()) == pins
    for hook in re.findall(r"entry: (\S+(?: check| format)?)", hooks):
        assert f".venv/bin/{hook} " in steps
