"""Arguments of other libraries' signatures that are not served yet: refused, never ignored."""

from __future__ import annotations

from typing import Any

from cuflash.errors import UnsupportedProblem


def refuse_unserved(dropout_p: float, alibi_slopes: Any = None, return_attn_probs: bool = False) -> None:
    """Raise UnsupportedProblem for the first of the arguments that asks for something."""
    if dropout_p != 0:
        raise UnsupportedProblem(f"dropout_p is {dropout_p!r}; dropout is not supported yet. Pass dropout_p=0.0.")
    if alibi_slopes is not None:
        raise UnsupportedProblem("alibi_slopes is given; ALiBi is not supported yet. Pass alibi_slopes=None.")
    if return_attn_probs:
        raise UnsupportedProblem(
            "return_attn_probs is True; probabilities are never stored. "
            "Pass return_lse=True for the log-sum-exp, with which exp(scores - lse) gives them."
        )
