"""g++ for kernel headers: shared objects, cached for a day by the content of everything they are made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

HOST = Path(__file__).resolve().parent
KERNELS = HOST.parent.parent / "kernels"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wno-unknown-pragmas")
TWIN_FLAGS, UNIT_FLAGS = ("-O2",), ("-Og",)
"""The twin is compiled once and runs all the time, a kernel the other way round."""
TWIN_KERNELS = ("captured.cuh", "element.cuh", "params.cuh", "std.cuh")
"""The headers of kernels/ that the twin includes."""
PRELUDE = "".join(f'#include "{name}"\n' for name in ("block.hpp", "element.cuh", "std.cuh"))
"""Nothing that is rendered, nor what includes such headers."""
CACHE = HOST.parent.parent / ".pytest_cache" / "host"
DAY = 24 * 3600


def why_not() -> str | None:
    """The reason why nothing can be built here, or None."""
    return None if shutil.which("g++") else "no g++ to compile kernels for the host with"


def compile(*arguments: str | Path, rendered: Iterable[tuple[str, str]] = ()) -> None:
    """Run g++."""
    done = subprocess.run(["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        headers = "".join(f"\n{name}:\n{text}" for name, text in rendered)
        raise RuntimeError(f"g++ refused:\n{done.stderr[:8000]}{headers}")


def forget_old() -> None:
    """Remove what is older than a day."""
    for old in CACHE.glob("*"):
        with suppress(FileNotFoundError):  # another process removes it, too, or renames it
            if old.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def digest_of(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def place(tree: Path, names: Iterable[Path]) -> None:
    """Link kernel headers into a tree, and twins in the places of what they stand for, whoever includes them."""
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(HOST / name if (HOST / name).exists() else KERNELS / name)


@cache
def twin() -> Path:
    """The folder with the twin's archive and the precompiled ``prelude.hpp``."""
    sources = [path for path in HOST.rglob("*") if path.suffix in {".cpp", ".cuh", ".hpp"}]
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    kernels = digest_of(KERNELS, [KERNELS / name for name in TWIN_KERNELS])
    made = CACHE / f"twin-{key_of(compiler, digest_of(HOST, sources), kernels, PRELUDE, FLAGS, TWIN_FLAGS, UNIT_FLAGS)}"
    if made.exists():
        return made
    import fcntl  # here, as other systems lack it, and g++

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as compilers:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait and leave their cores to g++
        if made.exists():
            return made
        forget_old()
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            folder = Path(scratch, "twin")
            place(folder, [*map(Path, TWIN_KERNELS), *(path.relative_to(HOST) for path in HOST.rglob("*.cuh"))])
            (folder / "prelude.hpp").write_text(PRELUDE)
            header, include = f"{folder}/prelude.hpp", [f"-I{folder}", f"-I{HOST}"]
            objects = {source: f"{folder}/{number}.o" for number, source in enumerate(sorted(HOST.rglob("*.cpp")))}
            units = [[*UNIT_FLAGS, *include, "-x", "c++-header", header, "-o", f"{header}.gch"]]
            units += [[*TWIN_FLAGS, *include, "-c", source, "-o", target] for source, target in objects.items()]
            list(compilers.map(lambda unit: compile(*unit), units))
            subprocess.run(["ar", "rcs", f"{folder}/libtwin.a", *objects.values()], check=True)
            os.rename(folder, made)
    return made


@cache
def kernels_digest() -> str:
    """SHA-256 over every kernel."""
    return digest_of(KERNELS, KERNELS.rglob("*.cu*"))


@cache
def build(source: str, *rendered: tuple[str, str]) -> ctypes.CDLL:
    """Compile one translation unit, with headers that are rendered, (name, text) each, and load it."""
    key = key_of(twin().name, kernels_digest(), source, *(text for _, text in rendered))
    library = CACHE / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for name, text in rendered:
                Path(folder, name).write_text(text)
            Path(folder, "unit.cpp").write_text(source)
            names = {path.relative_to(KERNELS) for path in KERNELS.rglob("*.cu*")}
            place(Path(folder), names - {Path(name) for name, _ in rendered})
            compile(
                *UNIT_FLAGS, "-include", twin() / "prelude.hpp", f"-I{folder}", f"-I{HOST}", "-shared",
                f"{folder}/unit.cpp", twin() / "libtwin.a", "-o", f"{folder}/unit.so", rendered=rendered,
            )  # fmt: skip
            os.replace(f"{folder}/unit.so", library)
    return ctypes.CDLL(str(library))
