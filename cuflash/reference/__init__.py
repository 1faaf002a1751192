"""Attention in NumPy: the CPU backend of the public functions, and the definition of every edge."""

from __future__ import annotations

from cuflash.reference.attention import (
    Gradients,
    backward,
    backward_varlen,
    forward,
    forward_paged,
    forward_varlen,
)
from cuflash.reference.cache import forward_cache
from cuflash.reference.merge import merge, merge_backward
from cuflash.reference.tangents import Tangents

__all__ = [
    "Gradients", "Tangents", "backward", "backward_varlen", "forward", "forward_cache", "forward_paged",
    "forward_varlen", "merge", "merge_backward",
]  # fmt: skip
