"""``support``: what every public function takes and every kernel family runs, asked of signatures and the catalogue."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

import cuflash
from cuflash.bench.report import markdown_table
from cuflash.device import NAMED, Device
from cuflash.dtypes import KINDS
from cuflash.errors import InvalidArgument
from cuflash.features import FEATURES, PLAIN
from cuflash.masks import Mask
from cuflash.plan import FAMILIES, Family
from cuflash.problem import Direction, Problem

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
"""A file that is there."""

GROUPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "flash_attn_*": (
        cuflash.flash_attn_func,
        cuflash.flash_attn_varlen_func,
        cuflash.flash_attn_with_kvcache,
        cuflash.flash_attn_backward,
    ),
    "scaled_dot_product_attention": (cuflash.scaled_dot_product_attention,),
    "mha_*": (cuflash.mha_fwd, cuflash.mha_varlen_fwd, cuflash.mha_bwd, cuflash.mha_varlen_bwd),
    "mha_*_ck": (cuflash.mha_fwd_ck, cuflash.mha_varlen_fwd_ck, cuflash.mha_bwd_ck, cuflash.mha_varlen_bwd_ck),
    "mem_eff_*": (cuflash.mem_eff_forward, cuflash.mem_eff_backward),
    "efficient_attention_*": (cuflash.efficient_attention_forward, cuflash.efficient_attention_backward),
}
"""The columns of the table; what other public functions take follows from these."""

FLASH, SDPA, MHA, CK, MEM_EFF, EFFICIENT = GROUPS
ALL = tuple(GROUPS)


class Row(NamedTuple):
    """One feature: where it is asked for, and what runs it."""

    what: str
    """A key of :data:`FEATURES`, or words of its own."""
    arguments: tuple[str, ...] = ()
    """What functions call the argument, the first that a function has."""
    where: frozenset[str] = frozenset()
    """Which functions of a group have it: ``forward``, ``backward``, ``packed`` or ``cached`` alone; all when empty."""
    always: tuple[str, ...] = ()
    """Groups that need no argument for it."""
    but: tuple[str, ...] = ()
    """Groups in which such an argument means something else."""
    instead: str = ""
    """What there is in place of an argument of ``flash_attn_*``, where these have none."""
    problem: Problem = PLAIN
    """What kernel families are asked about, where :data:`FEATURES` does not say."""
    dtypes: tuple[str, ...] = ()
    """In which types; in each of its own when empty."""
    runs_on: Literal["both", "kernels"] = "both"


FORWARD, BACKWARD, PACKED, CACHED = (frozenset([word]) for word in ("forward", "backward", "packed", "cached"))
_WINDOW = ("window_size", "window_size_left")
_WIDE = replace(PLAIN, dim_qk=1024, dim_v=1024)

ROWS: tuple[Row, ...] = (
    Row("fp16 and bf16", always=ALL, dtypes=("fp16", "bf16")),
    Row("fp32", always=ALL, dtypes=("fp32",)),
    Row("fp32 in products of TF32", ("precision",), dtypes=("tf32",)),
    Row("fp64", always=ALL, dtypes=("fp64",)),
    Row("every head dimension up to 256", always=ALL, dtypes=("fp16", "bf16"),  # in fp32 where there is room
        problem=replace(PLAIN, dim_qk=255, dim_v=255, copy_bytes=2)),
    Row("head dimensions up to 1024", always=ALL, problem=_WIDE),
    Row("head dimensions above 1024", always=ALL, problem=replace(_WIDE, dim_qk=1025, dim_v=1025)),
    Row("dim_v != dim_qk", always=ALL),
    Row("gqa", ("enable_gqa",), always=ALL),
    Row("unaligned rows", always=ALL),
    Row("zero or negative strides", always=ALL),
    Row("empty batches, no queries, no keys, rows that see no key", always=ALL),
    Row("causal", ("causal", "is_causal", "custom_mask_type")),
    Row("masks aligned top-left", ("alignment", "custom_mask_type", "is_causal"), but=(MHA, CK, MEM_EFF)),
    Row("window", _WINDOW),
    Row("gradients of a window where len_q != len_kv", _WINDOW, BACKWARD, problem=replace(
        PLAIN, mask=Mask(left=8, right=0), len_q=40)),
    Row("boolean mask", ("attn_mask",)),
    Row("softcap", ("softcap",)),
    Row("soft cap and dropout together", ("softcap",), problem=replace(PLAIN, softcap=30.0, dropout="byte")),
    Row("alibi", ("alibi_slopes", "alibi_slopes_")),
    Row("bias", ("attn_bias", "attn_bias_", "bias", "attn_mask")),
    Row("bias gradient", ("bias_grad", "bias_requires_grad"), BACKWARD),
    Row("written score", ("score_mod",)),
    Row("written mask", ("mask_mod",)),
    Row("block mask", ("block_mask",)),
    Row("captured gradient", ("captured_grad",), BACKWARD),
    Row("sink", ("sink",)),
    Row("dropout", ("dropout_p", "p_dropout")),
    Row("dropout by 32 bits, as PyTorch's memory-efficient kernels draw it", ("dropout_scheme",), always=(EFFICIENT,),
        problem=replace(PLAIN, dropout="word")),
    Row("dropout from a generator of your own", ("generator", "gen_"), FORWARD),
    Row("seed and offset returned", ("return_rng_state",), FORWARD, always=(MHA, CK, MEM_EFF, EFFICIENT)),
    Row("seed and offset given to the gradients", ("rng_state", "philox_seed"), BACKWARD),
    Row("probabilities, and which were dropped", ("return_attn_probs", "return_softmax", "return_dropout_randval"),
        FORWARD),
    Row("varlen", ("cu_seqlens_q",), PACKED),
    Row("how many keys of a sequence are in use", ("seqused_k", "seqused_k_", "seqlen_k"), PACKED),
    Row("longest lengths given, or None to read them", ("max_seqlen_q",), PACKED),
    Row("paged", ("block_table", "block_table_"), PACKED | FORWARD),
    Row("values of cu_seqlens and the like checked on a GPU", ("validate",), PACKED, runs_on="kernels"),
    Row("what rows of no sequence hold", ("zero_tensors",), PACKED, instead="output and gradients 0, log-sum-exp −∞"),
    Row("output written into your array", ("out", "out_"), FORWARD),
    Row("log-sum-exp returned", ("return_lse", "compute_log_sumexp"), FORWARD, always=(MHA, CK, MEM_EFF)),
    Row("results as PyTorch's older CUDA and its ROCm functions lay them out", ("convention",), always=(CK, MEM_EFF),
        instead="one layout"),
    Row("backward", where=BACKWARD, always=(FLASH, MHA, CK, MEM_EFF, EFFICIENT)),
    Row("gradient of the log-sum-exp taken in", ("dlse",), BACKWARD),
    Row("gradients written into your arrays", ("dq", "dq_"), BACKWARD),
    Row("gradients as slices of one new array", ("shared_storage_dqdkdv",), BACKWARD,
        instead="`dq`, `dk` and `dv` may be slices"),
    Row("row sums of dout * out returned", where=BACKWARD, always=(MHA, CK), instead="not returned"),
    Row("tangents", where=FORWARD, always=(FLASH,), dtypes=("fp16", "bf16")),  # in fp32 on simt
    Row("deterministic", ("deterministic",), BACKWARD),
    Row("number of key splits of the gradients", ("num_splits_key",), BACKWARD, instead="`deterministic` is one"),
    Row("split keys", ("num_splits",), FORWARD, always=(SDPA, MHA, CK, MEM_EFF, EFFICIENT), runs_on="kernels"),
    Row("query heads of one key head packed into a tile when queries are few", where=FORWARD, always=ALL,
        problem=replace(PLAIN, len_q=9, heads_q=4, heads_kv=1, num_splits=0), runs_on="kernels"),
    Row("a cache whose lengths the GPU alone knows, with left padding, dense or in pages", ("cache_seqlens",),
        CACHED, problem=replace(PLAIN, layout="cache", len_q=1)),
    Row("keys appended to it in place, and turned by rotary embeddings", ("rotary_cos",), CACHED,
        problem=replace(PLAIN, layout="cache", len_q=1, appended=1)),
    Row("kernels by preference", ("backend",), runs_on="kernels", instead="the planner chooses, `explain` says what"),
    Row("capture in a CUDA graph", always=ALL, runs_on="kernels"),
)  # fmt: skip


@click.command(
    "support",
    short_help="Print which functions take and which kernels run what.",
    help="Print the support table as Markdown: feature x kernel family x public function.",
)
@click.option("--write", type=FILE, help="Put the table between this file's markers.")
def command(write: Path | None) -> None:
    """Print or write the table."""
    if write is None:
        print(table())
    else:
        write_between(write, "support-table", table())


def table() -> str:
    """The kernel families, and a line for each row."""
    families = [f"- {_described(family)}" for family in FAMILIES]
    families.append("- NumPy: every type and head dimension, on the CPU.")
    header = ["", "runs on", *(f"`{name}`" for name in GROUPS)]
    lines = [[_words(row), families_of(row), *(cell(row, group) for group in GROUPS)] for row in ROWS]
    return "\n".join([*families, "", markdown_table(header, lines, numbers=False)]) + "\n"


def cell(row: Row, group: str) -> str:
    """How the functions of a group take a row: the argument's name in the first of them, or that they need none."""
    if names := [name for name in taken(row, group).values() if name]:
        return f"`{names[0]}`"
    if group in row.always:
        return "✓"
    return row.instead if group == FLASH and row.instead else "–"


