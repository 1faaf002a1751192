"""The naive formula against the oracle, and what passes by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest

from cuflash import dtypes, reference
from cuflash.cases import calls
from cuflash.cases.inputs import Normals, make
from cuflash.cases.table import CASES
from cuflash.masks import Mask
from cuflash.verify.naive import Extras, Naive, visible
from cuflash.verify.verdict import verdicts


@pytest.mark.parametrize(
    ("mask", "softcap", "heads_kv", "options"),
    [
        (Mask(), 0.0, 4, {}),
        (Mask(right=0), 0.0, 2, {"causal": True}),
        (Mask(left=3, right=2), 1.5, 1, {"window": (3, 2), "softcap": 1.5}),
        (Mask(right=0, alignment="top-left"), 0.0, 4, {"causal": True, "alignment": "top-left"}),
    ],
)
def test_naive_attention_is_attention(mask, softcap, heads_kv, options):
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal(shape) for shape in [(9, 4, 8), (13, heads_kv, 8), (13, heads_kv, 5), (9, 4, 5)]
    )
    dlse = rng.standard_normal((4, 9))
    exact = oracle.attention(q[None], k[None], v[None], dout[None], dlse[None], scale=0.3, **options)
    naive = Naive(dtypes.FP64, 0.3, softcap)
    q, k, v, dout = (x.swapaxes(0, 1) for x in (q, k, v, dout))
    keep = visible(mask, 9, 13)
    out, lse = naive.forward(q, k, v, keep)
    grads = naive.backward(dout, dlse, q, k, v, keep)[:3]
    np.testing.assert_allclose(out.swapaxes(0, 1), exact.out[0], atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse[0], atol=1e-13)
    for grad, expected in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True):
        np.testing.assert_allclose(grad.swapaxes(0, 1), expected[0], atol=1e-12)


def test_naive_attention_knows_every_score_feature():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((n, 4, d)) for n, d in [(9, 8), (13, 8), (13, 5), (9, 5)])
    bias, sink = rng.standard_normal((1, 4, 9, 13)), rng.standard_normal(4)
    kept = np.array([oracle.flash_keep(3, 8, 0.3, 0, h, 4, np.arange(9)[:, None], np.arange(13)) for h in range(4)])
    exact = oracle.attention(
        q[None], k[None], v[None], dout[None],
        scale=0.3, causal=True, bias=bias, sink=sink, dropout_p=0.3, rng_state=(3, 8),
    )  # fmt: skip
    extras = Extras(bias[0], sink, kept / 0.7)
    q, k, v, dout = (x.swapaxes(0, 1) for x in (q, k, v, dout))
    naive, keep = Naive(dtypes.FP64, 0.3, 0.0), visible(Mask(right=0), 9, 13)
    out, lse = naive.forward(q, k, v, keep, extras)
    grads = naive.backward(dout, 0.0, q, k, v, keep, extras)
    np.testing.assert_allclose(out.swapaxes(0, 1), exact.out[0], atol=1e-13)
    np.testing.assert_allclose(lse, exact.lse[0], atol=1e-13)
    for grad, expected in zip(grads[:3], (exact.dq, exact.dk, exact.dv), strict=True):
        np.testing.assert_allclose(grad.swapaxes(0, 1), expected[0], atol=1e-12)
    np.testing.assert_allclose(grads.ds, exact.dbias[0], atol=1e-12)
    np.testing.assert_allclose(grads.dsink, exact.dsink, atol=1e-12)


@pytest.mark.parametrize(
    "case_id",
    [
        "fwd_sm80-bf16-d64-causal",
        "bwd_sm80-bf16-d64-softcap",
        "fwd_simt-fp32-d64-seqused",
        "bwd_simt-fp32-d64-varlen_causal",
        "fwd_simt-fp32-d64-mask",
        "fwd_simt-fp32-d64-window",
        "fwd_sm80-bf16-d64-everything",
        "bwd_sm80-bf16-d64-dbias_row",
        "bwd_sm80-bf16-d64-varlen_everything",
        "bwd_simt-fp64-d64-everything",
        "bwd_simt-fp32-d64-dropout_word",
        "bwd_sm80-bf16-d64-gqa",
    ],
)
def test_a_case_passes_on_numpy(case_id):
    case = CASES[case_id]
    judged = verdicts(case, make(case, Normals(np)))
    expected = ["out", "lse"] if case_id.startswith("fwd") else ["dq", "dk", "dv"]
    if case_id.startswith("bwd"):
        expected += ["dbias"] * ("dbias" in case_id or "everything" in case_id) + ["dsink"] * ("everything" in case_id)
    assert [v.tensor for v in judged] == expected
    for verdict in judged:
        assert verdict.passed, verdict


@pytest.mark.parametrize("damage", [lambda x: x * 1.05, lambda x: np.where(x > 0.5, np.nan, x), lambda x: x[::-1]])
def test_a_wrong_result_does_not_pass(monkeypatch, damage):
    case = CASES["fwd_simt-fp32-d64-causal"]
    real = calls.of

    def damaged(*arguments):
        call = real(*arguments)
        return lambda: (damage(call()[0]), call()[1])

    monkeypatch.setattr(calls, "of", damaged)
    out, lse = verdicts(case, make(case, Normals(np)))
    assert not out.passed
    assert lse.passed


def test_an_error_of_the_numpy_backend_itself_does_not_pass(monkeypatch):
    """What the NumPy backend is compared with is not its own, in whatever precision."""
    case = CASES["fwd_simt-fp32-d64-causal"]
    inputs, right = make(case, Normals(np)), reference.forward

    def wrong(*arguments, softmax_scale, **others):
        return right(*arguments, softmax_scale=1.01 * softmax_scale, **others)

    monkeypatch.setattr(reference, "forward", wrong)
    assert not any(verdict.passed for verdict in verdicts(case, inputs))


def test_a_single_key_too_few_does_not_pass(monkeypatch):
    """Of 331 random keys one hardly shows in a bf16 output, but in a log-sum-exp, as in the soak."""
    case = replace(CASES["fwd_sm80-bf16-d64"], family=None)
    inputs, real = make(case, Normals(np)), calls.of
    monkeypatch.setattr(calls, "of", lambda *_: real(case, replace(inputs, k=inputs.k[:, :-1], v=inputs.v[:, :-1])))
    _, lse = verdicts(case, inputs)
    assert not lse.passed


def test_a_gradient_of_the_log_sum_exp_is_taken_in():
    case = CASES["bwd_simt-fp32-d64-mask"]
    inputs = make(case, Normals(np))
    inputs.dlse = np.random.default_rng(4).standard_normal((2, 2, 203), np.float32)
    inputs.dlse[:, :, 3] = np.nan  # of a row that sees nothing
    assert all(verdict.passed for verdict in verdicts(case, inputs))
    without = calls.of(case, replace(inputs, dlse=None))()
    assert not any(np.allclose(x, y, atol=1e-3) for x, y in zip(calls.of(case, inputs)()[:2], without[:2], strict=True))
