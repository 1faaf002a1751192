"""Every example, and the README's quickstart, runs to its end without a GPU; each asserts what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import cuflash

ROOT = Path(__file__).parents[2]

CLAIMS = {
    "01_quickstart.py": ["on numpy arrays: (2, 300, 4, 64) float32", "largest difference from softmax"],
    "02_training_step.py": ["attention of float32 elements", "the curves are", "tokens/s with cuflash"],
    "03_variable_length.py": ["400 rows, where padding would need 1200", "other sequences unchanged to the bit: True"],
    "04_decode_loop.py": ["40 steps for 3 prompts", "as many as there are tokens: True"],
    "05_score_features.py": ["ALiBi  ", "sinks  ", "with seed 7", "all of them at once  "],
    "06_jax_training_step.py": ["weights on 1 cpu", "the curves are", "tokens/s with cuflash"],
    "07_torch_training_step.py": ["weights on cpu", "the curves are", "tokens/s with cuflash"],
    "08_look_inside.py": ["struct Config", "fwd_sm90: ", "bwd_sm90: ", " registers a thread"],
    "09_long_context.py": [
        "2,048 tokens on 4 cpu devices",
        "ring_attention",
        "all_to_all_attention",
        "repeats to the bit: True",
    ],
    "pair_bias.py": ["gradients in float32 are within", "written out in float64", "hidden distances are off by"],
    "10_written_scores.py": ["what it becomes: ", "a mask of one's own  ", "learned to look [1, 4, 7, 10] rows back"],
}

_FEW = ["--steps", "40", "--batch", "4", "--length", "64", "--width", "32"]
FEWER = {"02_training_step.py": _FEW, "06_jax_training_step.py": _FEW, "07_torch_training_step.py": _FEW}
FEWER["pair_bias.py"] = ["--steps", "6", "--length", "12"]
"""Options of examples that take a minute without."""


def run(*arguments: str, cwd: Path, path: Sequence[str] = ()) -> str:
    """Run Python with this cuflash, and what else is on the path, where no GPU is visible."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(cuflash.__file__).parent.parent), *path]),
        "CUDA_VISIBLE_DEVICES": "",
        "CUFLASH_CACHE_DIR": str(cwd),
        "OPENBLAS_NUM_THREADS": "1",  # more would wait for each other by spinning while other tests have the cores
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_numbered_example_is_here_and_no_number_is_left_out():
    numbered = [name for name in CLAIMS if name[0].isdigit()]
    assert {path.name for path in (ROOT / "examples").glob("[0-9]*.py")} == {*numbered}
    assert [int(name[:2]) for name in numbered] == list(range(1, 11))


@pytest.mark.parametrize("name", CLAIMS)
def test_an_example_proves_what_it_says(name, tmp_path):
    if name == "08_look_inside.py":
        pytest.importorskip("cupy", reason="compiling needs CuPy")
    if "torch" in name:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    if "jax" in name or name == "09_long_context.py":
        pytest.importorskip("jax", reason="JAX is not installed")
    printed = run(str(ROOT / "examples" / name), *FEWER.get(name, []), cwd=tmp_path)
    for claim in CLAIMS[name]:
        assert claim in printed


def test_looking_inside_needs_no_compiler(tmp_path):
    """The environment of the README's first command has no CuPy."""
    (tmp_path / "cupy.py").write_text("raise ImportError('no CuPy here')")
    printed = run(str(ROOT / "examples" / "08_look_inside.py"), cwd=tmp_path, path=[str(tmp_path)])
    for claim in ("fwd_sm90", "bwd_sm90", "struct Config", "fwd_sm90 is not compiled", "no CuPy here", ".[cuda13]"):
        assert claim in printed


def test_the_readme_quickstart(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    run("-c", code + "assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)", cwd=tmp_path)
