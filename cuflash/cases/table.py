"""The table of named problems that ``check``, ``compile --all`` and the tests draw from.

An id reads ``<kernel>-<dtype>-d<dims>[-<feature>]``, for example ``fwd_sm80-bf16-d128-causal``; it names the kernel
that must run the case even where another family would be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np

from cuflash import mods
from cuflash.blocks import BlockMask
from cuflash.device import Device, named
from cuflash.dropout import Dropout
from cuflash.dtypes import BY_NUMPY_NAME, DTYPES, KINDS
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.plan import Step, choose, merge, why_not
from cuflash.problem import MAX_SPLITS, Blocks, Direction, Problem, Rotary, visible_pairs


@dataclass(frozen=True, slots=True)
class Case:
    """One named problem with the lengths that a :class:`Problem` leaves to the device."""

    id: str
    family: str | tuple[str, ...] | None
    """The kernel family that must run it, or some that may; None leaves the choice to the planner."""
    problem: Problem
    lens_q: tuple[int, ...] = ()
    """Rows of each packed sequence; empty when the layout is dense."""
    lens_kv: tuple[int, ...] = ()
    seqused_q: tuple[int, ...] = ()
    """Queries of each sequence that take part; empty: all of them."""
    seqused_kv: tuple[int, ...] = ()
    """Keys of each sequence that take part; empty: all of them."""
    dropout_p: float = 0.0
    key_ramp: float = 1.0
    """How many times longer the first key is than the last, falling linearly: kernels that visit the last keys first
    then meet ever larger row maxima."""
    qk_factor: float = 1.0
    """What q and k are multiplied by: the larger, the more one key outweighs the rest of its row."""
    captured: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """What the problem's written score reads, then its mask."""
    blocks: BlockMask | None = field(default=None, compare=False)
    """The problem's block mask with its lists."""
    built_in: Problem | None = None
    """The same problem without a written score or mask, where an option of every call says the same."""

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(len_q, len_kv) of every sequence, counting only what takes part."""
        if self.problem.layout != "varlen":
            return [(self.problem.len_q, self.problem.len_kv)] * self.problem.batch
        return list(zip(self.seqused_q or self.lens_q, self.seqused_kv or self.lens_kv, strict=True))

    @property
    def pages(self) -> list[int]:
        """How many pages each sequence's keys take."""
        return [-(-len_kv // self.problem.page_size) for _, len_kv in self.sequences]

    def dropout(self, unbiased: bool = False) -> Dropout | None:
        """What happens to probabilities after the softmax."""
        scheme = self.problem.dropout
        return Dropout(self.dropout_p, scheme, unbiased) if scheme else None

    def turned(self, direction: Direction) -> Case:
        """The same case in the other direction; the forward of a backward case does not split keys."""
        bias_grad = self.problem.bias_grad and direction == "backward"
        captured_grad = self.problem.captured_grad and direction == "backward"
        num_splits = self.problem.num_splits if self.problem.direction == "forward" else 1
        num_splits = num_splits if direction == "forward" else 0
        problem = replace(
            self.problem, direction=direction, bias_grad=bias_grad, captured_grad=captured_grad, num_splits=num_splits
        )
        built_in = self.built_in and replace(self.built_in, direction=direction, num_splits=num_splits)
        return replace(self, problem=problem, built_in=built_in)

    def flops(self) -> float:
        """Like :meth:`Problem.flops`, with the true lengths of packed sequences, and of listed blocks alone."""
        problem = self.problem
        pairs: float = sum(visible_pairs(problem.mask, len_q, len_kv) for len_q, len_kv in self.sequences)
        pairs *= 1.0 if self.blocks is None else 1.0 - self.blocks.sparsity
        forward = 2.0 * problem.heads_q * pairs * (problem.dim_qk + problem.dim_v)
        return problem.forwards * forward

    def nbytes(self) -> int:
        """Bytes that any algorithm must read and write: the tensors once each, without scratch memory."""
        problem = self.problem
        q, out = (problem.rows_q * problem.heads_q * dim for dim in (problem.dim_qk, problem.dim_v))
        rows_kv = sum(len_kv for _, len_kv in self.sequences) if problem.page_size else problem.rows_kv
        k, v = (rows_kv * problem.heads_kv * dim for dim in (problem.dim_qk, problem.dim_v))
        v = 0 if problem.shared_kv else v
        elements = q + k + v + out
        twice = problem.direction == "backward" or problem.tangents is not None
        return (2 if twice else 1) * elements * problem.dtype.itemsize


# Neither length is a multiple of a tile; both need several tiles of every kernel in the catalogue.
_LEN_Q, _LEN_KV = 203, 331
_LONG_Q = 2100
_LONG, _LATENT = ("long", "long_causal", "long_keys", "long_keys_group"), ("latent", "latent_split")
# An ordinary pair, an empty query, an empty key, one row, and one pair that spans several tiles.
_LENS_Q = (97, 0, 37, 1, 203)
_LENS_KV = (131, 40, 0, 331, 257)
_SEQUSED_Q = (97, 0, 1, 0, 130)
_SEQUSED_KV = (100, 40, 0, 0, 256)
# New queries after caches of very different lengths, one of them empty.
_DECODE_Q, _DECODE_KV, _DECODE_USED_KV = (1, 0, 3, 17, 1, 1), (5000, 40, 700, 300, 1, 64), (5000, 40, 450, 300, 1, 0)

VARIATIONS: dict[str, str] = {
    "causal": "bottom-right causal mask",
    "top_left": "top-left causal mask",
    "window": "window of 64 keys left and 17 right of the diagonal",
    "mask": "boolean tensor",
    "softcap": "scores capped at 2",
    "negative": "negative softmax_scale",
    "gqa": "three query heads to a key/value head, causal",
    "varlen": "packed sequences, some empty",
    "varlen_causal": "packed sequences, causal",
    "seqused": "packed sequences of which only some keys take part",
    "seqused_q": "packed sequences of which only some queries and keys take part",
    "paged1": "packed queries over keys in pages of one, grouped heads, causal",
    "paged16": "the same in pages of 16",
    "paged48": "the same in pages of 48",
    "paged256": "the same in pages of 256",
    "paged_everything": "`varlen_everything` in pages of 48, without gradients",
    "alibi": "linear biases, causal",
    "bias": "an additive tensor for each pair of each head",
    "bias384": "the same for 384 queries",
    "bias_apart": "the same, whose keys are not neighbours in memory",
    "bias_row": "an additive tensor for each key of each batch element, in fp32",
    "dbias": "the gradient of `bias`",
    "dbias_batch": "the same of three batch elements that share it",
    "dbias_row": "the gradient of `bias_row`",
    "sink": "a learnable logit for each head, causal",
    "dropout": "dropout by 8 random bits a pair",
    "dropout_word": "dropout by 32 random bits a pair",
    "mask_causal": "boolean tensor under a causal mask",
    "everything": "window, boolean tensor, soft cap, ALiBi, bias and its gradient, sink, dropout and grouped heads",
    "varlen_everything": "`everything` on packed sequences of which only some queries and keys take part",
    "deterministic": "gradients bit-equal from run to run, causal",
    "copy2": "tensors aligned to 2 bytes only",
    "copy4": "tensors aligned to 4 bytes only",
    "copy8": "tensors aligned to 8 bytes only",
    "decode": "one query, eight heads to a key/value head, 5000 keys split as the plan likes",
    "decode_whole": "one query, four heads to a key/value head, keys not split",
    "decode_pairs": "three queries, keys in two splits",
    "decode_causal": "17 queries, seven heads to a key/value head, keys in five splits, causal",
    "decode_most": "one query, four heads to a key/value head, keys in as many splits as they have tiles",
    "decode_window": "three queries, four heads to a key/value head, keys in 40 splits, most outside a window",
    "decode_one_key": "one query, eight heads to a key/value head, one key",
    "decode_varlen": "packed short queries, four heads to a key/value head, keys in five splits",
    "decode_everything": "`everything` on nine queries, four heads to a key/value head, keys in five splits",
    "latent": "128 heads of one query over one key head, whose first columns are the values",
    "latent_split": "the same, two queries, causal, keys in five splits",
    "reversed": "keys and values whose heads lie in memory in reverse order",
    "short": "many short sequences that share a bias, with its gradient",
    "short100": "the same of some hundred rows",
    "long": "enough queries for the tiles of long sequences",
    "long_causal": "the same, causal",
    "long_keys": "100 queries over 5000 keys, which are split as the plan likes, causal",
    "long_keys_group": "the same of 20 queries, four heads to a key/value head",
}
"""What the last part of an id stands for."""

_CAUSAL = Mask(right=0)
_CHANGES: dict[str, dict[str, Any]] = {
    "causal": {"mask": _CAUSAL},
    "top_left": {"mask": Mask(right=0, alignment="top-left")},
    "window": {"mask": Mask(left=64, right=17)},
    "mask": {"mask": Mask(tensor=True)},
    "softcap": {"softcap": 2.0},
    "gqa": {"heads_q": 6, "mask": _CAUSAL},
    "varlen_causal": {"mask": _CAUSAL},
    "deterministic": {"deterministic": True, "mask": _CAUSAL},
    "alibi": {"alibi": True, "mask": _CAUSAL},
    "bias": {"bias_broadcast": (True, False, False, False)},
    "bias384": {"bias_broadcast": (True, False, False, False), "len_q": 384},
    "bias_apart": {"bias_broadcast": (True, False, False, False), "bias_boxes": False},
    "bias_row": {"bias": DTYPES["fp32"], "bias_broadcast": (False, True, True, False)},
    "sink": {"sink": True, "mask": _CAUSAL},
    "dropout": {"dropout": "byte"},
    "dropout_word": {"dropout": "word"},
    "reversed": {"ascending": False},
    "mask_causal": {"mask": replace(_CAUSAL, tensor=True)},
    "short": {"batch": 171, "len_q": 61, "len_kv": 57, "bias_broadcast": (True, False, False, False), "num_splits": 0},
    "short100": {
        "batch": 171, "len_q": 109, "len_kv": 96, "bias_broadcast": (True, False, False, False), "num_splits": 0,
    },
    "long": {"batch": 1, "len_q": _LONG_Q},
    "long_causal": {"batch": 1, "len_q": _LONG_Q, "mask": _CAUSAL},
    "everything": {
        "heads_q": 6, "mask": Mask(left=64, right=17, tensor=True), "softcap": 2.0, "alibi": True,
        "bias": DTYPES["fp32"], "bias_broadcast": (True, False, False, False), "sink": True, "dropout": "byte",
    },
}  # fmt: skip
_CHANGES |= {
    "decode": {"len_q": 1, "len_kv": 5000, "heads_q": 16, "num_splits": 0},
    "decode_whole": {"len_q": 1, "len_kv": 700, "heads_q": 8},
    "decode_pairs": {"len_q": 3, "len_kv": 700, "num_splits": 2},
    "decode_causal": {"len_q": 17, "len_kv": 1000, "heads_q": 14, "num_splits": 5, "mask": _CAUSAL},
    "decode_most": {"len_q": 1, "len_kv": 5000, "heads_q": 8, "num_splits": MAX_SPLITS},
    "decode_window": {"len_q": 3, "len_kv": 5000, "heads_q": 8, "num_splits": 40, "mask": Mask(left=500, right=0)},
    "decode_one_key": {"len_q": 1, "len_kv": 1, "heads_q": 16, "num_splits": MAX_SPLITS},
    "decode_varlen": {"heads_q": 8, "num_splits": 5},
    "decode_everything": _CHANGES["everything"] | {"len_q": 9, "len_kv": 1000, "heads_q": 8, "num_splits": 5},
}
_OF_LATENT = {"len_q": 1, "len_kv": 700, "heads_q": 128, "heads_kv": 1, "shared_kv": True}
_CHANGES |= {
    "long_keys": {"len_q": 100, "len_kv": 5000, "num_splits": 0, "mask": _CAUSAL},
    "long_keys_group": {"len_q": 20, "len_kv": 5000, "heads_q": 8, "num_splits": 0, "mask": _CAUSAL},
    "latent": _OF_LATENT | {"num_splits": 0, "batch": 40},
    "latent_split": _OF_LATENT | {"len_q": 2, "num_splits": 5, "mask": _CAUSAL},
}
_CHANGES["dbias"], _CHANGES["dbias_row"] = _CHANGES["bias"], _CHANGES["bias_row"]
_CHANGES["dbias_batch"] = _CHANGES["bias"] | {"batch": 3}
_CHANGES["varlen_everything"] = _CHANGES["everything"]
_CHANGES["paged_everything"] = _CHANGES["everything"] | {"page_size": 48}
_CHANGES |= {f"paged{size}": _CHANGES["gqa"] | {"page_size": size} for size in (1, 16, 48, 256)}
_BACKWARD_ONLY = ("deterministic", "dbias", "dbias_batch", "dbias_row")
_FORWARD_ONLY = tuple(
    feature for feature in VARIATIONS if feature.startswith(("decode", "latent", "long_keys", "paged"))
)
_DROPOUT_P = 0.3


def widest_copy(itemsize: int, dims: Iterable[int], at_most: int = 16) -> int:
    """The widest access in bytes that contiguous heads of these sizes allow, from a base aligned to ``at_most``."""
    return math.gcd(at_most, *(dim * itemsize for dim in dims))


def _dims(dims: str) -> tuple[int, int]:
    """dim_qk and dim_v, as an id has them."""
    dim_qk, dim_v = (int(d) for d in (dims.split("x") * 2)[:2])
    return dim_qk, dim_v


def _case(family: str, direction: Direction, dtype_name: str, dims: str, feature: str) -> Case:
    dim_qk, dim_v = _dims(dims)
    dtype = KINDS[dtype_name]
    base = int(feature.removeprefix("copy")) if feature.startswith("copy") else 16
    problem = Problem(
        direction=direction,
        dtype=dtype,
        batch=2,
        heads_q=2,
        heads_kv=2,
        len_q=_LEN_Q,
        len_kv=_LEN_KV,
        dim_qk=dim_qk,
        dim_v=dim_v,
        softmax_scale=dim_qk**-0.5 * (-1 if feature == "negative" else 1),
        num_splits=1 if direction == "forward" else 0,
        copy_bytes=widest_copy(dtype.itemsize, (dim_qk, dim_v), base),
    )
    problem = replace(problem, **_CHANGES.get(feature, {}))
    if feature in ("bias", "bias384", "bias_apart", "dbias", "dbias_batch", "short", "short100"):
        problem = replace(problem, bias=BY_NUMPY_NAME[dtype.numpy.name])
    if direction == "backward" and ("short" in feature or "dbias" in feature or "everything" in feature):
        problem = replace(problem, bias_grad=True)
    dropout_p = _DROPOUT_P if problem.dropout else 0.0
    case_id = f"{direction[0]}wd_{family}-{dtype_name}-d{dims}" + (f"-{feature}" if feature else "")
    if not feature.startswith(("varlen", "seqused", "paged")) and feature != "decode_varlen":
        return Case(case_id, family, problem, dropout_p=dropout_p)
    lens_q, lens_kv = (_DECODE_Q, _DECODE_KV) if feature == "decode_varlen" else (_LENS_Q, _LENS_KV)
    used_q = dict.fromkeys(("seqused_q", "varlen_everything", "paged_everything"), _SEQUSED_Q)
    used_kv = dict.fromkeys(("seqused", *used_q), _SEQUSED_KV) | {"decode_varlen": _DECODE_USED_KV}
    problem = replace(
        problem,
        layout="varlen",
        batch=len(lens_q),
        len_q=max(lens_q),
        len_kv=max(lens_kv),
        total_q=sum(lens_q),
        total_kv=sum(lens_kv),
    )
    used = used_q.get(feature, ()), used_kv.get(feature, ())
    case = Case(case_id, family, problem, lens_q, lens_kv, *used, dropout_p=dropout_p)
    if problem.page_size:  # and one page that nobody has
        case = replace(case, problem=replace(problem, total_kv=(sum(case.pages) + 1) * problem.page_size))
    return case


# (dtype, dims, features): every dim once plain, the common ones with everything.
_PLAN: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "sm90": [
        *(("bf16", dims, ("",)) for dims in ("32", "40", "80")),
        *(("bf16", dims, ("", "causal", "window")) for dims in ("96", "192", "256", "192x128")),
        (
            "bf16",
            "64",
            (
                "",
                *(
                    f
                    for f in VARIATIONS
                    if f != "short" and not f.startswith(("copy", "reversed", "paged", "decode", "latent"))
                ),
            ),
        ),
        ("bf16", "128", ("", "causal", "window", "mask", "softcap", "varlen_causal", "long", "long_causal")),
        ("bf16", "128", ("bias", "dropout", "everything", "long_keys", "long_keys_group")),
        ("bf16", "96", ("long", "long_causal")),
        ("bf16", "128", ("deterministic", "dbias")),
        ("bf16", "256", ("varlen_causal", "everything", "deterministic", "long_keys_group")),
        ("bf16", "64", ("paged16", "paged48", "paged256", "paged_everything")),
        ("bf16", "128", ("paged16", "paged256")),
        ("bf16", "256", ("paged48",)),
        ("bf16", "64x256", ("",)),
        ("fp16", "64", ("", "causal", "long")),
        ("fp16", "128", ("", "softcap")),
        *(("bf16", dims, ("",)) for dims in ("264", "320x448", "512x64", "64x512")),
        ("bf16", "512", ("", "causal", "window", "mask", "softcap", "alibi", "bias", "sink", "dropout", "everything")),
        ("bf16", "512", ("varlen_causal", "seqused_q", "paged16", "paged48", "paged256", "decode", "decode_causal")),
        ("bf16", "512", ("decode_varlen", "decode_everything", "varlen_everything", "gqa", "deterministic", "dbias")),
        ("bf16", "576x512", ("", "causal", "decode", "latent", "latent_split")),
        ("fp16", "512", ("", "causal")),
        ("fp16", "576x512", ("latent",)),
    ],
    "sm80": [
        *(("bf16", dims, ("",)) for dims in ("32", "40", "80", "96")),
        *(("bf16", dims, ("", "causal")) for dims in ("192", "256", "192x128")),
        ("bf16", "64", ("", *(f for f in VARIATIONS if not f.startswith(("long", "latent", "bias384"))))),
        ("bf16", "128", ("", "causal", "window", "mask", "softcap", "varlen_causal", "deterministic", "copy2")),
        ("bf16", "128", ("bias", "dbias", "dropout", "everything", "paged48", "decode")),
        ("bf16", "256", ("varlen_causal", "deterministic", "everything", "decode")),
        ("fp16", "64", ("", "causal")),
        ("fp16", "128", ("", "softcap")),
        *(("fp32", dims, ("",)) for dims in ("33", "40", "64x128", "256")),
        ("fp32", "64", ("", "causal", "window", "mask", "gqa", "varlen_causal", "bias", "dbias", "dbias_batch")),
        (
            "fp32",
            "64",
            ("dropout", "dropout_word", "everything", "varlen_everything", "copy4", "deterministic", "dbias_row"),
        ),
        ("fp32", "64", ("paged48", "paged_everything", "decode", "decode_everything", "long")),
        ("fp32", "128", ("", "causal", "softcap", "everything", "decode_varlen", "long")),
        (
            "fp64",
            "64",
            ("", "causal", "everything", "varlen_everything", "dbias", "deterministic", "paged48", "decode"),
        ),
        ("tf32", "64", ("", "dbias", "everything", "varlen_everything", "decode", "long")),
        *(("tf32", dims, ("",)) for dims in ("128", "256")),
        *(("fp64", dims, ("",)) for dims in ("33", "40", "128x64")),
        ("fp64", "128", ("", "everything")),
    ],
    "simt": [
        *(("fp32", dims, ("",)) for dims in ("16", "33", "128", "256", "512", "64x128", "1024")),
        (
            "fp32",
            "64",
            (
                "",
                *(
                    f
                    for f in VARIATIONS
                    if f not in ("copy2", "mask_causal", "decode_window", "short", "short100", *_LATENT, *_LONG)
                ),
            ),
        ),
        ("fp32", "256", ("causal",)),
        ("fp64", "64", ("", "causal", "mask", "softcap", "varlen", "everything", "paged48", "decode")),
        ("fp64", "256", ("",)),
        ("fp16", "64", ("",)),
        ("bf16", "64", ("", "causal")),
        ("bf16", "33", ("",)),
        ("bf16", "512", ("causal",)),
    ],
}


def _exists(feature: str, direction: Direction, family: str, dims: str) -> bool:
    """Whether a family has a feature in a direction."""
    if direction == "backward":
        return feature not in _FORWARD_ONLY and not (family == "sm90" and max(_dims(dims)) > 512)
    if feature == "short100" and family == "sm90":  # which leaves it to sm80
        return False
    return feature not in _BACKWARD_ONLY


def _table() -> Iterator[Case]:
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        for family, rows in _PLAN.items():
            for dtype, dims, features in rows:
                for feature in features:
                    if _exists(feature, direction, family, dims):
                        yield _case(family, direction, dtype, dims, feature)


CASES: dict[str, Case] = {case.id: case for case in _table()}
"""Every case by its id."""


def _caches() -> Iterator[Case]:
    """Caches that are appended to: in pages, pairs of neighbours; dense, not turned; of odd width, pairs of halves.

    And few queries on Hopper, whose blocks share the keys in equal ranges.
    """
    few = {"len_q": 12, "heads_q": 8, "num_splits": 0}
    rows: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("sm80", "bf16", "128", {"page_size": 16, "rotary": Rotary(128, True, DTYPES["fp32"], False)}),
        ("simt", "fp32", "64", {}),
        ("simt", "fp64", "33", {"rotary": Rotary(32, False, DTYPES["fp64"], True)}),
        ("sm90", "bf16", "128", {"page_size": 16, "rotary": Rotary(128, True, DTYPES["fp32"], False)} | few),
        ("sm90", "bf16", "64", {"page_size": 256} | few),
        ("sm90", "bf16", "256", few),
        ("sm90", "fp16", "128", {"len_q": 103, "heads_q": 4}),
    )
    for family, dtype, dims, changes in rows:
        base = _case(family, "forward", dtype, dims, "causal")
        sizes: dict[str, Any] = {"len_q": 3, "appended": 3, "total_kv": 2 * _LEN_KV}
        problem = replace(base.problem, layout="cache", **sizes | changes)
        yield Case(f"fwd_{family}-{dtype}-d{dims}-append", family, problem)