def taken(row: Row, group: str) -> dict[str, str | None]:
    """What every function of a group that a row is about calls the argument; None where it has none."""
    arguments = {}
    for function in GROUPS[group]:
        parameters = inspect.signature(function).parameters
        kinds = {"backward" if {"dout", "grad_out_"} & parameters.keys() else "forward"}
        kinds |= {"packed"} if "cu_seqlens_q" in parameters else set()
        kinds = {"cached"} if "k_cache" in parameters else kinds
        if row.where <= kinds and ("cached" in row.where) == ("cached" in kinds):
            names = [] if group in row.but else [name for name in row.arguments if name in parameters]
            arguments[function.__name__] = names[0] if names else None
    return arguments


def _words(row: Row) -> str:
    return f"{row.what}: {FEATURES[row.what].words}" if row.what in FEATURES else row.what


def _described(family: Family) -> str:
    """What a family is, and the first architecture, of those known by name, that runs it."""
    dtypes = f"{', '.join(family.dtypes[:-1])} and {family.dtypes[-1]}"
    where = _devices(family)[0].arch + (" alone" if family.only else " and newer")
    directions = "" if family.backward else "; forward only"
    return f"`{family.name}`: {family.summary}; {dtypes}, head dimensions up to {family.max_dim}, {where}{directions}."


