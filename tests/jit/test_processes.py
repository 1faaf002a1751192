"""Forked processes, threads beside a fork, archives, and settings that are read where the process has moved."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuflash import arrays, settings
from cuflash.jit import cache, compile, sources

ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def run(code: str, folder: Path = ROOT, **environment: str) -> Any:
    """What a script in a folder prints, as JSON, within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IN_CHILDREN = """
import json, os, sys, threading, time
import numpy as np
import cuflash
from cuflash.generator import default_generator

def in_child(work):
    # The result of a forked process, which ends after ten seconds whatever it does.
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        said = os.fdopen(reader).read()
        assert os.waitpid(child, 0)[1] == 0, "the child failed"
        return json.loads(said)
    import signal
    signal.alarm(10)
    try:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    finally:
        os._exit(1)
"""


@needs_fork
def test_forked_processes_draw_differently() -> None:
    code = (
        IN_CHILDREN
        + """
cuflash.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
mine = cuflash.PhiloxGenerator(7, 8)
x = np.ones((1, 40, 2, 8), np.float32)

def draw():
    kept = np.packbits(cuflash.flash_attn_func(x, x, x, 0.5, return_attn_probs=True)[2].view(np.uint32) >> 31 == 0)
    return [kept.tobytes().hex()[:64], list(default_generator.state), list(mine.state)]

def nested():
    return [draw(), in_child(draw)]

print(json.dumps([in_child(draw), in_child(draw), *in_child(nested), draw()]))
"""
    )
    first, again = run(code), run(code)
    assert first == again, "what a seed and the order of forks decide"
    assert len({drawn for drawn, _, _ in first}) == len(first) == 5
    assert len({tuple(state) for _, state, _ in first}) == 5
    assert all(own == [7, 8] for _, _, own in first), "a generator that was made is as it was"


@needs_fork
def test_a_fork_beside_a_thread_that_draws() -> None:
    code = (
        IN_CHILDREN
        + """
mine, stop = cuflash.PhiloxGenerator(7), threading.Event()

def draw():
    while not stop.is_set():
        default_generator.next(4), mine.next(4)

threads = [threading.Thread(target=draw) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(60):
    default_generator._lock.acquire(), mine._lock.acquire()  # as a thread may that is stopped in its draw
    threading.Timer(0.005, lambda: (default_generator._lock.release(), mine._lock.release())).start()
    in_child(lambda: (default_generator.next(4), mine.next(4)))
stop.set()
[thread.join() for thread in threads]
print(json.dumps("done"))
"""
    )
    assert run(code) == "done"


@needs_fork
def test_numpy_arrays_in_a_process_forked_from_one_that_has_computed() -> None:
    code = (
        IN_CHILDREN
        + """
x = np.random.default_rng(0).standard_normal((2, 300, 4, 32)).astype(np.float32)

def total():
    out, pullback = cuflash.flash_attn_vjp(x, x, x, causal=True)
    return [float(np.abs(y).sum()) for y in (out, *pullback(x))]

print(json.dumps([total(), in_child(total)]))
"""
    )
    mine, theirs = run(code)
    assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("value", ["", "0", "false", "False", "NO", "off", " 0 "])
def test_what_turns_debugging_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUFLASH_DEBUG", value)
    assert settings.read().debug is False


@pytest.mark.parametrize("value", ["1", "true", "yes", "on"])
def test_what_turns_debugging_on(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUFLASH_DEBUG", value)
    assert settings.read().debug is True


def test_a_relative_cache_stays_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", f"kernels of {tmp_path.name}")
    place = cache.root()
    assert place == tmp_path / f"kernels of {tmp_path.name}"
    monkeypatch.chdir("elsewhere")
    assert cache.root() == place
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "~/kernels")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings._absolute.cache_clear()
    assert cache.root() == tmp_path / "kernels"


