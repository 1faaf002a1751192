"""Sources -> cubin by NVRTC, without a GPU if need be. The only module that names NVRTC."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache as once
from pathlib import Path
from threading import Event
from typing import Any

from cuflash import settings
from cuflash.dtypes import DTYPES
from cuflash.errors import HOW_TO_GET_CUPY, CompileError
from cuflash.jit import cache, sources
from cuflash.jit.render import headers
from cuflash.plan.config import Config

_FLAGS = ("--std=c++17", "-ftz=true", "-prec-div=false", "-Xptxas=-v")
_RESOURCES = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}
_REMARK = re.compile(r"warning|\bC75\d\d\b")  # C75xx: the assembler serialised what should overlap
_ELEMENTS = {dtype.cuda: dtype.name for dtype in DTYPES.values()}
_SAMPLES = 64
"""Pages of the library that are looked at."""
_PLAIN = {"sequence": "DenseSequence", "mask": "NoMask", "score": "ScaledScore", "reduction": "AtomicReduction"}
"""Policies that the name of a cache folder speaks of, where they are others than these."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel and what the assembler said of it."""

    path: Path
    """The file in the cache."""
    kernel: str
    arch: str
    registers: int
    """Per thread."""
    stack: int
    """Bytes of local memory per thread."""
    spill_stores: int
    spill_loads: int
    seconds: float
    """What compiling took, when it was compiled."""
    warnings: tuple[str, ...] = ()
    """Remarks of the compiler and the assembler."""
    cached: bool = False
    """Found on disk."""


def compile_kernel(kernel: str, config: Config, params: str, arch: str) -> Cubin:
    """Compile one variant for an architecture such as ``sm_90a``, or find it in the cache.

    What is compiled is said, by its name and the seconds it took, at level ``INFO`` of the logger ``cuflash``.

    Raises
    ------
    CompileError
        If NVRTC is missing, does not know the architecture, or refuses the sources.
    """
    return _compiled(_asked(kernel, config, params, arch))


def compile_together(jobs: Sequence[tuple[str, Config, str, str]]) -> list[Cubin]:
    """Compile the few kernels of one call, (kernel, config, params, arch) each, in parallel threads.

    NVRTC reads one program at a time. So they begin in order, the one of the longest text first, as it takes longest.

    Raises
    ------
    CompileError
        Of the first job, in their order, that fails.
    """
    if len(jobs) < 2:
        return [compile_kernel(*job) for job in jobs]
    from concurrent.futures import Future, ThreadPoolExecutor

    version()  # loads NVRTC, which threads must not do at once
    asked = [_asked(*job) for job in jobs]
    longest_first = sorted(range(len(jobs)), key=lambda i: -sum(map(len, asked[i].files.values())))
    running: dict[int, Future[Cubin]] = {}
    with ThreadPoolExecutor(len(jobs)) as pool:  # NVRTC compiles without the interpreter's lock
        for i in longest_first:
            begun = Event()
            running[i] = pool.submit(_begun, asked[i], begun)
            begun.wait()
    return [running[i].result() for i in range(len(jobs))]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One variant and all that it is made of."""

    kernel: str
    arch: str
    title: str
    files: dict[str, bytes]
    config: str
    """The text of its ``config.cuh``."""


def _asked(kernel: str, config: Config, params: str, arch: str) -> _Asked:
    rendered = headers(kernel, config, params)
    return _Asked(kernel, arch, _title(kernel, config), sources.gather(kernel, rendered), rendered[sources.CONFIG])


def _compiled(asked: _Asked, begin: Callable[[], None] = lambda: None) -> Cubin:
    """Find or compile it; `begin` is called just before NVRTC reads it."""
    flags = flags_for(asked.arch)
    folder = cache.folder(asked.title, cache.key(asked.files, (*flags, *version(), build())))
    cached = cache.read(folder)
    if cached is not None:
        path, report = cached
        return Cubin(path=path, cached=True, **{**report, "warnings": tuple(report["warnings"])})

    check_arch(asked.arch)
    start = time.perf_counter()
    binary, log = _nvrtc(sources.entry_name(asked.kernel), asked.files, flags, begin)
    report = {
        "kernel": asked.kernel,
        "arch": asked.arch,
        **{name: _largest(pattern, log) for name, pattern in _RESOURCES.items()},
        "seconds": round(time.perf_counter() - start, 3),
        "warnings": tuple(line for line in log.splitlines() if _REMARK.search(line)),
    }
    _logger().info("compiled %s for %s in %.2f s", asked.title, asked.arch, report["seconds"])
    return Cubin(path=cache.publish(folder, binary, report, asked.config), **report)


def _begun(asked: _Asked, begun: Event) -> Cubin:
    try:
        return _compiled(asked, begun.set)
    finally:
        begun.set()  # found on disk, or failed before


def compile_many(
    jobs: Iterable[tuple[str, Config, str, str]], workers: int | None = None
) -> Iterable[Cubin | CompileError]:
    """Compile (kernel, config, params, arch) jobs in parallel processes; results in order, a failure as its error.

    The processes import the calling script anew, so it must keep to ``if __name__ == "__main__"``.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_or_error, list(jobs))


