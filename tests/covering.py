"""Few cases that hold every pair of settings: what one feature does to another shows in at least one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

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
