"""The masks of a model: as transformers makes them for PyTorch's attention, with the rule that made them where known.

A padded batch or a window makes transformers build a boolean mask of every query and key. Whatever a model does with it
then, it says all there is to know, and attention goes by it. One that nothing has touched still carries its `Rule`:
which keys are padding, and a window. Attention that goes by those reads no mask of every pair and skips tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from transformers import masking_utils
from transformers.utils.import_utils import is_torchdynamo_compiling

from cuflash.masks import Alignment


class Rule(NamedTuple):
    """What a mask says, in fewer elements."""

    window_size: tuple[int, int]
    alignment: Alignment
    keys: Any
    """(b, 1, 1, len_kv) of bool, False at padding; None where there is none."""
    version: int
    """How often torch had seen the mask written to when it was made."""


_ATTRIBUTE = "_cuflash_rule"


def build(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    **others: Any,
) -> Any:
    """The mask of a model's layers, as ``transformers.masking_utils.sdpa_mask``, whose arguments these are.

    Returns
    -------
    torch.Tensor of bool, (b, 1, q_length, kv_length), or None
        True where a query and a key take part. None where all do, or all that a causal mask leaves, and the layer knows
        which of the two it is.
    """
    mask = masking_utils.sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, local_size=local_size, **others,
    )  # fmt: skip
    if mask is None or is_torchdynamo_compiling() or not isinstance(q_offset, int):
        return mask
    window_size = _window(mask_function, local_size)
    own = q_offset - kv_offset  # the key that is query 0's own
    if window_size is None or own not in (0, kv_length - q_length):
        return mask
    keys = None
    if attention_mask is not None:
        keys = attention_mask[:, kv_offset : kv_offset + kv_length]
        if keys.shape[1] != kv_length:
            return mask
        keys = keys[:, None, None, :]
    alignment: Alignment = "top-left" if own == 0 else "bottom-right"
    setattr(mask, _ATTRIBUTE, Rule(window_size, alignment, keys, mask._version))
    return mask


def rule_of(mask: Any) -> Rule | None:
    """The rule of a mask that is as `build` made it."""
    if is_torchdynamo_compiling():
        return None
    rule: Rule | None = getattr(mask, _ATTRIBUTE, None)
    return rule if rule is not None and rule.version == mask._version else None


def _window(mask_function: Callable[..., Any], local_size: int | None) -> tuple[int, int] | None:
    """How many keys before and after its own a query sees, if a function of transformers says no more than that."""
    known = {(-1, 0): masking_utils.causal_mask_function, (-1, -1): masking_utils.bidirectional_mask_function}
    if local_size is not None:
        known[local_size - 1, 0] = masking_utils.sliding_window_causal_mask_function(local_size)
        known[local_size, local_size] = masking_utils.sliding_window_bidirectional_mask_function(local_size)
    return next((window for window, function in known.items() if _same(mask_function, function)), None)


def _same(f: Any, g: Any) -> bool:
    """Whether two functions have the same code and the same in their closures, so that they say the same."""
    if isinstance(f, FunctionType) and isinstance(g, FunctionType):
        cells = ([cell.cell_contents for cell in function.__closure__ or ()] for function in (f, g))
        return f.__code__ is g.__code__ and f.__defaults__ == g.__defaults__ and _same(*map(tuple, cells))
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same, f, g))
    return type(f) is type(g) is int and f == g