def _compile_or_error(job: tuple[str, Config, str, str]) -> Cubin | CompileError:
    try:
        return compile_kernel(*job)
    except CompileError as error:
        return error


def flags_for(arch: str) -> tuple[str, ...]:
    """Compiler options of every kernel."""
    # NVRTC's own cache would swallow the assembler's report; its declarations of the CUDA runtime take 10 ms to read.
    lean = ("-no-cache", "-minimal") if version() >= (12, 9) else ()
    debug = ("-DCF_DEBUG",) if settings.read().debug else ()
    return (f"-arch={arch}", *_FLAGS, *lean, *debug)


@once
def version() -> tuple[int, int]:
    """Version of NVRTC."""
    return _module().getVersion()


@once
def build() -> str:
    """Which NVRTC of its version it is: builds that call themselves by one version make different binaries.

    Told by its size and some of its bytes, which any place that it is installed at has alike.
    """
    version()  # loads it
    try:
        maps = Path("/proc/self/maps").read_text()
        library = next(line.split(maxsplit=5)[5] for line in maps.splitlines() if re.search(r"/libnvrtc\.so", line))
        with open(library, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for part in range(_SAMPLES):
                file.seek(size * part // _SAMPLES)
                digest.update(file.read(4096))
    except (OSError, StopIteration):  # no Linux
        return ""
    return digest.hexdigest()


@once
def supported_archs() -> tuple[str, ...]:
    """Architectures this NVRTC compiles for, without their feature-specific forms."""
    return tuple(f"sm_{number}" for number in _module().getSupportedArchs())


def check_arch(arch: str) -> None:
    """Refuse an architecture that this NVRTC does not compile for.

    Raises
    ------
    CompileError
        With those that it does.
    """
    known = supported_archs()
    if arch.rstrip("af") not in known:
        raise CompileError(
            f"NVRTC {_dotted(version())} compiles for {', '.join(known)}, not for {arch!r}. "
            "CUDA 13 dropped sm_70, which the extra cuda12 has; newer architectures need a newer nvidia-cuda-nvrtc."
        )


@once
def _logger() -> Any:
    import logging  # takes longer than a call, and only those that compile say something

    logger = logging.getLogger("cuflash")
    logger.addHandler(logging.NullHandler())  # what is printed is up to the program
    return logger


@once
def _module() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise CompileError(
            f"kernels are compiled by NVRTC through CuPy, which cannot be imported ({error}). {HOW_TO_GET_CUPY}."
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:
        raise CompileError(
            f"CuPy does not find the NVRTC library ({error}). {HOW_TO_GET_CUPY}; or set CUDA_PATH to a CUDA toolkit."
        ) from error
    return nvrtc


def _nvrtc(entry: str, files: dict[str, bytes], flags: Sequence[str], begin: Callable[[], None]) -> tuple[bytes, str]:
    """The cubin and the log."""
    nvrtc = _module()
    headers = {name: text for name, text in files.items() if name != entry}
    program = nvrtc.createProgram(
        files[entry].decode(), entry, list(headers.values()), [name.encode() for name in headers]
    )
    try:
        begin()
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(
                f"NVRTC {_dotted(version())} refused {entry} ({error}; {' '.join(flags)}):\n{log}\n"
                f"config.cuh:\n{files[sources.CONFIG].decode()}\nThe sources are saved under {_save(files)}."
            ) from None
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _save(files: dict[str, bytes]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cuflash-"))
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


def _largest(pattern: str, log: str) -> int:
    return max(map(int, re.findall(pattern, log)), default=0)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _title(kernel: str, config: Config) -> str:
    """The readable part of a cache folder's name, such as ``fwd_sm80-bf16-d128-causal``."""
    members = {field.name: getattr(config, field.name) for field in fields(config)}
    words = [kernel]
    if "element" in members:
        words.append(_ELEMENTS[members["element"]])
    if dims := dict.fromkeys(str(members[name]) for name in ("dim_qk", "dim_v") if name in members):
        words.append("d" + "x".join(dims))
    for name, plain in _PLAIN.items():
        policy = members.get(name, plain).split("<")[0]
        if policy != plain:
            words.append(policy.removesuffix(name.capitalize()).lower())
    return "-".join(words)
