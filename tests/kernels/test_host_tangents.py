"""The kernels of forward mode, run thread by thread on the CPU, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from covering import sampled
from host.build import why_not
from host.cases import CAUSAL, HostCase, Tensors, dense, packed, run
from written import Written, composed, table

from cuflash import dtypes, mods
from cuflash.features import needs
from cuflash.masks import Mask

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

FP32, WINDOW = dtypes.FP32, Mask(left=40, right=5)
CASES: dict[str, HostCase] = {
    "d64": dense("fp16", (2, 2), (70, 150), (64, 64)),
    "d128-causal-gqa": dense("bf16", (4, 2), (70, 100), (128, 128), mask=CAUSAL),
    "d256": dense("bf16", (1, 1), (40, 70), (256, 256)),
    "d256-99KB": dense("fp16", (1, 1), (40, 70), (256, 200), device="a10"),
    "d40-dv72-window": dense("fp16", (2, 1), (100, 120), (40, 72), mask=WINDOW),
    "ramp": dense("bf16", (1, 1), (70, 200), (64, 64), key_ramp=0.02),
    "copy-2": dense("bf16", (1, 1), (70, 40), (33, 7), copy_bytes=2),
    "softcap": dense("fp16", (2, 1), (70, 90), (64, 64), softcap=1.5, softmax_scale=-0.7, mask=CAUSAL),
    "alibi-sink": dense("fp16", (2, 1), (70, 140), (64, 64), alibi_axes="h", sink=True),
    "bias": dense("fp16", (2, 1), (70, 140), (64, 64), batch=2, bias_axes="bhqk"),
    "bias-keys": dense("bf16", (2, 1), (70, 140), (64, 64), bias_axes="bhk", bias=FP32),
    "everything": dense(
        "fp16", (4, 2), (70, 140), (64, 64), mask=WINDOW, mask_axes="bhqk", alibi_axes="bh", bias_axes="hqk",
        softcap=3.0, sink=True, dropout="byte",
    ),
    "no-keys": dense("fp16", (2, 1), (40, 0), (64, 64), sink=True),
    "varlen": packed("fp16", (2, 1), (70, 0, 1, 90), (30, 20, 0, 150), (64, 64), tail=5, mask=CAUSAL),
    "varlen-everything": packed(
        "bf16", (4, 2), (40, 0, 70, 3), (90, 30, 20, 150), (64, 64), tail=5, seqused_q=(33, 0, 70, 1),
        seqused_kv=(70, 9, 20, 99), mask=CAUSAL, bias_axes="bhqk", softcap=3.0, sink=True, dropout="word",
    ),
    "sm90-d64": dense("fp16", (2, 2), (150, 300), (64, 64), family="sm90"),
    "sm90-d128-gqa": dense("bf16", (2, 1), (130, 200), (128, 128), family="sm90", mask=CAUSAL),
    "sm90-d40-dv72-window": dense("fp16", (2, 1), (200, 260), (40, 72), family="sm90", mask=WINDOW),
    "sm90-ramp": dense("bf16", (1, 1), (70, 400), (64, 64), family="sm90", key_ramp=0.02),
    "sm90-features": dense(
        "fp16", (2, 1), (140, 150), (64, 64), family="sm90", alibi_axes="h", sink=True, softcap=2.0, mask=CAUSAL
    ),
    "sm90-no-keys": dense("fp16", (2, 1), (70, 0), (64, 64), family="sm90", sink=True),
    "sm90-varlen": packed(
        "bf16", (2, 1), (150, 0, 1, 190), (130, 20, 0, 350), (64, 64), family="sm90", tail=5, mask=CAUSAL,
        seqused_q=(150, 0, 1, 140), seqused_kv=(100, 9, 0, 350),
    ),
    "simt-fp32": dense("fp32", (4, 2), (70, 90), (64, 64), family="simt"),
    "simt-fp64-ramp": dense("fp64", (1, 1), (40, 150), (40, 24), family="simt", key_ramp=0.02),
    "simt-bf16-copy-2": dense("bf16", (1, 1), (40, 50), (33, 7), family="simt", copy_bytes=2, mask=CAUSAL),
    "simt-d300": dense("fp32", (1, 1), (20, 30), (300, 300), family="simt"),
    "simt-everything": dense(
        "fp32", (4, 2), (40, 90), (64, 64), family="simt", mask=WINDOW, mask_axes="bqk", bias_axes="bhqk", softcap=3.0,
        alibi_axes="h", sink=True, dropout="word",
    ),
    "simt-varlen": packed(
        "fp64", (2, 1), (50, 0, 1, 40), (30, 20, 0, 90), (40, 24), family="simt", tail=5, seqused_kv=(9, 20, 0, 79),
        seqused_q=(50, 0, 1, 30), sink=True,
    ),
}  # fmt: skip


class TangentTensors(Tensors):
    """The arrays of a case, and how they change."""

    def __init__(self, case: HostCase, changed: Sequence[str]) -> None:
        super().__init__(case)
        self.changes: dict[str, np.ndarray] = {}
        for name in ("q", "k", "v", "out", "lse"):
            self.shapes[f"tangent_{name}"] = self.shapes[name]
        for name in "qkv":
            self.random(name)
        self.enlarge_keys()
        for name in changed:
            if name in "qkv":
                self.changes[name] = self.random(f"tangent_{name}")
            else:
                like = self.arrays[name]
                change = self.rng.standard_normal(like.shape).astype(like.dtype)
                if name == "bias":  # whose strides are its own, and which has no effect where the bias hides
                    wide = np.full((*like.shape[:-1], like.shape[-1] + 3), np.nan, like.dtype)
                    wide[..., : like.shape[-1]] = np.where(np.isinf(like), np.inf, change)
                    change = wide[..., : like.shape[-1]]
                self.changes[name] = self.arrays[f"tangent_{name}"] = change

    def place(self, name: str, values: np.ndarray | None = None) -> np.ndarray:
        """A tangent lies apart from what it is of, like it."""
        if name != "tangent_lse":
            return super().place(name, values)
        lse = self.arrays.get("lse")
        view = super().place("lse", values)
        self.arrays |= {name: view} | ({} if lse is None else {"lse": lse})
        return view


def check(
    case: HostCase,
    changed: Sequence[str],
    seed: int = 0,
    wanted: bool = True,
    make: Callable[..., Written] | None = None,
) -> dict[str, np.ndarray]:
    """Compare with the oracle; `wanted` are out and lse, too, and `make` makes a written score or mask."""
    changed = tuple(name for name in changed if name in "qkv" or getattr(case.problem, name))
    case = replace(case, problem=replace(case.problem, tangents=changed))
    tensors = TangentTensors(case, changed)
    mods_of: dict[str, Any] = {}
    if make is not None:
        written = make(case, np.random.default_rng(11))
        tensors.options |= written.options
        mods_of, captured = traced_mods(written)
    names = ["out", "lse"] if wanted else []
    names += ["tangent_out", "tangent_lse"]
    results = {name: tensors.place(name) for name in names}
    read = [tensors.arrays[name] for name in "qkv"]
    changes = {name: np.where(np.isinf(x), 0, x) if name == "bias" else x for name, x in tensors.changes.items()}
    exact = oracle.jvp(*read, changes, **tensors.options)
    naive = oracle.naive_jvp_in_dtype(*read, changes, **tensors.options)
    if case.problem.dropout:
        tensors.place_flat("rng_state", (2,), np.uint64)
    if make is not None:
        tensors.arrays |= {f"captured{i}": x for i, x in enumerate(captured)}
        mods_of["captured_flat"] = tuple(i for i, x in enumerate(captured) if x.flags.c_contiguous)
    run(case, tensors, "forward", seed, **mods_of)
    for name, result in results.items():
        expected = [getattr(answer, name) for answer in (exact, naive)]
        if name == "lse":
            expected = list(map(tensors.told_of_nothing, expected))
        oracle.assert_close(result, *expected, name)
    computed = {name: result.copy() for name, result in results.items()}
    tensors.assert_surroundings_untouched(*names, *(["rng_state"] if case.problem.dropout else []))
    return computed


def traced_mods(written: Written) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a problem says of the functions, and the arrays that they read."""
    described, captured = {}, []
    for name, function in (("score_mod", written.score), ("mask_mod", written.mask)):
        if function is not None:
            described[name], arrays = mods.trace(name, function)
            captured += arrays
    return described, captured


