"""Problem -> the policies of the kernels, by the names that they have in CUDA (``kernels/attention/``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import numpy as np

from cuflash.mods.distance import learned
from cuflash.mods.emit import in_units, work
from cuflash.mods.expression import in_order
from cuflash.plan.config import Written
from cuflash.problem import Problem

_MASKS = {"none": "NoMask", "causal": "CausalMask", "window": "WindowMask"}
_DROPOUTS = {None: "NoDropout", "byte": "ByteDropout", "word": "WordDropout"}


class Policies(TypedDict):
    """What an ``AttentionConfig`` takes from the problem alone."""

    element: str
    sequence: str
    dim_qk: int
    dim_v: int
    mask: str
    score: str
    dropout: str
    written: Written | None


def policies(problem: Problem) -> Policies:
    """What every kernel that computes scores takes from the problem, whatever its tile."""
    return Policies(
        element=problem.dtype.cuda,
        sequence=sequence(problem),
        dim_qk=problem.dim_qk,
        dim_v=problem.dim_v,
        mask=mask(problem),
        score=score(problem),
        dropout=_DROPOUTS[problem.dropout],
        written=written(problem),
    )


def sequence(problem: Problem) -> str:
    """The policy that says how long sequences are and where they lie."""
    if problem.layout == "cache":
        return "PagedCacheSequence" if problem.page_size else "CacheSequence"
    if problem.page_size:
        return "PagedSequence"
    return "VarlenSequence" if problem.layout == "varlen" else "DenseSequence"


def sink(problem: Problem) -> str:
    """The policy that closes a row's softmax."""
    return "LearnableSink" if problem.sink else "NoSink"


def mask(problem: Problem) -> str:
    """The mask policy: a band, and what elements must pass besides."""
    policy = _MASKS[problem.mask.kind]
    policy = f"TensorMask<{policy}>" if problem.mask.tensor else policy
    policy = f"WrittenMask<{policy}, MaskMod>" if problem.mask_mod else policy
    return f"ListedMask<{policy}, BlockMod>" if problem.block_mask else policy


def mask_without_lists(problem: Problem) -> str:
    """The same for a kernel that walks no lists: their rule says all that they do."""
    return mask(problem).replace("ListedMask", "WrittenMask")


def written(problem: Problem) -> Written | None:
    """The functions that a caller wrote, if any."""
    if not problem.written:
        return None
    fast = problem.dtype.itemsize == 2 and max(problem.len_q, problem.len_kv, problem.batch, problem.heads_q) <= 2**20
    blocks = problem.block_mask.rule if problem.block_mask else None
    gradients = problem.captured_gradients
    exact = bool(gradients) and problem.deterministic
    return Written(problem.score_mod, problem.mask_mod, gradients, problem.captured_flat, fast, exact, blocks)


def written_work(problem: Problem) -> int:
    """How many operations a caller's functions do for every pair; one that reads counts as three."""
    mods = [mod for mod in (problem.score_mod, problem.mask_mod) if mod is not None]
    return sum(work(mod.expression) for mod in mods)


def knows_its_place(problem: Problem) -> bool:
    """Whether a caller's functions ask for more than the score: where it is, or numbers of an array."""
    if problem.mask_mod is not None or problem.block_mask is not None:
        return True
    return problem.score_mod is not None and any(
        node.op in ("position", "load") for node in in_order(problem.score_mod.expression)
    )


def captured_gradient(problem: Problem, in_fragments: bool = True) -> str:
    """The policy that says where the gradients of what a written score reads go."""
    if not problem.captured_gradients:
        return "NoCapturedGradient"
    return "DistanceCapturedGradient" if in_fragments and learns_distances(problem) else "AddedCapturedGradient"


def learns_distances(problem: Problem) -> bool:
    """Whether all numbers that have gradients are added to the score, and the distance alone decides which are read.

    Of a score whose slope is 1, as the kernels then sum what reaches the product q.k.
    """
    if problem.score_mod is None or problem.softcap:
        return False
    return bool(learned(problem.score_mod, problem.captured_gradients))


def score(problem: Problem) -> str:
    """The score policy: a scale or a soft cap, what a caller makes of that, plus a term for each additive bias."""
    policy = f"{_base_score(problem)}<{_real(problem)}>"
    policy = f"WrittenScore<{policy}, ScoreMod>" if problem.score_mod else policy
    if problem.alibi:
        policy = f"Plus<{policy}, Alibi>"
    if problem.bias:
        neighbours = problem.bias_boxes and not problem.bias_broadcast[3]
        policy = f"Plus<{policy}, Bias<{problem.bias.cuda}{', true' if neighbours else ''}>>"
    return policy


def tangent_bias(problem: Problem) -> str:
    """The policy that says how a bias changes."""
    changes = problem.bias if "bias" in (problem.tangents or ()) else None
    return f"BiasTangent<{changes.cuda}>" if changes else "NoBiasTangent"


def score_without_bias(problem: Problem) -> str:
    """The score policy of a kernel that adds the bias itself to a logit, score times unit, as it makes an exponent."""
    return score(replace(problem, bias=None))


def score_beside_bias(problem: Problem) -> str:
    """The score policy, in natural logits, of a kernel that adds the bias itself."""
    policy = score_without_bias(problem)
    return policy if problem.alibi else f"NaturalScore<{policy}>"


def unit_score(problem: Problem) -> str:
    """A score policy with the unit of the problem's, for row-wise kernels that read rows' states."""
    mods = written(problem)
    if problem.alibi or problem.bias:
        return f"SignedScore<{_real(problem)}>"
    if mods is None or mods.score is None:
        return f"{_base_score(problem)}<{_real(problem)}>"
    factor = in_units(mods.score.expression)[0] if mods.fast else 1.0
    if factor is None:
        return f"{_base_score(problem)}<{_real(problem)}>"
    return f"ScoreOfUnit<{_real(problem)}, {np.float64(factor).view(np.uint64):#x}>"


def copy_bytes(problem: Problem) -> int:
    """Width of one global access."""
    return max(problem.copy_bytes, problem.dtype.itemsize)


def rotary(problem: Problem) -> str:
    """The policy that turns queries and new keys."""
    if problem.rotary is None:
        return "NoRotary"
    kind = "Pairs" if problem.rotary.interleaved else "Halves"
    return f"{kind}<{problem.rotary.dtype.cuda}, {problem.rotary.dim}>"


def _base_score(problem: Problem) -> str:
    """The score policy of q.k alone, without its number type."""
    # A scale below 1e-30 leaves nothing of a score anyway, and its inverse may be no float.
    if not problem.softcap:
        return "ScaledScore" if problem.softmax_scale > 1e-30 else "SignedScore"
    # The fast tangent errs by 2^-23 of the cap: less than 16-bit results show of caps as models have them.
    fast = problem.dtype.itemsize == 2 and 2**-8 <= problem.softcap <= 2**8 and abs(problem.softmax_scale) < 1e30
    return "SoftCapScore" if fast else "ExactSoftCapScore"


def _real(problem: Problem) -> str:
    """The accumulator's type in CUDA."""
    return "double" if problem.dtype.accumulator == np.float64 else "float"
