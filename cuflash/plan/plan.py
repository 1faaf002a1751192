"""Plan: what will run for a problem on a device, kernel by kernel, as frozen printable data."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from cuflash.device import Device
from cuflash.plan.ceiling import Ceiling
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True)
class Config:
    """The compile-time choices of one kernel, member by member the ``struct Config`` of its ``config.cuh``.

    Everything that does not change instructions or registers is a run-time field of ``kernels/params.cuh`` instead.
    """

    element: str
    """``fp16``, ``bf16``, ``float`` or ``double`` (``kernels/element.cuh``)."""
    dim_qk: int
    dim_v: int
    threads: int
    sequence: str = "DenseSequence"
    """``kernels/attention/sequence.cuh``: DenseSequence, VarlenSequence, PagedSequence."""
    mask: str = "NoMask"
    """``kernels/attention/mask.cuh``: NoMask, CausalMask, WindowMask, TensorMask."""
    score: str = "ScaledScore<float>"
    """``kernels/attention/score.cuh``: ScaledScore, SignedScore, (Exact)SoftCapScore, and what is made of them."""
    bias_copies: str = "NoBias"
    """``kernels/tile/bias.cuh``: NoBias, BiasTiles, BiasRow (``sm90``)."""
    dropout: str = "NoDropout"
    """``kernels/attention/dropout.cuh``: NoDropout, ByteDropout, WordDropout."""
    sink: str = "NoSink"
    """``kernels/attention/softmax.cuh``: NoSink, LearnableSink."""
    heads: str = "OneHead"
    """Whose rows a query tile of the forward holds (``kernels/attention/heads.cuh``): OneHead, HeadGroup."""
    split: str = "NoSplit"
    """Which of its keys a block of the forward walks (``kernels/attention/split.cuh``): NoSplit, KeySplits."""
    reduction: str = "AtomicReduction"
    """How blocks add to dq (``kernels/tile/dq_accum.cuh``): AtomicReduction, OrderedReduction."""
    tile_q: int = 1
    tile_kv: int = 1
    stages: int = 1
    """Query tiles in flight in the backward."""
    dim_splits: int = 1
    """Blocks that share the columns of one gradient tile."""
    copy_bytes: int = 16
    """Width of one global access; 2, 4, 8 or 16."""
    blocks_per_sm: int = 1
    ping_pong: bool = False
    """Warpgroups take turns on the tensor cores (``sm90``)."""
    row_buffers: int = 1
    """Tiles of q that a consumer has room for; out takes the place of the one that is done (``sm90``)."""
    producer_registers: int = 0
    """Of a thread of the warpgroup that loads, and of those that compute; 0 where warpgroups have no roles."""
    consumer_registers: int = 0
    smem_bytes: int = 0
    """Dynamic shared memory; the kernel asserts that it equals ``sizeof(SmemPlan)``."""


@dataclass(frozen=True, slots=True)
class Box:
    """What one bulk copy moves: some rows and 128 bytes of columns of one head of a tensor."""

    tensor: str
    """``q``, ``k``, ``v``, ``out`` or ``bias``: the parameter block describes it to the engine in ``<tensor>_map``."""
    rows: int


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

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.kernel}: {self.num_blocks:,} blocks of {config.threads} threads, "
            f"tile {config.tile_q} x {config.tile_kv}, {config.copy_bytes}-byte accesses, "
            f"{config.smem_bytes:,} bytes of shared memory"
            + (f", {config.consumer_registers} registers to compute" if config.consumer_registers else "")
        )


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


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels of one family that answer a problem, in launch order, with their scratch memory."""

    problem: Problem
    device: Device
    family: str
    steps: tuple[Step, ...]
    workspaces: tuple[Workspace, ...] = ()
    reason: str = ""
    """Why these tiles, in words (``plan/tiles.py``)."""
    ceiling: Ceiling | None = None
    """What the main kernel can reach at most; None where nobody has counted."""
    num_splits: int = 1
    """Blocks that share the keys of one query tile of a forward."""
    division: str = ""
    """Why so many, and what shares a tile, in words (``plan/splits.py``); forward only."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all scratch arrays together."""
        return sum(w.nbytes for w in self.workspaces)
