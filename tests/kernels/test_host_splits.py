"""Keys split between blocks, and heads that share a tile, run thread by thread on the CPU, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from covering import sampled
from host.build import why_not
from host.cases import CAUSAL, HostCase, Tensors, check_forward, dense, packed, paged
from host.run import run_plan_on_host
from hypothesis import given, settings
from hypothesis import strategies as st

from cuflash.device import named
from cuflash.dtypes import DTYPES, FP32
from cuflash.features import needs
from cuflash.masks import Mask
from cuflash.plan import Plan, choose
from cuflash.plan.families import sm90
from cuflash.problem import Problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

H100 = named("h100")
TOP_LEFT = Mask(right=0, alignment="top-left")
WINDOW = Mask(left=90, right=5)


def plan_of(case: HostCase) -> Plan:
    device = named(case.device)
    return choose(case.problem, replace(device, num_sms=case.num_sms or device.num_sms), case.family)


def variant(plan: Plan) -> tuple[str, str]:
    """What the main kernel's rows are, and which keys a block walks."""
    mains = "fwd_sm90", "fwd_sm80", "fwd_sm80_few", "fwd_simt"
    (step,) = (step for step in plan.steps if step.kernel in mains)
    return step.config.heads, step.config.split


SPLIT, GROUP, BOTH = ("OneHead", "KeySplits"), ("HeadGroup", "NoSplit"), ("HeadGroup", "KeySplits")
RANGES = ("HeadGroup", "KeyRanges")
HOPPER = {"family": "sm90", "num_splits": 0}
"""A group of heads in one tile of the copy engine's."""

