"""Config: the compile-time choices of one kernel. Each kernel has a class with what it reads and nothing else.

Configs that several families share are here; a family's own are in its file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cuflash.mods.tracing import Mod, Operand

HEADER = "header"
"""Key of a field's metadata: the kernel header that declares the types its value names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What every launch takes; member by member the ``struct Config`` of a kernel's ``config.cuh``, as in subclasses.

    Strings are names of types, the rest constants. Everything that does not change instructions or registers is a
    run-time field of ``kernels/params.cuh`` instead.
    """

    threads: int
    blocks_per_sm: int = 1
    smem_bytes: int = 0
    """Dynamic shared memory; a kernel that has any asserts that it equals ``sizeof(SmemPlan)``."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a caller wrote: ``ScoreMod``, ``MaskMod`` and ``BlockMod`` of a kernel's ``config.cuh``."""

    score: Mod | None
    mask: Mod | None
    gradients: tuple[int, ...] = ()
    """Which of the arrays that the score reads, by number, have gradients that are summed."""
    flat: tuple[int, ...] = ()
    """Which of all arrays, by number, are contiguous, of less than 2^31 elements."""
    fast: bool = False
    """For results of 16 bits, of at most a million queries and keys."""
    exact: bool = False
    """The gradients are summed exactly, so that no order of addends shows (``attention/exact_sum.cuh``)."""
    blocks: Mod | None = None
    """The rule of the partial blocks of a block mask, whose lists are arguments, too."""

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What is read: by the score, then by the mask, then by the rule of blocks."""
        mods = self.score, self.mask, self.blocks
        return tuple(operand for mod in mods if mod is not None for operand in mod.operands)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig(Config):
    """Of a kernel that goes through the rows of sequences."""

    element: str = field(metadata={HEADER: "element.cuh"})
    """``fp16``, ``bf16``, ``float`` or ``double``."""
    sequence: str = field(default="DenseSequence", metadata={HEADER: "attention/sequence.cuh"})
    """DenseSequence, VarlenSequence, PagedSequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig(SequenceConfig):
    """Of a kernel that computes scores."""

    dim_qk: int
    dim_v: int
    tile_q: int
    tile_kv: int
    mask: str = field(default="NoMask", metadata={HEADER: "attention/mask.cuh"})
    """NoMask, CausalMask, WindowMask, TensorMask, WrittenMask, ListedMask."""
    score: str = field(default="ScaledScore<float>", metadata={HEADER: "attention/score.cuh"})
    """ScaledScore, SignedScore, (Exact)SoftCapScore, and what is made of them."""
    dropout: str = field(default="NoDropout", metadata={HEADER: "attention/dropout.cuh"})
    """NoDropout, ByteDropout, WordDropout."""
    written: Written | None = None
    """What ``WrittenScore`` and ``WrittenMask`` are of, printed in front of the struct."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig(AttentionConfig):
    """Of a kernel whose threads copy tiles themselves; enough for ``bwd_simt_*`` and ``bwd_bias_*``."""

    copy_bytes: int
    """Width of one global access; 2, 4, 8 or 16."""


BIAS_GRADIENT = {HEADER: "attention/bias_gradient.cuh"}
"""Metadata of the field that says where the gradient of the bias goes: NoBiasGradient, StoredBiasGradient."""

CAPTURED_GRADIENT = {HEADER: "tile/captured_gradient.cuh"}
"""The same of what a written score reads: NoCapturedGradient, AddedCapturedGradient, DistanceCapturedGradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardConfig(CopyConfig):
    """``fwd_sm80`` and ``fwd_simt``."""

    sink: str = field(default="NoSink", metadata={HEADER: "attention/softmax.cuh"})
    """NoSink, LearnableSink."""
    heads: str = field(default="OneHead", metadata={HEADER: "attention/heads.cuh"})
    """Whose rows a query tile holds: OneHead, HeadGroup."""
    split: str = field(default="NoSplit", metadata={HEADER: "attention/split.cuh"})
    """Which of its keys a block walks: NoSplit, KeySplits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JvpConfig(ForwardConfig):
    """``jvp_simt``."""

    tangent_bias: str = field(default="NoBiasTangent", metadata={HEADER: "attention/tangent.cuh"})
    """NoBiasTangent, BiasTangent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewConfig(ForwardConfig):
    """``fwd_sm80_few``."""

    split: str = field(default="KeyRanges", metadata={HEADER: "attention/ranges.cuh"})
    """KeyRanges, KeySplits."""
    cluster: bool = False
    """The blocks of a query tile are a cluster and merge what they find in each other's shared memory."""
    stages: int
    """Key tiles of a warp in flight."""
