"""What the bench asks of anything it times, and the reasons that several peers share for not taking a problem."""

from __future__ import annotations

from typing import Any, Protocol

from cuflash.bench.timing import Runner
from cuflash.cases.inputs import Inputs
from cuflash.cases.table import Case
from cuflash.features import needs
from cuflash.problem import Problem


class Implementation(Protocol):
    """Something that can be timed."""

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """Why the problem cannot even be put to it; None when it can."""

    def prepare(self, case: Case, inputs: Inputs) -> Runner:
        """Make the case ready to be launched again and again on CuPy's current stream."""


def beyond(problem: Problem, *features: str) -> str | None:
    """Which needs of the problem are not among these features, in words."""
    everywhere = "backward", "gqa", "dim_v != dim_qk", "unaligned rows"
    missing = [need for need in needs(problem) if need not in (*everywhere, *features)]
    missing += ["cache"] if problem.layout == "cache" and "cache" not in features else []
    return f"no {', '.join(missing)}" if missing else None


def window_size(problem: Problem) -> tuple[int, ...]:
    """Keys left and right of the diagonal, as FlashAttention counts them: -1 is unbounded, causal is (-1, 0)."""
    return tuple(-1 if side is None else side for side in (problem.mask.left, problem.mask.right))


def own_words(problem: Problem) -> dict[str, Any]:
    """The keywords of `flash_attn_func` for the problem, as far as bands and soft caps go."""
    return {
        "softmax_scale": problem.softmax_scale,
        "window_size": window_size(problem),
        "softcap": problem.softcap,
        "alignment": problem.mask.alignment,
    }


def aligned_otherwise(problem: Problem, alignment: str) -> str | None:
    """Why masks of this alignment would not mean the same."""
    mask = problem.mask
    # Equal lengths have one diagonal; those of packed sequences live on the device.
    square = problem.layout == "dense" and problem.len_q == problem.len_kv
    if mask.kind == "none" or mask.alignment == alignment or square:
        return None
    return f"its masks are aligned {alignment}"