CASES: dict[str, tuple[HostCase, tuple[str, str]]] = {
    "split": (dense("fp16", (2, 2), (100, 330), (64, 64), batch=2, num_splits=2), SPLIT),
    "split-more-than-tiles": (dense("bf16", (2, 2), (3, 200), (64, 64), num_splits=128), SPLIT),
    "split-d40-dv24": (dense("fp16", (2, 2), (130, 260), (40, 24), num_splits=3, mask=CAUSAL), SPLIT),
    "split-copy-2": (dense("bf16", (1, 1), (5, 300), (33, 7), num_splits=5, copy_bytes=2), SPLIT),
    "split-d256": (dense("bf16", (1, 1), (70, 200), (256, 256), num_splits=2, device="a10"), SPLIT),
    "split-causal-hides-all-but-one": (dense("fp16", (2, 2), (150, 400), (64, 64), num_splits=7, mask=TOP_LEFT), SPLIT),
    "split-queries-without-keys": (dense("fp16", (1, 1), (400, 330), (64, 64), num_splits=5, mask=CAUSAL), SPLIT),
    "group": (dense("fp16", (8, 2), (3, 200), (64, 64), batch=2), GROUP),
    "group-of-7": (dense("bf16", (7, 1), (17, 70), (64, 64), mask=CAUSAL), GROUP),
    "group-copy-4": (dense("fp16", (4, 1), (9, 130), (34, 18), copy_bytes=4), GROUP),
    "group-copy-2": (dense("bf16", (3, 1), (1, 70), (33, 7), copy_bytes=2), GROUP),
    "group-one-key": (dense("fp16", (8, 1), (1, 1), (64, 64), num_splits=128), GROUP),
    "group-no-keys": (dense("fp16", (8, 1), (1, 0), (64, 64), num_splits=128), GROUP),
    "group-no-keys-sink": (dense("fp16", (4, 2), (3, 0), (64, 64), num_splits=5, sink=True), GROUP),
    "decode": (dense("bf16", (8, 1), (1, 700), (128, 128), batch=2), BOTH),
    "decode-splits": (dense("bf16", (8, 1), (1, 700), (128, 128), batch=2, num_splits=4), BOTH),
    "decode-32-rows": (dense("fp16", (4, 1), (8, 700), (64, 48), batch=2, mask=CAUSAL, sink=True), BOTH),
    "decode-of-7": (dense("bf16", (7, 1), (4, 700), (40, 24), mask=CAUSAL, copy_bytes=8), BOTH),
    "decode-one-head": (dense("bf16", (2, 2), (3, 700), (33, 7), mask=WINDOW, copy_bytes=2), SPLIT),
    "decode-d256": (dense("fp16", (4, 1), (1, 400), (256, 256), device="a10", mask=CAUSAL), BOTH),
    "decode-few-sms": (dense("fp16", (8, 2), (2, 700), (64, 64), batch=3, num_sms=2, mask=CAUSAL), RANGES),
    "decode-ranges-mask": (
        dense("bf16", (4, 1), (5, 500), (64, 64), batch=2, mask=WINDOW, mask_axes="bhqk", num_sms=3), RANGES,
    ),
    "decode-ranges-scores": (
        dense(
            "fp16", (4, 1), (4, 500), (64, 64), batch=2, mask=CAUSAL, num_sms=3, alibi_axes="bh", bias_axes="bhqk",
            softcap=3.0, sink=True,
        ),
        RANGES,
    ),
    "ranges": (
        packed(
            "bf16", (4, 1), (1, 0, 3, 8, 2), (500, 40, 0, 300, 1), (64, 64), tail=3, mask=CAUSAL, num_sms=3,
            seqused_q=(1, 0, 2, 8, 0), seqused_kv=(450, 0, 0, 300, 1),
        ),
        RANGES,
    ),
    "ranges-in-step": (
        packed("bf16", (8, 4), (1, 0, 3, 8), (500, 40, 0, 300), (64, 64), tail=3, mask=CAUSAL, num_sms=6), RANGES,
    ),
    "ranges-in-step-dense": (dense("fp16", (12, 6), (3, 330), (64, 64), batch=3, num_sms=6, mask=CAUSAL), RANGES),
    "ranges-of-one-sm": (
        packed("fp16", (8, 2), (2,) * 9, (300, 10, 0, 65, 64, 63, 1, 200, 128), (16, 16), num_sms=1), RANGES,
    ),
    "ranges-paged-window": (
        paged(
            "bf16", 3, (4, 1), (1, 2, 1), (500, 340, 7), (64, 64), tail=2, mask=Mask(left=100, right=0), num_sms=2,
            shared=True,
        ),
        RANGES,
    ),
    "ranges-of-few-keys": (
        packed("bf16", (4, 1), (1,) * 12, (300, 1, 2, 0, 70, 16, 1, 64, 3, 0, 5, 1), (32, 32), num_sms=1), RANGES,
    ),
    "hopper": (dense("bf16", (8, 2), (16, 300), (128, 128), batch=2, num_sms=4, mask=CAUSAL, **HOPPER), GROUP),
    "hopper-split": (
        dense("bf16", (8, 2), (9, 900), (128, 128), num_sms=8, mask=CAUSAL, sink=True, **HOPPER), BOTH,
    ),
    "hopper-split-window": (
        dense("fp16", (8, 2), (10, 2000), (72, 24), batch=2, num_sms=13, mask=Mask(left=700, right=3), alibi_axes="bh",
            **HOPPER), BOTH,
    ),
    "hopper-works": (
        dense("fp16", (4, 1), (9, 330), (64, 64), batch=5, num_sms=2, softcap=2.0, mask=TOP_LEFT, **HOPPER), GROUP,
    ),
    "hopper-group-of-64": (dense("bf16", (64, 1), (1, 1100), (64, 64), num_sms=3, **HOPPER), BOTH),
    "hopper-d256": (dense("bf16", (8, 2), (9, 200), (256, 256), num_sms=2, **HOPPER), GROUP),
    "hopper-no-keys": (dense("bf16", (8, 2), (9, 0), (64, 64), num_sms=2, sink=True, **HOPPER), GROUP),
    "hopper-ranges": (
        packed(
            "bf16", (4, 1), (1, 0, 3, 12, 2), (500, 40, 0, 300, 1), (64, 64), tail=3, mask=CAUSAL, num_sms=3,
            seqused_q=(1, 0, 2, 12, 0), seqused_kv=(450, 0, 0, 300, 1), **HOPPER,
        ), RANGES,
    ),
    "hopper-ranges-in-step": (
        paged("bf16", 16, (32, 4), (1, 8, 0, 3), (500, 340, 20, 7), (64, 64), num_sms=12, mask=CAUSAL, **HOPPER),
        RANGES,
    ),
    "hopper-ranges-in-step-few-keys": (
        packed("fp16", (16, 4), (9,) * 3, (30, 0, 65), (16, 16), num_sms=16, sink=True, **HOPPER), RANGES,
    ),
    "hopper-ranges-of-one-sm": (
        packed("fp16", (8, 2), (9,) * 9, (300, 10, 0, 65, 64, 63, 1, 200, 128), (16, 16), num_sms=1, **HOPPER), RANGES,
    ),
    "hopper-ranges-paged16": (
        paged(
            "bf16", 16, (8, 2), (1, 9, 1), (500, 340, 7), (128, 128), tail=2, num_sms=3, shared=True, mask=CAUSAL,
            **HOPPER,
        ), RANGES,
    ),
    "hopper-ranges-paged8-window": (
        paged(
            "bf16", 8, (4, 1), (1, 9, 1), (500, 340, 7), (64, 64), tail=2, mask=Mask(left=100, right=0), num_sms=2,
            shared=True, **HOPPER,
        ), RANGES,
    ),
    "hopper-ranges-paged48": (
        paged(
            "fp16", 48, (4, 1), (1, 9, 0), (500, 340, 7), (72, 24), mask=CAUSAL, sink=True, alibi_axes="bh", num_sms=5,
            **HOPPER,
        ), RANGES,
    ),
    "hopper-ranges-paged256": (
        paged("bf16", 256, (4, 1), (1, 16, 1), (700, 340, 7), (64, 64), softcap=2.0, num_sms=3, **HOPPER), RANGES,
    ),
    "hopper-halves": (
        dense("bf16", (8, 2), (9, 600), (64, 128), num_sms=4, mask=CAUSAL, sink=True, **HOPPER),
        ("HeadGroup", "Halves<NoSplit>"),
    ),
    "hopper-halves-of-parts": (
        dense("fp16", (4, 2), (17, 1100), (128, 72), num_sms=8, mask=CAUSAL, sink=True, alibi_axes="h", **HOPPER),
        ("HeadGroup", "Halves<KeySplits>"),
    ),
    "hopper-halves-hidden": (
        dense("fp16", (4, 2), (17, 600), (64, 64), num_sms=4, mask=TOP_LEFT, **HOPPER),
        ("HeadGroup", "Halves<NoSplit>"),
    ),
    "one-paged": (
        paged("fp16", 3, (8, 2), (2,), (900,), (64, 64), tail=2, seqused_kv=(777,), mask=CAUSAL, sink=True), BOTH,
    ),
    "one-packed-40-parts": (packed("bf16", (4, 1), (1,), (2560,), (64, 64), num_splits=40), BOTH),
    "decode-window": (dense("fp16", (4, 1), (3, 2000), (64, 64), num_splits=30, mask=Mask(left=70, right=0)), BOTH),
    "decode-mask": (dense("fp16", (4, 2), (9, 330), (64, 64), batch=2, num_splits=5, mask_axes="bhqk"), BOTH),
    "decode-alibi": (dense("fp16", (8, 2), (9, 330), (64, 64), batch=2, num_splits=4, alibi_axes="bh"), BOTH),
    "decode-bias": (dense("fp16", (4, 1), (17, 330), (64, 64), num_splits=4, bias_axes="hqk", bias=FP32), BOTH),
    "decode-softcap": (dense("fp16", (4, 1), (9, 330), (64, 64), num_splits=3, softcap=1.5, softmax_scale=-0.4), BOTH),
    "decode-sink": (dense("bf16", (8, 2), (3, 330), (64, 64), batch=2, num_splits=5, sink=True, mask=CAUSAL), BOTH),
    "decode-dropout": (dense("fp16", (8, 2), (9, 330), (64, 64), batch=2, num_splits=4, dropout="byte"), BOTH),
    "decode-word": (dense("bf16", (4, 2), (9, 331), (64, 64), num_splits=4, dropout="word", mask=CAUSAL), BOTH),
    "decode-everything": (
        dense(
            "fp16", (8, 2), (17, 330), (64, 64), batch=2, num_splits=5, mask=WINDOW, mask_axes="bhqk",
            alibi_axes="bh", bias_axes="bhqk", softcap=3.0, sink=True, dropout="byte",
        ),
        BOTH,
    ),
    "varlen": (
        packed("fp16", (8, 2), (1, 0, 3, 17, 1), (500, 40, 0, 300, 1), (64, 64), tail=4, num_splits=5), BOTH,
    ),
    "varlen-seqused-causal": (
        packed(
            "bf16", (4, 1), (1, 3, 17, 2), (500, 330, 70, 9), (64, 64), tail=3, num_splits=0, mask=CAUSAL,
            seqused_q=(1, 2, 17, 0), seqused_kv=(450, 0, 64, 9),
        ),
        BOTH,
    ),
    "varlen-one-head": (packed("fp16", (2, 2), (70, 1, 130), (330, 500, 20), (64, 64), tail=2, num_splits=3), SPLIT),
    "varlen-everything": (
        packed(
            "bf16", (4, 1), (9, 0, 17, 3), (330, 30, 20, 150), (64, 64), tail=5, num_splits=4, seqused_q=(8, 0, 17, 1),
            seqused_kv=(300, 9, 20, 99), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
            softcap=3.0, sink=True, dropout="byte",
        ),
        BOTH,
    ),
    "simt-split": (dense("fp32", (2, 2), (100, 330), (64, 64), family="simt", num_splits=3), SPLIT),
    "simt-group": (dense("fp64", (8, 1), (3, 130), (40, 24), family="simt", batch=2), GROUP),
    "simt-decode": (dense("fp32", (8, 1), (1, 700), (64, 64), family="simt", batch=2), BOTH),
    "simt-decode-fp64": (
        dense("fp64", (4, 1), (9, 330), (32, 40), family="simt", num_splits=5, mask=CAUSAL, sink=True), BOTH,
    ),
    "simt-decode-fp16-d300": (
        dense("fp16", (3, 1), (3, 200), (300, 520), family="simt", num_splits=2, mask=CAUSAL, copy_bytes=8), BOTH,
    ),
    "simt-varlen-everything": (
        packed(
            "fp32", (4, 1), (9, 0, 17, 3), (330, 30, 20, 150), (32, 32), family="simt", tail=5, num_splits=4,
            seqused_q=(8, 0, 17, 1), seqused_kv=(300, 9, 20, 99), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh",
            bias_axes="bhqk", softcap=3.0, sink=True, dropout="word",
        ),
        BOTH,
    ),
}  # fmt: skip
# What a case leaves open is left to the plan.
CASES = {
    name: (replace(case, problem=replace(case.problem, num_splits=0)) if case.problem.num_splits == 1 else case, kind)
    for name, (case, kind) in CASES.items()
}


