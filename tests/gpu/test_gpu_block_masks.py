"""Block masks on a GPU: outputs and gradients of every family, bit-equal repeats, and nothing of hidden blocks read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP32, random

import cuflash
from cuflash import Mask, create_block_mask, ops
from cuflash.ops import Arrays

pytestmark = pytest.mark.gpu

FAMILIES = ("sm90", "sm80", "simt")
STARTS = np.array([0, 500, 500, 533, 700], np.int32)


@dataclass
class Case:
    """A kind of block mask, and the call that it is given to."""

    rule: Any = None
    size: tuple[int, int] = (128, 128)
    own: bool = False
    """Every batch element and head has lists of its own."""
    packed: bool = False
    keep: float = 0.4
    dim: int = 64
    words: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the call, which the oracle knows by the same names."""


PHASE = np.random.default_rng(3).integers(0, 7, 520)
CASES = {
    "blocks": Case(),
    "blocks-d128": Case(dim=128, own=True),
    "blocks-d256": Case(dim=256, size=(64, 64)),
    "tenth": Case(keep=0.1, own=True),
    "holes": Case(lambda b, h, q, k: (PHASE[q] + k) % 7 > 1, own=True),
    "holes-d128": Case(lambda b, h, q, k: (PHASE[q] + k) % 7 > 1, dim=128, size=(64, 128)),
    "prefix": Case(lambda b, h, q, k: (k < 40 + 100 * h) | (k <= q), keep=1.0, own=True, dim=128),
    "odd": Case(lambda b, h, q, k: (k < 40) | (k <= q), size=(48, 80)),
    "causal": Case(own=True, words={"causal": True}),
    "packed": Case(packed=True),
    "packed-d128": Case(Mask(right=0), packed=True, dim=128, keep=1.0),
    "packed-own": Case(packed=True, own=True, words={"causal": True}, size=(64, 128)),
}


