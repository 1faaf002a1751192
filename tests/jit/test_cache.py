"""The cubin cache: what its key depends on, and that nothing a disk or another process does breaks a call."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nvrtc import needs_nvrtc

from cuflash import explain, jit
from cuflash.cases.table import matrix
from cuflash.errors import CompileError
from cuflash.jit import cache, compile, sources
from cuflash.plan.config import Config
from cuflash.plan.steps import DeltaConfig

DELTA = DeltaConfig(element="float", dim_v=64, threads=128, tile_q=64, copy_bytes=16)
"""A config of ``bwd_delta``, the kernel that compiles fastest."""
CUBIN = bytes(range(256)) * 40
REPORT = {"kernel": "fwd_simt", "arch": "sm_80", "registers": 77, "warnings": []}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a process that has not warned or fallen back yet."""
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUFLASH_DEBUG", raising=False)
    monkeypatch.setattr(cache, "_moved", {})
    cache._warn.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def stored() -> Path:
    """The folder of one sound kernel."""
    folder = cache.folder("fwd_simt-fp32-d64", hashlib.sha256(b"one").hexdigest())
    cache.publish(folder, CUBIN, REPORT, "struct Config {};")
    return folder


# The key


def key_of(kernel: str, config: Config, arch: str, root: Path | None = None) -> str:
    """The key as compile_kernel makes it, over the sources below `root`."""
    files = sources.gather(kernel, jit.render.headers(kernel, config, "BwdParams"), root)
    return cache.key(files, (*compile.flags_for(arch), *compile.version()))


@pytest.fixture
def nvrtc_13_5(monkeypatch) -> None:
    monkeypatch.setattr(compile, "version", lambda: (13, 5))


@pytest.fixture
def kernels(tmp_path) -> Path:
    """A copy of the kernel sources that a test may edit."""
    return Path(shutil.copytree(sources.root(), tmp_path / "kernels"))


def test_key_is_stable(nvrtc_13_5):
    assert key_of("bwd_delta", DELTA, "sm_80") == key_of("bwd_delta", DELTA, "sm_80")


def test_key_depends_on_every_byte_of_every_header_reached(nvrtc_13_5, kernels):
    before = key_of("bwd_delta", DELTA, "sm_80", kernels)
    reached = set(sources.gather("bwd_delta", jit.render.headers("bwd_delta", DELTA, "BwdParams"))) - {
        "config.cuh",
        "layout.cuh",
    }
    assert {"entry/bwd_delta.cu", "backward/delta.cuh", "std.cuh", "ptx/sync.cuh"} <= reached
    for name in reached:
        text = (kernels / name).read_bytes()
        (kernels / name).write_bytes(text[:-1] + b" ")
        assert key_of("bwd_delta", DELTA, "sm_80", kernels) != before, name
        (kernels / name).write_bytes(text)
    assert key_of("bwd_delta", DELTA, "sm_80", kernels) == before


def test_key_ignores_files_that_are_not_included(nvrtc_13_5, kernels):
    before = key_of("bwd_delta", DELTA, "sm_80", kernels)
    for name in ("README.md", "forward/sm80.cuh", "entry/fwd_simt.cu", "new.cuh"):
        with (kernels / name).open("a") as file:
            file.write("// edited\n")
    assert key_of("bwd_delta", DELTA, "sm_80", kernels) == before


def test_key_depends_on_config_arch_entry_flags_and_nvrtc(nvrtc_13_5, monkeypatch):
    keys = [
        key_of("bwd_delta", DELTA, "sm_80"),
        key_of("bwd_delta", replace(DELTA, dim_v=65), "sm_80"),
        key_of("bwd_delta", DELTA, "sm_86"),
        key_of("bwd_delta", DELTA, "sm_90"),
        key_of("bwd_delta", DELTA, "sm_90a"),
        key_of("bwd_convert", DELTA, "sm_80"),
    ]
    monkeypatch.setenv("CUFLASH_DEBUG", "1")
    assert "-DCF_DEBUG" in compile.flags_for("sm_80")
    keys.append(key_of("bwd_delta", DELTA, "sm_80"))
    monkeypatch.delenv("CUFLASH_DEBUG")
    for version in ((13, 6), (12, 8), (14, 5)):
        monkeypatch.setattr(compile, "version", lambda version=version: version)
        keys.append(key_of("bwd_delta", DELTA, "sm_80"))
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    keys.append(key_of("bwd_delta", DELTA, "sm_80"))
    assert len(set(keys)) == len(keys)


