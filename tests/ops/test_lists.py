"""Calls with a block mask on a GPU that is not there: what is moved, what is prepared, and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from doubles.arrays import as_cupy, as_torch, needs_cupy, to_numpy
from doubles.launch import Launches, needs_compiler
from inputs import BF16, random

import cuflash
from cuflash import BlockMask, create_block_mask, ops
from cuflash.arrays import framework_of
from cuflash.ops import Arrays

pytestmark = [needs_compiler, needs_cupy]


def made(seed: int, len_q: int = 140, len_kv: int = 200) -> BlockMask:
    """Blocks of which some are hidden, and a rule that reads an array."""
    rng = np.random.default_rng(seed)
    phase = rng.integers(0, 7, len_q)
    kept = rng.random((1, 4, -(-len_q // 64), -(-len_kv // 64))) < 0.6
    return create_block_mask(
        lambda b, h, q, k: (phase[q] + k) % 7 > 1, heads=4, len_q=len_q, len_kv=len_kv, block_size=64, blocks=kept
    )


def tensors(len_q: int = 140, len_kv: int = 200) -> list[np.ndarray]:
    """q, k, v and dout."""
    shapes = (1, len_q, 4, 64), (1, len_kv, 2, 64), (1, len_kv, 2, 64), (1, len_q, 4, 64)
    return [random(*shape, dtype=BF16, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("put", [as_cupy, as_torch])
def test_outputs_and_gradients_are_those_of_the_pairs(launches: Launches, put: Any) -> None:
    mask, (q, k, v, dout) = made(0), tensors()
    options, arrays = ops.with_mods(ops.asked(), Arrays(*map(put, (q, k, v))), None, None, block_mask=mask)
    out, lse, pullback = ops.vjp(options, arrays)
    computed = [to_numpy(x) for x in (out, lse, *pullback(put(dout))[:3])]
    exact, naive = (
        f(q, k, v, dout, np.zeros_like(computed[1]), mask=mask.to_dense())
        for f in (oracle.attention, oracle.naive_in_dtype)
    )
    oracle.assert_all_close(oracle.Attention(*computed, None, None), exact, naive)
    assert launches.take() == ["fwd_sm80", "bwd_delta", "bwd_sm80", "bwd_convert"]


def test_lists_are_moved_once_and_masks_of_a_kind_share_what_is_prepared(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[np.ndarray] = []

    def counted(self: Any, x: np.ndarray, beside: Any) -> Any:
        moved.append(x)
        return as_cupy(np.array(x))

    monkeypatch.setattr("cuflash.arrays.CuPy.moved", counted)
    q, k, v, _ = map(as_cupy, tensors())
    first, second = made(0), made(1)
    assert first.kind == second.kind
    outs = []
    for mask in (first, first, second):
        outs.append(to_numpy(cuflash.flash_attn_func(q, k, v, block_mask=mask)))
        assert len(moved) == (8 if mask is second else 4)  # lines, list and the two arrays of the rule
    assert len(launches.loaded) == 1
    assert outs[0].tobytes() == outs[1].tobytes() != outs[2].tobytes()


def test_a_prepared_call_has_its_lists(launches: Launches) -> None:
    mask, (q, k, v, _) = made(0), map(as_cupy, tensors())
    call = cuflash.flash_attn_prepare(q, k, v, block_mask=mask)
    out, _ = call(q, k, v)
    assert to_numpy(out).tobytes() == to_numpy(cuflash.flash_attn_func(q, k, v, block_mask=mask)).tobytes()


def test_what_is_no_block_mask_is_refused(launches: Launches) -> None:
    q, k, v, _ = map(as_cupy, tensors())
    with pytest.raises(cuflash.InvalidArgument, match=r"block_mask is 3; expected a BlockMask"):
        cuflash.flash_attn_func(q, k, v, block_mask=3)  # type: ignore[call-overload]
    with pytest.raises(cuflash.InvalidArgument, match="of 130 queries and 200 keys but the call has 140 and 200"):
        cuflash.flash_attn_func(q, k, v, block_mask=made(0, len_q=130))


@pytest.mark.parametrize("put", [as_cupy, as_torch])
def test_masks_are_made_of_copies_of_arrays_on_a_gpu(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, put: Any
) -> None:
    library = framework_of(["x"], [put(np.zeros(1))])
    monkeypatch.setattr(type(library), "copied", lambda self, x: to_numpy(x).copy())
    ids, kept = np.sort(np.random.default_rng(1).integers(0, 4, 140)), np.array([[True, False], [True, True]])
    held = put(ids)
    made = create_block_mask(lambda b, h, q, k: held[q] == held[k], len_q=140, len_kv=140, blocks=put(kept))
    expected = create_block_mask(lambda b, h, q, k: ids[q] == ids[k], len_q=140, len_kv=140, blocks=kept)
    np.testing.assert_array_equal(made.to_dense(), expected.to_dense())
    monkeypatch.setattr(type(library), "is_capturing", lambda self: True)
    with pytest.raises(cuflash.InvalidArgument, match=r"^blocks would be read from the GPU"):
        create_block_mask(len_q=140, len_kv=140, blocks=put(kept))
