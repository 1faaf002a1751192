"""What ``import cuflash`` shows, in a shell and in a notebook."""

from __future__ import annotations

import html
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cuflash
from cuflash.dtypes import BF16

ROOT = Path(__file__).parent.parent


def test_dir_shows_what_is_public() -> None:
    shown = {name for name in dir(cuflash) if not name.startswith("_")}
    assert shown == set(cuflash.__all__) >= {"Problem", "Mask", "Explanation", "flash_attn_func"}
    assert not shown & {"api", "ops", "plan", "jit", "arrays", "TYPE_CHECKING"}
    assert all(hasattr(cuflash, name) for name in dir(cuflash))


def test_version_is_that_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"7.8 of {name}")
    assert cuflash.__version__ == "7.8 of cuflash"


def test_version_of_sources_that_are_not_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert cuflash.__version__ == "0+unknown"


def test_import_does_not_look_for_the_version() -> None:
    code = "import sys, cuflash; print('importlib.metadata' in sys.modules); cuflash.__version__; cuflash.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
    assert done.stderr.strip().endswith("AttributeError: module 'cuflash' has no attribute 'nothing'")


def test_attention_over_devices_is_loaded_when_it_is_asked_for() -> None:
    code = (
        "import sys, cuflash; print('cuflash.parallel' in sys.modules); print(cuflash.parallel.ring_attention.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "ring_attention"]


def explanation(**changes: int) -> cuflash.Explanation:
    sizes = {"batch": 1, "heads_q": 8, "heads_kv": 2, "len_q": 1024, "len_kv": 1024, "dim_qk": 64, "dim_v": 64}
    problem = cuflash.Problem("forward", BF16, **(sizes | changes), mask=cuflash.Mask(right=0))
    return cuflash.explain(problem, device="h100")


def test_explanation_is_short_as_a_value_and_whole_when_shown() -> None:
    report = explanation()
    assert len(str(report)) > 3 * len(repr(report))
    assert (
        repr(report) == "<Explanation: forward bf16 b1 h8/2 s1024x1024 d64 causal on NVIDIA H100 (sm_90a), family sm90>"
    )
    assert report.plan is not None and report.plan.steps[0].kernel in str(report)
    shown = html.unescape(re.sub(r"<[^>]*>", "", report._repr_html_()))
    assert shown.split() == str(report).split()


def test_explanation_of_what_no_kernel_runs() -> None:
    report = explanation(dim_qk=5000, dim_v=5000)
    assert report.plan is None and repr(report).endswith(", no kernel family>") and all(report.why_not.values())