def test_key_depends_on_the_policies_that_a_kernel_has_and_no_others():
    steps = {step.kernel: step for _, _, step in matrix()}
    reached = {
        kernel: set(sources.gather(kernel, jit.render.headers(kernel, step.config, step.params)))
        for kernel, step in steps.items()
    }
    for header, readers in {
        "tile/bias.cuh": {
            "fwd_sm90",
            "fwd_sm90_wide",
            "bwd_sm90",
            "bwd_sm90_wide",
            "bwd_sm90_short",
            "bwd_sm90_sliced",
            "bwd_sm90_listed",
        },
        "tile/dq_accum.cuh": {
            "bwd_sm90",
            "bwd_sm90_wide",
            "bwd_sm90_short",
            "bwd_sm90_sliced",
            "bwd_sm90_listed",
            "bwd_sm80",
            "bwd_convert",
        },
        "attention/score.cuh": steps.keys()
        - {"fwd_rng", "bwd_delta", "bwd_convert", "bwd_convert_sm90", "bwd_bias_sum", "bwd_captured"}
        - {"cache_append", "fwd_merge", "bwd_merge"},
    }.items():
        assert {kernel for kernel, names in reached.items() if header in names} == readers, header


def test_key_knows_where_one_file_ends():
    assert cache.key({"a": b"xy", "b": b""}, ()) != cache.key({"a": b"x", "b": b"y"}, ())
    assert cache.key({"a": b"x"}, ()) != cache.key({"b": b"x"}, ())


# Reading back and repairing


def test_a_published_kernel_is_read_back(stored):
    path, report = cache.read(stored)
    assert path.read_bytes() == CUBIN
    assert report == REPORT
    assert (stored / "config.cuh").read_text() == "struct Config {};"
    assert sorted(os.listdir(stored.parent)) == [stored.name]


def truncate(folder: Path) -> None:
    (folder / "kernel.cubin").write_bytes(CUBIN[:-1])


def empty_cubin(folder: Path) -> None:
    (folder / "kernel.cubin").write_bytes(b"")


def no_cubin(folder: Path) -> None:
    (folder / "kernel.cubin").unlink()


def no_report(folder: Path) -> None:
    (folder / "report.json").unlink()


def other_digest(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"report": REPORT, "sha256": "0" * 64}))


def other_report(folder: Path) -> None:
    text = (folder / "report.json").read_text()
    (folder / "report.json").write_text(text.replace('"registers": 77', '"registers": 78'))


def no_digest(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"report": REPORT}))


def not_json(folder: Path) -> None:
    (folder / "report.json").write_bytes(b"{\xff")


def not_an_object(folder: Path) -> None:
    (folder / "report.json").write_text("[1, 2]")


def a_string(folder: Path) -> None:
    (folder / "report.json").write_text('"sha256"')


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def another_kernel(folder: Path) -> None:
    other = cache.folder("fwd_simt-fp32-d64", "0" * 64)
    cache.publish(other, CUBIN, REPORT, "")
    shutil.rmtree(folder)
    other.rename(folder)


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def broken_link_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


DAMAGES = (truncate, empty_cubin, no_cubin, no_report, other_report, other_digest, no_digest, not_json, not_an_object)
DAMAGES += (a_string, another_kernel, empty_folder, file_instead, broken_link_instead)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_counts_as_absent_and_is_replaced(stored, damage):
    damage(stored)
    assert cache.read(stored) is None
    assert list(cache.entries()) == []
    path = cache.publish(stored, CUBIN + b"new", REPORT, "")
    assert path == stored / "kernel.cubin"
    assert cache.read(stored) == (path, REPORT)
    assert path.read_bytes() == CUBIN + b"new"
    assert os.listdir(stored.parent) == [stored.name]


