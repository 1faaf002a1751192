"""Scores and masks as a caller may write them: random ones, and some that the oracle knows by other words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from host.cases import HostCase

from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.jit.written import captured_struct, structs
from cuflash.jit.written import members as captured_members
from cuflash.mods import Traced
from cuflash.mods.derive import slopes
from cuflash.mods.evaluate import evaluate
from cuflash.plan import config
from cuflash.problem import Problem

# Random ones


WORDS = {
    "R": "(R+R) (R-R) (R*R) (-R) I m.tanh(R) m.sin(R) m.cos(R) m.abs(R) m.floor(R) m.exp(-m.abs(R)) R**3 s t[I,I] x[I] "
    "m.log(1.5+m.abs(R)) m.sqrt(m.abs(R)+0.25) (R/(1.0+m.abs(R))) m.minimum(R,R) m.maximum(R,R) (R//0.75) (R%0.75) "
    "m.where(B,R,R) ((m.abs(R)+0.5)**R)",
    "I": "(I+I) (I-I) (I*I) (I//I) (I%I) (-I) m.abs(I) m.minimum(I,I) m.maximum(I,I) (I&I) (I|I) (I^I) (~I) (I<<3) "
    "((I+k)>>I) m.where(B,I,I) ids[I] ((I*I)%97) ((big[I]*I)%11)",
    "B": "(R<R) (R<=R) (I==I) (I!=I) (I>I) (B&B) (B|B) (B^B) (~B) flags[I] (B==B)",
}
LEAVES = {
    "R": "s t[h,k] t[q,2] w 0.5 -1.25 x[q]",
    "I": "b h q k 3 -2 ids[k] n (q+flags[b])",
    "B": "(q>=k) flags[h] (s<0.25) (big[q]==big[k]) (big[k]*q<5000000000)",
}
"""Source text of real numbers, integers and truth values, in which these letters stand for others."""


def random_source(rng: np.random.Generator, kind: str, depth: int) -> str:
    """An expression of a kind, of operations on operations up to a depth."""
    words = (WORDS if depth else LEAVES)[kind].split()
    word = words[rng.integers(len(words))]
    return "".join(random_source(rng, x, depth - 1) if x in WORDS and depth else x for x in word)


READ = {
    "t": np.random.default_rng(0).standard_normal((9, 4)).T,
    "w": np.array(0.75, np.float32),
    "x": np.random.default_rng(1).standard_normal((14,)).astype(ml_dtypes.bfloat16)[::-2],
    "ids": np.array([3, 0, 1, -7, 2, 5], np.int64),
    "big": np.array([2**40, 2**40 + 2**32, -(2**33), 5, 2**32 + 5, 2**40], np.int64),
    "n": np.array(5, np.int32),
    "flags": np.array([True, False, True]),
}
NUM_SOURCES, NUM_PLACES, SEED = 32, 64, 5


@cache
def printed() -> list[tuple[str, Traced, config.Written]]:
    """Random scores, traced, with gradients of all real numbers that they read."""
    rng = np.random.default_rng(SEED)
    computed: list[tuple[str, Traced, config.Written]] = []
    while len(computed) < NUM_SOURCES:
        source = f"{random_source(rng, 'R', 4)} + w * {random_source(rng, 'R', 2)} * s"
        with suppress(InvalidArgument):  # -1 << -2 is an error of Python's own
            traced = mods.trace("score_mod", eval(f"lambda s, b, h, q, k: {source}", {"m": mods} | READ))
            learned = tuple(i for i, operand in enumerate(traced.mod.operands) if operand.kind == "real")
            flat = tuple(i for i, array in enumerate(traced.arrays) if array.flags.c_contiguous and len(computed) % 2)
            computed.append((source, traced, config.Written(traced.mod, None, learned, flat)))
    return computed


UNIT = r"""
#include "attention/mods.cuh"

using namespace cuflash;

struct Pair { double s, ds; int b, h, q, k; };