def _devices(family: Family) -> list[Device]:
    """The devices known by name that run a family, the oldest architecture first."""
    plain = replace(PLAIN, dtype=KINDS[family.dtypes[0]])
    devices = [device for device in NAMED.values() if not family.why_not(plain, device)]
    return sorted(devices, key=lambda device: device.capability)


def families_of(row: Row) -> str:
    """The families that run a row, and the NumPy backend."""
    if all(cell(row, group) in ("–", row.instead) for group in GROUPS):
        return "–"
    names = [f"`{family.name}`" for family in FAMILIES if _runs(family, row)]
    if row.runs_on == "kernels":
        return ", ".join(names)
    return "all" if len(names) == len(FAMILIES) else ", ".join([*names, "NumPy"])


def _runs(family: Family, row: Row) -> bool:
    """Whether a family runs a row in each of its directions that the row is about, on the newest of its devices."""
    problem = FEATURES[row.what].example if row.what in FEATURES else row.problem
    both = {"forward"} if row.where & CACHED else {"forward", "backward"}
    asked = row.where & both or both
    has: tuple[Direction, ...] = ("backward", "forward") if family.backward else ("forward",)
    directions = [direction for direction in has if direction in asked]
    dtypes = [KINDS[name] for name in row.dtypes or family.dtypes]
    problems = [replace(problem, direction=direction, dtype=dtype) for direction in directions for dtype in dtypes]
    return bool(problems) and not any(family.why_not(problem, _devices(family)[-1]) for problem in problems)


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
