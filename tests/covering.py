"""Few cases that hold every pair of settings, or all that many cases hold.

What one feature does to another shows in at least one of the former.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

import pytest

Combination = dict[str, Any]


def pairs_of(case: Mapping[str, Any]) -> set[tuple]:
    """Every pair of (factor, level) that a case holds."""
    return set(combinations(sorted(case.items()), 2))


def every_pair(factors: Mapping[str, Sequence[str]], tries: int = 30) -> list[Combination]:
    """Cases (factor -> level) that together hold every pair of levels of any two factors; always the same ones.

    Greedy: every case starts from a pair that is still missing, and of some random completions the one with the most
    missing pairs is taken.
    """
    random = Random(0)
    ordered = sorted(factors)
    missing = {
        ((a, x), (b, y)): None for a, b in combinations(ordered, 2) for x in factors[a] for y in factors[b]
    }  # a dict: its order does not change from run to run
    cases = []
    while missing:
        first = dict(next(iter(missing)))
        candidates = [{name: random.choice(factors[name]) for name in ordered} | first for _ in range(tries)]
        best = max(candidates, key=lambda case: sum(pair in missing for pair in pairs_of(case)))
        for pair in pairs_of(best):
            missing.pop(pair, None)
        cases.append({name: best[name] for name in factors})
    return cases


def few_with_everything(held: Mapping[str, Collection[Hashable]]) -> list[str]:
    """Few of the keys: they hold together all that any key holds; always the same ones, greedily chosen."""
    missing = {thing for things in held.values() for thing in things}
    few = []
    while missing:
        few.append(max(held, key=lambda key: len(missing.intersection(held[key]))))
        missing.difference_update(held[few[-1]])
    return few


def sampled(cases: Mapping[str, tuple[Any, Collection[Hashable]]], every: int) -> list[Any]:
    """Parameters of a test, from their names and, for each, its value and what that is an example of.

    In a sample are few that are an example of everything, and of the others one in ``every``.
    """
    few = few_with_everything({name: held for name, (_, held) in cases.items()})
    rest = pytest.mark.sample(every)
    return [pytest.param(value, id=name, marks=() if name in few else rest) for name, (value, _) in cases.items()]
