"""The cubin cache on disk: one folder a kernel, named by what it is and by the hash of all it was made of.

A folder appears whole or not at all: it is written aside and renamed. What is read back is checked against a digest, so
truncated or foreign files count as absent and are replaced.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache as once
from pathlib import Path
from typing import Any

from cuflash import settings

SCHEMA = 1
"""Changes when the meaning of a cached folder changes."""

_CUBIN, _REPORT, _CONFIG = "kernel.cubin", "report.json", "config.cuh"


def key(files: Mapping[str, bytes], extras: Iterable[object]) -> str:
    """SHA-256 over every source byte, every name, and whatever else the binary depends on."""
    digest = hashlib.sha256(repr((SCHEMA, *extras)).encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()


def folder(title: str, key: str) -> Path:
    """Where a kernel is kept; see :func:`root` for when it is not the configured place."""
    return root() / f"{title}-{key[:12]}"


def root() -> Path:
    """The cache folder, or one for this process alone when that cannot be written."""
    wanted = settings.read().cache_dir
    return wanted if _writable(wanted) else _temporary()


@once
def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError as error:
        if _has_entries(path):
            return True
        warnings.warn(
            f"the kernel cache {path} cannot be written ({error.strerror or error}), so every process compiles its "
            "kernels again. Set CUFLASH_CACHE_DIR to a folder that can.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def _has_entries(path: Path) -> bool:
    """Whether a cache that cannot be written can be read at least."""
    try:
        return next(path.glob(f"*/{_REPORT}"), None) is not None
    except OSError:
        return False


@once
def _temporary() -> Path:
    path = Path(tempfile.mkdtemp(prefix="cuflash-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def read(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The cubin's path and its report, or None when there is no sound one."""
    try:
        stored = json.loads((folder / _REPORT).read_bytes())
        sound = hashlib.sha256((folder / _CUBIN).read_bytes()).hexdigest() == stored.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return (folder / _CUBIN, stored) if sound else None


def publish(folder: Path, cubin: bytes, report: Mapping[str, Any], config: str) -> Path:
    """Store a kernel and return its cubin's path; of several processes that do so at once, any wins."""
    contents = {
        _CUBIN: cubin,
        _REPORT: json.dumps({**report, "sha256": hashlib.sha256(cubin).hexdigest()}, indent=1).encode(),
        _CONFIG: config.encode(),
    }
    try:
        return _publish(folder, contents)
    except OSError:  # readable, but full or read-only
        return _publish(_temporary() / folder.name, contents)


def _publish(folder: Path, contents: Mapping[str, bytes]) -> Path:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in contents.items():
            (aside / name).write_bytes(data)
        for _ in range(3):
            try:
                os.rename(aside, folder)
                break
            except OSError:
                if read(folder) is not None:
                    break
                # Something unsound is in the way; another process may be clearing it too.
                if folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    folder.unlink(missing_ok=True)
        if read(folder) is None:
            raise OSError(f"{folder} cannot be replaced")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / _CUBIN


def entries() -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(folder, bytes, report) of every sound kernel in the cache."""
    for folder in sorted(root().glob("*-*/")):
        found = read(folder)
        if found is not None:
            yield folder, sum(path.stat().st_size for path in folder.iterdir()), found[1]


def clear() -> int:
    """Delete every kernel, and nothing else that lies in the folder; return how many there were."""
    folders = [path.parent for path in root().glob(f"*/{_REPORT}")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return len(folders)
