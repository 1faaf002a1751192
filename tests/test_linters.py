"""A commit is held to one form wherever it is looked at: by its author's hooks and by ``.ci/run``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pins(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"(ruff|clang-format)==([\d.]+)", text))


def test_hooks_and_ci_run_one_version_of_each_linter() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert pins("\n".join(extras["dev"])) == pins(hooks)
    assert {name for name, _ in pins(hooks)} == {"ruff", "clang-format"}