template <class Real, class Mod, class Attention>
CF_DEVICE void run(const void* captured, const Pair* places, double* results, int count) {
  for (int i = 0; i < count; ++i) {
    const Pair& p = places[i];
    const Mod mod(*static_cast<const Attention*>(captured), p.b, p.h);
    const Real s = static_cast<Real>(p.s);
    results[2 * i] = mod.value(s, Real(1), p.b, p.h, p.q, p.k) * mod.unit(Real(1));
    results[2 * i + 1] = mod.slope(s, Real(1), p.b, p.h, p.q, p.k);
    mod.add_gradients(s, Real(1), p.b, p.h, p.q, p.k, static_cast<Real>(p.ds));
  }
}
"""
UNIT_OF_ONE = r"""
namespace cuflash::e{number} {{
{captured}
struct Attention : Captured {{}};
{structs}
}}
{export} void run_float{number}(const void* captured, const Pair* places, double* results, int count) {{
  run<float, e{number}::ScoreMod, e{number}::Attention>(captured, places, results, count);
}}
{export} void run_double{number}(const void* captured, const Pair* places, double* results, int count) {{
  run<double, e{number}::ScoreMod, e{number}::Attention>(captured, places, results, count);
}}
"""


def unit(export: str) -> str:
    """The source of functions that compute all of them, whose declarations begin so."""
    units = [
        UNIT_OF_ONE.format(
            number=number,
            export=export,
            captured="\n".join(captured_struct(written)),
            structs="\n".join(structs(written, fast=number % 3 == 0)),
        )
        for number, (_, _, written) in enumerate(printed())
    ]
    return UNIT + "".join(units)


def check_printed(
    number: int,
    real: Any,
    run: Callable[[str, Any, Any, Any], None],
    put: Callable[[np.ndarray], Any] = lambda x: x,
    get: Callable[[Any], np.ndarray] = lambda x: x,
) -> None:
    """Hold what a function of `unit` computes to NumPy: scores, their slopes and the gradients of what is read.

    ``run(name, captured, places, results)`` calls it on arrays that `put` put somewhere.
    """
    source, (mod, arrays), written = printed()[number]
    rng = np.random.default_rng(number)
    places = np.zeros(NUM_PLACES, [("s", "f8"), ("ds", "f8"), *((x, "i4") for x in "bhqk")])
    for name, kind in ((name, kind) for name, (kind, *_) in places.dtype.fields.items()):
        places[name] = rng.integers(-2, 9, NUM_PLACES) if kind == "i4" else rng.standard_normal(NUM_PLACES)
    block = np.zeros(1, np.dtype(list(captured_members(written).items()), align=True))
    held = [put(x) for x in arrays]
    totals = {i: put(np.zeros(arrays[i].shape, real)) for i in written.gradients}
    for i, array in enumerate(held):
        block[f"captured{i}"] = _address(array)
        if i in totals:
            block[f"dcaptured{i}"] = _address(totals[i])
        if array.ndim:
            if i not in written.flat:
                block[f"captured{i}_stride"] = [stride // array.itemsize for stride in array.strides]
            block[f"captured{i}_size"] = array.shape
    results = put(np.zeros((NUM_PLACES, 2)))
    name = f"run_{'float' if real == np.float32 else 'double'}{number}"
    run(name, put(block.view(np.uint8)), put(places.view(np.uint8)), results)
    results, totals = get(results), {i: get(x) for i, x in totals.items()}

    by_score, by_load = slopes(mod)
    positions = {name: places[name].astype(np.int64) for name in "bhqk"}
    nodes = [mod.expression, by_score, *(x for load, slope in by_load for x in (slope, *load.args))]
    wanted = evaluate(*nodes, score=places["s"].astype(real), positions=positions, captured=arrays, real=real)
    value, slope, *rest = (np.broadcast_to(x, NUM_PLACES) for x in wanted)
    near = {"rtol": 2e-4, "atol": 2e-4} if real == np.float32 else {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(results[:, 0], value, **near, err_msg=source)
    np.testing.assert_allclose(results[:, 1], slope, **near, err_msg=str(by_score))
    expected = {i: np.zeros(total.shape) for i, total in totals.items()}
    values = iter(rest)
    for load, _ in by_load:
        moved = next(values) * places["ds"].astype(real)
        index = [np.clip(next(values), 0, n - 1) for n in expected[load.value].shape]
        np.add.at(expected[load.value], tuple(index) or ..., moved if index else moved.sum())
    for i, total in totals.items():
        scale = max(1.0, np.abs(expected[i]).max())
        np.testing.assert_allclose(total / scale, expected[i] / scale, **near, err_msg=source)


def _address(x: Any) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


# What the oracle knows


@dataclass
class Written:
    """A written score and mask, and the options by which the oracle knows the same."""

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    learned: Callable[[oracle.Attention, np.ndarray], list[np.ndarray]] | None = None
    """From the oracle's gradients and the queries to those of what the score reads."""


def grid(p: Problem) -> tuple[np.ndarray, ...]:
    """Batch elements, heads, queries and keys of all pairs, in shapes that broadcast."""
    sizes = p.batch, p.heads_q, p.len_q, p.len_kv
    return tuple(np.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(sizes))