EVERY = ("q", "k", "v", "bias", "sink")
HELD = {name: (case, {case.family, case.problem.dtype, *needs(case.problem)}) for name, case in CASES.items()}


@pytest.mark.parametrize("case", sampled(HELD, every=5))
def test_kernel(case: HostCase) -> None:
    check(case, EVERY)


@pytest.mark.parametrize(
    ("case", "make"),
    [
        (dense("bf16", (4, 2), (70, 100), (64, 64), mask=CAUSAL), composed),
        (dense("fp16", (2, 2), (70, 90), (128, 128), softcap=2.0), table),
        (dense("fp32", (4, 2), (40, 90), (64, 64), family="simt"), composed),
        (packed("fp64", (2, 1), (50, 0, 1, 40), (30, 20, 0, 90), (40, 24), family="simt", tail=5), table),
    ],
    ids=["sm80-composed", "sm80-table", "simt-composed", "simt-table"],
)
def test_written_scores_and_masks(case: HostCase, make: Callable[..., Written]) -> None:
    """Through the slopes of scores and past what masks hide."""
    check(case, ("q", "k", "v"), make=make)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps(seed: int) -> None:
    check(CASES["sm90-features"], EVERY, seed)


@pytest.mark.parametrize("name", ["copy-2", "simt-bf16-copy-2"])
@pytest.mark.parametrize("changed", ["", "q", "k", "v"])
def test_what_does_not_change_and_is_not_wanted(name: str, changed: str) -> None:
    """Tangents that are left out are zero, whatever they would be multiplied by; out and lse may be left out."""
    computed = check(CASES[name], tuple(changed), wanted=False)
    assert computed["tangent_out"].any() == bool(changed)
    assert computed["tangent_lse"].any() == (changed in ("q", "k"))
