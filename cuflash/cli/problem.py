"""A problem from the command line: a case id, or one option for each property, checked as the arrays of a call are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, get_args

import click
import numpy as np

from cuflash.arrays import View
from cuflash.bench.cases import CASES, select
from cuflash.cli.console import given
from cuflash.device import NAMED, Device, current, named
from cuflash.dropout import Scheme
from cuflash.dtypes import DTYPES
from cuflash.errors import InvalidArgument
from cuflash.ops import Options, check
from cuflash.plan import FAMILIES
from cuflash.problem import Problem

_AXES = "bhqk"
"""Batch, query heads, queries and keys."""

_ELEMENTS = ("q", "k", "v", "out", "dout")
"""What --copy-bytes is about."""

_DROPOUT_STATE = np.dtype(np.uint64)


class Asked(NamedTuple):
    """A problem that a command is to say something about."""

    problem: Problem
    family: str | None
    """The kernel family that it is held to."""
    flops: float
    nbytes: int
    """Bytes that any algorithm must read and write."""


_PARAMS: tuple[click.Parameter, ...] = (
    click.Argument(["case"], required=False),
    click.Option(["--backward"], is_flag=True, help="Its gradients."),
    click.Option(["--dtype"], type=click.Choice(list(DTYPES)), default="bf16", help="Of the tensors."),
    click.Option(["--batch"], type=click.IntRange(0), default=2, help="Sequences."),
    click.Option(["--heads"], default="16", help="Query heads, or query/key heads: 16/4."),
    click.Option(["--len", "length"], default="4096", help="Rows, or query x key rows: 1024x4096."),
    click.Option(["--dim"], default="128", help="Head size, or key x value head size: 192x128."),
    click.Option(["--scale"], type=float, help="softmax_scale; 1/sqrt(dim) if not given."),
    click.Option(["--causal"], is_flag=True, help="Keys up to the diagonal."),
    click.Option(["--window"], default="-1,-1", help="Keys left and right of the diagonal, -1 is unbounded."),
    click.Option(["--top-left"], is_flag=True, help="Align --causal or --window with the first key."),
    click.Option(["--mask"], is_flag=True, help="A boolean mask tensor."),
    click.Option(["--softcap"], type=float, default=0.0, help="Scores stay within it; 0 leaves them alone."),
    click.Option(["--alibi"], is_flag=True, help="A slope for each query head."),
    click.Option(["--bias"], help=f"An additive tensor along some of the axes {_AXES}: hqk, or bk for keys alone."),
    click.Option(["--bias-dtype"], type=click.Choice(list(DTYPES)), help="That of the tensors if not given."),
    click.Option(["--bias-apart"], is_flag=True, help="Its keys are not neighbours in memory."),
    click.Option(["--bias-grad"], is_flag=True, help="With --backward: its gradient too."),
    click.Option(["--sink"], is_flag=True, help="A learnable logit for each head."),
    click.Option(["--dropout"], type=float, default=0.0, help="The probability of dropping."),
    click.Option(
        ["--dropout-scheme"], type=click.Choice(get_args(Scheme)), default="byte", help="8 or 32 random bits a pair."
    ),
    click.Option(["--varlen"], is_flag=True, help="Packed sequences, each of the full length."),
    click.Option(["--page-size"], type=int, help="With --varlen: keys lie in pages of so many."),
    click.Option(["--deterministic"], is_flag=True, help="With --backward: bit-equal gradients."),
    click.Option(["--num-splits"], type=int, default=0, help="Blocks that share a query's keys; 0: as the plan likes."),
    click.Option(
        ["--copy-bytes"], type=click.Choice(["2", "4", "8", "16"]), default="16", help="What tensors are aligned to."
    ),
    click.Option(["--reversed"], is_flag=True, help="Heads of keys and values lie in memory in reverse order."),
    click.Option(
        ["--family"], type=click.Choice([each.name for each in FAMILIES]), help="Hold the planner to one kernel family."
    ),
    click.Option(
        ["--device"], help=f"{', '.join(NAMED)} or sm_86 ...; this machine's GPU if not given, or an h100 without one."
    ),
)


def command(name: str, show: Callable[[Asked, Device], None], text: str) -> click.Command:
    """A command that shows something about one problem on one device."""

    def run(case: str | None, device: str | None, family: str | None, **values: Any) -> None:
        target = _device(device)
        show(_of_options(family, **values) if case is None else _of_case(case, given("case", "device")), target)

    more = f"{text}\n\nThe problem is that of a CASE of `check`, by its id, or has what the options say."
    return click.Command(name, params=list(_PARAMS), callback=run, short_help=text, help=more)


def _of_case(case_id: str, options: list[str]) -> Asked:
    """The problem of an id."""
    if case_id not in CASES:
        near = ", ".join(each.id for each in select(case_id)[:5])
        raise InvalidArgument(f"case {case_id!r} is not an id; expected one id, for example: {near}.")
    if options:
        raise InvalidArgument(f"{options[0]} is given beside a case, which says everything but --device; drop one.")
    case = CASES[case_id]
    return Asked(case.problem, case.family, case.flops(), case.nbytes())


def _of_options(
    family: str | None,
    *,
    backward: bool,
    dtype: str,
    batch: int,
    heads: str,
    length: str,
    dim: str,
    scale: float | None,
    causal: bool,
    window: str,
    top_left: bool,
    mask: bool,
    softcap: float,
    alibi: bool,
    bias: str | None,
    bias_dtype: str | None,
    bias_apart: bool,
    bias_grad: bool,
    sink: bool,
    dropout: float,
    dropout_scheme: Scheme,
    varlen: bool,
    page_size: int | None,
    deterministic: bool,
    num_splits: int,
    copy_bytes: str,
    reversed: bool,
) -> Asked:
    """The problem of a call with such arrays."""
    heads_q, heads_kv = _sizes("heads", heads, "/")
    len_q, len_kv = _sizes("len", length, "x")
    dim_qk, dim_v = _sizes("dim", dim, "x")
    left_right = _pair("window", window, ",")
    if page_size is not None and (page_size < 1 or not varlen):
        raise InvalidArgument(f"--page-size {page_size} is for packed queries, and at least 1; give --varlen too.")
    for acts, written, goes_with in (
        (causal or left_right != (-1, -1), ["--top-left"], "--causal or --window"),
        (bias is not None, ["--bias-dtype", "--bias-grad"], "--bias"),
        (backward, ["--bias-grad", "--deterministic"], "--backward"),
        (dropout != 0, ["--dropout-scheme"], "--dropout"),
        (not backward, ["--num-splits"], "the forward alone, without --backward"),
        (heads_kv > 1, ["--reversed"], "several heads"),
        (len_kv > 1 and bias is not None and "k" in bias, ["--bias-apart"], "a --bias along several keys"),
    ):
        if not acts and (idle := [option for option in given() if option in written]):
            raise InvalidArgument(f"{idle[0]} does nothing here; it goes with {goes_with}.")

    element = DTYPES[dtype].numpy
    scores = (batch, heads_q, len_q, len_kv)
    tensors: dict[str, tuple[int, ...]] = {
        "q": (batch, len_q, heads_q, dim_qk),
        "k": (batch, len_kv, heads_kv, dim_qk),
        "v": (batch, len_kv, heads_kv, dim_v),
    }
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    if varlen:
        tensors = {name: (batch * rows, *rest) for name, (_, rows, *rest) in tensors.items()}
        arrays |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ((batch + 1,), np.dtype(np.int32)))
    if page_size is not None:
        pages = -(-len_kv // page_size)
        tensors |= {name: (batch * pages, page_size, *tensors[name][1:]) for name in ("k", "v")}
        arrays["block_table"] = (batch, pages), np.dtype(np.int32)
    if mask:
        arrays["attn_mask"] = scores, np.dtype(bool)
    if alibi:
        arrays["alibi_slopes"] = (heads_q,), np.dtype(np.float32)
    if bias is not None:
        if not bias or set(bias) - set(_AXES):
            raise InvalidArgument(f"--bias {bias!r} is not understood; expected some of the letters {_AXES}.")
        shape = tuple(size if axis in bias else 1 for axis, size in zip(_AXES, scores, strict=True))
        arrays["attn_bias"] = shape, DTYPES[bias_dtype or dtype].numpy
    if sink:
        arrays["sink"] = (heads_q,), np.dtype(np.float32)
    arrays |= {name: (shape, element) for name, shape in tensors.items()}
    options = Options(
        softmax_scale=scale,
        causal=causal,
        window_size=left_right,
        softcap=softcap,
        alignment="top-left" if top_left else "bottom-right",
        dropout_p=dropout,
        dropout_scheme=dropout_scheme,
        deterministic=deterministic,
        max_seqlen_q=len_q if varlen else None,
        max_seqlen_k=len_kv if varlen else None,
        bias_grad=bias_grad,
        num_splits=num_splits,
    )
    place = _Places(int(copy_bytes))
    views = {name: place(name, *array) for name, array in arrays.items()}
    if reversed:
        views |= {name: _turned(views[name]) for name in ("k", "v")}
    if bias_apart:
        views["attn_bias"] = _spread(views["attn_bias"])
    if backward:
        shapes = check.shapes(options, views)
        views |= {name: place(name, shapes[name], element) for name in ("out", "dout")}
        views["lse"] = place("lse", shapes["lse"], DTYPES[dtype].accumulator)
        if dropout:
            views["rng_state"] = place("rng_state", shapes["rng_state"], _DROPOUT_STATE)
    problem = check.problem_of("backward" if backward else "forward", options, views)
    rows = batch * (len_q * heads_q + len_kv * heads_kv)
    return Asked(problem, family, problem.flops(), rows * (dim_qk + dim_v) * element.itemsize * (2 if backward else 1))


class _Places:
    """Contiguous arrays that nobody made, one behind the other."""

    def __init__(self, align: int) -> None:
        self._next, self._align = 2**40, align

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> View:
        sizes = [dtype.itemsize, *(max(n, 1) for n in shape[:0:-1])]
        strides = tuple(accumulate(sizes, lambda a, b: a * b))[::-1]
        nbytes = prod(shape) * dtype.itemsize
        if nbytes >= 2**63:
            raise InvalidArgument(f"{name} would have shape {shape}, {nbytes:,} bytes; no address is as large.")
        off = name in _ELEMENTS and self._align < 16  # aligned to this many bytes, and to no more
        pointer = self._next + (self._align if off else 0)
        self._next += -(-(nbytes + 32) // 256) * 256
        return View(name, shape, strides if shape else (), dtype.name, dtype.itemsize, pointer, "cuda:0")


def _turned(view: View) -> View:
    """The same array with its heads the other way round."""
    stride = view.strides[-2]
    strides = (*view.strides[:-2], -stride, view.strides[-1])
    return view._replace(strides=strides, pointer=view.pointer + (view.shape[-2] - 1) * stride)


def _spread(view: View) -> View:
    """The same array with a gap behind each element."""
    return view._replace(strides=tuple(2 * stride for stride in view.strides))


def _sizes(option: str, text: str, separator: str) -> tuple[int, int]:
    """Two numbers of rows, heads or elements."""
    pair = _pair(option, text, separator)
    if min(pair) < 0:
        raise InvalidArgument(f"--{option} {text!r} has {min(pair)}; expected no negative number.")
    return pair


def _pair(option: str, text: str, separator: str) -> tuple[int, int]:
    """Two integers from ``a<separator>b``, or twice the one of ``a``."""
    parts = text.split(separator)
    try:
        first, second = (int(part) for part in (parts * 2 if len(parts) == 1 else parts))
    except ValueError:
        raise InvalidArgument(
            f"--{option} {text!r} is not understood; expected one integer or two, as in 4{separator}2."
        ) from None
    return first, second


def _device(name: str | None) -> Device:
    """The named device; without a name this machine's GPU, or an H100 where there is none."""
    if name is not None:
        return named(name)
    return current(0) if has_gpu() else named("h100")


def has_gpu() -> bool:
    """Whether a kernel can be launched here."""
    try:
        import cupy
    except ImportError:
        return False
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False
