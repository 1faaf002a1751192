"""g++ for kernel headers: shared objects, cached for a day by the content of everything they are made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

HOST = Path(__file__).resolve().parent
KERNELS = HOST.parent.parent / "kernels"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-Wno-unknown-pragmas")
CACHE = HOST.parent.parent / ".pytest_cache" / "host"
DAY = 24 * 3600


def why_not() -> str | None:
    """The reason why nothing can be built here, or None."""
    return None if shutil.which("g++") else "no g++ to compile kernels for the host with"


@cache
def sources_digest() -> str:
    """SHA-256 over the compiler and every kernel and twin."""
    digest = hashlib.sha256(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    for folder in (KERNELS, HOST):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".cuh", ".cu", ".h", ".hpp"}:
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def build(source: str, config_header: str = "") -> ctypes.CDLL:
    """Compile one translation unit, with ``config_header`` as its config.cuh, and load it."""
    key = hashlib.sha256("\0".join((sources_digest(), source, config_header, *FLAGS)).encode()).hexdigest()[:20]
    library = CACHE / f"{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob("*.so"):
            if old.stat().st_mtime < time.time() - DAY:
                old.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            Path(folder, "config.cuh").write_text(config_header)
            Path(folder, "unit.cpp").write_text(source)
            for path in KERNELS.rglob("*.cu*"):  # twins in the places of what they stand for, whoever includes them
                name = path.relative_to(KERNELS)
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).symlink_to(HOST / name if (HOST / name).exists() else path)
            command = ["g++", *FLAGS, f"-I{folder}", f"-I{HOST}", f"{folder}/unit.cpp"]
            done = subprocess.run([*command, "-o", f"{folder}/unit.so"], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"g++ refused:\n{done.stderr[:8000]}\nconfig.cuh:\n{config_header}")
            os.replace(f"{folder}/unit.so", library)
    return ctypes.CDLL(str(library))
