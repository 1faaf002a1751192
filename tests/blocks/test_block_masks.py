"""Block masks: their lists beside those of the dense matrix, composed, drawn, and refused."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import Mask, create_block_mask, mods
from cuflash.blocks import kinds
from cuflash.blocks.bounds import Bounds, bounds
from cuflash.blocks.lists import EMPTY, FULL, PARTIAL, Lists
from cuflash.blocks.mask import BlockMask
from cuflash.errors import InvalidArgument
from cuflash.mods import library
from cuflash.mods.evaluate import evaluate

create = cuflash.create_block_mask

IDS = np.sort(np.random.default_rng(0).integers(0, 5, 64)).astype(np.int32)
SHUFFLED = np.random.default_rng(1).integers(-3, 3, 64).astype(np.int64)
TABLE = np.random.default_rng(2).integers(0, 9, (3, 64)).astype(np.int32)
SHARES = np.random.default_rng(3).random(64).astype(np.float32)
FLAGS = SHARES < 0.7

# Source text of whole numbers and truth values of a position; `where` and the like are those of `mods` or of NumPy.
NUMBERS = st.recursive(
    st.sampled_from(["q", "k", "b", "h", "-7", "3", "20", "ids[q]", "ids[k]", "shuffled[k]", "table[h, q]"]),
    lambda x: st.one_of(
        st.builds("({} {} {})".format, x, st.sampled_from("+-*"), x),
        st.builds("({} {} {})".format, x, st.sampled_from(["//", "%"]), st.sampled_from(["2", "7", "16"])),
        st.builds("m.{}({}, {})".format, st.sampled_from(["minimum", "maximum"]), x, x),
        st.builds("(({} & {}) - ({} >> 2) + ({} << 1))".format, x, x, x, x),
        st.builds("m.where({} < {}, {}, {})".format, x, x, x, x),
        st.builds("m.abs(~{})".format, x),
    ),
    max_leaves=4,
)
COMPARISONS = st.one_of(
    st.builds("({} {} {})".format, NUMBERS, st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), NUMBERS),
    st.sampled_from(["(q >= k)", "(q - k < 9)", "(ids[q] == ids[k])", "flags[k]", "(shares[q] < shares[k] + 0.2)"]),
)
RULES = st.recursive(
    COMPARISONS,
    lambda x: st.one_of(st.builds("({} {} {})".format, x, st.sampled_from("&|^"), x), st.builds("(~{})".format, x)),
    max_leaves=4,
)
SIZES = st.tuples(st.integers(0, 40), st.integers(0, 40))
BLOCKS = st.sampled_from([(4, 4), (16, 16), (7, 5), (1, 8), (64, 3), (100, 100)])


def rule_of(source: str, functions: Any) -> Callable[..., Any]:
    """The function of a source text."""
    names = {"ids": IDS, "shuffled": SHUFFLED, "table": TABLE, "flags": FLAGS, "shares": SHARES, "m": functions}
    return eval(f"lambda b, h, q, k: {source}", names)


def pairs_of(source: str, batch: int, heads: int, len_q: int, len_kv: int) -> np.ndarray:
    """What NumPy makes of a rule at every pair."""
    at = np.ogrid[:batch, :heads, :len_q, :len_kv]
    return np.broadcast_to(rule_of(source, np)(*at), (batch, heads, len_q, len_kv))


def naive_kinds(dense: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The kind of every block of a matrix of pairs."""
    rows, columns = (range(0, n, size) for n, size in zip(dense.shape, block, strict=True))
    computed = np.zeros((len(rows), len(columns)), int)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            tile = dense[top : top + block[0], left : left + block[1]]
            computed[i, j] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return computed


def check_lists(lists: Lists, lines: list[np.ndarray]) -> None:
    """Each line must have its full columns in order, and then its partial ones."""
    assert {x.dtype for x in (lists.offsets, lists.indices, lists.full)} == {np.dtype(np.int32)}
    assert len(lists.offsets) == len(lines) + 1 and len(lists.full) == len(lines) and lists.offsets[0] == 0
    for r, line in enumerate(lines):
        here = lists.indices[lists.offsets[r] : lists.offsets[r + 1]].tolist()
        assert here == [*np.flatnonzero(line == FULL), *np.flatnonzero(line == PARTIAL)]
        assert lists.full[r] == np.sum(line == FULL)


