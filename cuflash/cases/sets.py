"""The named problem sets of ``python -m cuflash bench``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cuflash import mods
from cuflash.blocks import BlockMask, create_block_mask
from cuflash.cases.table import Case, widest_copy
from cuflash.dtypes import BF16, DTYPES, KINDS
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.problem import Blocks, Problem, Rotary

_CAUSAL = Mask(right=0)


def _dense(name: str, dtype: str, batch: int, heads: int, length: int, dim: int, **changes: Any) -> Case:
    problem = Problem(
        direction="forward",
        dtype=KINDS[dtype],
        batch=batch,
        heads_q=heads,
        heads_kv=heads,
        len_q=length,
        len_kv=length,
        dim_qk=dim,
        dim_v=dim,
        softmax_scale=dim**-0.5,
    )
    problem = replace(problem, **changes)
    copy_bytes = widest_copy(problem.dtype.itemsize, (problem.dim_qk, problem.dim_v))
    return Case(name, None, replace(problem, copy_bytes=copy_bytes))


def _packed(name: str, lens: tuple[int, ...], heads: int, dim: int) -> Case:
    """Causal self-attention of packed bf16 sequences."""
    dense = _dense(name, "bf16", len(lens), heads, max(lens), dim, mask=_CAUSAL)
    packed = replace(dense.problem, layout="varlen", total_q=sum(lens), total_kv=sum(lens))
    return replace(dense, problem=packed, lens_q=lens, lens_kv=lens)


def prefill() -> list[Case]:
    """The protocol of the FlashAttention-2 and -3 papers: 16,384 tokens, 2,048 columns, 512 to 16k of each sequence."""
    tokens, columns = 16_384, 2_048
    return [
        _dense(
            f"d{dim}{'-causal' if mask.right == 0 else ''}-s{length}",
            "bf16",
            tokens // length,
            columns // dim,
            length,
            dim,
            mask=mask,
        )
        for dim in (64, 128, 256)
        for mask in (Mask(), _CAUSAL)
        for length in (512, 1024, 2048, 4096, 8192, 16_384)
    ]


def ampere() -> list[Case]:
    """The longer ones of ``prefill`` by the kernels for Ampere, which consumer cards run too."""
    cases = [case for case in prefill() if case.problem.len_q >= 2048]
    return [replace(case, id=f"sm80-{case.id}", family="sm80") for case in cases]


def gqa() -> list[Case]:
    """64 query heads on 8 key/value heads, causal: 32,768 tokens, 2k to 32k of each sequence."""
    return [
        _dense(f"gqa-d128-causal-s{length}", "bf16", 32_768 // length, 64, length, 128, heads_kv=8, mask=_CAUSAL)
        for length in (2048, 4096, 8192, 16_384, 32_768)
    ]


def window() -> list[Case]:
    """Causal windows much shorter than the sequence."""
    return [
        _dense("window1024-d128-s8192", "bf16", 2, 16, 8192, 128, mask=Mask(left=1024, right=0)),
        _dense("window1024-d128-s32768", "bf16", 1, 16, 32_768, 128, mask=Mask(left=1024, right=0)),
        _dense("window128-d64-s8192", "bf16", 2, 32, 8192, 64, mask=Mask(left=128, right=0)),
    ]


def varlen() -> list[Case]:
    """32 packed sequences, their lengths drawn log-uniform from 64 to 8192, causal."""
    lens = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(8192), 32)).astype(int).tolist()
    return [_packed("varlen-d128-causal", tuple(lens), 16, 128)]


def scores() -> list[Case]:
    """What changes a score between the products, one at a time; the bias is shared by the batch."""
    bias = {"bias": DTYPES["bf16"], "bias_broadcast": (True, False, False, False), "bias_grad": True}
    dropout = _dense("dropout0.1-d128-s8192", "bf16", 2, 16, 8192, 128, dropout="byte")
    return [
        _dense("softcap30-d128-s8192", "bf16", 2, 16, 8192, 128, softcap=30.0),
        _dense("alibi-d128-s8192", "bf16", 2, 16, 8192, 128, alibi=True),
        _dense("bias-d64-s4096", "bf16", 2, 16, 4096, 64, **bias),
        _dense("bias-d128-s4096", "bf16", 2, 16, 4096, 128, **bias),
        replace(dropout, dropout_p=0.1),
    ]


def ramp() -> list[Case]:
    """Keys that grow along the sequence as kernels visit it, so that row maxima keep growing."""
    plain = _dense("", "bf16", 2, 16, 8192, 128)
    return [replace(plain, id=f"ramp{times}-d128-s8192", key_ramp=float(times)) for times in (16, 200)]


def features() -> list[Case]:
    """One feature at a time, on 8k tokens."""
    lens = tuple(64 * n for n in (8, 120, 24, 40, 1, 57, 6))  # 16,384 tokens in 7 documents
    return [
        _dense("d128-causal", "bf16", 2, 16, 4096, 128, mask=_CAUSAL),
        _dense("d128-causal-fp16", "fp16", 2, 16, 4096, 128, mask=_CAUSAL),
        _dense("d128-causal-window1024", "bf16", 2, 16, 4096, 128, mask=Mask(left=1024, right=0)),
        _dense("d128-softcap", "bf16", 2, 16, 4096, 128, softcap=30.0),
        _dense("d128-causal-gqa", "bf16", 2, 16, 4096, 128, heads_kv=4, mask=_CAUSAL),
        _dense("d128-causal-deterministic", "bf16", 2, 16, 4096, 128, deterministic=True, mask=_CAUSAL),
        _packed("d128-causal-varlen", lens, 16, 128),
        _dense("d96-causal", "bf16", 2, 16, 4096, 96, mask=_CAUSAL),
        _dense("d192x128-causal", "bf16", 2, 16, 4096, 192, dim_v=128, mask=_CAUSAL),
        _dense("d64-fp32", "fp32", 2, 16, 4096, 64),
        _dense("d64-fp64", "fp64", 2, 4, 1024, 64),
    ]


def _cached(name: str, lens: tuple[int, ...], page_size: int, heads_kv: int = 8) -> Case:
    """One new query to each sequence, whose keys lie in pages."""
    dense = _decode(name, len(lens), max(lens), heads_kv=heads_kv)
    batch = len(lens)
    paged = replace(dense.problem, layout="varlen", total_q=batch, page_size=page_size)
    case = replace(dense, problem=paged, lens_q=(1,) * batch, lens_kv=lens)
    return replace(case, problem=replace(paged, total_kv=(sum(case.pages) + 1) * page_size))


def _decode(name: str, batch: int, len_kv: int, len_q: int = 1, **changes: Any) -> Case:
    """Few queries of 32 heads over the long keys of 8."""
    return _dense(name, "bf16", batch, 32, len_kv, 128, **{"heads_kv": 8, "len_q": len_q} | changes)


def _appending(name: str, batch: int, len_kv: int, **changes: Any) -> Case:
    """One query to each sequence of a cache whose lengths the device knows."""
    return _decode(name, batch, len_kv, mask=_CAUSAL, layout="cache", total_kv=batch * len_kv, **changes)


def _latent(batch: int, heads: int, len_kv: int) -> Case:
    """One query of every head over one latent key head, whose first 512 of 576 columns are the values."""
    name = f"decode-latent-h{heads}-b{batch}-s{len_kv // 1024}k"
    return _dense(name, "bf16", batch, heads, len_kv, 576, heads_kv=1, len_q=1, dim_v=512, shared_kv=True)


def decode() -> list[Case]:
    """New queries over the cache of a language model: dense, in pages, few, some, of lengths drawn log-uniform."""
    sizes = [(f"b{batch}-s{thousands}k", batch, thousands * 1024) for batch, thousands in _CACHES]
    lens = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(65_536), 64)).astype(int).tolist()
    return [
        *(_decode(f"decode-{name}", batch, length) for name, batch, length in sizes),
        *(
            _cached(f"decode-paged{page_size}-{name}", (length,) * batch, page_size)
            for page_size in (16, 64, 256)
            for name, batch, length in sizes
        ),
        *(_decode(f"decode-b1-s{length}", 1, length, heads_kv=4) for length in (512, 1024)),
        *(
            _decode(f"decode-q{len_q}-b{batch}-s{length // 1024}k", batch, length, len_q, mask=_CAUSAL)
            for len_q, batch, length in _CHUNKS
        ),
        *(_latent(*sizes) for sizes in _LATENT),
        _appending("decode-attend-b64-s4k", 64, 4096),
        _appending("decode-append-rotary-b64-s4k", 64, 4096, appended=1, rotary=Rotary(128, False, BF16, False)),
        _cached("decode-ragged-paged16", tuple(lens), 16),
        _cached("decode-even-paged16", (sum(lens) // 64,) * 64, 16),
        *(replace(_decode(f"decode-sm80-{name}", batch, length), family="sm80") for name, batch, length in sizes),
    ]


_CACHES = (1, 4), (1, 64), (8, 8), (64, 4), (64, 16)
"""Sequences, and thousands of keys of each."""

_CHUNKS = (4, 16, 8192), (16, 16, 8192), (128, 4, 16_384), (512, 1, 32_768), (64, 1, 32_768), (128, 1, 32_768)
"""Queries, sequences and keys of each."""

_LATENT = (8, 16, 16_384), (32, 16, 4096), (128, 16, 4096), (8, 128, 16_384), (32, 128, 4096), (128, 128, 4096)
"""Sequences, heads and keys where all heads share one latent head."""


def science() -> list[Case]:
    """What protein models, physics and teaching bring: pair biases with gradients, many short sequences, fp32, fp64."""

    def biased(name: str, dtype: str, *sizes: int, shared: bool = True, **changes: Any) -> Case:
        bias: dict[str, Any] = {
            "bias": DTYPES[dtype],
            "bias_broadcast": (shared, False, False, False),
            "bias_grad": True,
        }
        return _dense(name, dtype, *sizes, **bias | changes)

    def named(kind: str, dtype: str, sizes: tuple[int, int, int, int]) -> str:
        batch, heads, length, dim = sizes
        return f"{kind}-{dtype}-b{batch}-h{heads}-s{length}-d{dim}"

    one = 2, 16, 4096
    return [
        *(biased(named("pair-bias", "bf16", sizes), "bf16", *sizes) for sizes in _PAIR_BIASES),
        biased("bias-bf16-d64-s4096", "bf16", *one, 64),
        biased("own-bias-bf16-d64-s4096", "bf16", *one, 64, shared=False),
        *(biased(named("short", dtype, sizes), dtype, *sizes) for dtype in ("bf16", "fp32") for sizes in _SHORT),
        *(_dense(f"{dtype}-d{dim}-s4096", dtype, *one, dim) for dtype in ("fp32", "tf32") for dim in (64, 128)),
        *(biased(f"bias-fp32-d{dim}-s4096", "fp32", *one, dim) for dim in (64, 128)),
        *(_dense(f"bf16-d512-s{length}", "bf16", 2, 4, length, 512) for length in (2048, 8192)),
        _dense("fp32-d512-s2048", "fp32", 2, 4, 2048, 512),
        _dense("fp64-d64-s2048", "fp64", 1, 4, 2048, 64),
    ]


_PAIR_BIASES = (
    (384, 4, 384, 32), (384, 4, 384, 64), (768, 4, 768, 64), (32, 4, 1024, 32), (128, 4, 2048, 32), (128, 4, 2048, 16),
)  # fmt: skip
"""Batch, heads, length and head size of AlphaFold 3's attention over pairs, whose bias all batch elements share."""