CACHES: dict[str, Case] = {case.id: case for case in _caches()}
"""Further cases that are compiled; what they compute is held to an oracle by tests of their own."""


def _tangents() -> Iterator[Case]:
    """Forwards with tangents: every dim of a tile, every feature, and every type."""
    rows: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
        ("sm90", "bf16", "64", ("", "causal", "window", "varlen_causal", "softcap", "alibi", "sink")),
        ("sm90", "bf16", "128", ("", "causal")),
        ("sm90", "fp16", "40", ("",)),
        ("sm80", "bf16", "64", ("", "causal", "varlen_causal", "softcap", "bias", "everything")),
        ("sm80", "bf16", "128", ("", "everything")),
        ("sm80", "fp16", "40", ("",)),
        ("sm80", "bf16", "256", ("causal",)),
        ("simt", "fp32", "64", ("", "everything")),
        ("simt", "fp32", "256", ("",)),
        ("simt", "fp64", "64", ("causal",)),
        ("simt", "bf16", "33", ("",)),
    )
    for family, dtype, dims, features in rows:
        for feature in features:
            base = _case(family, "forward", dtype, dims, feature)
            changed = ("q", "k", "v", *(name for name in ("bias", "sink") if getattr(base.problem, name)))
            problem = replace(base.problem, tangents=changed)
            yield replace(base, id=base.id.replace("fwd_", "jvp_"), problem=problem)


