"""What a call consists of: its arrays, what it asks for, and in whose words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from cuflash.arrays import ArrayT, Library, View
from cuflash.dropout import Scheme
from cuflash.dtypes import Precision
from cuflash.masks import Alignment, Mask
from cuflash.mods import Mod, Traced
from cuflash.numbers import pair
from cuflash.problem import Direction, Problem

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask


class Arrays(NamedTuple):
    """The arrays of a call by the names of ``params.cuh``; None where one is left out."""

    q: Any
    k: Any
    v: Any
    mask: Any = None
    bias: Any = None
    alibi: Any = None
    sink: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_kv: Any = None
    seqused_q: Any = None
    seqused_kv: Any = None
    table: Any = None
    k_new: Any = None
    """Of a cache alone, like the next five."""
    v_new: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    leftpad: Any = None
    cache_batch: Any = None
    rng_state: Any = None
    """Backward only, like the next four."""
    dout: Any = None
    lse: Any = None
    dlse: Any = None
    row_state: Any = None
    out: Any = None
    """Written by the forward, read by the backward."""
    dq: Any = None
    dk: Any = None
    dv: Any = None
    captured: Any = None
    """A tuple of what the written score reads, then of what the written mask reads."""

    def each(self) -> tuple[Any, ...]:
        """All arrays one by one, the captured ones last, but None for those of NumPy that are beside another library's.

        Captured arrays may be in host memory whatever the others are.
        """
        if self.captured is None:
            return self
        host = () if isinstance(self.q, np.ndarray) else np.ndarray
        return (*self[:-1], *(None if isinstance(x, host) else x for x in self.captured))

    def like(self, each: Sequence[Any]) -> Arrays:
        """Others in the places of all that `each` gives."""
        if self.captured is None:
            return Arrays(*each)
        own = len(self) - 1
        captured = zip(self.captured, each[own:], strict=True)
        return Arrays._make((*each[:own], tuple(x if other is None else other for x, other in captured)))

    def by_name(self) -> dict[str, Any]:
        """Those that were not left out, by name, the captured ones by number: ``captured0``."""
        names: tuple[str, ...] = self._fields
        if self.captured is not None:
            names = (*names[:-1], *(f"captured{i}" for i in range(len(self.captured))))
        return {name: x for name, x in zip(names, self.each(), strict=True) if x is not None}

    def outputs(self, direction: Direction) -> tuple[Any, ...]:
        """Those that a call writes where they are given; it allocates the others."""
        return (self.out,) if direction == "forward" else self[-4:-1]


class Tangents(NamedTuple):
    """How arrays of a call change, by their names: shaped and typed like them; None is not at all."""

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    sink: Any = None
    out: Any = None
    """Written by a forward; a backward reads those of dout and dlse here, like the next."""
    lse: Any = None


new = Arrays.__new__
"""``new(Arrays, q=q, ...)`` is ``Arrays(q=q, ...)`` in half the time: it makes no dictionary of the keywords first."""

OUTPUTS: dict[Direction, tuple[str, ...]] = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
"""The names of :meth:`Arrays.outputs`."""

_FLASH = {
    "mask": "attn_mask", "bias": "attn_bias", "alibi": "alibi_slopes", "cu_seqlens_kv": "cu_seqlens_k",
    "seqused_kv": "seqused_k", "table": "block_table",
}  # fmt: skip
_MHA = _FLASH | {
    "dropout_p": "p_dropout", "causal": "is_causal", "alibi": "alibi_slopes_", "bias": "attn_bias_",
    "lse": "softmax_lse", "rng_state": "philox_seed", "dq": "dq_", "dk": "dk_", "dv": "dv_", "table": "block_table_",
}  # fmt: skip
VOCABULARIES: dict[str, dict[str, str]] = {
    "flash": _FLASH,
    "kvcache": _FLASH | {
        "k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_kv": "cache_seqlens",
        "leftpad": "cache_leftpad", "cache_batch": "cache_batch_idx",
    },
    "sdpa": _FLASH | {
        "q": "query", "k": "key", "v": "value", "causal": "is_causal", "softmax_scale": "scale", "bias": "attn_mask",
    },
    "mha_fwd": _MHA | {"out": "out_"},
    "mha_bwd": _MHA,
    "mem_eff_forward": _MHA | {"out": "out_", "softmax_scale": "scale", "seqused_kv": "seqused_k_"},
    "mem_eff_backward": _MHA | {"softmax_scale": "scale", "bias": "attn_bias"},
    "efficient": _FLASH | {
        "q": "query", "k": "key", "v": "value", "softmax_scale": "scale", "bias": "bias", "seqused_kv": "seqlen_k",
        "lse": "logsumexp", "rng_state": "philox_seed", "dout": "grad_out_",
    },
}  # fmt: skip
"""What callers know arrays and options as, by function, where it is something else."""

_NAMES = {
    vocabulary: tuple(words.get(name, name) for name in Arrays._fields) for vocabulary, words in VOCABULARIES.items()
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Manner:
    """How a call is put, which changes none of its results."""

    vocabulary: str = "flash"
    """Whose names messages use."""
    layout: Literal["bshd", "bhsd"] = "bshd"
    """The axes of dense tensors."""
    enable_gqa: bool = True
    """Query heads may share key/value heads."""
    validate: bool = False
    """Read and check where packed sequences lie on a GPU too, once; NumPy arrays are always checked."""
    family: str | tuple[str, ...] | None = None
    """Hold the planner to one kernel family or to some, for checks of kernels that another is preferred to."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the caller knows the fields of `Arrays` as."""
        return _NAMES[self.vocabulary]


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What a call asks for besides its arrays, as given and of any type; made by `asked`."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alignment: Alignment = "bottom-right"
    dropout_p: float = 0.0
    dropout_scheme: Scheme = "byte"
    unbiased_dropout: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    num_splits: int = 0
    """Forward only: blocks that share a row's keys; 0 leaves the number to the plan."""
    cache: bool = False
    """Forward only: k and v are a cache, of which as much is in use as is said beside them."""
    rotary_interleaved: bool = True
    """Forward only: pairs of columns that turn together are neighbours."""
    keep_state: bool = False
    """Forward only: also return `row_state`, what the backward needs beyond lse for rows of P to sum to 1."""
    tangents: Literal["no", "too", "alone"] = "no"
    """Forward only: whether to return how out and lse change along the tangents that come beside the arrays, too, or
    nothing else."""
    empty_lse: float = -inf
    """Forward only: the log-sum-exp of rows that see no key."""
    tail_lse: float = -inf
    """Forward only: that of packed rows that take part in nothing: behind the last sequence, or not in use."""
    deterministic: bool = False
    """Backward only."""
    bias_grad: bool = False
    """Backward only."""
    precision: Precision = "full"
    """What products take of fp32 tensors."""
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_mask: BlockMask | None = None
    captured_grad: bool = False
    """Backward only."""
    keep_delta: bool = False
    """Backward only: also return `delta`, the sum of dout * out of each row less its dlse."""
    manner: Manner = Manner()
    is_kind: bool = False
    """There are no other options of these values and types, so the object stands for them in a key."""

    def name(self, argument: str) -> str:
        """What the caller knows an array or an option as."""
        if argument.startswith("captured") and argument[8:].isdigit():
            return self._captured_names[int(argument[8:])]
        return VOCABULARIES[self.manner.vocabulary].get(argument, argument)

    def names(self, arrays: Arrays) -> tuple[str, ...]:
        """What the caller knows each of the arrays as, those that are left out too."""
        names = self.manner.names
        return names if arrays.captured is None else (*names[:-1], *self._captured_names[: len(arrays.captured)])

    @property
    def band(self) -> Mask | None:
        """The band that a block mask is, where no keyword asks for another one."""
        band = getattr(self.block_mask, "band", None)
        own = band is not None and (self.causal is not False or pair(self.window_size) != (-1, -1))
        return None if own else band

    @property
    def rule(self) -> Traced | None:
        """What kernels test pairs of a block mask by; those that sum a bias' gradient walk no lists, and test all."""
        return None if self.band is not None else getattr(self.block_mask, "rule" if self.bias_grad else "tested", None)

    @cached_property
    def kind(self) -> Options:
        """What stands for them in a key: the same ones, but for a block mask of which they say the kind alone."""
        kind = getattr(self.block_mask, "kind", None)
        return self if kind is None else self.replace(block_mask=kind)

    @cached_property
    def _captured_names(self) -> tuple[str, ...]:
        mods = ("score_mod", self.score_mod), ("mask_mod", self.mask_mod), ("block_mask", self.rule and self.rule.mod)
        return tuple(f"captured{i} of {name}" for name, mod in mods if mod for i in range(len(mod.operands)))

    def views(self, framework: Library, arrays: Arrays) -> dict[str, View]:
        """The arrays that are given, spelled out under the caller's names."""
        return {name: framework.view(self.name(name), x) for name, x in arrays.by_name().items()}

    def axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of q, k, v and every array with heads of elements."""
        return ("total", "h", "d") if varlen else tuple(self.manner.layout)

    def row_axes(self, varlen: bool) -> tuple[str, ...]:
        """The axes of lse and every array with one number for each head and query row."""
        return ("h", "total") if varlen else ("b", "h", "s")

    def values(self) -> dict[str, Any]:
        """All that was asked for and how, by name."""
        return {name: getattr(self.manner if name in _MANNER else self, name) for name in _DEFAULTS}

    @cached_property
    def keeping(self) -> Options:
        """The same, and :attr:`keep_state`."""
        return self.replace(keep_state=True)

    def replace(self, **changes: Any) -> Options:
        """The same but for some values, of the manner too."""
        if self.is_kind and "window_size" not in changes:  # whose sides' types the cache would not see
            try:
                return _replaced(self, **changes)
            except TypeError:  # a value that cannot be hashed
                pass
        return _made(**self.values() | changes)


_MANNER = {field.name: field.default for field in fields(Manner)}
_DEFAULTS = {f.name: f.default for f in fields(Options) if f.name not in ("manner", "is_kind")} | _MANNER


def asked(
    *,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alignment: Any = "bottom-right",
    dropout_p: Any = 0.0,
    dropout_scheme: Any = "byte",
    unbiased_dropout: Any = False,
    num_splits: Any = 0,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    deterministic: Any = False,
    bias_grad: Any = False,
    precision: Any = "full",
    validate: Any = False,
    enable_gqa: Any = True,
    layout: Literal["bshd", "bhsd"] = "bshd",
    vocabulary: str = "flash",
    **others: Any,
) -> Options:
    """The options of these values, and of `others`, which are further fields of `Options` and `Manner`.

    They are one object wherever the same values of the same types are asked for: of a call that comes again nothing is
    put together, and the object is a key without being hashed value by value.
    """
    # The cache does not see the types of what a tuple holds.
    left, right = window_size if type(window_size) is tuple and len(window_size) == 2 else (None, None)
    values = (
        softmax_scale, causal, window_size, softcap, alignment, dropout_p, dropout_scheme, unbiased_dropout, num_splits,
        max_seqlen_q, max_seqlen_k, deterministic, bias_grad, precision, validate, enable_gqa, layout, vocabulary, left,
        right,
    )  # fmt: skip
    try:
        return _asked(*values, **others) if others else _asked(*values)
    except TypeError:  # a value that cannot be hashed
        return _asked.__wrapped__(*values, **others)


_ASKED = tuple(asked.__kwdefaults__ or ())


@lru_cache(maxsize=4096, typed=True)
def _asked(*values: Any, **others: Any) -> Options:
    return _made(**dict(zip(_ASKED, values, strict=False)), **others)


@lru_cache(maxsize=4096, typed=True)
def _replaced(options: Options, **changes: Any) -> Options:
    return _made(**options.values() | changes)


def _made(**values: Any) -> Options:
    """The only options of these values and types, or options of their own where a value cannot be hashed."""
    values = _DEFAULTS | values
    window = values["window_size"]
    try:
        return _only(*(window if isinstance(window, tuple) else ()), **values)
    except TypeError:
        return _put_together(values, is_kind=False)


@lru_cache(maxsize=4096, typed=True)
def _only(*sides: Any, **values: Any) -> Options:
    return _put_together(values, is_kind=True)


def _put_together(values: dict[str, Any], is_kind: bool) -> Options:
    manner = Manner(**{name: value for name, value in values.items() if name in _MANNER})
    others = {name: value for name, value in values.items() if name not in _MANNER}
    return Options(**others, manner=manner, is_kind=is_kind)


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


class CapturedGradients(NamedTuple, Generic[ArrayT]):
    """Gradients of one call with ``captured_grad=True``.

    Attributes
    ----------
    dq, dk, dv, dbias, dsink : array
        As in `Gradients`.
    dcaptured : tuple of array
        One for each array that `score_mod` reads, in the order of first use, of its shape, in float32 (float64 for
        float64 tensors); None for those of integers and truth values.
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    dbias: Any
    dsink: Any
    dcaptured: tuple[Any, ...]


def results(
    problem: Problem, keep_state: bool = False, keep_delta: bool = False, tangents: str = "no"
) -> tuple[str, ...]:
    """What a call returns."""
    if problem.direction == "forward":
        wanted = {
            "out": tangents != "alone", "lse": tangents != "alone", "tangent_out": tangents != "no",
            "tangent_lse": tangents != "no", "row_state": keep_state, "rng_state": problem.dropout is not None,
        }  # fmt: skip
        return tuple(name for name in wanted if wanted[name])
    wanted = {"dbias": problem.bias_grad, "dsink": problem.sink}
    extra = [name for name in wanted if wanted[name]]
    extra += [f"dcaptured{i}" for i in problem.captured_gradients]
    return ("dq", "dk", "dv", *extra, *(["delta"] if keep_delta else []))