def holds(case: HostCase, kind: tuple[str, str]) -> set[tuple]:
    """Features and the kind of parts, each with its family."""
    return {(case.family, what) for what in (kind, case.problem.dtype, *needs(case.problem))}


@pytest.mark.parametrize("of_a_kind", sampled({name: (of, holds(*of)) for name, of in CASES.items()}, every=12))
def test_forward_in_parts(of_a_kind: tuple[HostCase, tuple[str, str]]) -> None:
    """Scratch memory starts as NaN, so a part that nobody wrote cannot be read unseen."""
    case, kind = of_a_kind
    assert variant(plan_of(case)) == kind
    check_forward(case)


MANY_ROWS: dict[str, HostCase] = {
    "causal": dense("bf16", (2, 2), (130, 500), (128, 128), mask=CAUSAL, **HOPPER),
    "full": dense("fp16", (2, 2), (70, 450), (128, 128), sink=True, **HOPPER),
    "window": dense("bf16", (1, 1), (200, 700), (96, 80), batch=2, mask=Mask(left=150, right=3), softcap=3.0, **HOPPER),
    "top-left": dense("fp16", (1, 1), (100, 300), (128, 128), mask=TOP_LEFT, **HOPPER),
    "d64": dense("bf16", (1, 1), (300, 700), (64, 64), mask=CAUSAL, **HOPPER),
    "d256": dense("fp16", (1, 1), (100, 300), (256, 256), mask=CAUSAL, **HOPPER),
    "bias": dense("bf16", (2, 2), (100, 330), (128, 128), bias_axes="bhqk", bias_boxes=True, **HOPPER),
    "dropout": dense("bf16", (2, 2), (100, 330), (128, 128), dropout="byte", alibi_axes="h", **HOPPER),
    "packed": packed(
        "bf16", (2, 1), (100, 0, 3, 65), (500, 40, 0, 300), (128, 128), tail=3, mask=CAUSAL,
        seqused_kv=(450, 0, 0, 300), **HOPPER,
    ),
    "paged": paged("fp16", 16, (2, 1), (100, 66), (500, 340), (64, 64), tail=2, mask=CAUSAL, **HOPPER),
    "paged-full": paged("bf16", 64, (2, 1), (80, 66), (500, 34), (128, 128), **HOPPER),
    "group": dense("bf16", (8, 2), (20, 500), (128, 128), batch=2, mask=CAUSAL, sink=True, **HOPPER),
    "group-full": dense("fp16", (4, 1), (40, 450), (64, 64), softcap=2.0, **HOPPER),
    "group-window": dense("bf16", (8, 1), (33, 600), (96, 80), mask=Mask(left=150, right=3), alibi_axes="bh", **HOPPER),
    "group-d256": dense("fp16", (2, 1), (40, 300), (256, 256), mask=CAUSAL, **HOPPER),
    "group-packed": packed(
        "fp16", (4, 1), (30, 0, 3, 17), (500, 40, 0, 300), (64, 64), tail=3, mask=CAUSAL, **HOPPER,
    ),
    "group-paged": paged("bf16", 16, (4, 1), (20, 33), (500, 340), (128, 128), tail=2, mask=CAUSAL, **HOPPER),
}  # fmt: skip