TANGENTS: dict[str, Case] = {case.id: case for case in _tangents()}
"""The same of tangents."""

_SLOPES, _TABLE, _IDS = np.zeros(2, np.float32), np.zeros((2, 129), np.float32), np.zeros(_LEN_KV, np.int32)
_WRITTEN: dict[str, dict[str, Any]] = {
    "written_alibi": {
        "score_mod": mods.trace("score_mod", lambda s, b, h, q, k: s - _SLOPES[h] * abs(q - k)).mod,
        "mask": _CAUSAL,
    },
    "written_softcap": {"score_mod": mods.trace("score_mod", lambda s, b, h, q, k: 30.0 * mods.tanh(s / 30.0)).mod},
    "written_table": {"score_mod": mods.trace("score_mod", lambda s, b, h, q, k: s + _TABLE[h, k - q + 64]).mod},
    "written_mask": {"mask_mod": mods.trace("mask_mod", lambda b, h, q, k: _IDS[q] == _IDS[k]).mod},
}
_WRITTEN["blocks"] = {"block_mask": Blocks((128, 128), _WRITTEN["written_mask"]["mask_mod"])}
_WRITTEN["written"] = _WRITTEN["written_mask"] | {
    "score_mod": mods.trace("score_mod", lambda s, b, h, q, k: 2.0 * mods.tanh(s * 0.5) + _TABLE[h, q - k + 64]).mod
}


