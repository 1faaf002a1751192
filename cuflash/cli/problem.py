"""A problem from the command line: a case id, or one option for each property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer

from cuflash import dtypes, masks
from cuflash.bench.cases import CASES, Case, select, widest_copy
from cuflash.device import Device, current, named
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.problem import MAX_SPLITS, Problem

Show = Callable[[Case, Device], None]


def register(app: typer.Typer, name: str, show: Show, text: str) -> None:
    """Add a command that shows something about one problem on one device."""

    def command(
        case: Annotated[str | None, typer.Argument(help="A case id; the options below then do not apply.")] = None,
        dtype: Annotated[str, typer.Option(help="fp16, bf16, fp32 or fp64.")] = "bf16",
        batch: Annotated[int, typer.Option(min=0)] = 2,
        heads: Annotated[str, typer.Option(help="Query heads, or query/key heads: 16/4.")] = "16",
        length: Annotated[str, typer.Option("--len", help="Rows, or query x key rows: 1024x4096.")] = "4096",
        dim: Annotated[str, typer.Option(help="Head size, or key x value head size: 192x128.")] = "128",
        causal: Annotated[bool, typer.Option("--causal")] = False,
        top_left: Annotated[bool, typer.Option("--top-left", help="Align the mask with the first key.")] = False,
        window: Annotated[str, typer.Option(help="Keys left and right of the diagonal, -1 is unbounded.")] = "-1,-1",
        mask: Annotated[bool, typer.Option("--mask", help="A boolean mask tensor.")] = False,
        softcap: Annotated[float, typer.Option(min=0)] = 0.0,
        scale: Annotated[float | None, typer.Option(help="softmax_scale; 1/sqrt(dim) if not given.")] = None,
        varlen: Annotated[bool, typer.Option("--varlen", help="Packed sequences, each of the full length.")] = False,
        page_size: Annotated[int, typer.Option(min=0, help="With --varlen: keys lie in pages of so many.")] = 0,
        backward: Annotated[bool, typer.Option("--backward")] = False,
        deterministic: Annotated[bool, typer.Option("--deterministic", help="Bit-equal gradients.")] = False,
        num_splits: Annotated[
            int, typer.Option(min=0, max=MAX_SPLITS, help="Blocks that share a query's keys; 0: as the plan likes.")
        ] = 0,
        copy_bytes: Annotated[int, typer.Option(help="What pointers and strides are aligned to.")] = 16,
        family: Annotated[str | None, typer.Option(help="Hold the planner to one kernel family.")] = None,
        device: Annotated[str | None, typer.Option(help="h100, sm_86 ...; this machine's GPU if not given.")] = None,
    ) -> None:
        target = _device(device)
        if case is not None:
            if case not in CASES:
                near = ", ".join(found.id for found in select(case)[:5])
                raise InvalidArgument(f"case {case!r} is not an id; expected one id, for example: {near}.")
            show(CASES[case], target)
            return
        heads_q, heads_kv = _pair("heads", heads, "/")
        len_q, len_kv = _pair("len", length, "x")
        dim_qk, dim_v = _pair("dim", dim, "x")
        left, right = _pair("window", window, ",")
        if dtype not in dtypes.DTYPES:
            raise InvalidArgument(f"--dtype {dtype!r} is not an element type; expected {', '.join(dtypes.DTYPES)}.")
        if heads_kv < 1 or heads_q % heads_kv:
            raise InvalidArgument(f"--heads {heads!r}: query heads must be a multiple of key heads.")
        if mask and (causal or (left, right) != (-1, -1)):
            raise InvalidArgument("--mask decides alone; give it without --causal and --window.")
        if page_size and not varlen:
            raise InvalidArgument("--page-size is for packed queries; give --varlen too.")
        alignment = "top-left" if top_left else "bottom-right"
        element = dtypes.DTYPES[dtype]
        problem = Problem(
            direction="backward" if backward else "forward",
            dtype=element,
            batch=batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            len_q=len_q,
            len_kv=len_kv,
            dim_qk=dim_qk,
            dim_v=dim_v,
            mask=Mask(tensor=True) if mask else masks.band(causal, (left, right), alignment).clipped(len_q, len_kv),
            softcap=softcap,
            softmax_scale=dim_qk**-0.5 if scale is None else scale,
            deterministic=deterministic,
            num_splits=0 if backward else num_splits,
            copy_bytes=widest_copy(element.itemsize, (dim_qk, dim_v), copy_bytes),
        )
        lens: tuple[tuple[int, ...], ...] = ((), ())
        if varlen:
            lens = ((len_q,) * batch, (len_kv,) * batch)
            rows = -(-len_kv // page_size) * page_size if page_size else len_kv
            totals = {"total_q": batch * len_q, "total_kv": batch * rows}
            problem = replace(problem, layout="varlen", page_size=page_size, **totals)
        show(Case(str(problem), family, problem, *lens), target)

    app.command(name, help=text)(command)


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
