"""Problems with data for kernels that run on the CPU.

Inputs are nasty by default: every tensor is a view into a larger one filled with NaN, in its own memory order, at the
worst alignment its case allows; outputs start as NaN and nothing outside them may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle

from cuflash import dtypes
from cuflash.device import Device, named
from cuflash.masks import Mask
from cuflash.ops.call import asked
from cuflash.plan import Plan, choose
from cuflash.plan.bias import needs_zeros
from cuflash.problem import Problem
from cuflash.verify.surroundings import Arena
from host.run import run_plan_on_host

CAUSAL = Mask(right=0)


@dataclass(frozen=True, slots=True)
class HostCase:
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
) -> HostCase:
    """A dense case; what is not a field of Problem is one of HostCase."""
    case = {name: more.pop(name) for name in HostCase.__dataclass_fields__ if name in more}
    more.setdefault("softmax_scale", dims[0] ** -0.5)
    more.setdefault("num_splits", 1)
    more["alibi"] = "alibi_axes" in case
    if "mask_axes" in case:
        more["mask"] = replace(more.get("mask", Mask()), tensor=True)
    if "bias_axes" in case:
        more.setdefault("bias", dtypes.BY_NUMPY_NAME[dtypes.KINDS[dtype].numpy.name])
        more.setdefault("bias_boxes", False)
        sizes = zip("bhqk", (batch, heads[0], *lens), strict=True)
        more["bias_broadcast"] = tuple(axis not in case["bias_axes"] or n == 1 for axis, n in sizes)
    if "dropout" in more:
        case.setdefault("dropout_p", 0.3)
    return HostCase(Problem("forward", dtypes.KINDS[dtype], batch, *heads, *lens, *dims, **more), **case)


def packed(
    dtype: str, heads: tuple[int, int], lens_q: tuple, lens_kv: tuple, dims: tuple[int, int], tail: int = 0, **more
) -> HostCase:
    """A packed case with ``tail`` rows after the last sequence."""
    totals = {"total_q": sum(lens_q) + tail, "total_kv": sum(lens_kv) + tail}
    lens = max(lens_q), max(lens_kv)
    more |= {"layout": "varlen", "batch": len(lens_q), "lens_q": lens_q, "lens_kv": lens_kv}
    return dense(dtype, heads, lens, dims, **totals, **more)


def paged(dtype: str, page_size: int, heads: tuple[int, int], lens_q: tuple, lens_kv: tuple, *dims, **more) -> HostCase:
    """A packed case whose keys and values lie in pages."""
    return packed(dtype, heads, lens_q, lens_kv, *dims, page_size=page_size, **more)


SEED, OFFSET = 0x123456789ABCDEF0, 64
EMPTY_LSE, TAIL_LSE = 1234.5, -777.25
"""What the forward is asked to write of rows that see no key, and of packed rows that take part in nothing."""


class Tensors:
    """The arrays of one case, by their names in ``params.cuh``."""

    def __init__(self, case: HostCase) -> None:
        p = case.problem
        self.case, self.rng = case, np.random.default_rng(5)
        self.arrays: dict[str, np.ndarray] = {}
        self.arena, self.turn = Arena(np, 2**24), 0
        self.before = self.arena.snapshot()
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
        if p.dropout:
            self.arrays["rng_state"] = np.array([SEED, OFFSET], np.uint64)
            self.options |= {
                "dropout_p": case.dropout_p,
                "dropout_scheme": p.dropout,
                "dropout_unbiased": case.unbiased,
            }
            self.options["rng_state"] = (SEED, OFFSET)
        if p.bias is not None:
            kept = self.pairs(case.bias_axes)
            if p.bias_boxes:
                bias = self.arena.cut("bias", kept, np.dtype(p.bias.numpy), 16, 1)
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
        self.arrays[name] = self.arena.cut(name, shape, np.dtype(dtype), np.dtype(dtype).itemsize)
        return self.arrays[name]

    def place(self, name: str, values: np.ndarray | None = None) -> np.ndarray:
        """Put a tensor into its surroundings; NaN without values. Only rows of sequences get values."""
        p = self.case.problem
        if name in ("lse", "dlse"):
            *outer, rows = self.shapes[name]
            real = np.dtype(p.dtype.accumulator)
            view = self.arena.cut(name, (*outer, rows), real, real.itemsize, 0)
            if values is not None:
                view[..., : self.live_q] = values[..., : self.live_q]
        else:
            self.turn += 1
            view = self.arena.cut(name, self.shapes[name], np.dtype(p.dtype.numpy), p.copy_bytes, self.turn)
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
        self.arrays[name] = view
        return view

    def random(self, name: str) -> np.ndarray:
        """Place normally distributed values."""
        return self.place(name, self.rng.standard_normal(self.shapes[name]).astype(self.case.problem.dtype.numpy))

    def enlarge_keys(self) -> None:
        """Multiply the first key by the ramp, the last by 1, those between by what lies between."""
        if self.case.key_ramp != 1:
            k = self.arrays["k"]
            k *= np.linspace(self.case.key_ramp, 1, k.shape[-3])[:, None, None].astype(k.dtype)

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
        """Nothing but these has changed since the run began; they are NaN again."""
        assert self.arena.change(self.before, [self.arrays[name] for name in outputs]) == ""


def exact_and_naive(tensors: Tensors, *extra: str) -> tuple[oracle.Attention, oracle.Attention]:
    inputs = [tensors.packed.get(name, tensors.arrays[name]) for name in ("q", "k", "v", *extra)]
    tf32 = tensors.case.problem.dtype == dtypes.TF32
    naive = oracle.naive_in_tf32 if tf32 else oracle.naive_in_dtype
    return oracle.attention(*inputs, **tensors.options), naive(*inputs, **tensors.options)


def run(
    case: HostCase,
    tensors: Tensors,
    direction: str,
    seed: int,
    draw: Sequence[int] = (0, SEED, OFFSET),
    choose: Callable[[Problem, Device, str], Plan] = choose,
    **changes: Any,
) -> None:
    """Run the kernels of a case, whose problem is changed by further keywords."""
    backward = direction == "backward"
    problem = replace(case.problem, direction=direction, bias_grad=backward and case.problem.bias is not None)
    problem, device = replace(problem, **changes), named(case.device)
    plan = choose(problem, replace(device, num_sms=case.num_sms or device.num_sms), case.family)
    options = asked(empty_lse=EMPTY_LSE, tail_lse=TAIL_LSE)
    if problem.dropout:
        options = options.replace(
            dropout_p=case.dropout_p, dropout_scheme=problem.dropout, unbiased_dropout=case.unbiased
        )
    tensors.before = tensors.arena.snapshot()
    if problem.bias_grad and needs_zeros(problem):
        tensors.arrays["dbias"][...] = 0
    conflicts = run_plan_on_host(plan, tensors.arrays, seed, options, draw)
    assert conflicts == 0, "ldmatrix met bank conflicts"


def check_forward(case: HostCase, seed: int = 0, shown_from: Sequence[int] = ()) -> None:
    """Run a forward; of pages before the key of each sequence that is named, the table has no number."""
    tensors = Tensors(case)
    for name in ("q", "k", "v"):
        tensors.random(name)
    tensors.enlarge_keys()
    out, lse = tensors.place("out"), tensors.place("lse")
    exact, naive = exact_and_naive(tensors)
    if case.problem.dropout:
        tensors.place_flat("rng_state", (2,), np.uint64)
    for row, first in zip(tensors.table if shown_from else (), shown_from, strict=True):
        row[: first // case.problem.page_size] = 2**31 - 1
    run(case, tensors, "forward", seed)
    if case.problem.dropout:
        assert tensors.arrays["rng_state"].tolist() == [SEED, OFFSET]
    oracle.assert_close(out, exact.out, naive.out, "out")
    oracle.assert_close(lse, tensors.told_of_nothing(exact.lse), tensors.told_of_nothing(naive.lse), "lse")
    tensors.assert_surroundings_untouched("out", "lse", *(["rng_state"] if case.problem.dropout else []))


def check_backward(case: HostCase, seed: int = 0) -> None:
    tensors = Tensors(case)
    for name in ("q", "k", "v", "dout", "dlse"):
        tensors.random(name)
    tensors.enlarge_keys()
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