def _written() -> Iterator[Case]:
    """Scores and masks as a caller may write them: ALiBi, a soft cap, documents, all with a table to learn."""
    both: tuple[Direction, ...] = ("forward", "backward")
    rows: tuple[tuple[tuple[Direction, ...], str, str, str, tuple[str, ...]], ...] = (
        (both, "sm90", "bf16", "64", ("written_alibi", "written_table", "written", "blocks")),
        (both, "sm90", "bf16", "128", tuple(_WRITTEN)),
        (("backward",), "sm90", "bf16", "64", ("written_table_deterministic", "blocks_deterministic")),
        (("backward",), "sm90", "bf16", "128", ("blocks_deterministic",)),
        (("backward",), "sm80", "bf16", "128", ("written_deterministic",)),
        (("backward",), "simt", "fp64", "64", ("written_deterministic",)),
        (both, "sm90", "bf16", "256", ("written_mask", "blocks")),
        (("forward",), "sm90", "bf16", "256", ("written_alibi", "written")),
        (("forward",), "sm90", "bf16", "512", ("written_alibi", "written")),
        (both, "sm80", "bf16", "64", ("written_alibi", "written_table", "written")),
        (both, "sm80", "bf16", "128", ("written_softcap", "written_mask", "written")),
        (both, "sm80", "bf16", "256", ("written", "blocks")),
        (both, "simt", "fp32", "64", ("written_mask", "written", "blocks")),
        (both, "simt", "fp64", "64", ("written",)),
    )
    for directions, family, dtype, dims, features in rows:
        for direction, feature in product(directions, features):
            base = _case(family, direction, dtype, dims, "")
            what = feature.removesuffix("_deterministic")
            learns = direction == "backward" and (what == "written_table" or (what == "written" and family != "sm90"))
            problem = replace(base.problem, captured_grad=learns, deterministic=what != feature, **_WRITTEN[what])
            yield Case(f"{base.id}-{feature}", family, replace(problem, captured_flat=(0, 1)))
    base = _case("sm80", "forward", "bf16", "128", "decode")
    yield Case(f"{base.id}_written", "sm80", replace(base.problem, **_WRITTEN["written"]))
    for family, dtype, dims in (("sm80", "bf16", "64"), ("sm80", "bf16", "128"), ("simt", "fp32", "64")):
        base = _case(family, "forward", dtype, dims, "")
        problem = replace(base.problem, tangents=("q", "k", "v"), captured_flat=(0, 1), **_WRITTEN["written"])
        yield Case(f"{base.id.replace('fwd_', 'jvp_')}-written", family, problem)


