"""Forward mode on a GPU: every pair of features, against the oracle."""

from __future__ import annotations

from typing import Any

import flash_words
import numpy as np
import oracle
import pytest
from covering import every_pair
from grid import DTYPES, FACTORS, features
from inputs import random

from cuflash import ops
from cuflash.ops import Tangents

pytestmark = pytest.mark.gpu

BANDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (70, 31)},
    "sliding": {"causal": True, "window": (90, -1)},
    "right": {"window": (-1, 20)},
}
DIMS = {"even": (64, 64), "longer-v": (40, 72), "odd": (33, 20), "wide": (128, 104), "widest": (256, 192)}
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (4, 1)}
DENSE = {"dense": (150, 280), "more-queries": (280, 150), "one": (1, 500)}
PACKED = {
    # Lengths, tails, used queries and used keys.
    "varlen": ([0, 130, 9, 200], [70, 290, 0, 140], (3, 5), None, None),
    "varlen-used": ([190, 4, 70, 8], [240, 10, 129, 31], (0, 2), [128, 4, 0, 7], [199, 3, 129, 17]),
}
KERNELS = {
    f"{family}-{dtype}": (names, DTYPES[dtype])
    for family, names, dtypes in (
        ("sm90", ("sm90", "sm80"), ("fp16", "bf16")),  # whatever Hopper's kernel leaves
        ("sm80", "sm80", ("fp16", "bf16")),
        ("simt", "simt", ("fp16", "fp32", "fp64")),
    )
    for dtype in dtypes
}
"""What answers, and in which type."""
CHANGED = {"all": "q k v bias sink", "keys": "k v", "queries": "q", "values": "v", "rest": "q v bias sink", "none": ""}
TIMES = {"1": 1.0, "2": 2.0}
"""What q and k are multiplied by: the larger, the more one key outweighs its row."""
_CHANGED = {"bias_dtype": ["same", "fp32"], "dims": list(DIMS), "kernels": list(KERNELS), "changed": list(CHANGED)}
_CHANGED |= {"layout": [*DENSE, *PACKED], "times": list(TIMES)}
CASES = every_pair({name: levels for name, levels in FACTORS.items() if name not in ("dtype", "dlse")} | _CHANGED)
_PLAIN = {name: levels[0] for name, levels in FACTORS.items() if name not in ("dtype", "dlse")} | {
    "bias_dtype": "same", "dims": "even", "kernels": "sm90-bf16", "changed": "all", "layout": "dense", "times": "1",
}  # fmt: skip
_HOPPER = {
    "kernels": ["sm90-fp16", "sm90-bf16"], "dims": ["even", "longer-v", "wide"], "heads": list(HEADS),
    "band": list(BANDS), "softcap": ["0", "1.5"], "alibi": ["none", "h", "bh"], "sink": ["none", "h"],
    "layout": [*DENSE, *PACKED], "alignment": FACTORS["alignment"], "scale": FACTORS["scale"], "times": list(TIMES),
}  # fmt: skip
CASES += [_PLAIN | case for case in every_pair(_HOPPER)]
"""Of the latter those that Hopper's kernel does not leave."""
_NAMES = {
    "mask": "attn_mask", "bias": "attn_bias", "window": "window_size", "scale": "softmax_scale",
    "dropout_unbiased": "unbiased_dropout",
}  # fmt: skip


def problem(case: dict[str, str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """q, k and v and the oracle's arguments of a case."""
    (h, hk), (d, dv), (_, dtype) = HEADS[case["heads"]], DIMS[case["dims"]], KERNELS[case["kernels"]]
    options: dict[str, Any] = {**BANDS[case["band"]], "alignment": case["alignment"], "softcap": float(case["softcap"])}
    options["scale"] = None if case["scale"] == "default" else float(case["scale"])
    if case["layout"] in DENSE:
        batch, (max_q, max_k) = 2, DENSE[case["layout"]]
        rows_q, rows_k = (batch, max_q), (batch, max_k)
    else:
        lens_q, lens_k, tail, used_q, used_k = PACKED[case["layout"]]
        batch, max_q, max_k = len(lens_q), max(lens_q), max(lens_k)
        rows_q, rows_k = (sum(lens_q) + tail[0],), (sum(lens_k) + tail[1],)
        numbers = {"cu_seqlens_q": np.cumsum([0, *lens_q]), "cu_seqlens_k": np.cumsum([0, *lens_k])}
        numbers |= {} if used_q is None else {"seqused_q": np.array(used_q), "seqused_k": np.array(used_k)}
        options |= {name: x.astype(np.int32) for name, x in numbers.items()}
    shapes = {"q": (*rows_q, h, d), "k": (*rows_k, hk, d), "v": (*rows_k, hk, dv)}
    tensors = {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}
    for name in "qk":
        tensors[name] = (tensors[name] * TIMES[case["times"]]).astype(dtype)
    lengths = {"b": batch, "h": h, "q": max_q, "k": max_k, "1": 1}
    patterns = {name: case[name] for name in ("alibi", "bias", "mask", "sink", "dropout")}
    bias_dtype = dtype if case["bias_dtype"] == "same" else np.float32
    return tensors, options | features(np.random.default_rng(1), bias_dtype, lengths, **patterns)


def between_nans(x: np.ndarray) -> Any:
    """The array on the GPU, with NaNs on either side."""
    import cupy

    memory = np.full(x.nbytes + 512, 0xFF, np.uint8)
    memory[256 : 256 + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return cupy.asarray(memory)[256 : 256 + x.nbytes].view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{name}={level}" for name, level in case.items()))
def test_every_pair_of_features(case: dict[str, str]) -> None:
    import cupy

    read, given = problem(case)
    every = read | {name: given[name] for name in ("bias", "sink") if name in given}
    changes = {
        name: random(*every[name].shape, dtype=every[name].dtype, seed=1)
        for name in CHANGED[case["changed"]].split()
        if name in every
    }
    words = {_NAMES.get(name, name): x for name, x in given.items()}
    generator = words.pop("rng_state", None)
    options = flash_words.options(words, family=KERNELS[case["kernels"]][0])
    arrays = flash_words.arrays(words, between_nans, **read)
    tangents = Tangents(**{name: between_nans(x) for name, x in changes.items()})
    first, again = (ops.jvp(options, arrays, tangents, generator) for _ in range(2))
    exact = oracle.jvp(**read, changes=changes, **given)
    naive = oracle.naive_jvp_in_dtype(**read, changes=changes, **given)
    for field, x, y, e, n in zip(oracle.Tangents._fields, first, again, exact, naive, strict=True):
        assert cupy.asnumpy(x).tobytes() == cupy.asnumpy(y).tobytes()
        oracle.assert_close(cupy.asnumpy(x), e, n, field)