def test_a_sound_kernel_is_not_replaced(stored):
    path = cache.publish(stored, CUBIN + b"late", REPORT, "")
    assert path.read_bytes() == CUBIN
    assert cache.read(stored) is not None


def _publish_all(folders: list[Path], meeting: Path, number: int, workers: int) -> list[tuple[bool, bytes]]:
    """In another process: publish each kernel as soon as all processes are there; what can be read afterwards."""
    warnings.simplefilter("error")
    (meeting / str(number)).touch()
    while len(os.listdir(meeting)) < workers:
        pass
    results = []
    for folder in folders:
        path = cache.publish(folder, CUBIN, {**REPORT, "seconds": number}, "")
        results.append((cache.read(folder) is not None, path.read_bytes()))
    return results


def test_processes_publish_at_once(tmp_path, cache_dir):
    damages = (None, truncate, file_instead, empty_folder)
    folders = [cache_dir / f"fwd_simt-fp32-d64-{number:012x}" for number in range(80)]
    for folder, damage in zip(folders, damages * 20, strict=True):
        if damage:
            cache.publish(folder, CUBIN, REPORT, "")
            damage(folder)
    meeting, workers = tmp_path / "meeting", 3
    meeting.mkdir()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_publish_all, folders, meeting, number, workers) for number in range(workers)]
        results = [result for job in jobs for result in job.result()]
    assert results == [(True, CUBIN)] * (workers * len(folders))
    assert sorted(os.listdir(cache_dir)) == [folder.name for folder in folders]
    for folder in folders:
        assert sorted(os.listdir(folder)) == ["config.cuh", "kernel.cubin", "report.json"]


def test_threads_publish_at_once(cache_dir):
    folders = [cache_dir / f"fwd_simt-fp32-d64-{number:012x}" for number in range(80)]
    for folder in folders[::2]:
        cache.publish(folder, CUBIN, REPORT, "")
        truncate(folder)
    meeting = threading.Barrier(3, timeout=30)

    def publish_all(number: int) -> list[tuple[bool, bytes]]:
        results = []
        for folder in folders:
            meeting.wait()
            path = cache.publish(folder, CUBIN, {**REPORT, "seconds": number}, "")
            results.append((cache.read(folder) is not None, path.read_bytes()))
        return results

    with ThreadPoolExecutor(3) as pool:
        results = [result for run in pool.map(publish_all, range(3)) for result in run]
    assert results == [(True, CUBIN)] * (3 * len(folders))
    assert sorted(os.listdir(cache_dir)) == [folder.name for folder in folders]


def test_a_writer_that_dies_leaves_nothing_that_counts(cache_dir, stored):
    script = (
        "import os, sys; from pathlib import Path; from cuflash.jit import cache\n"
        "Path.rename = lambda *_: os._exit(9)\n"
        "cache.publish(Path(sys.argv[1]), b'cubin', {}, '')\n"
    )
    other = cache_dir / "fwd_simt-fp32-d64-ffffffffffff"
    done = subprocess.run([sys.executable, "-c", script, str(other)], check=False)
    assert done.returncode == 9
    assert len(os.listdir(cache_dir)) == 2
    assert [folder for folder, _, _ in cache.entries()] == [stored]
    cache.publish(other, CUBIN, REPORT, "")
    assert [folder for folder, _, _ in cache.entries()] == [stored, other]
    assert cache.clear() == 2
    assert os.listdir(cache_dir) == []


# Places that cannot be written


