"""Ready scores and masks, each against its closed form and the keyword that does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inputs import FP32

import cuflash
from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.mods.evaluate import evaluate
from cuflash.mods.library import t5_buckets

RNG = np.random.default_rng(11)
B, H, LQ, LK = 2, 3, 9, 13
OFF = LK - LQ
AT = np.ogrid[:B, :H, :LQ, :LK]
b, h, q, k = AT
SCORES = RNG.standard_normal((B, H, LQ, LK))
SLOPES, TABLE, T5, DECAY = RNG.random((B, H)), RNG.standard_normal((H, 7)), RNG.standard_normal((8, H)), RNG.random(H)
IDS, OTHER_IDS = RNG.integers(0, 3, (B, LQ)), RNG.integers(0, 3, LK)
PARENTS = np.array([[-1, 0, 0, 1, 1, 2, -1, 6, 3], [-1, 0, 1, 2, 3, 4, 5, 6, 7]])


def ancestors(parents: np.ndarray) -> np.ndarray:
    results = np.zeros((len(parents),) * 2, bool)
    for node in range(len(parents)):
        at = node
        while at >= 0:
            results[node, at] = True
            at = parents[at]
    return results


ANCESTORS = np.stack([ancestors(x) for x in PARENTS])
SCORE_MODS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "alibi": (mods.alibi(SLOPES[0]), SCORES - SLOPES[0][h] * abs(q - k)),
    "alibi-b": (mods.alibi(SLOPES, offset=OFF), SCORES - SLOPES[b, h] * abs(q + OFF - k)),
    "alibi-list": (mods.alibi([0.5, 0.25, 1]), SCORES - np.array([0.5, 0.25, 1])[h] * abs(q - k)),
    "softcap": (mods.softcap(0.7), 0.7 * np.tanh(SCORES / 0.7)),
    "relative": (mods.relative_bias(TABLE, OFF), SCORES + TABLE[h, np.clip(k - q - OFF, -3, 3) + 3]),
    "decay": (mods.distance_decay(DECAY, offset=np.array([1, 4])), SCORES + np.log(DECAY)[h] * abs(q + 1 + 3 * b - k)),
    "decay-one": (mods.distance_decay(0.5), SCORES + np.log(0.5) * abs(q - k)),
}
MASK_MODS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "causal": (mods.causal(OFF), k <= q + OFF),
    "causal-b": (mods.causal(np.array([0, 4])), k <= q + 4 * b),
    "window": (mods.sliding_window(2, 1, OFF), (k - q - OFF >= -2) & (k - q - OFF <= 1)),
    "window-left": (mods.sliding_window(-1, 1), k <= q + 1),
    "window-all": (mods.sliding_window(-1, -1), k >= 0),
    "dilated": (mods.dilated_window(6, -1, 3), (k >= q - 6) & ((k - q) % 3 == 0)),
    "blocks": (mods.block_window(4, before=1), (q // 4 - k // 4 <= 1) & (k // 4 <= q // 4)),
    "prefix": (mods.prefix_lm([3, 7]), (k < np.array([3, 7])[b]) | (k <= q)),
    "prefix-one": (mods.prefix_lm(5, OFF), (k < 5) | (k <= q + OFF)),
    "document": (mods.document(IDS, OTHER_IDS), IDS[b, q] == OTHER_IDS[k]),
    "document-same": (mods.document(OTHER_IDS), OTHER_IDS[q] == OTHER_IDS[k]),
    "tree": (mods.tree(PARENTS[0], OFF), (k < OFF) | ANCESTORS[0][q, np.maximum(k - OFF, 0)]),
    "tree-b": (
        mods.tree(PARENTS, np.array([4, 5])),
        (k < 4 + b) | ANCESTORS[b, q, np.clip(k - 4 - b, 0, 8)],
    ),
    "both": (mods.both(mods.causal(), mods.document(OTHER_IDS), lambda b, h, q, k: h > 0),
             (k <= q) & (OTHER_IDS[q] == OTHER_IDS[k]) & (h > 0)),
    "either": (mods.either(mods.trace("mask_mod", mods.causal()), lambda b, h, q, k: OTHER_IDS[k] == 1),
               (k <= q) | (OTHER_IDS[k] == 1)),
    "negated": (mods.negated(mods.prefix_lm(4)), ~((k < 4) | (k <= q))),
}  # fmt: skip


def computed(argument: str, function: Callable[..., Any]) -> np.ndarray:
    mod, captured = mods.trace(argument, function)
    positions = dict(zip("bhqk", AT, strict=True))
    (results,) = evaluate(mod.expression, score=SCORES, positions=positions, captured=captured, real=np.float64)
    return np.broadcast_to(results, SCORES.shape)


@pytest.mark.parametrize("name", SCORE_MODS)
def test_scores_are_their_closed_forms(name: str) -> None:
    function, expected = SCORE_MODS[name]
    np.testing.assert_allclose(computed("score_mod", function), expected, 1e-14, 1e-14)


@pytest.mark.parametrize("name", MASK_MODS)
def test_masks_are_their_closed_forms(name: str) -> None:
    function, expected = MASK_MODS[name]
    np.testing.assert_array_equal(computed("mask_mod", function), np.broadcast_to(expected, SCORES.shape))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias(bidirectional: bool) -> None:
    bucket = t5_buckets(8, bidirectional, 10)
    results = computed("score_mod", mods.t5_bias(T5, bidirectional, 10, offset=OFF))
    np.testing.assert_array_equal(results, SCORES + T5[bucket[np.clip(k - q - OFF, -10, 10) + 10], h])
    # By the definition: half of a side's buckets hold one distance, the others grow with the logarithm up to 10.
    side = 4 if bidirectional else 8
    for distance, number in zip(range(-10, 11), bucket, strict=True):
        far = abs(distance) if bidirectional else max(-distance, 0)
        exact = side // 2
        if far >= exact:
            far = min(int(exact + np.log(far / exact) / np.log(10 / exact) * (side - exact) + 1e-6), side - 1)
        assert number == far + (side if bidirectional and distance > 0 else 0)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (32, 20), (64, 256), (8, 100)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_are_those_of_transformers(buckets: int, farthest: int, bidirectional: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    if not bidirectional and farthest <= buckets // 2:
        pytest.skip("no distances are left")
    distances = torch.arange(-farthest, farthest + 1)
    expected = t5.T5Attention._relative_position_bucket(distances, bidirectional, buckets, farthest)
    np.testing.assert_array_equal(t5_buckets(buckets, bidirectional, farthest), expected.numpy())


def tensors() -> list[np.ndarray]:
    shapes = (B, LQ, H, 8), (B, LK, H, 8), (B, LK, H, 8)
    return [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("written", "keywords"),
    [
        ({"score_mod": mods.alibi(SLOPES.astype(FP32), offset=OFF)}, {"alibi_slopes": SLOPES.astype(FP32)}),
        ({"score_mod": mods.softcap(0.7)}, {"softcap": 0.7}),
        ({"score_mod": mods.relative_bias(TABLE)}, {"attn_bias": TABLE[h, np.clip(k - q, -3, 3) + 3][0]}),
        ({"mask_mod": mods.causal(OFF)}, {"causal": True}),
        ({"mask_mod": mods.causal()}, {"causal": True, "alignment": "top-left"}),
        ({"mask_mod": mods.sliding_window(3, 1, OFF)}, {"window_size": (3, 1)}),
        ({"mask_mod": mods.document(IDS, OTHER_IDS)}, {"attn_mask": (IDS[b, q] == OTHER_IDS[k])}),
    ],
)  # fmt: skip
def test_attention_is_that_of_the_keyword(written: dict[str, Any], keywords: dict[str, Any]) -> None:
    out, pullback = cuflash.flash_attn_vjp(*tensors(), **written)
    expected, expected_pullback = cuflash.flash_attn_vjp(*tensors(), **keywords)
    np.testing.assert_allclose(out, expected, 1e-13, 1e-13)
    for one, other in zip(pullback(out), expected_pullback(out), strict=True):
        np.testing.assert_allclose(one, other, 1e-12, 1e-12)


def test_what_is_captured_may_change_without_another_mod() -> None:
    for make in (lambda n: mods.causal(n), lambda n: mods.alibi([n, n + 1]), lambda n: mods.tree([-1, 0], n)):
        argument = "score_mod" if make(1).__code__.co_varnames[0] == "score" else "mask_mod"
        assert mods.trace(argument, make(1)).mod == mods.trace(argument, make(2)).mod


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mods.softcap(0), "cap is 0.0; expected a positive number"),
        (lambda: mods.relative_bias(np.zeros((2, 4))), "table has 4 columns; expected an odd number"),
        (lambda: mods.alibi(np.zeros((1, 2, 3))), "slopes has 3 axes; expected 1 or 2"),
        (lambda: mods.document(np.zeros(3)), "ids is float64; expected integers"),
        (lambda: mods.tree([0, 1]), "parents has a node whose parent is not before it"),
        (lambda: mods.tree([0.5]), "expected integers of shape"),
        (lambda: mods.causal(0.5), r"offset is .*0.5.*; expected integers"),
        (lambda: mods.dilated_window(1, 1, 0), "step is 0; expected an integer from 1"),
        (lambda: mods.t5_bias(np.zeros((8, 2)), max_distance=2), "table has 8 buckets and max_distance is 2"),
        (lambda: mods.both(), "no mask is given"),
        (lambda: mods.either(3), "a mask is 3; expected a function"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
