"""What a run leaves out, and says so: cases of large groups, tests that need a GPU; a hypothesis profile; a fixture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from doubles.launch import Launches

settings.register_profile("cuflash", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("cuflash")

_MOST_PROCESSES = 16

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: more threads would spin on cores that the others need
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy, which reads it, is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case of the groups of which a sample runs otherwise")


def samples(config: pytest.Config) -> bool:
    """Whether nobody has said what to run."""
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, told by the first one
        return config.workerinput["samples"]
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    return not (named or config.option.all)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    node.workerinput["samples"] = samples(node.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One a core; none beside this process for single tests, and where there is a GPU, which they would share."""
    if any("::" in argument for argument in config.args):
        return 0
    if "not gpu" not in config.option.markexpr and why_no_gpu() is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_PROCESSES)


@pytest.fixture(scope="session", autouse=True)
def no_width() -> Iterator[None]:
    """Processes of pytest-xdist are told the width of the terminal, to which the command line would fit its tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """A GPU without one."""
    from doubles.launch import on_the_cpu

    with on_the_cpu(monkeypatch) as launches:
        yield launches


def pytest_report_header(config: pytest.Config) -> str:
    if samples(config):
        return "cuflash: of some groups of like cases a sample runs; --all runs every case, as does naming files or -k"
    return "cuflash: every case of every group runs"


def why_no_gpu() -> str | None:
    """Return why no kernel can be launched here, or None when one can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    return None if count else "no GPU is visible"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if samples(config):
        leave_out(config, items)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    reason = why_no_gpu()
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all but the first and every nth after it of a test's cases that are marked ``sample(n)``."""
    kept, left_out, seen = [], [], Counter()
    for item in items:
        mark = item.get_closest_marker("sample")
        if mark is None:
            kept.append(item)
            continue
        test = item.nodeid.partition("[")[0]
        (left_out if seen[test] % mark.args[0] else kept).append(item)
        seen[test] += 1
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)
