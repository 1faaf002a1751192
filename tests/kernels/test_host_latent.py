"""Caches of multi-head latent attention on the CPU: one key head whose first columns are the values."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import oracle
import pytest
from host.build import why_not
from host.run import run_plan_on_host

from cuflash.device import named
from cuflash.dtypes import DTYPES
from cuflash.masks import Mask
from cuflash.ops.call import asked
from cuflash.plan import choose
from cuflash.problem import Problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

CASES: dict[str, dict] = {
    "dense": {"heads": 16, "lengths": (300, 1, 200)},
    "more-heads-than-rows": {"heads": 128, "lengths": (270, 129), "num_splits": 3},
    "empty": {"heads": 16, "lengths": (0, 100, 0), "num_sms": 2},
    "left-padding": {"heads": 16, "lengths": (300, 100, 200), "leftpad": (5, 99, 64), "cache_batch": (3, 0, 2)},
    "apart": {"heads": 4, "len_q": 2, "lengths": (270, 129), "dims": (320, 320), "shared": False, "causal": True},
    "pages-64": {"heads": 16, "lengths": (300, 1, 200), "page_size": 64},
    "pages-16": {"heads": 16, "len_q": 3, "lengths": (300, 1, 200), "page_size": 16, "causal": True},
    "pages-128": {"heads": 128, "lengths": (200, 66), "page_size": 128, "num_splits": 2, "halves": False},
    "two-blocks": {"heads": 16, "len_q": 2, "lengths": (980, 450), "halves": True, "causal": True},
    "two-blocks-whole-rows": {"heads": 128, "lengths": (520, 1), "halves": True},
    "pages-8-apart": {"heads": 8, "lengths": (150, 31), "dims": (512, 512), "shared": False, "page_size": 8},
}


def check(
    *,
    heads: int,
    lengths: tuple[int, ...],
    len_q: int = 1,
    dims: tuple[int, int] = (576, 512),
    shared: bool = True,
    causal: bool = False,
    page_size: int = 0,
    leftpad: tuple[int, ...] | None = None,
    cache_batch: tuple[int, ...] | None = None,
    num_splits: int = 0,
    num_sms: int = 132,
    halves: bool | None = None,
    seed: int = 0,
) -> None:
    """Compare with the oracle on packed keys; what no sequence uses of the cache is NaN."""
    rng, batch, (dim_qk, dim_v) = np.random.default_rng(7), len(lengths), dims
    first = leftpad or (0,) * batch
    room = max(max(lengths) + 20, 1)
    pages = -(-room // page_size) if page_size else 0
    rows = (batch * pages + 3, page_size) if page_size else (max(cache_batch or (batch - 1,)) + 2, room)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    table = rng.permutation(rows[0])[: batch * pages].reshape(batch, pages).astype(np.int32)
    k, v = (np.full((*rows, 1, dim), np.nan, bf16) for dim in dims)
    if shared:
        v = k[..., :dim_v]
    packed: list[list[np.ndarray]] = [[], []]
    for b, (start, end) in enumerate(zip(first, lengths, strict=True)):
        at = np.arange(start, end)
        element = cache_batch[b] if cache_batch else b
        places = (table[b, at // page_size], at % page_size) if page_size else (np.full_like(at, element), at)
        for tensor in (k,) if shared else (k, v):
            tensor[places] = rng.standard_normal((len(at), 1, tensor.shape[-1])).astype(bf16)
        for tensor, into in zip((k, v), packed, strict=True):
            into.append(tensor[places])
        table[b, -(-end // page_size) if page_size else 0 :] = 2**30  # numbers of no page

    problem = Problem(
        "forward", DTYPES["bf16"], batch, heads, 1, len_q, pages * page_size or room, dim_qk, dim_v, layout="cache",
        total_kv=rows[0] * rows[1], page_size=page_size, leftpad=leftpad is not None, shared_kv=shared,
        num_splits=num_splits, softmax_scale=dim_qk**-0.5, mask=Mask(right=0) if causal else Mask(),
    )  # fmt: skip
    plan = choose(problem, replace(named("h100"), num_sms=num_sms), "sm90")
    (main,) = (step for step in plan.steps if step.kernel == "fwd_sm90_wide")
    assert main.config.split.startswith("Halves") == (main.cluster == 2) and halves in (None, main.cluster == 2)
    q = rng.standard_normal((batch, len_q, heads, dim_qk)).astype(bf16)
    out, lse = np.full((*q.shape[:-1], dim_v), np.nan, bf16), np.full((batch, heads, len_q), np.nan, np.float32)
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "seqused_kv": np.array(lengths, np.int32)}
    arrays |= {"table": table} if page_size else {}
    given = {"leftpad": leftpad, "cache_batch": cache_batch}
    arrays |= {name: np.array(x, np.int32) for name, x in given.items() if x is not None}
    run_plan_on_host(plan, arrays, seed, asked(cache=True))

    ends = np.cumsum([0, *(end - start for start, end in zip(first, lengths, strict=True))], dtype=np.int32)
    starts = np.arange(batch + 1, dtype=np.int32) * len_q
    inputs = q.reshape(-1, heads, dim_qk), *(np.concatenate(parts) for parts in packed)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": ends, "causal": causal, "scale": dim_qk**-0.5}
    exact, naive = oracle.attention(*inputs, **options), oracle.naive_in_dtype(*inputs, **options)
    oracle.assert_close(out.reshape(-1, heads, dim_v), exact.out, naive.out, "out")
    oracle.assert_close(lse.transpose(1, 0, 2).reshape(heads, -1), exact.lse, naive.lse, "lse")


@pytest.mark.parametrize("name", CASES)
def test_cache(name: str) -> None:
    check(**CASES[name])


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["dense", "pages-16"])
def test_any_order_of_warps(name: str, seed: int) -> None:
    check(**CASES[name], seed=seed)
