"""score_mod and mask_mod at every function that takes them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.mods import Traced

RNG = np.random.default_rng(5)
Q, K, V = (RNG.standard_normal((2, length, heads, 8)).astype(np.float32) for length, heads in ((6, 4), (9, 2), (9, 2)))
SLOPES = np.array([0.5, 0.25, 1, 2], np.float32)


def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s - SLOPES[h] * mods.abs(q - k) + 0.25 * b


def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
    return ((q + k + h) % 3 != 0) & (k < 7 + b)


AT = np.ogrid[:2, :4, :6, :9]
BIAS = (-SLOPES[AT[1]] * abs(AT[2] - AT[3]) + 0.25 * AT[0]).astype(np.float32)
MASK = ((AT[2] + AT[3] + AT[1]) % 3 != 0) & (AT[3] < 7 + AT[0])
WRITTEN: dict[str, Any] = {"score_mod": score, "mask_mod": seen}
GIVEN: dict[str, Any] = {"attn_bias": BIAS, "attn_mask": MASK}


def close(computed: Any, expected: Any) -> None:
    for one, other in zip(computed, expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-5, 1e-5)


def test_every_function_computes_what_a_bias_and_a_mask_do() -> None:
    expected = cuflash.flash_attn_func(Q, K, V, return_lse=True, **GIVEN)
    close(cuflash.flash_attn_func(Q, K, V, return_lse=True, **WRITTEN), expected)
    close(cuflash.flash_attn_prepare(Q, K, V, **WRITTEN)(Q, K, V), expected)
    close(cuflash.flash_attn_kvpacked_func(Q, np.stack([K, V], 2), return_lse=True, **WRITTEN), expected)
    traced = {name: mods.trace(name, function) for name, function in WRITTEN.items()}
    close(cuflash.flash_attn_func(Q, K, V, return_lse=True, **traced), expected)
    out, lse = cuflash.flex_attention(
        *(x.swapaxes(1, 2) for x in (Q, K, V)), score, mask_mod=seen, enable_gqa=True, return_lse=True
    )
    close((out.swapaxes(1, 2), lse), expected)
    place = np.empty_like(expected[0])
    assert cuflash.flash_attn_func(Q, K, V, out=place, **WRITTEN) is place
    close([place], expected[:1])


def test_gradients_are_those_of_a_bias() -> None:
    out, pullback = cuflash.flash_attn_vjp(Q, K, V, bias_grad=True, **GIVEN)
    expected = pullback(out)
    computed, pullback = cuflash.flash_attn_vjp(Q, K, V, captured_grad=True, **WRITTEN)
    gradients = pullback(out)
    close(gradients[:3], expected[:3])
    of_slopes = -(expected.dbias * abs(AT[2] - AT[3])).sum(axis=(0, 2, 3))
    close(gradients.dcaptured, [of_slopes])
    assert isinstance(gradients, cuflash.CapturedGradients) and gradients.dbias is None and gradients.dsink is None
    out, lse = cuflash.flash_attn_func(Q, K, V, return_lse=True, **WRITTEN)
    close(cuflash.flash_attn_backward(computed, Q, K, V, out, lse, **WRITTEN), gradients[:3])


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_a_cache_counts_from_the_first_key(paged: bool) -> None:
    cached, padding = np.array([5, 8], np.int32), np.array([0, 3], np.int32)
    distance = cached - padding

    def decay(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s - SLOPES[h] * (q + distance[b] - 1 - k)

    def early(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k != 1

    one = Q[:, :1]
    options: dict[str, Any] = {"cache_seqlens": cached, "return_softmax_lse": True}
    caches = [K[:, :8], V[:, :8]]
    if paged:
        options["block_table"] = np.array([[1, 0], [2, 3]], np.int32)
        caches = [x.reshape(4, 4, 2, 8)[[1, 0, 2, 3]] for x in caches]
        distance = cached
        padding = np.zeros(2, np.int32)
    else:
        options["cache_leftpad"] = padding
    out, lse = cuflash.flash_attn_with_kvcache(one, *caches, score_mod=decay, mask_mod=early, **options)
    for b in range(2):
        keys = slice(padding[b], cached[b])
        at = np.arange(cached[b] - padding[b])
        bias = -SLOPES[:, None, None] * (distance[b] - 1 - at).astype(np.float32)
        expected = cuflash.flash_attn_func(
            one[b : b + 1], K[b : b + 1, keys], V[b : b + 1, keys], attn_bias=bias, attn_mask=at[None] != 1,
            return_lse=True,
        )  # fmt: skip
        close((out[b : b + 1], lse[b : b + 1]), expected)
    del options["return_softmax_lse"]
    prepared = cuflash.flash_attn_prepare(
        one, None, None, cache=caches, score_mod=decay, mask_mod=early, **options
    )  # fmt: skip
    close(prepared(one), (out, lse))


def test_probabilities_are_those_of_the_written_score() -> None:
    _, _, probabilities = cuflash.flash_attn_func(Q, K, V, return_attn_probs=True, **WRITTEN)
    close([probabilities], [cuflash.flash_attn_func(Q, K, V, return_attn_probs=True, **GIVEN)[2]])


def test_what_a_function_reads_is_read_anew_and_decides_nothing_else() -> None:
    table = np.zeros(9, np.float32)

    def call() -> Any:
        return cuflash.flash_attn_func(Q, K, V, score_mod=lambda s, b, h, q, k: s + table[k])

    first = call()
    table[3] = 5
    assert (call() != first).any()
    close([call()], [cuflash.flash_attn_func(Q, K, V, attn_bias=table)])


def test_which_kernels_have_it() -> None:
    explanation = cuflash.explain(Q, K, V, device="h100", captured_grad=True, backward=True, **WRITTEN)
    assert explanation.plan is not None
    assert "score_mod mask_mod dcaptured" in str(explanation)
    assert "as (score - (captured0[h] * abs((q - k)))) + (0.25 * b)" in str(explanation.problem.sheet())
    problem = replace(explanation.problem, dtype="bf16")
    (reason,) = cuflash.plan.why_not(problem, explanation.device)["sm90"]
    assert "no gradients of numbers that are read by more than the distance" in reason
    assert cuflash.plan.choose(problem, explanation.device).family == "sm80"
    assert cuflash.plan.choose(replace(problem, captured_grad=False), explanation.device).family == "sm90"
    plan = cuflash.plan.choose(replace(problem, deterministic=True), explanation.device)
    assert [plan.family, plan.steps[-1].kernel] == ["sm80", "bwd_captured"]
    assert "bwd_captured" not in {step.kernel for step in cuflash.plan.choose(problem, explanation.device).steps}


EMPTY, FOREIGN, ALIASED = np.zeros((0, 3), np.float32), np.zeros(3, ">f4"), np.zeros((2, 6, 4, 8), np.float32)
MASKED = np.ma.masked_array(np.zeros(9, np.float32))
BYTES = np.zeros(13, np.uint8)[1:].view(np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_mod": 3}, r"score_mod is 3; expected a function of \(score, b, h, q, k\)"),
        ({"mask_mod": "causal"}, r"mask_mod is 'causal'; expected a function of \(b, h, q, k\)"),
        ({"mask_mod": lambda b, h, q, k: q}, "mask_mod returned an? .*int.*; expected a comparison"),
        ({"score_mod": lambda s, b, h, q, k: s if q > k else 0}, "use cuflash.mods.where"),
        ({"score_mod": lambda s, b, h, q, k: s + EMPTY[q, k]},
         r"captured0 of score_mod has shape \(0, 3\); expected at least one element along each axis"),
        ({"mask_mod": lambda b, h, q, k: FOREIGN[k] > 0}, "captured0 of mask_mod is >f4; expected one of float16"),
        ({"score_mod": lambda s, b, h, q, k: s + MASKED[k]}, "a masked array was captured, whose mask nothing follows"),
        ({"score_mod": lambda s, b, h, q, k: s + BYTES[k]}, "captured0 of score_mod is misaligned"),
        ({"score_mod": lambda s, b, h, q, k: s + ALIASED[b, q, h, k], "out": ALIASED},
         "out shares memory with captured0 of score_mod, which is still read"),
        ({"mask_mod": mods.trace("score_mod", lambda s, b, h, q, k: s)}, "mask_mod was traced as a score_mod"),
        ({"score_mod": mods.trace("mask_mod", lambda b, h, q, k: q > k)}, "score_mod was traced as a mask_mod"),
        ({"score_mod": Traced(mods.trace("score_mod", lambda s, b, h, q, k: s * SLOPES[h]).mod, ())},
         "score_mod reads 1 array, and 0 are given"),
    ],
)  # fmt: skip
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        cuflash.flash_attn_func(Q, K, V, **options)


def test_gradients_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="captured_grad is True but score_mod is None"):
        cuflash.flash_attn_vjp(Q, K, V, mask_mod=seen, captured_grad=True)
    with pytest.raises(InvalidArgument, match="captured_grad is 'x'; expected True or False"):
        cuflash.flash_attn_vjp(Q, K, V, score_mod=score, captured_grad="x")  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_narrow_tensors_have_scores_in_float32(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    table = RNG.standard_normal((4, 9)).astype(dtype)
    computed = cuflash.flash_attn_func(q, k, v, score_mod=lambda s, b, h, q, k: s + table[h, k], return_lse=True)
    bias = table.astype(np.float32)[:, None]
    expected = cuflash.flash_attn_func(q, k, v, attn_bias=bias, return_lse=True)
    assert computed[0].dtype == dtype and computed[1].dtype == np.float32
    close([x.astype(np.float32) for x in computed], [x.astype(np.float32) for x in expected])


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (2, 5, 4)])
def test_nothing_to_attend_to_moves_nothing(shape: tuple[int, int, int]) -> None:
    batch, len_q, len_kv = shape
    q, k = np.ones((batch, len_q, 4, 8)), np.ones((batch, len_kv, 2, 8))
    hidden = {"mask_mod": lambda b, h, q, k: k < 0}
    (out, lse), pullback = cuflash.flash_attn_vjp(
        q, k, k, score_mod=score, captured_grad=True, return_lse=True, **hidden
    )
    gradients = pullback(np.ones_like(out))
    assert out.shape == q.shape and not out.any() and (lse == -np.inf).all()
    assert not any(x.any() for x in (*gradients[:3], *gradients.dcaptured))
    assert gradients.dcaptured[0].shape == SLOPES.shape


def test_minus_infinity_hides_like_a_bias_and_moves_nothing() -> None:
    weight = np.array([0, 1, 2, 0, 1, 1, 1, 0, 3], np.float64)

    def weighted(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + mods.log(weight[k])

    q, k, v = (x.astype(np.float64) for x in (Q, K, V))
    with np.errstate(divide="ignore"):
        bias = np.log(weight)
    out, pullback = cuflash.flash_attn_vjp(q, k, v, score_mod=weighted, captured_grad=True)
    expected, of_bias = cuflash.flash_attn_vjp(q, k, v, attn_bias=bias, bias_grad=True)
    np.testing.assert_allclose(out, expected, 1e-12)
    gradients, others = pullback(out), of_bias(out)
    for one, other in zip(gradients[:3], others[:3], strict=True):
        np.testing.assert_allclose(one, other, 1e-12, 1e-13)
    seen_keys = weight > 0
    np.testing.assert_allclose(
        gradients.dcaptured[0][seen_keys], (others.dbias / np.where(seen_keys, weight, 1))[seen_keys]
    )
    assert not gradients.dcaptured[0][~seen_keys].any()
