"""The features of attention as factors, of whose levels tests take every pair."""

from __future__ import annotations

import numpy as np
from inputs import BF16, FP16, FP32, FP64

DTYPES = {"fp16": FP16, "bf16": BF16, "fp32": FP32, "fp64": FP64}
BIASES = ["none", "bhqk", "1hqk", "b1qk", "bh1k", "bhq1", "11qk", "b11k", "1hq1", "111k", "1111", "qk"]
FACTORS = {
    "band": ["full", "causal", "window", "sliding", "right"],
    "alignment": ["bottom-right", "top-left"],
    "mask": ["none", "bhqk", "b11k", "1hq1"],
    "softcap": ["0", "1.5"],
    "scale": ["default", "-0.6"],
    "alibi": ["none", "h", "bh"],
    "bias": BIASES,
    "bias_dtype": ["same", "fp32", "bf16"],
    "sink": ["none", "h"],
    "dropout": ["none", "byte", "byte-unbiased", "word"],
    "heads": ["mha", "gqa", "mqa"],
    "dims": ["even", "longer-v", "odd"],
    "layout": ["dense", "more-queries", "decode", "varlen", "varlen-used"],
    "dtype": list(DTYPES),
    "dlse": ["none", "given"],
}


def features(
    rng: np.random.Generator, dtype: type, sizes: dict[str, int], *, alibi: str, bias: str, mask: str, sink: str,
    dropout: str,
) -> dict:  # fmt: skip
    """The oracle's arguments for patterns of axes, of which `sizes` says how long each is."""

    def shape(axes: str) -> list[int]:
        return [sizes[axis] for axis in axes]

    result: dict = {}
    if alibi != "none":
        result["alibi_slopes"] = rng.uniform(0.02, 0.3, shape(alibi)).astype(FP32)
    if bias != "none":
        result["bias"] = rng.standard_normal(shape(bias)).astype(dtype)
        result["bias"][rng.random(shape(bias)) < 0.1] = -np.inf
    if mask != "none":
        result["mask"] = rng.random(shape(mask)) < 0.7
    if sink != "none":
        result["sink"] = rng.standard_normal(shape(sink)).astype(FP32)
    if dropout != "none":
        scheme, _, unbiased = dropout.partition("-")
        result |= {"dropout_p": 0.3, "dropout_scheme": scheme, "dropout_unbiased": bool(unbiased)}
        result["rng_state"] = 0x9E3779B97F4A7C15, 2**32 - 64
    return result
