"""Launches -> a CUDA graph, which is launched by one call."""

from __future__ import annotations

from collections.abc import Callable


def record(launch: Callable[[int], object]) -> Callable[[int], None]:
    """Record what is launched on a stream, by its handle, and return what launches all of it on another by one call.

    Call where launches for the GPU belong. Parameters are those of now; memory that the launches use is the caller's to
    keep.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be recorded
    stream.begin_capture()
    try:
        launch(stream.ptr)
    finally:
        graph = stream.end_capture()
    start, executable = cupy.cuda.runtime.graphLaunch, graph.graphExec

    def replay(stream: int) -> None:
        start(executable, stream)

    replay.graph = graph  # type: ignore[attr-defined]  # destroys what is replayed when it goes
    return replay
