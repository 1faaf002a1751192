"""Problem: the frozen description of one attention call, without its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cuflash.dropout import Scheme
from cuflash.dtypes import BY_NUMPY_NAME, KINDS, TF32, DType
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.mods import Mod
from cuflash.numbers import shown
from cuflash.sheet import Sheet, spelled

Direction = Literal["forward", "backward"]
Layout = Literal["dense", "varlen", "cache"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions turn the first columns of queries and of keys that are appended to a cache."""

    dim: int
    """Columns that are turned, an even number."""
    interleaved: bool
    """A pair is two neighbours, or else columns half of `dim` apart."""
    dtype: DType
    """Of the cosines and sines."""
    together: bool
    """All queries are turned as the first one is, not each by a position of its own."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is compiled in of a block mask; its lists are not."""

    size: tuple[int, int]
    """Queries and keys of a block."""
    rule: Mod
    """What the visible pairs of partial blocks fulfil."""
    batch: int = 1
    """Batch elements with lists of their own; 1: all have the same."""
    heads: int = 1
    """Query heads with lists of their own; 1: all have the same."""


MAX_SPLITS = 128
"""The most blocks that share the keys of one query tile."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that decides which kernel runs and how; two equal problems get the same plan."""

    direction: Direction
    dtype: DType
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    """Query rows; the longest sequence's when the layout is ``varlen``."""
    len_kv: int
    """Key rows; the longest sequence's when the layout is ``varlen``, and those there is room for in a ``cache``."""
    dim_qk: int
    dim_v: int
    layout: Layout = "dense"
    """Queries and keys in (b, s, h, d) tensors; packed sequences; or dense queries over a cache, of whose keys as many
    are in use as the device knows."""
    total_q: int = 0
    """Rows of the packed query tensor (``varlen`` only)."""
    total_kv: int = 0
    """Rows of the packed key tensor, or of the whole cache (not ``dense``)."""
    page_size: int = 0
    """Keys of a page, where keys and values lie in the pages of a cache (not ``dense``); 0: they do not."""
    leftpad: bool = False
    """Rows of a ``cache`` before a sequence's first key are said to be padding."""
    appended: int = 0
    """Keys that the call adds to each sequence of a ``cache`` before it attends."""
    rotary: Rotary | None = None
    """How queries and the keys that are added are turned."""
    mask: Mask = Mask()
    softcap: float = 0.0
    """Scores become ``softcap * tanh(score / softcap)``; 0 leaves them alone."""
    softmax_scale: float = 1.0
    alibi: bool = False
    """Slopes times the distance from the diagonal are taken off the logits."""
    bias: DType | None = None
    """Element type of the tensor added to the logits, if any."""
    bias_broadcast: tuple[bool, bool, bool, bool] = (False, False, False, False)
    """Along which of (batch, heads_q, len_q, len_kv) the bias is broadcast; decides its gradient's shape."""
    bias_boxes: bool = True
    """The copy engine can read the bias: neighbouring keys, rows that start at multiples of 16 bytes, no axis reversed;
    axes may be broadcast."""
    bias_grad: bool = False
    """Backward only: the gradient of the bias is wanted."""
    score_mod: Mod | None = None
    """What a caller's function makes of the scaled and capped score, before ALiBi and bias; None leaves it alone."""
    mask_mod: Mod | None = None
    """Which pairs a caller's function lets take part, if the mask lets them too."""
    block_mask: Blocks | None = None
    """The same by lists of blocks, of which those in no list are not visited."""
    captured_flat: tuple[int, ...] = ()
    """Which of the arrays that `score_mod` and then `mask_mod` read, by number, are contiguous, of less than 2^31
    elements."""
    captured_grad: bool = False
    """Backward only: the gradients of the real numbers that `score_mod` reads are wanted."""
    sink: bool = False
    """A learnable logit per head takes part in every row's softmax without a value."""
    dropout: Scheme | None = None
    deterministic: bool = False
    """Backward only: bit-equal gradients from run to run."""
    tangents: tuple[str, ...] | None = None
    """Forward only: which of q, k, v, bias and sink change, where it is wanted how the results do."""
    num_splits: int = 0
    """Forward only: blocks that share the keys of one query tile, at most; 0 leaves the number to the plan."""
    copy_bytes: int = 16
    """The widest access (2, 4, 8 or 16 bytes) that every base pointer and row stride of the tensors allows."""
    shared_kv: bool = False
    """The values are the first columns of the keys, in the same memory, as in multi-head latent attention."""
    ascending: bool = True
    """Every stride of the tensors is positive: none of their axes is reversed or expanded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype("dtype", self.dtype))
        if self.bias is not None:
            object.__setattr__(self, "bias", _dtype("bias", self.bias))

    @property
    def copies_bias(self) -> bool:
        """Whether the copy engine can bring a bias to where it is used: one number a row is none of its affairs."""
        return self.bias is not None and self.bias_boxes and not self.bias_broadcast[3]

    @property
    def written(self) -> bool:
        """Whether a function of the caller's takes part."""
        return any(mod is not None for mod in (self.score_mod, self.mask_mod, self.block_mask))

    @property
    def captured_gradients(self) -> tuple[int, ...]:
        """Which of the arrays that `score_mod` reads, by number, have gradients that are wanted."""
        if self.score_mod is None or not self.captured_grad:
            return ()
        return tuple(i for i, operand in enumerate(self.score_mod.operands) if operand.kind == "real")

    @property
    def precision(self) -> str:
        """What is given up for speed, in words; empty where nothing is."""
        words = "numbers are multiplied as TF32 has them: errors up to 2^-11 of each, not 2^-24"
        return words if self.dtype == TF32 else ""

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads_q // self.heads_kv

    @property
    def rows_q(self) -> int:
        """Query rows of the whole call, over all sequences and one head."""
        return self.total_q if self.layout == "varlen" else self.batch * self.len_q

    @property
    def rows_kv(self) -> int:
        """Key rows of the whole call, over all sequences and one head."""
        return self.total_kv if self.layout != "dense" else self.batch * self.len_kv

    @property
    def forwards(self) -> float:
        """The work of the products, in that of a forward: five to its two of a backward, six with tangents."""
        return 2.5 if self.direction == "backward" else 3.0 if self.tangents is not None else 1.0

    def flops(self) -> float:
        """Floating-point operations of the products, the usual convention: visible pairs only.

        Varlen problems count every sequence at its maximum length, as lengths live on the device.
        """
        pairs = self.batch * self.heads_q * visible_pairs(self.mask, self.len_q, self.len_kv)
        forward = 2.0 * pairs * (self.dim_qk + self.dim_v)
        return self.forwards * forward

    def __repr__(self) -> str:
        return spelled(self, "direction", "dtype")

    def sheet(self) -> Sheet:
        """Its tensors and what is done to its scores."""
        q: tuple[int, ...] = (self.batch, self.len_q)
        kv: tuple[int, ...] = (self.batch, self.len_kv)
        longest = ""
        if self.layout == "varlen":
            q, kv = (self.total_q,), (self.total_kv,)
            longest = f", {self.batch} sequences of up to {{:,}} rows"
        if self.layout == "cache" and self.len_kv:
            kv = (self.total_kv // self.len_kv, self.len_kv)
        if self.page_size:
            kv = (self.total_kv // self.page_size, self.page_size)
        masks = [str(self.mask)]
        masks += [f"where {self.mask_mod}"] if self.mask_mod else []
        if self.block_mask:
            masks.append("blocks of {} x {}".format(*self.block_mask.size) + f" where {self.block_mask.rule}")
        score = [f"times {self.softmax_scale:.4g}"]
        score += [f"soft cap {self.softcap:g}"] if self.softcap else []
        score += [f"as {self.score_mod}"] if self.score_mod else []
        score += ["less ALiBi's distances"] if self.alibi else []
        score += [f"plus a bias in {self.bias}"] if self.bias else []
        score += ["a sink for each head"] if self.sink else []
        lines = [
            ("q", f"{(*q, self.heads_q, self.dim_qk)} {self.dtype}{longest.format(self.len_q)}"),
            ("k", f"{(*kv, self.heads_kv, self.dim_qk)} {self.dtype}{longest.format(self.len_kv)}"),
            ("v", f"{(*kv, self.heads_kv, self.dim_v)} {self.dtype}"),
            ("mask", ", ".join(masks)),
            ("scores", ", ".join(score)),
        ]
        lines += [("precision", self.precision)] if self.precision else []
        lines += [("appended", f"{self.appended} keys to each sequence of the cache")] if self.appended else []
        lines += [("left padding", "before the keys of each sequence")] if self.leftpad else []
        lines += [("rotary", f"turns {self.rotary.dim} columns")] if self.rotary else []
        lines += [("dropout", f"by the {self.dropout} scheme")] if self.dropout else []
        lines += [("wanted", "the gradient of the bias too")] if self.bias_grad else []
        lines += [("wanted", "the gradients of what the score reads too")] if self.captured_grad else []
        lines += [("wanted", "the same bits on every run")] if self.deterministic else []
        if self.tangents is not None:
            lines.append(("wanted", f"how the results change with {', '.join(self.tangents) or 'nothing'}, too"))
        lines += [("splits", f"{self.num_splits} of the keys, asked for")] if self.num_splits else []
        lines += [("FLOPs", f"{self.flops() / 1e9:,.2f} G")]
        return Sheet(f"problem: {self}", lines)

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return self.sheet()._repr_html_()

    def __str__(self) -> str:
        heads = f"h{self.heads_q}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        dims = f"d{self.dim_qk}" + (f"x{self.dim_v}" if self.dim_v != self.dim_qk else "")
        parts = [self.direction, self.dtype.name, f"b{self.batch}", heads, f"s{self.len_q}x{self.len_kv}", dims]
        parts += [self.layout] if self.layout != "dense" else []
        parts += [f"pages{self.page_size}"] if self.page_size else []
        parts += [f"append{self.appended}"] if self.appended else []
        parts += ["leftpad"] if self.leftpad else []
        parts += [f"rotary{self.rotary.dim}"] if self.rotary else []
        parts += [self.mask.kind] if self.mask.kind != "none" else []
        parts += ["mask"] if self.mask.tensor else []
        parts += ["softcap"] if self.softcap else []
        parts += ["alibi"] if self.alibi else []
        parts += [f"bias-{self.bias}"] if self.bias else []
        parts += ["dbias"] if self.bias_grad else []
        parts += ["score_mod"] if self.score_mod else []
        parts += ["mask_mod"] if self.mask_mod else []
        parts += ["blocks{}x{}".format(*self.block_mask.size)] if self.block_mask else []
        parts += ["dcaptured"] if self.captured_grad else []
        parts += ["sink"] if self.sink else []
        parts += [f"dropout-{self.dropout}"] if self.dropout else []
        parts += ["deterministic"] if self.deterministic else []
        parts += ["-".join(("tangents", *self.tangents))] if self.tangents is not None else []
        parts += [f"splits{self.num_splits}"] if self.num_splits else []
        return " ".join(parts)


def _dtype(name: str, dtype: Any) -> DType:
    """An element type, also by its name."""
    if isinstance(dtype, DType):
        return dtype
    if isinstance(dtype, str) and (known := KINDS.get(dtype) or BY_NUMPY_NAME.get(dtype)):
        return known
    raise InvalidArgument(f"{name} is {shown(dtype)}; expected one of {', '.join(KINDS)}.")


def visible_pairs(mask: Mask, len_q: int, len_kv: int) -> int:
    """Count the (query, key) pairs a band mask lets through; a boolean tensor counts as full."""
    first = mask.offset(len_q, len_kv)  # the diagonal of the first query
    ends = len_q * len_kv if mask.right is None else _keys_before(first + mask.right + 1, len_q, len_kv)
    starts = 0 if mask.left is None else _keys_before(first - mask.left, len_q, len_kv)
    return ends - starts


def _keys_before(key: int, len_q: int, len_kv: int) -> int:
    """The sum over all queries of how many keys come before this one for the first query, and the next for the next."""

    def up_to(end: int) -> int:  # the sum of min(max(x, 0), len_kv) over all integers x < end
        within = min(max(end, 0), len_kv)
        return within * (within - 1) // 2 + max(end - len_kv, 0) * len_kv

    return up_to(key + len_q) - up_to(key)