def test_a_package_in_an_archive_says_what_it_cannot_do(tmp_path: Path) -> None:
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted((ROOT / "cuflash").rglob("*.py")):
            made.write(path, path.relative_to(ROOT).as_posix())
        for path in sorted(sources.root().rglob("*.cu*")):
            made.write(path, f"cuflash/kernels/{path.relative_to(sources.root()).as_posix()}")
    code = """
import json
import numpy as np
import cuflash
from cuflash import jit
x = np.ones((1, 5, 2, 8), np.float32)
errors = []
for call in (jit.sources.root, lambda: jit.params.dtype("FwdParams"), lambda: jit.sources.gather("fwd_sm80", {})):
    try:
        call()
    except cuflash.CompileError as error:
        errors.append(str(error))
print(json.dumps([cuflash.__file__, float(cuflash.flash_attn_func(x, x, x).sum()), errors]))
"""
    place, total, errors = run(code, tmp_path, PYTHONPATH=str(archive))
    assert place.startswith(str(archive)) and total == 5 * 2 * 8
    assert errors == 3 * [
        f"cuflash is imported from {archive / 'cuflash'}, where there is no folder of kernels to compile; NumPy arrays "
        "alone can be computed. Install cuflash, or unpack the archive that it is imported from."
    ]


class Inputs:
    """What a call borrowed."""


class Event:
    """An event of a stream, which happens when the test says so."""

    def __init__(self, **_: Any) -> None:
        self.happened = threading.Event()

    def record(self) -> None:
        recorded.append(self)

    def synchronize(self) -> None:
        self.happened.wait(30)


recorded: list[Event] = []


def test_inputs_of_guests_go_when_their_kernels_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = []
    monkeypatch.setattr(arrays, "cupy_module", lambda: SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    monkeypatch.setattr(arrays, "cupy_arrays", lambda: SimpleNamespace(is_capturing=lambda: bool(capturing)))
    guest = arrays.Guest("foreign", lambda x: x)
    result = SimpleNamespace(device=nullcontext())

    def call() -> weakref.ref[Inputs]:
        inputs = Inputs()
        assert guest.lend([result], [inputs]) == (result,)
        return weakref.ref(inputs)

    def gone(inputs: weakref.ref[Inputs]) -> bool:
        gc.collect()
        return inputs() is None

    first, second = call(), call()
    assert not gone(first) and not gone(second)
    for event, inputs in zip(recorded, (first, second), strict=True):
        event.happened.set()
        deadline = threading.Event()
        for _ in range(200):
            if gone(inputs):
                break
            deadline.wait(0.05)
        assert gone(inputs), "without another call"
    capturing.append(True)
    assert gone(call()) and len(recorded) == 2, "an event of a graph cannot be waited for"


def test_a_cubin_names_the_build_of_its_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(cache, "read", lambda folder: asked.append(folder))
    monkeypatch.setattr(compile, "check_arch", lambda arch: None)
    monkeypatch.setattr(compile, "_nvrtc", lambda *_: (b"", ""))
    monkeypatch.setattr(cache, "publish", lambda folder, *_: folder)
    monkeypatch.setattr(compile, "version", lambda: (13, 0))
    config = compile.Config(threads=32)
    for build in ("13.0.48", "13.0.88", "13.0.48"):
        monkeypatch.setattr(compile, "build", lambda build=build: build)
        compile.compile_kernel("fwd_rng", config, "FwdParams", "sm_80")
    assert asked[0] == asked[2] != asked[1]


def test_which_build_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, real = tmp_path / "libnvrtc.so.13", Path.read_text
    maps = f"7f00-7f01 r--p 00000000 00:00 1    /lib/libc.so.6\n7f02-7f03 r-xp 00000000 00:00 2    {library}\n"
    monkeypatch.setattr(compile, "version", lambda: (13, 0))
    monkeypatch.setattr(Path, "read_text", lambda self, *a: maps if str(self) == "/proc/self/maps" else real(self, *a))
    builds = []
    for content in (b"a" * 10**6, b"b" + b"a" * (10**6 - 1), b"a" * (10**6 + 1), b"a" * 10**6):
        library.write_bytes(content)
        compile.build.cache_clear()
        builds.append(compile.build())
    library.unlink()
    compile.build.cache_clear()
    assert compile.build() == ""
    compile.build.cache_clear()
    assert builds[0] == builds[3] and len({*builds}) == 3