def lens(case: HostCase) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of every batch element."""
    p = case.problem
    return np.array(case.lens_q or [p.len_q] * p.batch), np.array(case.lens_kv or [p.len_kv] * p.batch)


def alibi(case: HostCase, rng: np.random.Generator) -> Written:
    """What `alibi_slopes` does, whose diagonal ends at each sequence's last key."""
    slopes = rng.standard_normal((case.problem.batch, case.problem.heads_q)).astype(np.float32)
    offsets = np.subtract(*lens(case)[::-1]).astype(np.int32)
    return Written(lambda s, b, h, q, k: s - slopes[b, h] * abs(q + offsets[b] - k), options={"alibi_slopes": slopes})


def soft_cap(case: HostCase, rng: np.random.Generator) -> Written:
    cap = np.array(1.5, ml_dtypes.bfloat16)
    return Written(lambda s, b, h, q, k: cap * mods.tanh(s / cap), options={"softcap": float(cap)})


def scaled(case: HostCase, rng: np.random.Generator) -> Written:
    """Scores times a number that may be learned; it moves with the scores."""
    factor = np.array(-1.25, np.float32)
    options = {"scale": case.problem.softmax_scale * float(factor)}

    def learned(gradients: oracle.Attention, q: np.ndarray) -> list[np.ndarray]:
        assert gradients.dq is not None
        return [np.array((np.nan_to_num(q) * gradients.dq).sum() / float(factor))]

    return Written(lambda s, b, h, q, k: s * factor, options=options, learned=learned)


def table(case: HostCase, rng: np.random.Generator) -> Written:
    """A number for every head and distance, as far as the table goes, in every other of its columns."""
    heads, reach = case.problem.heads_q, 9
    numbers = rng.standard_normal((heads, 4 * reach + 2)).astype(ml_dtypes.bfloat16)[::-1, ::2]
    _, h, q, k = grid(case.problem)
    at = np.clip(q - k, -reach, reach) + reach
    bias = np.repeat(numbers[h, at].astype(np.float64), case.problem.batch, axis=0)

    def learned(gradients: oracle.Attention, q: np.ndarray) -> list[np.ndarray]:
        total = np.zeros(numbers.shape)
        np.add.at(total, np.broadcast_arrays(h, at, gradients.dbias)[:2], gradients.dbias)
        return [total]

    return Written(lambda s, b, h, q, k: s + numbers[h, q - k + reach], options={"bias": bias}, learned=learned)


def documents(case: HostCase, rng: np.random.Generator) -> Written:
    """Pairs of one document each; the last query sees no key."""
    p = case.problem
    ids_q, ids_k = (np.sort(rng.integers(0, 5, (p.batch, n))) for n in (p.len_q, p.len_kv))
    ids_q[:, -1] = 77
    b, _, q, k = grid(p)
    return Written(mask=lambda b, h, q, k: ids_q[b, q] == ids_k[b, k], options={"mask": ids_q[b, q] == ids_k[b, k]})


def far_documents(case: HostCase, rng: np.random.Generator) -> Written:
    """Documents numbered in 64 bits, of which 32 do not tell them apart."""
    p = case.problem
    ids_q, ids_k = (rng.integers(0, 3, (p.batch, n)) * 2**32 + 7 for n in (p.len_q, p.len_kv))
    b, _, q, k = grid(p)
    return Written(mask=lambda b, h, q, k: ids_q[b, q] == ids_k[b, k], options={"mask": ids_q[b, q] == ids_k[b, k]})


def prefix(case: HostCase, rng: np.random.Generator) -> Written:
    """Keys of a prefix, of another length for each head, and those before the query."""
    length = rng.integers(0, case.problem.len_kv, case.problem.heads_q).astype(np.uint8)
    _, h, q, k = grid(case.problem)
    return Written(mask=lambda b, h, q, k: (k < length[h]) | (k <= q), options={"mask": (k < length[h]) | (k <= q)})


def composed(case: HostCase, rng: np.random.Generator) -> Written:
    """A soft cap and a table behind it, over documents; some scores hide keys."""
    capped, far, seen = soft_cap(case, rng), table(case, rng), documents(case, rng)
    cap, look_up = capped.score, far.score
    assert cap and look_up
    mask = np.broadcast_to(seen.options["mask"], (*seen.options["mask"].shape[:1], *far.options["bias"].shape[1:]))
    _, _, q, k = grid(case.problem)
    hidden = (q + k) % 7 == 3

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        s = look_up(cap(s, b, h, q, k), b, h, q, k)
        return mods.where((q + k) % 7 == 3, -np.inf, s)

    options = capped.options | far.options | {"mask": mask & ~hidden}
    return Written(score, seen.mask, options)