WRITTEN: dict[str, Case] = {case.id: case for case in _written()}
"""The same with functions of a caller's."""

_EVERYWHERE = (
    "fwd_sm80-bf16-d128-written", "bwd_sm80-bf16-d128-written", "bwd_sm80-bf16-d128-written_deterministic",
)  # fmt: skip
"""Those of them that are compiled for every architecture."""

MERGES: tuple[Step, ...] = (
    merge.forward(DTYPES["bf16"], DTYPES["bf16"], 1000, 128, 16),
    merge.backward(DTYPES["bf16"], 1000, 128),
)
"""The launches that merge results, and those of its gradients."""

SMOKE: tuple[str, ...] = (
    *(f"fwd_sm90-bf16-{rest}" for rest in ("d64-everything", "d64-causal", "d128-long", "d128-varlen_causal", "d256")),
    *(f"fwd_sm90-bf16-{rest}" for rest in ("d512", "d576x512-latent_split")),
    *(f"bwd_sm90-bf16-{rest}" for rest in ("d64-everything", "d128-causal", "d256-varlen_causal")),
    *(f"bwd_sm90-bf16-{rest}" for rest in ("d128-deterministic", "d512-causal")),
    *(
        f"{name}_{rest}"
        for name in ("fwd", "bwd")
        for rest in (
            "sm80-bf16-d64-causal",
            "sm80-bf16-d64-everything",
            "sm80-bf16-d128",
            "sm80-bf16-d128-varlen_causal",
            "sm80-bf16-d256",
            "sm80-fp32-d64-everything",
            "sm80-fp32-d128",
            "simt-fp32-d64-causal",
            "simt-fp32-d64-everything",
            "simt-fp64-d64",
            "simt-fp32-d256",
        )
    ),
    "fwd_sm80-bf16-d64-short",
    "bwd_sm80-bf16-d64-short",
    "bwd_sm90-bf16-d64-short100",
    "fwd_sm80-bf16-d64-decode",
    "fwd_sm80-bf16-d64-decode_causal",
)
"""Ids that touch every kernel, for slow tools and for architectures that need no full matrix."""


