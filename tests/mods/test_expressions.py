"""Written scores and masks: what is traced, what NumPy makes of it, and its derivative."""

from __future__ import annotations

import gc
import math
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash import mods
from cuflash.errors import InvalidArgument
from cuflash.mods.derive import derivative
from cuflash.mods.emit import emit
from cuflash.mods.evaluate import evaluate
from cuflash.mods.expression import SCORE, in_order

TABLE = np.random.default_rng(0).standard_normal((4, 9))
COMPLEX = np.zeros(2, np.complex64)
IDS = np.array([0, 0, 1, 1, 1, 2, 5], np.int32)

# Source text of real numbers, integers and truth values of a position; `m` has the functions.
TRUTHS = st.recursive(
    st.sampled_from(
        ["(q >= k)", "(ids[q] == ids[k])", "(s < 0.25)", "((q // 3) % 2 == (-k // 2) % 3)", "((q ^ k) > 2)"]
    ),
    lambda x: st.one_of(st.builds("({} {} {})".format, x, st.sampled_from("&|^"), x), st.builds("(~{})".format, x)),
    max_leaves=4,
)
REALS = st.recursive(
    st.sampled_from(["s", "0.5", "-1.25", "t[h, q - k]", "t[b, 2]", "(q - k)"]),
    lambda x: st.one_of(
        st.builds("({} {} {})".format, x, st.sampled_from("+-*"), x),
        st.builds("m.{}({})".format, st.sampled_from(["tanh", "sin", "cos", "floor", "abs"]), x),
        st.builds("m.exp(-m.abs({}))".format, x),
        st.builds("m.log(1.5 + m.abs({}))".format, x),
        st.builds("m.sqrt(m.abs({}) + 0.25)".format, x),
        st.builds("({} / (1.0 + m.abs({})))".format, x, x),
        st.builds("({})**{}".format, x, st.integers(0, 3)),
        st.builds("m.{}({}, {})".format, st.sampled_from(["minimum", "maximum"]), x, x),
        st.builds("m.where({}, {}, {})".format, TRUTHS, x, x),
    ),
    max_leaves=10,
)


