"""A problem from the command line: a case id, or one option for each property, checked as the arrays of a call are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, get_args

import click
import numpy as np

from cuflash import ops
from cuflash.arrays import View
from cuflash.blocks import create_block_mask
from cuflash.cases.table import CASES, select
from cuflash.cli.console import options_written
from cuflash.cli.written import traced
from cuflash.device import NAMED, Device, current, named
from cuflash.dropout import Scheme
from cuflash.dtypes import DTYPES, KINDS, TF32
from cuflash.errors import InvalidArgument
from cuflash.ops import Options, Tangents, check
from cuflash.plan import FAMILIES
from cuflash.problem import Blocks, Direction, Problem

_AXES = "bhqk"
"""Batch, query heads, queries and keys."""

_ELEMENTS = ("q", "k", "v", "out", "dout")
"""What --copy-bytes is about."""


class Asked(NamedTuple):
    """A problem that a command is to say something about."""

    problem: Problem
    family: str | tuple[str, ...] | None
    """The kernel family that it is held to, or some of which one is to run it."""
    flops: float
    nbytes: int
    """Bytes that any algorithm must read and write."""


_PARAMS: tuple[click.Parameter, ...] = (
    click.Argument(["case"], required=False),
    click.Option(["--backward"], is_flag=True, help="Its gradients."),
    click.Option(
        ["--dtype"],
        type=click.Choice(list(KINDS)),
        default="bf16",
        help="Of the tensors; tf32: fp32 multiplied as TF32.",
    ),
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
    click.Option(["--score-mod"], help="What becomes of a score: 'score - captured0[h] * abs(q - k)'."),
    click.Option(["--mask-mod"], help="Which keys are seen: 'captured0[q] == captured0[k]', or 'k <= q + 16'."),
    click.Option(["--captured-grad"], is_flag=True, help="With --backward: gradients of what --score-mod reads too."),
    click.Option(["--block-mask"], type=click.IntRange(1), help="Lists of blocks of so many queries and keys."),
    click.Option(["--sink"], is_flag=True, help="A learnable logit for each head."),
    click.Option(["--dropout"], type=float, default=0.0, help="The probability of dropping."),
    click.Option(
        ["--dropout-scheme"], type=click.Choice(get_args(Scheme)), default="byte", help="8 or 32 random bits a pair."
    ),
    click.Option(["--tangents"], help="How the results change along these arrays, too: q,k,v or also bias, sink."),
    click.Option(["--varlen"], is_flag=True, help="Packed sequences, each of the full length."),
    click.Option(["--page-size"], type=int, help="With --varlen: keys lie in pages of so many."),
    click.Option(["--deterministic"], is_flag=True, help="With --backward: bit-equal gradients."),
    click.Option(["--num-splits"], type=int, default=0, help="Blocks that share a query's keys; 0: as the plan likes."),
    click.Option(
        ["--copy-bytes"], type=click.Choice(["2", "4", "8", "16"]), default="16", help="What tensors are aligned to."
    ),
    click.Option(["--shared-kv"], is_flag=True, help="The values are the first columns of the keys, as in MLA."),
    click.Option(["--reversed"], is_flag=True, help="Heads of keys and values lie in memory in reverse order."),
    click.Option(
        ["--family"],
        type=click.Choice([family.name for family in FAMILIES]),
        help="Hold the planner to one kernel family.",
    ),
    click.Option(
        ["--device"], help=f"{', '.join(NAMED)} or sm_86 ...; this machine's GPU if not given, or an h100 without one."
    ),
)


def command(
    name: str, show: Callable[..., None], text: str, more_options: tuple[click.Parameter, ...] = ()
) -> click.Command:
    """A command that shows something about one problem on one device, and is told `more_options` by name."""
    others = [option.name for option in more_options if option.name is not None]

    def run(case: str | None, device: str | None, family: str | None, **values: Any) -> None:
        target = _device(device)
        told = {other: values.pop(other) for other in others}
        if case is None:
            show(_of_options(family, _Options(**values)), target, **told)
        else:
            show(_of_case(case, options_written("case", "device", *others)), target, **told)

    more = f"{text}\n\nThe problem is that of a CASE of `check`, by its id, or has what the options say."
    return click.Command(name, params=[*_PARAMS, *more_options], callback=run, short_help=text, help=more)


def _of_case(case_id: str, options: list[str]) -> Asked:
    """The problem of an id."""
    if case_id not in CASES:
        near = ", ".join(case.id for case in select(case_id)[:5])
        raise InvalidArgument(f"case {case_id!r} is not an id; expected one id, for example: {near}.")
    if options:
        raise InvalidArgument(f"{options[0]} is given beside a case, which says everything but --device; drop one.")
    case = CASES[case_id]
    return Asked(case.problem, case.family, case.flops(), case.nbytes())


class _Options(NamedTuple):
    """The options of a problem, as written."""

    backward: bool
    dtype: str
    batch: int
    heads: str
    length: str
    dim: str
    scale: float | None
    causal: bool
    window: str
    top_left: bool
    mask: bool
    softcap: float
    alibi: bool
    bias: str | None
    bias_dtype: str | None
    bias_apart: bool
    bias_grad: bool
    score_mod: str | None
    mask_mod: str | None
    captured_grad: bool
    block_mask: int | None
    sink: bool
    dropout: float
    dropout_scheme: Scheme
    tangents: str | None
    varlen: bool
    page_size: int | None
    deterministic: bool
    num_splits: int
    copy_bytes: str
    shared_kv: bool
    reversed: bool


def _of_options(family: str | None, asked: _Options) -> Asked:
    """The problem of a call with such arrays."""
    (heads_q, heads_kv), (dim_qk, dim_v) = _sizes("heads", asked.heads, "/"), _sizes("dim", asked.dim, "x")
    len_q, len_kv = _sizes("len", asked.length, "x")
    window = _pair("window", asked.window, ",")
    if asked.page_size is not None and (asked.page_size < 1 or not asked.varlen):
        raise InvalidArgument(
            f"--page-size {asked.page_size} is for packed queries, and at least 1; give --varlen too."
        )
    _refuse_idle(asked, window != (-1, -1), heads_kv, len_kv, dim_qk, dim_v)

    q = (asked.batch, len_q, heads_q, dim_qk)
    k, v = ((asked.batch, len_kv, heads_kv, dim) for dim in (dim_qk, dim_v))
    direction: Direction = "backward" if asked.backward else "forward"
    options = ops.asked(
        softmax_scale=asked.scale,
        causal=asked.causal,
        window_size=window,
        softcap=asked.softcap,
        alignment="top-left" if asked.top_left else "bottom-right",
        dropout_p=asked.dropout,
        dropout_scheme=asked.dropout_scheme,
        deterministic=asked.deterministic,
        max_seqlen_q=len_q if asked.varlen else None,
        max_seqlen_k=len_kv if asked.varlen else None,
        bias_grad=asked.bias_grad,
        precision="tf32" if asked.dtype == TF32.name else "full",
        num_splits=asked.num_splits,
        captured_grad=asked.captured_grad,
        tangents="no" if asked.tangents is None else "too",
    )
    written = {name: traced(name, getattr(asked, name)) for name in ("score_mod", "mask_mod")}
    options = options.replace(**{name: x.mod for name, x in written.items() if x is not None})
    problem = check.problem_of(direction, options, _views(asked, options, q, k, v))
    if asked.block_mask is not None:  # of which the lists decide nothing here
        block = create_block_mask(len_q=1, len_kv=1, block_size=asked.block_mask)
        problem = replace(problem, block_mask=Blocks(block.block_size, block.tested.mod, block.batch, block.heads))
    rows = asked.batch * (len_q * heads_q + len_kv * heads_kv)
    nbytes = rows * (dim_qk + dim_v) * problem.dtype.itemsize * (2 if asked.backward or asked.tangents else 1)
    return Asked(problem, family, problem.flops(), nbytes)


def _refuse_idle(asked: _Options, banded: bool, heads_kv: int, len_kv: int, dim_qk: int, dim_v: int) -> None:
    """Refuse options that were written and would not act."""
    bias = asked.bias or ""
    for acts, options, goes_with in (
        (asked.causal or banded, ["--top-left"], "--causal or --window"),
        (asked.bias is not None, ["--bias-dtype", "--bias-grad"], "--bias"),
        (asked.score_mod is not None, ["--captured-grad"], "--score-mod"),
        (asked.backward, ["--bias-grad", "--captured-grad", "--deterministic"], "--backward"),
        (asked.dropout != 0, ["--dropout-scheme"], "--dropout"),
        (not asked.backward, ["--num-splits", "--tangents", "--shared-kv"], "the forward alone, without --backward"),
        (dim_v <= dim_qk, ["--shared-kv"], "a --dim with no more columns of values than of keys"),
        (heads_kv > 1, ["--reversed"], "several heads"),
        (len_kv > 1 and "k" in bias, ["--bias-apart"], "a --bias along several keys"),
    ):
        if not acts and (idle := [option for option in options_written() if option in options]):
            raise InvalidArgument(f"{idle[0]} does nothing here; it goes with {goes_with}.")


def _views(
    asked: _Options, options: Options, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> dict[str, View]:
    """The arrays of such a call; q, k and v are the shapes of dense ones."""
    dtype, place = KINDS[asked.dtype], _Places(int(asked.copy_bytes))
    int32, fp32 = np.dtype(np.int32), np.dtype(np.float32)
    batch, len_q, heads_q, _ = q
    scores = (batch, heads_q, len_q, k[1])
    views = {}
    if asked.page_size is not None:
        pages = -(-k[1] // asked.page_size)
        k, v = ((batch * pages, asked.page_size, *shape[2:]) for shape in (k, v))
        views["table"] = place("block_table", (batch, pages), int32)
    elif asked.varlen:
        k, v = ((batch * shape[1], *shape[2:]) for shape in (k, v))
    if asked.varlen:
        q = (batch * len_q, *q[2:])
        lengths = {"cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_kv": "cu_seqlens_k"}
        views |= {name: place(word, (batch + 1,), int32) for name, word in lengths.items()}
    views |= {name: place(name, shape, dtype.numpy) for name, shape in (("q", q), ("k", k), ("v", v))}
    if asked.shared_kv:
        views["v"] = _first_columns(views["k"], v[-1])
    if asked.reversed:
        views |= {name: _turned(views[name]) for name in ("k", "v")}
    if asked.mask:
        views["mask"] = place("attn_mask", scores, np.dtype(bool))
    if asked.alibi:
        views["alibi"] = place("alibi_slopes", (heads_q,), fp32)
    if asked.bias is not None:
        bias = place("attn_bias", _along(asked.bias, scores), KINDS[asked.bias_dtype or asked.dtype].numpy)
        views["bias"] = _spread(bias) if asked.bias_apart else bias
    operands = [x for mod in (options.score_mod, options.mask_mod) if mod is not None for x in mod.operands]
    for i, operand in enumerate(operands):
        views[f"captured{i}"] = place(options.name(f"captured{i}"), (1,) * operand.ndim, operand.dtype)
    if asked.sink:
        views["sink"] = place("sink", (heads_q,), fp32)
    if asked.tangents is not None:
        moved = _changing(asked, views)
        views |= {check.TANGENT + name: place(f"d{name}", x.shape, np.dtype(x.dtype)) for name, x in moved}
    if asked.backward:
        shapes = check.shapes(options, views)
        views |= {name: place(name, shapes[name], dtype.numpy) for name in ("out", "dout")}
        views["lse"] = place("lse", shapes["lse"], dtype.accumulator)
        if asked.dropout:
            views["rng_state"] = place("rng_state", shapes["rng_state"], np.dtype(np.uint64))
    return views


def _changing(asked: _Options, views: dict[str, View]) -> list[tuple[str, View]]:
    """The arrays that --tangents names."""
    names = (asked.tangents or "").split(",")
    if wrong := [name for name in names if name not in Tangents._fields[:5] or name not in views]:
        raise InvalidArgument(
            f"--tangents {asked.tangents!r} has {wrong[0]!r}; expected some of q, k, v, and of bias and sink those "
            "that are given, with commas between them."
        )
    return [(name, views[name]) for name in names]


def _along(axes: str, scores: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a bias that is broadcast along all axes but these."""
    if not axes or set(axes) - set(_AXES):
        raise InvalidArgument(f"--bias {axes!r} is not understood; expected some of the letters {_AXES}.")
    return tuple(size if axis in axes else 1 for axis, size in zip(_AXES, scores, strict=True))


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


def _first_columns(view: View, dim: int) -> View:
    """So many columns of the same array, as an argument called v."""
    return view._replace(name="v", shape=(*view.shape[:-1], dim))


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
