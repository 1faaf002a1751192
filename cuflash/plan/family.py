"""Family: one set of kernels that together serve one direction or both, declared as data, and the plans it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cuflash.device import Device
from cuflash.errors import UnsupportedProblem
from cuflash.features import needs
from cuflash.plan.plan import Plan
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True)
class Family:
    """One set of kernels that together serve one direction or both."""

    name: str
    summary: str
    min_capability: tuple[int, int]
    dtypes: tuple[str, ...]
    max_dim: int
    """The largest dim_qk and dim_v."""
    features: tuple[str, ...]
    """Names of rows of :data:`cuflash.features.FEATURES`; another that a problem needs is a reason why not."""
    forward: Callable[[Problem, Device], Plan]
    backward: Callable[[Problem, Device], Plan] | None
    """None in a family without the feature ``backward``."""
    caches: bool = False
    """Its kernels read lengths of caches on the device (``CacheSequence``)."""
    only: bool = False
    """Later architectures than `min_capability` lack its instructions."""
    leave: Callable[[Problem, Device], list[str]] = lambda problem, device: []
    """Reasons to leave what it could run to a later family."""

    def why_not(self, problem: Problem, device: Device) -> list[str]:
        """Reasons why this family does not run the problem; empty when it does."""
        reasons = []
        if device.capability < self.min_capability or (self.only and device.capability != self.min_capability):
            major, minor = self.min_capability
            reasons.append(f"needs sm_{major}{minor}" + ("a" if self.only else ""))
        if problem.dtype.name not in self.dtypes:
            reasons.append(f"no {problem.dtype} (has {', '.join(self.dtypes)})")
        for name, dim in (("dim_qk", problem.dim_qk), ("dim_v", problem.dim_v)):
            if dim > self.max_dim:
                reasons.append(f"{name} {dim} > {self.max_dim}")
        reasons += [f"no {feature}" for feature in needs(problem) if feature not in self.features]
        if problem.page_size and problem.direction == "backward":
            reasons.append("no gradients of pages: sequences may share them")
        if problem.tangents and problem.block_mask:
            reasons.append("no tangents of lists of blocks; a mask_mod has them")
        if problem.layout == "cache" and not self.caches:
            reasons.append("no cache whose lengths are on the device")
        if problem.layout == "cache" and problem.direction == "backward":
            reasons.append("no gradients of a cache")
        return reasons or self.leave(problem, device)

    def plan(self, problem: Problem, device: Device) -> Plan:
        """The plan for a problem this family has no reason against."""
        make = self.forward if problem.direction == "forward" else self.backward
        if make is None:
            raise UnsupportedProblem(f"family {self.name} has no backward.")
        return make(problem, device)
