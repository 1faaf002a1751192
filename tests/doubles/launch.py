"""The whole path of a GPU call without a GPU.

What a GPU would do is replaced at its edges only: allocation, the current device, and the launch, which runs the kernel
by ``host``. Checks, plans, parameter blocks and the cache of prepared calls are the real ones.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from host import build, run

from cuflash import arrays, device, jit
from cuflash.adapters.torch.tensors import Torch
from cuflash.arrays import CuPy
from cuflash.ops import launch
from cuflash.plan import Step
from cuflash.plan.config import Written
from doubles.arrays import FAKE_TORCH, as_cupy, as_torch, to_numpy_dtype

needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")


@dataclass
class Launches:
    """Every launch since the last look."""

    kernels: list[str] = field(default_factory=list)
    params: list[np.ndarray] = field(default_factory=list)
    loaded: list[tuple[str, int]] = field(default_factory=list)
    allocated: list[np.ndarray] = field(default_factory=list)
    recording: list[tuple[str, Callable[[], None]]] | None = None
    """What a graph is to hold that is recorded now: kernels, and what runs each."""
    repeated: tuple[Iterator[np.ndarray], Iterator[np.ndarray]] | None = None
    """Parameter blocks and allocations that are to come again."""

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run no kernel, but ask for the parameter blocks of the calls so far, in the memory that they were given."""
        blocks, arrays = self.repeated = iter(self.params[:]), iter(self.allocated[:])
        yield
        assert not list(blocks) and not list(arrays), "these calls launched or allocated less"
        self.repeated = None

    def take(self) -> list[str]:
        taken, self.kernels = self.kernels, []
        return taken


@contextmanager
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Where calls on arrays of a GPU are answered without one."""
    seen = Launches()

    def load(steps: Sequence[Step], ordinal: int, written: Written | None = None) -> list[SimpleNamespace]:
        return [load_one(step, ordinal, written) for step in steps]

    def load_one(step: Step, ordinal: int, written: Written | None) -> SimpleNamespace:
        seen.loaded.append((step.kernel, ordinal))

        def go(num_blocks: int, params: ctypes.Array, stream: object = None) -> None:
            struct = jit.params.dtype(step.params, getattr(step.config, "written", None))
            block = np.frombuffer(params, np.uint8)[jit.params.first_byte(step.config, written) :]
            (block,) = blocks = block[: struct.itemsize].view(struct)
            assert num_blocks == step.num_blocks
            if seen.recording is not None:
                kept = blocks.copy()[0]  # a graph has the parameters of when it was recorded
                seen.recording.append((step.kernel, lambda: run.launch(step, kept)))
                return
            seen.kernels.append(step.kernel)
            seen.params.append(blocks)
            if seen.repeated is None:
                run.launch(step, block)
            else:
                before = next(seen.repeated[0])
                assert blocks.dtype == before.dtype and blocks.tobytes() == before.tobytes()

        return SimpleNamespace(launch=go, of=lambda num_blocks: partial(go, num_blocks))

    def record(launch: Callable[[object], object]) -> Callable[[object], None]:
        graph = seen.recording = []
        launch("another stream")
        seen.recording = None

        def replay(stream: object) -> None:
            for kernel, again in graph:
                seen.kernels.append(kernel)
                again()

        return replay

    def allocate(byte: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if seen.repeated is not None:
            x = next(seen.repeated[1])
            assert (x.shape, x.dtype) == (shape, dtype)
            return x
        x = np.full(math.prod(shape) * dtype.itemsize, byte, np.uint8).view(dtype).reshape(shape)
        seen.allocated.append(x)
        return x

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(jit, "record", record)
    monkeypatch.setattr(device, "current", lambda ordinal: device.named("a100"))
    monkeypatch.setattr(launch, "_prepared", {})
    for framework, wrap in ((CuPy, as_cupy), (Torch, as_torch)):
        monkeypatch.setattr(framework, "elsewhere", lambda self, ordinal: None)
        monkeypatch.setattr(framework, "launch_stream", lambda self, ordinal: None)
        monkeypatch.setattr(framework, "allocator", arrays.Launcher.allocator)
        monkeypatch.setattr(framework, "scratch", arrays.Launcher.scratch)
        monkeypatch.setattr(framework, "is_capturing", lambda self: False)
        monkeypatch.setattr(framework, "stream", lambda self: (0, None))  # nothing is kept for it
        monkeypatch.setattr(framework, "moved", lambda self, x, beside, wrap=wrap: wrap(np.array(x)))
        for name, byte in (("empty", 0xFF), ("zeros", 0)):  # NaN, where a kernel leaves something unwritten
            monkeypatch.setattr(
                framework, name,
                lambda self, shape, dtype, ordinal, byte=byte, wrap=wrap: wrap(
                    allocate(byte, shape, to_numpy_dtype(dtype))
                ),
            )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", FAKE_TORCH)
    arrays.framework_of_type.cache_clear()
    arrays._torch_tensors.cache_clear()
    yield seen
    arrays.framework_of_type.cache_clear()
    arrays._torch_tensors.cache_clear()
