"""Values of all kinds for every argument of the public functions: a result, or an error of ours, and no other."""

from __future__ import annotations

import inspect
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash

OURS = cuflash.InvalidArgument, cuflash.UnsupportedProblem, cuflash.CompileError


class Incomparable:
    """A value that equals nothing, loudly, and cannot be hashed or shown."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __repr__(self) -> str:
        raise RuntimeError("shown")


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


X, PACKED, LSE = numbers(2, 6, 2, 8), numbers(12, 2, 8), numbers(2, 2, 6)
STARTS = np.array([0, 5, 12], np.int32)
FORWARD, GRADIENTS = {"q": X, "k": X, "v": X}, {"dout": X, "q": X, "k": X, "v": X, "out": X}
SEEDS = GRADIENTS | {"softmax_lse": LSE}
NO_OUTPUTS = dict.fromkeys(("dq_", "dk_", "dv_"))
SEQUENCES = {"q": PACKED, "k": PACKED, "v": PACKED, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
SOUND: dict[str, dict[str, Any]] = {
    "flash_attn_func": FORWARD,
    "flash_attn_varlen_func": SEQUENCES,
    "flash_attn_backward": GRADIENTS | {"lse": LSE},
    "flash_attn_vjp": FORWARD,
    "flash_attn_jvp": FORWARD,
    "flash_attn_prepare": FORWARD,
    "scaled_dot_product_attention": {"query": X, "key": X, "value": X},
    "flex_attention": {"query": X, "key": X, "value": X},
    "explain": FORWARD | {"device": "h100"},
    "mha_fwd": FORWARD,
    "mha_bwd": SEEDS | NO_OUTPUTS | {"alibi_slopes_": None},
    "mha_varlen_fwd": SEQUENCES | {"out_": None},
    "mha_fwd_ck": FORWARD,
    "mha_bwd_ck": SEEDS,
    "mem_eff_forward": FORWARD,
    "mem_eff_backward": SEEDS | NO_OUTPUTS,
    "efficient_attention_forward": {"query": X, "key": X, "value": X},
}
ARGUMENTS = [
    pytest.param(function, name, id=f"{function}-{name}")
    for function in SOUND
    for name, parameter in inspect.signature(getattr(cuflash, function)).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]
VALUES = [
    None, True, 1, -1, 10**400, 0.5, float("nan"), "x", b"x", 1j, [1, 2], (1, 2), (1,), {}, np.array(1), np.array(0.5),
    np.ones(2), np.ones((2, 2)), np.array("x"), np.float32(0.25), ml_dtypes.bfloat16(0.5), np.int8(1), Decimal("0.5"),
    Fraction(1, 2), object(), Incomparable(), X, PACKED, LSE, STARTS, np.zeros(0), X.astype(">f4"),
    np.ma.masked_array(X), np.zeros(2, np.uint64), len,
]  # fmt: skip


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_values_of_every_kind(function: str, name: str) -> None:
    for value in VALUES:
        try:
            getattr(cuflash, function)(**SOUND[function] | {name: value})
        except OURS as error:
            assert str(error)


@pytest.mark.parametrize("function", SOUND)
def test_what_those_values_stand_beside(function: str) -> None:
    getattr(cuflash, function)(**SOUND[function])
