"""Every kernel on a GPU: the case table on strided tensors between NaNs, repeats, and offsets beyond 32 bits."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import oracle
import pytest

from cuflash.cases import calls
from cuflash.cases.inputs import Inputs, Normals, host, make, places
from cuflash.cases.table import CASES, Case
from cuflash.dtypes import BF16, TF32
from cuflash.errors import UnsupportedProblem
from cuflash.verify.surroundings import Arena

pytestmark = pytest.mark.gpu


def packed_kv(case: Case, inputs: Inputs) -> list[np.ndarray]:
    """Keys and values in host memory, dense or packed: those in pages gathered."""
    if not case.problem.page_size:
        return [host(inputs.k), host(inputs.v)]
    gathered = []
    for pages in (host(inputs.k), host(inputs.v)):
        packed = np.zeros((sum(case.lens_kv), *pages.shape[2:]), pages.dtype)
        for rows, at in places(case, host(inputs.block_table)):
            packed[rows] = pages[at]
        gathered.append(packed)
    return gathered


def expected(case: Case, inputs: Inputs, *, naive: bool = False) -> oracle.Attention:
    """The oracle's answer, exact or naive in the case's element type."""
    problem, mask = case.problem, case.problem.mask
    rounded = oracle.naive_in_tf32 if problem.dtype == TF32 else oracle.naive_in_dtype
    compute = rounded if naive else oracle.attention
    return compute(
        host(inputs.q),
        *packed_kv(case, inputs),
        host(inputs.dout) if problem.direction == "backward" else None,
        window=tuple(-1 if side is None else side for side in (mask.left, mask.right)),
        alignment=mask.alignment,
        softcap=problem.softcap,
        scale=problem.softmax_scale,
        mask=host(inputs.mask_tensor),
        alibi_slopes=host(inputs.alibi_slopes),
        bias=host(inputs.bias),
        sink=host(inputs.sink),
        dropout_p=case.dropout_p,
        dropout_scheme=problem.dropout or "byte",
        rng_state=inputs.rng_state or (0, 0),
        seqused_q=np.array(case.seqused_q) if case.seqused_q else None,
        cu_seqlens_q=np.array([0, *accumulate(case.lens_q)]) if case.lens_q else None,
        cu_seqlens_k=np.array([0, *accumulate(case.lens_kv)]) if case.lens_kv else None,
        seqused_k=np.array(case.seqused_kv) if case.seqused_kv else None,
    )


@pytest.mark.parametrize("case_id", CASES)
def test_case(cp: Any, case_id: str) -> None:
    case = CASES[case_id]
    inputs, arena = make(case, Normals(cp)), Arena(cp, 2**28)
    for turn, name in enumerate(("q", "k", "v", "dout")):
        x = getattr(inputs, name)
        view = arena.cut(name, x.shape, x.dtype, case.problem.copy_bytes, turn)
        view[...] = x
        setattr(inputs, name, view)
    if case.problem.shared_kv:
        inputs.v = inputs.k[..., : case.problem.dim_v]
    try:
        results = [host(x) for x in calls.of(case, inputs)()]
    except UnsupportedProblem as error:
        pytest.skip(str(error).splitlines()[0])
    exact, naive = expected(case, inputs), expected(case, inputs, naive=True)
    for field, result in zip(calls.results(case), results, strict=True):
        if field == "rng_state":
            assert tuple(result) == inputs.rng_state
            continue
        addends = case.problem.dtype.numpy if field in ("dbias", "dsink") else None
        oracle.assert_close(result, getattr(exact, field), getattr(naive, field), f"{case_id} {field}", addends)


@pytest.mark.parametrize(
    "case_id",
    [case_id for case_id, case in CASES.items() if case.problem.direction == "forward" or case.problem.deterministic],
)
def test_repeats_are_bit_equal(cp: Any, case_id: str) -> None:
    case = CASES[case_id]
    try:
        call = calls.of(case, make(case, Normals(cp)))
        first = [x.tobytes() for x in call()]
    except UnsupportedProblem as error:
        pytest.skip(str(error).splitlines()[0])
    for _ in range(19):
        assert [x.tobytes() for x in call()] == first


def test_simt_gradients_need_no_flag_to_be_bit_equal(cp: Any) -> None:
    case = CASES["bwd_simt-fp32-d64-gqa"]
    call = calls.of(case, make(case, Normals(cp)))
    first = [x.tobytes() for x in call()]
    for _ in range(19):
        assert [x.tobytes() for x in call()] == first


@pytest.mark.parametrize("family", [("sm90", "sm80"), "sm80", "simt"], ids=["sm90", "sm80", "simt"])
def test_batches_further_apart_than_32_bits(cp: Any, family: Any) -> None:
    """Element offsets beyond 2^31 in every tensor: two batch elements at both ends of one large buffer."""
    import cuflash

    shape, far = (2, 96, 2, 64), 2**31 + 64
    rng = np.random.default_rng(0)
    buffer = cp.zeros(far + 4 * prod(shape), np.float16)

    def placed(number: int) -> tuple[Any, Any]:
        small = cp.asarray(rng.standard_normal(shape, np.float32).astype(np.float16))
        start = number * prod(shape[1:])
        strides = tuple(2 * n for n in (far, 128, 64, 1))
        view = cp.lib.stride_tricks.as_strided(buffer[start:], shape, strides)
        view[...] = small
        return small, view

    near, spread = zip(*(placed(number) for number in range(4)), strict=True)
    options = cuflash.ops.asked(causal=True, family=family)
    answers = []
    for q, k, v, dout in (near, spread):
        arrays = cuflash.ops.Arrays(q, k, v)
        out, lse = cuflash.ops.forward(options, arrays)
        arrays = arrays._replace(out=out, dout=dout, lse=lse)
        grads = cuflash.ops.backward(options.replace(deterministic=True), arrays)
        answers.append([x.tobytes() for x in (out, lse, *grads)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_pages_further_apart_than_32_bits(cp: Any, family: str) -> None:
    """Two pages at both ends of one large buffer, each read by both sequences."""
    import cuflash

    page, far = (48, 2, 64), 2**31 + 64
    rng = np.random.default_rng(0)
    q, *near = (cp.asarray(rng.standard_normal((2, *page), np.float32).astype(np.float16)) for _ in range(3))
    buffer = cp.full(far + 2 * prod(page), cp.nan, np.float16)
    strides = tuple(2 * n for n in (far, 128, 64, 1))
    spread = [cp.lib.stride_tricks.as_strided(buffer[n * prod(page) :], (2, *page), strides) for n in range(2)]
    for view, values in zip(spread, near, strict=True):
        view[...] = values
    table = cp.asarray(np.array([[1, 0], [0, 1]], np.int32))
    starts = cp.asarray(np.array([0, 48, 96], np.int32)), cp.asarray(np.array([0, 90, 186], np.int32))
    options = cuflash.ops.asked(causal=True, family=family, max_seqlen_q=48, max_seqlen_k=96)
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), starts, strict=True))
    answers = []
    for k, v in (near, spread):
        arrays = cuflash.ops.Arrays(q.reshape(96, 2, 64), k, v, **lengths, table=table)
        answers.append([x.tobytes() for x in cuflash.ops.forward(options, arrays)])
    assert answers[0] == answers[1]


def test_more_than_2_to_the_31_elements(cp: Any) -> None:
    """Tensors of over 2^31 elements, narrow windows: the last rows must equal those of the last rows alone."""
    import cuflash

    length, heads, dim, left = 2**22 + 100, 8, 64, 64
    if cp.cuda.Device().mem_info[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free device memory")
    q, k, v, dout = (
        cp.random.default_rng(seed).standard_normal((1, length, heads, dim), dtype=np.float32).astype(BF16.numpy)
        for seed in range(4)
    )
    options = {"window_size": (left, 0), "return_lse": True}
    out, lse = cuflash.flash_attn_func(q, k, v, **options)
    dq, _, _ = cuflash.flash_attn_backward(dout, q, k, v, out, lse, window_size=(left, 0))
    rows = 1000
    ends = [x[:, -rows - left :] for x in (q, k, v, dout)]
    out_end, lse_end = cuflash.flash_attn_func(*ends[:3], **options)
    dq_end, _, _ = cuflash.flash_attn_backward(
        ends[3], *ends[:3], out_end, lse_end, window_size=(left, 0), deterministic=True
    )
    for whole, end in ((out, out_end), (dq, dq_end)):
        whole, end = (host(x[0, -rows:]).astype(np.float64) for x in (whole, end))
        assert np.isfinite(end).all()
        np.testing.assert_allclose(whole, end, atol=0.02, rtol=0.02)
    cp.get_default_memory_pool().free_all_blocks()