def made(case: Case) -> tuple[Any, list[np.ndarray]]:
    """The mask, and q, k, v, dout and dlse."""
    b, len_q, len_k = (4, 500, 500) if case.packed else (2, 520, 700)
    rows = tuple(-(-n // size) for n, size in zip((len_q, len_k), case.size, strict=True))
    rng = np.random.default_rng(7)
    kept = rng.random((b, 4, *rows) if case.own else (1, 1, *rows)) < case.keep
    if case.keep < 1:
        kept[:, :, 0], kept[..., -1] = False, False
    own = {"batch": b, "heads": 4} if case.own else {}
    mask = create_block_mask(
        case.rule, len_q=len_q, len_kv=len_k, block_size=case.size, blocks=kept, **own
    )  # fmt: skip
    outer_q, outer_k = ((int(STARTS[-1]),),) * 2 if case.packed else ((b, len_q), (b, len_k))
    shapes = [(*outer_q, 4, case.dim), (*outer_k, 2, case.dim), (*outer_k, 2, case.dim), (*outer_q, 4, case.dim)]
    lse = (4, *outer_q) if case.packed else (b, 4, len_q)
    return mask, [*(random(*s, dtype=BF16, seed=i) for i, s in enumerate(shapes)), random(*lse, dtype=FP32, seed=9)]


def answered(cp: Any, case: Case, mask: Any, arrays: list[np.ndarray], family: Any, deterministic: bool) -> list[Any]:
    """(out, lse, dq, dk, dv) of a family."""
    q, k, v, dout, dlse = map(cp.asarray, arrays)
    given = Arrays(q=q, k=k, v=v)
    options = ops.asked(family=family, deterministic=deterministic, **case.words)
    if case.packed:
        starts = cp.asarray(STARTS)
        given = given._replace(cu_seqlens_q=starts, cu_seqlens_kv=starts)
        options = options.replace(max_seqlen_q=500, max_seqlen_k=500)
    options, given = ops.with_mods(options, given, None, None, block_mask=mask)
    out, lse, pullback = ops.vjp(options, given)
    return [out, lse, *pullback(dout, dlse)[:3]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_pairs(cp: Any, name: str, family: str) -> None:
    case = CASES[name]
    mask, arrays = made(case)
    words = case.words | {"mask": mask.to_dense()}
    if case.packed:
        words |= {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    exact, naive = oracle.attention(*arrays, **words), oracle.naive_in_dtype(*arrays, **words)
    families = family if family == "simt" else (family, "sm80", "simt")  # what one leaves, the next takes
    plain, first, again = (answered(cp, case, mask, arrays, families, ordered) for ordered in (False, True, True))
    for results in (plain, first):
        oracle.assert_all_close(oracle.Attention(*(x.get() for x in results), None, None), exact, naive)
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


def test_arrays_on_a_gpu_make_the_mask_of_their_values(cp: Any) -> None:
    rng = np.random.default_rng(2)
    kept, seen, starts = rng.random((3, 4)) < 0.6, rng.random((300, 400)) < 0.9, np.array([0, 120, 400])
    ids, by_id = np.sort(rng.integers(0, 5, 400)), {}
    for put in (np.asarray, cp.asarray):
        held = put(ids)
        made = create_block_mask(put(seen), blocks=put(kept))
        packed = create_block_mask(lambda b, h, q, k, held=held: held[q] == held[k], cu_seqlens=put(starts))
        by_id[put] = made, packed
    assert by_id[np.asarray] == by_id[cp.asarray]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_repeats_of_many_blocks_are_bit_equal(cp: Any, dim: int) -> None:
    q, k, v, dout = (cp.asarray(random(2, 2100, 16, dim, dtype=BF16, seed=i)) for i in range(4))
    kept = np.random.default_rng(1).random((1, 16, 17, 17)) < 0.5
    mask = create_block_mask(Mask(left=1500), heads=16, len_q=2100, len_kv=2100, blocks=kept)
    out, lse = cuflash.flash_attn_func(q, k, v, block_mask=mask, return_lse=True)

    def gradients() -> list[bytes]:
        computed = cuflash.flash_attn_backward(dout, q, k, v, out, lse, block_mask=mask, deterministic=True)
        return [x.tobytes() for x in computed[:3]]

    first = gradients()
    for _ in range(20):
        assert gradients() == first


@pytest.mark.parametrize(
    ("dim", "heads_kv", "rule"),
    [
        (64, 16, None),
        (64, 8, lambda b, h, q, k: (q + 3 * k) % 11 != h),
        (72, 8, lambda b, h, q, k: (q + 3 * k) % 11 != h),
        (128, 8, None),
        (128, 16, lambda b, h, q, k: (q + 3 * k) % 11 != h),
    ],
)
def test_many_works_of_a_block_one_after_the_other(cp: Any, dim: int, heads_kv: int, rule: Any) -> None:
    """Beside deterministic gradients, whose blocks have a key tile each; again and again."""
    heads = [16, heads_kv, heads_kv, 16]
    q, k, v, dout = (cp.asarray(random(2, 2100, h, dim, dtype=BF16, seed=i)) for i, h in enumerate(heads))
    kept = np.random.default_rng(1).random((2, 16, 17, 17)) < 0.3
    kept[0, :, 3], kept[0, :, :, 5] = False, False
    mask = create_block_mask(rule, batch=2, heads=16, len_q=2100, len_kv=2100, blocks=kept)
    out, lse = cuflash.flash_attn_func(q, k, v, block_mask=mask, return_lse=True)

    def gradients(deterministic: bool = False) -> list[np.ndarray]:
        given = {"block_mask": mask, "deterministic": deterministic}
        computed = cuflash.flash_attn_backward(dout, q, k, v, out, lse, **given)[:3]
        return [x.get().astype(np.float32) for x in computed]

    expected = gradients(deterministic=True)
    for _ in range(8):
        for x, y in zip(gradients(), expected, strict=True):
            assert np.abs(x - y).max() <= 2.0**-7 * np.abs(y).max()
            assert np.sqrt(((x - y) ** 2).mean()) <= 2.0**-10 * np.sqrt((y**2).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tile_of_an_empty_block_is_read(cp: Any, family: str) -> None:
    """Rows that are in no list are NaN, which a product with 0 would pass on."""
    case = CASES["blocks"]
    mask, arrays = made(case)
    clean = answered(cp, case, mask, arrays, family, True)
    for x in arrays[1:3]:
        x[:, 640:] = np.nan
    arrays[0][:, :128] = np.nan
    again = answered(cp, case, mask, arrays, family, True)
    for x, y in zip(clean, again, strict=True):
        assert x.tobytes() == y.tobytes()
