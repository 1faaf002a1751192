"""Every refusal of the public functions, word for word: what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash.arrays import NumPy
from cuflash.dtypes import DTYPES
from cuflash.errors import InvalidArgument
from cuflash.ops import check
from cuflash.ops.call import asked
from cuflash.problem import Problem


def full(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


Q, K, V = full(2, 6, 4, 8), full(2, 10, 2, 8), full(2, 10, 2, 16)
OUT, LSE = full(2, 6, 4, 16), full(2, 4, 6, dtype=np.float32)
PACKED_Q, PACKED_KV = full(6, 4, 8), full(10, 2, 8)
STARTS_Q, STARTS_K = np.array([0, 2, 6], np.int32), np.array([0, 7, 9], np.int32)


@dataclass(frozen=True)
class Call:
    """A call of a public function with the arguments that differ from a sound one."""

    function: Callable[..., Any]
    message: str
    changes: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = InvalidArgument

    def __call__(self) -> None:
        self.function(**(SOUND[self.function] | self.changes))


func, varlen, sdpa = cuflash.flash_attn_func, cuflash.flash_attn_varlen_func, cuflash.scaled_dot_product_attention
backward, vjp, explain = cuflash.flash_attn_backward, cuflash.flash_attn_vjp, cuflash.explain
kvpacked, qkvpacked = cuflash.flash_attn_kvpacked_func, cuflash.flash_attn_qkvpacked_func
varlen_qkvpacked = cuflash.flash_attn_varlen_qkvpacked_func
varlen_kvpacked = cuflash.flash_attn_varlen_kvpacked_func

SOUND: dict[Callable[..., Any], dict[str, Any]] = {
    func: {"q": Q, "k": K, "v": V},
    varlen: {"q": PACKED_Q, "k": PACKED_KV, "v": PACKED_KV, "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K},
    sdpa: {"query": full(2, 4, 6, 8), "key": full(2, 4, 10, 8), "value": full(2, 4, 10, 16)},
    backward: {"dout": OUT, "q": Q, "k": K, "v": V, "out": OUT, "lse": LSE},
    vjp: {"q": Q, "k": K, "v": V},
    explain: {"q": Q, "k": K, "v": V, "device": "h100"},
    kvpacked: {"q": Q, "kv": full(2, 10, 2, 2, 8)},
    qkvpacked: {"qkv": full(2, 6, 3, 4, 8)},
    varlen_kvpacked: {"q": PACKED_Q, "kv": full(10, 2, 2, 8), "cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K},
    varlen_qkvpacked: {"qkv": full(6, 3, 4, 8), "cu_seqlens": STARTS_Q},
}

read_only = full(2, 6, 4, 16)
read_only.flags.writeable = False
shared = full(2, 6, 4, 24)
misaligned = np.zeros(2 * 6 * 4 * 8 * 2 + 1, np.uint8)[1:].view(np.float16).reshape(2, 6, 4, 8)
odd_rows = np.zeros((2, 6, 4, 17), np.uint8)[..., :16].view(np.float16)
problem = Problem("forward", DTYPES["fp16"], 1, 1, 1, 8, 8, 16, 16)

CALLS: dict[str, Call] = {
    "not-an-array": Call(
        func,
        "q is a list; expected an array of NumPy, CuPy, torch, JAX or another library that speaks DLPack. "
        "Convert it first, for example with numpy.asarray or cupy.asarray.",
        {"q": [1.0]},
    ),
    "masked-array": Call(
        func,
        "k is a masked array, whose mask no arithmetic of attention follows. "
        "Pass k.filled(...), and hide keys by attn_mask.",
        {"k": np.ma.masked_array(K)},
    ),
    "none": Call(func, "k is None; expected an array.", {"k": None}),
    "all-none": Call(func, "q is None; expected an array.", {"q": None, "k": None, "v": None}),
    "sdpa-none": Call(sdpa, "value is None; expected an array.", {"value": None}),
    "backward-none": Call(backward, "lse is None; expected an array.", {"lse": None}),
    "varlen-none": Call(varlen, "cu_seqlens_k is None; expected an array.", {"cu_seqlens_k": None}),
    "rank": Call(func, "q has 3 dimensions, shape (6, 4, 8); expected 4: (b, s, h, d).", {"q": PACKED_Q}),
    "varlen-rank": Call(varlen, "k has 4 dimensions, shape (2, 10, 2, 8); expected 3: (total, h, d).", {"k": K}),
    "sdpa-rank": Call(sdpa, "key has 2 dimensions, shape (3, 8); expected 4: (b, h, s, d).", {"key": full(3, 8)}),
    "dtype": Call(
        func,
        "q is int32; expected float16, bfloat16, float32, float64. Convert q, k and v.",
        {"q": Q.astype(np.int32)},
    ),
    "dtype-byte-order": Call(
        func,
        "q is >f4; expected float16, bfloat16, float32, float64. Convert q, k and v.",
        {"q": Q.astype(">f4")},
    ),
    "dtype-mixed": Call(
        func, "v is bfloat16 but q is float16; convert one of them.", {"v": V.astype(ml_dtypes.bfloat16)}
    ),
    "batch": Call(
        func,
        "k has batch size 3 but q has 2; they must be equal.\n"
        "  q: (b=2, s=6, h=4, d=8) float16    k: (b=3, s=10, h=2, d=8) float16",
        {"k": full(3, 10, 2, 8)},
    ),
    "length": Call(
        func,
        "v has length 9 but k has 10; they must be equal.\n"
        "  k: (b=2, s=10, h=2, d=8) float16    v: (b=2, s=9, h=2, d=16) float16",
        {"v": full(2, 9, 2, 16)},
    ),
    "packed-length": Call(
        varlen,
        "v has packed length 9 but k has 10; they must be equal.\n"
        "  k: (total=10, h=2, d=8) float16    v: (total=9, h=2, d=8) float16",
        {"v": full(9, 2, 8)},
    ),
    "dim": Call(
        func,
        "k has head dimension 16 but q has 8; they must be equal.\n"
        "  q: (b=2, s=6, h=4, d=8) float16    k: (b=2, s=10, h=2, d=16) float16",
        {"k": V},
    ),
    "heads-kv": Call(
        func,
        "v has number of heads 4 but k has 2; they must be equal.\n"
        "  k: (b=2, s=10, h=2, d=8) float16    v: (b=2, s=10, h=4, d=16) float16",
        {"v": full(2, 10, 4, 16)},
    ),
    "no-heads": Call(
        func,
        "k has number of heads 0; expected at least 1.\n  k: (b=2, s=10, h=0, d=8) float16",
        {"k": full(2, 10, 0, 8), "v": full(2, 10, 0, 16)},
    ),
    "no-dim": Call(
        func,
        "v has head dimension 0; expected at least 1.\n  v: (b=2, s=10, h=2, d=0) float16",
        {"v": full(2, 10, 2, 0)},
    ),
    "endless-batch": Call(
        func,
        "q has batch size 2147483648; expected fewer than 2**31.\n  q: (b=2147483648, s=0, h=4, d=8) float16",
        {"q": full(2**31, 0, 4, 8), "k": full(2**31, 0, 2, 8), "v": full(2**31, 0, 2, 16)},
    ),
    "gqa": Call(
        func,
        "k has 3 heads but q has 4; heads_q must be a multiple of heads_kv.\n"
        "  q: (b=2, s=6, h=4, d=8) float16    k: (b=2, s=10, h=3, d=8) float16",
        {"k": full(2, 10, 3, 8), "v": full(2, 10, 3, 16)},
    ),
    "sdpa-gqa": Call(
        sdpa,
        "key has 2 heads but query has 4; pass enable_gqa=True to let query heads share key/value heads.\n"
        "  query: (b=2, h=4, s=6, d=8) float16    key: (b=2, h=2, s=10, d=8) float16",
        {"key": full(2, 2, 10, 8), "value": full(2, 2, 10, 16)},
    ),
    "enable-gqa": Call(
        sdpa,
        "enable_gqa is 'yes'; expected True or False.",
        {"key": full(2, 2, 10, 8), "value": full(2, 2, 10, 16), "enable_gqa": "yes"},
    ),
    "last-dim": Call(
        func,
        "q is not contiguous along its last dimension, whose stride is 4 bytes; expected 2. "
        "Pass a contiguous copy of it.",
        {"q": full(2, 6, 4, 16)[..., ::2]},
    ),
    "last-dim-broadcast": Call(
        backward,
        "dout is not contiguous along its last dimension, whose stride is 0 bytes; expected 2. "
        "Pass a contiguous copy of it.",
        {"dout": np.broadcast_to(np.float16(1), OUT.shape)},
    ),
    "last-dim-backwards": Call(
        func,
        "q is not contiguous along its last dimension, whose stride is -2 bytes; expected 2. "
        "Pass a contiguous copy of it.",
        {"q": Q[..., ::-1]},
    ),
    "misaligned": Call(
        func,
        "q is misaligned: not all of its elements start at a multiple of their 2 bytes. Pass a contiguous copy of it.",
        {"q": misaligned},
    ),
    "misaligned-rows": Call(
        func,
        "q is misaligned: not all of its elements start at a multiple of their 2 bytes. Pass a contiguous copy of it.",
        {"q": odd_rows},
    ),
    "misaligned-lse": Call(
        backward,
        "lse is misaligned: not all of its elements start at a multiple of their 4 bytes. "
        "Pass a contiguous copy of it.",
        {"lse": np.zeros(2 * 4 * 6 * 4 + 2, np.uint8)[2:].view(np.float32).reshape(2, 4, 6)},
    ),
    "too-many-rows": Call(
        func,
        "k has 1073741825 rows; expected at most 2**30 in a sequence, and fewer than 2**31 in all packed ones.",
        {
            "k": np.broadcast_to(full(2, 1, 2, 8), (2, 2**30 + 1, 2, 8)),
            "v": np.broadcast_to(full(2, 1, 2, 8), (2, 2**30 + 1, 2, 8)),
        },
    ),
    "too-many-packed-rows": Call(
        varlen,
        "q has 2147483648 rows; expected at most 2**30 in a sequence, and fewer than 2**31 in all packed ones.",
        {"q": np.broadcast_to(full(1, 4, 8), (2**31, 4, 8))},
    ),
    "scale": Call(func, "softmax_scale is nan; expected a finite number.", {"softmax_scale": float("nan")}),
    "scale-type": Call(func, "softmax_scale is '1'; expected a finite number.", {"softmax_scale": "1"}),
    "scale-array": Call(func, "softmax_scale is array([1.]); expected a finite number.", {"softmax_scale": np.ones(1)}),
    "sdpa-scale": Call(sdpa, "scale is inf; expected a finite number.", {"scale": float("inf")}),
    "softcap": Call(func, "softcap is -1.0; expected 0 (none) or a positive number.", {"softcap": -1.0}),
    **{
        f"splits-{name}": Call(
            function,
            f"num_splits is {value!r}; expected an integer from 1 to 128, or 0 to leave it to the plan.",
            {"num_splits": value},
        )
        for name, function, value in [
            ("negative", func, -1),
            ("many", func, 129),
            ("bool", func, True),
            ("float", func, 2.0),
            ("none", varlen, None),
            ("vjp", vjp, -1),
            ("packed", kvpacked, 200),
            ("packed-varlen", varlen_kvpacked, -1),
            ("explained", explain, 129),
        ]
    },
    "scale-beyond-float": Call(
        func,
        "softmax_scale is 1e+300; expected at most 8.51e+37 in magnitude, as fp16 is computed in float32.",
        {"softmax_scale": 1e300},
    ),
    "scale-negative-beyond-float": Call(
        func,
        "softmax_scale is -3e+38; expected at most 8.51e+37 in magnitude, as fp16 is computed in float32.",
        {"softmax_scale": -3e38},
    ),
    "scale-integer-beyond-every-float": Call(
        func,
        "softmax_scale is 2**1328 or more; expected a number that a float can hold.",
        {"softmax_scale": 10**400},
    ),
    "softcap-beyond-float": Call(
        func,
        "softcap is 1e+300; expected from 1.18e-38 to 8.51e+37, as fp16 is computed in float32.",
        {"softcap": 1e300},
    ),
    "softcap-below-float": Call(
        func,
        "softcap is 1e-44; expected from 1.18e-38 to 8.51e+37, as fp16 is computed in float32.",
        {"softcap": 1e-44},
    ),
    "softcap-integer-of-many-digits": Call(
        func,
        "softcap is -2**33219 or more; expected a number that a float can hold.",
        {"softcap": -(10**10000)},
    ),
    "dropout-integer": Call(
        func, "dropout_p is 2**1328 or more; expected a number that a float can hold.", {"dropout_p": 10**400}
    ),
    "softcap-type": Call(func, "softcap is None; expected a finite number.", {"softcap": None}),
    "causal": Call(func, "causal is 'yes'; expected True or False.", {"causal": "yes"}),
    "sdpa-causal": Call(sdpa, "is_causal is 2; expected True or False.", {"is_causal": 2}),
    "deterministic": Call(backward, "deterministic is None; expected True or False.", {"deterministic": None}),
    "alignment": Call(func, "alignment is 'left'; expected 'bottom-right' or 'top-left'.", {"alignment": "left"}),
    "window-type": Call(func, "window_size is 3; expected a tuple of two integers (left, right).", {"window_size": 3}),
    "window-list": Call(
        func, "window_size is [3, 0.0]; expected a tuple of two integers (left, right).", {"window_size": [3, 0.0]}
    ),
    "window-array": Call(
        func, "window_size is array(3); expected a tuple of two integers (left, right).", {"window_size": np.array(3)}
    ),
    "alignment-array": Call(
        func,
        "alignment is array(['a', 'b'], dtype='<U1'); expected 'bottom-right' or 'top-left'.",
        {"alignment": np.array(["a", "b"])},
    ),
    "scheme-array": Call(
        func,
        "dropout_scheme is array([0, 0]); expected 'byte' or 'word'.",
        {"dropout_p": 0.5, "dropout_scheme": np.zeros(2, int)},
    ),
    "generator-arrays": Call(
        func,
        "seed is array([7, 8]); expected an integer from 0 to 2**64 - 1, or None for any.",
        {"dropout_p": 0.5, "generator": (np.array([7, 8]), np.array([4, 4]))},
    ),
    "return-lse": Call(func, "return_lse is 'no'; expected True or False.", {"return_lse": "no"}),
    "return-rng-state": Call(varlen, "return_rng_state is 1.0; expected True or False.", {"return_rng_state": 1.0}),
    "sdpa-return-lse": Call(sdpa, "return_lse is None; expected True or False.", {"return_lse": None}),
    "vjp-return-lse": Call(vjp, "return_lse is []; expected True or False.", {"return_lse": []}),
    "forward-deterministic": Call(func, "deterministic is 'yes'; expected True or False.", {"deterministic": "yes"}),
    "vjp-deterministic": Call(vjp, "deterministic is 'no'; expected True or False.", {"deterministic": "no"}),
    "explained-options": Call(
        explain,
        "explain takes only a device next to a Problem, which says everything else itself.",
        {"q": problem, "k": None, "v": None, "softcap": np.ones(2)},
    ),
    "explained-device": Call(
        explain,
        "device array(['h100'], dtype='<U4') is not known; expected one of: v100, t4, a100, a10, l4, h100, h200, b200, "
        "rtx5090, sm_100, sm_120, sm_70, sm_75, sm_80, sm_86, sm_89, sm_90a.",
        {"device": np.array(["h100"])},
    ),
    "window-count": Call(
        func, "window_size is (1, 2, 3); expected a tuple of two integers (left, right).", {"window_size": (1, 2, 3)}
    ),
    "window-negative": Call(
        func,
        "window_size is (-2, 0); expected bounds from 0 to 2**31 - 1, or -1 for unbounded.",
        {"window_size": (-2, 0)},
    ),
    "window-large": Call(
        func,
        "window_size is (0, 2147483648); expected bounds from 0 to 2**31 - 1, or -1 for unbounded.",
        {"window_size": (0, 2**31)},
    ),
    "starts-dtype": Call(
        varlen, "cu_seqlens_q is int64; expected int32. Convert it.", {"cu_seqlens_q": STARTS_Q.astype(np.int64)}
    ),
    "starts-rank": Call(
        varlen, "cu_seqlens_k has shape (3, 1); expected one dimension.", {"cu_seqlens_k": STARTS_K[:, None]}
    ),
    "starts-strided": Call(
        varlen,
        "cu_seqlens_q is not contiguous; pass a contiguous copy of it.",
        {"cu_seqlens_q": np.repeat(STARTS_Q, 2)[::2]},
    ),
    "starts-empty": Call(
        varlen,
        "cu_seqlens_q is empty; expected batch + 1 numbers, the first of them 0.",
        {"cu_seqlens_q": STARTS_Q[:0]},
    ),
    "starts-count": Call(
        varlen,
        "cu_seqlens_k has 2 numbers but cu_seqlens_q has 3; "
        "both need batch + 1, with a sequence of keys for each sequence of queries.",
        {"cu_seqlens_k": STARTS_K[:2]},
    ),
    "starts-first": Call(
        varlen,
        "cu_seqlens_q[0] is 1; expected 0, the first row of the first sequence.",
        {"cu_seqlens_q": np.array([1, 2, 6], np.int32)},
    ),
    "starts-fall": Call(
        varlen,
        "cu_seqlens_q[2] is 4 after 5; "
        "expected the first row of each sequence in rising order, and the end of the last.",
        {"cu_seqlens_q": np.array([0, 5, 4], np.int32)},
    ),
    "starts-beyond": Call(
        varlen,
        "cu_seqlens_k[2] is 11, but k has 10 rows; expected at most that many.",
        {"cu_seqlens_k": np.array([0, 7, 11], np.int32)},
    ),
    "starts-one-side": Call(
        backward,
        "cu_seqlens_q is given but cu_seqlens_k is not; packed sequences need both.",
        {"cu_seqlens_q": STARTS_Q},
    ),
    "starts-other-side": Call(
        vjp, "cu_seqlens_k is given but cu_seqlens_q is not; packed sequences need both.", {"cu_seqlens_k": STARTS_K}
    ),
    "used-dtype": Call(
        varlen, "seqused_k is int8; expected int32. Convert it.", {"seqused_k": np.array([1, 2], np.int8)}
    ),
    "used-count": Call(
        varlen,
        "seqused_k has 3 numbers; expected one for each of the 2 sequences.",
        {"seqused_k": np.array([1, 2, 0], np.int32)},
    ),
    "used-beyond": Call(
        varlen,
        "seqused_k[1] is 3, but sequence 1 has 2 keys; expected a number from 0 to those.",
        {"seqused_k": np.array([1, 3], np.int32)},
    ),
    "used-dense": Call(
        vjp,
        "seqused_k is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too.",
        {"seqused_k": np.array([1, 3], np.int32)},
    ),
    "longest-dense": Call(
        vjp, "max_seqlen_q is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too.", {"max_seqlen_q": 6}
    ),
    "validate-dense": Call(
        vjp, "validate is True but no sequences are packed; there is nothing to check. Drop it.", {"validate": True}
    ),
    "validate-type": Call(varlen, "validate is 'yes'; expected True or False.", {"validate": "yes"}),
    "longest-type": Call(
        varlen,
        "max_seqlen_q is 4.0; expected an integer from 0, or None to read it from cu_seqlens.",
        {"max_seqlen_q": 4.0},
    ),
    "longest-negative": Call(
        varlen,
        "max_seqlen_k is -1; expected an integer from 0, or None to read it from cu_seqlens.",
        {"max_seqlen_k": -1},
    ),
    "longest-endless": Call(
        varlen,
        "max_seqlen_k is 2147483648; expected fewer than 2**31. Pass the longest length, or None.",
        {"max_seqlen_k": 2**31},
    ),
    "longest-short": Call(
        varlen,
        "max_seqlen_k is 6, but sequence 0 has 7 rows; pass at least that many, or None.",
        {"max_seqlen_k": 6},
    ),
    "out-shape": Call(func, "out has shape (2, 6, 4, 8); expected (2, 6, 4, 16).", {"out": full(2, 6, 4, 8)}),
    "out-dtype": Call(func, "out is float32; expected float16.", {"out": full(2, 6, 4, 16, dtype=np.float32)}),
    "out-read-only": Call(func, "out is read-only; pass an array that can be written.", {"out": read_only}),
    "out-overlaps-itself": Call(
        func,
        "out has elements that share memory, shape (2, 6, 4, 16) with strides of (0, 128, 32, 2) bytes; "
        "pass an array without overlap.",
        {"out": np.lib.stride_tricks.as_strided(full(6, 4, 16), (2, 6, 4, 16), (0, 128, 32, 2))},
    ),
    "out-overlaps-q": Call(
        func,
        "out shares memory with q, which is still read while out is written. Give out memory of its own.",
        {"q": shared[..., :8], "out": shared[..., 7:23]},
    ),
    "dk-is-dq": Call(
        backward,
        "dk shares memory with dq, which is written too. Give dk memory of its own.",
        {"k": full(2, 6, 4, 8), "v": full(2, 6, 4, 16), "dq": shared[..., :8], "dk": shared[..., :8]},
    ),
    "dv-overlaps-dk": Call(
        backward,
        "dv shares memory with dk, which is written too. Give dv memory of its own.",
        {"k": full(2, 6, 4, 8), "v": full(2, 6, 4, 16), "dk": shared[..., :8], "dv": shared[..., 7:23]},
    ),
    "dk-overlaps-v": Call(
        backward,
        "dk shares memory with v, which is still read while dk is written. Give dk memory of its own.",
        {"dk": V[..., :8]},
    ),
    "lse-dtype": Call(backward, "lse is float16; expected float32.", {"lse": LSE.astype(np.float16)}),
    "lse-shape": Call(
        backward, "lse has shape (2, 6, 4); expected (2, 4, 6).", {"lse": np.ascontiguousarray(LSE.swapaxes(1, 2))}
    ),
    "dlse-shape": Call(backward, "dlse has shape (4, 6); expected (2, 4, 6).", {"dlse": LSE[0]}),
    "dout-shape": Call(backward, "dout has shape (2, 6, 4, 8); expected (2, 6, 4, 16).", {"dout": Q}),
    "dv-shape": Call(backward, "dv has shape (2, 10, 2, 8); expected (2, 10, 2, 16).", {"dv": K.copy()}),
    "mask-dtype": Call(
        sdpa,
        "attn_mask is int32; expected bool, True where a query and a key take part.",
        {"attn_mask": full(6, 10, dtype=np.int32)},
    ),
    "mask-shape": Call(
        sdpa,
        "attn_mask has shape (10, 6); expected one that broadcasts to (b, heads_q, len_q, len_kv) = (2, 4, 6, 10).",
        {"attn_mask": full(10, 6, dtype=bool)},
    ),
    "mask-rank": Call(
        sdpa,
        "attn_mask has shape (1, 1, 1, 6, 10); "
        "expected one that broadcasts to (b, heads_q, len_q, len_kv) = (2, 4, 6, 10).",
        {"attn_mask": full(1, 1, 1, 6, 10, dtype=bool)},
    ),
    "mask-packed": Call(
        varlen,
        "attn_mask has shape (6, 10); expected one that broadcasts to (b, heads_q, len_q, len_kv) = (2, 4, 4, 7).",
        {"attn_mask": full(6, 10, dtype=bool)},
    ),
    "mask-float": Call(
        sdpa,
        "attn_mask is float64; expected float16 or float32. Convert it.",
        {"attn_mask": full(6, 10, dtype=np.float64)},
    ),
    "mask-float-shape": Call(
        sdpa,
        "attn_mask has shape (10, 6); expected one that broadcasts to (b, heads_q, len_q, len_kv) = (2, 4, 6, 10).",
        {"attn_mask": full(10, 6)},
    ),
    "bias-dtype": Call(
        func,
        "attn_bias is bfloat16; expected float16 or float32. Convert it.",
        {"attn_bias": full(6, 10, dtype=ml_dtypes.bfloat16)},
    ),
    "bias-dtype-fp32": Call(
        func,
        "attn_bias is float16; expected float32. Convert it.",
        {"q": Q.astype(np.float32), "k": K.astype(np.float32), "v": V.astype(np.float32), "attn_bias": full(6, 10)},
    ),
    "bias-bool": Call(
        func, "attn_bias is bool; expected float16 or float32. Convert it.", {"attn_bias": full(6, 10, dtype=bool)}
    ),
    "bias-shape": Call(
        backward,
        "attn_bias has shape (2, 2, 6, 10); "
        "expected one that broadcasts to (b, heads_q, len_q, len_kv) = (2, 4, 6, 10).",
        {"attn_bias": full(2, 2, 6, 10)},
    ),
    "bias-misaligned": Call(
        func,
        "attn_bias is misaligned: not all of its elements start at a multiple of their 4 bytes. "
        "Pass a contiguous copy of it.",
        {"attn_bias": np.zeros(6 * 10 * 4 + 2, np.uint8)[2:].view(np.float32).reshape(6, 10)},
    ),
    "bias-misaligned-columns": Call(
        func,
        "attn_bias is misaligned: not all of its elements start at a multiple of their 2 bytes. "
        "Pass a contiguous copy of it.",
        {"attn_bias": np.lib.stride_tricks.as_strided(full(6, 20), (6, 10), (40, 3))},
    ),
    "bias-grad-without": Call(
        backward,
        "bias_grad is True but attn_bias is None; pass the bias whose gradient is wanted.",
        {"bias_grad": True},
    ),
    "bias-grad-flag": Call(
        vjp, "bias_grad is 'sum'; expected True or False.", {"bias_grad": "sum", "attn_bias": full(6, 10)}
    ),
    "bias-grad-expanded": Call(
        vjp,
        "attn_bias has shape (6, 10) with strides of (0, 2) bytes, and its gradient is wanted; "
        "expected size 1 along axes that are broadcast. Pass it before it is expanded.",
        {"bias_grad": True, "attn_bias": np.broadcast_to(full(10), (6, 10))},
    ),
    "alibi-shape": Call(
        varlen,
        "alibi_slopes has shape (4, 2); expected (heads_q,) or (b, heads_q), here (4,) or (2, 4).",
        {"alibi_slopes": np.ones((4, 2), np.float32)},
    ),
    "alibi-dtype": Call(func, "alibi_slopes is float16; expected float32.", {"alibi_slopes": np.ones(4, np.float16)}),
    "alibi-strided": Call(
        func,
        "alibi_slopes is not contiguous along its last dimension, whose stride is 8 bytes; expected 4. "
        "Pass a contiguous copy of it.",
        {"alibi_slopes": np.ones((2, 8), np.float32)[:, ::2]},
    ),
    "sink-shape": Call(func, "sink has shape (2,); expected (4,).", {"sink": np.ones(2, np.float32)}),
    "sink-dtype": Call(backward, "sink is float64; expected float32.", {"sink": np.ones(4)}),
    "dropout-one": Call(
        func,
        "dropout_p is 1.0; expected a probability of dropping, from 0 to below 1.",
        {"dropout_p": 1.0},
    ),
    "dropout-negative": Call(
        sdpa, "dropout_p is -0.1; expected a probability of dropping, from 0 to below 1.", {"dropout_p": -0.1}
    ),
    "dropout-type": Call(vjp, "dropout_p is '0.1'; expected a finite number.", {"dropout_p": "0.1"}),
    "dropout-scheme": Call(
        func, "dropout_scheme is 'bit'; expected 'byte' or 'word'.", {"dropout_p": 0.1, "dropout_scheme": "bit"}
    ),
    "dropout-unbiased": Call(
        func, "unbiased_dropout is None; expected True or False.", {"dropout_p": 0.1, "unbiased_dropout": None}
    ),
    "generator": Call(
        func,
        "generator is 7; expected a cuflash.PhiloxGenerator, a tuple (seed, offset), "
        "or None for the one that cuflash.manual_seed seeds.",
        {"dropout_p": 0.1, "generator": 7},
    ),
    "generator-seed": Call(
        func,
        "seed is -1; expected an integer from 0 to 2**64 - 1, or None for any.",
        {"dropout_p": 0.1, "generator": (-1, 0)},
    ),
    "generator-offset": Call(
        varlen,
        "offset is 2; expected a multiple of 4 from 0 to 2**64 - 4. Round it up to one.",
        {"dropout_p": 0.1, "generator": (0, 2)},
    ),
    "rng-state-missing": Call(
        backward,
        "rng_state is None but dropout_p is 0.1; pass the seed and offset of the forward.",
        {"dropout_p": 0.1},
    ),
    "rng-state-without-dropout": Call(
        backward,
        "rng_state is given but dropout_p is 0; pass the dropout_p of the forward.",
        {"rng_state": full(2, dtype=np.uint64)},
    ),
    "rng-state-dtype": Call(
        backward,
        "rng_state is float64 of shape (2,); expected uint64 of shape (2,). "
        "Pass the seed and offset that the forward returned.",
        {"dropout_p": 0.1, "rng_state": np.zeros(2)},
    ),
    "used-queries-beyond": Call(
        varlen,
        "seqused_q[0] is 3, but sequence 0 has 2 queries; expected a number from 0 to those.",
        {"seqused_q": np.array([3, 1], np.int32)},
    ),
    "used-queries-dense": Call(
        backward,
        "seqused_q is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too.",
        {"seqused_q": np.array([1, 3], np.int32)},
    ),
    "used-queries-count": Call(
        varlen,
        "seqused_q has 1 numbers; expected one for each of the 2 sequences.",
        {"seqused_q": np.array([1], np.int32)},
    ),
    "probabilities": Call(
        varlen,
        "return_attn_probs is True and block_table is given; probabilities of keys in pages are not returned. "
        "Gather the pages into packed k and v.",
        {"return_attn_probs": True, "block_table": np.zeros((2, 3), np.int32)},
    ),
    "pages-sizes": Call(
        varlen,
        "v has page size 8 but k has 16; they must be equal.\n"
        "  k: (num_pages=3, page_size=16, h=2, d=8) float16    v: (num_pages=3, page_size=8, h=2, d=8) float16",
        {"k": full(3, 16, 2, 8), "v": full(3, 8, 2, 8), "block_table": np.zeros((2, 3), np.int32)},
    ),
    "pages-of-nothing": Call(
        varlen,
        "k has page size 0, shape (3, 0, 2, 8); expected at least 1.",
        {"k": full(3, 0, 2, 8), "v": full(3, 0, 2, 8), "block_table": np.zeros((2, 3), np.int32)},
    ),
    "pages-misaligned": Call(
        varlen,
        "block_table is misaligned; pass a contiguous copy of it.",
        {"block_table": np.zeros(25, np.uint8)[1:].view(np.int32).reshape(2, 3)},
    ),
    "pages-dense": Call(
        explain,
        "block_table is for packed sequences; pass cu_seqlens_q and cu_seqlens_k too.",
        {"block_table": np.zeros((2, 3), np.int32)},
    ),
    "kvpacked": Call(
        kvpacked, "kv has shape (2, 10, 3, 2, 8); expected (b, s, 2, h, d).", {"kv": full(2, 10, 3, 2, 8)}
    ),
    "qkvpacked": Call(qkvpacked, "qkv has shape (6, 3, 4, 8); expected (b, s, 3, h, d).", {"qkv": full(6, 3, 4, 8)}),
    "varlen-kvpacked": Call(varlen_kvpacked, "kv is a NoneType; expected an array (total, 2, h, d).", {"kv": None}),
    "varlen-qkvpacked": Call(
        varlen_qkvpacked, "qkv has shape (6, 2, 4, 8); expected (total, 3, h, d).", {"qkv": full(6, 2, 4, 8)}
    ),
    "explain-no-device": Call(
        explain,
        "device is None and the arrays are NumPy arrays, which no kernel runs on; "
        "name the device to explain the choice for, for example device='h100'.",
        {"device": None},
    ),
    "explain-problem-no-device": Call(
        explain,
        "device is None; name the one to explain a Problem for, for example device='h100'.",
        {"q": problem, "k": None, "v": None, "device": None},
    ),
    "explain-problem-and-more": Call(
        explain,
        "explain takes only a device next to a Problem, which says everything else itself.",
        {"q": problem, "k": None, "v": None, "causal": True},
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_refusal(call: Call) -> None:
    with pytest.raises(call.error) as caught:
        call()
    assert str(caught.value) == call.message


@pytest.mark.parametrize("function", SOUND, ids=lambda f: f.__name__)
def test_the_calls_that_refusals_start_from_are_sound(function: Callable[..., Any]) -> None:
    function(**SOUND[function])


@pytest.mark.parametrize("name", ["out-overlaps-q", "starts-fall", "misaligned", "window-negative"])
def test_nothing_is_written_by_a_refused_call(name: str) -> None:
    call = CALLS[name]
    changes = dict(call.changes)
    rows = PACKED_Q.shape[:-1] if call.function is varlen else Q.shape[:-1]
    changes.setdefault("out", full(*rows, SOUND[call.function]["v"].shape[-1]))
    changes["out"][...] = 7
    before = changes["out"].copy()
    with pytest.raises(InvalidArgument):
        call.function(**(SOUND[call.function] | changes))
    np.testing.assert_array_equal(changes["out"], before)


@pytest.mark.parametrize(
    ("shape", "strides", "copy_bytes"),
    [
        ((2, 6, 4, 8), None, 16),
        ((2, 6, 4, 12), None, 8),
        ((2, 6, 4, 7), None, 2),
        ((2, 6, 4, 8), (960, 160, 40, 2), 8),
        ((2, 6, 1, 8), (960, 160, 7, 2), 16),
        ((2, 6, 4, 8), (-768, -128, 32, 2), 16),
    ],
)
def test_copy_bytes_is_the_widest_access_that_all_rows_allow(shape, strides, copy_bytes) -> None:
    numpy = NumPy()
    views = {name: numpy.view(name, full(*shape))._replace(pointer=4096) for name in ("q", "k", "v")}
    if strides is not None:
        views["k"] = views["k"]._replace(strides=strides)
    assert check.problem_of("forward", asked(), views).copy_bytes == copy_bytes
    views["v"] = views["v"]._replace(pointer=4096 + copy_bytes // 2) if copy_bytes > 2 else views["v"]
    assert check.problem_of("forward", asked(), views).copy_bytes == max(2, copy_bytes // 2)


@pytest.mark.parametrize(
    ("shape", "strides", "pointer", "boxes"),
    [
        ((2, 2, 6, 8), (192, 96, 16, 2), 4096, True),
        ((2, 2, 6, 8), (0, 0, 0, 2), 4096, True),
        ((2, 1, 1, 8), (192, 7, -9, 2), 4096, True),
        ((6, 8), (16, 2), 4096, True),
        ((2, 2, 6, 8), (192, 96, 16, 2), 4104, False),
        ((2, 2, 6, 8), (192, 96, 24, 2), 4096, False),
        ((2, 2, 6, 8), (192, 104, 16, 2), 4096, False),
        ((2, 2, 6, 8), (-192, 96, 16, 2), 4096, False),
        ((2, 2, 6, 8), (192, 96, 16, -2), 4096, False),
        ((2, 2, 6, 8), (192, 96, 2, 16), 4096, False),
    ],
)
def test_which_bias_the_copy_engine_can_read(shape, strides, pointer, boxes) -> None:
    q, k = full(2, 6, 2, 8), full(2, 8, 2, 8)
    views = {name: NumPy().view(name, x) for name, x in (("q", q), ("k", k), ("v", k), ("bias", full(*shape)))}
    views["bias"] = views["bias"]._replace(strides=strides, pointer=pointer)
    assert check.problem_of("forward", asked(), views).bias_boxes is boxes


@pytest.mark.parametrize(
    ("shape", "strides", "ascending"),
    [
        ((2, 6, 4, 8), (384, 64, 16, 2), True),
        ((2, 6, 4, 8), (16, 128, 32, 2), True),
        ((2, 6, 4, 8), (384, 64, -16, 2), False),
        ((2, 6, 4, 8), (-384, 64, 16, 2), False),
        ((2, 6, 4, 8), (384, 64, 0, 2), False),
        ((2, 6, 4, 8), (0, 64, 16, 2), False),
        ((1, 6, 1, 8), (-7, 64, 0, 2), True),
        ((2, 0, 4, 8), (384, -64, 0, 2), True),
    ],
)
def test_strides_ascend_unless_an_axis_is_reversed_or_expanded(shape, strides, ascending) -> None:
    views = {name: NumPy().view(name, full(*shape)) for name in ("q", "k", "v")}
    views["k"] = views["k"]._replace(strides=strides)
    assert check.problem_of("forward", asked(), views).ascending is ascending
