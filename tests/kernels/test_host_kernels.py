"""The real kernels, run thread by thread on the CPU (``tests/host``), against the float64 oracle.

Inputs are nasty by default: every tensor is a view into a larger one filled with NaN, in its own memory order, at the
worst alignment its case allows; outputs start as NaN and nothing outside them may change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
from host.build import why_not
from host.run import run_plan_on_host
from test_plan import PROBLEMS, plans

from cuflash import dtypes
from cuflash.device import NAMED, named
from cuflash.dropout import Dropout
from cuflash.masks import Mask
from cuflash.plan import Plan, choose
from cuflash.problem import Problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

CAUSAL = Mask(right=0)


@dataclass(frozen=True, slots=True)
class Case:
    """One problem with the data that a Problem leaves open."""

    problem: Problem
    family: str = "sm80"
    device: str = "h100"
    num_sms: int = 0
    """Multiprocessors, where it matters that there are few."""
    lens_q: tuple[int, ...] = ()
    """Sequence lengths of a packed problem."""
    lens_kv: tuple[int, ...] = ()
    seqused_q: tuple[int, ...] | None = None
    seqused_kv: tuple[int, ...] | None = None
    mask_axes: str = ""
    """The axes, of ``bhqk``, along which a boolean mask does not broadcast."""
    bias_axes: str = ""
    """The same of an additive bias; its keys lie apart unless ``Problem.bias_boxes``."""
    alibi_axes: str = ""
    """The axes of the slopes, ``h`` or ``bh``."""
    dropout_p: float = 0.0
    unbiased: bool = False
    key_ramp: float = 1.0
    """How many times as large the first key is as the last: largest scores grow as tiles are visited."""
    shared: bool = False
    """The last sequence begins with the pages of the first."""
    empty_lse: float = -np.inf
    """How the backward is told of an empty row."""


def dense(
    dtype: str, heads: tuple[int, int], lens: tuple[int, int], dims: tuple[int, int], batch: int = 1, **more
) -> Case:
    """A dense case; what is not a field of Problem is one of Case."""
    case = {name: more.pop(name) for name in Case.__dataclass_fields__ if name in more}
    more.setdefault("softmax_scale", dims[0] ** -0.5)
    more.setdefault("num_splits", 1)
    more["alibi"] = "alibi_axes" in case
    if "mask_axes" in case:
        more["mask"] = replace(more.get("mask", Mask()), tensor=True)
    if "bias_axes" in case:
        more.setdefault("bias", dtypes.DTYPES[dtype])
        more.setdefault("bias_boxes", False)
        sizes = zip("bhqk", (batch, heads[0], *lens), strict=True)
        more["bias_broadcast"] = tuple(axis not in case["bias_axes"] or n == 1 for axis, n in sizes)
    if "dropout" in more:
        case.setdefault("dropout_p", 0.3)
    return Case(Problem("forward", dtypes.DTYPES[dtype], batch, *heads, *lens, *dims, **more), **case)


def packed(
    dtype: str, heads: tuple[int, int], lens_q: tuple, lens_kv: tuple, dims: tuple[int, int], tail: int = 0, **more
) -> Case:
    """A packed case with ``tail`` rows after the last sequence."""
    totals = {"total_q": sum(lens_q) + tail, "total_kv": sum(lens_kv) + tail}
    lens = max(lens_q), max(lens_kv)
    more |= {"layout": "varlen", "batch": len(lens_q), "lens_q": lens_q, "lens_kv": lens_kv}
    return dense(dtype, heads, lens, dims, **totals, **more)


def paged(dtype: str, page_size: int, heads: tuple[int, int], lens_q: tuple, lens_kv: tuple, *dims, **more) -> Case:
    """A packed case whose keys and values lie in pages."""
    return packed(dtype, heads, lens_q, lens_kv, *dims, page_size=page_size, **more)


CASES: dict[str, Case] = {
    "fp16-d64": dense("fp16", (2, 2), (100, 150), (64, 64), batch=2),
    "bf16-d128-causal": dense("bf16", (2, 2), (140, 200), (128, 128), mask=CAUSAL),
    "d16-one-row": dense("fp16", (1, 1), (1, 70), (16, 16)),
    "d40-gqa-causal": dense("fp16", (4, 2), (130, 130), (40, 40), mask=CAUSAL),
    "d72-dv24-window": dense("fp16", (2, 1), (150, 170), (72, 24), mask=Mask(left=40, right=5)),
    "d80-dv136-mqa": dense("bf16", (3, 1), (70, 90), (80, 136), copy_bytes=8),
    "d256": dense("fp16", (1, 1), (70, 140), (256, 256)),
    "d200-dv256-softcap": dense("bf16", (1, 1), (65, 66), (200, 256), softcap=2.0),
    "d256-99KB": dense("bf16", (1, 1), (50, 90), (256, 256), device="a10", deterministic=True),
    "d16-dv256-99KB": dense("bf16", (1, 1), (70, 90), (16, 256), device="a10"),
    "d128-99KB": dense("fp16", (2, 1), (70, 150), (128, 128), device="a10", mask=CAUSAL),
    "copy-4": dense("fp16", (1, 1), (33, 80), (34, 18), copy_bytes=4, mask=CAUSAL),
    "copy-2": dense("bf16", (1, 1), (70, 40), (33, 7), copy_bytes=2),
    "more-queries-causal": dense("fp16", (2, 1), (200, 60), (64, 64), mask=CAUSAL),
    "more-queries-causal-inf": dense("fp16", (2, 1), (200, 60), (64, 64), mask=CAUSAL, empty_lse=np.inf),
    "top-left": dense("fp16", (2, 1), (90, 150), (64, 64), mask=Mask(right=0, alignment="top-left")),
    "window-top-left": dense("fp16", (1, 1), (150, 60), (64, 64), mask=Mask(left=20, right=9, alignment="top-left")),
    "window-left": dense("bf16", (1, 1), (150, 150), (64, 64), mask=Mask(left=33)),
    "window-one-key": dense("fp16", (1, 1), (150, 150), (64, 64), mask=Mask(left=0, right=0)),
    "negative-scale": dense("fp16", (1, 1), (70, 70), (64, 64), softmax_scale=-0.3, mask=CAUSAL),
    "zero-scale": dense("fp16", (1, 1), (70, 70), (64, 64), softmax_scale=0.0),
    "softcap-causal": dense("fp16", (2, 1), (70, 150), (64, 64), softcap=1.5, softmax_scale=0.7, mask=CAUSAL),
    "softcap-negative": dense("fp16", (1, 1), (70, 70), (64, 64), softcap=1.5, softmax_scale=-0.7),
    "mask": dense("fp16", (2, 1), (140, 150), (64, 64), batch=2, mask_axes="bhqk"),
    "mask-keys": dense("bf16", (2, 2), (70, 150), (64, 64), batch=2, mask_axes="bk"),
    "mask-queries": dense("fp16", (2, 1), (140, 70), (64, 64), mask_axes="hq"),
    "deterministic": dense("fp16", (4, 2), (150, 300), (64, 64), mask=CAUSAL, deterministic=True),
    "deterministic-window": dense(
        "bf16", (2, 1), (260, 300), (64, 64), mask=Mask(left=70, right=3), deterministic=True
    ),
    "no-keys": dense("fp16", (2, 1), (40, 0), (64, 64)),
    "no-queries": dense("fp16", (2, 1), (0, 40), (64, 64)),
    "varlen": packed("fp16", (2, 1), (70, 0, 1, 130), (30, 20, 0, 150), (64, 64), tail=5),
    "varlen-causal": packed("bf16", (2, 2), (1, 150, 64, 0), (130, 60, 64, 0), (64, 64), tail=70, mask=CAUSAL),
    "varlen-window-d40": packed("fp16", (2, 1), (33, 90), (90, 200), (40, 24), tail=1, mask=Mask(left=9, right=20)),
    "varlen-seqused": packed(
        "fp16", (2, 1), (40, 70, 3), (150, 90, 30), (64, 64), seqused_kv=(20, 0, 99), mask=CAUSAL, deterministic=True
    ),
    "varlen-d256": packed("bf16", (1, 1), (20, 70), (70, 20), (256, 192), tail=3),
    "simt-fp32": dense("fp32", (4, 2), (70, 90), (64, 64), batch=2, family="simt"),
    "simt-fp64-causal": dense("fp64", (2, 1), (50, 70), (40, 24), family="simt", mask=CAUSAL),
    "simt-fp16-gqa-window": dense(
        "fp16", (4, 2), (70, 90), (72, 36), family="simt", mask=Mask(left=20, right=3), copy_bytes=8
    ),
    "simt-bf16-copy-2": dense("bf16", (1, 1), (40, 50), (33, 7), family="simt", copy_bytes=2),
    "simt-fp32-copy-4": dense("fp32", (1, 1), (40, 50), (35, 9), family="simt", copy_bytes=4),
    "simt-bf16-d200": dense("bf16", (1, 1), (70, 30), (200, 200), family="simt"),
    "simt-fp32-d512": dense("fp32", (1, 1), (20, 30), (512, 512), family="simt"),
    "simt-fp64-d300": dense("fp64", (1, 1), (20, 70), (300, 300), family="simt"),
    "simt-fp64-d300-dv520": dense("fp64", (1, 1), (20, 40), (300, 520), family="simt"),
    "simt-d1024": dense("fp32", (1, 1), (9, 10), (1024, 16), family="simt", device="t4"),
    "simt-softcap": dense("fp32", (1, 1), (70, 70), (64, 64), family="simt", softcap=1.5, softmax_scale=-0.7),
    "simt-fp64-negative-scale": dense("fp64", (1, 1), (40, 70), (32, 32), family="simt", softmax_scale=-0.3),
    "simt-top-left": dense("fp32", (1, 1), (90, 40), (32, 32), family="simt", mask=Mask(right=0, alignment="top-left")),
    "simt-more-queries": dense("fp64", (2, 2), (90, 40), (32, 32), family="simt", mask=CAUSAL, empty_lse=np.inf),
    "simt-mask": dense("fp32", (2, 1), (70, 90), (32, 32), family="simt", batch=2, mask_axes="bhqk"),
    "simt-no-keys": dense("fp32", (2, 1), (10, 0), (32, 32), family="simt"),
    "simt-varlen": packed(
        "fp64", (2, 1), (50, 0, 1, 70), (30, 20, 0, 90), (40, 24), family="simt", tail=5, seqused_kv=(9, 20, 0, 99)
    ),
    "simt-varlen-causal": packed(
        "fp16", (2, 2), (1, 70, 33), (90, 60, 33), (64, 64), family="simt", tail=3, mask=CAUSAL
    ),
}


TOP_LEFT = Mask(right=0, alignment="top-left")
WINDOW = Mask(left=40, right=5)
FP32 = dtypes.FP32

# Lengths of one tile and a bit: enough for every loop over tiles to turn twice.
CASES |= {
    "alibi": dense("fp16", (4, 2), (90, 140), (64, 64), batch=2, alibi_axes="bh", mask=CAUSAL),
    "alibi-rising": dense("bf16", (2, 2), (150, 70), (32, 32), alibi_axes="h"),
    "alibi-top-left": dense("fp16", (2, 1), (90, 140), (64, 64), alibi_axes="h", mask=TOP_LEFT),
    "alibi-softcap": dense("fp16", (2, 1), (70, 90), (64, 64), alibi_axes="h", softcap=1.5, softmax_scale=-0.4),
    "bias": dense("fp16", (2, 1), (70, 140), (64, 64), batch=2, bias_axes="bhqk"),
    "bias-queries": dense("bf16", (2, 2), (140, 70), (64, 64), batch=2, bias_axes="bhq", mask=CAUSAL),
    "bias-keys": dense("bf16", (2, 1), (140, 150), (64, 64), batch=2, bias_axes="bhk", bias=FP32),
    "bias-one-head": dense("fp16", (2, 1), (70, 90), (64, 64), batch=2, bias_axes="bqk", mask=WINDOW),
    "bias-one-batch": dense("bf16", (4, 2), (70, 90), (128, 128), batch=2, bias_axes="hqk", bias=FP32, softcap=2.0),
    "bias-all-pairs": dense("fp16", (2, 2), (70, 90), (64, 64), batch=2, bias_axes="qk", softmax_scale=-0.1),
    "bias-heads": dense("fp16", (2, 1), (70, 90), (64, 64), batch=2, bias_axes="h", mask=CAUSAL),
    "bias-all-keys": dense("bf16", (2, 1), (70, 90), (24, 40), batch=2, bias_axes="k", bias=FP32),
    "bias-d256": dense("bf16", (1, 1), (40, 70), (256, 200), bias_axes="hqk", bias=FP32),
    "bias-copy-2": dense("fp16", (1, 1), (40, 70), (33, 7), bias_axes="bqk", copy_bytes=2),
    "bias-number": dense("fp16", (2, 1), (70, 40), (16, 16), batch=2, bias_axes="", bias=FP32),
    "sink": dense("fp16", (4, 2), (90, 140), (64, 64), batch=2, sink=True, mask=CAUSAL),
    "sink-softcap": dense("bf16", (2, 1), (150, 70), (64, 64), sink=True, softcap=1.5, mask=CAUSAL),
    "sink-no-keys": dense("fp16", (2, 1), (40, 0), (64, 64), sink=True),
    "mask-causal": dense("fp16", (2, 1), (140, 150), (64, 64), mask=CAUSAL, mask_axes="bhqk"),
    "mask-window": dense("bf16", (2, 1), (140, 150), (64, 64), batch=2, mask=WINDOW, mask_axes="bqk"),
    "dropout": dense("fp16", (4, 2), (90, 150), (64, 64), batch=2, dropout="byte"),
    "dropout-causal-d128": dense("bf16", (2, 1), (90, 150), (128, 128), dropout="byte", mask=CAUSAL, unbiased=True),
    "dropout-d256": dense("bf16", (1, 1), (70, 90), (256, 256), dropout="byte", dropout_p=0.9, unbiased=True),
    "dropout-d256-99KB": dense("fp16", (1, 1), (50, 90), (256, 256), device="a10", dropout="byte", mask=CAUSAL),
    "dropout-word": dense("fp16", (4, 2), (90, 150), (64, 64), batch=2, dropout="word"),
    "dropout-word-window": dense("bf16", (2, 1), (90, 151), (40, 72), dropout="word", mask=WINDOW, copy_bytes=8),
    "dropout-no-keys": dense("fp16", (2, 1), (40, 0), (64, 64), dropout="byte"),
    "varlen-everything": packed(
        "bf16", (4, 2), (40, 0, 70, 3), (90, 30, 20, 150), (64, 64), tail=5, seqused_q=(33, 0, 70, 1),
        seqused_kv=(70, 9, 20, 99), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
        softcap=3.0, sink=True, dropout="byte", deterministic=True,
    ),
    "varlen-word": packed(
        "fp16", (2, 1), (40, 70), (90, 30), (64, 64), tail=5, seqused_q=(33, 64), dropout="word", bias_axes="hk"
    ),
    "varlen-alibi": packed("fp16", (2, 2), (40, 1, 70), (20, 90, 0), (64, 64), tail=1, alibi_axes="h", sink=True),
    "varlen-seqused-q": packed("fp16", (2, 1), (130, 64), (90, 150), (64, 64), tail=3, seqused_q=(64, 70)),
    "everything": dense(
        "fp16", (4, 2), (90, 140), (64, 64), batch=2, mask=WINDOW, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk",
        softcap=3.0, sink=True, dropout="byte",
    ),
    "everything-d128": dense(
        "bf16", (2, 1), (70, 90), (128, 128), mask=CAUSAL, mask_axes="hqk", alibi_axes="h", bias_axes="hqk",
        bias=FP32, softmax_scale=-0.2, sink=True, dropout="word", deterministic=True,
    ),
    "simt-alibi": dense("fp32", (2, 1), (70, 90), (32, 32), family="simt", batch=2, alibi_axes="bh", mask=CAUSAL),
    "simt-bias": dense("fp32", (2, 1), (70, 90), (32, 32), family="simt", batch=2, bias_axes="bhqk"),
    "simt-bias-keys": dense("bf16", (2, 1), (70, 90), (32, 48), family="simt", batch=2, bias_axes="bk", bias=FP32),
    "simt-bias-fp64": dense("fp64", (2, 1), (70, 40), (40, 24), family="simt", bias_axes="hq", bias=FP32),
    "simt-bias-d300": dense("fp32", (1, 1), (20, 30), (300, 300), family="simt", bias_axes="qk"),
    "simt-sink": dense("fp64", (4, 2), (70, 40), (32, 32), family="simt", batch=2, sink=True, mask=CAUSAL),
    "simt-dropout": dense("fp32", (4, 2), (70, 90), (64, 64), family="simt", batch=2, dropout="byte"),
    "simt-dropout-word": dense("fp64", (2, 1), (50, 71), (32, 32), family="simt", dropout="word", mask=WINDOW),
    "simt-everything": packed(
        "fp32", (4, 2), (40, 0, 70), (90, 30, 20), (32, 32), family="simt", tail=5, seqused_q=(33, 0, 70),
        seqused_kv=(70, 9, 20), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", softcap=3.0,
        sink=True, dropout="byte",
    ),
}  # fmt: skip

# Two to four consumers of 64 rows; two to four tiles of 32 to 128 keys.
HOPPER = {
    "sm90-d64": dense("fp16", (2, 2), (270, 300), (64, 64)),
    "sm90-d64-causal": dense("bf16", (2, 1), (400, 600), (64, 64), mask=CAUSAL),
    "sm90-d96-causal": dense("fp16", (1, 1), (400, 230), (96, 80), mask=CAUSAL),
    "sm90-d128": dense("bf16", (2, 1), (200, 300), (128, 128)),
    "sm90-d128-causal": dense("fp16", (1, 1), (300, 290), (128, 128), mask=CAUSAL),
    "sm90-d192-dv128": dense("fp16", (1, 1), (70, 270), (192, 128)),
    "sm90-d192-dv128-causal": dense("bf16", (1, 1), (140, 170), (192, 128), mask=CAUSAL),
    "sm90-d256": dense("fp16", (1, 1), (140, 170), (256, 256)),
    "sm90-d256-causal": dense("bf16", (2, 1), (140, 170), (256, 256), mask=CAUSAL),
    "sm90-d160": dense("fp16", (1, 1), (140, 170), (160, 160)),
    "sm90-d160-softcap": dense("bf16", (1, 1), (90, 170), (160, 160), softcap=1.5, mask=WINDOW),
    "sm90-d160-dv24-softcap": dense("fp16", (1, 1), (90, 200), (160, 24), softcap=1.5),
    "sm90-d72-dv24-causal": dense("bf16", (1, 1), (200, 250), (72, 24), mask=CAUSAL),
    "sm90-d40-dv72": dense("fp16", (2, 1), (70, 140), (40, 72)),
    "sm90-few-blocks": dense("fp16", (2, 1), (300, 290), (64, 64), batch=2, num_sms=5),
    "sm90-few-blocks-causal": dense("bf16", (4, 2), (300, 290), (128, 128), mask=CAUSAL, num_sms=2),
    "sm90-few-blocks-d256": dense("fp16", (2, 1), (300, 90), (256, 256), batch=2, num_sms=3, mask=CAUSAL),
    "sm90-few-blocks-window": dense("fp16", (1, 1), (1200, 400), (64, 64), mask=WINDOW, num_sms=2, sink=True),
    "sm90-few-blocks-few-keys": dense("bf16", (2, 1), (1030, 60), (64, 64), mask=CAUSAL, num_sms=3),
    "sm90-few-blocks-no-keys": dense("fp16", (4, 2), (200, 0), (64, 64), batch=2, num_sms=2),
    "sm90-one-row": dense("fp16", (1, 1), (1, 70), (16, 16)),
    "sm90-top-left": dense("fp16", (2, 1), (190, 150), (64, 64), mask=TOP_LEFT),
    "sm90-more-queries": dense("bf16", (2, 1), (300, 60), (64, 64), mask=CAUSAL),
    "sm90-window": dense("fp16", (2, 1), (260, 500), (64, 64), mask=Mask(left=150, right=5)),
    "sm90-window-one-key": dense("fp16", (1, 1), (150, 150), (64, 64), mask=Mask(left=0, right=0)),
    "sm90-softcap": dense("bf16", (1, 1), (140, 210), (128, 128), softcap=1.5, softmax_scale=-0.7, mask=CAUSAL),
    "sm90-negative-scale": dense("fp16", (1, 1), (70, 140), (64, 64), softmax_scale=-0.3),
    "sm90-mask": dense("fp16", (2, 1), (140, 270), (64, 64), batch=2, mask_axes="bhqk"),
    "sm90-alibi": dense("bf16", (2, 2), (150, 270), (64, 64), alibi_axes="h"),
    "sm90-bias": dense("fp16", (2, 1), (70, 270), (64, 64), batch=2, bias_axes="bhqk"),
    "sm90-bias-boxes": dense("fp16", (2, 1), (70, 270), (64, 64), batch=2, bias_axes="bhqk", bias_boxes=True),
    "sm90-bias-boxes-fp32": dense(
        "bf16", (2, 2), (150, 290), (64, 64), bias_axes="qk", bias=FP32, bias_boxes=True, mask=CAUSAL
    ),
    "sm90-bias-boxes-d128": dense(
        "bf16", (4, 2), (150, 230), (128, 128), bias_axes="hqk", bias_boxes=True, mask=CAUSAL
    ),
    "sm90-bias-boxes-d128-fp32": dense(
        "fp16", (2, 1), (150, 250), (128, 96), bias_axes="bqk", batch=2, bias=FP32, bias_boxes=True, mask=WINDOW
    ),
    "sm90-bias-boxes-d256": dense("bf16", (1, 1), (150, 140), (256, 256), bias_axes="hqk", bias_boxes=True),
    "sm90-bias-boxes-d256-fp32": dense(
        "bf16", (1, 1), (150, 140), (256, 256), bias_axes="hqk", bias=FP32, bias_boxes=True
    ),
    "sm90-bias-row": dense("fp16", (2, 1), (150, 400), (64, 64), batch=3, bias_axes="bk", bias_boxes=True, num_sms=2),
    "sm90-bias-row-fp32": dense(
        "bf16", (2, 1), (150, 330), (128, 72), batch=2, bias_axes="bhk", bias=FP32, bias_boxes=True, softcap=2.0
    ),
    "sm90-bias-few-blocks": dense(
        "bf16", (2, 1), (300, 400), (64, 64), batch=2, bias_axes="hqk", bias_boxes=True, mask=CAUSAL, num_sms=2,
        softmax_scale=-0.1,
    ),
    "sm90-bias-few-keys": dense("fp16", (1, 1), (90, 9), (64, 64), bias_axes="qk", bias_boxes=True),
    "sm90-bias-one-key": dense("fp16", (1, 1), (90, 1), (64, 64), bias_axes="qk", bias_boxes=True),
    "sm90-bias-no-keys": dense("fp16", (1, 1), (90, 0), (64, 64), bias_axes="qk", bias_boxes=True, sink=True),
    "sm90-bias-one-query": dense("fp16", (2, 1), (1, 140), (64, 64), bias_axes="hqk", bias_boxes=True),
    "sm90-bias-all-keys": dense("bf16", (2, 1), (90, 140), (64, 64), bias_axes="hq", bias_boxes=True),
    "sm90-bias-varlen": packed(
        "bf16", (2, 1), (70, 0, 1, 330), (30, 20, 0, 350), (64, 64), tail=5, bias_axes="bhqk", bias_boxes=True
    ),
    "sm90-bias-varlen-row": packed(
        "fp16", (2, 1), (40, 70, 3), (150, 290, 30), (64, 72), seqused_q=(33, 70, 0), seqused_kv=(20, 0, 30),
        bias_axes="bk", bias=FP32, bias_boxes=True, mask=CAUSAL,
    ),
    "sm90-ramp": dense("bf16", (1, 1), (140, 500), (128, 128), key_ramp=16),
    "sm90-ramp-steep": dense("bf16", (2, 1), (140, 500), (64, 64), key_ramp=200, mask=Mask(left=300, right=0)),
    "sm90-ramp-steepest": dense("bf16", (1, 1), (140, 500), (128, 128), key_ramp=5000),
    "sm90-ramp-alibi": dense("bf16", (1, 1), (90, 400), (64, 64), key_ramp=2000, alibi_axes="h"),
    "sm90-ramp-bias": dense("fp16", (1, 1), (90, 400), (64, 64), key_ramp=50, bias_axes="hqk", bias_boxes=True),
    "sm90-ramp-d256": dense("bf16", (1, 1), (70, 300), (256, 256), key_ramp=2000),
    "sm90-ramp-fp16": dense("fp16", (1, 1), (140, 500), (64, 64), key_ramp=50),
    "sm90-ramp-fp16-steepest": dense("fp16", (1, 1), (140, 500), (128, 128), key_ramp=200, softmax_scale=0.5),
    "sm90-sink": dense("fp16", (4, 2), (90, 140), (64, 64), batch=2, sink=True, mask=CAUSAL),
    "sm90-sink-no-keys": dense("fp16", (2, 1), (40, 0), (64, 64), sink=True),
    "sm90-dropout": dense("bf16", (2, 1), (150, 270), (64, 64), batch=2, dropout="byte"),
    "sm90-dropout-word": dense("fp16", (2, 1), (90, 150), (64, 64), batch=2, dropout="word"),
    "sm90-no-keys": dense("fp16", (2, 1), (40, 0), (64, 64)),
    "sm90-varlen": packed("fp16", (2, 1), (70, 0, 1, 330), (30, 20, 0, 350), (64, 64), tail=5),
    "sm90-varlen-causal": packed("bf16", (4, 2), (1, 150, 64, 0), (130, 260, 64, 0), (128, 128), tail=70, mask=CAUSAL),
    "sm90-varlen-few-blocks": packed(
        "bf16", (2, 1), (0, 300, 1, 700, 0), (30, 300, 0, 90, 5), (64, 64), tail=5, mask=CAUSAL, num_sms=2
    ),
    "sm90-varlen-full-few-blocks": packed("fp16", (3, 1), (260, 0, 90), (90, 0, 150), (128, 128), num_sms=3),
    "sm90-varlen-seqused": packed(
        "fp16", (2, 1), (40, 70, 3), (150, 290, 30), (64, 72), seqused_q=(33, 70, 0), seqused_kv=(20, 0, 30)
    ),
    "sm90-varlen-everything": packed(
        "bf16", (4, 2), (40, 0, 170, 3), (90, 30, 20, 250), (64, 64), tail=5, seqused_q=(33, 0, 170, 1),
        seqused_kv=(70, 9, 20, 199), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
        softcap=3.0, sink=True, dropout="byte",
    ),
    "sm90-varlen-everything-boxes": packed(
        "bf16", (4, 2), (40, 0, 170, 3), (90, 30, 20, 250), (64, 64), tail=5, seqused_q=(33, 0, 170, 1),
        seqused_kv=(70, 9, 20, 199), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
        bias_boxes=True, softcap=3.0, sink=True, dropout="byte",
    ),
    "sm90-everything-d128": dense(
        "fp16", (2, 1), (150, 230), (128, 128), mask=WINDOW, mask_axes="hqk", alibi_axes="h", bias_axes="hqk",
        softmax_scale=-0.2, sink=True, dropout="byte",
    ),
    "sm90-everything-boxes-d128": dense(
        "fp16", (2, 1), (150, 230), (128, 128), mask=WINDOW, mask_axes="hqk", alibi_axes="h", bias_axes="hqk",
        bias_boxes=True, softmax_scale=-0.2, sink=True, dropout="byte",
    ),
}  # fmt: skip
# A single split keeps few queries on this family.
CASES |= {
    name: replace(case, family="sm90", problem=replace(case.problem, num_splits=int(case.problem.len_q <= 64)))
    for name, case in HOPPER.items()
}

# The pages of a tile of 64 keys: many, some, one, and part of one.
CASES |= {
    "paged-1": paged("fp16", 1, (4, 2), (70, 0, 1, 130), (30, 20, 0, 150), (64, 64), tail=5, mask=CAUSAL),
    "paged-16": paged("bf16", 16, (2, 2), (1, 150, 64, 0), (130, 60, 64, 0), (64, 64), tail=70),
    "paged-48-window": paged("fp16", 48, (2, 1), (33, 90), (90, 200), (40, 24), tail=1, mask=WINDOW),
    "paged-256": paged("bf16", 256, (4, 2), (70, 3), (300, 520), (64, 64), mask=CAUSAL, shared=True),
    "paged-seqused": paged(
        "fp16", 20, (2, 1), (40, 70, 3), (150, 90, 60), (64, 64), seqused_q=(40, 50, 1), seqused_kv=(41, 0, 60),
        mask=CAUSAL, shared=True,
    ),
    "paged-d128": paged("bf16", 16, (2, 1), (90, 20), (100, 170), (128, 128), mask=CAUSAL),
    "paged-d256": paged("bf16", 64, (1, 1), (20, 70), (70, 140), (256, 192), tail=3),
    "paged-d256-99KB": paged("fp16", 5, (1, 1), (20, 70), (70, 20), (256, 256), device="a10"),
    "paged-copy-4": paged("fp16", 7, (2, 1), (33, 40), (80, 90), (34, 18), copy_bytes=4, mask=CAUSAL),
    "paged-copy-2": paged("bf16", 3, (1, 1), (70, 20), (40, 90), (33, 7), copy_bytes=2, shared=True),
    "paged-everything": paged(
        "bf16", 12, (4, 2), (40, 0, 70, 3), (90, 30, 20, 150), (64, 64), tail=5, seqused_q=(33, 0, 70, 1),
        seqused_kv=(70, 9, 20, 99), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
        softcap=3.0, sink=True, dropout="byte",
    ),
    "paged-word": paged("fp16", 33, (2, 1), (40, 70), (90, 30), (64, 64), seqused_q=(33, 64), dropout="word"),
    "simt-paged-1": paged("fp32", 1, (4, 2), (50, 0, 1), (30, 20, 90), (64, 64), family="simt", tail=5, mask=CAUSAL),
    "simt-paged-16": paged("fp64", 16, (2, 1), (50, 70), (90, 70), (40, 24), family="simt", seqused_kv=(9, 70)),
    "simt-paged-fp16": paged(
        "fp16", 256, (4, 2), (70, 9), (300, 20), (72, 36), family="simt", mask=WINDOW, copy_bytes=8
    ),
    "simt-paged-copy-2": paged("bf16", 3, (1, 1), (20, 40), (50, 9), (33, 7), family="simt", copy_bytes=2, shared=True),
    "simt-paged-d300": paged("fp32", 6, (1, 1), (20, 9), (30, 80), (300, 300), family="simt"),
    "simt-paged-everything": paged(
        "fp32", 48, (4, 2), (40, 0, 70), (90, 30, 20), (32, 32), family="simt", tail=5, seqused_q=(33, 0, 70),
        seqused_kv=(70, 9, 20), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", softcap=3.0,
        sink=True, dropout="byte",
    ),
}  # fmt: skip
DIFFERENTIABLE = {name: case for name, case in CASES.items() if not case.problem.page_size and case.family != "sm90"}

SEED, OFFSET = 0x123456789ABCDEF0, 64
EMPTY_LSE, TAIL_LSE = 1234.5, -777.25
"""What the forward is asked to write of rows that see no key, and of packed rows that take part in nothing."""


def surrounded(shape: tuple[int, ...], dtype: np.dtype, copy_bytes: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """A (…, d) view and the buffer of NaN (bytes 0xFF) around it, aligned to ``copy_bytes`` and no better.

    ``order`` rotates the axes in memory; the last one stays contiguous.
    """
    *outer, dim = shape
    axes = np.roll(np.arange(len(outer)), order)
    pitch = -(-dim * dtype.itemsize // copy_bytes) * copy_bytes
    pitch += copy_bytes * (1 + pitch // copy_bytes % 2)  # an odd multiple
    sizes = [outer[axis] + 1 for axis in axes]
    buffer = np.full(np.prod(sizes, dtype=int) * pitch + 256, 0xFF, np.uint8)
    start = -buffer.ctypes.data % 128 + copy_bytes
    rows = buffer[start : start + np.prod(sizes, dtype=int) * pitch].reshape(*sizes, pitch)
    view = rows[tuple(slice(0, outer[axis]) for axis in axes)][..., : dim * dtype.itemsize].view(dtype)
    return view.transpose(*np.argsort(axes), len(outer)), buffer


class Tensors:
    """The arrays of one case, by their names in ``params.cuh``."""

    def __init__(self, case: Case) -> None:
        p = case.problem
        self.case, self.rng = case, np.random.default_rng(5)
        self.arrays: dict[str, np.ndarray] = {}
        self.buffers: dict[str, np.ndarray] = {}
        varlen = p.layout == "varlen"
        rows_q, rows_kv = ((p.total_q,), (p.total_kv,)) if varlen else ((p.batch, p.len_q), (p.batch, p.len_kv))
        self.shapes = {
            "q": (*rows_q, p.heads_q, p.dim_qk),
            "k": (*rows_kv, p.heads_kv, p.dim_qk),
            "v": (*rows_kv, p.heads_kv, p.dim_v),
            "out": (*rows_q, p.heads_q, p.dim_v),
            "lse": (p.heads_q, p.total_q) if varlen else (p.batch, p.heads_q, p.len_q),
        }
        for name, like in (("dout", "out"), ("dq", "q"), ("dk", "k"), ("dv", "v"), ("dlse", "lse")):
            self.shapes[name] = self.shapes[like]

        self.options = {
            "window": (-1 if p.mask.left is None else p.mask.left, -1 if p.mask.right is None else p.mask.right),
            "alignment": p.mask.alignment,
            "softcap": p.softcap,
            "scale": p.softmax_scale,
        }
        self.live_q, self.live_kv = rows_q[-1], rows_kv[-1]
        self.packed: dict[str, np.ndarray] = {}
        if varlen:
            self.arrays["cu_seqlens_q"] = np.cumsum((0, *case.lens_q), dtype=np.int32)
            self.arrays["cu_seqlens_kv"] = np.cumsum((0, *case.lens_kv), dtype=np.int32)
            self.live_q, self.live_kv = sum(case.lens_q), sum(case.lens_kv)
            self.options["cu_seqlens_q"] = self.arrays["cu_seqlens_q"]
            self.options["cu_seqlens_k"] = self.arrays["cu_seqlens_kv"]
        for side, used, lens in (("q", case.seqused_q, case.lens_q), ("kv", case.seqused_kv, case.lens_kv)):
            if used is not None:
                self.arrays[f"seqused_{side}"] = np.array(used, np.int32)
                self.options[f"seqused_{side[0]}"] = np.minimum(used, lens)
        if p.page_size:
            self.make_table()
            for name in ("k", "v"):
                self.shapes[name] = (*self.in_use.shape, *self.shapes[name][1:])
        if p.alibi:
            shape = (p.batch, p.heads_q) if case.alibi_axes == "bh" else (p.heads_q,)
            # Falling and rising ones; logits far above 1 would cost fp32 its digits through lse.
            slopes = self.rng.standard_normal(shape, np.float32) * (1 if p.dtype.itemsize == 2 else 0.25)
            self.arrays["alibi"] = self.options["alibi_slopes"] = slopes
        if p.sink:
            self.arrays["sink"] = self.options["sink"] = self.rng.standard_normal(p.heads_q, np.float32) + 2
        self.numbers = {}
        if p.dropout:
            dropout = Dropout(case.dropout_p, p.dropout, case.unbiased)
            self.numbers = {"dropout_p": dropout.p, "keep_scale": dropout.keep_scale, "seed": SEED, "offset": OFFSET}
            self.arrays["rng_state"] = np.array([SEED, OFFSET], np.uint64)
            self.options |= {"dropout_p": dropout.p, "dropout_scheme": p.dropout, "dropout_unbiased": case.unbiased}
            self.options["rng_state"] = (SEED, OFFSET)
        if p.bias is not None:
            kept = self.pairs(case.bias_axes)
            if p.bias_boxes:
                bias, _ = surrounded(kept, p.bias.numpy, 16, 1)
                bias[...] = self.rng.standard_normal(kept).astype(p.bias.numpy)
            else:
                bias = self.rng.standard_normal((*kept[:2], kept[3] + 3, kept[2])).astype(p.bias.numpy)
                bias[:, :, kept[3] :] = np.nan
                bias = bias[:, :, : kept[3]].transpose(0, 1, 3, 2)  # keys are not contiguous
            if "q" in case.bias_axes and kept[2] > 3:
                bias[:, :, 3, kept[3] // 3 :] = -np.inf  # hides keys; all of them where it is broadcast along keys
            self.arrays["bias"] = self.options["bias"] = bias
        if p.mask.tensor:
            kept = self.pairs(case.mask_axes)
            mask = self.rng.random((*kept[:2], kept[3], kept[2])).transpose(0, 1, 3, 2) < 0.6  # keys are not contiguous
            if kept[2] > 1:
                mask[:, :, kept[2] // 3] = False  # an empty row
            if kept[3] > 1:
                mask[:, :, : kept[2] // 2, : kept[3] // 2] = False  # whole tiles
            self.arrays["mask"] = self.options["mask"] = mask

    def make_table(self) -> None:
        """Scatter the sequences over pages, some of which none has; numbers behind a sequence's last page are wild."""
        case, size = self.case, self.case.problem.page_size
        lengths = np.minimum(case.lens_kv, self.arrays.get("seqused_kv", case.lens_kv))
        counts = -(-lengths // size)
        free = iter(self.rng.permutation(counts.sum() + 3))
        table = np.full((counts.max() + 2, 2 * len(counts)), 2**31 - 1, np.int32).T[::2]
        self.in_use = np.zeros((counts.sum() + 3, size), bool)
        self.table = self.arrays["table"] = table
        for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            table[b, :count] = [next(free) for _ in range(count)]
            if case.shared and b == len(counts) - 1:
                table[b, : min(count, counts[0])] = table[0, : min(count, counts[0])]
            self.in_use[self.places(b, length)] = True
        self.live_kv = size

    def places(self, b: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Page and row of the first keys of a sequence."""
        page, row = np.divmod(np.arange(length), self.case.problem.page_size)
        return self.table[b, page], row

    def pack(self, pages: np.ndarray) -> np.ndarray:
        """The keys or values of every sequence, packed; NaN where there is none."""
        starts = self.arrays["cu_seqlens_kv"]
        rows = np.full((starts[-1], *pages.shape[2:]), np.nan, pages.dtype)
        lengths = np.minimum(np.diff(starts), self.arrays.get("seqused_kv", starts[-1]))
        for b, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            rows[start : start + length] = pages[self.places(b, length)]
        return rows

    def pairs(self, axes: str) -> tuple[int, ...]:
        """Shape of an array of pairs that does not broadcast along these axes."""
        p = self.case.problem
        sizes = zip("bhqk", (p.batch, p.heads_q, p.len_q, p.len_kv), strict=True)
        return tuple(n if axis in axes else 1 for axis, n in sizes)

    def place_flat(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Put a contiguous result between NaNs."""
        buffer = np.full(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize + 512, 0xFF, np.uint8)
        self.buffers[name] = buffer
        self.arrays[name] = buffer[256:-256].view(dtype).reshape(shape)
        return self.arrays[name]

    def place(self, name: str, values: np.ndarray | None = None) -> np.ndarray:
        """Put a tensor into its surroundings; NaN without values. Only rows of sequences get values."""
        p = self.case.problem
        if name in ("lse", "dlse"):
            *outer, rows = self.shapes[name]
            view, buffer = surrounded((*outer, rows), p.dtype.accumulator, p.dtype.accumulator.itemsize, 0)
            if values is not None:
                view[..., : self.live_q] = values[..., : self.live_q]
        else:
            view, buffer = surrounded(self.shapes[name], p.dtype.numpy, p.copy_bytes, len(self.buffers))
            live = self.live_kv if name in ("k", "v", "dk", "dv") else self.live_q
            if values is not None:
                view[..., :live, :, :] = values[..., :live, :, :]
            side = "kv" if name in ("k", "v") else "q"
            if side == "kv" and p.page_size:
                view[~self.in_use] = np.nan
                self.packed[name] = self.pack(view)
            elif values is not None and f"seqused_{side}" in self.arrays:  # what does not take part may be anything
                starts = self.arrays[f"cu_seqlens_{side}"]
                for start, end, used in zip(starts, starts[1:], self.arrays[f"seqused_{side}"], strict=False):
                    view[min(start + used, end) : end] = np.nan
        self.arrays[name], self.buffers[name] = view, buffer
        return view

    def random(self, name: str) -> np.ndarray:
        """Place normally distributed values."""
        return self.place(name, self.rng.standard_normal(self.shapes[name]).astype(self.case.problem.dtype.numpy))

    def told_of_nothing(self, lse: np.ndarray) -> np.ndarray:
        """A log-sum-exp with EMPTY_LSE and TAIL_LSE instead of -inf."""
        tail = np.zeros(lse.shape[-1], bool)
        if self.case.problem.layout == "varlen":
            starts = self.arrays["cu_seqlens_q"]
            used = np.minimum(self.arrays.get("seqused_q", starts[-1]), np.diff(starts))
            tail[:] = True
            for start, length in zip(starts, used, strict=False):
                tail[start : start + length] = False
        return np.where(np.isneginf(lse), np.where(tail, TAIL_LSE, EMPTY_LSE), lse)

    def assert_surroundings_untouched(self, *outputs: str) -> None:
        for name in outputs:
            view, around = self.arrays[name], self.buffers[name].copy()
            if view.size:
                start = view.ctypes.data - self.buffers[name].ctypes.data
                base = around[start : start + view.itemsize].view(view.dtype)
                inside = np.lib.stride_tricks.as_strided(base, view.shape, view.strides)
                inside[...] = np.full(view.itemsize, 0xFF, np.uint8).view(view.dtype)[0]
            written = np.flatnonzero(around != 0xFF)
            assert written.size == 0, f"{written.size} bytes beside {name} were written, the first at {written[0]}"


def exact_and_naive(tensors: Tensors, *extra: str) -> tuple[oracle.Attention, oracle.Attention]:
    inputs = [tensors.packed.get(name, tensors.arrays[name]) for name in ("q", "k", "v", *extra)]
    return oracle.attention(*inputs, **tensors.options), oracle.naive_in_dtype(*inputs, **tensors.options)


def run(case: Case, tensors: Tensors, direction: str, seed: int) -> None:
    backward = direction == "backward"
    problem = replace(case.problem, direction=direction, bias_grad=backward and case.problem.bias is not None)
    device = named(case.device)
    plan = choose(problem, replace(device, num_sms=case.num_sms or device.num_sms), case.family)
    assert run_plan_on_host(plan, tensors.arrays, seed, tensors.numbers) == 0, "ldmatrix met bank conflicts"


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward(case: Case, seed: int = 0) -> None:
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    if case.key_ramp != 1:
        k = tensors.arrays["k"]
        k *= np.linspace(case.key_ramp, 1, k.shape[-3])[:, None, None].astype(k.dtype)
    out, lse = tensors.place("out"), tensors.place("lse")
    exact, naive = exact_and_naive(tensors)
    if case.problem.dropout:
        tensors.place_flat("rng_state", (2,), np.uint64)
    tensors.numbers |= {"empty_lse": EMPTY_LSE, "tail_lse": TAIL_LSE}
    run(case, tensors, "forward", seed)
    if case.problem.dropout:
        assert tensors.arrays["rng_state"].tolist() == [SEED, OFFSET]
        tensors.assert_surroundings_untouched("rng_state")
    oracle.assert_close(out, exact.out, naive.out, "out")
    oracle.assert_close(lse, tensors.told_of_nothing(exact.lse), tensors.told_of_nothing(naive.lse), "lse")
    tensors.assert_surroundings_untouched("out", "lse")


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_backward(case: Case, seed: int = 0) -> None:
    tensors = Tensors(case)
    for name in ("q", "k", "v", "dout", "dlse"):
        tensors.random(name)
    exact, naive = exact_and_naive(tensors, "dout", "dlse")
    tensors.place("out", exact.out.astype(case.problem.dtype.numpy))
    empty = np.isneginf(exact.lse)
    tensors.place("lse", np.where(empty, case.empty_lse, exact.lse))
    tensors.arrays["dlse"][empty] = np.nan  # the gradient of a constant
    results = {name: tensors.place(name) for name in ("dq", "dk", "dv")}
    if case.problem.bias is not None:
        results["dbias"] = tensors.place_flat("dbias", tensors.arrays["bias"].shape, case.problem.dtype.accumulator)
    if case.problem.sink:
        results["dsink"] = tensors.place_flat("dsink", (case.problem.heads_q,), np.float32)
    run(case, tensors, "backward", seed)
    for name, result in results.items():
        addends = case.problem.dtype.numpy if name == "dsink" else None
        oracle.assert_close(result, getattr(exact, name), getattr(naive, name), name, addends)
    tensors.assert_surroundings_untouched(*results)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["bf16-d128-causal", "deterministic-window", "sm90-few-blocks", "sm90-few-blocks-d256"]
)
def test_any_order_of_warps(name: str, seed: int) -> None:
    test_forward(CASES[name], seed)
    if name in DIFFERENTIABLE:
        test_backward(CASES[name], seed)


@pytest.mark.parametrize("scheme", ["byte", "word"])
@pytest.mark.parametrize(("family", "dim"), [("sm80", 64), ("simt", 64), ("sm80", 256)])
def test_dropout_masks_are_exact(family: str, scheme: str, dim: int) -> None:
    """Every kernel's mask, read from results: uniform probabilities meet identity matrices; it does not know d."""
    len_q, len_kv = min(dim, 150) - 11, min(dim, 150) - 5
    case = dense(
        "fp16", (2, 1), (len_q, len_kv), (dim, dim), batch=2, family=family, dropout=scheme, bias_axes="bhqk"
    )  # fmt: skip
    tensors = Tensors(case)
    tensors.arrays["bias"][...] = 0
    i, j = np.arange(len_q)[:, None], np.arange(len_kv)[None, :]
    state = SEED, OFFSET, *((case.dropout_p,) if scheme == "byte" else ())
    draw = oracle.flash_keep if scheme == "byte" else oracle.word_uniform
    more = () if scheme == "byte" else (len_kv, len_q * len_kv)
    keep = np.array([[draw(*state, b, h, 2, i, j, *more) for h in range(2)] for b in range(2)])
    keep = keep if scheme == "byte" else keep > np.float32(case.dropout_p)

    def diagonal(name: str) -> np.ndarray:
        batch, rows, heads, _ = tensors.shapes[name]
        return np.broadcast_to(np.eye(rows, dim)[None, :, None], (batch, rows, heads, dim))

    for name in ("q", "k"):
        tensors.place(name, np.zeros(tensors.shapes[name]))
    tensors.place("v", diagonal("v"))
    out, _ = tensors.place("out"), tensors.place("lse")
    run(case, tensors, "forward", 0)
    np.testing.assert_array_equal(out[..., :len_kv].transpose(0, 2, 1, 3) != 0, keep)

    # With delta = 0 and dout.v = 1 everywhere, ds is the dropped probability; so is dv of each of the two heads.
    tensors.place("k", diagonal("k"))
    tensors.place("v", np.ones(tensors.shapes["v"]))
    for h in range(2):
        dout = diagonal("dout").copy()
        dout[:, :, 1 - h] = 0
        tensors.place("dout", dout)
        tensors.place("out", np.zeros(tensors.shapes["out"]))
        tensors.place("lse", np.full(tensors.shapes["lse"], np.log(len_kv)))
        dq, _, dv = (tensors.place(name) for name in ("dq", "dk", "dv"))
        dbias = tensors.place_flat("dbias", tensors.arrays["bias"].shape, np.float32)
        run(case, tensors, "backward", 0)
        np.testing.assert_array_equal(dv[:, :, 0, :len_q].transpose(0, 2, 1) != 0, keep[:, h])
        np.testing.assert_array_equal(dq[:, :, h, :len_kv] != 0, keep[:, h])
        np.testing.assert_array_equal(dbias[:, h] != 0, keep[:, h])


def test_a_generator_on_the_device_moves_on() -> None:
    case = replace(CASES["dropout"], problem=replace(CASES["dropout"].problem, len_q=3, len_kv=5))
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    tensors.place("out"), tensors.place("lse")
    generator = tensors.arrays["generator"] = np.array([7, 2**63 + 8], np.uint64)
    tensors.numbers["increment"] = 256
    for draw in range(2):
        run(case, tensors, "forward", 0)
        assert tensors.arrays["rng_state"].tolist() == [7, 2**63 + 8 + 256 * draw]
    assert generator.tolist() == [7, 2**63 + 8 + 512]


MAIN_KERNELS = ("fwd_sm90", "fwd_sm80", "fwd_simt", "bwd_sm80", "bwd_simt")


def test_cases_run_every_tile() -> None:
    """Whatever tile a plan for any named device has, some case here has run it."""

    def tile(plan: Plan) -> tuple:
        config = next(step.config for step in plan.steps if step.kernel.startswith(MAIN_KERNELS))
        names = ("tile_q", "tile_kv", "threads", "stages", "row_buffers", "dim_splits", "ping_pong")
        return plan.family, plan.problem.direction, *(getattr(config, name, None) for name in names)

    run_here = {
        tile(choose(replace(case.problem, direction=direction), named(case.device), case.family))
        for direction, cases in (("forward", CASES), ("backward", DIFFERENTIABLE))
        for case in cases.values()
    }
    planned = {tile(plan) for device in NAMED.values() for problem in PROBLEMS for plan in plans(problem, device)}
    assert planned - run_here == set()