def select(pattern: str | None = None) -> list[Case]:
    """Cases whose id equals the pattern, matches it as a glob, or contains it; all of them for None.

    Raises
    ------
    InvalidArgument
        If nothing matches.
    """
    if pattern is None:
        return list(CASES.values())
    if pattern == "smoke":
        return [CASES[case_id] for case_id in SMOKE]
    if pattern in CASES:
        return [CASES[pattern]]
    matching = [case for case in CASES.values() if pattern in case.id or fnmatchcase(case.id, pattern)]
    if not matching:
        some = ", ".join(list(CASES)[:3])
        raise InvalidArgument(
            f"case {pattern!r} matches none of the {len(CASES)} ids; expected an id, a part of one, a glob or 'smoke', "
            f"for example {some}."
        )
    return matching


def variants(cases: Iterable[Case], device: Device) -> list[tuple[str, Step]]:
    """The distinct kernels that these cases need on a device, each with the first case that needs it.

    A case whose family does not run on the device (too old an architecture) needs none.
    """
    kernels: dict[tuple[object, ...], tuple[str, Step]] = {}
    for case in cases:
        if isinstance(case.family, str) and why_not(case.problem, device)[case.family]:
            continue
        for step in choose(case.problem, device, case.family).steps:
            kernels.setdefault((step.kernel, step.params, step.config), (case.id, step))
    return list(kernels.values())


