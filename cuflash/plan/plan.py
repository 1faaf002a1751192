"""Plan: what will run for a problem on a device, kernel by kernel, as frozen printable data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from math import prod
from typing import Literal

import numpy as np

from cuflash.device import Device
from cuflash.plan.ceiling import Ceiling
from cuflash.plan.config import Config
from cuflash.problem import Problem
from cuflash.sheet import Sheet


@dataclass(frozen=True, slots=True)
class Box:
    """What one bulk copy moves: some rows and 128 bytes of columns of one head of a tensor, or of a group of heads."""

    tensor: str
    """``q``, ``k``, ``v``, ``bias``, ``dout`` or a result, which the parameter block describes in ``<tensor>_map``."""
    rows: int
    heads: int = 1
    """Of the rows, neighbours are those of as many heads, and then those of the next query."""
    once: bool = False
    """Nobody else reads what is in it."""
    ends: bool = False
    """Of a page or cache, it ends where the rows that are in use do."""


_SIZES: tuple[tuple[set[str], str], ...] = (
    ({"threads"}, "{threads} threads"),
    ({"tile_q", "tile_kv"}, "tile {tile_q} x {tile_kv}"),
    ({"copy_bytes"}, "{copy_bytes}-byte accesses"),
    ({"smem_bytes"}, "{smem_bytes:,} bytes of shared memory"),
    ({"consumer_registers"}, "{consumer_registers} registers to compute"),
)
"""Members of a config, and how a step speaks of them where its kernel has them."""


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel launch."""

    kernel: str
    """Name of the kernel: ``kernels/entry/<kernel>.cu`` defines ``extern "C" <kernel>``."""
    params: str
    """The struct it takes by value, ``FwdParams`` or ``BwdParams`` (``kernels/params.cuh``)."""
    config: Config
    num_blocks: int
    """Blocks of the one-dimensional grid."""
    boxes: tuple[Box, ...] = ()
    """The tensors that it copies in bulk (``jit/tensormap.py``)."""
    walks: Literal["", "kv", "q"] = ""
    """What it walks by lists where there is a block mask: key tiles of its query tiles, or the other way round."""
    cluster: int = 1
    """So many neighbouring blocks are launched as a cluster."""

    def __str__(self) -> str:
        sizes = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        words = [words.format(**sizes) for names, words in _SIZES if sizes.keys() >= names]
        return f"{self.kernel}: {self.num_blocks:,} blocks of {', '.join(words)}"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A scratch array."""

    name: str
    """The member of the parameter struct that points to it."""
    dtype: np.dtype
    shape: tuple[int, ...]
    zeroed: bool = False
    kept: bool = False
    """Zeroed, and zero again when the kernels are done, so that calls on a stream can share it."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return prod(self.shape) * self.dtype.itemsize


_ALIGNMENT = 256
"""Of arrays in one piece of memory, in bytes; those that are given are trusted to start at multiples of 16."""


class Scratch:
    """One piece of memory for all scratch arrays, those that start as zeros first."""

    def __init__(self, workspaces: Sequence[Workspace]) -> None:
        first = sorted(workspaces, key=lambda w: not (w.zeroed or w.kept))
        sizes = [-(-w.nbytes // _ALIGNMENT) * _ALIGNMENT for w in first]
        starts = dict(zip((w.name for w in first), accumulate(sizes, initial=0), strict=False))
        self.nbytes: int = sum(sizes)
        self.nbytes_zeroed: int = sum(n for w, n in zip(first, sizes, strict=True) if w.zeroed or w.kept)
        self.starts: tuple[int, ...] = tuple(starts[w.name] for w in workspaces)


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels of one family that answer a problem, in launch order, with their scratch memory."""

    problem: Problem
    device: Device
    family: str
    steps: tuple[Step, ...]
    workspaces: tuple[Workspace, ...] = ()
    reason: str = ""
    """Why these tiles, in words."""
    ceiling: Ceiling | None = None
    """What the main kernel can reach at most; None where nobody has counted."""
    num_splits: int = 1
    """Blocks that share the keys of one query tile of a forward."""
    heads_in_step: int = 1
    """Key heads whose blocks walk the same keys at a time, where blocks share all keys in ranges; forward only."""
    division: str = ""
    """Why so many, and what shares a tile, in words (``plan/splits.py``); forward only."""
    bias_parts: int = 1
    """Blocks that share what adds to one tile of the bias' gradient (``plan/bias.py``); backward only."""

    def __repr__(self) -> str:
        kernels = ", ".join(step.kernel for step in self.steps)
        return f"<{type(self).__name__}: {self.problem} on {self.device}, {kernels}>"

    def lines(self) -> list[tuple[str, str]]:
        """What runs, line by line: a label and a text."""
        lines = [("family", f"{self.family}: {self.reason}")]
        if self.ceiling is not None:
            lines.append(("at most", str(self.ceiling)))
        if self.division:
            lines.append(("splits", f"{self.num_splits}: {self.division}"))
        scratch = ", ".join(f"{array.name} {array.nbytes:,}" for array in self.workspaces)
        lines.append(("workspace", f"{self.workspace_bytes:,} bytes" + (f" ({scratch})" if scratch else "")))
        return lines + [("kernel", str(step)) for step in self.steps]

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return Sheet(f"plan: {self.problem} on {self.device}", self.lines())._repr_html_()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all scratch arrays together."""
        return sum(w.nbytes for w in self.workspaces)