def many_rows(name: str) -> tuple[str, str]:
    return BOTH if name.startswith("group") else SPLIT


@pytest.mark.parametrize(
    "of_a_kind",
    sampled({name: ((of, many_rows(name)), holds(of, many_rows(name))) for name, of in MANY_ROWS.items()}, every=12),
)
def test_many_rows_in_parts(of_a_kind: tuple[HostCase, tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several consumers, each of which walks what its rows see of a part of the keys; here parts are short."""
    case, kind = of_a_kind
    monkeypatch.setattr(sm90, "_LEAST_PART", 64)
    monkeypatch.setattr(sm90, "_LONG_KEYS", 1)
    plan = plan_of(case)
    assert variant(plan) == kind and 1 < plan.num_splits <= 16
    check_forward(case)


def test_long_keys_are_split_where_multiprocessors_would_be_idle() -> None:
    def splits(len_q: int, len_kv: int, batch: int = 1, num_splits: int = 0) -> tuple[str, int, int]:
        case = dense("bf16", (32, 8), (len_q, len_kv), (128, 128), batch=batch, mask=CAUSAL, num_splits=num_splits)
        plan = choose(case.problem, H100)
        return plan.family, plan.num_splits, sum(step.num_blocks for step in plan.steps if step.kernel == "fwd_sm90")

    assert splits(128, 32768) == ("sm90", 4, 128)
    assert splits(256, 32768) == ("sm90", 2, 128)
    assert splits(128, 2048) == ("sm90", 2, 64)
    assert splits(128, 1024) == ("sm90", 1, 32)
    assert splits(128, 32768, batch=4) == ("sm90", 1, 128)
    assert splits(128, 32768, num_splits=1) == ("sm90", 1, 32)
    assert splits(64, 32768) == ("sm90", 8, 128)
    assert splits(17, 32768) == ("sm90", 16, 128)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize(("family", "dtype"), [("sm80", "fp16"), ("simt", "fp32")])
def test_any_lengths_groups_and_splits(family: str, dtype: str, data: st.DataObject) -> None:
    """Few variants, many sizes: a window that may hide everything, nothing, or be causal."""
    draw = data.draw
    heads_kv, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4, 7, 8]))
    lens_q = st.sampled_from([1, 2, 3, 9, 17, 40, 70])
    lens_kv = st.one_of(st.integers(0, 70), st.integers(0, 700))
    left, right = (draw(st.sampled_from([0, 3, 60, 1000])) for _ in range(2))
    more = {
        "family": family, "num_splits": draw(st.sampled_from([0, 1, 2, 3, 5, 128])),
        "mask": Mask(left, right, draw(st.sampled_from(["bottom-right", "top-left"]))),
    }  # fmt: skip
    heads = heads_kv * group, heads_kv
    if draw(st.booleans()):
        lens = draw(st.lists(st.tuples(st.one_of(st.just(0), lens_q), lens_kv), min_size=1, max_size=4))
        case = packed(dtype, heads, *zip(*lens, strict=True), (16, 16), tail=draw(st.integers(0, 3)), **more)
    else:
        lens = draw(lens_q), draw(lens_kv)
        case = dense(dtype, heads, lens, (16, 16), batch=draw(st.integers(1, 2)), **more)
    check_forward(case)


def forward(problem: Problem, arrays: dict[str, np.ndarray], family: str, seed: int = 0) -> tuple[bytes, bytes]:
    """The bits of out and lse."""
    rows = arrays["q"].shape[:-1]
    out = np.full((*rows, problem.dim_v), np.nan, problem.dtype.numpy)
    lse = np.full((problem.batch, problem.heads_q, problem.len_q), np.nan, problem.dtype.accumulator)
    run_plan_on_host(choose(problem, H100, family), arrays | {"out": out, "lse": lse}, seed)
    assert np.isfinite(out.astype(np.float64)).all() and np.isfinite(lse).all()
    return out.tobytes(), lse.tobytes()


def random_arrays(problem: Problem) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {
        "q": (problem.len_q, problem.heads_q, problem.dim_qk),
        "k": (problem.len_kv, problem.heads_kv, problem.dim_qk),
        "v": (problem.len_kv, problem.heads_kv, problem.dim_v),
    }
    return {n: rng.standard_normal((problem.batch, *s)).astype(problem.dtype.numpy) for n, s in shapes.items()}


@pytest.mark.parametrize("family", ["sm80", "simt"])
@pytest.mark.parametrize("num_splits", [0, 5])
def test_results_do_not_depend_on_the_order_of_warps(family: str, num_splits: int) -> None:
    problem = Problem("forward", DTYPES["fp16"], 2, 8, 2, 3, 700, 64, 64, softmax_scale=0.125, num_splits=num_splits)
    arrays = random_arrays(problem)
    assert len({forward(problem, arrays, family, seed) for seed in range(4)}) == 1


@pytest.mark.parametrize("family", ["sm80", "simt"])
def test_one_split_gives_a_row_the_same_bits_in_any_batch(family: str) -> None:
    together = Problem("forward", DTYPES["fp16"], 3, 8, 2, 1, 700, 64, 64, softmax_scale=0.125, num_splits=1)
    arrays = random_arrays(together)
    out, lse = forward(together, arrays, family)
    alone = replace(together, batch=1)
    parts = [forward(alone, {name: x[b : b + 1] for name, x in arrays.items()}, family) for b in range(3)]
    assert (out, lse) == tuple(b"".join(part) for part in zip(*parts, strict=True))


def test_scratch_memory_is_as_large_as_the_parts() -> None:
    """The last split of the last row of the last head is written inside, by the guards of `run_plan_on_host`."""
    case = packed("fp16", (4, 1), (1, 2, 9), (200, 300, 330), (64, 24), tail=1, num_splits=5)
    sizes = {w.name: w.shape for w in plan_of(case).workspaces}
    rows = 12 + 1 + 3  # of the sequences, behind them, and one for each sequence's start
    assert sizes == {"partial_out": (5, rows, 4, 24), "partial_state": (5, rows, 4, 2)}
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    tensors.place("out"), tensors.place("lse")
    run_plan_on_host(plan_of(case), tensors.arrays)
    assert np.isfinite(tensors.arrays["lse"][:, :12]).all() and np.isneginf(tensors.arrays["lse"][:, 12:]).all()
