"""What signatures share, for editors and type checkers: types of arrays, and keywords that are handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from cuflash.arrays import Array
from cuflash.dropout import Scheme
from cuflash.dtypes import Precision
from cuflash.generator import PhiloxGenerator
from cuflash.masks import Alignment
from cuflash.mods import Traced

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask

Generator = PhiloxGenerator | tuple[int, int] | None
"""What dropout draws from."""

WrittenScore = Callable[[Any, Any, Any, Any, Any], Any] | Traced | None
"""A score as a function of the score, the batch element, the query head, the query and the key."""
WrittenMask = Callable[[Any, Any, Any, Any], Any] | Traced | None
"""The same of whether the query sees the key."""


class FlashOptions(TypedDict, total=False):
    """Keywords of `flash_attn_func`: those that flash-attn does not have and that do not change what is returned."""

    alignment: Alignment
    attn_mask: Array | None
    attn_bias: Array | None
    sink: Array | None
    score_mod: WrittenScore
    mask_mod: WrittenMask
    block_mask: BlockMask | None
    generator: Generator
    dropout_scheme: Scheme
    unbiased_dropout: bool
    num_splits: int
    precision: Precision
    out: Array | None


class VarlenOptions(FlashOptions, total=False):
    """The same of `flash_attn_varlen_func`."""

    seqused_q: Array | None
    seqused_k: Array | None
    validate: bool


class _GradientOptions(TypedDict, total=False):
    """Keywords of both functions that give gradients."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alignment: Alignment
    attn_mask: Array | None
    cu_seqlens_q: Array | None
    cu_seqlens_k: Array | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqused_q: Array | None
    seqused_k: Array | None
    alibi_slopes: Array | None
    attn_bias: Array | None
    score_mod: WrittenScore
    mask_mod: WrittenMask
    block_mask: BlockMask | None
    dropout_p: float
    dropout_scheme: Scheme
    unbiased_dropout: bool
    deterministic: bool
    precision: Precision
    validate: bool


class BackwardOptions(_GradientOptions, total=False):
    """Keywords of `flash_attn_backward` that do not change what is returned."""

    rng_state: Array | None
    dlse: Array | None
    dq: Array | None
    dk: Array | None
    dv: Array | None


class VjpOptions(_GradientOptions, total=False):
    """Keywords of `flash_attn_vjp` that do not change what is returned."""

    generator: Generator
    num_splits: int


Result = TypeVar("Result", covariant=True)


class Pullback(Protocol[Result]):
    """The second result of `flash_attn_vjp`: from the gradient of the output to those of the inputs."""

    def __call__(self, dout: Array, dlse: Array | None = None) -> Result:
        """Gradients for that of the output, and of the log-sum-exp if it is not zero."""
        ...