def below_a_file(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("in the way")
    return str(tmp_path / "file" / "cache")


def in_proc(tmp_path: Path) -> str:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    return "/proc/cuflash"


def without_a_home(tmp_path: Path) -> str:
    return "~nobody-of-this-name/cache"


@pytest.mark.parametrize("place", [below_a_file, in_proc, without_a_home])
def test_an_unwritable_place_warns_once_and_works(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    wanted = place(tmp_path)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", wanted)
    before = sorted(os.listdir(tmp_path))
    folders = [cache.folder("fwd_simt-fp32-d64", f"{number:012x}") for number in range(3)]
    assert [cache.read(folder) for folder in folders] == [None] * 3
    with pytest.warns(RuntimeWarning, match="cannot be written.*Set CUFLASH_CACHE_DIR") as caught:
        paths = [cache.publish(folder, CUBIN, REPORT, "") for folder in folders]
    assert len(caught) == 1
    assert f"the kernel cache {wanted} " in str(caught[0].message)
    assert [cache.read(folder) for folder in folders] == [(path, REPORT) for path in paths]
    assert all(path.read_bytes() == CUBIN for path in paths)
    assert list(cache.entries()) == []
    assert cache.clear() == 0
    assert sorted(os.listdir(tmp_path)) == before


def test_threads_warn_once_of_an_unwritable_place(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", below_a_file(tmp_path))
    folders = [cache.folder("fwd_simt-fp32-d64", f"{number:012x}") for number in range(3)]
    warned = []

    def warn_slowly(*arguments: object, **_: object) -> None:
        time.sleep(0.05)
        warned.append(arguments)

    monkeypatch.setattr(warnings, "warn", warn_slowly)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda folder: cache.publish(folder, CUBIN, REPORT, ""), folders))
    assert len(warned) == 1
    assert [cache.read(folder) for folder in folders] == [(path, REPORT) for path in paths]


def test_no_home_at_all(tmp_path, monkeypatch):
    """As in a container whose user has no entry and no HOME: the platform's folder stays unexpanded."""
    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))
    monkeypatch.chdir(tmp_path)
    folder = cache.folder("fwd_simt-fp32-d64", "0" * 64)
    if not str(folder).startswith("~"):
        pytest.skip("the cache folder of this platform does not depend on a home")
    with pytest.warns(RuntimeWarning, match="there is no home folder"):
        cache.publish(folder, CUBIN, REPORT, "")
    assert cache.read(folder) is not None
    assert os.listdir(tmp_path) == []


def test_a_home_that_does_not_exist_yet_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "not" / "yet" / "there"))
    folder = cache.folder("fwd_simt-fp32-d64", "0" * 64)
    assert cache.publish(folder, CUBIN, REPORT, "") == folder / "kernel.cubin"


def test_a_tilde_means_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "~/kernels")
    assert cache.root() == tmp_path / "kernels"


def test_a_read_only_cache_is_still_read(stored, monkeypatch):
    def refuse(self, *_, **__):
        if self.is_relative_to(stored.parent):
            raise PermissionError(13, "Permission denied", str(self))
        return mkdir(self, *_, **__)

    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(stored) == (stored / "kernel.cubin", REPORT)
    missing = cache.folder("fwd_simt-fp32-d64", "0" * 64)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        path = cache.publish(missing, CUBIN, REPORT, "")
    assert cache.read(missing) == (path, REPORT)
    assert not path.is_relative_to(stored.parent)


def test_a_full_disk_leaves_nothing_behind(cache_dir, monkeypatch):
    def refuse(self, data):
        if self.is_relative_to(cache_dir) and self.name == "report.json":
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        path = cache.publish(cache_dir / "fwd_simt-fp32-d64-000000000000", CUBIN, REPORT, "")
    assert path.read_bytes() == CUBIN
    assert os.listdir(cache_dir) == []


def test_a_temporary_cache_goes_with_its_process(tmp_path):
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from cuflash.jit import cache\n"
        "print(cache.publish(cache.folder('fwd_simt', '0' * 64), b'cubin', {}, ''))\n"
    )
    environment = {**os.environ, "CUFLASH_CACHE_DIR": below_a_file(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "cuflash-"))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_other_users_can_read_what_the_umask_allows(stored):
    umask = os.umask(0)
    os.umask(umask)
    assert stored.stat().st_mode & 0o777 == 0o777 & ~umask


# Listing and clearing


