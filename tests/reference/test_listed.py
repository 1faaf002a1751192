"""Block masks in the NumPy backend: exact beside the oracle with the dense mask, and visiting listed blocks alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy_backend
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import FP32, FP64

import cuflash
from cuflash import Mask, create_block_mask
from cuflash.blocks import BlockMask
from cuflash.reference import loops, tiles
from cuflash.reference.listed import Listed
from cuflash.reference.scores import Scores

IDS = np.sort(np.random.default_rng(0).integers(0, 5, 64))
RULES = {
    "documents": lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k),
    "of each head": lambda b, h, q, k: (q * 3 + k * h + b) % 7 < 5 - h,
    "rows without keys": lambda b, h, q, k: ((q // 8) % 2 == 0) & (k < 20),
    "nothing": lambda b, h, q, k: q < 0,
    "everything": lambda b, h, q, k: q >= 0,
    "far blocks": lambda b, h, q, k: ((q // 9 + k // 9) % 3 == 0) | (k == 1),
}


def inputs(b: int, len_q: int, len_kv: int, heads: int = 4, heads_kv: int = 2, dtype: Any = FP64) -> list[np.ndarray]:
    """q, k, v, dout and dlse."""
    rng = np.random.default_rng(len_q + len_kv)
    shapes = [(b, len_q, heads, 8), (b, len_kv, heads_kv, 8), (b, len_kv, heads_kv, 5), (b, len_q, heads, 5)]
    return [*(rng.standard_normal(x).astype(dtype) for x in shapes), rng.standard_normal((b, heads, len_q)).astype(
        FP64 if dtype == FP64 else FP32
    )]  # fmt: skip


def check(arrays: list[np.ndarray], mask: BlockMask, dense: np.ndarray, **options: Any) -> None:
    """The backend with a block mask must be the oracle with its pairs."""
    actual = numpy_backend.run(*arrays, block_mask=mask, **options)
    exact, naive = (f(*arrays, mask=dense, **options) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(actual, exact, naive, str(mask))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("block", [(4, 4), (5, 7), (40, 3)])
@pytest.mark.parametrize("name", RULES)
def test_results_are_those_of_the_pairs(name: str, block: tuple[int, int]) -> None:
    len_q, len_kv = 37, 45
    mask = create_block_mask(RULES[name], batch=2, heads=4, len_q=len_q, len_kv=len_kv, block_size=block)
    dense = mask.to_dense()
    check(inputs(2, len_q, len_kv), mask, dense)
    check(inputs(2, len_q, len_kv, dtype=FP32), mask, dense, causal=True, softcap=2.0, sink=np.ones(4, FP32))
    check(inputs(2, len_q, len_kv), mask, dense, window=(9, 3), dropout_p=0.25, rng_state=(3, 4))


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 5, 16]), st.floats(0, 1), st.integers(0, 99))
def test_blocks_of_your_own(len_q: int, len_kv: int, size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.random((1, 2, -(-len_q // size), -(-len_kv // size))) < share
    mask = create_block_mask(blocks=blocks, len_q=len_q, len_kv=len_kv, block_size=size)
    dense = np.repeat(np.repeat(blocks, size, axis=2), size, axis=3)[:, :, :len_q, :len_kv]
    check(inputs(1, len_q, len_kv, heads=2, heads_kv=1), mask, dense)


def visited(monkeypatch: pytest.MonkeyPatch, call: Any) -> int:
    """Pairs of a query and a key whose product is computed."""
    pairs, product = [], loops.product

    def counted(name: str, a: np.ndarray, b: np.ndarray, scratch: Any) -> np.ndarray:
        result = product(name, a, b, scratch)
        if name == "s":
            pairs.append(result.size)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(loops, "product", counted)
        call()
    return sum(pairs)


def test_empty_blocks_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    n, size = 2048, 128
    q, k, v, dout, _ = inputs(1, n, n, heads=1, heads_kv=1, dtype=FP32)
    window = create_block_mask(Mask(left=100, right=0), len_q=n, len_kv=n, block_size=size)
    far = create_block_mask(lambda b, h, q, k: (q // size + 5) % 16 == k // size, len_q=n, len_kv=n, block_size=size)
    features = {"band": Mask(), "softmax_scale": 1.0}
    out, lse = cuflash.reference.forward(q, k, v, **features)
    for mask, most in ((window, 48 * size**2), (far, 32 * size**2), (~far | far, n * n)):
        for call in (
            lambda mask=mask: cuflash.reference.forward(q, k, v, block_mask=mask, **features),
            lambda mask=mask: cuflash.reference.backward(dout, q, k, v, out, lse, block_mask=mask, **features),
        ):
            computed = visited(monkeypatch, call)
            assert len(mask.kv.indices) * size**2 <= computed <= most
    assert window.sparsity > 0.87 and far.sparsity > 0.93


def test_full_blocks_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[tiles.Tile] = []
    whole = Listed.mask
    monkeypatch.setattr(Listed, "mask", lambda self, tile: tested.append(tile) or whole(self, tile))
    n, size = 1024, 128
    q, k, v, *_ = inputs(1, n, n, heads=1, heads_kv=1, dtype=FP32)
    for band, number in ((Mask(), 0), (Mask(right=0), 4)):
        tested.clear()
        mask = create_block_mask(band, len_q=n, len_kv=n, block_size=size)
        cuflash.reference.forward(q, k, v, band=Mask(), softmax_scale=1.0, block_mask=mask)
        assert len(tested) == number


@given(st.integers(1, 50), st.sampled_from([1, 3, 16, 100]), st.sampled_from([1, 2, 3, 8, 600]))
def test_row_tiles_cover_every_row_once(len_q: int, height: int, group: int) -> None:
    mask = create_block_mask(Mask(), len_q=len_q, len_kv=4, block_size=(height, 4))
    computed = list(Scores(Mask(), len_q, 4, 1.0, listed=Listed(mask, 0, group)).row_tiles(group))
    assert [i for rows in computed for i in range(rows.start, rows.stop)] == list(range(len_q))
