"""How problems, masks, plans and explanations show themselves: in a line, in a notebook, in a picture of tiles."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import drawing
from cuflash.errors import InvalidArgument
from cuflash.features import FEATURES
from cuflash.masks import Mask, band
from cuflash.problem import Problem, visible_pairs

PROBLEMS = [feature.example for feature in FEATURES.values()]


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("problem", PROBLEMS, ids=list(FEATURES))
def test_what_a_problem_and_its_mask_print_makes_them_again(problem: Problem) -> None:
    names = {"Problem": Problem, "Mask": Mask}
    if problem.score_mod is problem.mask_mod is problem.block_mask is None:  # which are functions
        assert eval(repr(problem), names) == problem
    assert eval(repr(problem.mask), names) == problem.mask
    assert "False" not in repr(problem).replace("bias_boxes=False", "").replace("ascending=False", "")
    assert len(repr(problem)) < 220


@pytest.mark.parametrize("problem", PROBLEMS, ids=list(FEATURES))
def test_a_notebook_shows_what_the_report_says(problem: Problem) -> None:
    explanation = cuflash.explain(problem, device="h100")
    for value, report in ((problem, problem.sheet()), (problem.mask, problem.mask.sheet()), (explanation, explanation)):
        shown = value._repr_html_()
        assert shown.startswith("<pre ") and shown.count("<pre") == 1
        assert text_of(shown).split() == str(report).split()
    plan = explanation.plan
    assert plan is not None
    shown_words = text_of(plan._repr_html_()).split()
    for label, text in plan.lines():
        assert " ".join([label, *text.split()]) in " ".join(shown_words)
    assert len(repr(plan)) < 200 and all(step.kernel in repr(plan) for step in plan.steps)


def test_a_page_escapes_what_is_no_markup() -> None:
    problem = replace(PROBLEMS[0], mask=Mask(left=3, right=2))
    assert "&lt;=" in problem.mask._repr_html_() and "<= i" not in problem.mask._repr_html_()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask(), "every key"),
        (Mask(right=0), "causal"),
        (Mask(right=0, alignment="top-left", tensor=True), "causal, aligned top-left, and a boolean tensor"),
        (Mask(left=3), "window, 3 before and all after"),
        (Mask(left=0, right=2), "window, 0 before and 2 after"),
    ],
)
def test_a_mask_in_words(mask: Mask, words: str) -> None:
    assert str(mask) == words and words in mask.sheet().title


def naive_tiles(seen: np.ndarray, tile: tuple[int, int]) -> list[list[float]]:
    """The share of each tile's pairs that are seen."""
    rows, columns = (range(0, n, size) for n, size in zip(seen.shape, tile, strict=True))
    return [[seen[i : i + tile[0], j : j + tile[1]].mean() for j in columns] for i in rows]


MASKS = [
    Mask(),
    Mask(right=0),
    Mask(right=0, alignment="top-left"),
    Mask(left=5),
    Mask(right=9),
    Mask(left=7, right=0),
    Mask(left=0, right=0),
    Mask(left=40, right=13, alignment="top-left"),
]


@pytest.mark.parametrize("lengths", [(64, 64), (1, 70), (70, 1), (50, 33), (33, 100), (0, 5), (5, 0)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("tile", [(16, 16), (7, 12), (64, 1)])
def test_tiles_are_those_of_the_pairs(mask: Mask, lengths: tuple[int, int], tile: tuple[int, int]) -> None:
    i, j = np.arange(lengths[0])[:, None], np.arange(lengths[1])
    own = i + mask.offset(*lengths)
    seen = np.ones(lengths, bool)
    if mask.left is not None:
        seen &= j >= own - mask.left
    if mask.right is not None:
        seen &= j <= own + mask.right
    shape = [-(-n // size) for n, size in zip(lengths, tile, strict=True)]
    shares = np.array(naive_tiles(seen, tile)).reshape(shape)
    expected = np.where(shares == 1, 0, np.where(shares > 0, 1, 2))
    counts, kinds, pairs = mask._tiles(*lengths, tile, None)
    np.testing.assert_array_equal(kinds, expected)
    assert counts == [(expected == kind).sum() for kind in range(3)]
    assert pairs == seen.sum() == visible_pairs(mask, *lengths)

    tensor = np.random.default_rng(3).random(lengths) < 0.9
    tensor[: tile[0]] = True
    shares = np.array(naive_tiles(seen & tensor, tile)).reshape(shape)
    counts, kinds, pairs = replace(mask, tensor=True)._tiles(*lengths, tile, tensor)
    np.testing.assert_array_equal(kinds, np.where(shares == 1, 0, np.where(expected < 2, 1, 2)))
    assert pairs == (seen & tensor).sum()


class Asked:
    """Lengths without a problem."""

    def __init__(self, len_q: int, len_kv: int) -> None:
        self.len_q, self.len_kv = len_q, len_kv


def words_of(picture: drawing.Picture) -> str:
    """All that is written in a picture."""
    import matplotlib.text

    return "\n".join(text.get_text() for text in picture.figure.findobj(matplotlib.text.Text))


def test_a_picture_has_the_shares() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra viz)")
    picture = Mask(right=0).plot(Asked(256, 256), tile=(64, 64))
    assert {"causal", "full 37.5%", "partial 25.0%", "skipped 37.5%"} <= set(words_of(picture).splitlines())
    assert f"{257 / 512:.1%} of the pairs; tiles of 64 x 64" in words_of(picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    axes = drawing.panels(1, 2, 3, 3)[1][0]
    assert Mask().plot(Asked(3, 9), ax=axes[1]).figure is axes[0].figure
    assert len(axes[1].images) == 1 and not axes[0].images


def test_the_picture_of_long_sequences_is_small(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra viz)")
    picture = band(True, (4096, -1)).plot(Asked(131072, 131072))
    [image] = picture.figure.axes[0].images
    assert max(image.get_array().shape) <= 512
    picture.save(tmp_path / "mask.svg")
    assert (tmp_path / "mask.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("mask", "tensor", "message"),
    [
        (
            Mask(tensor=True),
            None,
            r"^attn_mask is None; expected an array of bool of shape \(4, 6\), as tensor is",
        ),
        (Mask(), np.ones((4, 6), bool), r"^attn_mask is of bool and shape \(4, 6\); expected None, as tensor is False"),
        (Mask(tensor=True), np.ones((4, 6)), r"^attn_mask is of float64"),
        (Mask(tensor=True), np.ones((4, 5), bool), r"^attn_mask is of bool and shape \(4, 5\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(mask: Mask, tensor: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        mask.plot(Asked(4, 6), attn_mask=tensor)


@pytest.mark.parametrize("tile", [64, (0, 64), (64, 64.5), None])
def test_a_tile_that_is_none_is_refused(tile: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^tile is .*; expected two sizes of at least 1"):
        Mask().plot(Asked(4, 6), tile=tile)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"extra viz: .*pip install -e '\.\[viz\]'"):
        Mask().plot(Asked(4, 6))
