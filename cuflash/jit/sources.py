"""Kernel sources: where they lie, and which headers an entry reaches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cuflash.errors import CompileError

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
CONFIG, LAYOUT = "config.cuh", "layout.cuh"
"""The headers that are rendered, not read; the config includes the layout."""

CAPTURED = "captured.cuh"
"""The header that is rendered for a kernel that reads captured arrays, and read for all others."""


@cache
def root() -> Path:
    """The folder of the kernels: inside an installed package, beside the package in a checkout.

    Raises
    ------
    CompileError
        If there is no folder, as in a package that is imported from an archive.
    """
    for place in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if place.is_dir():
            return place
    raise CompileError(
        f"cuflash is imported from {_PACKAGE}, where there is no folder of kernels to compile; NumPy arrays alone can "
        "be computed. Install cuflash, or unpack the archive that it is imported from."
    )


def entry_name(kernel: str) -> str:
    """The translation unit of a kernel, relative to the root."""
    return f"entry/{kernel}.cu"


def gather(kernel: str, rendered: Mapping[str, str], kernels: Path | None = None) -> dict[str, bytes]:
    """Read an entry and every header it includes that is not among those rendered, by name relative to the root.

    Raises
    ------
    CompileError
        If there is no such kernel, or a header is included that does not exist.
    """
    kernels = kernels or root()
    entry = entry_name(kernel)
    if not (kernels / entry).is_file():
        known = sorted(path.stem for path in kernels.glob(entry_name("*")))
        raise CompileError(f"there is no kernel {kernel} in {kernels / 'entry'}; there are: {', '.join(known)}.")
    texts = {name: text.encode() for name, text in rendered.items()}
    waiting = [(entry, "")]
    waiting += [(included, name) for name, text in texts.items() for included in _included(text)]
    while waiting:
        name, includer = waiting.pop()
        if name in texts:
            continue
        path = kernels / name
        if not path.is_file():
            raise CompileError(f"{includer} includes {name}, which is not a file under {kernels}.")
        texts[name] = path.read_bytes()
        waiting += [(included, name) for included in _included(texts[name])]
    return texts


def _included(text: bytes) -> list[str]:
    return [name.decode() for name in _INCLUDE.findall(text)]
