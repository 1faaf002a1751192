"""What type checkers know of results; read by mypy and pyright (``test_typing.py``), never run."""

from typing import Any, assert_type

import numpy as np

import cuflash

Dense = np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]
Packed = np.ndarray[tuple[int, int, int], np.dtype[np.float16]]
Lengths = np.ndarray[tuple[int], np.dtype[np.int32]]
Slopes = np.ndarray[tuple[int], np.dtype[np.float32]]


class Tensor:
    """An array of a library that the checker knows."""

    def sum(self) -> float:
        return 0.0


def dense(q: Dense, k: Dense, v: Dense, kv: Any, sink: Slopes, flag: bool) -> None:
    assert_type(cuflash.flash_attn_func(q, k, v), Dense)
    assert_type(cuflash.flash_attn_func(q, k, v, 0.0, None, True, (-1, -1), 0.0, None, False, False), Dense)
    cuflash.flash_attn_func(q, k, v, causal=True, sink=sink, out=q).sum()
    assert_type(cuflash.flash_attn_func(q, k, v, return_lse=False), Dense)
    out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
    assert_type(out, Dense)
    lse.sum()
    out, rng_state = cuflash.flash_attn_func(q, k, v, 0.1, return_rng_state=True)
    assert_type(rng_state, Any | None)
    out, lse, rng_state = cuflash.flash_attn_func(q, k, v, 0.1, return_lse=True, return_rng_state=True)
    out, lse, probabilities = cuflash.flash_attn_func(q, k, v, return_attn_probs=True)
    out, lse, probabilities = cuflash.flash_attn_func(q, k, v, return_attn_probs=True, return_lse=flag)
    out, lse, probabilities, rng_state = cuflash.flash_attn_func(q, k, v, return_attn_probs=True, return_rng_state=True)
    assert_type(cuflash.flash_attn_func(q, k, v, return_lse=flag), Dense | tuple[Any, ...])

    assert_type(cuflash.flash_attn_kvpacked_func(q, kv, causal=True, num_splits=2), Dense)
    out, lse = cuflash.flash_attn_kvpacked_func(q, kv, return_lse=True)
    assert_type(out, Dense)
    out, lse, probabilities = cuflash.flash_attn_qkvpacked_func(kv, return_attn_probs=True)
    cuflash.flash_attn_qkvpacked_func(kv, 0.0, None, True).sum()


def varlen(q: Packed, k: Packed, v: Packed, kv: Any, starts: Lengths) -> None:
    assert_type(cuflash.flash_attn_varlen_func(q, k, v, starts, starts), Packed)
    assert_type(
        cuflash.flash_attn_varlen_func(q, k, v, starts, starts, 7, 7, 0.0, None, True, seqused_k=starts), Packed
    )
    out, lse = cuflash.flash_attn_varlen_func(q, k, v, starts, starts, block_table=kv, return_lse=True)
    assert_type(out, Packed)
    out, lse, rng_state = cuflash.flash_attn_varlen_func(
        q, k, v, starts, starts, return_lse=True, return_rng_state=True
    )
    out, lse, probabilities = cuflash.flash_attn_varlen_func(q, k, v, starts, starts, return_attn_probs=True)
    out, lse = cuflash.flash_attn_varlen_kvpacked_func(q, kv, starts, starts, return_lse=True, validate=True)
    assert_type(out, Packed)
    out, lse = cuflash.flash_attn_varlen_qkvpacked_func(kv, starts, return_lse=True, seqused_q=starts)


