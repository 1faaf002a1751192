"""What a caller may write for a number, a switch, a window or a word, and that no cache takes one for another."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from doubles.arrays import as_torch
from doubles.launch import Launches
from host import run
from inputs import random

import cuflash
from cuflash.errors import InvalidArgument
from cuflash.numbers import finite, flag, integer, pair, shown
from cuflash.ops.call import Options, asked

ONE = [int, float, np.int8, np.uint64, np.float16, np.float32, np.longdouble, ml_dtypes.bfloat16, ml_dtypes.int4,
       ml_dtypes.float8_e4m3fn, np.array, Fraction, Decimal]  # fmt: skip


@pytest.mark.parametrize("kind", ONE, ids=lambda kind: kind.__name__)
def test_what_stands_for_a_number(kind: Any) -> None:
    number = finite("x", kind(1))
    assert number == 1.0 and type(number) is float
    whole = kind in (int, np.int8, np.uint64, ml_dtypes.int4, np.array)
    assert integer(kind(1)) == (1 if whole else None)
    if whole:
        assert flag("x", kind(1)) is True and flag("x", kind(0)) is False
        assert pair((kind(1), kind(0))) == pair([kind(1), kind(0)]) == (1, 0)
    else:
        with pytest.raises(InvalidArgument, match=r"x is .*; expected True or False"):
            flag("x", kind(1))
        assert pair((kind(1), kind(0))) is None


@pytest.mark.parametrize("value", [True, np.True_, np.array(True)], ids=str)
def test_a_switch_is_no_number(value: Any) -> None:
    assert flag("x", value) is True
    assert integer(value) is None and pair((value, 0)) is None
    with pytest.raises(InvalidArgument, match=r"x is .*; expected a finite number"):
        finite("x", value)


@pytest.mark.parametrize(
    "value",
    ["1", None, 1j, np.complex64(1), np.void(b"a"), np.ones(1), [1.0], float("nan"), Decimal("inf"), np.float32("inf"),
     10**400, -(10**5000), Fraction(10**400, 3), np.array("1"), np.datetime64("2020")],
    ids=lambda value: shown(value)[:20],
)  # fmt: skip
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^x is .*; expected a"):
        finite("x", value)


class Tensor(SimpleNamespace):
    """What a tensor without dimensions is: hashed by where it is, not by what it holds."""

    shape = ()
    __hash__ = object.__hash__

    def __float__(self) -> float:
        raise AssertionError("must not be read: it may wait for a GPU")

    __index__ = __bool__ = item = __repr__ = __float__


def test_arrays_of_other_libraries_are_no_numbers() -> None:
    for refuse in (finite, flag):
        with pytest.raises(InvalidArgument, match=r"x is a Tensor of shape \(\); expected"):
            refuse("x", Tensor())
    assert integer(Tensor()) is pair((Tensor(), 1)) is None
    assert shown(10**5000) == "a int" and len(shown("a" * 999)) < 210


@pytest.fixture
def silent(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """A GPU whose kernels do nothing."""
    monkeypatch.setattr(run, "launch", lambda *_: None)
    yield launches


EQUAL = {
    "softmax_scale": (1.0, [True, np.True_, 1 + 0j]),
    "softcap": (1, [True]),
    "dropout_p": (0.0, [False]),
    "causal": (True, [1.0, np.float32(1), Fraction(1)]),
    "deterministic": (False, [0.0, Decimal(0)]),
    "unbiased_dropout": (False, [0.0]),
    "return_lse": (True, [1.0]),
    "return_attn_probs": (False, [0.0]),
    "return_rng_state": (False, [0.0]),
    "num_splits": (1, [True, 1.0]),
    "window_size": ((1, 0), [(1.0, 0), (1, False), (np.float32(1), 0)]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_values_of_another_type_are_refused_after_equal_ones(silent: Launches, name: str) -> None:
    x = as_torch(random(1, 8, 2, 16))
    sound, wrong = EQUAL[name]
    cuflash.flash_attn_func(x, x, x, **{name: sound})
    launched = silent.take()
    for value in wrong:
        assert value == sound
        with pytest.raises(InvalidArgument, match=f"^{name} is "):
            cuflash.flash_attn_func(x, x, x, **{name: value})
    assert launched and silent.take() == []


@pytest.mark.parametrize("name", ["deterministic", "bias_grad", "return_lse"])
def test_switches_of_gradients(silent: Launches, name: str) -> None:
    x = as_torch(random(1, 8, 2, 16))
    for value in ("no", 2, None, 0.0):
        with pytest.raises(InvalidArgument, match=f"^{name} is .*; expected True or False"):
            cuflash.flash_attn_vjp(x, x, x, **{name: value})
    assert silent.take() == []


def test_numbers_in_arrays_are_read_in_every_call(silent: Launches) -> None:
    x, scale, window = as_torch(random(1, 8, 2, 16)), np.array(0.5), [np.int64(3), np.array(0)]
    for number, left in ((0.5, 3), (0.25, 5)):
        scale[...], window[0] = number, np.int16(left)
        cuflash.flash_attn_func(x, x, x, softmax_scale=scale, window_size=window, causal=np.array(True))
        attention = silent.params[-1]["attention"][0]
        assert (attention["softmax_scale"], attention["window_left"], attention["window_right"]) == (number, left, 0)
    for name in ("softmax_scale", "causal", "num_splits", "window_size"):
        with pytest.raises(InvalidArgument, match=rf"^{name} is .*; expected"):
            cuflash.flash_attn_func(x, x, x, **{name: Tensor() if name != "window_size" else (Tensor(), Tensor())})


def test_numbers_on_numpy() -> None:
    q, k, v = (random(1, 6, 2, 8, seed=seed) for seed in range(3))
    expected = cuflash.flash_attn_func(q, k, v, 0.5, 0.25, True, (3, 0), 2.0, generator=(7, 4))
    got = cuflash.flash_attn_func(
        q, k, v, ml_dtypes.bfloat16(0.5), np.array(0.25), np.array(True), [np.int8(3), 0], Fraction(2),
        generator=(np.array(7), np.uint8(4)),
    )  # fmt: skip
    np.testing.assert_array_equal(got, expected)


def test_options_are_one_object_for_values_of_the_same_types() -> None:
    values = {"softmax_scale": 1.0, "causal": True, "window_size": (3, 0), "softcap": 2.0, "num_splits": 2}
    first = asked(**values)
    assert asked(**values) is first and isinstance(first, Options) and first.is_kind
    changes = {"softmax_scale": 1, "causal": 1, "num_splits": 2.0, "validate": 0, "enable_gqa": 1, "vocabulary": "sdpa"}
    others = [asked(**values | {name: value}) for name, value in changes.items()]
    others += [asked(**values | {"window_size": window}) for window in ((3.0, 0), (3, False))]
    others += [first.replace(num_splits=0), first.replace(family="simt"), first.replace(validate=0.0)]
    assert len({first, *others}) == 1 + len(others) and all(options.is_kind for options in others)
    assert first.replace(num_splits=0).num_splits == 0 and first.replace(family="simt").manner.family == "simt"
    for options in others:
        assert options.replace(**options.values()) is options is first.replace(**options.values())
        assert options.replace(**first.values()) is first
    assert asked(**values, family=None) is asked(**values, keep_state=False) is first, "however it was put"


@pytest.mark.parametrize("value", [np.array(1.0), [3, 0], {}], ids=str)
def test_options_that_no_cache_can_know_are_kept_as_given(value: Any) -> None:
    for name in ("softmax_scale", "window_size", "family", "empty_lse"):
        options = asked(causal=True, **{name: value})
        assert options.values() == asked(causal=True).values() | {name: value}
        for again in (options, options.replace(softcap=2.0), asked(causal=True).replace(**{name: value})):
            assert again.values()[name] is value and again.causal is True and not again.is_kind
        assert options.replace(**{name: None}) is asked(causal=True, **{name: None})


def test_every_keyword_asks_for_what_it_says() -> None:
    values = {name: float(number) for number, name in enumerate(asked().values()) if name != "vocabulary"}
    for name, value in values.items():
        assert asked(**{name: value}).values() == asked().values() | {name: value}
    assert asked(**values).values() == asked().values() | values
    with pytest.raises(TypeError, match="positional"):
        asked(0.5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Options(0.5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="scale"):
        asked(scale=0.5)
