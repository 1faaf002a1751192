"""Dropout as a small value: which scheme draws the mask, from which seed and offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scheme = Literal["byte", "word"]
"""``byte``: 8 random bits an element, the mask of PyTorch's flash kernels and FlashAttention-2.
``word``: 32 bits an element, the mask of PyTorch's memory-efficient kernels."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Probabilities are dropped with chance ``p``; the kept ones are multiplied by :attr:`keep_scale`."""

    p: float
    """Chance of dropping, 0 <= p < 1."""
    scheme: Scheme = "byte"
    unbiased: bool = False
    """Scale by the chance of keeping that 8 bits really give; by default 1 / (1 - p), as PyTorch does."""

    @property
    def threshold(self) -> int:
        """Bytes up to this one keep an element (``byte`` scheme)."""
        return int(float(np.float32(1) - np.float32(self.p)) * 255)

    @property
    def keep_scale(self) -> float:
        """What kept probabilities are multiplied by."""
        if self.unbiased and self.scheme == "byte":
            return 256 / (self.threshold + 1)
        return 1 / (1 - self.p)
