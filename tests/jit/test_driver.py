"""What a launch says beyond how many threads: the bytes that cuLaunchKernelEx is given, without a driver."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cuflash.jit import driver

cupy = pytest.importorskip("cupy")

FUNCTION, STREAM, ARGUMENTS = 0x10, 2**63 + 0x20, 0x30
LAID_OUT = FUNCTION, 264, 128, 70_000


class Launches:
    """A driver that keeps what it is given."""

    def __init__(self) -> None:
        self.status = 0
        self.seen: list[tuple[Any, ...]] = []
        library = SimpleNamespace(cuLaunchKernelEx=self)
        self.library = lambda name: library

    def __call__(self, config: bytes, *others: int) -> int:
        *sizes, stream, address, count = struct.unpack("<7I4xQQI4x", config)
        attributes = ctypes.string_at(address, 72 * count)
        self.seen.append((sizes, stream, [attributes[72 * i : 72 * i + 72] for i in range(count)], others))
        return self.status


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    fake = Launches()
    driver.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", fake.library)
    yield fake
    driver.library.cache_clear()


@pytest.mark.parametrize("cluster", [2, 8])
def test_a_launch_says_what_the_driver_expects(launches: Launches, cluster: int) -> None:
    start = driver.starter(cluster, *LAID_OUT)
    for given in (STREAM, 1):
        start(given, ARGUMENTS, 0)
        sizes, stream, attributes, others = launches.seen.pop()
        assert (sizes, stream, others) == ([264, 1, 1, 128, 1, 1, 70_000], given, (FUNCTION, ARGUMENTS, 0))
        cluster_dimension = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        assert [struct.unpack_from("<I4x3I", x) for x in attributes] == [(cluster_dimension, cluster, 1, 1)]


def test_a_launch_that_fails_raises_as_cupy_does(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):  # CuPy's own asks the driver what a status means
        pass

    monkeypatch.setattr(cupy.cuda.driver, "CUDADriverError", Failed)
    launches.status = 201
    with pytest.raises(Failed, match="201"):
        driver.starter(2, *LAID_OUT)(STREAM, ARGUMENTS, 0)
