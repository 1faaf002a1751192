"""Attention in NumPy: the CPU backend of the public functions, and the definition of every edge."""

from __future__ import annotations

from cuflash.reference.attention import backward, backward_varlen, forward, forward_varlen

__all__ = ["backward", "backward_varlen", "forward", "forward_varlen"]