def check_mask(mask: BlockMask, dense: np.ndarray) -> None:
    """A block mask must be that of a matrix of pairs (b, h, len_q, len_kv), both ways."""
    dense = np.broadcast_to(dense, (max(len(dense), mask.batch), max(dense.shape[1], mask.heads), *dense.shape[2:]))
    np.testing.assert_array_equal(np.broadcast_to(mask.to_dense(), dense.shape), dense)
    own = dense[: mask.batch, : mask.heads]
    computed = [naive_kinds(matrix, mask.block_size) for element in own for matrix in element]
    check_lists(mask.kv, [line for matrix in computed for line in matrix])
    check_lists(mask.q, [line for matrix in computed for line in matrix.T])
    assert mask.counts == tuple(sum(int((x == kind).sum()) for x in computed) for kind in (FULL, PARTIAL, EMPTY))


@given(RULES, SIZES, BLOCKS, st.integers(1, 2), st.integers(1, 3))
def test_lists_are_those_of_the_pairs(source, lengths, block, batch, heads):
    dense = pairs_of(source, batch, heads, *lengths)
    sizes = {"batch": batch, "heads": heads, "len_q": lengths[0], "len_kv": lengths[1], "block_size": block}
    mask = create(rule_of(source, mods), **sizes)
    check_mask(mask, dense)
    own = (n if re.search(rf"\b{name}\b", source) else 1 for name, n in (("b", batch), ("h", heads)))
    assert (mask.batch, mask.heads) == tuple(own)
    check_mask(create(np.array(dense), block_size=block), dense)


@given(RULES, RULES, SIZES, BLOCKS)
def test_composed_masks_are_those_of_composed_rules(first, second, lengths, block):
    sizes = {"batch": 2, "heads": 3, "len_q": lengths[0], "len_kv": lengths[1], "block_size": block}
    f, g = rule_of(first, mods), rule_of(second, mods)
    a, b = create(f, **sizes), create(g, **sizes)
    x, y = pairs_of(first, 2, 3, *lengths), pairs_of(second, 2, 3, *lengths)
    check_mask(a & b, x & y)
    check_mask(a | b, x | y)
    check_mask(~a, ~x)
    assert (a & b).kv == (b & a).kv and (~(a & b)).kv == (~a | ~b).kv
    assert (~~a).kv == (a & a).kv == (a | a).kv == a.kv and a == create(f, **sizes)


