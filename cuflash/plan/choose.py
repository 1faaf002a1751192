"""Choosing a family for a problem on a device, and saying why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cuflash.device import Device
from cuflash.errors import InvalidArgument, UnsupportedProblem
from cuflash.plan.families import FAMILIES
from cuflash.plan.plan import Plan
from cuflash.problem import Problem
from cuflash.sheet import Sheet


def why_not(problem: Problem, device: Device) -> dict[str, list[str]]:
    """For every family, the reasons against it; empty for one that could run the problem."""
    return {family.name: family.why_not(problem, device) for family in FAMILIES}


@lru_cache(maxsize=1024)
def choose(problem: Problem, device: Device, family: str | tuple[str, ...] | None = None) -> Plan:
    """Plan a problem with the first family that runs it, of all or of those that are named.

    Raises
    ------
    InvalidArgument
        When there is no family of a name.
    UnsupportedProblem
        When no family (or none of those named) runs the problem; the message lists every reason.
    """
    reasons = why_not(problem, device)
    named = tuple(reasons) if family is None else (family,) if isinstance(family, str) else family
    for name in named:
        if name not in reasons:
            raise InvalidArgument(f"there is no kernel family {name!r}; there are: {', '.join(reasons)}.")
    for candidate in FAMILIES:
        if candidate.name in named and not reasons[candidate.name]:
            return candidate.plan(problem, device)
    lines = [f"  {name:<8}{'; '.join(why)}" for name, why in reasons.items() if name in named]
    raise UnsupportedProblem(
        f"no kernel runs this on {device}:\n  {problem}\n"
        + "\n".join(lines)
        + "\n`python -m cuflash explain` shows the choice for a problem without running it."
    )


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would run and why not the rest; ``str()`` of it is the report."""

    problem: Problem
    device: Device
    plan: Plan | None
    """None when no family runs the problem."""
    why_not: dict[str, list[str]]
    blocks: str = ""
    """What a block mask leaves to be visited, in words."""

    def lines(self) -> list[tuple[str, str]]:
        """The report, line by line: a label and a text."""
        lines = [("FLOPs", f"{self.problem.flops() / 1e9:,.2f} G")]
        lines += [("precision", self.problem.precision)] if self.problem.precision else []
        lines += [("blocks", self.blocks)] if self.blocks else []
        lines += self.plan.lines() if self.plan is not None else []
        preferred = True  # to the family that was chosen
        for name, reasons in self.why_not.items():
            if self.plan is not None and name == self.plan.family:
                preferred = False
                continue
            first = "not asked for" if self.plan is None or preferred else f"{self.plan.family} comes first"
            lines.append((f"not {name}", "; ".join(reasons) or first))
        return lines

    def sheet(self) -> Sheet:
        """The report."""
        return Sheet(f"{self.problem} on {self.device}", self.lines())

    def __str__(self) -> str:
        return str(self.sheet())

    def __repr__(self) -> str:
        family = "no kernel family" if self.plan is None else f"family {self.plan.family}"
        return f"<{type(self).__name__}: {self.problem} on {self.device}, {family}>"

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        return self.sheet()._repr_html_()


def explain(problem: Problem, device: Device, family: str | tuple[str, ...] | None = None) -> Explanation:
    """Plan a problem without running it, and keep the reasons against every other family."""
    try:
        plan = choose(problem, device, family)
    except UnsupportedProblem:
        plan = None
    return Explanation(problem, device, plan, why_not(problem, device))
