"""Arrays of the other byte order, whose types are called like the native ones: refused, whichever argument they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from doubles.arrays import as_cupy, needs_cupy
from doubles.launch import Launches
from host import run
from inputs import random

import cuflash
from cuflash.errors import InvalidArgument

X, LSE = random(2, 7, 2, 16), np.zeros((2, 2, 7), np.float32)
STARTS = np.array([0, 3, 7], np.int32)
PER_HEAD = np.zeros(2, np.float32)
FEATURES = {"attn_bias": random(2, 2, 7, 7), "alibi_slopes": PER_HEAD, "sink": PER_HEAD}
PACKED = {"q": X[0], "k": X[0], "v": X[0], "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS,
          "seqused_q": STARTS[1:] * 0, "seqused_k": STARTS[1:] * 0}  # fmt: skip
MHA_OUTPUTS = "dq_", "dk_", "dv_", "alibi_slopes_"
CALLS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray], dict[str, Any]]] = {
    "forward": (cuflash.flash_attn_func, {"q": X, "k": X, "v": X, "out": X.copy(), **FEATURES}, {}),
    "packed": (cuflash.flash_attn_varlen_func, PACKED, {"max_seqlen_q": 4, "max_seqlen_k": 4}),
    "measured": (cuflash.flash_attn_varlen_func, PACKED, {}),
    "pages": (
        cuflash.flash_attn_varlen_func,
        {**PACKED, "k": X, "v": X, "block_table": np.zeros((2, 1), np.int32)},
        {"max_seqlen_q": 4, "max_seqlen_k": 4},
    ),
    "sdpa": (cuflash.scaled_dot_product_attention, {"query": X, "key": X, "value": X, "attn_mask": X[0, 0, 0, :1]}, {}),
    "backward": (
        cuflash.flash_attn_backward,
        {"dout": X, "q": X, "k": X, "v": X, "out": X, "lse": LSE, "dlse": LSE, "dq": X.copy(), "dk": X.copy(),
         "dv": X.copy(), "rng_state": np.zeros(2, np.uint64), **FEATURES},
        {"dropout_p": 0.5, "bias_grad": True},
    ),
    "mha": (
        cuflash.mha_varlen_bwd,
        {"dout": X[0], "q": X[0], "k": X[0], "v": X[0], "out": X[0], "softmax_lse": np.zeros((2, 2, 4), np.float32),
         "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "philox_seed": np.zeros((), np.int64),
         "philox_offset": np.zeros((), np.int64)},
        {"max_seqlen_q": 4, "max_seqlen_k": 4, "p_dropout": 0.5, "convention": "rocm", **dict.fromkeys(MHA_OUTPUTS)},
    ),
}  # fmt: skip


EACH = [(call, name) for call, (_, arrays, _) in CALLS.items() for name in arrays]


def check_refused(call: str, name: str, wrap: Callable[[np.ndarray], Any]) -> None:
    """A call with one argument in the other byte order is refused by its name."""
    function, arrays, options = CALLS[call]
    foreign = arrays[name].astype(arrays[name].dtype.newbyteorder())
    assert foreign.dtype.name == arrays[name].dtype.name and not foreign.dtype.isnative
    with pytest.raises(InvalidArgument, match=rf"^{name} is [<>]"):
        function(**{key: wrap(foreign if key == name else x) for key, x in arrays.items()}, **options)


@pytest.mark.parametrize(("call", "name"), [each for each in EACH if not each[1].startswith("philox")])
def test_the_other_byte_order_on_numpy(call: str, name: str) -> None:
    check_refused(call, name, lambda x: x)


@needs_cupy
@pytest.mark.parametrize(("call", "name"), [each for each in EACH if each[0] not in ("measured", "mha")])
def test_the_other_byte_order_on_cupy(launches: Launches, monkeypatch: Any, call: str, name: str) -> None:
    monkeypatch.setattr(run, "launch", lambda *_: None)
    check_refused(call, name, as_cupy)
    assert launches.kernels == []


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "name"), EACH)
def test_the_other_byte_order_on_a_gpu(call: str, name: str) -> None:
    cupy = pytest.importorskip("cupy")

    def put(x: np.ndarray) -> Any:
        """The same bytes: CuPy would swap them on the way."""
        return cupy.asarray(x.reshape(-1).view(np.uint8)).view(x.dtype).reshape(x.shape)

    check_refused(call, name, put)
