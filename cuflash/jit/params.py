"""``kernels/params.cuh`` read as NumPy dtypes, so that the kernels' arguments are declared once."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from cuflash.errors import CompileError
from cuflash.jit import sources

_TYPES = {"int": np.dtype(np.int32), "int64": np.dtype(np.int64), "double": np.dtype(np.float64)}
_POINTER = np.dtype(np.uint64)
_STRUCT = re.compile(r"struct (\w+) \{")
_MEMBER = re.compile(r"(?P<type>(?:const )?\w+ ?\*?) (?P<name>\w+);")
_OUTSIDE = re.compile(r"#.*|namespace \w+ \{|\}")


def dtype(name: str) -> np.dtype:
    """The aligned dtype of a struct; pointers are uint64.

    Raises
    ------
    CompileError
        If params.cuh has no such struct, or a line the reader does not understand.
    """
    structs = _parsed()
    if name not in structs:
        raise CompileError(f"kernels/params.cuh has no struct {name}; it has {', '.join(structs)}.")
    return structs[name]


@cache
def _parsed() -> dict[str, np.dtype]:
    return parse((sources.root() / "params.cuh").read_text())


def parse(text: str) -> dict[str, np.dtype]:
    """Structs of a header that keeps to one declaration a line, as aligned dtypes by name."""
    structs: dict[str, np.dtype] = {}
    name, members = "", []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if not line or (not name and _OUTSIDE.fullmatch(line)):
            continue
        if not name and (opened := _STRUCT.fullmatch(line)):
            name, members = opened[1], []
        elif line == "};" and members:
            structs[name] = np.dtype(members, align=True)
            name, members = "", []
        elif name and (member := _MEMBER.fullmatch(line)):
            kind = member["type"].removeprefix("const ").strip()
            known = _POINTER if kind.endswith("*") else (_TYPES | structs).get(kind)
            if known is None:
                raise CompileError(f"params.cuh({number}): type {kind!r} is none of {', '.join([*_TYPES, *structs])}.")
            if member["name"] in dict(members):
                raise CompileError(f"params.cuh({number}): {name} has two members {member['name']}.")
            members.append((member["name"], known))
        else:
            raise CompileError(f"params.cuh({number}): expected one declaration a line, got {line!r}.")
    if name:
        raise CompileError(f"params.cuh({number}): struct {name} has no end.")
    return structs
