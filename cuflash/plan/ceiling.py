"""What the tensor cores can reach at most: a count of what one tile takes of each unit of a multiprocessor.

It knows no latencies, no instruction issue, no masks and no power, so that what is measured lies below it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Cycles that each unit is busy for one query tile and one kv tile."""

    tensor_cores: float
    exponentials: float
    shared_memory: float

    @property
    def share(self) -> float:
        """Of the tensor cores' peak, what the slowest unit leaves."""
        return self.tensor_cores / max(self.tensor_cores, self.exponentials, self.shared_memory)

    def __str__(self) -> str:
        others = self.exponentials / self.tensor_cores, self.shared_memory / self.tensor_cores
        return (
            f"{self.share:.0%} of the tensor cores' peak: exponentials take {others[0]:.0%} and shared memory "
            f"{others[1]:.0%} of the time of their products"
        )
