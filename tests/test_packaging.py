"""What is in the wheel and the sdist, and that the wheel works outside the checkout."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.plugin.interface import BuilderInterface
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import cuflash.cli

ROOT = Path(__file__).parent.parent
NAME = f"cuflash-{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"


def build(builder: type[BuilderInterface], version: str, folder: Path) -> Path:
    """Build in this process: no isolated environment, no network."""
    [artifact] = builder(str(ROOT)).build(directory=str(folder), versions=[version])
    return Path(artifact)


def python(code: str, *, cwd: Path, path: Path) -> str:
    """Run code in a fresh interpreter that finds `path` first and the checkout not at all."""
    environment = {**os.environ, "PYTHONPATH": str(path), "CUFLASH_CACHE_DIR": str(cwd / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(WheelBuilder, "standard", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's content where no checkout is near."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def sources(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but bytecode, by its path relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_wheel_is_the_package_with_the_kernels_inside(installed):
    package = sources(ROOT / "cuflash")
    kernels = {f"kernels/{name}": content for name, content in sources(ROOT / "kernels").items()}
    assert "py.typed" in package
    assert any(name.startswith("kernels/entry/") for name in kernels)
    assert sources(installed / "cuflash") == package | kernels
    assert {path.name for path in installed.iterdir()} == {"cuflash", f"{NAME}.dist-info"}


def test_the_wheel_runs_outside_the_checkout(installed, tmp_path):
    code = """
import numpy as np, cuflash
from pathlib import Path
q = np.random.default_rng(0).standard_normal((1, 5, 2, 8))
out = cuflash.flash_attn_func(q, q, q, causal=True)
assert np.array_equal(out[:, 0], q[:, 0]), "the first row of causal attention sees its own value only"
print(Path(cuflash.__file__).parent)
"""
    assert Path(python(code, cwd=tmp_path, path=installed).strip()) == installed / "cuflash"


def test_the_wheel_compiles_its_own_kernels(installed, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    code = """
from cuflash import jit, plan
from cuflash.device import named
from cuflash.dtypes import BF16
from cuflash.problem import Problem
problem = Problem("forward", BF16, batch=1, heads_q=1, heads_kv=1, len_q=64, len_kv=64, dim_qk=32, dim_v=32)
device = named("a100")
[step] = plan.choose(problem, device).steps
assert jit.compile_kernel(step.kernel, step.config, step.params, device.arch).registers > 0
print(jit.sources.root())
"""
    assert Path(python(code, cwd=tmp_path, path=installed).strip()) == installed / "cuflash" / "kernels"


def test_every_dependency_has_a_lowest_version_that_ci_can_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    without = [line for line in requirements if not re.fullmatch(r"[\w-]+>=[\d.]+(,<\d+)?|cuflash\[\w+\]", line)]
    assert not without


def test_the_console_script_is_the_command_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["cuflash"].partition(":")
    assert getattr(importlib.import_module(module), function) is cuflash.cli.main
    assert not {"typer", "pydantic"} & {re.split("[>=]", line)[0] for line in project["dependencies"]}


def test_an_editable_install_copies_nothing(tmp_path):
    with zipfile.ZipFile(build(WheelBuilder, "editable", tmp_path)) as archive:
        files = [name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")]
        assert files == ["_cuflash.pth"]
        assert Path(archive.read("_cuflash.pth").decode().strip()) == ROOT


def test_the_sdist_is_the_repository(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-per-directory=.gitignore"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    repository = {name for name in names if name and (ROOT / name).is_file()}
    with tarfile.open(build(SdistBuilder, "standard", tmp_path)) as archive:
        content = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    assert content == repository | {"PKG-INFO"}