_SHORT = (1024, 8, 128, 64), (4096, 4, 64, 32)
"""The same of many short sequences."""


def written() -> list[Case]:
    """Scores and masks as callers write them, beside the options that say the same: 8k tokens, of 2,048 columns.

    Masks are given as lists of blocks. Of random ones, without a rule, half and nine tenths are empty.
    """
    return [case for dim in (64, 128) for case in _written(dim, 2048 // dim, 8192)]


def _written(dim: int, heads: int, length: int) -> list[Case]:
    rng = np.random.default_rng(0)
    slopes = (2.0 ** -np.linspace(1, 8, heads)).astype(np.float32)
    table = rng.standard_normal((heads, 2 * length - 1), np.float32)
    ends = np.sort(rng.choice(np.arange(1, length), 15, replace=False))
    documents = np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)
    prefixes = np.array([length // 4, length // 2], np.int32)

    sizes, width, tiles = {"len_q": length, "len_kv": length}, length // 8, length // 128

    def case(
        name: str,
        built_in: dict[str, Any] | None = None,
        learned: bool = False,
        blocks: BlockMask | None = None,
        **functions: Any,
    ) -> Case:
        traced = {argument: mods.trace(argument, function) for argument, function in functions.items()}
        captured = tuple(array for _, arrays in traced.values() for array in arrays)
        changes: dict[str, Any] = {argument: mod for argument, (mod, _) in traced.items()}
        changes |= {"captured_flat": tuple(range(len(captured))), "captured_grad": learned}
        if blocks is not None:
            changes["block_mask"] = Blocks(blocks.block_size, blocks.tested.mod, blocks.batch, blocks.heads)
        plain = _dense(f"{name}-d{dim}", "bf16", 2, heads, length, dim)
        return replace(
            plain,
            problem=replace(plain.problem, **changes),
            captured=captured,
            blocks=blocks,
            built_in=replace(plain.problem, **built_in) if built_in else None,
        )

    return [
        case("plain"),
        case("alibi", {"alibi": True}, score_mod=mods.alibi(slopes)),
        case("softcap30", {"softcap": 30.0}, score_mod=mods.softcap(30.0)),
        case("relative", score_mod=mods.relative_bias(table)),
        case("relative-learned", score_mod=mods.relative_bias(table), learned=True),
        case("documents16", blocks=create_block_mask(mods.document(documents), **sizes)),
        case("prefix", blocks=create_block_mask(mods.prefix_lm(prefixes), batch=2, **sizes)),
        case(
            f"window{width}", {"mask": Mask(left=width, right=0)},
            blocks=create_block_mask(mods.sliding_window(width, 0), **sizes),
        ),
        *(
            case(f"blocks{empty}", blocks=create_block_mask(blocks=rng.random((tiles, tiles)) >= empty / 100, **sizes))
            for empty in (50, 90)
        ),
    ]  # fmt: skip


def training() -> list[Case]:
    """Beside ``prefill`` and ``hopper``: bit-equal gradients, heads of two sizes, features of small heads."""
    window = Mask(left=1024, right=0)
    dropout = _dense("d64-dropout0.1-s8192", "bf16", 2, 32, 8192, 64, dropout="byte")
    return [
        _dense("d128-causal-s8192", "bf16", 2, 16, 8192, 128, mask=_CAUSAL),
        _dense("d128-causal-deterministic-s8192", "bf16", 2, 16, 8192, 128, deterministic=True, mask=_CAUSAL),
        _dense("d192x128-causal-s8192", "bf16", 2, 16, 8192, 192, dim_v=128, mask=_CAUSAL),
        _dense("d64-window1024-s8192", "bf16", 2, 32, 8192, 64, mask=window),
        _dense("d64-softcap30-s8192", "bf16", 2, 32, 8192, 64, softcap=30.0),
        _dense("d64-alibi-s8192", "bf16", 2, 32, 8192, 64, alibi=True),
        replace(dropout, dropout_p=0.1),
    ]


def tangents() -> list[Case]:
    """Forward mode: 8k tokens, all of q, k and v changing."""
    return [
        _dense(f"d{dim}{name}-s8192", "bf16", 1, 1024 // dim, 8192, dim, tangents=("q", "k", "v"), mask=mask)
        for dim in (64, 128)
        for name, mask in (("", Mask()), ("-causal", _CAUSAL))
    ]


def parallel() -> list[Case]:
    """Long sequences that several GPUs share: 32 query heads on 8 key heads, causal."""
    return [
        _dense(f"gqa-d128-causal-s{length // 1024}k", "bf16", 1, 32, length, 128, heads_kv=8, mask=_CAUSAL)
        for length in (2**17, 2**19)
    ]


def guests() -> list[Case]:
    """What is timed through other libraries as well, beside the same kernels on CuPy's arrays."""
    return [_dense("through-d128-causal-s4096", "bf16", 2, 16, 4096, 128, mask=_CAUSAL)]


def latency() -> list[Case]:
    """Problems too small to keep a GPU busy: what a call costs on the host."""
    return [
        _dense("tiny-d64", "bf16", 1, 1, 64, 64),
        _dense("tiny-d64-causal", "bf16", 1, 1, 64, 64, mask=_CAUSAL),
    ]


def cpu() -> list[Case]:
    """Sizes for the NumPy backend."""
    return [
        _dense(f"d64{'-causal' if mask.right == 0 else ''}-s{length}", "fp32", 1, 4, length, 64, mask=mask)
        for mask in (Mask(), _CAUSAL)
        for length in (256, 1024, 2048)
    ]


def exactness() -> list[Case]:
    """What shows in errors: both 16-bit types, dims, masks, inputs times 1, 3 and 10; one feature; few queries.

    And what callers write where an option says the same, Ampere's kernels, short sequences and learned biases. Of so
    many heads that no library splits the keys of a self-attention, which would show instead of what it computes: each
    part has a largest probability of its own, which does not round.
    """
    plain: list[tuple[str, str, int, dict[str, Any]]] = [
        (f"{dtype}-d{dim}{'-causal' if mask.right == 0 else ''}", dtype, dim, {"mask": mask})
        for dtype in ("bf16", "fp16")
        for dim in (64, 128, 256)
        for mask in (Mask(), _CAUSAL)
    ]
    plain += [(f"{dtype}-d{dim}", dtype, dim, {}) for dtype in ("fp32", "tf32") for dim in (64, 128)]
    plain += [("bf16-d512", "bf16", 512, {}), ("fp16-d512-causal", "fp16", 512, {"mask": _CAUSAL})]
    changes: dict[str, dict[str, Any]] = {
        "gqa": {"heads_kv": 2},
        "sink": {"sink": True},
        "dropout": {"dropout": "byte"},
        "dropout_word": {"dropout": "word"},
    }
    featured = [
        (f"{dtype}-d{dim}-{feature}", dtype, dim, change)
        for dtype, dim in (("bf16", 128), ("fp16", 64))
        for feature, change in changes.items()
    ]
    long = [
        replace(_dense(name, dtype, 2, 8, 1024, dim, **change), dropout_p=0.1 if "dropout" in change else 0.0)
        for name, dtype, dim, change in plain + featured
    ]
    few = [
        _decode("bf16-d128-q1", 4, 4096),
        *(
            _decode(f"bf16-d128-q{n}", b, s, n, mask=_CAUSAL)
            for n, b, s in ((16, 4, 4096), (64, 1, 8192), (128, 1, 8192))
        ),
    ]
    own = [
        replace(case, id=f"bf16-{case.id}-written")
        for dim in (64, 128)
        for case in _written(dim, 8, 1024)
        if case.built_in
    ]
    bias = {"bias": BF16, "bias_broadcast": (True, False, False, False), "bias_grad": True}
    other_kernels = [
        *(replace(_dense(f"bf16-d{dim}-sm80", "bf16", 2, 8, 1024, dim), family="sm80") for dim in (64, 128, 256)),
        _dense("bf16-d64-short", "bf16", 64, 8, 128, 64),
        _dense("bf16-d64-short-bias", "bf16", 64, 8, 128, 64, **bias),
        _dense("bf16-d64-bias", "bf16", 2, 8, 1024, 64, **bias),
    ]
    return [
        replace(case, id=f"{case.id}-x{factor}", qk_factor=float(factor))
        for case in long + few + own + other_kernels
        for factor in (1, 3, 10)
    ]


SETS: dict[str, Callable[[], list[Case]]] = {
    "prefill": prefill,
    "gqa": gqa,
    "window": window,
    "varlen": varlen,
    "scores": scores,
    "ramp": ramp,
    "features": features,
    "training": training,
    "decode": decode,
    "science": science,
    "ampere": ampere,
    "tangents": tangents,
    "mods": written,
    "latency": latency,
    "numpy": cpu,
    "exactness": exactness,
    "parallel": parallel,
    "guests": guests,
}
"""Name to cases; all are forward problems, the bench turns them round for the backward."""

BY_MEMORY = ("decode",)
"""Sets whose speed is that at which memory is read."""

FORWARD_ONLY = (*BY_MEMORY, "tangents")
"""Sets whose cases have no backward that anybody runs."""

UNIONS: dict[str, tuple[str, ...]] = {"hopper": ("gqa", "window", "varlen", "scores", "ramp")}
"""Names for several sets: ``hopper`` is what beside ``prefill`` the kernels for Hopper are judged by."""


def of(name: str) -> dict[str, list[Case]]:
    """The cases of every set that a name stands for, by the set's name.

    Raises
    ------
    InvalidArgument
        If no set and no union has the name.
    """
    if name not in SETS and name not in UNIONS:
        known = ", ".join([*SETS, *UNIONS])
        raise InvalidArgument(f"problem set {name!r} is not known; expected one of: {known}.")
    return {member: SETS[member]() for member in UNIONS.get(name, (name,))}
