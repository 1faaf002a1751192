"""Launches recorded in a graph: by which calls of CuPy, and that a recording that fails ends."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from cuflash import jit


class Graph:
    """What CuPy destroys when nothing holds it."""

    graphExec = 77  # as CuPy has it


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of a CuPy that has one stream and one graph."""
    seen: list[Any] = []

    class Stream:
        ptr = 5

        def __init__(self, non_blocking: bool) -> None:
            assert non_blocking, "CUDA records no default stream, nor what waits for one"

        def begin_capture(self) -> None:
            seen.append("begin")

        def end_capture(self) -> Graph:
            seen.append("end")
            return Graph()

    runtime = SimpleNamespace(graphLaunch=lambda graph, stream: seen.append((graph, stream)))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Stream=Stream)))
    return seen


def test_what_is_launched_is_recorded_and_replayed_on_other_streams(calls: list[Any]) -> None:
    replay = jit.record(lambda stream: calls.append(("kernels", stream)))
    assert calls == ["begin", ("kernels", 5), "end"]
    replay(8), replay(9)
    assert calls[3:] == [(77, 8), (77, 9)]


def test_a_graph_lives_as_long_as_what_replays_it(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    monkeypatch.setattr(Graph, "__init__", lambda self: alive.append(weakref.ref(self)), raising=False)
    replay = jit.record(lambda stream: None)
    gc.collect()
    assert alive[0]() is not None
    del replay
    gc.collect()
    assert alive[0]() is None


def test_a_recording_that_fails_ends(calls: list[Any]) -> None:
    def launch(stream: int) -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        jit.record(launch)
    assert calls == ["begin", "end"]
