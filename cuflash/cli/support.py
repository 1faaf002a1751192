"""``support``: what every kernel family runs, asked of the catalogue problem by problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cuflash.bench.report import markdown_table
from cuflash.device import NAMED, Device
from cuflash.dtypes import BF16, DTYPES
from cuflash.errors import InvalidArgument
from cuflash.masks import Mask
from cuflash.plan import FAMILIES, Family
from cuflash.plan.families import FEATURES
from cuflash.problem import Problem

_PLAIN = Problem("forward", BF16, batch=1, heads_q=4, heads_kv=4, len_q=64, len_kv=64, dim_qk=64, dim_v=64)

PROBES: dict[str, Problem] = {
    "backward": replace(_PLAIN, direction="backward"),
    "varlen": replace(_PLAIN, layout="varlen", total_q=64, total_kv=64),
    "paged": replace(_PLAIN, layout="varlen", total_q=64, total_kv=64, page_size=16),
    "causal": replace(_PLAIN, mask=Mask(right=0)),
    "window": replace(_PLAIN, mask=Mask(left=8, right=0)),
    "boolean mask": replace(_PLAIN, mask=Mask(tensor=True)),
    "softcap": replace(_PLAIN, softcap=30.0),
    "alibi": replace(_PLAIN, alibi=True),
    "bias": replace(_PLAIN, bias=BF16),
    "bias gradient": replace(_PLAIN, bias_grad=True),
    "sink": replace(_PLAIN, sink=True),
    "dropout": replace(_PLAIN, dropout="byte"),
    "gqa": replace(_PLAIN, heads_kv=1),
    "dim_v != dim_qk": replace(_PLAIN, dim_v=32),
    "deterministic": replace(_PLAIN, deterministic=True),
}
"""A problem that needs one feature and nothing else."""


def support(
    write: Annotated[Path | None, typer.Option(help="Put the table between this file's markers.")] = None,
) -> None:
    """Print the support table as Markdown: feature x family x dtype x architecture."""
    if write is None:
        typer.echo(table())
    else:
        write_between(write, "support-table", table())


def table() -> str:
    """The support table; a cell lists the element types."""
    devices = sorted(NAMED.values(), key=lambda device: device.capability)
    header = ["", *(_title(family, devices) for family in FAMILIES), "NumPy backend"]
    everywhere = " ".join(DTYPES)
    lines = [["forward", *(_dtypes(family, _PLAIN, devices[-1]) for family in FAMILIES), everywhere]]
    for feature, words in FEATURES.items():
        cells = (_dtypes(family, PROBES[feature], devices[-1]) for family in FAMILIES)
        lines.append([f"{feature}: {words}", *cells, everywhere])
    lines.append(["largest head dimension", *(str(family.max_dim) for family in FAMILIES), "any"])
    return markdown_table(header, lines, numbers=False) + "\n"


def _title(family: Family, devices: list[Device]) -> str:
    """The family and the first architecture, of those known by name, that runs it."""
    dtype = DTYPES[family.dtypes[0]]
    first = next(device for device in devices if not family.why_not(replace(_PLAIN, dtype=dtype), device))
    return f"`{family.name}` ({first.arch} and newer)"


def _dtypes(family: Family, problem: Problem, device: Device) -> str:
    """The element types in which a family runs a problem."""
    found = [name for name, dtype in DTYPES.items() if not family.why_not(replace(problem, dtype=dtype), device)]
    return " ".join(found) or "–"


def write_between(path: Path, marker: str, content: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->`` in a file.

    Raises
    ------
    InvalidArgument
        If the file does not have each marker once.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InvalidArgument(f"{path} must have {begin} and {end} once each; add them where the table belongs.")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{content}{end}{tail}", encoding="utf-8")
