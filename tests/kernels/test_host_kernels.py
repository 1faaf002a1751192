"""The real kernels, run thread by thread on the CPU (``tests/host``), against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from covering import sampled
from host.build import why_not
from host.cases import (
    CAUSAL,
    OFFSET,
    SEED,
    HostCase,
    Tensors,
    check_backward,
    check_forward,
    dense,
    exact_and_naive,
    packed,
    paged,
    run,
)
from problems import PROBLEMS, plans

from cuflash import dtypes
from cuflash.device import NAMED, named
from cuflash.features import needs
from cuflash.masks import Mask
from cuflash.plan import Plan, choose
from cuflash.plan import why_not as reasons_against

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


CASES: dict[str, HostCase] = {
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
    "d128-164KB": dense("bf16", (2, 1), (130, 150), (128, 128), device="a100", mask=CAUSAL),
    "d192-gqa-causal": dense("fp16", (2, 1), (140, 130), (192, 128), mask=CAUSAL, deterministic=True),
    "d256-164KB": dense("fp16", (2, 1), (70, 90), (256, 256), device="a100"),
    "d128-huge-scores": dense("bf16", (2, 1), (140, 260), (128, 128), softmax_scale=30.0),
    "d256-gqa-alibi": dense("bf16", (4, 2), (70, 140), (256, 256), alibi_axes="h"),
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
    "bias-of-two": dense("bf16", (2, 1), (70, 140), (64, 64), batch=2, bias_axes="hqk", bias=FP32),
    "bias-of-two-odd": dense("fp16", (2, 2), (129, 131), (32, 48), batch=2, bias_axes="hqk", device="a10"),
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
    "simt-bias-of-two": dense("bf16", (2, 1), (70, 131), (32, 32), family="simt", batch=2, bias_axes="hqk"),
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

# As many short sequences as blocks of two multiprocessors share: the first of a block, the next, and the last.
CASES |= {
    "short": dense("fp16", (2, 2), (64, 64), (32, 32), batch=5, num_sms=2, bias_axes="hqk"),
    "short-d64-s128": dense("bf16", (2, 2), (128, 128), (64, 64), batch=5, num_sms=2, bias_axes="hqk", bias=FP32),
    "short-one-query": dense("fp16", (3, 3), (1, 100), (24, 40), batch=3, num_sms=2, bias_axes="hqk"),
    "short-one-key": dense("bf16", (2, 2), (50, 1), (16, 16), batch=5, num_sms=2, bias_axes="hk"),
    "short-causal": dense("fp16", (2, 2), (60, 40), (33, 7), batch=5, num_sms=2, mask=CAUSAL, copy_bytes=2),
    "short-own-bias": dense("bf16", (2, 2), (40, 90), (32, 64), batch=5, num_sms=2, bias_axes="bhqk", mask=WINDOW),
    "short-all-pairs": dense("fp16", (2, 2), (70, 30), (64, 32), batch=5, num_sms=2, bias_axes="qk", softcap=2.0),
    "short-softcap": dense("fp16", (2, 2), (30, 40), (48, 48), batch=4, num_sms=1, bias_axes="hqk", softcap=2.0),
    "short-everything": dense(
        "bf16", (2, 2), (50, 61), (40, 24), batch=5, num_sms=2, mask=WINDOW, mask_axes="bhqk", alibi_axes="bh",
        bias_axes="hqk", softmax_scale=-0.2, sink=True, dropout="byte", copy_bytes=8,
    ),
    "short-dropout-word": dense("fp16", (2, 2), (50, 70), (64, 64), batch=2, num_sms=2, dropout="word"),
    "short-varlen": packed(
        "fp16", (2, 2), (64, 0, 1, 30, 20), (30, 20, 0, 64, 7), (32, 32), tail=5, num_sms=2, bias_axes="hqk"
    ),
    "short-varlen-everything": packed(
        "bf16", (2, 2), (40, 0, 70, 3), (90, 30, 20, 128), (64, 64), tail=5, seqused_q=(33, 0, 70, 1), num_sms=2,
        seqused_kv=(70, 9, 20, 99), mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", bias=FP32,
        sink=True, dropout="byte", deterministic=True,
    ),
}  # fmt: skip

CASES |= {
    name: replace(case, problem=replace(case.problem, num_splits=0))
    for name, case in CASES.items()
    if name.startswith("short")
}

# A broadcast bias whose tiles several blocks share, each with several visits: along every axis, of several tiles.
CASES |= {
    "bias-parts": dense("fp16", (2, 1), (70, 140), (64, 64), batch=7, bias_axes="hqk", num_sms=9),
    "bias-parts-d32": dense("bf16", (2, 2), (150, 130), (32, 32), batch=5, bias_axes="qk", bias=FP32, num_sms=4),
    "bias-parts-rows": dense("bf16", (2, 1), (300, 90), (40, 24), batch=3, bias_axes="hk", num_sms=5),
    "bias-parts-columns": dense("fp16", (2, 2), (90, 300), (64, 64), batch=2, bias_axes="bq", num_sms=5, mask=CAUSAL),
    "bias-parts-number": dense("fp16", (2, 1), (130, 140), (16, 16), batch=2, bias_axes="", bias=FP32, num_sms=3),
    "bias-parts-varlen": packed(
        "bf16", (2, 1), (70, 0, 1, 130, 64), (30, 20, 0, 150, 64), (64, 64), tail=5, bias_axes="hqk", num_sms=6
    ),
    "bias-parts-99KB": dense("fp16", (2, 1), (150, 150), (128, 64), batch=5, bias_axes="hqk", device="a10", num_sms=4),
    "bias-parts-d256-99KB": dense("bf16", (1, 1), (70, 50), (256, 256), batch=3, bias_axes="hqk", device="a10"),
    "simt-bias-parts": dense("fp32", (2, 1), (70, 90), (32, 32), family="simt", batch=7, bias_axes="hqk", num_sms=5),
    "simt-bias-parts-rows": dense(
        "fp64", (2, 1), (130, 40), (40, 24), family="simt", batch=3, bias_axes="hk", bias=FP32, num_sms=4, mask=CAUSAL
    ),
    "simt-bias-own": dense("fp64", (2, 1), (70, 40), (40, 24), family="simt", bias_axes="hqk", bias=FP32, mask=WINDOW),
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
    "sm90-bias-384": dense("bf16", (1, 1), (384, 70), (32, 32), bias_axes="hqk", bias_boxes=True),
    "sm90-bias-of-two": dense("bf16", (2, 1), (150, 270), (64, 64), batch=2, bias_axes="hqk", bias_boxes=True),
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
# Gradients: tiles of 128 keys and as many or 64 queries, and beyond 128 columns of 64 keys and 64 queries.
HOPPER |= {
    "sm90-d32-gqa": dense("fp16", (4, 2), (150, 300), (32, 32), batch=2),
    "sm90-d40-mqa-causal": dense("bf16", (3, 1), (270, 280), (40, 40), mask=CAUSAL),
    "sm90-d80": dense("fp16", (2, 1), (140, 150), (80, 80)),
    "sm90-d96-dv40-window": dense("bf16", (1, 1), (150, 330), (96, 40), mask=WINDOW),
    "sm90-d64-dv256-causal": dense("bf16", (2, 1), (130, 150), (64, 256), mask=CAUSAL),
    "sm90-d16-dv136": dense("fp16", (1, 1), (70, 90), (16, 136)),
    "sm90-d256-gqa-window": dense("fp16", (4, 2), (150, 150), (256, 256), mask=WINDOW),
    "sm90-d256-everything": dense(
        "bf16", (2, 1), (70, 150), (256, 200), batch=2, mask=WINDOW, mask_axes="hqk", alibi_axes="bh", bias_axes="hqk",
        softcap=3.0, sink=True, dropout="byte",
    ),
    "sm90-d256-dropout-word": dense("fp16", (1, 1), (70, 90), (256, 256), dropout="word", mask=CAUSAL, unbiased=True),
    "sm90-d192-varlen": packed(
        "bf16", (2, 1), (70, 0, 1, 130), (30, 20, 0, 150), (192, 128), tail=5, seqused_q=(70, 0, 1, 100), mask=CAUSAL
    ),
    "sm90-top-left-d128": dense("bf16", (1, 1), (150, 300), (128, 128), mask=TOP_LEFT),
    "sm90-empty-inf": dense("fp16", (2, 1), (300, 60), (64, 64), mask=CAUSAL, empty_lse=np.inf),
    "sm90-no-queries": dense("fp16", (2, 1), (0, 40), (64, 64)),
    "sm90-deterministic": dense("bf16", (4, 2), (270, 400), (64, 64), batch=2, deterministic=True),
    "sm90-deterministic-causal": dense("fp16", (2, 1), (200, 300), (128, 128), mask=CAUSAL, deterministic=True),
    "sm90-deterministic-window": dense("bf16", (2, 1), (330, 500), (64, 64), mask=WINDOW, deterministic=True),
    "sm90-deterministic-d256": dense("bf16", (2, 1), (150, 200), (256, 256), mask=CAUSAL, deterministic=True),
    "sm90-deterministic-mask": dense("fp16", (1, 1), (150, 300), (96, 96), mask_axes="hqk", deterministic=True),
    "sm90-deterministic-varlen": packed(
        "fp16", (2, 1), (40, 150, 0, 3), (300, 140, 30, 0), (128, 128), tail=3, seqused_q=(40, 130, 0, 3),
        seqused_kv=(200, 0, 99, 0), mask=CAUSAL, deterministic=True,
    ),
    "sm90-varlen-d64-seqused": packed(
        "bf16", (4, 2), (140, 70, 3), (150, 290, 30), (64, 64), seqused_q=(130, 70, 0), seqused_kv=(20, 0, 30),
        mask=WINDOW, tail=140,
    ),
    "sm90-bias-keys-d128": dense("bf16", (2, 1), (70, 150), (128, 96), batch=2, bias_axes="bhk", bias=FP32),
    "sm90-bias-softcap": dense("fp16", (2, 2), (150, 140), (64, 64), bias_axes="qk", softcap=2.0, mask=CAUSAL),
    "sm90-ramp-d256-causal": dense("fp16", (1, 1), (70, 150), (256, 256), key_ramp=100, mask=CAUSAL),
}  # fmt: skip
# A single split keeps few queries on this family.
CASES |= {
    name: replace(case, family="sm90", problem=replace(case.problem, num_splits=int(case.problem.len_q <= 64)))
    for name, case in HOPPER.items()
}

# Two pairs share an element of the bias, to whose gradient both are added.
CASES |= {
    "bias-two": dense("bf16", (2, 2), (70, 90), (64, 64), batch=2, bias_axes="hqk"),
    "bias-two-heads-fp32": dense("fp32", (2, 1), (70, 90), (64, 64), batch=3, bias_axes="bqk", mask=WINDOW),
    "bias-two-fp64": dense("fp64", (2, 1), (70, 40), (40, 24), batch=2, bias_axes="hqk", bias=FP32),
    "bias-two-short": dense("fp16", (5, 5), (60, 64), (32, 32), batch=2, num_sms=2, bias_axes="hqk"),
    "simt-bias-two": dense("fp32", (2, 1), (70, 90), (32, 32), family="simt", batch=2, bias_axes="hqk"),
    "sm90-bias-two": dense(
        "bf16", (2, 2), (150, 290), (64, 64), batch=2, bias_axes="hqk", bias_boxes=True, mask=CAUSAL, family="sm90"
    ),
    "sm90-bias-two-d256": dense(
        "bf16", (2, 2), (150, 140), (256, 256), bias_axes="qk", bias_boxes=True, family="sm90"
    ),
    "sm90-bias-two-varlen": packed(
        "bf16", (1, 1), (150, 90), (140, 200), (64, 64), tail=2, bias_axes="hqk", bias_boxes=True, family="sm90"
    ),
}  # fmt: skip

# Doubles on sm80 are multiplied as they are.
CASES |= {
    "fp64-d64": dense("fp64", (2, 2), (140, 150), (64, 64), batch=2),
    "fp64-d64-causal": dense("fp64", (4, 2), (150, 200), (64, 64), mask=CAUSAL),
    "fp64-d128-window": dense("fp64", (2, 1), (150, 100), (128, 128), mask=WINDOW),
    "fp64-d128-99KB": dense("fp64", (1, 1), (70, 90), (128, 80), device="a10"),
    "fp64-d40-dv24": dense("fp64", (1, 1), (70, 90), (40, 24), bias_axes="hk", bias=FP32),
    "fp64-copy-8": dense("fp64", (1, 1), (70, 40), (33, 7), copy_bytes=8, mask=CAUSAL),
    "fp64-deterministic": dense("fp64", (2, 1), (70, 200), (64, 64), mask=CAUSAL, deterministic=True),
    "fp64-splits": dense("fp64", (8, 2), (3, 500), (64, 64), num_splits=4),
    "fp64-varlen-everything": packed(
        "fp64", (4, 2), (40, 70, 3), (150, 90, 60), (32, 32), seqused_q=(40, 50, 1), seqused_kv=(41, 0, 60), tail=3,
        mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", softcap=3.0, sink=True, dropout="byte",
    ),
    "fp64-dropout-word": dense("fp64", (2, 1), (50, 71), (32, 32), dropout="word", mask=WINDOW),
    "fp64-paged": paged("fp64", 16, (2, 1), (1, 70), (100, 90), (64, 64), mask=CAUSAL),
}  # fmt: skip

# Floats on sm80 are split into halves.
CASES |= {
    "fp32-d64": dense("fp32", (2, 2), (140, 150), (64, 64), batch=2),
    "fp32-d64-causal": dense("fp32", (4, 2), (150, 200), (64, 64), mask=CAUSAL),
    "fp32-d128-window": dense("fp32", (2, 1), (150, 200), (128, 128), mask=WINDOW),
    "fp32-d128-99KB": dense("fp32", (1, 1), (70, 90), (128, 128), device="a10"),
    "tf32": dense("tf32", (4, 2), (90, 150), (64, 64), batch=2, mask=CAUSAL),
    "tf32-d128": dense("tf32", (2, 1), (140, 70), (128, 72)),
    "tf32-d33-copy-4": dense("tf32", (1, 1), (40, 70), (33, 9), copy_bytes=4),
    "tf32-256-rows": dense("tf32", (1, 1), (1030, 70), (64, 64)),
    "tf32-bias": dense("tf32", (2, 2), (70, 90), (64, 64), batch=3, bias_axes="hqk", mask=WINDOW),
    "fp32-held-bias": dense("fp32", (2, 1), (70, 270), (64, 64), batch=2, bias_axes="hqk", bias_boxes=True),
    "fp32-held-bias-long": dense(
        "fp32", (1, 1), (1030, 70), (64, 64), bias_axes="hqk", bias_boxes=True, bias=dtypes.BF16
    ),
    "fp32-held-bias-causal": dense(
        "fp32", (4, 2), (150, 131), (64, 40), bias_axes="bhqk", bias_boxes=True, mask=CAUSAL, softcap=2.0, batch=2
    ),
    "fp32-held-bias-d128": dense(
        "fp32", (2, 2), (90, 140), (128, 128), bias_axes="hqk", bias_boxes=True, mask=WINDOW, alibi_axes="h", batch=3
    ),
    "fp32-held-bias-short": dense("fp32", (2, 2), (64, 60), (32, 32), bias_axes="hqk", bias_boxes=True, batch=5),
    "fp32-held-bias-99KB": dense("fp32", (1, 1), (90, 70), (64, 64), bias_axes="hqk", bias_boxes=True, device="a10"),
    "fp32-held-bias-varlen": packed(
        "fp32", (2, 1), (70, 0, 1, 130), (30, 20, 0, 150), (64, 64), tail=5, bias_axes="bhqk", bias_boxes=True,
        dropout="byte",
    ),
    "tf32-held-bias": dense("tf32", (2, 1), (140, 270), (64, 64), bias_axes="hqk", bias_boxes=True),
    "tf32-varlen": packed("tf32", (2, 1), (70, 0, 1, 130), (30, 20, 0, 150), (64, 64), tail=5, mask=CAUSAL),
    "fp32-d256": dense("fp32", (1, 1), (70, 90), (256, 192)),
    "fp32-d256-99KB": dense("fp32", (1, 1), (70, 40), (256, 256), device="a10"),
    "fp32-d40-dv24": dense("fp32", (1, 1), (70, 90), (40, 24), bias_axes="hk"),
    "fp32-copy-8": dense("fp32", (1, 1), (33, 80), (34, 18), copy_bytes=8),
    "fp32-copy-4": dense("fp32", (1, 1), (70, 40), (33, 7), copy_bytes=4, mask=CAUSAL),
    "fp32-deterministic": dense("fp32", (2, 1), (70, 200), (64, 64), mask=CAUSAL, deterministic=True),
    "fp32-splits": dense("fp32", (8, 2), (3, 500), (64, 64), num_splits=4),
    "fp32-varlen-seqused": packed(
        "fp32", (4, 2), (40, 70, 3), (150, 90, 60), (64, 64), seqused_q=(40, 50, 1), seqused_kv=(41, 0, 60), tail=3,
        mask=CAUSAL,
    ),
    "fp32-everything": packed(
        "fp32", (4, 2), (40, 0, 70), (90, 30, 20), (32, 32), tail=5, seqused_q=(33, 0, 70), seqused_kv=(70, 9, 20),
        mask=CAUSAL, mask_axes="bhqk", alibi_axes="bh", bias_axes="bhqk", softcap=3.0, sink=True, dropout="byte",
    ),
    "fp32-paged": paged(
        "fp32", 48, (4, 2), (40, 0, 70), (90, 30, 20), (32, 32), tail=5, seqused_q=(33, 0, 70), seqused_kv=(70, 9, 20),
        mask=CAUSAL, dropout="word",
    ),
}  # fmt: skip

# Whole sequences of 65 to 128 rows, some to a block.
SHORT_HOPPER = {
    "sm90-short": dense("bf16", (2, 2), (128, 128), (64, 64), batch=5, bias_axes="hqk"),
    "sm90-short-d32": dense("fp16", (3, 3), (100, 90), (32, 24), batch=3, bias_axes="hqk", mask=CAUSAL),
    "sm90-short-all-pairs": dense("bf16", (2, 2), (65, 128), (64, 40), batch=5, bias_axes="qk", softmax_scale=-0.2),
    "sm90-short-softcap": dense("fp16", (2, 2), (90, 70), (48, 64), batch=4, softcap=2.0, mask=WINDOW),
    "sm90-short-ramp": dense("fp16", (2, 2), (128, 128), (64, 64), batch=4, bias_axes="hqk", key_ramp=200),
    "sm90-short-everything": dense(
        "bf16", (2, 2), (110, 128), (40, 24), batch=5, mask=WINDOW, mask_axes="bhqk", alibi_axes="bh",
        bias_axes="hqk", softmax_scale=-0.2, sink=True, dropout="byte",
    ),
    "sm90-short-dropout-word": dense("fp16", (2, 2), (80, 70), (64, 64), batch=3, dropout="word"),
}  # fmt: skip
CASES |= {name: replace(case, family="sm90", num_sms=2) for name, case in SHORT_HOPPER.items()}

# Wide heads, whose columns two consumers share: one to four stages of 32 or 64 keys.
WIDE = {
    "sm90-d512": dense("fp16", (2, 1), (70, 270), (512, 512)),
    "sm90-d512-causal": dense("bf16", (2, 1), (140, 270), (512, 512), mask=CAUSAL, num_sms=2),
    "sm90-d320": dense("bf16", (1, 1), (70, 200), (320, 320)),
    "sm90-d264-dv40-softcap": dense("bf16", (1, 1), (190, 400), (264, 40), mask=WINDOW, softcap=1.5),
    "sm90-d40-dv264": dense("fp16", (2, 1), (70, 140), (40, 264)),
    "sm90-d576-dv512-group": dense("bf16", (16, 1), (1, 200), (576, 512), batch=2, num_splits=0),
    "sm90-d384-dv264-splits": dense("bf16", (4, 1), (3, 400), (384, 264), num_splits=3, sink=True, mask=CAUSAL),
    "sm90-d512-varlen": packed(
        "fp16", (2, 1), (70, 0, 1, 130), (30, 20, 0, 150), (288, 512), tail=5, seqused_q=(70, 0, 1, 100), num_sms=2
    ),
    "sm90-d512-varlen-splits": packed(
        "bf16", (4, 2), (3, 70, 1), (300, 10, 0), (272, 272), tail=2, num_splits=4, mask=CAUSAL
    ),
    "sm90-d512-ramp": dense("bf16", (1, 1), (70, 300), (320, 256), key_ramp=2000),
    "sm90-d512-ramp-fp16": dense("fp16", (1, 1), (70, 300), (512, 512), key_ramp=50),
    "sm90-d512-no-keys": dense("fp16", (2, 1), (40, 0), (512, 512), sink=True),
    "sm90-d512-more-queries": dense("bf16", (1, 1), (200, 40), (512, 512), mask=CAUSAL),
    "sm90-d512-everything": dense(
        "fp16", (2, 1), (70, 150), (512, 400), batch=2, mask=WINDOW, mask_axes="hqk", alibi_axes="bh",
        bias_axes="hqk", softmax_scale=-0.2, sink=True, dropout="byte",
    ),
    "sm90-d512-dropout-word": dense("bf16", (1, 1), (70, 90), (512, 512), dropout="word", mask=CAUSAL),
    "sm90-d320-paged-8": paged("fp16", 8, (4, 2), (70, 0, 1, 30), (30, 20, 0, 150), (320, 320), tail=5, mask=CAUSAL),
    "sm90-d512-paged-48": paged("bf16", 48, (2, 2), (1, 50, 64), (130, 60, 64), (512, 512), seqused_kv=(99, 60, 0)),
    "sm90-d512-paged-256": paged("bf16", 256, (4, 2), (70, 3), (300, 520), (288, 512), shared=True, num_splits=2),
}  # fmt: skip
CASES |= {name: replace(case, family="sm90") for name, case in WIDE.items()}

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


def differentiable(case: HostCase) -> bool:
    """Whether the family that a case is about has its gradients."""
    problem = replace(case.problem, direction="backward")
    return not reasons_against(problem, named(case.device))[case.family]


DIFFERENTIABLE = {name: case for name, case in CASES.items() if differentiable(case)}


MAIN_KERNELS = ("fwd_sm90", "fwd_sm80", "fwd_simt", "bwd_sm90", "bwd_sm80", "bwd_simt")


def tile(plan: Plan) -> tuple:
    config = next(step.config for step in plan.steps if step.kernel.startswith(MAIN_KERNELS))
    names = ("tile_q", "tile_kv", "threads", "stages", "row_buffers", "dim_splits", "warps_across", "ping_pong")
    return plan.family, plan.problem.direction, *(getattr(config, name, None) for name in names)


def plan_of(case: HostCase, direction: str) -> Plan:
    return choose(replace(case.problem, direction=direction), named(case.device), case.family)


def kinds(case: HostCase, direction: str) -> set[tuple]:
    """What a case is an example of, each with its family: kernels, a tile, features and their forms, odd sizes."""
    plan = plan_of(case, direction)
    p = plan.problem
    of_problem = {"copy": p.copy_bytes, "dropout": p.dropout, "bias": (p.bias, p.bias_boxes), "tile": tile(plan)}
    of_mask = {"mask": (p.mask.kind, p.mask.alignment)}
    of_sizes = {"queries": p.len_q > 0, "keys": p.len_kv > 0, "scale": np.sign(p.softmax_scale)}
    of_data = {name: bool(getattr(case, name)) for name in ("num_sms", "seqused_q", "seqused_kv", "unbiased", "shared")}
    of_data |= {"ramp": case.key_ramp > 1, "empty": case.empty_lse, "device": case.device}
    forms = of_problem | of_mask | of_sizes | of_data
    return {(plan.family, kind) for kind in (*(step.kernel for step in plan.steps), *needs(p), p.dtype, *forms.items())}


def cases_of(direction: str, cases: dict[str, HostCase]) -> list:
    return sampled({name: (case, kinds(case, direction)) for name, case in cases.items()}, every=40)


@pytest.mark.parametrize("case", cases_of("forward", CASES))
def test_forward(case: HostCase) -> None:
    check_forward(case)


@pytest.mark.parametrize("case", cases_of("backward", DIFFERENTIABLE))
def test_backward(case: HostCase) -> None:
    check_backward(case)


@pytest.mark.sample(3)  # one order of each
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "bf16-d128-causal",
        "deterministic-window",
        "sm90-few-blocks",
        "sm90-few-blocks-d256",
        "sm90-d64-causal",
        "sm90-deterministic-causal",
        "sm90-deterministic-d256",
        "sm90-d512-causal",
        "sm90-d320",
    ],
)
def test_any_order_of_warps(name: str, seed: int) -> None:
    check_forward(CASES[name], seed)
    if name in DIFFERENTIABLE:
        check_backward(CASES[name], seed)


@pytest.mark.parametrize("scheme", ["byte", "word"])
@pytest.mark.parametrize(
    ("family", "dim"), [("sm80", 64), ("simt", 64), ("sm80", 256), ("sm90", 64), ("sm90", 128), ("sm90", 256)]
)
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


@pytest.mark.parametrize(("family", "dtype"), [("sm90", "fp16"), ("sm80", "bf16"), ("simt", "fp32")])
def test_a_finite_sink_of_any_size(family: str, dtype: str) -> None:
    """One too large for a score counts as the largest score; some rows see no key."""
    case = dense(dtype, (3, 3), (90, 70), (64, 64), family=family, sink=True, mask=CAUSAL)
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    tensors.arrays["sink"][:] = 1e38, -1e30, -np.inf
    out, lse = tensors.place("out"), tensors.place("lse")
    exact, naive = exact_and_naive(tensors)
    run(case, tensors, "forward", 0)
    oracle.assert_close(out, exact.out, naive.out, "out")
    expected = tensors.told_of_nothing(exact.lse)
    expected[:, 0] = np.finfo(np.float32).max * np.float32(case.problem.softmax_scale)
    np.testing.assert_allclose(lse, expected, rtol=1e-3, atol=1e-3)


def test_a_generator_on_the_device_moves_on() -> None:
    case = replace(CASES["dropout"], problem=replace(CASES["dropout"].problem, len_q=3, len_kv=5))
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    tensors.place("out"), tensors.place("lse")
    generator = np.array([7, 2**63 + 8], np.uint64)
    for draw in range(2):
        run(case, tensors, "forward", 0, (generator.ctypes.data, 0, 0))
        assert tensors.arrays["rng_state"].tolist() == [7, 2**63 + 8 + 256 * draw]
    assert generator.tolist() == [7, 2**63 + 8 + 512]


def test_cases_run_every_tile() -> None:
    """Whatever tile a plan for any named device has, some case here has run it."""
    run_here = {
        tile(plan_of(case, direction))
        for direction, cases in (("forward", CASES), ("backward", DIFFERENTIABLE))
        for case in cases.values()
    }
    planned = {tile(plan) for device in NAMED.values() for problem in PROBLEMS for plan in plans(problem, device)}
    assert planned - run_here == set()