@given(NUMBERS, st.integers(0, 60), st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_bounds_hold_every_value(source, first_q, first_k, rows, columns):
    last_q, last_k = min(first_q + rows, 63), min(first_k + columns, 63)
    traced = mods.trace("mask_mod", rule_of(f"({source}) == q + 1000", mods))
    whole = traced.mod.expression.args[0]
    spans = {"b": (1, 1), "h": (0, 2), "q": (first_q, last_q), "k": (first_k, last_k)}
    limits = {name: Bounds(np.array([float(low)]), np.array([float(high)])) for name, (low, high) in spans.items()}
    computed = bounds(whole, limits, traced.arrays, {})
    at = dict(zip(spans, np.ogrid[tuple(slice(low, high + 1) for low, high in spans.values())], strict=True))
    [values] = evaluate(whole, score=None, positions=at, captured=traced.arrays, real=np.float64)
    assert np.all(computed.low <= values.min()) and np.all(values.max() <= computed.high)


def test_bounds_are_given_up_where_integers_may_not_fit():
    wide = np.full(8, 2**62)
    for rule in (lambda b, h, q, k: wide[q] + wide[k] > 0, lambda b, h, q, k: (wide[q] * 4 + k) == k):
        mask = create(rule, len_q=8, len_kv=8, block_size=4)
        with np.errstate(over="ignore"):
            check_mask(mask, np.broadcast_to(rule(0, 0, *np.ogrid[:8, :8]), (1, 1, 8, 8)))


BANDS = [Mask(), Mask(right=0), Mask(left=5, right=0), Mask(left=3, right=4, alignment="top-left"), Mask(left=2)]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("lengths", [(33, 50), (50, 33), (0, 7), (7, 0), (64, 64)])
def test_a_band_is_aligned_to_the_lengths(band, lengths):
    own = np.arange(lengths[0])[:, None] + band.offset(*lengths)
    keys = np.arange(lengths[1])
    dense = (keys >= own - (1000 if band.left is None else band.left)) & (
        keys <= own + (1000 if band.right is None else band.right)
    )
    mask = create(band, len_q=lengths[0], len_kv=lengths[1], block_size=(8, 12))
    check_mask(mask, dense[None, None])
    again = create(mask, block_size=5)
    check_mask(again, dense[None, None])
    assert mask != again and mask == create(band, len_q=lengths[0], len_kv=lengths[1], block_size=(8, 12))


def test_ready_rules_by_name():
    n, q, k = 40, np.arange(40)[:, None], np.arange(40)
    ids, parents = IDS[:n], np.array([-1, 0, 0, 1, 3, 2, 1, -1, 7, 8])
    line = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [0, 1, 3, 4], 5: [0, 2, 5], 6: [0, 1, 6], 7: [7]}
    line |= {8: [7, 8], 9: [7, 8, 9]}
    ancestors = np.array([[node in line[i] for node in range(10)] for i in range(10)])
    rules = [
        (library.document(ids), ids[:, None] == ids),
        (library.prefix_lm(13), (k < 13) | (k <= q)),
        (library.sliding_window(9, 2), (k >= q - 9) & (k <= q + 2)),
        (library.dilated_window(9, -1, 3), (k >= q - 9) & ((k - q) % 3 == 0)),
        (library.block_window(6, before=1), (k // 6 <= q // 6) & (k // 6 >= q // 6 - 1)),
        (library.both(library.causal(), library.negated(library.document(ids))), (k <= q) & (ids[:, None] != ids)),
        (library.either(library.causal(3), lambda b, h, q, k: k < 2), (k <= q + 3) | (k < 2)),
    ]
    for rule, dense in rules:
        check_mask(create(rule, len_q=n, len_kv=n, block_size=(8, 6)), dense[None, None])
    drafts = np.concatenate([np.ones((10, 20), bool), ancestors], axis=1)
    check_mask(create(library.tree(parents, 20), len_q=10, len_kv=30, block_size=4), drafts[None, None])
    lengths = np.array([3, 20], np.int32)
    prefixes = np.stack([(k < length) | (k <= q) for length in lengths])[:, None]
    check_mask(create(library.prefix_lm(lengths), batch=2, len_q=n, len_kv=n, block_size=8), prefixes)


def test_blocks_of_your_own_hide_what_they_leave_out():
    rng = np.random.default_rng(5)
    blocks = rng.random((2, 1, 4, 5)) < 0.5
    dense = np.repeat(np.repeat(blocks, 8, axis=2), 4, axis=3)[:, :, :30, :18]
    mask = create(blocks=blocks, len_q=30, len_kv=18, block_size=(8, 4))
    check_mask(mask, dense)
    assert mask.counts[1] == 0 and (mask.batch, mask.heads) == (2, 1)
    causal = create(Mask(right=0), blocks=blocks, len_q=30, len_kv=18, block_size=(8, 4))
    check_mask(causal, dense & np.tri(30, 18, -12, bool))
    assert causal.kv == (create(Mask(right=0), len_q=30, len_kv=18, block_size=(8, 4)) & mask).kv


def test_documents_see_themselves():
    starts = np.array([0, 5, 5, 23, 40], np.int32)
    document = np.repeat([0, 1, 2, 3, 4], [5, 0, 18, 17, 3])
    mask = create(Mask(right=0), cu_seqlens=starts, len_q=43, len_kv=43, block_size=8)
    check_mask(mask, (document[:, None] == document)[None, None] & np.tri(43, dtype=bool))
    check_mask(create(cu_seqlens=starts, block_size=8), (document[:40, None] == document[:40])[None, None])


@given(st.data())
def test_arrays_broadcast_over_any_axis(data):
    full = (2, 3, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    shape = [data.draw(st.sampled_from([1, n])) for n in full][data.draw(st.integers(0, 3)) :]
    array = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < data.draw(st.sampled_from([0.5, 0.95]))
    mask = create(array, batch=2, heads=3, len_q=full[2], len_kv=full[3], block_size=(5, 3))
    check_mask(mask, np.broadcast_to(array, full))
    other = create(Mask(right=0), len_q=full[2], len_kv=full[3], block_size=(5, 3))
    check_mask(other & array, np.broadcast_to(array, full) & np.tri(*full[2:], full[3] - full[2], bool))
    check_mask(array | other, np.broadcast_to(array, full) | np.tri(*full[2:], full[3] - full[2], bool))


def test_the_kinds_of_some_queries_together():
    rng = np.random.default_rng(7)
    dense = np.repeat(np.repeat(rng.random((2, 2, 9, 6)) < 0.6, 4, axis=2), 4, axis=3)
    dense &= rng.random(dense.shape) < 0.98
    mask = create(dense, block_size=8)
    for batches, heads, first, last in ((0, 1, 0, 7), (0, 2, 3, 19), (1, 2, 30, 35), (0, 1, 5, 5)):
        queries, rows = slice(first, last + 1), slice(first // 8 * 8, last // 8 * 8 + 8)
        part = dense[batches:2, :heads, rows].reshape(-1, 24)
        expected = naive_kinds(part, (len(part), 8))[0]
        seen, full = mask.seen(slice(batches, 2), slice(0, heads), queries)
        np.testing.assert_array_equal(np.where(full, FULL, np.where(seen, PARTIAL, EMPTY)), expected)


def test_memory_grows_with_the_blocks_that_are_seen():
    n = 2**13
    shuffled = np.random.default_rng(0).permutation(n).astype(np.int32)
    tracemalloc.start()
    by_bounds = create(Mask(left=200, right=0), len_q=2**18, len_kv=2**18)
    by_pairs = create(lambda b, h, q, k: (shuffled[q] ^ shuffled[k]) % 4096 == 1, len_q=n, len_kv=n, block_size=1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert by_bounds.sparsity > 0.998 and by_pairs.counts[1] > 0
    assert peak < n * n < 2**36, "less than a byte for every pair"
    held = sum(x.nbytes for lists in (by_bounds.kv, by_bounds.q) for x in (lists.offsets, lists.indices, lists.full))
    assert held < 2**18


def test_bounds_spare_the_pairs(monkeypatch):
    looked = []
    monkeypatch.setattr(kinds, "visible", lambda *args: looked.append(args[3].shape[0]) or kinds.evaluate)
    ids = np.repeat(np.arange(16), 64)
    for rule in (lambda b, h, q, k: q // 64 >= k // 64, lambda b, h, q, k: ids[q] == ids[k]):
        assert create(rule, len_q=1024, len_kv=1024, block_size=64).counts[1] == 0
    assert not looked


def test_bands_compose_to_bands():
    causal, window = Mask(right=0), Mask(left=8, right=4)
    assert causal & window == Mask(left=8, right=0) and causal | window == Mask(right=4)
    assert Mask() & Mask(left=3, alignment="top-left") == Mask(left=3, alignment="top-left")
    assert (Mask() | causal).kind == "none" and causal & Mask(tensor=True) == Mask(right=0, tensor=True)
    assert Mask(right=0, tensor=True) | Mask(left=1, right=0, tensor=True) == Mask(right=0, tensor=True)
    assert Mask(left=-5, right=2) | Mask(left=0, right=0) == Mask(left=0, right=0)


@given(st.tuples(*[st.none() | st.integers(-6, 6)] * 4), st.integers(1, 12), st.integers(1, 12))
def test_composed_bands_are_those_of_the_pairs(sides, len_q, len_kv):
    a, b = Mask(*sides[:2]), Mask(*sides[2:])

    def pairs(mask: Mask) -> np.ndarray:
        own = np.arange(len_q)[:, None] + mask.offset(len_q, len_kv)
        distance = np.arange(len_kv) - own
        low, high = (-99 if mask.left is None else -mask.left), (99 if mask.right is None else mask.right)
        return (distance >= low) & (distance <= high)

    np.testing.assert_array_equal(pairs(a & b), pairs(a) & pairs(b))
    try:
        either = a | b
    except InvalidArgument as error:
        assert "they do not meet" in str(error)
        both = create(a, len_q=len_q, len_kv=len_kv, block_size=4) | b
        np.testing.assert_array_equal(both.to_dense()[0, 0], pairs(a) | pairs(b))
    else:
        np.testing.assert_array_equal(pairs(either), pairs(a) | pairs(b))


def test_a_block_mask_says_what_it_is():
    mask = create(Mask(right=0), len_q=1000, len_kv=1000)
    assert repr(mask) == "<BlockMask: 1000 x 1000 in blocks of 128 x 128, 43.8% empty>"
    assert mask.counts == (28, 8, 28) and mask.sparsity == 28 / 64
    report = str(mask.sheet())
    assert "28 full, 8 partial, 28 empty" in report and "the same for all batch elements and heads" in report
    assert "  " + "█" * 14 + "▒" * 2 in report.splitlines() and "▒▒" + "·" * 14 in mask._repr_html_()
    heads = create(lambda b, h, q, k: q - k < 99 * h, heads=4, len_q=300, len_kv=300)
    assert "of 4 heads" in str(heads.sheet()) and str(create(Mask(), len_q=0, len_kv=0)).endswith("0.0% empty")
    with pytest.raises(ValueError, match="read-only"):
        mask.kv.indices[0] = 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


def test_a_picture_has_the_shares():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra viz)")
    import matplotlib.text

    mask = create(lambda b, h, q, k: q >= k + 128 * h, heads=3, len_q=512, len_kv=512)
    picture = mask.plot(head=1)
    words = {text.get_text() for text in picture.figure.findobj(matplotlib.text.Text)}
    assert {"full 18.8%", "partial 18.8%", "skipped 62.5%", "62.5% empty"} <= words
    assert "batch element 0, head 1; blocks of 128 x 128" in words
    [image] = picture.figure.axes[0].images
    expected = 2 - naive_kinds(np.tri(512, k=-128, dtype=bool), (128, 128))
    np.testing.assert_array_equal(image.get_array(), expected)
    assert picture._repr_png_().startswith(b"\x89PNG")
    [image] = create(Mask(left=99), len_q=2**17, len_kv=2**17).plot(head=3).figure.axes[0].images
    assert max(image.get_array().shape) <= 512
    with pytest.raises(InvalidArgument, match=r"^head is 3; expected an integer from 0 to 2"):
        mask.plot(head=3)


CAUSAL = create(Mask(right=0), len_q=64, len_kv=64, block_size=16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create(Mask(right=0)), r"^len_q is None; expected a length"),
        (lambda: create(Mask(right=0), len_q=3, len_kv=-1), r"^len_kv is -1; expected a length"),
        (lambda: create(3, len_q=3, len_kv=3), r"^mask_mod is 3; expected a function"),
        (lambda: create(lambda b, h, q, k: b == q, len_q=3, len_kv=3), r"^batch is None but the mask depends on b"),
        (lambda: create(lambda b, h, q, k: h == q, batch=2, len_q=3, len_kv=3), r"^heads is None but .* depends on h"),
        (lambda: create(lambda b, h, q, k: q - k, len_q=3, len_kv=3), r"^mask_mod returned an? int number"),
        (lambda: create(np.ones((3, 3))), r"^mask is float64 with 2 axes; expected bool"),
        (lambda: create(np.ones((2, 3, 3), bool), heads=4), r"^mask has shape \(1, 2, 3, 3\); expected"),
        (lambda: create(Mask(tensor=True), len_q=3, len_kv=3), r"^mask is Mask\(tensor=True\), whose boolean tensor"),
        (lambda: create(Mask(), len_q=3, len_kv=3, block_size=0), r"^block_size is 0; expected one or two integers"),
        (lambda: create(Mask(), len_q=3, len_kv=3, block_size=(4, 4.5)), r"^block_size is \(4, 4.5\)"),
        (lambda: create(Mask(), len_q=3, len_kv=3, batch=0), r"^batch is 0; expected an integer from 1"),
        (lambda: create(blocks=np.ones((2, 2), bool), len_q=3, len_kv=3), r"^blocks has shape \(1, 1, 2, 2\)"),
        (lambda: create(cu_seqlens=np.array([0, 4, 2])), r"^cu_seqlens is array\(\[0, 4, 2\]\); expected integers"),
        (lambda: create(cu_seqlens=np.array([0, 4]), len_q=3), r"^cu_seqlens is given but len_q is 3 and len_kv 4"),
        (lambda: CAUSAL & create(CAUSAL, block_size=8), r"have different sizes"),
        (lambda: create(np.ones((2, 1, 4, 4), bool)) & np.ones((3, 1, 4, 4), bool), r"^mask has shape"),
        (lambda: Mask(right=0) & Mask(right=0, alignment="top-left"), r"is no band: they are aligned differently"),
        (lambda: Mask(right=0) | Mask(left=3, tensor=True), r"is no band: only one of them has a boolean tensor"),
    ],
)  # fmt: skip
def test_what_makes_no_mask_is_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_a_rule_may_be_replayed_elsewhere():
    ids = np.array([0, 0, 1, 1, 1, 2, 2, 2], np.int32)
    inner = create(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), len_q=8, len_kv=8, block_size=2).mask_mod
    shifted = create(lambda b, h, q, k: inner(b, h, q + 2, k), len_q=6, len_kv=8, block_size=2)
    dense = (ids[:, None] == ids) & np.tri(8, dtype=bool)
    check_mask(shifted, dense[None, None, 2:])
    assert len((create(inner, len_q=8, len_kv=8) & inner).rule.arrays) == 1, "an array that both read is held once"


def test_a_traced_rule_is_one_and_a_traced_score_is_not() -> None:
    ids = np.array([0, 0, 1, 1, 1])
    traced = mods.trace("mask_mod", lambda b, h, q, k: ids[q] == ids[k])
    made = create(traced, len_q=5, len_kv=5, block_size=2)
    np.testing.assert_array_equal(made.to_dense()[0, 0], ids[:, None] == ids)
    with pytest.raises(InvalidArgument, match=r"traced as a score; expected what mods.trace makes of a mask_mod"):
        create(mods.trace("score_mod", lambda s, b, h, q, k: 2 * s), len_q=5, len_kv=5)


@pytest.mark.parametrize(
    ("rule", "band"),
    [
        (mods.causal(), Mask(None, 0, "top-left")),
        (mods.causal(3), Mask(None, 3, "top-left")),
        (mods.causal(-3), None),
        (mods.sliding_window(5, 7), Mask(5, 7, "top-left")),
        (mods.sliding_window(5, 7, np.array(2)), Mask(3, 9, "top-left")),
        (mods.sliding_window(5, -1), Mask(5, None, "top-left")),
        (lambda b, h, q, k: (q - k < 6) & (k <= q + 1) & (k - 1 < 2 + q), Mask(5, 1, "top-left")),
        (lambda b, h, q, k: k > q, None),
        (lambda b, h, q, k: 2 * k <= q, None),
        (lambda b, h, q, k: k <= q + h, None),
        (lambda b, h, q, k: (k <= q) | (k < 3), None),
        (mods.dilated_window(5, 5, 2), None),
        (mods.block_window(4), None),
        (None, Mask(alignment="top-left")),
        (Mask(left=4, right=0), Mask(4, 0, "top-left")),
    ],
)
def test_bands_are_known_as_such(rule, band):
    mask = create_block_mask(rule, heads=2, len_q=40, len_kv=40, block_size=16)
    assert mask.band == band
    if band is not None:
        queries, keys = np.arange(40)[:, None], np.arange(40)
        left, right = (40 if side is None else side for side in (band.left, band.right))
        np.testing.assert_array_equal(mask.to_dense()[0, 0], (queries - left <= keys) & (keys <= queries + right))
        assert create_block_mask(rule, heads=2, len_q=40, len_kv=40, blocks=np.eye(1, dtype=bool)).band is None
        assert (mask & (lambda b, h, q, k: k % 2 == 0)).band is None