def test_entries_have_sizes_and_reports(stored):
    ((folder, size, report),) = cache.entries()
    assert folder == stored
    assert size == sum(len((stored / name).read_bytes()) for name in os.listdir(stored)) > len(CUBIN)
    assert report == REPORT


def test_no_cache_has_no_entries():
    assert list(cache.entries()) == []
    assert cache.clear() == 0


def test_clear_deletes_kernels_only(cache_dir, stored):
    other = cache.folder("bwd_sm80-bf16-d64-causal", "f" * 64)
    cache.publish(other, CUBIN, REPORT, "")
    (other / "notes.txt").write_text("mine")
    truncated = cache.folder("bwd_simt-fp64-d8", "e" * 64)
    cache.publish(truncated, CUBIN, REPORT, "")
    truncate(truncated)
    (cache_dir / "photos-2024").mkdir()
    (cache_dir / "photos-2024" / "report.json").write_text("{}")
    (cache_dir / "file-000000000000").write_text("mine")
    (cache_dir / ".hidden").write_text("mine")
    assert cache.clear() == 3
    assert sorted(os.listdir(cache_dir)) == sorted([".hidden", "file-000000000000", "photos-2024", other.name])
    assert os.listdir(other) == ["notes.txt"]
    assert os.listdir(cache_dir / "photos-2024") == ["report.json"]
    assert list(cache.entries()) == []


# With the compiler


@needs_nvrtc
def test_compile_once_then_find(cache_dir, monkeypatch):
    first = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    assert not first.cached
    assert first.path.read_bytes().startswith(b"\x7fELF")
    assert first.registers > 0
    assert first.path.parent.parent == cache_dir
    assert first.path.parent.name.startswith("bwd_delta-fp32-d64-")

    def fail(*_):
        raise AssertionError("NVRTC was called for a kernel that is on disk")

    monkeypatch.setattr(compile, "_nvrtc", fail)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        again = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
        seconds.append(time.process_time() - start)
        assert again == replace(first, cached=True)
    assert min(seconds) < 0.005


@needs_nvrtc
def test_an_edited_header_recompiles(kernels, monkeypatch):
    monkeypatch.setattr(sources, "root", lambda: kernels)
    first = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    with (kernels / "std.cuh").open("a") as file:
        file.write("// edited\n")
    second = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    assert (first.cached, second.cached) == (False, False)
    assert second.path != first.path
    assert jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80").path == second.path


@needs_nvrtc
def test_a_truncated_cubin_recompiles(capsys):
    first = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:100])
    second = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    assert not second.cached
    assert second.path == first.path
    assert second.path.read_bytes().startswith(b"\x7fELF")


@needs_nvrtc
def test_debug_is_another_kernel(monkeypatch):
    first = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    monkeypatch.setenv("CUFLASH_DEBUG", "1")
    second = jit.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    assert not second.cached
    assert second.path != first.path


@needs_nvrtc
def test_many_processes_compile_in_order_and_report_failures():
    broken = replace(DELTA, sequence="NoSuchSequence")
    jobs = [("bwd_delta", config, "BwdParams", "sm_80") for config in (DELTA, broken, replace(DELTA, dim_v=32))]
    results = list(jit.compile_many([*jobs, ("bwd_delta", DELTA, "BwdParams", "sm_1")], workers=2))
    assert [type(result) for result in results] == [jit.Cubin, CompileError, jit.Cubin, CompileError]
    assert results[0] == replace(jit.compile_kernel(*jobs[0]), cached=False)
    assert "NoSuchSequence" in str(results[1])
    assert "sm_1" in str(results[3])


@needs_nvrtc
def test_many_processes_from_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from cuflash import jit\n"
        "from cuflash.plan.steps import DeltaConfig\n"
        f"config = {DELTA!r}\n"
        "if __name__ == '__main__':\n"
        "    (cubin,) = jit.compile_many([('bwd_delta', config, 'BwdParams', 'sm_80')])\n"
        "    print(cubin.registers)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
    assert done.stderr == ""


# Several kernels of one call


