"""The named problem sets of ``python -m cuflash bench``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cuflash.bench.cases import Case, widest_copy
from cuflash.dtypes import DTYPES
from cuflash.masks import Mask
from cuflash.problem import Problem

_CAUSAL = Mask(right=0)


def _dense(name: str, dtype: str, batch: int, heads: int, length: int, dim: int, **changes: object) -> Case:
    problem = Problem(
        direction="forward",
        dtype=DTYPES[dtype],
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


def features() -> list[Case]:
    """One feature at a time, on 8k tokens."""
    lens = tuple(64 * n for n in (8, 120, 24, 40, 1, 57, 6))  # 16,384 tokens in 7 documents
    packed = _dense("d128-causal-varlen", "bf16", len(lens), 16, max(lens), 128, mask=_CAUSAL)
    packed = replace(packed.problem, layout="varlen", total_q=sum(lens), total_kv=sum(lens))
    return [
        _dense("d128-causal", "bf16", 2, 16, 4096, 128, mask=_CAUSAL),
        _dense("d128-causal-fp16", "fp16", 2, 16, 4096, 128, mask=_CAUSAL),
        _dense("d128-causal-window1024", "bf16", 2, 16, 4096, 128, mask=Mask(left=1024, right=0)),
        _dense("d128-softcap", "bf16", 2, 16, 4096, 128, softcap=30.0),
        _dense("d128-causal-gqa", "bf16", 2, 16, 4096, 128, heads_kv=4, mask=_CAUSAL),
        _dense("d128-causal-deterministic", "bf16", 2, 16, 4096, 128, deterministic=True, mask=_CAUSAL),
        Case("d128-causal-varlen", None, packed, lens, lens),
        _dense("d96-causal", "bf16", 2, 16, 4096, 96, mask=_CAUSAL),
        _dense("d192x128-causal", "bf16", 2, 16, 4096, 192, dim_v=128, mask=_CAUSAL),
        _dense("d64-fp32", "fp32", 2, 16, 4096, 64),
        _dense("d64-fp64", "fp64", 2, 4, 1024, 64),
    ]


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


SETS: dict[str, Callable[[], list[Case]]] = {
    "prefill": prefill,
    "features": features,
    "latency": latency,
    "numpy": cpu,
}
"""Name to cases; all are forward problems, the bench turns them round for the backward."""
