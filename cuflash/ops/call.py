"""What a call consists of: its keywords as one value, and the names and order of its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

from cuflash.arrays import ArrayT
from cuflash.dropout import Scheme
from cuflash.masks import Alignment
from cuflash.problem import Direction, Problem

SHARED = (
    "q", "k", "v", "attn_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "attn_bias",
    "sink",
)  # fmt: skip
"""The arrays that both directions read."""

Shared = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any]
"""Those arrays in that order."""

ARGUMENTS: dict[Direction, tuple[str, ...]] = {
    "forward": (*SHARED, "block_table", "out"),
    "backward": (*SHARED, "rng_state", "out", "dout", "lse", "dlse", "row_state", "dq", "dk", "dv"),
}
"""The arrays of a call in the order in which they are handed down; one that was left out is None."""

OUTPUTS: dict[Direction, tuple[str, ...]] = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
"""The last arguments: written when given, allocated when not."""

_MHA = {
    "dropout_p": "p_dropout", "causal": "is_causal", "alibi_slopes": "alibi_slopes_", "attn_bias": "attn_bias_",
    "lse": "softmax_lse", "rng_state": "philox_seed", "dq": "dq_", "dk": "dk_", "dv": "dv_",
    "block_table": "block_table_",
}  # fmt: skip
_VOCABULARIES: dict[str, dict[str, str]] = {
    "flash": {},
    "sdpa": {
        "q": "query", "k": "key", "v": "value", "causal": "is_causal", "softmax_scale": "scale",
        "attn_bias": "attn_mask",
    },
    "mha_fwd": _MHA | {"out": "out_"},
    "mha_bwd": _MHA,
    "mem_eff_forward": _MHA | {"out": "out_", "softmax_scale": "scale", "seqused_k": "seqused_k_"},
    "mem_eff_backward": _MHA | {"softmax_scale": "scale", "attn_bias": "attn_bias"},
    "efficient": {
        "q": "query", "k": "key", "v": "value", "softmax_scale": "scale", "attn_bias": "bias", "seqused_k": "seqlen_k",
        "lse": "logsumexp", "rng_state": "philox_seed", "dout": "grad_out_",
    },
}  # fmt: skip
"""What callers know arguments as, by function, where it is something else."""


_NAMES = {
    (direction, vocabulary): tuple(words.get(argument, argument) for argument in arguments)
    for direction, arguments in ARGUMENTS.items()
    for vocabulary, words in _VOCABULARIES.items()
}


class Options(NamedTuple):
    """The keywords of a call, as given."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alignment: Alignment = "bottom-right"
    dropout_p: float = 0.0
    dropout_scheme: Scheme = "byte"
    unbiased_dropout: bool = False
    deterministic: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    bias_grad: bool = False
    validate: bool = False
    """Read and check where packed sequences lie on a GPU too, once; NumPy arrays are always checked."""
    enable_gqa: bool = True
    sdpa: bool = False
    """Called as ``scaled_dot_product_attention``: (b, h, s, d) tensors and PyTorch's argument names."""
    vocabulary: str = "flash"
    """Whose argument names messages use."""
    num_splits: int = 0
    """Forward only: blocks that share a row's keys; 0 leaves the number to the plan."""
    keep_state: bool = False
    """Forward only: also return `row_state`, what the backward needs beyond lse for rows of P to sum to 1."""
    keep_delta: bool = False
    """Backward only: also return `delta`, the sum of dout * out of each row less its dlse."""
    empty_lse: float = -inf
    """Forward only: the log-sum-exp of rows that see no key."""
    tail_lse: float = -inf
    """Forward only: that of packed rows that take part in nothing: behind the last sequence, or not in use."""
    family: str | tuple[str, ...] | None = None
    """Hold the planner to one kernel family or to some, for checks of kernels that another is preferred to."""

    def name(self, argument: str) -> str:
        """What the caller knows an argument as."""
        return _VOCABULARIES["sdpa" if self.sdpa else self.vocabulary].get(argument, argument)

    def names(self, direction: Direction) -> Sequence[str]:
        """What the caller knows :data:`ARGUMENTS` as."""
        return _NAMES[direction, "sdpa" if self.sdpa else self.vocabulary]

    def kind(self) -> tuple[Any, ...]:
        """What tells options apart also where they are equal, as 1, 1.0 and True are, of which not all are right.

        Raises
        ------
        TypeError
            If `window_size` has no elements.
        """
        return self, (*map(type, self), *map(type, self.window_size))

    def axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of q, k, v and every array with heads of elements."""
        return ("total", "h", "d") if varlen else ("b", "h", "s", "d") if self.sdpa else ("b", "s", "h", "d")

    def row_axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of lse and every array with one number for each head and query row."""
        return ("h", "total") if varlen else ("b", "h", "s")


