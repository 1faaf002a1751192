"""What a problem needs, and an example of each feature."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cuflash.features import FEATURES, PLAIN, needs
from cuflash.masks import Mask


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"direction": "backward"}, "backward"),
        ({"layout": "varlen"}, "varlen"),
        ({"layout": "varlen", "page_size": 16}, "paged"),
        ({"mask": Mask(right=0)}, "causal"),
        ({"mask": Mask(left=100, right=20)}, "window"),
        ({"mask": Mask(tensor=True)}, "boolean mask"),
        ({"softcap": 5.0}, "softcap"),
        ({"heads_kv": 2}, "gqa"),
        ({"dim_v": 32}, "dim_v != dim_qk"),
        ({"deterministic": True}, "deterministic"),
        ({"copy_bytes": 4}, "unaligned rows"),
        ({"ascending": False}, "zero or negative strides"),
        ({"num_splits": 2}, "split keys"),
    ],
)
def test_needs(changes: dict, feature: str) -> None:
    assert needs(replace(PLAIN, **changes)) == [feature]
    assert feature in FEATURES


def test_every_feature_has_an_example_that_needs_it_alone() -> None:
    assert {name: needs(feature.example) for name, feature in FEATURES.items()} == {name: [name] for name in FEATURES}
    assert needs(PLAIN) == []
