"""Every environment variable cuflash reads, with its default."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import platformdirs

from cuflash.errors import InvalidArgument

_OFF = ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """A snapshot of the environment."""

    cache_dir: Path
    """Where compiled kernels are kept (``CUFLASH_CACHE_DIR``; the platform's cache folder by default)."""
    debug: bool
    """Compile checks of cu_seqlens, seqused and block_table into the kernels, and show whole tracebacks
    (``CUFLASH_DEBUG=1``)."""


def read() -> Settings:
    """Read the environment now; callers keep the result if they need a stable value."""
    cache = os.environ.get("CUFLASH_CACHE_DIR")
    return Settings(
        cache_dir=_absolute(cache) if cache else _default_cache_dir(),
        debug=os.environ.get("CUFLASH_DEBUG", "").strip().lower() not in _OFF,
    )


def attention_backend() -> str:
    """Which kernels are preferred (``CUFLASH_ATTENTION_BACKEND``); read alone, as calls ask every time."""
    return os.environ.get("CUFLASH_ATTENTION_BACKEND") or "default"


def num_threads() -> int:
    """How many threads the NumPy backend uses (``CUFLASH_NUM_THREADS``; all cores that the process may use by default).

    Read alone, as calls ask every time.

    Raises
    ------
    InvalidArgument
        If the variable is no positive integer.
    """
    text = os.environ.get("CUFLASH_NUM_THREADS", "").strip()
    if not text:
        return _usable_cores()
    number = int(text) if text.isdecimal() and len(text) <= 9 else 0
    if number == 0:
        raise InvalidArgument(f"CUFLASH_NUM_THREADS is {text!r}; expected an integer from 1. Unset it for all cores.")
    return number


def _usable_cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=16)
def _absolute(folder: str) -> Path:
    """The folder, which stays where it was when it was first asked for, wherever the process goes."""
    expanded = os.path.expanduser(folder)
    # Without a home folder it still begins with ~, which the cache says when it is written to.
    return Path(expanded if expanded.startswith("~") else os.path.abspath(expanded))


def _default_cache_dir() -> Path:
    try:
        return _absolute(platformdirs.user_cache_dir("cuflash", appauthor=False))
    except RuntimeError:  # there is no home folder, which the cache says when it is written to
        return Path("~/.cache/cuflash")