class Numbers:
    """The functions of `mods` on NumPy's numbers, and arrays read as kernels read them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    class Nearest:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __getitem__(self, index: Any) -> Any:
            index = index if isinstance(index, tuple) else (index,)
            return self.array[tuple(min(max(int(i), 0), n - 1) for i, n in zip(index, self.array.shape, strict=True))]


def written(source: str) -> Any:
    """A score as its source says."""
    return eval(f"lambda s, b, h, q, k: {source}", {"m": mods, "t": TABLE, "ids": IDS})


def by_hand(source: str, s: float, b: int, h: int, q: int, k: int) -> Any:
    """The same by Python itself."""
    names = {"m": Numbers(), "t": Numbers.Nearest(TABLE), "ids": Numbers.Nearest(IDS)}
    position = {name: np.int64(x) for name, x in {"b": b, "h": h, "q": q, "k": k}.items()}
    return eval(source, names | position | {"s": np.float64(s)})


def values(*nodes: Any, s: Any, arrays: Any, real: Any = np.float64, **positions: Any) -> list[np.ndarray]:
    return evaluate(*nodes, score=s, positions=positions, captured=arrays, real=real)


@given(REALS, st.floats(-3, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 6), st.integers(0, 6))
def test_numpy_computes_what_python_does(source: str, s: float, b: int, h: int, q: int, k: int) -> None:
    traced = mods.trace("score_mod", written(f"{source} + 0.0 * s"))
    (got,) = values(traced.mod.expression, s=np.float64(s), arrays=traced.arrays, b=b, h=h, q=q, k=k)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got, by_hand(source, s, b, h, q, k), rtol=1e-12, atol=1e-12)


@given(REALS, st.floats(-3, 3), st.integers(0, 3), st.integers(0, 6), st.integers(0, 6))
def test_derivatives_agree_with_finite_differences(source: str, s: float, h: int, q: int, k: int) -> None:
    mod, arrays = mods.trace("score_mod", written(f"{source} + 0.0 * s"))
    at = partial(values, arrays=arrays, b=1, h=h, q=q, k=k)
    slope = derivative(mod.expression, SCORE)
    step = 1e-6
    low, high = (at(mod.expression, s=np.float64(s + d))[0] for d in (-step, step))
    middle, first, last = (at(slope, s=np.float64(s + d))[0] for d in (0, -step, step))
    assert np.isfinite(middle)
    if abs(first - last) < 1e-3 * (1 + abs(middle)):  # no kink or jump nearby
        near = (high - low) / (2 * step)
        assert near == pytest.approx(middle, rel=1e-3, abs=1e-3 * (1 + abs(float(high)))) or abs(high - low) > 1e-3


def test_a_branch_that_is_not_taken_leaves_the_derivative_alone() -> None:
    mod, arrays = mods.trace("score_mod", lambda s, b, h, q, k: mods.where(s > 0, mods.sqrt(s), -s))
    slope = derivative(mod.expression, SCORE)
    got = values(slope, s=np.array([0.0, -4.0, 4.0]), arrays=arrays, b=0, h=0, q=0, k=0)[0]
    np.testing.assert_array_equal(got, [-1, -1, 0.25])


def test_derivatives_by_captured_numbers() -> None:
    scale = np.array(2.0, np.float32)
    mod, arrays = mods.trace("score_mod", lambda s, b, h, q, k: s * scale + scale * TABLE[h, k])
    loads = [node for node in in_order(mod.expression) if node.op == "load"]
    slopes = (derivative(mod.expression, x) for x in loads)
    by_scale, by_table = values(*slopes, s=np.float64(3), arrays=arrays, b=0, h=1, q=0, k=5)
    assert by_scale == 3 + TABLE[1, 5] and by_table == 2


def test_equal_functions_are_one_mod_whatever_they_capture() -> None:
    def made(table: np.ndarray, cap: float) -> Any:
        return lambda score, b, h, q, k: cap * mods.tanh(score / cap) + table[h]

    one, other = (mods.trace("score_mod", made(np.full(4, x), 30.0)) for x in (1.0, 2.0))
    assert one.mod == other.mod and hash(one.mod) == hash(other.mod) and one.arrays[0] is not other.arrays[0]
    assert mods.trace("score_mod", made(np.ones(4), 20.0)).mod != one.mod
    assert mods.trace("score_mod", made(np.ones(4, np.float32), 30.0)).mod != one.mod
    assert pickle.loads(pickle.dumps(one.mod)) == one.mod
    words = str(one.mod)
    del one, other
    gc.collect()
    assert words == "(30.0 * tanh((score / 30.0))) + captured0[h]"


def test_signs_and_kinds_of_constants_are_kept_apart() -> None:
    one, other = (mods.trace("score_mod", lambda s, b, h, q, k, c=c: s + c).mod for c in (0.0, -0.0))
    assert one != other
    one, other = (mods.trace("score_mod", lambda s, b, h, q, k, c=c: s * c).mod for c in (1, 1.0))
    assert one == other


def test_arrays_are_found_where_functions_find_them() -> None:
    box = SimpleNamespace(table=np.arange(3.0))

    def helper(k: Any) -> Any:
        return IDS[k] * 2  # a global

    defaults, one = np.arange(4.0), np.float32(1)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any, more: Any = defaults, *, word: Any = one) -> Any:
        return s + helper(k) + more[h] + word

    traced = mods.trace("score_mod", score)
    assert len(traced.arrays) == 2 and traced.arrays[0] is IDS
    bound = mods.trace("score_mod", partial(lambda t, s, b, h, q, k: s + t[q] + t[k], np.arange(9.0)))
    assert len(bound.arrays) == 1
    with pytest.raises(InvalidArgument, match=r"cuflash\.mods\.captured"):
        mods.trace("score_mod", lambda s, b, h, q, k: s + box.table[q])
    table = mods.captured(box.table)
    assert mods.trace("score_mod", lambda s, b, h, q, k: s + table[q]).arrays[0] is box.table
    assert mods.trace("score_mod", lambda s, b, h, q, k: s + mods.captured(TABLE)[h, k]).arrays == (TABLE,)
    with pytest.raises(InvalidArgument, match="read outside"):
        table[0]


def test_numbers_that_may_change_are_captured() -> None:
    scale = np.array(0.5, ml_dtypes.bfloat16)
    traced = mods.trace("score_mod", lambda s, b, h, q, k: s * scale)
    assert [x.ndim for x in traced.mod.operands] == [0]
    three = mods.captured(3)
    assert mods.trace("score_mod", lambda s, b, h, q, k: s * three).mod.operands[0].dtype == np.float32


def test_functions_of_numpy_are_understood() -> None:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return np.where(np.logical_and(q >= k, k != 3), np.exp(s), np.float32(2))

    mod = mods.trace("score_mod", score).mod
    assert str(mod) == "where(((k <= q) & (k != 3)), exp(score), 2.0)"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda s, b, h, q, k: s if q > k else 0.0, "truth of k < q"),
        (lambda s, b, h, q, k: s if 0 < q < k else 0.0, "truth of 0 < q"),
        (lambda s, b, h, q, k: s * math.exp(q), "value of q"),
        (lambda s, b, h, q, k: s + [1, 2][q], "value of q"),
        (lambda s, b, h, q, k: s + TABLE[h], "one integer for each of its 2 axes"),
        (lambda s, b, h, q, k: s + TABLE[h, s], "one integer for each of its 2 axes"),
        (lambda s, b, h, q, k: s + TABLE, "index all of its 2 axes"),
        (lambda s, b, h, q, k: s & 1, "integers and truth values"),
        (lambda s, b, h, q, k: mods.where(q, s, 0.0), "where of the condition"),
        (lambda s, b, h, q, k: s + 2**40, "32 bits"),
        (lambda s, b, h, q, k: s * math.nan, "no number"),
        (lambda s, b, h, q, k: np.sinh(s), r"numpy\.sinh"),
        (lambda s, b, h, q, k: s + "1", "unsupported operand"),
        (lambda s, b, h, q, k: sum(s), "elements of score"),
        (lambda s, b: s, "takes 2 positional arguments"),
        (lambda s, b, h, q, k: None, "returned None"),
        (lambda s, b, h, q, k: q > k, "returned a bool"),
        (lambda s, b, h, q, k, c=COMPLEX: s + c[q], "complex64"),
        (7, "expected a function"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_words(function: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        mods.trace("score_mod", function)
    assert "score_mod" in str(caught.value) or "captured" in str(caught.value)


def test_the_line_is_named() -> None:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if q > k:
            return s
        return 0.0

    with pytest.raises(InvalidArgument, match=rf"{__file__}, line \d+: if q > k:"):
        mods.trace("score_mod", score)


def test_masks_return_truth() -> None:
    assert mods.trace("mask_mod", lambda b, h, q, k: IDS[q] == IDS[k]).mod.expression.kind == "bool"
    assert mods.trace("mask_mod", lambda b, h, q, k: True).mod.expression.value is True
    with pytest.raises(InvalidArgument, match="mask_mod returned a int number"):
        mods.trace("mask_mod", lambda b, h, q, k: q - k)


def test_indices_outside_read_the_nearest_element() -> None:
    mod, arrays = mods.trace("score_mod", lambda s, b, h, q, k: s + IDS[q - k])
    q, k = np.array([[0], [3], [99]]), np.arange(3)
    (got,) = values(mod.expression, s=np.zeros((3, 3)), arrays=arrays, b=0, h=0, q=q, k=k)
    np.testing.assert_array_equal(got, IDS[np.clip(q - k, 0, 6)])


def test_shared_parts_are_computed_and_printed_once() -> None:
    def doubled(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        for _ in range(60):
            s = s + s
        return s

    mod = mods.trace("score_mod", doubled).mod
    statements, (result,) = emit(mod.expression)
    assert len(statements) == 60 and statements[0] == "const Real x0 = (s * unit) + (s * unit);" and result == "x59"
    assert len(str(mod)) < 600
    (got,) = values(mod.expression, s=np.float64(1), arrays=(), b=0, h=0, q=0, k=0)
    assert got == 2.0**60
    assert values(derivative(mod.expression, SCORE), s=np.float64(1), arrays=(), b=0, h=0, q=0, k=0)[0] == 2.0**60
