"""Every pair of features on a GPU, with gradients, against the oracle: no feature spoils another in any kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flash_words
import numpy as np
import oracle
import pytest
from covering import every_pair
from grid import DTYPES, FACTORS, features
from inputs import arrays

from cuflash import ops

pytestmark = pytest.mark.gpu

# Sizes of several tiles, of which the last are not whole.
BANDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (70, 31)},
    "sliding": {"causal": True, "window": (90, -1)},
    "right": {"window": (-1, 20)},
}
DIMS = {"even": (64, 64), "longer-v": (40, 72), "odd": (33, 20), "wide": (128, 104), "widest": (256, 192)}
HEADS = {"mha": (9, 9), "gqa": (12, 4), "mqa": (8, 1)}  # many, as the errors of the sinks' gradients are compared
DENSE = {"dense": (150, 280), "more-queries": (280, 150), "decode": (1, 500)}
PACKED = {
    # Lengths, tails, used queries and used keys.
    "varlen": ([0, 130, 9, 200], [70, 290, 0, 140], (3, 5), None, None),
    "varlen-used": ([190, 4, 70, 8], [240, 10, 129, 31], (0, 2), [128, 4, 0, 7], [199, 3, 129, 17]),
}
KERNELS = {
    f"{family}-{dtype}": (name, DTYPES[dtype])
    for family, name, dtypes in (
        ("sm90", ("sm90", "sm80"), ("fp16", "bf16")),  # whatever Hopper's kernels leave
        ("sm80", "sm80", ("fp16", "bf16", "fp32")),
        ("sm80", ("sm80", "simt"), ("fp64",)),  # heads over 128 have no other
        ("simt", "simt", ("fp16", "fp32", "fp64")),
    )
    for dtype in dtypes
}
"""What answers, and in which type."""

# Without a sink a bias of one number does nothing, and its gradient, the sum of all, is rounding alone.
_CHANGED = {
    "bias": [axes for axes in FACTORS["bias"] if axes != "1111"],
    "bias_dtype": ["same", "fp32"],
    "deterministic": ["no", "yes"],
    "dims": list(DIMS),
    "kernels": list(KERNELS),
    "num_splits": ["0", "1", "3"],
}
CASES = every_pair({name: levels for name, levels in FACTORS.items() if name != "dtype"} | _CHANGED)
_NAMES = {
    "mask": "attn_mask", "bias": "attn_bias", "window": "window_size", "scale": "softmax_scale",
    "dropout_unbiased": "unbiased_dropout",
}  # fmt: skip
"""What `ops` calls arguments of the oracle, where it is something else."""


def problem(case: dict[str, str]) -> tuple[list[np.ndarray | None], dict[str, Any]]:
    """(q, k, v, dout, dlse) and the oracle's arguments of a case."""
    (h, hk), (d, dv), (_, dtype) = HEADS[case["heads"]], DIMS[case["dims"]], KERNELS[case["kernels"]]
    options: dict[str, Any] = {**BANDS[case["band"]], "alignment": case["alignment"], "softcap": float(case["softcap"])}
    options["scale"] = None if case["scale"] == "default" else float(case["scale"])
    sizes = {"h": h, "hk": hk, "d": d, "dv": dv}
    if case["layout"] in DENSE:
        batch, (max_q, max_k) = 2, DENSE[case["layout"]]
        inputs = arrays({"b": batch, "sq": max_q, "sk": max_k, **sizes}, dtype)
    else:
        lens_q, lens_k, tail, used_q, used_k = PACKED[case["layout"]]
        batch, max_q, max_k = len(lens_q), max(lens_q), max(lens_k)
        inputs = [
            x[0] for x in arrays({"b": 1, "sq": sum(lens_q) + tail[0], "sk": sum(lens_k) + tail[1], **sizes}, dtype)
        ]
        numbers = {"cu_seqlens_q": np.cumsum([0, *lens_q]), "cu_seqlens_k": np.cumsum([0, *lens_k])}
        numbers |= {} if used_q is None else {"seqused_q": np.array(used_q), "seqused_k": np.array(used_k)}
        options |= {name: x.astype(np.int32) for name, x in numbers.items()}
    if case["dlse"] == "none":
        inputs[4] = None
    lengths = {"b": batch, "h": h, "q": max_q, "k": max_k, "1": 1}
    patterns = {name: case[name] for name in ("alibi", "bias", "mask", "sink", "dropout")}
    bias_dtype = dtype if case["bias_dtype"] == "same" else np.float32
    return inputs, options | features(np.random.default_rng(1), bias_dtype, lengths, **patterns)


def answer(
    case: dict[str, str], inputs: list[np.ndarray | None], given: dict[str, Any], put: Callable, get: Callable
) -> oracle.Attention:
    """The call with arrays in some place."""
    given = {_NAMES.get(name, name): x for name, x in given.items()}
    generator = given.pop("rng_state", None)
    options = flash_words.options(
        given, deterministic=case["deterministic"] == "yes", bias_grad="attn_bias" in given,
        num_splits=int(case["num_splits"]), family=KERNELS[case["kernels"]][0],
    )  # fmt: skip
    q, k, v, *upstream = inputs
    out, lse, pullback = ops.vjp(options, flash_words.arrays(given, put, q=q, k=k, v=v), generator)
    results = [out, lse, *pullback(*(None if x is None else put(x) for x in upstream))]
    results += [None] * (len(oracle.Attention._fields) - len(results))
    return oracle.Attention(*(None if x is None else get(x) for x in results))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{name}={level}" for name, level in case.items()))
def test_every_pair_of_features(case: dict[str, str]) -> None:
    import cupy

    inputs, given = problem(case)
    results = answer(case, inputs, given, cupy.asarray, cupy.asnumpy)
    exact, naive = (f(*inputs, **given) for f in (oracle.attention, oracle.naive_in_dtype))
    for field, x, e, n in zip(oracle.Attention._fields, results, exact, naive, strict=True):
        if x is not None:
            oracle.assert_close(x, e, n, field, results.out.dtype if field in ("dbias", "dsink") else None)
    assert (results.dbias is not None) == ("bias" in given) and (results.dsink is not None) == ("sink" in given)