@pytest.fixture
def threads(monkeypatch) -> list[threading.Thread]:
    """Where kernels are compiled: in the main thread, or in three threads that all have to be at it at once."""
    seen: list[threading.Thread] = []
    meeting = threading.Barrier(3, timeout=30)

    def compile_nothing(entry: str, _files, _flags, begin: Callable[[], None]) -> tuple[bytes, str]:
        seen.append(threading.current_thread())
        begin()
        if threading.current_thread() is not threading.main_thread():
            meeting.wait()
        return entry.encode(), ""

    monkeypatch.setattr(compile, "_nvrtc", compile_nothing)
    return seen


@needs_nvrtc
def test_kernels_of_a_call_compile_side_by_side(threads):
    jobs = [("bwd_delta", replace(DELTA, dim_v=dim), "BwdParams", "sm_80") for dim in (64, 32, 16)]
    cubins = jit.compile_together(jobs)
    assert len(set(threads)) == 3
    assert threading.main_thread() not in threads
    assert [cubin.cached for cubin in cubins] == [False] * 3
    assert [replace(cubin, cached=True) for cubin in cubins] == [jit.compile_kernel(*job) for job in jobs]


@needs_nvrtc
def test_the_longest_kernel_of_a_call_starts_first(monkeypatch):
    started = []

    def start(entry: str, _files, _flags, begin: Callable[[], None]) -> tuple[bytes, str]:
        started.append(entry)
        begin()
        return entry.encode(), ""

    monkeypatch.setattr(compile, "_nvrtc", start)
    q = np.zeros((1, 256, 2, 64), np.float16)
    steps = explain(q, q, q, device="h200", backward=True).plan.steps
    cubins = jit.compile_together([(step.kernel, step.config, step.params, "sm_90a") for step in steps])
    assert started == [f"entry/bwd_{name}.cu" for name in ("sm90", "prepare_sm90", "convert_sm90")]
    assert [cubin.kernel for cubin in cubins] == [step.kernel for step in steps] != started


@needs_nvrtc
def test_one_kernel_starts_no_thread(threads):
    (cubin,) = jit.compile_together([("bwd_delta", DELTA, "BwdParams", "sm_80")])
    assert threads == [threading.main_thread()]
    assert cubin.path.read_bytes() == b"entry/bwd_delta.cu"


@needs_nvrtc
def test_threads_fail_like_the_first_kernel_that_cannot_be_compiled():
    first, second = (replace(DELTA, sequence=f"NoSuchSequence{number}") for number in range(2))
    jobs = [("bwd_delta", config, "BwdParams", "sm_80") for config in (DELTA, first, second)]
    with pytest.raises(CompileError) as alone:
        jit.compile_kernel(*jobs[1])
    with pytest.raises(CompileError) as together:
        jit.compile_together(jobs)
    assert "NoSuchSequence0" in str(alone.value)
    before_folder = [str(error.value).partition("The sources are saved")[0] for error in (alone, together)]
    assert before_folder[0] == before_folder[1]
    assert jit.compile_kernel(*jobs[0]).cached


@needs_nvrtc
def test_threads_that_compile_the_same_kernel():
    job = ("bwd_delta", DELTA, "BwdParams", "sm_80")
    cubins = jit.compile_together([job] * 3)
    assert {cubin.path for cubin in cubins} == {jit.compile_kernel(*job).path}
    assert cubins[0].path.read_bytes().startswith(b"\x7fELF")


# What a first call says


@needs_nvrtc
def test_what_is_compiled_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="cuflash"):
        first = compile.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
        again = compile.compile_kernel("bwd_delta", DELTA, "BwdParams", "sm_80")
    assert not first.cached and again.cached
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [("cuflash", "INFO", f"compiled bwd_delta-fp32-d64 for sm_80 in {first.seconds:.2f} s")]


@needs_nvrtc
def test_nothing_is_printed_where_nobody_asked() -> None:
    script = """
from cuflash import explain, jit
from cuflash.plan.steps import DeltaConfig
config = DeltaConfig(element="float", dim_v=64, threads=128, tile_q=64, copy_bytes=16)
assert not jit.compile_kernel("bwd_delta", config, "BwdParams", "sm_80").cached
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
