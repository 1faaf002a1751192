"""Random problems around the cases of the table: the kernels stay those of the case, everything they read varies.

What is compiled into a kernel is kept: direction, element type, head sizes, layout, kinds of mask and score, dropout's
scheme and the width of accesses. The rest is drawn: batch, heads, lengths and where sequences lie, window sides,
numbers, pages, splits of keys, and how tensors broadcast or are turned round. Mask sides stay within the sequences, as
wider ones would be another kind of mask; where keys may be split, queries stay few and heads grouped or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np

from cuflash.cases.inputs import taking_part
from cuflash.cases.table import Case
from cuflash.dropout import Dropout
from cuflash.masks import Alignment, Mask
from cuflash.problem import MAX_SPLITS, Problem


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a problem may be drawn."""

    pairs: int
    """Of a query and a key, over all heads and the longest sequences of a batch."""
    elements: int
    """Of one tensor."""
    length: int
    """Of a sequence."""


GPU = Limits(pairs=2**22, elements=2**20, length=4096)
HOST = Limits(pairs=2**15, elements=2**15, length=512)


class Turn(NamedTuple):
    """What is odd about an axis of a tensor."""

    axis: int
    """-2 for heads, -3 for rows, -4 for batch elements or pages."""
    expanded: bool
    """All along it is one; else it lies in memory the other way round."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One random problem; its arrays follow from the same seed and number (:mod:`cuflash.verify.surroundings`)."""

    seed: int
    number: int
    case: Case
    """The case it was drawn around, with the problem that came of it."""
    turns: dict[str, Turn] = field(default_factory=dict)
    """Of those tensors whose strides are not all positive."""
    mask_broadcast: tuple[bool, bool, bool, bool] = (False, False, False, False)
    """Along which of (batch, heads_q, len_q, len_kv) the boolean mask is broadcast."""
    alibi_batched: bool = False
    """A slope for each head of each batch element, not for each head alone."""
    unbiased: bool = False
    rng_state: tuple[int, int] | None = None
    """Philox seed and offset of dropout."""
    dlse: bool = False
    """Backward: lse has an upstream gradient too."""
    empty_lse: float = -math.inf
    """How the backward is told of a row that sees nothing; either infinity says it."""

    @property
    def dropout(self) -> Dropout | None:
        """What happens to probabilities after the softmax."""
        return self.case.dropout(self.unbiased)

    def taking_part(self, side: str) -> np.ndarray:
        """Which rows of "q" or "kv" belong to a sequence that uses them: (total,), or (page, row), booleans."""
        return taking_part(self.case, side, self.block_table() if self.case.problem.page_size else None)

    def block_table(self) -> np.ndarray:
        """The pages of each sequence, (batch, max_pages) int32, with numbers of none behind the last."""
        case, num_pages = self.case, self.case.problem.total_kv // self.case.problem.page_size
        rng, needed = np.random.default_rng([self.seed, self.number, 2]), sum(case.pages)
        order = rng.permutation(num_pages) if needed <= num_pages else rng.integers(num_pages, size=needed)
        width = max(case.pages) + int(rng.choice([0, 0, 1, 5]))
        table = rng.choice([-(2**31), -1, num_pages, 2**31 - 1], (len(case.pages), width)).astype(np.int32)
        for row, end, count in zip(table, accumulate(case.pages), case.pages, strict=True):
            row[:count] = order[end - count : end]
        return table

    def generator(self) -> np.random.Generator:
        """Random numbers for the arrays, alike each time."""
        return np.random.default_rng([self.seed, self.number, 1])

    def __str__(self) -> str:
        """Everything but the arrays' strides, in a few lines."""
        case, problem, mask = self.case, self.case.problem, self.case.problem.mask
        parts = [f"{problem} scale {problem.softmax_scale!r} copies of {problem.copy_bytes} bytes"]
        parts += [f"{mask.alignment} window ({mask.left}, {mask.right})"]
        parts += [f"softcap {problem.softcap!r}"] if problem.softcap else []
        if problem.layout == "varlen":
            parts += [f"lens_q {case.lens_q} of {problem.total_q} rows, lens_kv {case.lens_kv} of {problem.total_kv}"]
            parts += [f"seqused_q {case.seqused_q}"] if case.seqused_q else []
            parts += [f"seqused_kv {case.seqused_kv}"] if case.seqused_kv else []
        parts += [f"{case.pages} of {problem.total_kv // problem.page_size} pages"] if problem.page_size else []
        parts += [f"axis {axis} of {name} {_ODD[expanded]}" for name, (axis, expanded) in self.turns.items()]
        parts += [f"mask broadcast {self.mask_broadcast}"] if mask.tensor else []
        parts += [f"bias broadcast {problem.bias_broadcast}"] if problem.bias else []
        parts += ["slopes of each batch element"] if self.alibi_batched else []
        parts += [f"{self.dropout} from {self.rng_state}"] if problem.dropout else []
        parts += [f"dlse {self.dlse}, empty rows {self.empty_lse}"] if problem.direction == "backward" else []
        return "\n".join(parts)