ARCHITECTURES: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What ``compile`` covers by default."""

FULL: dict[str, tuple[str, ...]] = {"sm_80": ("sm80", "simt"), "sm_90a": ("sm90",)}
"""Architectures where ``compile --all`` takes the whole table of some families; otherwise it takes the smoke cases."""


def matrix(architectures: Sequence[str] = ARCHITECTURES, pattern: str | None = None) -> list[tuple[str, str, Step]]:
    """Every (architecture, case id, step) to compile: a pattern's cases, or all where it pays, else smoke."""
    rows = []
    few = [next(iter(CACHES.values())), *{case.family: case for case in reversed(TANGENTS.values())}.values()]
    few += [WRITTEN[case_id] for case_id in _EVERYWHERE]
    for arch in architectures:
        cases = select(pattern or "smoke")
        if pattern is None:
            families = FULL.get(arch, ())
            more = (*CACHES.values(), *TANGENTS.values(), *WRITTEN.values())
            cases = [case for case in CASES.values() if case.family in families or case in cases]
            cases += [case for case in more if case.family in families or case in few]
        rows += [(arch, case_id, step) for case_id, step in variants(cases, named(arch))]
    if pattern is None:
        rows += [(arch, "merge-bf16-d128", step) for arch in architectures for step in MERGES]
    return rows
