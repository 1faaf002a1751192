"""``kernels/params.cuh`` read as NumPy dtypes, so that the kernels' arguments are declared once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np

from cuflash.errors import CompileError
from cuflash.jit import sources, written
from cuflash.plan.config import Config, Written

_TYPES: dict[str, np.dtype] = {
    "int": np.dtype(np.int32), "int64": np.dtype(np.int64), "uint64": np.dtype(np.uint64),
    "float": np.dtype(np.float32), "double": np.dtype(np.float64),
}  # fmt: skip
_POINTER = np.dtype(np.uint64)
_STRUCT = re.compile(r"struct (?:alignas\((?P<alignment>\d+)\) )?(?P<name>\w+)(?: : (?P<base>\w+))? \{")
_MEMBER = re.compile(r"(?P<type>(?:const )?\w+ ?\*?) (?P<name>\w+)(?:\[(?P<length>\d+)\])?;")
_OUTSIDE = re.compile(r"#.*|namespace \w+ \{|\}")


def dtype(name: str, written: Written | None = None) -> np.dtype:
    """The aligned dtype of a struct; pointers are uint64. What a kernel reads of `written` is in front of `Attention`.

    Raises
    ------
    CompileError
        If params.cuh has no such struct, or a line the reader does not understand.
    """
    structs = _parsed(written)
    if name not in structs:
        raise CompileError(f"kernels/params.cuh has no struct {name}; it has {', '.join(structs)}.")
    return structs[name]


@cache
def members(struct: np.dtype) -> dict[str, tuple[np.dtype, int]]:
    """Type and offset of every member of a struct."""
    return {name: (kind, offset) for name, (kind, offset, *_) in (struct.fields or {}).items()}


def first_byte(config: Config, written: Written | None) -> int:
    """Where a kernel's arguments begin in the parameter block of a call that also has kernels of what is written."""
    if getattr(config, "written", None) is not None:
        return 0
    return dtype("Attention", written).itemsize - dtype("Attention").itemsize


@lru_cache(maxsize=1024)
def _parsed(which: Written | None) -> dict[str, np.dtype]:
    return parse((sources.root() / "params.cuh").read_text(), written.members(which))


def parse(text: str, captured: Mapping[str, np.dtype] | None = None) -> dict[str, np.dtype]:
    """Structs of a header that keeps to one declaration a line, as aligned dtypes by name; with those of `Captured`."""
    known = {name: (kind, kind.alignment) for name, kind in _TYPES.items()}
    name, alignment = "", 1
    members: dict[str, tuple[np.dtype, int]] = {}
    first = {known: (kind, kind.base.itemsize) for known, kind in (captured or {}).items()}
    of_struct: dict[str, dict[str, tuple[np.dtype, int]]] = {"Captured": first}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if not line or (not name and _OUTSIDE.fullmatch(line)):
            continue
        if not name and (opened := _STRUCT.fullmatch(line)):
            if opened["base"] and opened["base"] not in of_struct:
                raise CompileError(f"params.cuh({number}): there is no struct {opened['base']} above.")
            name, alignment, members = opened["name"], int(opened["alignment"] or 1), {}
            members |= of_struct.get(opened["base"], {})
        elif line == "};" and members:
            known[name], of_struct[name] = _layout(members, alignment), members
            name, members = "", {}
        elif name and (member := _MEMBER.fullmatch(line)):
            kind = member["type"].removeprefix("const ").strip()
            if not kind.endswith("*") and kind not in known:
                raise CompileError(f"params.cuh({number}): type {kind!r} is none of {', '.join(known)}.")
            if member["name"] in members:
                raise CompileError(f"params.cuh({number}): {name} has two members {member['name']}.")
            element, aligned = (_POINTER, 8) if kind.endswith("*") else known[kind]
            length = (int(member["length"]),) if member["length"] else ()
            members[member["name"]] = np.dtype((element, length)), aligned
        else:
            raise CompileError(f"params.cuh({number}): expected one declaration a line, got {line!r}.")
    if name:
        raise CompileError(f"params.cuh({number}): struct {name} has no end.")
    return {name: struct for name, (struct, _) in known.items() if name not in _TYPES}


def _layout(members: dict[str, tuple[np.dtype, int]], alignment: int) -> tuple[np.dtype, int]:
    """The dtype of a struct and its alignment, from those of its members; NumPy's own rule knows no ``alignas``."""
    kinds, alignments = zip(*members.values(), strict=True)
    alignment = max(alignment, *alignments)
    offsets, end = [], 0
    for kind, aligned in members.values():
        offsets.append(-(-end // aligned) * aligned)
        end = offsets[-1] + kind.itemsize
    itemsize = -(-end // alignment) * alignment
    layout = np.dtype({"names": list(members), "formats": kinds, "offsets": offsets, "itemsize": itemsize}, align=True)
    return layout, alignment