_ODD = {False: "turned round", True: "expanded"}


def shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a call by name."""
    rows_q: tuple[int, ...] = (problem.batch, problem.len_q)
    rows_kv: tuple[int, ...] = (problem.batch, problem.len_kv)
    if problem.layout == "varlen":
        rows_q, rows_kv = (problem.total_q,), (problem.total_kv,)
    if problem.page_size:
        rows_kv = (problem.total_kv // problem.page_size, problem.page_size)
    q, k = (*rows_q, problem.heads_q, problem.dim_qk), (*rows_kv, problem.heads_kv, problem.dim_qk)
    v, out = (*k[:-1], problem.dim_v), (*q[:-1], problem.dim_v)
    forward: dict[str, tuple[int, ...]] = {"q": q, "k": k, "v": v, "out": out}
    return forward if problem.direction == "forward" else forward | {"dout": out, "dq": q, "dk": k, "dv": v}


def draw(cases: list[Case], seed: int, number: int, limits: Limits) -> Draw:
    """The draw with this number; its case is taken in turn, so that one case alone gives the same draw again."""
    order = np.random.default_rng([seed, len(cases)]).permutation(len(cases))
    case = cases[order[number % len(cases)]]
    rng = np.random.default_rng([seed, number, 0])
    sized = _packed if case.problem.layout == "varlen" else _dense
    drawn = sized(case, rng, limits)
    # Nothing to hide would be another kind of mask, and a bias of one row or column another way to read it.
    while (case.problem.mask.kind != "none" and not _reach(drawn)) or (
        _copies_bias(case) and 1 in (drawn.problem.len_q, drawn.problem.len_kv)
    ):
        drawn = sized(case, rng, limits)
    problem, turns = drawn.problem, _turns(drawn, rng)
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    problem = replace(
        problem,
        ascending=not turns,
        num_splits=_num_splits(rng) if _shares_keys(problem) else problem.num_splits,
        mask=_mask(drawn, rng),
        softcap=float(np.exp(rng.uniform(-1, 3))) if problem.softcap else 0.0,
        softmax_scale=_scale(case, rng),
        bias_broadcast=_bias_broadcast(case, rng, shape),
        bias_boxes=problem.bias_boxes and (not problem.bias or _copies_bias(case) or bool(rng.random() < 0.5)),
    )
    # Some of what Hopper's kernels have cases of is left to others: short sequences, pages of odd sizes.
    family = ("sm90", "sm80", "simt") if case.family == "sm90" else case.family
    return Draw(
        seed,
        number,
        replace(drawn, family=family, problem=problem, dropout_p=_probability(rng) if problem.dropout else 0.0),
        turns=turns,
        mask_broadcast=_broadcast(rng, shape),
        alibi_batched=problem.alibi and bool(rng.random() < 0.5),
        unbiased=problem.dropout is not None and bool(rng.random() < 0.5),
        rng_state=_rng_state(rng) if problem.dropout else None,
        dlse=bool(rng.random() < 0.5),
        empty_lse=float(rng.choice([-np.inf, np.inf])),
    )


def _dense(case: Case, rng: np.random.Generator, limits: Limits) -> Case:
    batch, heads_q, heads_kv = _planes(case, rng, limits)
    len_q, len_kv = _two_lengths(case, rng, limits, (batch, heads_q, heads_kv))
    problem = replace(case.problem, batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q, len_kv=len_kv)
    return replace(case, problem=problem)


def _packed(case: Case, rng: np.random.Generator, limits: Limits) -> Case:
    batch, heads_q, heads_kv = _planes(case, rng, limits)
    sizes: dict[str, Any] = {}
    lens: list[tuple[int, ...]] = []
    used: list[tuple[int, ...]] = []
    most_tail = limits.elements // (heads_q * max(case.problem.dim_qk, case.problem.dim_v))
    for side, longest in zip(("q", "kv"), _two_lengths(case, rng, limits, (batch, heads_q, heads_kv)), strict=True):
        counts = [0 if rng.random() < 0.15 else _length(rng, longest) for _ in range(batch)]
        tail = min(int(rng.choice([0, 0, 1, int(rng.integers(100))])), most_tail)
        room = int(rng.choice([0, 0, longest - max(counts)]))  # max_seqlen may be more than the longest
        lens.append(tuple(counts))
        part = tuple(int(rng.choice([0, n, int(rng.integers(n + 1))], p=(0.1, 0.3, 0.6))) for n in counts)
        used.append(part if rng.random() < 0.4 else ())
        most = max(used[-1] or counts) if rng.random() < 0.5 else max(counts)  # or the longest that is used
        sizes |= {f"len_{side}": most + room, f"total_{side}": sum(counts) + tail}
    problem = replace(case.problem, batch=batch, heads_q=heads_q, heads_kv=heads_kv, **sizes)
    drawn = Case(case.id, case.family, problem, lens[0], lens[1], used[0], used[1])
    return _in_pages(drawn, rng, limits) if problem.page_size else drawn


def _in_pages(case: Case, rng: np.random.Generator, limits: Limits) -> Case:
    """Pages of any size: enough for each sequence to have its own, or so few that sequences share them."""
    problem = case.problem
    room = limits.elements // (problem.heads_kv * max(problem.dim_qk, problem.dim_v))
    size = min(room, int(rng.choice([1, 16, 48, int(rng.integers(1, 301)), _log_uniform(rng, 300)])))
    if case.family == "sm90":  # whose kernels have as a constant what a page and a tile have in common
        common = math.gcd(problem.page_size, 128)
        size = common * (size // common // 2 * 2 + 1)
    case = replace(case, problem=replace(problem, page_size=size))
    needed = sum(case.pages)
    count = needed + int(rng.choice([0, 1, 7])) if rng.random() < 0.7 else _log_uniform(rng, max(needed, 1))
    return replace(case, problem=replace(case.problem, total_kv=min(count, max(1, room // size)) * size))


def _shares_keys(problem: Problem) -> bool:
    """Whether blocks may share the keys of a query, or heads a tile: both only pay where queries are few."""
    return problem.direction == "forward" and problem.num_splits != 1


def _num_splits(rng: np.random.Generator) -> int:
    """Any number but 1, with which neither keys nor tiles are shared."""
    return 0 if rng.random() < 0.3 else max(2, _log_uniform(rng, MAX_SPLITS))


def _turns(case: Case, rng: np.random.Generator) -> dict[str, Turn]:
    """Now and then an axis of a tensor, but not for kernels that take none of them."""
    turns, problem = {}, case.problem
    for name, shape in shapes(problem).items():
        axes = [axis for axis in range(-len(shape), -1) if shape[axis] > 1]
        if case.family == "sm90" or not axes or 0 in shape or rng.random() > 0.1:
            continue
        if name == "v" and problem.shared_kv:  # as the keys whose columns it is
            continue
        axis = int(rng.choice(axes))
        # Packed rows and pages are those of different sequences, of which some are not in use.
        expandable = name in ("q", "k", "v", "dout") and (axis == -2 or problem.layout == "dense")
        turns[name] = Turn(axis, expandable and bool(rng.random() < 0.4))
    return turns


def _planes(case: Case, rng: np.random.Generator, limits: Limits) -> tuple[int, int, int]:
    """batch, heads_q and heads_kv."""
    most, heads_kv, group = 12, _log_uniform(rng, 8), int(rng.choice([1, 1, 1, 2, 3, 4, 8]))
    if _shares_keys(case.problem):  # few blocks, of long sequences
        most, heads_kv = 3, _log_uniform(rng, 2)
        group = int(rng.choice([2, 3, 4, 7, 8])) if case.problem.group > 1 else 1
    batch = _log_uniform(rng, 200 if rng.random() < 0.1 else most)
    room = limits.elements // max(case.problem.dim_qk, case.problem.dim_v)
    heads_kv = min(heads_kv, room)
    group = min(group, room // heads_kv)
    return min(batch, room // (heads_kv * group)), heads_kv * group, heads_kv


def _two_lengths(case: Case, rng: np.random.Generator, limits: Limits, planes: tuple[int, int, int]) -> tuple[int, int]:
    """The longest sequences of queries and keys; `planes` are batch, heads_q and heads_kv."""
    planes_q, planes_kv = planes[0] * planes[1], planes[0] * planes[2]
    room = limits.elements // max(case.problem.dim_qk, case.problem.dim_v)
    most = min(limits.length, room // planes_q)
    if _shares_keys(case.problem):
        few = min(most, _log_uniform(rng, 16))
        most = min(limits.length, room // planes_kv, limits.pairs // (planes_q * few))
        return few, max(_length(rng, most), _length(rng, most))
    first = _length(rng, most)
    second = first if rng.random() < 0.2 else _length(rng, most)
    second = min(second, max(1, limits.pairs // (planes_q * max(first, 1))))
    return (first, second) if rng.random() < 0.5 else (second, first)


def _length(rng: np.random.Generator, most: int) -> int:
    """None, one, next to a multiple of a power of two that tiles may have, or any."""
    kind, tile = rng.random(), int(rng.choice([16, 32, 64, 128, 256]))
    if kind < 0.08 or most < 2:
        return min(most, int(rng.integers(2)))
    if kind < 0.5 and tile < most:
        return min(most, tile * _log_uniform(rng, most // tile) + int(rng.integers(-1, 2)))
    return _log_uniform(rng, most) if kind < 0.75 else int(rng.integers(1, most + 1))


def _log_uniform(rng: np.random.Generator, most: int) -> int:
    """From 1 to most, each factor of two as likely as the others."""
    return min(most, int(np.exp(rng.uniform(0, np.log(most + 1)))))


def _reach(case: Case) -> int:
    """How long sequences may be, as far as the arrays tell: wider mask sides hide nothing."""
    problem = case.problem
    if problem.layout == "dense":
        return max(problem.len_q, problem.len_kv)
    most_kv = max(case.pages) * problem.page_size if problem.page_size else problem.total_kv
    return max(min(problem.len_q, problem.total_q), min(problem.len_kv, most_kv))


def _mask(case: Case, rng: np.random.Generator) -> Mask:
    """The same kind of mask, aligned either way."""
    alignment = cast(Alignment, str(rng.choice(["bottom-right", "top-left"])))
    mask, reach = replace(case.problem.mask, alignment=alignment), _reach(case)
    if mask.kind != "window":
        return mask
    if reach < 2:
        return replace(mask, left=0, right=0)
    left, right = (_log_uniform(rng, reach) - 1 for _ in range(2))
    open_side = rng.random()
    if open_side < 0.2:
        return replace(mask, left=left, right=None)
    return replace(mask, left=None, right=max(right, 1)) if open_side < 0.4 else replace(mask, left=left, right=right)


def _scale(case: Case, rng: np.random.Generator) -> float:
    """softmax_scale; its sign is compiled in but for soft-capped scores."""
    size = float(case.problem.dim_qk**-0.5 * np.exp(rng.uniform(-1.5, 1)))
    if case.problem.softcap:
        return size if rng.random() < 0.5 else -size
    if case.problem.softmax_scale > 0:
        return size
    return 0.0 if rng.random() < 0.1 else -size


def _broadcast(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[bool, bool, bool, bool]:
    batch, heads, rows, keys = (n == 1 or bool(rng.random() < 0.5) for n in shape)
    return batch, heads, rows, keys


def _copies_bias(case: Case) -> bool:
    """Whether the case's kernel copies tiles of a bias; others read its elements, whatever their strides are."""
    return case.family == "sm90" and case.problem.copies_bias


def _bias_broadcast(case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[bool, bool, bool, bool]:
    if case.problem.bias is None:
        return case.problem.bias_broadcast
    batch, heads, *pair = _broadcast(rng, shape)
    rows, keys = case.problem.bias_broadcast[2:] if _copies_bias(case) else pair
    return batch, heads, rows, keys


def _probability(rng: np.random.Generator) -> float:
    return float(rng.choice([0.1, 0.5, rng.uniform(0.01, 0.95)]))


def _rng_state(rng: np.random.Generator) -> tuple[int, int]:
    """Any seed; an offset with its low and high word in use, or one that carries over soon."""
    near, before, far = (4 * int(rng.integers(*bounds)) for bounds in ((1000,), (1, 1000), (2**61,)))
    offset = int(rng.choice([0, near, 2**32 - before, far]))
    return int(rng.integers(2**64, dtype=np.uint64)), offset
