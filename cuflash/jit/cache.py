"""The cubin cache on disk: one folder a kernel, named by what it is and by the hash of all it was made of.

A folder appears whole or not at all: it is written aside and renamed. What is read back is checked against a digest, so
truncated or foreign files count as absent and are replaced.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache as once
from pathlib import Path
from threading import Lock
from typing import Any

from cuflash import settings

SCHEMA = 1
"""Changes when the meaning of a cached folder changes."""

_CUBIN, _REPORT, _CONFIG = _FILES = "kernel.cubin", "report.json", "config.cuh"
_NAME = re.compile(r"\w[\w-]*-[0-9a-f]{12}")
_ASIDE = re.compile(rf"\.{_NAME.pattern}-[0-9a-f]{{8}}")

_moved: dict[Path, Path] = {}
"""Where this process keeps kernels whose own folder cannot be written."""

_moving = Lock()
"""One thread at a time warns and makes the temporary folder, so that each is done once."""


def key(files: Mapping[str, bytes], extras: Iterable[object]) -> str:
    """SHA-256 over every source byte, every name, and whatever else the binary depends on."""
    digest = hashlib.sha256(repr((SCHEMA, *extras)).encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()


def root() -> Path:
    """The folder of all kernels, which need not exist."""
    return settings.read().cache_dir


def folder(title: str, key: str) -> Path:
    """The folder of one kernel."""
    return root() / f"{title}-{key[:12]}"


def read(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The cubin's path and its report, or None when there is no sound one."""
    place = _moved.get(folder, folder)
    try:
        stored = json.loads((place / _REPORT).read_bytes())
        sound = stored["sha256"] == _digest(folder.name, (place / _CUBIN).read_bytes(), stored["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (place / _CUBIN, stored["report"]) if sound else None


def publish(folder: Path, cubin: bytes, report: Mapping[str, Any], config: str) -> Path:
    """Store a kernel and return its cubin's path; of several processes or threads that do so at once, any wins.

    Where it cannot be stored, this process keeps it in a temporary folder and warns once.
    """
    stored = {"report": report, "sha256": _digest(folder.name, cubin, report)}
    contents = {_CUBIN: cubin, _REPORT: json.dumps(stored, indent=1).encode(), _CONFIG: config.encode()}
    try:
        return _publish(folder, contents)
    except OSError as error:
        with _moving:
            _warn(folder.parent, error.strerror or str(error))
            _moved[folder] = _temporary() / folder.name
        return _publish(_moved[folder], contents)


def _publish(folder: Path, contents: Mapping[str, bytes]) -> Path:
    if folder.parts[0].startswith("~"):
        raise OSError("there is no home folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    aside.mkdir()  # tempfile would make one that other users of a shared cache cannot read
    try:
        for name, data in contents.items():
            (aside / name).write_bytes(data)
        if not folder.is_dir():
            with suppress(OSError):  # nothing is in the way, or another process has just replaced it
                folder.unlink()
        try:
            aside.rename(folder)
        except OSError:
            if read(folder) is None:  # repaired in place: a path that another process has read stays valid
                for name in contents:
                    os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / _CUBIN


def _digest(name: str, cubin: bytes, report: Mapping[str, Any]) -> str:
    """SHA-256 over all that a folder says, its name included."""
    return hashlib.sha256(f"{name}\0{json.dumps(report)}\0".encode() + cubin).hexdigest()


@once
def _warn(place: Path, reason: str) -> None:
    warnings.warn(
        f"the kernel cache {place} cannot be written ({reason}), so every process compiles its kernels again. "
        "Set CUFLASH_CACHE_DIR to a folder that can.",
        RuntimeWarning,
        stacklevel=2,
    )


@once
def _temporary() -> Path:
    path = Path(tempfile.mkdtemp(prefix="cuflash-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def entries() -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(folder, bytes, report) of every sound kernel in the cache."""
    for folder in _folders(_NAME):
        kernel = read(folder)
        if kernel is not None:
            yield folder, sum(path.stat().st_size for path in folder.iterdir()), kernel[1]


def clear() -> int:
    """Delete every kernel, and nothing else that lies in the folder; return how many there were."""
    for folder in _folders(_ASIDE):  # of processes that ended while they wrote
        _delete(folder)
    return sum(map(_delete, _folders(_NAME)))


def _folders(name: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in root().iterdir() if name.fullmatch(path.name) and path.is_dir())
    except OSError:
        return []


def _delete(folder: Path) -> bool:
    """Delete a kernel's files and its folder; whether it held a kernel."""
    held = (folder / _CUBIN).is_file()
    with suppress(OSError):  # read-only, or a foreign file lies beside them
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    return held and not (folder / _CUBIN).exists()