def gradients(q: Dense, k: Dense, v: Dense, lse: Any, bias: Any, sink: Slopes, maybe: Slopes | None) -> None:
    assert_type(cuflash.flash_attn_backward(q, q, k, v, q, lse, causal=True), tuple[Dense, Dense, Dense])
    gradients = cuflash.flash_attn_backward(q, q, k, v, q, lse, attn_bias=bias, bias_grad=True)
    assert_type(gradients.dsink, None)
    gradients.dbias.sum()
    with_sink = cuflash.flash_attn_backward(q, q, k, v, q, lse, sink=sink)
    assert_type(with_sink.dq, Dense)
    assert_type(with_sink.dbias, None)
    with_sink.dsink.sum()
    dq, dk, dv, dbias, dsink = cuflash.flash_attn_backward(
        q, q, k, v, q, lse, sink=sink, attn_bias=bias, bias_grad=True
    )
    dq = cuflash.flash_attn_backward(q, q, k, v, q, lse, sink=maybe)[0]

    out, pullback = cuflash.flash_attn_vjp(q, k, v, causal=True)
    assert_type(out, Dense)
    dq, dk, dv = pullback(np.ones_like(out))
    assert_type(dv, Dense)
    (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, return_lse=True)
    dq, dk, dv = pullback(out, lse)
    out, with_bias = cuflash.flash_attn_vjp(q, k, v, attn_bias=bias, bias_grad=True)
    with_bias(out).dbias.sum()
    assert_type(with_bias(out).dsink, None)
    captured = cuflash.flash_attn_backward(q, q, k, v, q, lse, score_mod=lambda s, b, h, q, k: s, captured_grad=True)
    assert_type(captured.dq, Dense)
    assert_type(captured.dcaptured, tuple[Any, ...])
    out, of_captured = cuflash.flash_attn_vjp(q, k, v, score_mod=lambda s, b, h, q, k: s, captured_grad=True)
    assert_type(of_captured(out).dk, Dense)
    (out, lse), both = cuflash.flash_attn_vjp(q, k, v, attn_bias=bias, bias_grad=True, sink=sink, return_lse=True)
    dq, dk, dv, dbias, dsink = both(out)


def others(q: Dense, x: Tensor, unknown: Any, flag: bool) -> None:
    assert_type(cuflash.scaled_dot_product_attention(q, q, q, is_causal=True), Dense)
    out, lse = cuflash.scaled_dot_product_attention(q, q, q, return_lse=True, backend="flash")
    assert_type(out, Dense)
    attend = cuflash.flash_attn_prepare(q, q, q, causal=True)
    out, lse = attend(q, q, q)
    assert_type(out, Dense)

    assert_type(cuflash.flash_attn_func(x, x, x).sum(), float)
    tensor, lse = cuflash.flash_attn_func(x, x, x, return_lse=True)
    assert_type(tensor, Tensor)
    cuflash.flash_attn_func(unknown, unknown, unknown).sum()
    out, lse = cuflash.flash_attn_func(unknown, unknown, unknown, return_lse=True)
    out, pullback = cuflash.flash_attn_vjp(unknown, unknown, unknown)
    dq, dk, dv = pullback(out)


def explained(problem: cuflash.Problem) -> None:
    explanation = cuflash.explain(problem, device="h100")
    assert_type(explanation, cuflash.Explanation)
    assert_type(explanation.problem.mask, cuflash.Mask)
    assert_type(explanation.why_not, dict[str, list[str]])
    if explanation.plan is not None:
        assert_type(explanation.plan.family, str)
        assert_type(explanation.plan.workspace_bytes, int)
    assert_type(cuflash.__version__, str)


def maps(q: Dense, starts: Lengths, problem: cuflash.Problem) -> None:
    computed = cuflash.attention_map(q, q, rows=[0, -1], bins=64, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert_type(computed, cuflash.AttentionMap)
    assert_type(computed.rows, tuple[int, ...] | None)
    computed.mass.sum()
    computed.plot(head=0, tokens=["a"]).save("map.png")
    problem.mask.plot(problem, tile=(64, 128)).save("mask.svg")
    seen = cuflash.create_block_mask(problem.mask & cuflash.Mask(left=99), len_q=512, len_kv=512)
    assert_type(seen & (lambda b, h, q, k: k % 2 == 0) | ~seen, cuflash.BlockMask)


def handed_on(q: Dense, **keywords: Any) -> Dense:
    options: cuflash.FlashOptions = {"alignment": "top-left", "num_splits": 1}
    return cuflash.flash_attn_kvpacked_func(q, q, causal=True, **options)