class _Token:
    """What stands for options in a key."""

    options: _Interned


class _Interned(Options):
    """Options that are one object wherever the same values of the same types are asked for."""

    token: _Token

    def kind(self) -> Any:
        """As of any options."""
        return self.token

    def _replace(self, **changes: Any) -> _Interned:
        return _replaced(self.token, **changes)


def asked(softmax_scale: Any, causal: Any, window_size: Any, *others: Any, num_splits: Any = 0) -> Options:
    """`Options` of these values, whose kind need not be put together and hashed in every call."""
    if type(window_size) is tuple and len(window_size) == 2:
        try:
            return _interned(num_splits, *window_size, softmax_scale, causal, *others)
        except TypeError:  # one that cannot be hashed
            pass
    return Options(**_fields(softmax_scale, causal, window_size, *others), num_splits=num_splits)


@lru_cache(maxsize=4096, typed=True)
def _interned(num_splits: Any, left: Any, right: Any, softmax_scale: Any, causal: Any, *others: Any) -> _Interned:
    fields = _fields(softmax_scale, causal, (left, right), *others)
    return _the_one(left, right, *Options(**fields, num_splits=num_splits))


@lru_cache(maxsize=4096, typed=True)
def _replaced(token: _Token, **changes: Any) -> _Interned:
    options = Options(**{**token.options._asdict(), **changes})
    return _the_one(*options.window_size, *options)


@lru_cache(maxsize=4096, typed=True)
def _the_one(left: Any, right: Any, *values: Any) -> _Interned:
    """The options of all fields, and the sides of the window, whose types tuples do not show."""
    options = _Interned(*values)
    options.token = _Token()
    options.token.options = options
    return options


def _fields(*values: Any) -> dict[str, Any]:
    """The first fields of options by name."""
    return dict(zip(Options._fields, values, strict=False))


BiasGradT = TypeVar("BiasGradT")
SinkGradT = TypeVar("SinkGradT")


class Gradients(NamedTuple, Generic[ArrayT, BiasGradT, SinkGradT]):
    """Gradients of one call.

    Attributes
    ----------
    dq, dk, dv : array
        Shaped and typed like q, k and v.
    dbias : array, optional
        Shaped like `attn_bias`, summed over the axes along which it was broadcast, in float32 (float64 for float64
        tensors); None unless ``bias_grad=True``.
    dsink : array, optional
        (heads_q,) float32; None without a sink.
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    dbias: BiasGradT = None  # type: ignore[assignment]
    dsink: SinkGradT = None  # type: ignore[assignment]


def results(problem: Problem, keep_state: bool = False, keep_delta: bool = False) -> tuple[str, ...]:
    """What a call returns."""
    if problem.direction == "forward":
        extra = [name for name, wanted in (("row_state", keep_state), ("rng_state", problem.dropout)) if wanted]
        return ("out", "lse", *extra)
    wanted = {"dbias": problem.bias_grad, "dsink": problem.sink, "delta": keep_delta}
    extra = [name for name in wanted if wanted[name]]
    return ("dq", "dk", "dv", *extra)


def given(direction: Direction, arrays: Sequence[Any]) -> dict[str, Any]:
    """The arrays that were not left out, by argument."""
    return {name: x for name, x in zip(ARGUMENTS[direction], arrays, strict=True) if x is not None}
